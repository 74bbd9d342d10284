"""Rules as programs: a rule is called once with symbols, and each operation that it does is noted.

`compiled_rules` makes machine code of them. So a rule has one source, for numpy, torch and the compiled loop. What occurs
twice is done once, also for several outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rewarded_lines.kernels import kernels

if TYPE_CHECKING:
    from rewarded_lines.kernels.blocks import TensorMerge

_ARITHMETIC = {"add": "fadd", "sub": "fsub", "mul": "fmul", "truediv": "fdiv"}
_COMPARISONS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "=="}
_LOGIC = {"and": "and_", "or": "or_"}


class Operation(NamedTuple):
    """One value of a program.

    Attributes:
        kind: "residual", "mask", "constant", "result", or the operation's name in LLVM's builder.
        operands: places of values in the program; of an input, its index; a result's index is in front.
        truth: whether the value is true or false.
    """

    kind: str
    operands: tuple[int, ...]
    truth: bool = False


class PieceRules:
    """The rules of some outputs, and one thread's buffers for a piece: numpy runs them, or after some work LLVM's code.

    Attributes:
        steps: how the outputs are made.
        rows: the policies whose residuals are needed.
        masks: the random masks that are needed.
        residuals: float64 [policies, ≥ length]; fill those of `rows`.
    """

    def __init__(self, steps: Sequence[TensorMerge], policies: int, length: int) -> None:
        """Make buffers for pieces of at most this length."""
        self.steps = list(steps)
        self.rows = sorted({row for step in steps for row in step.rows})
        self.masks = list(dict.fromkeys(mask for step in steps for mask in step.masks))
        # The rows of a buffer begin in different sets of the cache.
        self._width = length + 24
        self.residuals = np.empty((policies, self._width))
        self._drawn = np.empty((len(self.masks), self._width), np.bool_)
        self._merged = np.empty((len(steps), self._width))

    def merged(self, masks: Sequence[np.ndarray[Any, Any]], count: int) -> np.ndarray[Any, Any]:
        """Return the outputs' residuals, float64 [outputs, count]; they are valid until the next call."""
        self._drawn[:, :count] = masks if masks else True
        if kernels.is_long() and self._code:
            self._code(count)
        else:
            drawn = dict(zip(self.masks, self._drawn[:, :count], strict=True))
            for step, out in zip(self.steps, self._merged, strict=True):
                taken = [self.residuals[row, :count] for row in step.rows]
                out[:count] = _called(step, taken, [drawn[mask] for mask in step.masks])
        return self._merged[:, :count]

    @cached_property
    def _code(self) -> Callable[[int], None] | None:
        """The machine code, with its buffers; None if a rule does more than arithmetic."""
        notes = _Notes()
        masks = {mask: notes.symbol("mask", index, truth=True) for index, mask in enumerate(self.masks)}
        try:
            for index, step in enumerate(self.steps):
                residuals = [notes.symbol("residual", row) for row in step.rows]
                merged = _called(step, residuals, [masks[mask] for mask in step.masks])
                notes.symbol("result", index, merged.place)
        except (TypeError, ValueError, AttributeError):
            return None
        code = kernels.machine_code(tuple(notes.places), self._width)
        constants = np.array([float(text) for text in notes.constants])
        buffers = self.residuals, self._drawn, constants, self._merged
        return lambda count: code(*(buffer.ctypes.data for buffer in buffers), count)


def _called(step: TensorMerge, residuals: Sequence[Any], kept: Sequence[Any]) -> Any:
    assert step.rule is not None, "a copied tensor has no residual"
    return step.rule(residuals, step.weights, **step.parameters, **({"kept": kept} if step.masks else {}))


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
