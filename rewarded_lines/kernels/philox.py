"""Random numbers inside a loop of machine code: eight for each step of eight values."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

_BITS, _HALF, _WIDE = ir.IntType(64), ir.IntType(32), ir.IntType(128)
_EIGHT = ir.VectorType(_HALF, 8)
_FACTORS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_STEPS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
_ROUNDS = 10


class Philox:
    """Writes the generator Philox4x64-10 for the numbers of one tensor.

    They are those of numpy's `Philox(key=[first, second], counter=[0, 0, block, 0])`, for the values of a block in
    order; the lower half of each word comes first.

    Source: Salmon and others, Parallel random numbers: as easy as 1, 2, 3, SC 2011, doi 10.1145/2063384.2063405.
    """

    WORDS = 3
    """Parameters, 64 bits each: the key, and how many bits number a block's values."""

    def __init__(self, builder: ir.IRBuilder, parameters: Any, place: int) -> None:
        """Load the parameters from a place on, in front of the loops."""
        self._builder = builder
        words = builder.bitcast(parameters, _BITS.as_pointer())
        first, second, self._block_bits = (
            builder.load(builder.gep(words, [_BITS(place + word)])) for word in range(self.WORDS)
        )
        self._keys = []
        for _ in range(_ROUNDS):
            self._keys.append((first, second))
            first, second = (builder.add(key, _BITS(step)) for key, step in zip((first, second), _STEPS, strict=True))

    def numbers(self, index: Any) -> Any:
        """Write the upper 24 bits of the numbers of eight values, as float64.

        `index` is the first one's place in its tensor, a multiple of eight.
        """
        builder = self._builder
        block = builder.lshr(index, self._block_bits)
        inside = builder.sub(index, builder.shl(block, self._block_bits))
        one, two, three, four = builder.add(builder.lshr(inside, _BITS(3)), _BITS(1)), _BITS(0), block, _BITS(0)
        for key, lock in self._keys:
            (upper, low), (high, lower) = self._product(one, _FACTORS[0]), self._product(three, _FACTORS[1])
            one, two = builder.xor(builder.xor(high, two), key), lower
            three, four = builder.xor(builder.xor(upper, four), lock), low
        words = ir.Constant(ir.VectorType(_BITS, 4), ir.Undefined)
        for place, word in enumerate((one, two, three, four)):
            words = builder.insert_element(words, word, _HALF(place))
        numbers = builder.lshr(builder.bitcast(words, _EIGHT), ir.Constant(_EIGHT, [8] * 8))
        return builder.uitofp(numbers, ir.VectorType(ir.DoubleType(), 8))

    def _product(self, number: Any, factor: int) -> tuple[Any, Any]:
        """Return the upper and the lower 64 bits of a product."""
        builder = self._builder
        product = builder.mul(builder.zext(number, _WIDE), _WIDE(factor))
        return builder.trunc(builder.lshr(product, _WIDE(64)), _BITS), builder.trunc(product, _BITS)
