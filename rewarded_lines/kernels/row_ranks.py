"""Ranks of magnitudes within rows, as machine code: most are told apart by counting their upper bits.

The difference of two values of 16 bits has few bits, and a row has many equal ones. So few magnitudes have lower bits,
too, and only those are sorted by them first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir

from rewarded_lines.kernels import numpy_kernels
from rewarded_lines.kernels.machine_code import Array, Loop, supports
from rewarded_lines.kernels.machine_kernels import count_nonfinite
from rewarded_lines.kernels.vectors import (
    BITS,
    HALF,
    LANES,
    SIGNATURE,
    every,
    item,
    known,
    larger,
    loaded,
    place_of,
    vector,
    vector_place,
    widened,
)

# Bits that are counted at once, and bits that the rest is sorted by at a time.
_UPPER, _LOWER, _DIGIT = 11, 45, 8
_ONE, _NUMBER = HALF(1), HALF((1 << 31) - 1)


def rank_rows(base: Array, policy: Array, width: int, skipped: int, ranks: Array) -> None:
    """See `numpy_kernels.rank_rows`."""
    if width < LANES or any(not supports(each.dtype) or count_nonfinite(each) for each in (base, policy)):
        numpy_kernels.rank_rows(base, policy, width, skipped, ranks)
        return
    found = np.empty(base.size, np.uint32)
    loop = ranker((base.dtype.name, policy.dtype.name))
    loop.measure([base, policy], np.array([0, 1, width]), [found, *scratch(width)], base.size)
    ranks[:] = found[skipped : skipped + ranks.size]


def scratch(width: int) -> list[Array]:
    """Return the memory that a `ranker` needs for rows of so many values."""
    sizes = width + LANES, 1 << _UPPER, 1 << _DIGIT, width, width
    return [np.empty(width + LANES, np.uint64), *(np.empty(size, np.uint32) for size in sizes)]


@cache
def ranker(stored: tuple[str, str]) -> Loop:
    """Return a loop that writes the ranks of |policy − base| in rows, from 0, equal ones in order, as uint32.

    Its parameters are which of the sources are base and policy, and the values of a row, at least `LANES`. After the
    ranks, its targets are `scratch`. Where a value is not finite, a row's ranks have no meaning.
    """
    module = ir.Module()
    _Ranker(ir.Function(module, SIGNATURE, "loop"), stored).write()
    return Loop.of(module)


class _Ranker:
    """Writes the function: a loop over the rows, and in it those over a row's values."""

    def __init__(self, function: ir.Function, stored: Sequence[str]) -> None:
        self._function, self._stored = function, stored
        self._builder = ir.IRBuilder(function.append_basic_block())

    def write(self) -> None:
        builder = self._builder
        sources, parameters, targets, _, count, _, _ = self._function.args
        *places, self._width = (item(builder, parameters, BITS(place)) for place in range(3))
        self._inputs = [item(builder, sources, place) for place in places]
        memory = [item(builder, targets, BITS(place)) for place in range(7)]
        ranks, self._keys, self._upper, self._table, self._digits, *self._orders = memory

        def row(index: Any) -> None:
            start = builder.mul(index, self._width)
            self._row(start, builder.add(ranks, builder.mul(start, BITS(4))))

        self._each(builder.udiv(count, self._width), row)
        builder.ret(BITS(0))

    def _row(self, start: Any, ranks: Any) -> None:
        """Write the ranks of the row whose first value is at a place."""
        builder = self._builder
        most = self._measure(start)
        rest, size = self._split(most), BITS(1 << _UPPER)
        self._clear(self._table, size)

        def count(index: Any, rare: Any) -> list[Any]:
            upper = item(builder, self._upper, index, HALF)
            self._take(self._table, builder.and_(upper, _NUMBER))
            self._put(self._orders[0], rare, builder.trunc(index, HALF))
            return [builder.add(rare, builder.zext(builder.lshr(upper, HALF(31)), BITS))]

        (rare,) = self._each(self._width, count, [BITS(0)])
        self._sum(self._table, size)

        def rank(index: Any) -> None:
            upper = item(builder, self._upper, index, HALF)
            # What has lower bits comes after what has none, and takes no rank yet.
            common = builder.xor(builder.lshr(upper, HALF(31)), _ONE)
            self._put(ranks, index, self._take(self._table, builder.and_(upper, _NUMBER), common))

        self._each(self._width, rank)
        order = self._sorted(rare, rest)

        def rank_rare(index: Any) -> None:
            place = item(builder, order, index, HALF)
            upper = builder.and_(item(builder, self._upper, place, HALF), _NUMBER)
            self._put(ranks, place, self._take(self._table, upper))

        self._each(rare, rank_rare)

    def _measure(self, start: Any) -> Any:
        """Write a row's magnitudes as whole numbers, whose order is theirs; return the largest."""
        builder, last = self._builder, self._builder.sub(self._width, BITS(LANES))
        nothing = ir.Constant(vector(BITS), None)
        builder.store(nothing, vector_place(builder, self._keys, self._width, BITS), align=8)

        def measure(index: Any, most: Any) -> list[Any]:
            # The last ones of a row may come twice.
            place = builder.select(builder.icmp_unsigned("<", index, last), index, last)
            base, policy = (
                widened(builder, loaded(builder, row, builder.add(start, place), kind), kind)
                for kind, row in zip(self._stored, self._inputs, strict=True)
            )
            bits = builder.bitcast(builder.fsub(policy, base), vector(BITS))
            keys = builder.and_(bits, every(BITS, (1 << 63) - 1))
            builder.store(keys, vector_place(builder, self._keys, place, BITS), align=8)
            return [larger(builder, keys, most)]

        return self._reduced("umax", *self._each(self._width, measure, [nothing], step=LANES))

    def _split(self, most: Any) -> Any:
        """Write the upper bits of each magnitude, with a sign where it has lower ones; return these, of all joined."""
        builder, nothing = self._builder, ir.Constant(vector(BITS), None)
        # So that the largest has the largest number; what is smaller than the least number has only lower bits.
        size = BITS((1 << _UPPER) - 1)
        offset = builder.sub(larger(builder, builder.lshr(most, BITS(_LOWER)), size), size)
        base = self._everywhere(offset)

        def split(index: Any, joined: Any) -> list[Any]:
            place = vector_place(builder, self._keys, index, BITS)
            keys = builder.load(place, align=8)
            upper = builder.lshr(keys, every(BITS, _LOWER))
            small = builder.icmp_unsigned("<=", upper, base)
            rest = builder.select(small, keys, builder.and_(keys, every(BITS, (1 << _LOWER) - 1)))
            number = builder.trunc(builder.sub(larger(builder, upper, base), base), vector(HALF))
            builder.store(rest, place, align=8)
            rare = builder.icmp_unsigned("!=", rest, nothing)
            signed = builder.select(rare, builder.or_(number, every(HALF, 1 << 31)), number)
            builder.store(signed, vector_place(builder, self._upper, index, HALF), align=4)
            return [builder.or_(joined, rest)]

        return self._reduced("or", *self._each(self._width, split, [nothing], step=LANES))

    def _reduced(self, kind: str, numbers: Any) -> Any:
        reduce = known(self._builder, f"llvm.vector.reduce.{kind}.v{LANES}i64", BITS, vector(BITS))
        return self._builder.call(reduce, [numbers])

    def _sorted(self, rare: Any, rest: Any) -> Any:
        """Return so many places, sorted by their lower bits; equal ones stay in order. `rest`: all these bits."""
        builder = self._builder
        low = builder.cttz(rest, ir.IntType(1)(0))

        def sort(index: Any, before: Any, after: Any) -> list[Any]:
            shift = builder.add(low, builder.mul(index, BITS(_DIGIT)))

            def digit(place: Any) -> Any:
                return builder.and_(builder.lshr(item(builder, self._keys, place), shift), BITS((1 << _DIGIT) - 1))

            def count(each: Any) -> None:
                self._take(self._digits, digit(item(builder, before, each, HALF)))

            def move(each: Any) -> None:
                place = item(builder, before, each, HALF)
                self._put(after, self._take(self._digits, digit(place)), place)

            self._clear(self._digits, BITS(1 << _DIGIT))
            self._each(rare, count)
            self._sum(self._digits, BITS(1 << _DIGIT))
            self._each(rare, move)
            return [after, before]

        bits = builder.sub(BITS(64), builder.add(low, builder.ctlz(rest, ir.IntType(1)(0))))
        passes = builder.udiv(builder.add(bits, BITS(_DIGIT - 1)), BITS(_DIGIT))
        passes = builder.select(builder.icmp_unsigned("==", rest, BITS(0)), BITS(0), passes)
        order, _ = self._each(passes, sort, self._orders)
        return order

    def _clear(self, table: Any, size: Any) -> None:
        nothing = ir.Constant(vector(HALF), None)

        def clear(index: Any) -> None:
            self._builder.store(nothing, vector_place(self._builder, table, index, HALF), align=4)

        self._each(size, clear, step=LANES)

    def _take(self, table: Any, number: Any, count: Any = _ONE) -> Any:
        """Return what a table has for a number, and add to it."""
        place = place_of(self._builder, table, number, HALF)
        found = self._builder.load(place)
        self._builder.store(self._builder.add(found, count), place)
        return found

    def _sum(self, table: Any, size: Any) -> None:
        """Replace each count by the sum of those before it."""

        def add(first: Any, total: Any) -> list[Any]:
            for index in (self._builder.add(first, BITS(step)) for step in range(LANES)):
                found = item(self._builder, table, index, HALF)
                self._put(table, index, total)
                total = self._builder.add(total, found)
            return [total]

        self._each(size, add, [HALF(0)], step=LANES)

    def _put(self, array: Any, index: Any, number: Any) -> None:
        self._builder.store(number, place_of(self._builder, array, index, HALF))

    def _everywhere(self, number: Any) -> Any:
        builder = self._builder
        first = builder.insert_element(ir.Constant(vector(BITS), ir.Undefined), number, HALF(0))
        return builder.shuffle_vector(first, first, ir.Constant(vector(HALF), None))

    def _each(
        self, count: Any, write: Callable[..., Sequence[Any] | None], first: Sequence[Any] = (), step: int = 1
    ) -> list[Any]:
        """Write a loop over numbers below `count`; `write` returns what goes round, as this does in the end."""
        builder, before = self._builder, self._builder.block
        head, body, end = (self._function.append_basic_block() for _ in range(3))
        builder.branch(head)
        builder.position_at_end(head)
        index, *around = (builder.phi(each.type) for each in (BITS(0), *first))
        builder.cbranch(builder.icmp_unsigned("<", index, count), body, end)
        builder.position_at_end(body)
        again = write(index, *around) or ()
        following = [builder.add(index, BITS(step)), *again]
        builder.branch(head)
        for phi, start, after in zip((index, *around), (BITS(0), *first), following, strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(after, builder.block)
        builder.position_at_end(end)
        return around
