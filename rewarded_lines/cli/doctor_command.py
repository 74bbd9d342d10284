"""`rewarded-lines doctor`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewarded_lines.cli.display import progress_bar, show_json
from rewarded_lines.cli.parameters import AsJson, Quiet

if TYPE_CHECKING:
    from rewarded_lines.doctor import Finding

_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "broken": ("✗", "red")}
_NAME_WIDTH = 14


def doctor(
    thorough: Annotated[
        bool,
        typer.Option("--thorough", help="Also import torch, transformers and vLLM, and start an engine (a minute)."),
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="Project file to check; by default ./rewarded-lines.yaml, if it exists.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show what works here, what does not, and the command that repairs it.

    ✓ works; ! is missing or may hurt; ✗ makes a command fail. With a ✗ the
    exit code is 1. Nothing is installed or changed, and no network is used.
    Without --thorough no library is imported: versions come from the
    packages' metadata.

    \b
    rewarded-lines doctor
    rewarded-lines doctor --thorough
    rewarded-lines doctor --json | jq '.checks[] | select(.state != "ok")'
    """
    with progress_bar("Doctor", quiet=quiet or as_json, unit="check") as bar:
        from rewarded_lines.doctor import diagnose

        findings = diagnose(config, thorough=thorough, progress=bar)
    ok = all(one.state != "broken" for one in findings)
    if as_json:
        show_json({"ok": ok, "checks": [vars(one) for one in findings]})
    else:
        _show(findings, Console(highlight=False))
    if not ok:
        raise typer.Exit(1)


def _show(findings: list[Finding], console: Console) -> None:
    for finding in findings:
        mark, style = _MARKS[finding.state]
        row = Table.grid(padding=(0, 1))
        row.add_column(width=1)
        row.add_column(width=_NAME_WIDTH)
        row.add_column(overflow="fold")
        row.add_row(Text(mark, style=style), Text(finding.name), Text(finding.found))
        console.print(row)
        for line in finding.remedy.splitlines():
            # Commands are not folded, so that they can be copied.
            console.print(Text(" " * (_NAME_WIDTH + 3) + line, style="bold"), soft_wrap=True)
    count = Counter[str](finding.state for finding in findings)
    parts = [f"{count['ok']} of {len(findings)} checks are fine"]
    parts += [f"{count[state]} {state}" for state in ("warning", "broken") if count[state]]
    console.print(Text(f"\n{', '.join(parts)}.", style="dim"))
