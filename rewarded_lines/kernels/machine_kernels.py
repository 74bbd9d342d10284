"""The loops of `numpy_kernels` as machine code: the same arguments and the same bits.

Each is a program of few operations. Values that are not finite, and types that are no floating-point numbers, are left
to numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rewarded_lines.kernels import numpy_kernels
from rewarded_lines.kernels.machine_code import LANES, Loop, supports, translated
from rewarded_lines.kernels.rule_programs import Notes, Symbol

Array = np.ndarray[Any, Any]
_INFINITE = 0x7FF << 52


def cast(values: Array, out: Array) -> int:
    """See `numpy_kernels.cast`."""
    notes = Notes()
    notes.symbol("result", notes.symbol("source", 0).place)
    return 0 if _stored(notes, [values], [out]) else numpy_kernels.cast(values, out)


def residual(base: Array, policy: Array, out: Array) -> None:
    """See `numpy_kernels.residual`."""
    notes = Notes()
    notes.symbol("result", notes.residual(1, 0).place)
    if not _stored(notes, [base, policy], [out]):
        numpy_kernels.residual(base, policy, out)


def count_nonfinite(values: Array) -> int:
    """See `numpy_kernels.count_nonfinite`."""
    return 0 if _stored(Notes(), [values], []) else numpy_kernels.count_nonfinite(values)


def place_columns(values: Array, width: int, factor: float, first: int, columns: int, out: Array) -> int:
    """See `numpy_kernels.place_columns`."""
    notes, made = Notes(), np.empty(values.size, out.dtype)
    notes.symbol("result", (notes.symbol("source", 0) * notes.symbol("factor", 0)).place)
    if not _stored(notes, [values], [made], factor):
        return numpy_kernels.place_columns(values, width, factor, first, columns, out)
    out.reshape(-1, columns)[:, first : first + width] = made.reshape(-1, width)
    return 0


def product(left: Array, right: Array, scale: float, start: int, out: Array) -> None:
    """See `numpy_kernels.product`: the rows of the result are sums of the rows of `right`, many in one pass."""
    rank, columns = right.shape
    notes = Notes()
    total = notes.constant(0.0)
    for row in range(rank):
        total = total + notes.symbol("source", row) * notes.symbol("factor", row)
    notes.symbol("result", (total * notes.symbol("factor", rank)).place)
    done = 0
    while done < out.size:
        row, first = divmod(start + done, columns)
        # A part of a row; or as many rows as are whole.
        rows = max(1, (out.size - done) // columns) if first == 0 else 1
        length = min(columns - first, out.size - done)
        targets = out[done : done + rows * length].reshape(rows, length)
        factors = np.append(left[row : row + rows], np.full((rows, 1), scale), axis=1)
        if not _stored(notes, list(right[:, first : first + length]), list(targets), *factors.ravel()):
            numpy_kernels.product(left, right, scale, start, out)
            return
        done += rows * length


def count_magnitudes(values: Array, prefix: int, shift: int, bits: int, counts: Array) -> None:
    """See `numpy_kernels.count_magnitudes`."""
    notes, found = Notes(), np.zeros_like(counts)
    size, inside = _among(notes)
    notes.symbol("tally", 0, inside.place, size.place, shift, bits)
    rest = _measured(notes, [values], [found], *_ends(prefix, shift + bits))
    if rest:
        counts += found
    numpy_kernels.count_magnitudes(values[rest:], prefix, shift, bits, counts)


def collect_magnitudes(values: Array, prefix: int, shift: int, out: Array) -> int:
    """See `numpy_kernels.collect_magnitudes`."""
    notes, counts = Notes(), np.zeros(1, np.int64)
    size, inside = _among(notes)
    notes.symbol("count", 0, inside.place)
    notes.symbol("collect", 1, inside.place, size.place)
    rest = _measured(notes, [values], [counts, out], *_ends(prefix, shift))
    place = int(counts[0]) if rest else 0
    return place + numpy_kernels.collect_magnitudes(values[rest:], prefix, shift, out[place:])


def count_between(
    base: Array, policy: Array, low: float, high: float, found: Array
) -> tuple[int, tuple[int, int, int, int]]:
    """See `numpy_kernels.count_between`."""
    notes, counts = Notes(), np.zeros((5, 1), np.int64)
    size, least, most = abs(notes.residual(1, 0)), *(notes.symbol("factor", place) for place in range(2))
    inside = (size > least) & (size < most)
    sets = inside, size > most, size == most, (size == least) & (least < most), size == 0.0
    for place, each in enumerate(sets):
        notes.symbol("count", place, each.place)
    notes.symbol("collect", len(sets), inside.place, size.place)
    rest = _measured(notes, [base, policy], [*counts, found], low, high)
    number, *ends = counts[:, 0].tolist() if rest else [0] * len(sets)
    more, further = numpy_kernels.count_between(base[rest:], policy[rest:], low, high, found[number:])
    above, top, bottom, zeros = (one + other for one, other in zip(ends, further, strict=True))
    return number + more, (above, top, bottom, zeros)


def count_overlaps(pairs: Sequence[tuple[Array, Array]], changed: float, counts: Array) -> None:
    """See `numpy_kernels.count_overlaps`."""
    notes, found = Notes(), np.zeros((counts.size, 1), np.int64)
    # Most pairs have one base.
    sources = {id(values): values for pair in pairs for values in pair}
    places = {key: place for place, key in enumerate(sources)}
    masks = [
        abs(notes.residual(places[id(policy)], places[id(base)])) > notes.symbol("factor", 0) for base, policy in pairs
    ]
    # Nothing is below itself.
    some, several = masks[0], masks[0] < masks[0]
    for mask in masks[1:]:
        some, several = some | mask, several | (some & mask)
    for row, mask in enumerate(masks):
        notes.symbol("count", row, (mask & several).place)
        notes.symbol("count", len(masks) + row, mask.place)
    rest = _measured(notes, list(sources.values()), list(found), changed)
    if rest:
        shared, large = found.reshape(2, -1)
        counts += shared, large - shared
    numpy_kernels.count_overlaps([(base[rest:], policy[rest:]) for base, policy in pairs], changed, counts)


def _among(notes: Notes) -> tuple[Symbol, Symbol]:
    """Return the magnitudes of the source, and whether they are at least one factor and below another."""
    size = abs(notes.symbol("source", 0))
    return size, (size >= notes.symbol("factor", 0)) & (size < notes.symbol("factor", 1))


def _ends(prefix: int, shift: int) -> tuple[float, float]:
    """Return the first magnitude whose bits above `shift` are `prefix`, and the first after them."""
    patterns = [min(each << shift, _INFINITE) for each in (prefix, prefix + 1)]
    first, after = np.array(patterns, np.uint64).view(np.float64).tolist()
    return first, after


def _loop(notes: Notes, sources: Sequence[Array], wanted: np.dtype[Any], *factors: float) -> tuple[Loop, Array] | None:
    """Return the loop of a program and its parameters; None if a type is not supported."""
    kinds = [source.dtype for source in sources]
    if not supports(*kinds, wanted):
        return None
    names = tuple(kind.name for kind in kinds)
    parameters = np.array([*(float(text) for text in notes.constants), *factors])
    return translated(tuple(notes.places), names, wanted.name), parameters


def _stored(notes: Notes, sources: Sequence[Array], targets: Sequence[Array], *factors: float) -> bool:
    """Run a program that stores; return whether all was finite."""
    known = _loop(notes, sources, targets[0].dtype if targets else np.dtype(np.float64), *factors)
    return known is not None and known[0].run(sources, known[1], targets)


def _measured(notes: Notes, sources: Sequence[Array], targets: Sequence[Array], *factors: float) -> int:
    """Run a program that counts; return for how many values it did so, 0 if a value is not finite."""
    known = _loop(notes, sources, np.dtype(np.float64), *factors)
    whole = sources[0].size // LANES * LANES
    return whole if known and known[0].measure(sources, known[1], targets, whole) else 0
