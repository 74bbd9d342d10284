"""`rewarded-lines demo`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group
from rich.live import Live

from rewarded_lines.cli.display import Work, quiet_libraries, show_line
from rewarded_lines.cli.parameters import Quiet, engines, offer
from rewarded_lines.cli.report_command import show
from rewarded_lines.progress import Progress

if TYPE_CHECKING:
    from rewarded_lines.reports.summary import Summary

# `pipeline.STAGES`, whose module loads heavy libraries.
_STAGES = ("data", "sft", "reward", "policies", "sweep", "report", "merge")


def demo(
    algo: Annotated[
        str,
        typer.Option(
            help="How policies are trained: ppo, dpo, rloo or grpo.", autocompletion=offer("ppo", "dpo", "rloo", "grpo")
        ),
    ] = "ppo",
    seed: Annotated[int, typer.Option(min=0, help="Seed of all training.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; by default runs/demo, runs/demo-dpo, runs/demo-seed1 …")
    ] = None,
    engine: Annotated[str, typer.Option(help="Engine of the sweep: vllm or hf.", autocompletion=engines)] = "vllm",
    until: Annotated[
        str,
        typer.Option(help=f"Last stage: {', '.join(_STAGES)}.", autocompletion=offer(*_STAGES)),
    ] = "merge",
    corpus: Annotated[
        Path | None, typer.Option(help="Your own corpus: a folder with JSONL files as --until data writes them.")
    ] = None,
    suite: Annotated[Path | None, typer.Option(help="Your own rewards, prompts and generation (YAML).")] = None,
    configs: Annotated[Path | None, typer.Option(help="Your own sft.yaml, reward.yaml, ppo.yaml …")] = None,
    quiet: Quiet = False,
) -> None:
    """Train, merge and measure on movie reviews: about eleven minutes on two CPU cores, no network.

    Trains a small language model, a reward model and one policy per
    reward, then draws the front of their merges. Finished stages are kept:
    a killed demo goes on where it stopped.

    \b
    rewarded-lines demo
    rewarded-lines demo --algo dpo --seed 1
    rewarded-lines demo --until data
        only the corpus, for running the recipes by hand
    """
    from rewarded_lines.demo.pipeline import DemoSettings, default_out, run_demo

    # torch reads this at its import, which comes later; see `recipe_jobs.py` for the reason.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    folder = out or default_out(algo, seed)
    quiet_libraries()
    console = Console()
    own = {"configs": configs, "suite": suite, "corpus": corpus}
    settings = DemoSettings(folder, algo, seed, engine, **{key: path for key, path in own.items() if path})
    heading = f"demo: {algo}, seed {seed}, in {folder}"
    display = _Display(Console(quiet=True) if quiet else console, heading)
    with display.live:
        seconds = run_demo(settings, display, until)
    if "report" in seconds:
        from rewarded_lines.evaluator.records import load_run
        from rewarded_lines.reports.summary import summarise

        summary = summarise(load_run(folder / "sweep"))
        show(folder / "sweep", summary, chart=False)
    console.print(f"  {'pipeline':<10}{sum(seconds.values()):7.1f} s  all stages, without installation")
    if "merge" in seconds:
        console.print(f"a merged policy: {folder / 'merged' / 'lam=0.50'}\n", soft_wrap=True)
        show_end(folder, summary, engine)


def show_end(folder: Path, summary: Summary, engine: str) -> None:
    """Print the front as a chart, three commands to try in the run folder, and the path of the page."""
    from rewarded_lines.reports.report import PAGE, report_files
    from rewarded_lines.reports.terminal_chart import FrontChart

    console = Console()
    console.print(FrontChart(summary))
    first, *others = summary.objectives
    # Halfway between SFT and the best point, so that some points reach it.
    means = {name: [point.rewards[name].value for point in summary.points] for name in others[:1]}
    minima = [f"--at-least={name}={(summary.sft.rewards[name].value + max(means[name])) / 2:.3g}" for name in means]
    with_engine = [] if engine == "vllm" else [f"--engine={engine}"]
    next_steps = {
        "merge the policies for another preference": ["merge", "--lam=0.3"],
        "score that merge beside SFT, on the same prompts": ["score", "merged/lam=0.30", *with_engine],
        "find the policy for a wish, and its merge command": ["choose", "sweep", f"--maximize={first}", *minima],
    }
    console.print("\nTry next:", style="bold")
    show_line(shlex.join(["cd", str(folder)]))
    for aim, words in next_steps.items():
        show_line(f"# {aim}\n{shlex.join(['rewarded-lines', *words])}")
    pages = [path for path in report_files(folder / "sweep") if path.name == PAGE]
    for page in pages:
        show_line(f"\nThe front with every response, for a browser: {page}")


class _Display:
    """Prints a line for every stage; on a terminal also live bars below."""

    def __init__(self, console: Console, heading: str) -> None:
        self._console, self._heading = console, heading
        self._stage: list[Work] = []
        self._parts: list[Work] = []
        # Shows nothing where there is no terminal.
        self.live = Live(console=console, transient=True, get_renderable=self._shown)

    def started(self, stage: str) -> None:
        if stage == _STAGES[0]:
            self._console.print(self._heading, soft_wrap=True)
        self._stage, self._parts = [Work(stage, "step")], []

    def part(self, name: str) -> Progress:
        self._parts.append(Work(name, "point" if name == "sweep" else "step"))
        return self._parts[-1]

    def finished(self, stage: str, seconds: float, reused: bool) -> None:
        when = "done by an earlier run" if reused else "done"
        self._console.print(f"  {stage:<10}{seconds:7.1f} s  {when}")

    def _shown(self) -> Group:
        return Group(*(self._parts or self._stage))
