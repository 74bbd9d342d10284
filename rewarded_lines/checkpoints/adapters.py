"""LoRA adapters as PEFT saves them: pairs of factors, and tensors that replace the base's. Read only.

A file with a tensor of unknown role is refused: ignoring the tensor would make the merge wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from rewarded_lines.checkpoints.adapter_config import ADAPTER_CONFIG, MERGE_IN_PEFT, match_patterns, read_adapter_config
from rewarded_lines.checkpoints.conversions import ROOTS, WRAPPERS
from rewarded_lines.checkpoints.families import TIED_HEADS, TOKEN_EMBEDDINGS
from rewarded_lines.checkpoints.headers import TensorInfo, damaged
from rewarded_lines.checkpoints.low_rank import (
    REMEDIES,
    LowRank,
    TokenRows,
    parts_in,
    refuse_pair,
    refuse_rows,
    targets_of,
)
from rewarded_lines.checkpoints.missing_weights import no_weights
from rewarded_lines.checkpoints.reader import INDEX_FILE, SINGLE_FILE, TensorFiles, read_json_object, resolve_folder
from rewarded_lines.checkpoints.tensor_names import without_compilers
from rewarded_lines.errors import Problem, UserError, fail, few

ADAPTER_FILE = "adapter_model.safetensors"
_SHARDS = "adapter_model-*-of-*.safetensors"
# PEFT puts this before the names of the model's modules.
PREFIX = "base_model.model."
# With the adapter's name in it (`lora_A.default.weight`) if a trainer saved its own state instead of PEFT's.
_FACTOR = re.compile(r"(.+)\.lora_(?:([AB])(?:\.[^.]+)?\.weight|embedding_([AB])(?:\.[^.]+)?)")
_REPLACING = re.compile(r"\.modules_to_save(?:\.[^.]+(?=\.)|(?=\.weight$))")
# What PEFT puts after the name of an embedding of which it trains some rows.
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
# What only training computes with: VeLoRA compresses activations, MonteCLoRA samples around A and B.
_TRAINING = re.compile(r"\.lora_(velora_embed|monteclora_sampler\.\w+)$")
# Before the base's own tensor in a layer that PEFT wraps.
_WRAPPED = re.compile(r"\.(?:token_adapter\.base_layer|base_layer|original_module)\.")
_SHOWN = 3
_AGAIN = "copy or download the adapter again"


class Adapter(TensorFiles):
    """A PEFT folder opened for reading.

    Attributes:
        modules: the residuals, by module or bare parameter.
        saved: tensors that replace the base's, by the base's name (`modules_to_save`, trained biases).
        rows: rows that replace the base's (`trainable_token_indices`), by the base's name.
        copies: the base's own tensors, which PEFT saves beside adapters of embeddings; by the base's name.
        enlarged: copies with rows for added tokens, which the base lacks; by the base's name.
        before: the size of the base's vocabulary.
        own_names: the model's names for tensors that the base names otherwise, by the base's name.
    """

    def __init__(self, folder: Path, name: str = "") -> None:
        """Read the settings and the header; messages call the adapter `name`, by default the folder."""
        self.folder = folder
        self.name = name or str(folder)
        self.config = read_adapter_config(folder)
        files = _adapter_files(folder)
        super().__init__(files)
        # The settings are an input, too.
        self.files = [*files, folder / ADAPTER_CONFIG]
        self.saved: dict[str, TensorInfo] = {}
        self.rows: dict[str, TokenRows] = {}
        self.copies: dict[str, TensorInfo] = {}
        self.enlarged: dict[str, TensorInfo] = {}
        self.before = 0
        self.own_names: dict[str, str] = {}
        pairs = self._sort_out(files[0])
        self.modules: dict[str, LowRank] = self._pair_up(pairs, files[0])
        if not (self.modules or self.saved or self.rows):
            raise damaged(files[0], "no LoRA tensors in it")

    def targets(self) -> list[str]:
        """Return the tensors of a checkpoint that the adapter changes or repeats."""
        return [*(module.tensor for module in self.modules.values()), *self.saved, *self.rows, *self.copies]

    def rename(self, names: Mapping[str, str]) -> None:
        """Take the base's names for the `targets`, where `names` has one; modules keep their own."""
        stored = {name: names.get(one.tensor, one.tensor) for name, one in self.modules.items()}
        self.modules = {name: replace(one, stored=stored[name]) for name, one in self.modules.items()}
        self.own_names |= {theirs: mine for mine, theirs in names.items()}
        self.saved = {names.get(name, name): info for name, info in self.saved.items()}
        self.rows = {names.get(name, name): rows for name, rows in self.rows.items()}
        self.copies = {names.get(name, name): info for name, info in self.copies.items()}

    def find_parts(self, base: Mapping[str, TensorInfo]) -> None:
        """Look up the base's tensors of each fused parameter that the base stores expert by expert."""
        fused = [module for module in self.modules.values() if module.experts]
        parts = parts_in(base, {one.tensor: (one.experts, *one.shape[-2:]) for one in fused})
        self.modules = {name: replace(one, parts=parts.get(one.tensor, ())) for name, one in self.modules.items()}

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
            if self._repeats(name) or _TRAINING.search(name):
                continue
            if match := _FACTOR.fullmatch(inner):
                known = pairs.setdefault(match[1], {}).setdefault(match[2] or f"{match[3]}E", info) is info
            else:
                known = self._put_whole(inner, info)
            if not known:
                strange.append(name)
        if strange:
            raise _refuse_strange(strange, path)
        return pairs

    def _repeats(self, name: str) -> bool:
        """Return whether a tensor repeats another: PEFT writes enlarged embeddings that it replaces under two names."""
        first, found, kind = name.rpartition(".modules_to_save.weight")
        other = self.tensors.get(f"{first}.weight") if found and not kind else None
        mine = self.tensors[name]
        if other is None or (other.shape, other.dtype) != (mine.shape, mine.dtype):
            return False
        return bool(np.array_equal(self.read(name), self.read(other.name)))

    def _put_whole(self, inner: str, info: TensorInfo) -> bool:
        """Put a tensor into `saved`, `rows` or `copies`; return whether it belongs there."""
        module, rows, _ = inner.partition(TOKEN_ROWS)
        if rows:
            return self.rows.setdefault(f"{module}.weight", TokenRows(info, self._tokens(module))).info is info
        # A state that a trainer saved itself has both values of a module that PEFT replaces.
        inner = _REPLACING.sub("", inner)
        original = _WRAPPED.sub(".", inner)
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

    def _tokens(self, module: str) -> tuple[int, ...]:
        """Return the tokens whose rows of an embedding are replaced."""
        given = self.config.tokens
        if isinstance(given, dict):
            given = next((tokens for end, tokens in given.items() if module.endswith(end)), [])
        return tuple(given)

    def _is_saved(self, module: str) -> bool:
        """Return whether PEFT saves the module, or one around it: an end of the name is in `modules_to_save`."""
        # With `ensure_weight_tying` PEFT writes the head, too, and only names the embeddings.
        if self.config.tied and self.config.modules_to_save and f"{module}.weight" in TIED_HEADS:
            return True
        around = accumulate(module.split("."), "{}.{}".format)
        return any(name.endswith(end) for name in around for end in self.config.modules_to_save)

    def _pair_up(self, pairs: Mapping[str, Mapping[str, TensorInfo]], path: Path) -> dict[str, LowRank]:
        config, settings = self.config, path.parent / ADAPTER_CONFIG
        targets = targets_of(pairs, config, str(path))
        names = [name for name, _ in targets.values()]
        ranks = match_patterns(config.rank_pattern, names, config.rank, settings)
        alphas = match_patterns(config.alpha_pattern, names, config.alpha, settings)
        modules, problems = {}, []
        for module, factors in pairs.items():
            name, bare = targets[module]
            rank = int(ranks[name])
            if what := refuse_pair(factors, rank, bare):
                remedy = next((said for kind, said in REMEDIES.items() if kind in what), _AGAIN)
                problems.append(Problem(what, f"{path}: {module}", remedy=remedy))
                continue
            a, b = (factors[name] for name in sorted(factors))
            experts = a.shape[0] // rank if bare else 0
            modules[name] = LowRank(name, a, b, config.scaling(rank, alphas[name]), "AE" in factors, experts)
        problems += [
            Problem(what, f"{path}: {name}", remedy=_AGAIN)
            for name, rows in self.rows.items()
            if (what := refuse_rows(rows))
        ]
        if problems:
            raise UserError(few(problems, str(path), _SHOWN, "more modules likewise"))
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
    """Return a tensor's name behind PEFT's prefix, without what trainers and compilers add; None without the prefix.

    A model that was wrapped twice has the prefix twice.
    """
    around, found, inner = without_compilers(name).partition(PREFIX)
    while inner.startswith(PREFIX):
        inner = inner.removeprefix(PREFIX)
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
    # Beside an adapter's shards, transformers writes an index of this name.
    indices = () if any(folder.glob(_SHARDS)) else (INDEX_FILE,)
    whole = [name for name in (SINGLE_FILE, *indices) if (folder / name).is_file()]
    if whole:
        what, remedy = "the folder holds both an adapter and a whole model", "give the one you mean a folder of its own"
        raise fail(what, where=str(folder), expected=f"{ADAPTER_CONFIG} or {whole[0]}", remedy=remedy)
    return True


def bare_base(folder: Path, fetched: bool = True) -> BareBase | None:
    """Return a base whose weights are absent or quantized; None if they can be read.

    `fetched` is False if the weights were not downloaded with the folder.
    """
    if is_adapter(folder):
        raise no_weights(folder, SINGLE_FILE)
    weights = fetched and any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
    path = folder / "config.json"
    if path.is_file():
        config = read_json_object(path)
        # QLoRA: the adapters' residuals are exact in whatever type the base is stored.
        return BareBase(folder, config) if config.get("quantization_config") or not weights else None
    if not weights:
        raise no_weights(folder, f"{SINGLE_FILE}, or config.json alone for adapters")
    return None


def _adapter_files(folder: Path) -> list[Path]:
    """Return an adapter's weight files: PEFT writes one; transformers' `save_pretrained` cuts a large one in shards."""
    if beside := [path.name for path in folder.glob("new_embeddings.*")]:
        what = "rows for added tokens in a file of their own, which only earlier versions of vLLM read"
        remedy = "give the base these rows in its embeddings and head (resize_token_embeddings), and remove the file"
        raise fail(what, where=str(folder), got=beside[0], remedy=remedy)
    if (folder / ADAPTER_FILE).is_file():
        return [folder / ADAPTER_FILE]
    shards = sorted(folder.glob(_SHARDS))
    if not shards:
        raise no_weights(folder, ADAPTER_FILE, "adapter ")
    count = shards[0].stem.rpartition("-")[2]
    if count != f"{len(shards):05d}":
        what, got = "shards of the adapter are missing", ", ".join(path.name for path in shards[:_SHOWN])
        raise fail(what, where=str(folder), expected=f"{count} files {_SHARDS}", got=got, remedy=_AGAIN)
    return shards


def _refuse_strange(names: list[str], path: Path) -> UserError:
    shown = ", ".join(name[:120] for name in names[:_SHOWN])
    if any("lora_magnitude_vector" in name for name in names):
        what = "a DoRA adapter: its learned magnitudes scale whole columns, so a sum of adapters is not an adapter"
    elif any(name.endswith(".lora_B.bias") for name in names):
        what = "B has a bias (lora_bias), which no matrix of the base can hold"
    else:
        what = f"{len(names)} tensors that are not known here: dropping them would change the adapter"
    expected = f"{PREFIX}….lora_A.weight and .lora_B.weight, and tensors that adapter_config.json names"
    return fail(what, where=str(path), expected=expected, got=shown, remedy=MERGE_IN_PEFT)
