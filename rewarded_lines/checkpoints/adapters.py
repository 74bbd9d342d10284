"""LoRA adapters as PEFT saves them: pairs of factors, and tensors that replace the base's. Read only.

A file with a tensor of unknown role is refused: ignoring the tensor would make the merge wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.adapter_config import (
    ADAPTER_CONFIG,
    MERGE_IN_PEFT,
    match_patterns,
    read_adapter_config,
)
from rewarded_lines.checkpoints.conversions import ROOTS, WRAPPERS
from rewarded_lines.checkpoints.families import TIED_HEADS, TOKEN_EMBEDDINGS
from rewarded_lines.checkpoints.headers import TensorInfo, damaged
from rewarded_lines.checkpoints.reader import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorFiles,
    no_weights,
    read_config,
    read_json_object,
    resolve_folder,
)
from rewarded_lines.checkpoints.tensor_names import without_compilers
from rewarded_lines.errors import Problem, UserError, fail

ADAPTER_FILE = "adapter_model.safetensors"
# PEFT puts this before the names of the model's modules.
PREFIX = "base_model.model."
# With the adapter's name in it (`lora_A.default.weight`) if a trainer saved its own state instead of PEFT's.
_FACTOR = re.compile(r"(.+)\.lora_(?:([AB])(?:\.[^.]+)?\.weight|embedding_([AB])(?:\.[^.]+)?)")
_REPLACING = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")
_SHOWN = 3


@dataclass(frozen=True)
class LowRank:
    """The residual of an adapter for one matrix: scaling·B·A, for embeddings scaling·(B·A)ᵀ.

    Attributes:
        module: the name in the model, e.g. `model.layers.0.self_attn.q_proj`.
        a: A in the file, [r, in]; for embeddings [r, tokens].
        b: B in the file, [out, r]; for embeddings [width, r].
        scaling: α/r, or α/√r.
        embedding: the module is an embedding.
        stored: the base's name for the matrix, if it is not the module's.
    """

    module: str
    a: TensorInfo
    b: TensorInfo
    scaling: float
    embedding: bool
    stored: str = ""

    @property
    def rank(self) -> int:
        """Return r."""
        return self.a.shape[0]

    @property
    def tensor(self) -> str:
        """Return the name of the matrix in the base's checkpoint."""
        return self.stored or f"{self.module}.weight"

    @property
    def shape(self) -> tuple[int, int]:
        """Return the matrix's shape: [out, in], for embeddings [tokens, width]."""
        out, columns = self.b.shape[0], self.a.shape[1]
        return (columns, out) if self.embedding else (out, columns)


class Adapter(TensorFiles):
    """A PEFT folder opened for reading.

    Attributes:
        modules: the residuals, by module.
        saved: tensors that replace the base's, by the base's name (`modules_to_save`, trained biases).
        copies: the base's own tensors, which PEFT saves beside adapters of embeddings; by the base's name.
        own_names: the model's names for tensors that the base names otherwise, by the base's name.
    """

    def __init__(self, folder: Path, name: str = "") -> None:
        """Read the settings and the header; messages call the adapter `name`, by default the folder."""
        self.folder = folder
        self.name = name or str(folder)
        self.config = read_adapter_config(folder)
        path = folder / ADAPTER_FILE
        if not path.is_file():
            raise no_weights(folder, ADAPTER_FILE, "adapter ", "peft import AutoPeftModelForCausalLM")
        super().__init__([path])
        # The settings are an input, too.
        self.files = [path, folder / ADAPTER_CONFIG]
        self.saved: dict[str, TensorInfo] = {}
        self.copies: dict[str, TensorInfo] = {}
        self.own_names: dict[str, str] = {}
        pairs = self._sort_out(path)
        self.modules: dict[str, LowRank] = self._pair_up(pairs, path)
        if not self.modules and not self.saved:
            raise damaged(path, "no LoRA tensors in it")

    def targets(self) -> list[str]:
        """Return the tensors of a checkpoint that the adapter changes or repeats."""
        return [*(module.tensor for module in self.modules.values()), *self.saved, *self.copies]

    def rename(self, names: Mapping[str, str]) -> None:
        """Take the base's names for the `targets`, where `names` has one; modules keep their own."""
        self.modules = {
            name: replace(module, stored=names.get(module.tensor, module.tensor))
            for name, module in self.modules.items()
        }
        self.own_names |= {theirs: mine for mine, theirs in names.items()}
        self.saved = {names.get(name, name): info for name, info in self.saved.items()}
        self.copies = {names.get(name, name): info for name, info in self.copies.items()}

    def rename_modules(self, names: Mapping[str, str]) -> None:
        """Take other names for modules."""
        renamed = [replace(module, module=names.get(name, name)) for name, module in self.modules.items()]
        self.modules = {module.module: module for module in renamed}

    def _sort_out(self, path: Path) -> dict[str, dict[str, TensorInfo]]:
        """Return the factors by module; put other tensors into `saved` or `copies`, refuse the rest."""
        pairs: dict[str, dict[str, TensorInfo]] = {}
        strange = []
        inside = {name: inner for name in self.tensors if (inner := _inner(name)) is not None}
        for name, info in self.tensors.items():
            # A state that a trainer saved itself may lack the prefix, but then in all names.
            inner = inside.get(name, "" if inside else without_compilers(name))
            if match := _FACTOR.fullmatch(inner):
                known = pairs.setdefault(match[1], {}).setdefault(match[2] or f"{match[3]}E", info) is info
            else:
                known = self._put_whole(inner, info)
            if not known:
                strange.append(name)
        if strange:
            raise _refuse_strange(strange, path)
        return pairs

    def _put_whole(self, inner: str, info: TensorInfo) -> bool:
        """Put a tensor into `saved` or `copies`; return whether it belongs there."""
        # A state that a trainer saved itself has both values of a module that PEFT replaces.
        inner = _REPLACING.sub("", inner)
        original = inner.replace(".base_layer.", ".").replace(".original_module.", ".")
        module, _, kind = original.rpartition(".")
        of_base = module.rpartition(".")[2] in TOKEN_EMBEDDINGS or original in TIED_HEADS
        if original in (self.saved if original == inner else self.copies):
            return False
        if original == inner and self._is_saved(module):
            self.saved[original] = info
        elif kind == "bias" and self.config.bias != "none":
            self.saved[original] = info
        elif ".original_module." in inner or (kind == "weight" and of_base):
            self.copies[original] = info
        else:
            return False
        return True

    def _is_saved(self, module: str) -> bool:
        """Return whether PEFT saves the module, or one around it: an end of the name is in `modules_to_save`."""
        around = accumulate(module.split("."), "{}.{}".format)
        return any(name.endswith(end) for name in around for end in self.config.modules_to_save)

    def _pair_up(self, pairs: Mapping[str, Mapping[str, TensorInfo]], path: Path) -> dict[str, LowRank]:
        config, settings = self.config, path.parent / ADAPTER_CONFIG
        ranks = match_patterns(config.rank_pattern, pairs, config.rank, settings)
        alphas = match_patterns(config.alpha_pattern, pairs, config.alpha, settings)
        modules, problems = {}, []
        for module, factors in pairs.items():
            if what := _refuse_pair(factors, int(ranks[module])):
                problems.append(Problem(what, f"{path}: {module}", remedy="copy or download the adapter again"))
                continue
            a, b = (factors[name] for name in sorted(factors))
            modules[module] = LowRank(module, a, b, config.scaling(a.shape[0], alphas[module]), "AE" in factors)
        if problems:
            more = [Problem(f"{len(problems) - _SHOWN} more modules likewise")] if len(problems) > _SHOWN else []
            raise UserError(problems[:_SHOWN] + more)
        return modules


class BareBase(TensorFiles):
    """A model folder of which only the config is used: adapters over it are merged without its weights."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Open no weight file; `config` is the content of config.json."""
        super().__init__([])
        self.folder = folder
        self.config = config
        self.files = [folder / "config.json"]


def _inner(name: str) -> str | None:
    """Return a tensor's name behind PEFT's prefix, without what trainers and compilers add; None without the prefix."""
    around, found, inner = without_compilers(name).partition(PREFIX)
    return inner if found and set(around.split(".")) <= {"", *WRAPPERS, *ROOTS} else None


def names_adapter(reference: str) -> bool:
    """Return whether a folder or Hub id is an adapter; False if it cannot be opened."""
    try:
        return is_adapter(resolve_folder(reference))
    except UserError:
        return False


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter and not a whole model; refuse a folder with both."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    whole = [name for name in (SINGLE_FILE, INDEX_FILE) if (folder / name).is_file()]
    if whole:
        raise fail(
            "the folder holds both an adapter and a whole model",
            where=str(folder),
            expected=f"{ADAPTER_CONFIG} or {whole[0]}",
            remedy="give the one you mean a folder of its own",
        )
    return True


def bare_base(folder: Path, fetched: bool = True) -> BareBase | None:
    """Return a base whose weights are absent or quantized; None if they can be read.

    `fetched` is False if the weights were not downloaded with the folder.
    """
    weights = fetched and any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
    path = folder / "config.json"
    if path.is_file():
        config = read_json_object(path)
        # QLoRA: the adapters' residuals are exact in whatever type the base is stored.
        return BareBase(folder, config) if config.get("quantization_config") or not weights else None
    return None if weights else BareBase(folder, read_config(folder))


def _refuse_strange(names: list[str], path: Path) -> UserError:
    shown = ", ".join(name[:120] for name in names[:_SHOWN])
    if any("lora_magnitude_vector" in name for name in names):
        what = "a DoRA adapter: its learned magnitudes scale whole columns, so a sum of adapters is not an adapter"
    elif any(name.endswith(".lora_B.bias") for name in names):
        what = "B has a bias (lora_bias), which no matrix of the base can hold"
    else:
        what = f"{len(names)} tensors that are not known here: dropping them would change the adapter"
    return fail(
        what,
        where=str(path),
        expected=f"{PREFIX}….lora_A.weight and .lora_B.weight, and tensors that adapter_config.json names",
        got=shown,
        remedy=MERGE_IN_PEFT,
    )


def _refuse_pair(factors: Mapping[str, TensorInfo], rank: int) -> str:
    """Return why the factors of one module are refused, or ""."""
    if set(factors) not in ({"A", "B"}, {"AE", "BE"}):
        return "A or B is missing, or there are two of them"
    a, b = (factors[name] for name in sorted(factors))
    if len(a.shape) != 2 or len(b.shape) != 2:
        return f"A has shape {a.shape}, B {b.shape}: only matrices are merged, no convolutions"
    if not a.dtype.floating or not b.dtype.floating:
        return f"A is of type {a.dtype.torch}, B of {b.dtype.torch}: weights are floating-point numbers"
    if a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        return f"A has shape {a.shape}, B {b.shape}: B·A does not exist"
    return "" if a.shape[0] == rank else f"A has rank {a.shape[0]}, {ADAPTER_CONFIG} says {rank}"
