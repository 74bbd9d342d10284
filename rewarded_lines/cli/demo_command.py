"""`rewarded-lines demo`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from rewarded_lines.cli.display import Work, quiet_libraries, show_line
from rewarded_lines.cli.parameters import Quiet, engines, offer
from rewarded_lines.cli.report_command import show
from rewarded_lines.demo.stages import ALGORITHMS, PLAN, STAGES
from rewarded_lines.progress import Progress

if TYPE_CHECKING:
    from rewarded_lines.demo.demo_settings import DemoSettings
    from rewarded_lines.reports.summary import Summary

# Of stages whose seconds tell the pace of a machine.
_TELLING_SECONDS = 30.0


def demo(
    algo: Annotated[
        str,
        typer.Option(help=f"How policies are trained: {', '.join(ALGORITHMS)}.", autocompletion=offer(*ALGORITHMS)),
    ] = "ppo",
    seed: Annotated[int, typer.Option(min=0, help="Seed of all training.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder; by default runs/demo, runs/demo-dpo, runs/demo-seed1, runs/demo-full …"),
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="The long form, which made the records in eval/results: longer training, 11 λ."),
    ] = False,
    lora: Annotated[
        bool, typer.Option("--lora", help="Policies as LoRA adapters of the SFT model, which one server can serve.")
    ] = False,
    engine: Annotated[str, typer.Option(help="Engine of the sweep: vllm or hf.", autocompletion=engines)] = "vllm",
    until: Annotated[
        str,
        typer.Option(help=f"Last stage: {', '.join(STAGES)}.", autocompletion=offer(*STAGES)),
    ] = "merge",
    corpus: Annotated[
        Path | None, typer.Option(help="Your own corpus: a folder with JSONL files as --until data writes them.")
    ] = None,
    suite: Annotated[Path | None, typer.Option(help="Your own rewards, prompts and generation (YAML).")] = None,
    configs: Annotated[Path | None, typer.Option(help="Your own sft.yaml, reward.yaml, ppo.yaml …")] = None,
    quiet: Quiet = False,
) -> None:
    """Train, merge and measure on movie reviews: about five minutes on two CPU cores, no network.

    Trains a small language model, a reward model and one policy per
    reward, then draws the front of their merges. Finished stages are kept:
    a killed demo goes on where it stopped.

    \b
    rewarded-lines demo
    rewarded-lines demo --algo dpo --seed 1
    rewarded-lines demo --full
        in about ten minutes: longer training, more prompts and points
    rewarded-lines demo --lora
        policies as adapters
    rewarded-lines demo --until data
        only the corpus, for running the recipes by hand
    """
    from rewarded_lines.demo.demo_settings import DemoSettings, default_out
    from rewarded_lines.demo.pipeline import run_demo

    # torch reads these at its import, which comes later; see `recipe_jobs.py` for the reason of the first.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    folder = out or default_out(algo, seed, full, lora)
    console = Console()
    own = {"configs": configs, "suite": suite, "corpus": corpus}
    settings = DemoSettings(folder, algo, seed, engine, full, lora, **{key: path for key, path in own.items() if path})
    display = _Display(Console(quiet=True) if quiet else console, settings, until)
    with display.live:
        seconds = run_demo(settings, display, until)
    _show_results(settings, seconds)


def _show_results(settings: DemoSettings, seconds: Mapping[str, float]) -> None:
    """Print what the stages up to the last one have made."""
    console, folder = Console(), settings.out
    if "report" in seconds:
        from rewarded_lines.evaluator.records import load_run
        from rewarded_lines.reports.summary import summarise

        summary = summarise(load_run(folder / "sweep"))
        show(folder / "sweep", summary, chart=False)
    console.print(f"  {'pipeline':<10}{sum(seconds.values()):7.1f} s  all stages, without installation")
    if "merge" in seconds:
        show_line(f"a merged policy: {folder / 'merged' / 'lam=0.50'}\n")
        show_end(folder, summary, settings.engine)


def show_end(folder: Path, summary: Summary, engine: str) -> None:
    """Print the front as a chart, commands to try in the run folder, and the path of the page."""
    from rewarded_lines.reports.report import PAGE
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
    if engine == "vllm":
        next_steps["answer requests that each say what they prefer, with a page to try it"] = ["serve", "sweep"]
    console.print("\nTry next:", style="bold")
    show_line(shlex.join(["cd", str(folder)]))
    for aim, words in next_steps.items():
        show_line(f"# {aim}\n{shlex.join(['rewarded-lines', *words])}")
    page = folder / "sweep" / "report" / PAGE
    if page.is_file():
        show_line(f"\nThe front with every response, for a browser: {page}")


class _Display:
    """Prints the plan, then a line for every finished stage; on a terminal also live bars below."""

    def __init__(self, console: Console, settings: DemoSettings, until: str) -> None:
        self._console, self._settings = console, settings
        self._stages = STAGES[: STAGES.index(until) + 1] if until in STAGES else STAGES
        # Expected and real seconds of what this run has made so far: its pace.
        self._expected = self._real = 0.0
        self._stage: list[Work] = []
        self._parts: list[Work] = []
        # Shows nothing where there is no terminal.
        self.live = Live(console=console, transient=True, get_renderable=self._shown)

    def started(self, stage: str) -> None:
        if stage == self._stages[0]:
            self._plan()
        if stage == "sweep":
            # Not earlier: it imports transformers.
            quiet_libraries()
        self._at = stage
        self._stage, self._parts = [Work(stage, "step")], []

    def part(self, name: str) -> Progress:
        self._parts.append(Work(name, "point" if name == "sweep" else "step"))
        return self._parts[-1]

    def finished(self, stage: str, seconds: float, reused: bool) -> None:
        if not reused:
            self._expected, self._real = self._expected + self._settings.expected(stage), self._real + seconds
        left = self._left(after=stage)
        rest = f", about {_minutes(left)} left" if left >= 1 else ""
        when = "done by an earlier run" if reused else "done"
        self._console.print(f"  {stage:<10}{seconds:7.1f} s  {when}{rest}")

    def _plan(self) -> None:
        """Print what each stage does and about how long it takes."""
        settings, total = self._settings, sum(map(self._settings.expected, self._stages))
        self._console.print(
            f"demo: {settings.algo}, seed {settings.seed}, in {settings.out}", soft_wrap=True, markup=False
        )
        self._console.print(
            f"About {round(total / 60)} minutes on two quiet cores. Started again, a stopped demo goes on.\n"
        )
        for stage in self._stages:
            self._console.print(f"  {stage:<10}{settings.expected(stage):5.0f} s  {PLAN[stage].about}")
        self._console.print("")

    def _left(self, after: str) -> float:
        """Return the seconds that the stages after this one take at the pace so far."""
        later = sum(map(self._settings.expected, self._stages[self._stages.index(after) + 1 :]))
        # The first stage is too short to tell a pace.
        return later * (self._real / self._expected if self._expected >= _TELLING_SECONDS else 1.0)

    def _shown(self) -> Group:
        shown = self._parts or self._stage
        if not shown:
            return Group()
        found = [left for work in shown if (left := work.left()) is not None]
        now = max(found, default=self._settings.expected(self._at))
        return Group(*shown, Text(f"all stages: about {_minutes(now + self._left(after=self._at))} left", style="dim"))


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
