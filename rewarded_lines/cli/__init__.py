"""The command line: one file per command, which parses, calls and prints. Heavy imports wait for the call."""

from __future__ import annotations

import atexit
import errno
import gc
import os
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from io import TextIOWrapper
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

from rewarded_lines import __version__
from rewarded_lines.errors import Problem, UserError, did_you_mean
from rewarded_lines.processes import die_with_parent, termination_as_exit

# The exit code of a command line that cannot be parsed; failed work exits with 1.
_USAGE = 2

COMMANDS = (
    *("merge", "push", "sweep", "score", "search", "choose", "report", "inspect"),
    *("serve", "rounds", "recipes", "demo", "doctor"),
)


def _with_extras(name: str, function: Callable[..., None]) -> Callable[..., None]:
    """Let a command first check that its extra is installed; its help needs none."""

    @wraps(function)
    def call(*args: Any, **given: Any) -> None:
        from rewarded_lines.extras import check_verb

        check_verb(name, f"rewarded-lines {name}")
        function(*args, **given)

    return call


class _Commands(TyperGroup):
    """The commands, each imported when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"rewarded_lines.cli.{cmd_name}_command")
        # A command with commands of its own brings its `app`.
        alone = getattr(module, "app", None)
        if alone is None:
            alone = typer.Typer(rich_markup_mode="rich", add_completion=False, pretty_exceptions_enable=False)
            function = _with_extras(cmd_name, getattr(module, cmd_name))
            alone.command(cmd_name, epilog=getattr(module, "EPILOG", None))(function)
        return typer.main.get_command(alone)


app = typer.Typer(
    name="rewarded-lines",
    cls=_Commands,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"rewarded-lines {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Merge policies aligned with several rewards (Rewarded Soups, LiNeS) and measure every point of their front.

    \b
    rewarded-lines demo               train, merge and measure an example
    rewarded-lines merge --lam 0.5    merge the policies of rewarded-lines.yaml
    rewarded-lines sweep              generate and score along λ
    rewarded-lines report sweep       tables and figures of a sweep
    rewarded-lines choose sweep --at-least detailed=15
                                      the policy to ship, and its command
    rewarded-lines score merged       score one model beside SFT
    rewarded-lines serve sweep        each request says what it prefers
    rewarded-lines inspect merged --base sft
                                      how far its blocks moved
    rewarded-lines recipes copy ppo   training scripts, to run where you are
    rewarded-lines rounds --train …   train, merge, and train on from there
    rewarded-lines push merged OWNER/NAME
                                      upload it to the Hub
    rewarded-lines doctor             what works here and what to install
    """
    if ctx.invoked_subcommand is None:
        # A script whose command is missing must fail, too.
        typer.echo(ctx.get_help())
        raise typer.Exit(_USAGE)


def main() -> None:
    """Run the command line; a user's mistake prints one message without a traceback and exits with 1 or 2."""
    die_with_parent()
    _open_streams()
    # The Hub's library reads this at its import, which comes later.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Libraries make millions of lasting objects: collecting among them, also at exit, takes seconds.
    gc.set_threshold(100_000, 20, 20)
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):
        # A terminal without Greek letters or a file name in another encoding must not end the work.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with termination_as_exit():
            code = app(standalone_mode=False, prog_name="rewarded-lines")
    except typer.TyperException as error:
        _complain(_usage_problem(error), error.exit_code)
    except UserError as error:
        _complain(error)
    except OSError as error:
        # The system's message names the place, except where a disk is full.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        _complain(Problem(str(error), remedy="rewarded-lines doctor\n    # tells what is free" if full else ""))
    except MemoryError as error:
        _complain(Problem(f"not enough memory: {error}"))
    if code:
        sys.exit(code)


def _open_streams() -> None:
    """Let standard streams that are closed (`>&-`) lead nowhere: else the next file would take the place of one."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free is this one.
            stream = os.fdopen(os.open(os.devnull, os.O_RDWR), "w" if number else "r", closefd=False)
            setattr(sys, name, stream)


def _usage_problem(error: Any) -> Problem:
    """Return what is wrong with a command line that typer cannot parse."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    command = context.command_path if context else "rewarded-lines"
    remedy = f"see {command} --help"
    if hasattr(error, "possibilities"):
        known, given = [name for one in error.ctx.command.params for name in one.opts], error.option_name
        return Problem(f"no option `{given}`", where=command, remedy=did_you_mean(given, known, remedy))
    words = [word for word in sys.argv if not word.startswith("-")]
    # Without options before a command, its place among the words is that in the context's path.
    given = next(iter(words[len(command.split()) :]), "")
    known = context.command.list_commands(context) if context and isinstance(context.command, TyperGroup) else []
    if known and given and given not in known:
        what, expected = f"no command `{given}`", ", ".join(known)
        return Problem(what, where=command, expected=expected, remedy=did_you_mean(given, known, remedy))
    message = str(error.message if parameter else error.format_message()).rstrip(".")
    if parameter is None:
        return Problem(message[:1].lower() + message[1:], where=command, remedy=remedy)
    option = parameter.opts[0].startswith("-")
    where = f"{command} {parameter.opts[0] if option else parameter.name.upper()}"
    if not message:
        return Problem("missing", where=where, expected=parameter.help or "", remedy=remedy)
    expected = message.removeprefix("Input should be ").partition(",")[0]
    return Problem("not a valid value", where=where, expected=expected, got=_typed(parameter.opts), remedy=remedy)


def _typed(names: list[str]) -> str:
    """Return the value of an option on the command line, "" where none is found."""
    for word, following in zip(sys.argv[1:], [*sys.argv[2:], ""], strict=True):
        if word in names:
            return following
        if word.partition("=")[0] in names:
            return word.partition("=")[2]
    return ""


def _complain(about: Problem | UserError, code: int = 1) -> NoReturn:
    Console(stderr=True, soft_wrap=True, highlight=False).print(str(about), style="red", markup=False, emoji=False)
    sys.exit(code)
