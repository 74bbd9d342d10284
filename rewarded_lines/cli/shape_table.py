"""How `rewarded-lines search --shape` shows what it found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rewarded_lines.evaluator.shape_search import FoundShape
    from rewarded_lines.pareto.bootstrap import Estimate


def show_shape(found: FoundShape, console: Console) -> None:
    """Print the scales, the schedules on the test prompts, the verdict, and the rows for the project."""
    tried, whole = found.trials
    console.print(Text(f"best of {tried} shapes on validation prompts ({whole} of them on all); scale by block:"))
    for policy, row in found.scales.items():
        console.print(Text(f"  {policy}: {' '.join(f'{scale:.3g}' for scale in row)}"))
    console.print(Text("\non the test prompts, hypervolume above SFT with 95% interval:"))
    table = Table("schedule", "hypervolume", "shape − it", "largest KL", box=None, pad_edge=False)
    change = {one.other: _shown(one.difference, "+") for one in found.differences}
    names = {"tuned": "tuned: α = {:g}, β = {:g}".format(*found.tuned)}
    for one in found.volumes:
        cells = names.get(one.method, one.method), _shown(one.hypervolume), change.get(one.method, "")
        table.add_row(*cells, f"{found.kl[one.method]:.3g}")
    console.print(table)
    console.print(Text(f"\n{found.verdict}\n", style="bold"))
    rows = f"to keep them in the run, add these under `sweep.methods:` and sweep:\n{found.rows}"
    console.print(Text(f"{rows}\ntrials, and beside them the figure: {found.file}"), soft_wrap=True)


def _shown(one: Estimate, sign: str = "") -> str:
    return f"{one.value:{sign}.4g} [{one.low:.4g}, {one.high:.4g}]"
