"""Machine code that reads pieces of files and passes them to loops, without Python between two pieces."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir

from rewarded_lines.kernels.machine_code import compiled
from rewarded_lines.kernels.program_writer import SIGNATURE

# Values of a piece: those of all sources stay in the caches of one core.
PIECE = 1 << 15
_INDEX = ir.IntType(64)


@cache
def reader(piece: int) -> Callable[..., int]:
    """Return a function that reads `piece` values of all sources at a time from files, and calls loops on them.

    Its arguments are the number of sources, and the addresses of: their file descriptors, their places in the files,
    the bytes of a value in each, and their buffers. Then the number of loops, and the addresses of:
    the loops, their parameters, their targets' addresses, and the numbers of their targets. Then how many values to
    read, and which value of its tensor the first is. It returns 0, or more if a value may not be finite or a file gave
    fewer bytes than were asked for.
    """
    module = ir.Module()
    _Files(ir.Function(module, ir.FunctionType(_INDEX, [_INDEX] * 12), "files")).write(piece)
    return ctypes.CFUNCTYPE(ctypes.c_uint64, *[ctypes.c_int64] * 12)(compiled(module, "files"))


class _Files:
    """Writes the function: a loop over pieces, and in it one over the sources and one over the programs."""

    def __init__(self, function: ir.Function) -> None:
        self._function = function
        self._builder = ir.IRBuilder(function.append_basic_block())

    def write(self, values: int) -> None:
        """Write all, for pieces of so many values."""
        builder, entry = self._builder, self._builder.block
        sources, files, places, sizes, buffers, loops, *called, count, begin = self._function.args
        piece, source, called_block, end, failed = (self._function.append_basic_block() for _ in range(5))
        codes, parameters, targets, outputs = called
        builder.branch(piece)
        builder.position_at_end(piece)
        start = builder.phi(_INDEX)
        left = builder.sub(count, start)
        length = builder.select(builder.icmp_signed("<", left, _INDEX(values)), left, _INDEX(values))
        builder.branch(source)
        builder.position_at_end(source)
        row = builder.phi(_INDEX)
        size = builder.mul(length, self._item(sizes, row))
        place = builder.add(self._item(places, row), builder.mul(start, self._item(sizes, row)))
        read = ctypes.cast(ctypes.CDLL(None).pread, ctypes.c_void_p).value
        kind = ir.FunctionType(_INDEX, [_INDEX] * 4)
        given = self._item(files, row), self._item(buffers, row), size, place
        done = builder.call(builder.inttoptr(_INDEX(read), kind.as_pointer()), given)
        next_row, read_block = builder.add(row, _INDEX(1)), self._function.append_basic_block()
        builder.cbranch(builder.icmp_signed("==", done, size), read_block, failed)
        builder.position_at_end(read_block)
        builder.cbranch(builder.icmp_signed("<", next_row, sources), source, called_block)
        builder.position_at_end(called_block)
        each = builder.phi(_INDEX)
        code = builder.inttoptr(self._item(codes, each), SIGNATURE.as_pointer())
        given = buffers, self._item(parameters, each), self._item(targets, each), self._item(outputs, each)
        bad = builder.call(code, [*given, length, start, builder.add(begin, start)])
        following = self._function.append_basic_block()
        builder.cbranch(builder.icmp_signed("==", bad, _INDEX(0)), following, failed)
        builder.position_at_end(following)
        next_each, next_start = builder.add(each, _INDEX(1)), builder.add(start, length)
        last = self._function.append_basic_block()
        builder.cbranch(builder.icmp_signed("<", next_each, loops), called_block, last)
        builder.position_at_end(last)
        builder.cbranch(builder.icmp_signed("<", next_start, count), piece, end)
        for phi, again, block, before in (
            (start, next_start, last, entry),
            (row, next_row, read_block, piece),
            (each, next_each, following, read_block),
        ):
            phi.add_incoming(_INDEX(0), before)
            phi.add_incoming(again, block)
        ir.IRBuilder(end).ret(_INDEX(0))
        ir.IRBuilder(failed).ret(_INDEX(1))

    def _item(self, array: Any, index: Any) -> Any:
        """Return a number of an array of such."""
        builder = self._builder
        return builder.load(builder.gep(builder.inttoptr(array, _INDEX.as_pointer()), [index]))
