"""Rules as programs: a rule is called once with symbols, and each operation that it does is noted.

`machine_code` translates them. So a rule has one source, for numpy, torch and machine code. What occurs twice is done
once; outputs whose rules do the same operations share a program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rewarded_lines.checkpoints.dtypes import FLOATS
from rewarded_lines.kernels import kernels
from rewarded_lines.kernels.tensor_merge import Mask, TensorMerge, all_masks

Array = np.ndarray[Any, Any]

RANKS = "ranks"
"""The type of sources that are whole numbers of 32 bits."""
_ARITHMETIC = {"add": "fadd", "sub": "fsub", "mul": "fmul", "truediv": "fdiv"}
_COMPARISONS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "=="}
_LOGIC = {"and": "and_", "or": "or_"}


class Operation(NamedTuple):
    """One value of a program.

    Attributes:
        kind: "source" (stored values, or residuals), "random" (24 random bits as a number), "constant", "factor" (a
            number of each output), "single" (rounded to float32); "result",
            "count", "collect", "sum", "tally", "finite" (to be looked at); or the operation's name in LLVM's builder.
        operands: places of values in the program; of an input, its index.
        truth: whether the value is true or false.
    """

    kind: str
    operands: tuple[int, ...]
    truth: bool = False


class Program(NamedTuple):
    """Some outputs that the same machine code makes.

    Attributes:
        loop: the code, see `machine_code.Loop`.
        parameters: its constants, the words of its random masks, and the factors of each output, 64 bits each.
        outputs: which of the steps they are.
        ranked: the masks of all outputs that need ranks; these follow the inputs among its sources.
    """

    loop: Any
    parameters: Array
    outputs: Sequence[int]
    ranked: Sequence[Mask]


def programs(
    steps: Sequence[TensorMerge], stored: Sequence[np.dtype[Any] | None], bare: bool = False
) -> list[Program] | None:
    """Return the programs that make the outputs of some steps; None if a rule does more than arithmetic.

    Args:
        steps: of one tensor.
        stored: the storage types of the base and of the policies; None for a residual in float64.
        bare: whether the residuals are the outputs, in float64, without the schedule's scale.
    """
    kinds = [kind or np.dtype(np.float64) for kind in stored]
    wanted = [np.dtype(np.float64) if bare else step.dtype.storage for step in steps]
    code = kernels.machine_code()
    if not code.supports(*kinds, *wanted):
        return None
    alike = len(set(stored)) == 1 and not bare
    known: dict[tuple[Any, ...], _Structure | None] = {}
    together: dict[tuple[_Structure, str], list[int]] = {}
    numbers, ranked = [], [mask for mask in all_masks(steps) if mask.ranked]
    for index, step in enumerate(steps):
        # As `numpy_kernels.linear` does it: the scale goes into the weights.
        folded = step.linear and alike
        weights = [weight * step.scale for weight in step.weights] if folded else list(step.weights)
        numbers.append([] if step.copy is not None else weights if folded or bare else [*weights, step.scale])
        kind = (step.copy, step.rows, step.rule, folded, repr(step.parameters), tuple(step.masks))
        if kind not in known:
            known[kind] = _noted(step, stored, Notes(ranked), folded or bare, bare)
        # A rule may look at weights, which are numbers then.
        noted = known[kind] or _noted(step, stored, Notes(ranked), folded or bare, bare, weights)
        if noted is None:
            return None
        together.setdefault((noted, wanted[index].name), []).append(index)
    # A finite weighted sum of all inputs shows that every one of them is finite. Otherwise one program looks at them,
    # and at float16, whose infinities and NaN are widened to numbers.
    whole = any(step.linear and alike and len(step.rows) == len(stored) - 1 for step in steps)
    checked = not whole or FLOATS["float16"].storage in kinds
    return _translated(together, numbers, kinds, checked, ranked)


def _translated(
    together: Mapping[tuple[_Structure, str], list[int]],
    numbers: Sequence[Sequence[float]],
    kinds: Sequence[np.dtype[Any]],
    checked: bool,
    ranked: Sequence[Mask] = (),
) -> list[Program]:
    """Return a program for each structure and type of output; the first one looks at all inputs if `checked`."""
    code, found = kernels.machine_code(), list[Program]()
    names = (*(each.name for each in kinds), *(RANKS for _ in ranked))
    for (notes, target), outputs in together.items():
        words = [word for mask in notes.masks for word in mask.words]
        factors = [np.array(numbers[index], np.float64) for index in outputs]
        constants = np.array([float(text) for text in notes.constants])
        parameters = np.concatenate([constants, np.array(words, np.uint64).view(np.float64), *factors])
        loop = code.translated(notes.operations, names, target, checked and not found)
        found.append(Program(loop, parameters, outputs, ranked))
    return found


class _Structure(NamedTuple):
    """What outputs of one program have in common: operations, the texts of the constants, and masks."""

    operations: tuple[Operation, ...]
    constants: tuple[str, ...]
    masks: tuple[Mask, ...]


def _noted(
    step: TensorMerge,
    stored: Sequence[np.dtype[Any] | None],
    notes: Notes,
    unscaled: bool,
    bare: bool,
    weights: Sequence[float] | None = None,
) -> _Structure | None:
    """Return what makes an output; None if its rule does more than arithmetic.

    Args:
        step: the output.
        stored: see `programs`.
        notes: take the operations.
        unscaled: whether the schedule's scale is no factor of its own.
        bare: see `programs`.
        weights: of the rule, in place of factors.
    """
    if step.copy is not None:
        notes.symbol("result", 0, notes.symbol("source", step.copy).place)
        return notes.structure()
    masks, origin = notes.masks_of(step, len(stored)), notes.symbol("source", 0)
    sources = [(notes.symbol("source", row + 1), stored[row + 1]) for row in step.rows]
    residuals = [values if kind is None else values - origin for values, kind in sources]
    factors = [notes.symbol("factor", place) for place in range(len(step.weights))]
    scale = None if unscaled else notes.symbol("factor", len(factors))
    try:
        merged = step.residual(residuals, masks, weights or factors)
        scaled = merged if scale is None else merged * scale
        notes.symbol("result", 0, (scaled if bare else origin + scaled).place)
    except (TypeError, ValueError, AttributeError):
        return None
    return notes.structure()


class Notes:
    """The operations so far, each with its place; the texts of the constants, with their places among these; masks."""

    def __init__(self, ranked: Sequence[Mask] = ()) -> None:
        """Start with nothing; `ranked`: see `Program`."""
        self.places: dict[Operation, int] = {}
        self.constants: dict[str, int] = {}
        self.masks: list[Mask] = []
        self._ranked = ranked

    def symbol(self, kind: str, *operands: int, truth: bool = False) -> Any:
        """Note an operation, if it is a new one; return its value, a `Symbol`."""
        operation = Operation(kind, operands, truth)
        return Symbol(self, self.places.setdefault(operation, len(self.places)), truth)

    def residual(self, policy: int, base: int) -> Any:
        """Return policy − base of two sources."""
        return self.symbol("source", policy) - self.symbol("source", base)

    def constant(self, value: float) -> Any:
        """Return a number."""
        # The text of a number tells −0 from 0.
        return self.symbol("constant", self.constants.setdefault(repr(float(value)), len(self.constants)))

    def masks_of(self, step: TensorMerge, sources: int) -> list[Symbol]:
        """Return a symbol for the mask of each policy; ranks follow the `sources`."""
        self.masks, symbols = all_masks([step]), {}
        for place, mask in enumerate(self.masks):
            rank = self.symbol("source", sources + self._ranked.index(mask)) if mask.ranked else None
            symbols[mask] = mask.chosen(self.symbol("random", place), rank)
        return [symbols[mask] for mask in step.masks]

    def structure(self) -> _Structure:
        """Return all as plain data."""
        return _Structure(tuple(self.places), tuple(self.constants), tuple(self.masks))


class Symbol:
    """A value of a program, with the operators of arrays."""

    # numpy's numbers leave operators to this class.
    __array_ufunc__ = None

    def __init__(self, notes: Notes, place: int, truth: bool) -> None:
        """Name the value at a place; `truth`: it is true or false."""
        self.notes, self.place, self.truth = notes, place, truth

    def __bool__(self) -> bool:
        """Refuse to branch: values differ from place to place."""
        raise TypeError("a rule cannot branch by values")

    def __abs__(self) -> Any:
        """Return the magnitude."""
        return self.notes.symbol("fabs", self.place)

    def astype(self, kind: type) -> Any:
        """Return the number rounded to float32."""
        if kind is not np.float32:
            raise TypeError("no type but float32")
        return self.notes.symbol("single", self.place)

    def __pow__(self, exponent: int) -> Any:
        """Return 1, the power 0 of every number."""
        if exponent != 0:
            raise TypeError("no power but 0")
        return self.notes.constant(1.0)


def _operator(kind: str, turned: bool = False) -> Callable[[Symbol, Any], Any]:
    """Return the method of an operator; if `turned`, its right operand comes first."""

    def method(self: Symbol, other: Any) -> Any:
        if kind == "fmul" and not self.truth and not isinstance(other, Symbol) and other == 1:
            return self
        noted = other if isinstance(other, Symbol) else self.notes.constant(other)
        logic = kind in _LOGIC.values()
        # numpy adds truth values as truth values.
        if kind not in _COMPARISONS.values() and (self.truth and noted.truth) != logic:
            raise TypeError("arithmetic with truth values only, or logic with numbers")
        left, right = (noted, self) if turned else (self, noted)
        return self.notes.symbol(kind, left.place, right.place, truth=kind not in _ARITHMETIC.values())

    return method


for _name, _kind in (_ARITHMETIC | _COMPARISONS | _LOGIC).items():
    setattr(Symbol, f"__{_name}__", _operator(_kind))
for _name, _kind in _ARITHMETIC.items():
    setattr(Symbol, f"__r{_name}__", _operator(_kind, turned=True))
