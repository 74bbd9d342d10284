"""Rules as programs: a rule is called once with symbols, and each operation that it does is noted.

`compiled_rules` makes machine code of them. So a rule has one source, for numpy, torch and the compiled loop. What
occurs twice is done once, also for several outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rewarded_lines.kernels import kernels
from rewarded_lines.kernels.tensor_merge import TensorMerge, all_masks

Array = np.ndarray[Any, Any]

_ARITHMETIC = {"add": "fadd", "sub": "fsub", "mul": "fmul", "truediv": "fdiv"}
_COMPARISONS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "=="}
_LOGIC = {"and": "and_", "or": "or_"}


class Operation(NamedTuple):
    """One value of a program.

    Attributes:
        kind: "residual", "mask", "factor", "constant", "result", or the operation's name in LLVM's builder.
        operands: places of values in the program; of an input, its index; a result's index is in front.
        truth: whether the value is true or false.
    """

    kind: str
    operands: tuple[int, ...]
    truth: bool = False


class Code(NamedTuple):
    """The rules of some outputs as machine code: its address, the policies that it takes, its constants."""

    address: int
    rows: Array
    constants: Array


def compiled_rules(steps: Sequence[TensorMerge]) -> Code | None:
    """Return the machine code that computes the steps' residuals, or None if a rule does more than arithmetic."""
    notes, rows = _Notes(), sorted({row for step in steps for row in step.rows})
    kinds = {np.dtype(np.bool_): "mask", np.dtype(np.float64): "factor"}
    masks = {
        mask: notes.symbol(kinds[mask.dtype], place, truth=mask.dtype == np.bool_)
        for place, mask in enumerate(all_masks(steps))
    }
    if len({mask.dtype for mask in masks}) > 1:
        return None
    try:
        for index, step in enumerate(steps):
            residuals = [notes.symbol("residual", rows.index(row)) for row in step.rows]
            merged = step.residual(residuals, [masks[mask] for mask in step.masks])
            notes.symbol("result", index, merged.place)
    except (TypeError, ValueError, AttributeError):
        return None
    constants = np.array([float(text) for text in notes.constants])
    return Code(kernels.machine_code(tuple(notes.places)), np.array(rows), constants)


class _Notes:
    """The operations so far, each with its place; and the texts of the constants, with their places among these."""

    def __init__(self) -> None:
        self.places: dict[Operation, int] = {}
        self.constants: dict[str, int] = {}

    def symbol(self, kind: str, *operands: int, truth: bool = False) -> Symbol:
        operation = Operation(kind, operands, truth)
        return Symbol(self, self.places.setdefault(operation, len(self.places)), truth)

    def constant(self, value: float) -> Symbol:
        # The text of a number tells −0 from 0.
        return self.symbol("constant", self.constants.setdefault(repr(float(value)), len(self.constants)))


class Symbol:
    """A value of a program, with the operators of arrays."""

    # numpy's numbers leave operators to this class.
    __array_ufunc__ = None

    def __init__(self, notes: _Notes, place: int, truth: bool) -> None:
        """Name the value at a place; `truth`: it is true or false."""
        self.notes, self.place, self.truth = notes, place, truth

    def __bool__(self) -> bool:
        """Refuse to branch: values differ from place to place."""
        raise TypeError("a rule cannot branch by values")

    def __abs__(self) -> Symbol:
        """Return the magnitude."""
        return self.notes.symbol("fabs", self.place)

    def __pow__(self, exponent: int) -> Symbol:
        """Return 1, the power 0 of every number."""
        if exponent != 0:
            raise TypeError("no power but 0")
        return self.notes.constant(1.0)


def _operator(kind: str, turned: bool = False) -> Callable[[Symbol, Any], Symbol]:
    """Return the method of an operator; if `turned`, its right operand comes first."""

    def method(self: Symbol, other: Any) -> Symbol:
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
