"""The command line: one thin file per command, which parses, calls and prints. Heavy imports wait for the call."""

from __future__ import annotations

import atexit
import gc
import sys
from io import TextIOWrapper
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from rewarded_lines import __version__
from rewarded_lines.cli.choose import choose
from rewarded_lines.cli.demo import demo
from rewarded_lines.cli.inspect import inspect
from rewarded_lines.cli.merge import METHODS_HELP, merge
from rewarded_lines.cli.report import report
from rewarded_lines.cli.score import score
from rewarded_lines.cli.search import search
from rewarded_lines.cli.sweep import sweep
from rewarded_lines.errors import Problem, UserError
from rewarded_lines.processes import die_with_parent, termination_as_exit

app = typer.Typer(
    name="rewarded-lines",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (merge, sweep, score, search, choose, report, inspect, demo):
    app.command(epilog=METHODS_HELP if command is merge else None)(command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"rewarded-lines {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Merge policies aligned with several rewards (Rewarded Soups, LiNeS) and measure every point of their front.

    \b
    rewarded-lines demo                         the whole job on an embedded default
    rewarded-lines merge --lam 0.5              merge the policies of rewarded-lines.yaml
    rewarded-lines sweep                        generate and score along λ
    rewarded-lines report runs/demo/sweep       table and figure of a sweep
    rewarded-lines choose runs/demo/sweep --at-least detailed=15
    rewarded-lines score merged/lam=0.50        one model, beside SFT
    rewarded-lines inspect ppo-helpful          its blocks by depth; --base sft: how far they moved
    """


def main() -> None:
    """Run the command line; a user's mistake prints one message and exits with 1, without a traceback."""
    die_with_parent()
    # Libraries make millions of objects that stay: looking through them again and again takes seconds, and so does
    # looking through them a last time.
    gc.set_threshold(100_000, 20, 20)
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):
        # A terminal without Greek letters, or the name of a file that is no text, must not end the work.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with termination_as_exit():
            app()
    except UserError as error:
        _complain(str(error))
    except OSError as error:
        # A full disk, a folder that cannot be written: the system's own words name the place.
        _complain(str(Problem(str(error))))
    except MemoryError as error:
        _complain(str(Problem(f"not enough memory: {error}")))


def _complain(message: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True, highlight=False).print(message, style="red", markup=False)
    sys.exit(1)
