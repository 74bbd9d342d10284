"""The arguments of `merge` that another tool's config comes to, and the command line that says them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rewarded_lines.rules.spec import MergeSpec


@dataclass(frozen=True)
class Translation:
    """The arguments of `merge` that a file comes to.

    Attributes:
        base: folder or Hub id.
        policies: likewise, by name.
        merge: the numbers.
        dtype: of the output.
        full: policies are adapters to fold, since mergekit writes whole models.
        blocks: how many blocks the models must have, None for any number.
        notes: where the definitions part, for people.
    """

    base: str
    policies: Mapping[str, str]
    merge: MergeSpec
    dtype: str = "auto"
    full: bool = False
    blocks: int | None = None
    notes: tuple[str, ...] = ()

    def command(self, out: str = "merged") -> str:
        """Return the command line that makes the same merge."""
        kind = "full" if self.full else "auto"
        return self.merge.command(self.base, self.policies, out, dtype=self.dtype, as_=kind)
