"""What an adapter changes: matrices of low rank, rows of embeddings; and which parameter a pair of factors is for.

PEFT names a module's factors by the module. A bare parameter (the fused experts of a mixture) has no module of its own.
So PEFT wraps the module that holds it, and wraps that again for the next: `experts.lora_A`,
`experts.base_layer.lora_A`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rewarded_lines.checkpoints.adapter_config import ADAPTER_CONFIG, MERGE_IN_PEFT, AdapterConfig, is_matchable
from rewarded_lines.checkpoints.conversions import FUSIONS
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.missing_weights import UNGATHERED
from rewarded_lines.checkpoints.tensor_names import names_in
from rewarded_lines.errors import fail

_NO_MATRICES = "only matrices are merged, no convolutions"
_EMPTY = "there are no values"
REMEDIES = {_NO_MATRICES: MERGE_IN_PEFT, _EMPTY: UNGATHERED}
"""By what `refuse_pair` says; for other faults the adapter must be copied again."""


@dataclass(frozen=True)
class LowRank:
    """The residual of an adapter for one matrix: scaling·B·A, for embeddings scaling·(B·A)ᵀ.

    For the fused experts of a mixture it is one matrix for each expert: expert e of E has the rows e·r to (e+1)·r of A
    and the columns e, E+e, 2·E+e … of B.

    Attributes:
        module: the name in the model, e.g. `model.layers.0.self_attn.q_proj`; of a bare parameter its own name, e.g.
            `model.layers.0.mlp.experts.down_proj`.
        a: A in the file, [E·r, in]; for embeddings [r, tokens].
        b: B in the file, [out, E·r]; for embeddings [width, r].
        scaling: α/r, or α/√r.
        embedding: the module is an embedding.
        experts: E of a bare parameter, 0 for a module's matrix.
        stored: the base's name for the matrix, if it is not the module's.
        parts: the base's tensors that hold it one after another, if each expert has its own.
    """

    module: str
    a: TensorInfo
    b: TensorInfo
    scaling: float
    embedding: bool = False
    experts: int = 0
    stored: str = ""
    parts: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """Return r."""
        return self.a.shape[0] // max(1, self.experts)

    @property
    def tensor(self) -> str:
        """Return the name of the matrix in the base's checkpoint."""
        return self.stored or (self.module if self.experts else f"{self.module}.weight")

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the matrix's shape: [out, in], of several experts [E, out, in], for embeddings [tokens, width]."""
        out, columns = self.b.shape[0], self.a.shape[1]
        if self.experts > 1:
            return (self.experts, out, columns)
        return (columns, out) if self.embedding else (out, columns)


@dataclass(frozen=True)
class TokenRows:
    """Rows that replace those of an embedding: the tensor in the file, [n, width], and their n tokens."""

    info: TensorInfo
    tokens: tuple[int, ...]


def refuse_pair(factors: Mapping[str, TensorInfo], rank: int, bare: bool) -> str:
    """Return why the factors of one module or `bare` parameter are refused, or ""."""
    if set(factors) not in ({"A", "B"}, {"AE", "BE"}) or (bare and "AE" in factors):
        return "A or B is missing, or there are two of them"
    a, b = (factors[name] for name in sorted(factors))
    if not a.elements or not b.elements:
        return f"A has shape {a.shape}, B {b.shape}: {_EMPTY}"
    if len(a.shape) != 2 or len(b.shape) != 2:
        return f"A has shape {a.shape}, B {b.shape}: {_NO_MATRICES}"
    if not a.dtype.floating or not b.dtype.floating:
        return f"A is of type {a.dtype.torch}, B of {b.dtype.torch}: weights are floating-point numbers"
    if a.shape[0] != b.shape[1]:
        return f"A has shape {a.shape}, B {b.shape}: B·A does not exist"
    if bare and a.shape[0] % rank == 0:
        return ""
    return "" if a.shape[0] == rank else f"A has rank {a.shape[0]}, {ADAPTER_CONFIG} says {rank}"


def refuse_rows(rows: TokenRows) -> str:
    """Return why the rows for some tokens are refused, or ""."""
    shape, tokens = rows.info.shape, rows.tokens
    if not rows.info.dtype.floating or len(shape) != 2 or shape[0] != len(tokens):
        return f"the rows have shape {shape}, {ADAPTER_CONFIG} names {len(tokens)} tokens (trainable_token_indices)"
    return "" if len(set(tokens)) == len(tokens) else "trainable_token_indices names a token twice"


# PEFT wraps parameters in the order in which a model's code declares them; the last one is the outermost.
_ORDER = ("gate_proj", "gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
_NESTED = ".base_layer"
_FIRST = re.compile(r"\.experts\.0\.(?=[^.]+\.weight$)")


def targets_of(paths: Iterable[str], config: AdapterConfig, where: str) -> dict[str, tuple[str, bool]]:
    """Return for each path in an adapter's file the name of what it changes, and whether that is a bare parameter.

    A module is named by itself, a bare parameter by its module and its own name. PEFT matches patterns of ranks
    against these names.

    Raises:
        UserError: the settings do not say which parameter it is.
    """
    owners = {path: path.replace(_NESTED, "") for path in paths}
    levels = Counter(owners.values())
    found = {}
    for path, owner in owners.items():
        parameters = _parameters_of(owner, levels[owner], config)
        if parameters is None or (path != owner and not parameters):
            raise fail(
                "the settings do not say which parameter these factors change",
                where=f"{where}: {path}",
                expected=f"one entry of target_parameters in {ADAPTER_CONFIG} for each pair",
                got=", ".join(config.target_parameters)[:200] or "none",
                remedy="name them in full in target_parameters, e.g. mlp.experts.down_proj",
            )
        found[path] = (f"{owner}.{parameters[path.count(_NESTED)]}", True) if parameters else (path, False)
    return found


def paths_of(names: Mapping[str, bool]) -> dict[str, str]:
    """Return the path in an adapter's file for each name, given whether it is a bare parameter; see `targets_of`."""
    within: dict[str, list[str]] = {}
    for name in (name for name, bare in names.items() if bare):
        owner, _, parameter = name.rpartition(".")
        within.setdefault(owner, []).append(parameter)
    nested = {owner: outermost_first(parameters) or [] for owner, parameters in within.items()}
    paths = {f"{owner}.{name}": owner + _NESTED * k for owner, names in nested.items() for k, name in enumerate(names)}
    return {name: paths.get(name, name) for name in names}


def parts_in(base: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """Return for fused parameters the base's tensors that hold them, one after another, expert by expert.

    `shapes` are [experts, out, in] of the parameters; the ones that the base stores fused are left out.
    """
    wanted = {name: _rows_for(name) for name in shapes if name not in base}
    named = names_in(base, [part.replace("*", "0") for rows in wanted.values() for row in rows for part in row])
    found = {}
    for name, rows in wanted.items():
        experts, out, columns = shapes[name]
        for row in rows:
            firsts = [named.get(part.replace("*", "0"), "") for part in row]
            if _FIRST.sub(f".experts.{experts}.", firsts[0]) in base:
                # A wrong rank in the settings gives another number of experts.
                continue
            parts = [_FIRST.sub(f".experts.{expert}.", first) for expert in range(experts) for first in firsts]
            held = [base[part].shape for part in parts if part in base]
            sizes = [sum(shape[0] for shape in held[k : k + len(row)]) for k in range(0, len(held), len(row))]
            if len(held) == len(parts) and set(sizes) == {out} and {shape[1:] for shape in held} == {(columns,)}:
                found[name] = tuple(parts)
    return found


def _rows_for(name: str) -> list[tuple[str, ...]]:
    """Return the names that the parts of a fused parameter may have, with * for the number of the expert."""
    stems = [(name.removesuffix(fused), parts) for fused, parts in FUSIONS if f".{name}".endswith(f".{fused}")]
    return [tuple(stem + part for part in parts) for stem, parts in stems if "*" in parts[0]]


def outermost_first(parameters: Iterable[str]) -> list[str] | None:
    """Return the parameters of one module in the order in which PEFT nests them; None if that is not known."""
    names = set(parameters)
    if len(names) > 1 and not names <= set(_ORDER):
        return None
    return sorted(names, key=lambda name: _ORDER.index(name) if name in _ORDER else 0, reverse=True)


def _parameters_of(owner: str, levels: int, config: AdapterConfig) -> list[str] | None:
    """Return a module's bare parameters, outermost first; [] if its own matrix is changed, None if that is not sure."""
    entries = [entry.rpartition(".")[::2] for entry in config.target_parameters]
    exact = {name for module, name in entries if module and f".{owner}".endswith(f".{module}")}
    loose = {name for module, name in entries if not module}
    if levels == 1 and not exact:
        targeted = _is_target_module(owner, config) if loose else True
        if targeted is not False:
            return [] if targeted else None
    return next((outermost_first(names) for names in (exact, exact | loose) if len(names) == levels), None)


def _is_target_module(module: str, config: AdapterConfig) -> bool | None:
    """Return whether `target_modules` names a module; None if its pattern must not be tried."""
    targets = config.target_modules
    if not isinstance(targets, str):
        return any(f".{module}".endswith(f".{target}") for target in targets)
    return re.fullmatch(targets, module) is not None if is_matchable(targets) else None
