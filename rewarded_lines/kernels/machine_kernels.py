"""The loops of `numpy_kernels` as machine code: the same arguments and the same bits.

Each is a program of few operations, noted by a function beside it. Values that are not finite, and types that are no
floating-point numbers, are left to numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from rewarded_lines.kernels import numpy_kernels
from rewarded_lines.kernels.machine_code import Loop, supports, translated
from rewarded_lines.kernels.rule_programs import Notes
from rewarded_lines.kernels.vectors import LANES

Array = np.ndarray[Any, Any]
_INFINITE = 0x7FF << 52


def cast(values: Array, out: Array) -> int:
    """See `numpy_kernels.cast`."""
    return 0 if _stored(_note_cast, [values], [out]) else numpy_kernels.cast(values, out)


def _note_cast(notes: Notes) -> None:
    notes.symbol("result", 0, notes.symbol("source", 0).place)


def residual(base: Array, policy: Array, out: Array) -> None:
    """See `numpy_kernels.residual`."""
    if not _stored(_note_residual, [base, policy], [out]):
        numpy_kernels.residual(base, policy, out)


def _note_residual(notes: Notes) -> None:
    notes.symbol("result", 0, notes.residual(1, 0).place)


def count_nonfinite(values: Array) -> int:
    """See `numpy_kernels.count_nonfinite`."""
    return 0 if _stored(_note_nothing, [values], []) else numpy_kernels.count_nonfinite(values)


def _note_nothing(notes: Notes) -> None:
    pass


def place_columns(values: Array, width: int, factor: float, first: int, columns: int, out: Array) -> int:
    """See `numpy_kernels.place_columns`."""
    made = np.empty(values.size, out.dtype)
    if not _stored(_note_scaled, [values], [made], [factor]):
        return numpy_kernels.place_columns(values, width, factor, first, columns, out)
    out.reshape(-1, columns)[:, first : first + width] = made.reshape(-1, width)
    return 0


def _note_scaled(notes: Notes) -> None:
    notes.symbol("result", 0, (notes.symbol("source", 0) * notes.symbol("factor", 0)).place)


def product(left: Array, right: Array, scale: float, start: int, out: Array) -> None:
    """See `numpy_kernels.product`: the rows of the result are sums of the rows of `right`, many in one pass."""
    (rank, columns), done = right.shape, 0
    while done < out.size:
        row, first = divmod(start + done, columns)
        # A part of a row; or as many rows as are whole.
        rows = max(1, (out.size - done) // columns) if first == 0 else 1
        length = min(columns - first, out.size - done)
        targets = out[done : done + rows * length].reshape(rows, length)
        factors = np.append(left[row : row + rows], np.full((rows, 1), scale), axis=1)
        sources = list(right[:, first : first + length])
        if not _stored(_note_sum, sources, list(targets), factors.ravel().tolist(), rank):
            numpy_kernels.product(left, right, scale, start, out)
            return
        done += rows * length


def _note_sum(notes: Notes, rank: int) -> None:
    total = notes.constant(0.0)
    for row in range(rank):
        total = total + notes.symbol("source", row) * notes.symbol("factor", row)
    notes.symbol("result", 0, (total * notes.symbol("factor", rank)).place)


def count_magnitudes(values: Array, prefix: int, shift: int, bits: int, counts: Array) -> None:
    """See `numpy_kernels.count_magnitudes`."""
    found = np.zeros_like(counts)
    rest = _measured(_note_digits, [values], [found], _ends(prefix, shift + bits), shift, bits)
    if rest:
        counts += found
    numpy_kernels.count_magnitudes(values[rest:], prefix, shift, bits, counts)


def _note_digits(notes: Notes, shift: int, bits: int) -> None:
    size = abs(notes.symbol("source", 0))
    inside = (size >= notes.symbol("factor", 0)) & (size < notes.symbol("factor", 1))
    notes.symbol("tally", 0, inside.place, size.place, shift, bits)


def collect_magnitudes(values: Array, prefix: int, shift: int, out: Array) -> int:
    """See `numpy_kernels.collect_magnitudes`."""
    counts = np.zeros(1, np.int64)
    rest = _measured(_note_among, [values], [counts, out], _ends(prefix, shift))
    place = int(counts[0]) if rest else 0
    if rest == values.size:
        return place
    return place + numpy_kernels.collect_magnitudes(values[rest:], prefix, shift, out[place:])


def _note_among(notes: Notes) -> None:
    size = abs(notes.symbol("source", 0))
    inside = (size >= notes.symbol("factor", 0)) & (size < notes.symbol("factor", 1))
    notes.symbol("collect", 0, 1, inside.place, size.place)


def _ends(prefix: int, shift: int) -> list[float]:
    """Return the first magnitude whose bits above `shift` are `prefix`, and the first after them."""
    patterns = [min(each << shift, _INFINITE) for each in (prefix, prefix + 1)]
    ends: list[float] = np.array(patterns, np.uint64).view(np.float64).tolist()
    return ends


@cache
def _code(note: Callable[..., None], stored: tuple[str, ...], wanted: str, *given: int) -> tuple[Loop, list[float]]:
    """Return the loop of a program and its constants."""
    notes = Notes()
    note(notes, *given)
    return translated(tuple(notes.places), stored, wanted), [float(text) for text in notes.constants]


def _stored(
    note: Callable[..., None],
    sources: Sequence[Array],
    targets: Sequence[Array],
    factors: Sequence[float] = (),
    *given: int,
) -> bool:
    """Run a program that stores; return whether all was finite."""
    wanted = targets[0].dtype if targets else np.dtype(np.float64)
    kinds = [source.dtype for source in sources]
    if not supports(*kinds, wanted):
        return False
    loop, constants = _code(note, tuple(kind.name for kind in kinds), wanted.name, *given)
    return loop.run(sources, np.array([*constants, *factors]), targets)


def _measured(
    note: Callable[..., None], sources: Sequence[Array], targets: Sequence[Array], factors: Sequence[float], *given: int
) -> int:
    """Run a program that counts; return for how many values it did so, 0 if a value is not finite."""
    kinds, whole = [source.dtype for source in sources], sources[0].size // LANES * LANES
    if not supports(*kinds):
        return 0
    loop, constants = _code(note, tuple(kind.name for kind in kinds), "float64", *given)
    return whole if loop.measure(sources, np.array([*constants, *factors]), targets, whole) else 0
