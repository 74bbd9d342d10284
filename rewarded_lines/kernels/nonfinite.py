"""NaN and infinite values: counted block by block, and the error that reports them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Protocol

from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.errors import Problem, UserError
from rewarded_lines.kernels.tensor_merge import TensorMerge

_SHOWN = 5


class Inputs(Protocol):
    """A block of inputs, or a whole tensor's.

    Attributes:
        finite: whether all values are known to be finite.
    """

    finite: bool

    def count_nonfinite(self, row: int) -> int:
        """Return how many values are not finite in the base (0) or in policy `row` − 1."""


class NonFinite:
    """Counts NaN and infinite values, tensor by tensor; threads may share it."""

    def __init__(self, policies: Sequence[str], tensors: Mapping[str, TensorInfo]) -> None:
        """Start at zero. `policies`: names in the order of the workspace; `tensors`: the base's."""
        self._inputs = ["base", *(f"policy `{name}`" for name in policies)]
        self._tensors = tensors
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = Lock()

    def look(self, inputs: Inputs, name: str, steps: Sequence[TensorMerge], bad: Sequence[int]) -> None:
        """Count the values that are not finite in the inputs or, if all are finite, in the results."""
        if inputs.finite and not any(bad):
            return
        # A finite weighted sum of all inputs shows that every one of them is finite.
        whole = (len(step.rows) == len(self._inputs) - 1 and step.linear and step.copy is None for step in steps)
        if not any(bad) and (any(whole) or not self._tensors[name].dtype.floating):
            return
        counts = {source: inputs.count_nonfinite(row) for row, source in enumerate(self._inputs)}
        if not any(counts.values()):
            counts = {"the result": max(bad)}
        for source, count in counts.items():
            self.add(name, source, count)

    def add(self, name: str, source: str, count: int) -> None:
        """Add a count for a tensor of an input, or of "the result"."""
        if count:
            with self._lock:
                self._counts[name, source] += count

    def counted(self, name: str, source: str) -> bool:
        """Return whether any value of an input's tensor was counted."""
        return (name, source) in self._counts

    def refuse(self) -> None:
        """Raise a `UserError` with tensors, inputs and counts if any value was counted."""
        problems = []
        for (name, source), count in sorted(self._counts.items())[:_SHOWN]:
            remedy = "pass --allow-nonfinite if they are meant"
            if source == "the result":
                remedy = "the output's type cannot hold them: pass --dtype float32 or a smaller scale"
            what, expected = f"{count} values are not finite in {source}", "no NaN and no infinity"
            problems.append(Problem(what, name, expected, remedy=remedy))
        if len(self._counts) > _SHOWN:
            problems.append(Problem(f"{len(self._counts) - _SHOWN} more tensors are not finite"))
        if problems:
            raise UserError(problems)
