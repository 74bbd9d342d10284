"""`rewarded-lines choose`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from rewarded_lines.cli.display import progress_bar, show_json, show_line
from rewarded_lines.cli.parameters import AsJson, Quiet, Run, run_methods, run_minima, run_rewards
from rewarded_lines.options import parse_numbers

if TYPE_CHECKING:
    from rewarded_lines.evaluator.choose import Chosen


def choose(
    run: Run,
    at_least: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Minimum of a reward's mean (repeat).", autocompletion=run_minima),
    ] = None,
    maximize: Annotated[
        str | None, typer.Option(metavar="NAME", help="Reward to maximize.", autocompletion=run_rewards)
    ] = None,
    at_least_sft: Annotated[
        bool, typer.Option("--at-least-sft", help="Every reward without its own --at-least must reach SFT's mean.")
    ] = False,
    weights: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=W,...", help="Maximize this weighted sum, standardized on SFT (repeat)."),
    ] = None,
    preference: Annotated[
        str | None,
        typer.Option(metavar="NAME=μ,...", help="Take λ = B⁻¹μ of the project's `mixtures:`, if it was evaluated."),
    ] = None,
    knee: Annotated[bool, typer.Option("--knee", help="Take the knee of the front.")] = False,
    method: Annotated[
        list[str] | None, typer.Option(help="Method to choose from (repeat).", autocompletion=run_methods)
    ] = None,
    interpolate: Annotated[
        bool, typer.Option("--interpolate", help="Also consider λ between evaluated points (two policies).")
    ] = False,
    name: Annotated[str, typer.Option(help="The run remembers the point by it, for `serve`.")] = "chosen",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Choose the policy of a run that meets constraints best; print its merge command.

    With two rewards and a minimum for one, the other is maximized. Rewards
    of the role `audit` do not count. --weights maximizes the sum of
    W · (mean − SFT's mean) / (standard deviation of SFT's scores).

    \b
    rewarded-lines choose runs/demo/sweep --at-least detailed=15
    rewarded-lines choose RUN --at-least brevity=-12 --maximize faithful
    rewarded-lines choose RUN --weights faithful=0.7,brevity=0.3
    rewarded-lines choose RUN --at-least-sft --at-least safe=2 \\
        --weights helpful=2,honest=1
    rewarded-lines choose RUN --preference faithful=0.7,brevity=0.3
    rewarded-lines choose RUN --knee --method lines
    """
    minima = parse_numbers("--at-least", at_least or ())
    # Names may have commas: only one behind a number ends a weight.
    weighed = parse_numbers("--weights", re.split(r"(?<=[\d.]),", ",".join(weights))) if weights else None
    with progress_bar("Choose", quiet=quiet or as_json) as bar:
        from rewarded_lines.evaluator.choose import choose as run_choose

        bar.start("reading the run, bootstrap")
        rule: dict[str, Any] = {"at_least": minima, "at_least_sft": at_least_sft, "maximize": maximize}
        rule |= {"weights": weighed, "knee": knee, "preference": preference}
        chosen = run_choose(run, methods=method or (), interpolate=interpolate, name=name, **rule)
    if as_json:
        show_json(chosen.as_dict())
    else:
        _show(chosen)


def _show(chosen: Chosen) -> None:
    from rewarded_lines.evaluator.choose import NOTE
    from rewarded_lines.evaluator.missing_scores import missing_lines
    from rewarded_lines.merger.preferences import preference_text

    point = chosen.point
    schedule = "" if point.checkpoint else f", {point.merge.schedule.text(chosen.policies)}"
    guess = " (between evaluated points: a guess)" if chosen.interpolated else ""
    console = Console()
    asked = f", μ = {preference_text(chosen.preference)}" if chosen.preference else ""
    console.print(Text(f"{chosen.rule}:\n  {point}{schedule}{asked}{guess}\n"))
    for name, score in chosen.scores.items():
        meets = f", meets its minimum in {chosen.meets[name]:.0%} of resamples" if name in chosen.meets else ""
        console.print(Text(f"  {name}: {score.value:.4g} [{score.low:.4g}, {score.high:.4g}]{meets}"))
    for line in missing_lines(chosen.missing):
        console.print(Text(f"  {line}"))
    console.print(Text(f"\n{NOTE}\n", style="dim"))
    show_line(chosen.command)
    if not chosen.name:
        console.print(Text("\nThe run folder is read-only, so it does not remember the point.", style="dim"))
