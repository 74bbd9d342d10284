"""`Plan`: checked inputs, ready to be merged into whole models or into adapters."""

from __future__ import annotations

import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from rewarded_lines.checkpoints.adapter_config import ADAPTER_CONFIG
from rewarded_lines.checkpoints.adapters import Adapter, BareBase
from rewarded_lines.checkpoints.dtypes import FLOATS
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.reader import INDEX_FILE, Checkpoint, read_json_object
from rewarded_lines.checkpoints.tensor_depth import Depths
from rewarded_lines.errors import did_you_mean, fail
from rewarded_lines.folders import write_json
from rewarded_lines.kernels.nonfinite import NonFinite
from rewarded_lines.merger.carried_files import Carried, key_of
from rewarded_lines.merger.carried_settings import BASE
from rewarded_lines.merger.lines_schedule import Outside
from rewarded_lines.merger.methods import METHODS
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.progress import SILENT, Progress

DTYPES = ("auto", "float32", "bfloat16", "float16")
OUTSIDE: tuple[Outside, ...] = ("alpha", "depth")


@dataclass(frozen=True)
class Kept:
    """What an adapter of low rank holds of a merged residual, as shares of its ‖s·m‖², from the written values.

    Attributes:
        kept: of the whole residual.
        of_matrices: of the part in the matrices that the adapter changes.
        left_out: the share in all other tensors, which stay the base's: embeddings, norms, biases, head, experts.
        worst: of the matrix that keeps least.
        worst_matrix: its name.
    """

    kept: float
    of_matrices: float
    left_out: float
    worst: float
    worst_matrix: str

    def sentence(self) -> str:
        """Return the shares in words."""
        return (
            f"not the whole merge: the adapter holds {self.kept:.2%} of the merged residual's ‖·‖², and "
            f"{self.of_matrices:.2%} of that in the linear layers (least: {self.worst:.2%} in {self.worst_matrix}). "
            f"{self.left_out:.2%} lies in other tensors, such as embeddings and norms, which stay the base's"
        )


class Plan(ABC):
    """A base and policies that have passed the pre-flight, ready to be merged with any `MergeSpec`.

    Attributes:
        kind: its output, "full" models or an "adapter", for `merge.json`.
        reads_base: whether the base's weights decide the output.
        policies: by name, in the order of the weights.
        notes: for the user, on the inputs.
        reference: the user's folder or Hub id of the base.
        references: likewise of each policy.
        carried: the files that the outputs get beside weights and config.
    """

    kind: ClassVar[str]
    reads_base: bool = True

    def __init__(
        self, base: Checkpoint | BareBase, policies: Mapping[str, Checkpoint | Adapter], depths: Depths, dtype: str
    ) -> None:
        """Bind the inputs; `dtype` is one of `DTYPES`."""
        self.base = base
        self.policies = policies
        self.depths = depths
        self.notes: list[str] = []
        self.reference, self.references = "", dict[str, str]()
        # With the references, these let another process make the same plan.
        self.layers: str | None = None
        self.tower: str | None = None
        self.dtype_name = dtype
        self.carried = Carried({BASE: base.folder})
        self._dtype = FLOATS.get(dtype)

    @abstractmethod
    def outputs(self, spec: MergeSpec) -> list[TensorInfo]:
        """Return name, type and shape of every tensor of an output, in order."""

    @abstractmethod
    def rank(self, spec: MergeSpec) -> int | None:
        """Return the largest rank of an output's matrices if it is an adapter, None if it is a whole model."""

    def kept(self, spec: MergeSpec) -> Kept | None:
        """Return what a written output holds of the merge if it is an approximation, None if it holds all."""
        return None

    @abstractmethod
    def prepare(self, specs: Sequence[MergeSpec]) -> None:
        """Measure what the methods need of whole tensors (norms, thresholds), several tensors at a time."""

    @abstractmethod
    def auto_alpha(self, specs: Sequence[MergeSpec]) -> list[float]:
        """Return (‖Σ τ_i‖₁/‖m‖₁)/N for each spec, the heuristic α of LiNeS' authors for merging tasks.

        m is the method's residual before the schedule, N the number of policies. An m that is zero or not finite is
        refused.

        Source: LiNeS, arXiv 2410.17146, section 4.2.
        """

    @abstractmethod
    def matched_alpha(self, weights: Sequence[float], like: MergeSpec) -> float:
        """Return the constant scale γ that gives the method of `like` the same norm as its schedule does.

        γ² = Σ_t ‖s_t·m_t‖² / Σ_t ‖m_t‖² over the tensors t, m_t the merged residual and s_t its scale; for linear
        methods of `weights`, and each policy may have its own scale. Norms are Euclidean; a residual of zero gets 1.
        """

    @abstractmethod
    def write(
        self, specs: Sequence[MergeSpec], folders: Sequence[Path], max_shard_size: int, progress: Progress = SILENT
    ) -> NonFinite:
        """Write weights, settings and tokenizer of each output to its folder; inputs are read once for all.

        `max_shard_size` is in bytes; an adapter has only one file. The caller refuses the values that are not finite.
        """

    def fits_base(self) -> bool:
        """Return whether the base's model in memory has room for an output: no head of its own, no added tokens."""
        path = self.base.folder / "config.json"
        return self.kind == "adapter" or self.base.config == read_json_object(path)

    def check_schedule(self, spec: MergeSpec) -> None:
        """Refuse a schedule that does not fit the model or the method; see `Schedule.check`."""
        spec.schedule.check(self.depths)
        if len(spec.schedule.lines) > 1 and not METHODS[spec.method].linear:
            linear = ", ".join(name for name, row in METHODS.items() if row.linear)
            raise fail(
                f"{spec.method} is not linear in the residuals, so policies cannot have schedules of their own in it",
                where=f"--method {spec.method}",
                expected=f"one schedule for all policies, or one of {linear}",
                got=spec.schedule.text(list(self.policies)),
            )

    def scales(self, spec: MergeSpec) -> dict[str, list[float]]:
        """Return the scale of every block, first to last, for each list of blocks; see `Schedule.by_block`."""
        return spec.schedule.by_block(self.depths.stacks, list(self.policies))

    def scale(self, name: str, spec: MergeSpec, policy: int = 0) -> float:
        """Return the schedule's scale of one tensor of a policy, by the policy's place."""
        return spec.schedule.scale(self.depths.place[name], name, policy)

    def folded(self, name: str, spec: MergeSpec, weights: Sequence[float]) -> tuple[tuple[float, ...], float]:
        """Return weights of one tensor, and a scale of the merged residual, whose products are the s_i·λ_i.

        A scale that all policies with a weight share stays apart, for rules that are not linear. Others become factors
        of the weights, and the scale is 1.
        """
        scales = [self.scale(name, spec, policy) for policy in range(len(weights))]
        shared = {scale for scale, weight in zip(scales, weights, strict=True) if weight}
        if len(shared) <= 1:
            return tuple(weights), shared.pop() if shared else 1.0
        return tuple(scale * weight for scale, weight in zip(scales, weights, strict=True)), 1.0

    def input_files(self) -> tuple[list[Path], dict[str, list[Path]]]:
        """Return every file that decides an output: of the base, and of each policy by name."""
        base = _model_files(self.base) if self.reads_base else [self.base.folder / "config.json"]
        own = {name: self.carried.files_of(key_of(name)) for name in self.policies}
        policies = {name: [*_model_files(policy), *own[name]] for name, policy in self.policies.items()}
        return [*base, *self.carried.files_of(BASE)], policies

    @cached_property
    def text_folder(self) -> Path:
        """Return a folder with the outputs' tokenizer and generation settings: the base's, or a temporary one."""
        if not self.carried.changed:
            return self.base.folder
        made = tempfile.TemporaryDirectory(prefix="rewarded-lines-")
        # It goes with this object, or at Python's exit.
        weakref.finalize(self, made.cleanup)
        self.carried.copy(Path(made.name))
        write_json(Path(made.name) / "config.json", self.carried.config(self.base.config))
        return Path(made.name)


def _model_files(source: Checkpoint | BareBase | Adapter) -> list[Path]:
    names = (ADAPTER_CONFIG,) if isinstance(source, Adapter) else ("config.json", INDEX_FILE)
    beside = [source.folder / name for name in names]
    return list(dict.fromkeys([*source.files, *(path for path in beside if path.is_file())]))


def choose(option: str, value: str, known: Sequence[str]) -> None:
    """Refuse a value that is not among the known ones."""
    if value not in known:
        remedy = did_you_mean(value, known)
        raise fail(f"unknown value `{value}`", where=option, expected=", ".join(known), remedy=remedy)
