"""Machine code that reads pieces of files and passes them to loops, without Python between two pieces."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

from llvmlite import ir

from rewarded_lines.kernels.machine_code import compiled
from rewarded_lines.kernels.vectors import BITS, SIGNATURE, item

# Values of a piece: those of all sources stay in the caches of one core.
PIECE = 1 << 15


@cache
def reader() -> Callable[..., int]:
    """Return a function that reads values of all sources from files, a piece at a time, and calls loops on them.

    Its arguments are the number of sources, and the addresses of: their file descriptors, their places in the files,
    the bytes of a value in each, and their buffers. Then the number of loops, and the addresses of: the loops, their
    parameters, their targets' addresses, and the numbers of their targets. Then how many values to read, which value of
    its tensor the first is, and how many make a piece. It returns 0, or more if a value may not be finite or a file
    gave fewer bytes than were asked for.
    """
    module = ir.Module()
    _Files(ir.Function(module, ir.FunctionType(BITS, [BITS] * 13), "files")).write()
    return ctypes.CFUNCTYPE(ctypes.c_uint64, *[ctypes.c_int64] * 13)(compiled(module, "files"))


class _Files:
    """Writes the function: a loop over pieces, and in it one over the sources and one over the programs."""

    def __init__(self, function: ir.Function) -> None:
        self._function = function
        self._builder = ir.IRBuilder(function.append_basic_block())

    def write(self) -> None:
        """Write all."""
        builder, entry = self._builder, self._builder.block
        sources, files, places, sizes, buffers, loops, *called, count, begin, most = self._function.args
        piece, source, called_block, end, failed = (self._function.append_basic_block() for _ in range(5))
        codes, parameters, targets, outputs = called
        builder.branch(piece)
        builder.position_at_end(piece)
        start = builder.phi(BITS)
        left = builder.sub(count, start)
        length = builder.select(builder.icmp_signed("<", left, most), left, most)
        builder.branch(source)
        builder.position_at_end(source)
        row = builder.phi(BITS)
        size = builder.mul(length, item(builder, sizes, row))
        place = builder.add(item(builder, places, row), builder.mul(start, item(builder, sizes, row)))
        read = ctypes.cast(ctypes.CDLL(None).pread, ctypes.c_void_p).value
        kind = ir.FunctionType(BITS, [BITS] * 4)
        given = item(builder, files, row), item(builder, buffers, row), size, place
        done = builder.call(builder.inttoptr(BITS(read), kind.as_pointer()), given)
        next_row, read_block = builder.add(row, BITS(1)), self._function.append_basic_block()
        builder.cbranch(builder.icmp_signed("==", done, size), read_block, failed)
        builder.position_at_end(read_block)
        builder.cbranch(builder.icmp_signed("<", next_row, sources), source, called_block)
        builder.position_at_end(called_block)
        each = builder.phi(BITS)
        code = builder.inttoptr(item(builder, codes, each), SIGNATURE.as_pointer())
        given = buffers, item(builder, parameters, each), item(builder, targets, each), item(builder, outputs, each)
        bad = builder.call(code, [*given, length, start, builder.add(begin, start)])
        following = self._function.append_basic_block()
        builder.cbranch(builder.icmp_signed("==", bad, BITS(0)), following, failed)
        builder.position_at_end(following)
        next_each, next_start = builder.add(each, BITS(1)), builder.add(start, length)
        last = self._function.append_basic_block()
        builder.cbranch(builder.icmp_signed("<", next_each, loops), called_block, last)
        builder.position_at_end(last)
        builder.cbranch(builder.icmp_signed("<", next_start, count), piece, end)
        for phi, again, block, before in (
            (start, next_start, last, entry),
            (row, next_row, read_block, piece),
            (each, next_each, following, read_block),
        ):
            phi.add_incoming(BITS(0), before)
            phi.add_incoming(again, block)
        ir.IRBuilder(end).ret(BITS(0))
        ir.IRBuilder(failed).ret(BITS(1))
