"""Programs as machine code: values are widened to float64, pass all operations in registers, and are rounded once.

LLVM translates a program within some hundredths of a second. It neither joins nor reorders operations, so the bits are
numpy's. What is not finite is left to numpy: the code tells that it is there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from llvmlite import binding, ir

from rewarded_lines.kernels.program_writer import ProgramWriter
from rewarded_lines.kernels.rule_programs import Operation
from rewarded_lines.kernels.vectors import LANES, SIGNATURE, WORDS

Array = np.ndarray[Any, Any]

_WIDEST = ",-prefer-256-bit"
_engines: list[Any] = []
_translating = Lock()


class Loop(NamedTuple):
    """A translated program."""

    address: int
    call: Callable[..., int]
    results: int = 1
    """Of each output."""

    @classmethod
    def of(cls, module: Any, results: int = 1) -> Loop:
        """Return the function "loop" of a module."""
        address, given = compiled(module, "loop"), [ctypes.c_int64] * len(SIGNATURE.args)
        return cls(address, ctypes.CFUNCTYPE(ctypes.c_uint64, *given)(address), results)

    def run(self, sources: Sequence[Array], parameters: Array, targets: Sequence[Array], start: int = 0) -> bool:
        """Run a program that stores; return False if an input or a result may not be finite: then results mean nothing.

        Args:
            sources: n stored values each, without gaps.
            parameters: see `rule_programs.Program`.
            targets: take n values of each output.
            start: which value of its tensor the first is, a multiple of `LANES` for random masks.
        """
        whole = sources[0].size // LANES * LANES
        done = self._call(sources, parameters, targets, len(targets) // self.results, whole, start)
        if rest := sources[0].size - whole:
            # Some values more: the last one again.
            padded = [np.pad(source[whole:], (0, LANES - rest), "edge") for source in sources]
            made = [np.empty(LANES, target.dtype) for target in targets]
            done = self._call(padded, parameters, made, len(targets) // self.results, LANES, start + whole) and done
            for target, values in zip(targets, made, strict=True):
                target[whole : whole + rest] = values[:rest]
        return done

    def measure(self, sources: Sequence[Array], parameters: Array, targets: Sequence[Array], count: int) -> bool:
        """Run a program that counts the first values, a multiple of `LANES`; return False as `run` does."""
        return self._call(sources, parameters, targets, 1, count, 0)

    def _call(
        self,
        sources: Sequence[Array],
        parameters: Array,
        targets: Sequence[Array],
        outputs: int,
        count: int,
        start: int,
    ) -> bool:
        places = addresses(sources), parameters, addresses(targets)
        return not self.call(*(array.ctypes.data for array in places), outputs, count, 0, start)


def supports(*stored: np.dtype[Any]) -> bool:
    """Return whether programs can read or write storage types: those of floating-point numbers."""
    return all(each.name in WORDS for each in stored)


def addresses(rows: Iterable[Array]) -> Array:
    """Return where arrays without gaps begin in memory."""
    listed = list(rows)
    assert all(row.flags.c_contiguous for row in listed), "machine code takes arrays without gaps"
    return np.array([row.ctypes.data for row in listed], np.int64)


def cpu_features() -> str:
    """Return the processor's features, for LLVM. Where vectors have 512 bits, it may use all of them.

    Other processors do not have that setting: LLVM would warn of it each time.
    """
    features = binding.get_host_cpu_features()
    own: str = features.flatten()
    return own + _WIDEST if features.get("avx512f") else own


def translated(operations: tuple[Operation, ...], stored: tuple[str, ...], wanted: str, checked: bool = True) -> Loop:
    """Return the loop of a program, for storage types of its sources and of its targets.

    It tells if a result is not finite and, if `checked`, if a value of a source is not.
    """
    # So that no two threads translate the same.
    with _translating:
        return _translated(operations, stored, wanted, checked)


@cache
def _translated(operations: tuple[Operation, ...], stored: tuple[str, ...], wanted: str, checked: bool) -> Loop:
    module = ir.Module()
    ProgramWriter(ir.Function(module, SIGNATURE, "loop"), stored, wanted, checked).write(operations)
    return Loop.of(module, max(1, sum(each.kind == "result" for each in operations)))


def compiled(module: Any, name: str) -> int:
    """Return the address of one of a module's functions, as machine code of this processor."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    host = binding.get_host_cpu_name(), cpu_features()
    target = binding.Target.from_default_triple().create_target_machine(*host, opt=3)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), target)
    engine.finalize_object()
    # The engine owns the code.
    _engines.append(engine)
    address: int = engine.get_function_address(name)
    return address
