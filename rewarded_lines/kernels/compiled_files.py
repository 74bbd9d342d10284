"""Machine code that reads pieces of files and passes them to a loop, without Python between two pieces."""

from __future__ import annotations

import ctypes
from typing import Any

from llvmlite import ir

# Values of a piece: those of all sources stay in the caches of one core.
PIECE = 1 << 15
FAILED = 2**64 - 1
"""What is returned if a file gave fewer bytes than were asked for."""
_INDEX, _BYTE = ir.IntType(64), ir.IntType(8)


def write_files(module: Any, loop: Any, policies: int, stored: int, wanted: int) -> Any:
    """Write the function "files"; return its type.

    It reads values of all sources from files, a piece at a time, and calls `loop` on them. Its arguments are the
    addresses of: the sources' file descriptors, their places in the files, their buffers of `PIECE` values, the
    weights, and the targets' addresses. Then: the number of outputs that are sums, the number of those behind them that
    are copies, the address of the copies' sources, and the number of values. It returns the largest result of `loop`,
    or `FAILED`.

    Args:
        module: takes the function.
        loop: of the type of `compiled_sums.SIGNATURE`.
        policies: the sources beside the base.
        stored: bytes of a value in the files.
        wanted: bytes of a value in the targets; copies need as many as in the files.
    """
    kind = ir.FunctionType(_INDEX, [_INDEX] * 9)
    _Files(ir.Function(module, kind, "files"), stored, wanted).write(loop, policies + 1)
    return kind


def _address(name: str) -> Any:
    """Return where a function of the C library is."""
    return _INDEX(ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value)


class _Files:
    """Writes the function: a loop over pieces, and in it one over the copies."""

    def __init__(self, function: Any, stored: int, wanted: int) -> None:
        self._function, self._stored, self._wanted = function, stored, wanted
        self._builder = ir.IRBuilder(function.append_basic_block())

    def write(self, loop: Any, sources: int) -> None:
        """Write all; `loop` is called once for each piece."""
        builder, entry = self._builder, self._builder.block
        files, places, buffers, weights, targets, outputs, copies, origins, count = self._function.args
        piece, copy, copied, following, end, failed = (self._function.append_basic_block() for _ in range(6))
        builder.branch(piece)
        builder.position_at_end(piece)
        start, before = builder.phi(_INDEX), builder.phi(_INDEX)
        left = builder.sub(count, start)
        length = builder.select(builder.icmp_signed("<", left, _INDEX(PIECE)), left, _INDEX(PIECE))
        size = builder.mul(length, _INDEX(self._stored))
        for source in map(_INDEX, range(sources)):
            place = builder.add(self._item(places, source), builder.mul(start, _INDEX(self._stored)))
            done = self._call("pread", self._item(files, source), self._item(buffers, source), size, place)
            further = self._function.append_basic_block()
            builder.cbranch(builder.icmp_signed("==", done, size), further, failed)
            builder.position_at_end(further)
        found = builder.call(loop, [buffers, weights, targets, outputs, _INDEX(0), length, start])
        largest = builder.select(builder.icmp_unsigned(">", found, before), found, before)
        read = builder.block
        builder.branch(copy)
        builder.position_at_end(copy)
        index = builder.phi(_INDEX)
        builder.cbranch(builder.icmp_signed("<", index, copies), copied, following)
        builder.position_at_end(copied)
        target = self._item(targets, builder.add(outputs, index))
        target = builder.add(target, builder.mul(start, _INDEX(self._wanted)))
        self._call("memcpy", target, self._item(buffers, self._item(origins, index)), size)
        index.add_incoming(_INDEX(0), read)
        index.add_incoming(builder.add(index, _INDEX(1)), copied)
        builder.branch(copy)
        builder.position_at_end(following)
        next_start = builder.add(start, length)
        start.add_incoming(_INDEX(0), entry)
        start.add_incoming(next_start, following)
        before.add_incoming(_INDEX(0), entry)
        before.add_incoming(largest, following)
        builder.cbranch(builder.icmp_signed("<", next_start, count), piece, end)
        ir.IRBuilder(end).ret(largest)
        ir.IRBuilder(failed).ret(_INDEX(FAILED))

    def _item(self, array: Any, index: Any) -> Any:
        """Return a number of an array of such."""
        builder = self._builder
        return builder.load(builder.gep(builder.inttoptr(array, _INDEX.as_pointer()), [index]))

    def _call(self, name: str, *given: Any) -> Any:
        """Call a function of the C library, which returns a number of 64 bits."""
        kind = ir.FunctionType(_INDEX, [_INDEX] * len(given))
        return self._builder.call(self._builder.inttoptr(_address(name), kind.as_pointer()), given)
