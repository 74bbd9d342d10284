"""`merge --as adapter --rank K`: the merged residual of whole policies as the nearest LoRA adapter of rank K."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from rewarded_lines.checkpoints.adapter_config import ADAPTER_CONFIG
from rewarded_lines.checkpoints.adapters import ADAPTER_FILE, Adapter
from rewarded_lines.checkpoints.dtypes import F32, DType, as_float64
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.low_rank import LowRank
from rewarded_lines.checkpoints.reader import total_bytes
from rewarded_lines.checkpoints.writer import CheckpointWriter
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.folders import write_json
from rewarded_lines.kernels import kernels
from rewarded_lines.kernels.blocks import Array, Workspace
from rewarded_lines.kernels.distances import visit_blocks
from rewarded_lines.kernels.nonfinite import NonFinite
from rewarded_lines.kernels.norms import exact_sum
from rewarded_lines.kernels.residual_matrices import best_factors, whole_tensor
from rewarded_lines.kernels.tensor_merge import TensorMerge
from rewarded_lines.merger.adapter_settings import adapter_config
from rewarded_lines.merger.lora_folding import is_transposed
from rewarded_lines.merger.lora_stacking import AdapterOutput, Stack
from rewarded_lines.merger.model_plan import ModelPlan
from rewarded_lines.merger.plan import Kept, Plan
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.references import looks_local

# Matrices in blocks that are no layers: routers, tables of relative positions, experts that transformers fuses.
_NO_LAYER = re.compile(r"\.(gate|router|relative_attention_bias)\.weight$|\.experts\.\d+\.")


class LowRankPlan(Plan):
    """Merges policies, whole models or adapters, into adapters of a given rank.

    For each linear layer of the blocks, B·A is the nearest matrix of that rank to the merged residual s·m: its singular
    value decomposition, cut off. Any method is possible. vLLM and PEFT load linear layers only in the same way, so
    everything else stays the base's, and `kept` has what that costs. B and A are float32 unless the user chooses.
    The merge is computed on this machine's linear algebra library: another may give other last bits.
    """

    kind = "adapter"

    def __init__(self, whole: ModelPlan, rank: int) -> None:
        """Bind a checked plan of whole models; refuse a rank that is no rank, and a base without such layers."""
        super().__init__(whole.base, whole.policies, whole.depths, whole.dtype_name)
        if rank < 1:
            raise fail("not a rank", where="--rank", expected="a whole number from 1", got=str(rank))
        self._whole = whole
        self.notes, self.carried = whole.notes, whole.carried
        self.reference, self.references = whole.reference, whole.references
        infos = [whole.base.tensors[name] for name in whole.names]
        layers = [info for info in infos if self._is_layer(info)]
        self._stacks = {info.name: self._stack(info, rank, self._dtype or F32) for info in layers}
        self._rest = [info.name for info in infos if info.dtype.floating and info.name not in self._stacks]
        self._output = AdapterOutput(self._dtype or F32, {stack.path: stack for stack in self._stacks.values()}, {})
        self._kept: dict[MergeSpec, Kept] = {}
        if problems := self._problems():
            raise UserError(problems)

    def kept(self, spec: MergeSpec) -> Kept | None:
        """See `Plan.kept`; known once the adapter is written."""
        return self._kept.get(spec)

    def outputs(self, _: MergeSpec) -> list[TensorInfo]:
        """See `Plan.outputs`."""
        return self._output.tensors({})

    def rank(self, _: MergeSpec) -> int:
        """See `Plan.rank`."""
        return max(stack.rank for stack in self._stacks.values())

    def prepare(self, specs: Sequence[MergeSpec]) -> None:
        """See `Plan.prepare`."""
        self._whole.prepare(specs)

    def auto_alpha(self, specs: Sequence[MergeSpec]) -> list[float]:
        """See `Plan.auto_alpha`."""
        return self._whole.auto_alpha(specs)

    def matched_alpha(self, weights: Sequence[float], like: MergeSpec) -> float:
        """See `Plan.matched_alpha`."""
        return self._whole.matched_alpha(weights, like)

    def write(
        self, specs: Sequence[MergeSpec], folders: Sequence[Path], max_shard_size: int, progress: Progress = SILENT
    ) -> NonFinite:
        """See `Plan.write`; an adapter is always one file."""
        tensors = self.base.tensors
        progress.expect(total_bytes(tensors[name] for name in [*self._stacks, *self._rest]))
        progress.start("measuring what no layer holds", counted=True)
        nonfinite = self._whole.nonfinite()
        left_out = self._left_out(specs, nonfinite, progress)
        # By spec, of every matrix: ‖s·m‖², and ‖s·m − B·A‖².
        found: list[dict[str, tuple[float, float]]] = [{} for _ in specs]
        with ExitStack() as stack:
            open_writer = partial(CheckpointWriter, single_file=ADAPTER_FILE, together=len(folders))
            made = (open_writer(folder, self.outputs(specs[0])) for folder in folders)
            writers = [stack.enter_context(writer) for writer in made]
            for name in self._stacks:
                progress.start(f"factoring {name}", counted=True)
                steps = [self._whole.step(name, spec, copies=False) for spec in specs]
                take = partial(_residuals, steps)
                matrices = whole_tensor(self._whole.workspace, tensors[name], len(specs), take)
                for matrix, writer, sizes in zip(matrices, writers, found, strict=True):
                    sizes[name] = self._factor(name, matrix, writer)
                progress.advance(tensors[name].bytes)
        for spec, folder, sizes, rest in zip(specs, folders, found, left_out, strict=True):
            self._kept[spec] = _kept(sizes, rest)
            self.carried.copy(folder)
            write_json(folder / ADAPTER_CONFIG, self._settings())
        return nonfinite

    def _factor(self, name: str, matrix: Array, writer: CheckpointWriter) -> tuple[float, float]:
        """Write B and A of one matrix; return its ‖·‖² and that of what they lack."""
        if not np.isfinite(matrix).all():
            what = "the merged residual is not finite, so no adapter can approximate it"
            raise fail(what, where=name, remedy="rewarded-lines inspect --base … POLICY tells the tensors and counts")
        stack = self._stacks[name]
        oriented = matrix.T if is_transposed(stack.like, self.base) else matrix
        stored = []
        for factor, values in zip("BA", best_factors(oriented, stack.rank), strict=True):
            flat = np.ascontiguousarray(values).ravel()
            rounded = np.empty(flat.size, self._output.dtype.storage)
            kernels.cast(flat, rounded)
            writer.write(stack.key(factor), 0, rounded)
            stored.append(as_float64(rounded).reshape(values.shape))
        lost = oriented - stored[0] @ stored[1]
        return float(np.square(matrix).sum()), float(np.square(lost).sum())

    def _left_out(self, specs: Sequence[MergeSpec], nonfinite: NonFinite, progress: Progress) -> list[float]:
        """Return for each spec ‖s·m‖² over the finite values of all tensors that the adapter does not change."""
        steps = {name: [self._whole.step(name, spec, copies=False) for spec in specs] for name in self._rest}
        squares: list[list[float]] = [[] for _ in specs]

        def measure(workspace: Workspace, name: str, _: int, count: int) -> None:
            residuals = _residuals(steps[name], workspace)
            finite = np.isfinite(residuals)
            for row, residual in zip(squares, np.where(finite, residuals, 0.0), strict=True):
                row.append(float(np.square(residual).sum()))
            nonfinite.look(workspace, name, steps[name], (~finite).sum(axis=1).tolist())
            progress.advance(count * self.base.tensors[name].dtype.itemsize)

        visit_blocks(self._whole.workspace, [self.base.tensors[name] for name in self._rest], measure)
        return [exact_sum(row) for row in squares]

    def _is_layer(self, info: TensorInfo) -> bool:
        """Return whether a tensor is the matrix of a linear layer in a block."""
        inside = self.depths.place[info.name].block is not None and info.name.endswith(".weight")
        return inside and len(info.shape) == 2 and info.dtype.floating and not _NO_LAYER.search(info.name)

    def _stack(self, info: TensorInfo, rank: int, dtype: DType) -> Stack:
        module, rank = info.name.removesuffix(".weight"), min(rank, *info.shape)

        def layer(shape: tuple[int, ...]) -> LowRank:
            factors = TensorInfo("", dtype, (rank, shape[1])), TensorInfo("", dtype, (shape[0], rank))
            return LowRank(module, *factors, 1.0, stored=info.name)

        like = layer(info.shape)
        return Stack(layer(info.shape[::-1]) if is_transposed(like, self.base) else like, rank, (), module)

    def _problems(self) -> list[Problem]:
        """Return why an adapter of layers would not do: tokens that the base lacks, or names PEFT would not find."""
        where, remedy = f"--as adapter --rank, base {self.reference}", "pass --as full"
        if any(policy.enlarged for policy in self.policies.values() if isinstance(policy, Adapter)):
            what = "the policies' vocabulary is larger than the base's, and only linear layers are approximated"
            return [Problem(what, where, remedy=f"{remedy}, or leave --rank out")]
        if any(key.endswith("_config") and isinstance(value, Mapping) for key, value in self.base.config.items()):
            what = "a model of several parts, whose layers may have other names in memory than in the file"
            return [Problem(what, where, remedy=remedy)]
        if bare := [path for path in self.depths.stacks if "." not in path]:
            what = "the file's names lack what the model's class puts before them, such as transformer."
            again = "load and save the base with transformers (save_pretrained), or pass --as full"
            return [Problem(what, where, got=f"{bare[0]}.0.…", remedy=again)]
        return [] if self._stacks else [Problem("no linear layers in the blocks", where, remedy=remedy)]

    def _settings(self) -> dict[str, object]:
        base = str(self.base.folder.resolve()) if looks_local(self.reference) else self.reference
        names = map(str, self.base.config.get("architectures") or ())
        language = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
        transposed = any(is_transposed(stack.like, self.base) for stack in self._stacks.values())
        found = adapter_config([], self._output, len(self._stacks), base)
        return found | {"fan_in_fan_out": transposed, "task_type": "CAUSAL_LM" if language else None}


def _residuals(steps: Sequence[TensorMerge], workspace: Workspace) -> Array:
    """Return s·m of the loaded block for every spec, [specs, n]."""
    count = workspace.residuals().shape[1]
    return np.array(
        [workspace.merged_residuals([one])[0] * one.scale if one.rows else np.zeros(count) for one in steps]
    )


def _kept(sizes: Mapping[str, tuple[float, float]], left_out: float) -> Kept:
    inside, lost = (exact_sum(column) for column in zip(*sizes.values(), strict=True))
    shares = {name: _share(size - missing, size) for name, (size, missing) in sizes.items()}
    worst = min(shares, key=lambda name: shares[name])
    total = inside + left_out
    kept, rest = _share(inside - lost, total), left_out / total if total else 0.0
    return Kept(kept, _share(inside - lost, inside), rest, shares[worst], worst)


def _share(part: float, whole: float) -> float:
    return max(0.0, part / whole) if whole else 1.0
