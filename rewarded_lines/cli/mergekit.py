"""`rewarded-lines merge --from-mergekit`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from rewarded_lines.cli.display import progress_bar
from rewarded_lines.errors import printable

if TYPE_CHECKING:
    from rewarded_lines.merging.merge import MergeResult


def merge_from_mergekit(
    path: Path,
    base: str | None,
    seed: int | None,
    dry_run: bool,
    how: Mapping[str, Any],
    as_json: bool,
    quiet: bool,
) -> list[MergeResult]:
    """Make the merge that a mergekit YAML asks for; print the command that it equals, and where the two tools part.

    Args:
        path: the file.
        base: of a `linear` merge whose file names none.
        seed: of DARE's masks.
        dry_run: write nothing.
        how: what else `merge` takes.
        as_json: keep stdout for JSON.
        quiet: show no progress.
    """
    from rewarded_lines.translating.mergekit import merge_like_mergekit

    with progress_bar("Merging", quiet=quiet or as_json, unit="byte") as bar:
        asked, results = merge_like_mergekit(path, base=base, seed=seed, dry_run=dry_run, progress=bar, **how)
    console = Console(stderr=as_json)
    # Never folded: it is for copying.
    console.print(Text(printable(asked.command(str(how["out"] or results[0].out or "merged")))), soft_wrap=True)
    for note in asked.notes:
        console.print(Text(printable(f"  {note}")))
    return results
