"""The command line as a process of its own, for what cannot be done in this one: kills, limits, other folders."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.context import BaseContext
from pathlib import Path

COMMAND = (
    sys.executable,
    "-c",
    "import sys; sys.argv[0] = 'rewarded-lines'; from rewarded_lines.cli import main; main()",
)
# One thread each: the tests run beside others.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}


def hear_interrupts() -> None:
    """Be the `preexec_fn` of a child that is interrupted: a script starts its background jobs with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def alive(pid: int) -> bool:
    """Say whether a process is there and is more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def speak_to(log: Path, errors: Path | None = None) -> None:
    """Send all that this process prints, from Python or from below it, to a file, or what it warns of to another."""
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    if errors:
        sys.stderr = errors.open("w", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)


def run(log: Path, *args: str) -> None:
    """Be the command line, in a process that another test process made; what it prints goes to `log`."""
    speak_to(log)
    _be_the_command(args, ENVIRONMENT)


def prepared() -> BaseContext:
    """Return a context whose processes have the imports of a merge behind them: a second each, and kills miss them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["command", "rewarded_lines.cli", "rewarded_lines.merger.merge"])
    return context


def prepared_run(args: Sequence[object], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the command line in `folder` in a prepared process, which reads the environment as a new one would."""
    with tempfile.TemporaryDirectory() as place:
        out, errors = Path(place, "out"), Path(place, "errors")
        process = prepared().Process(target=_run_apart, args=(out, errors, folder, environment, tuple(map(str, args))))
        process.start()
        process.join(60)
        assert process.exitcode is not None, "still running after a minute"
        return subprocess.CompletedProcess(args, process.exitcode, out.read_text(), errors.read_text())


def _run_apart(out: Path, errors: Path, folder: Path, environment: dict[str, str], args: tuple[str, ...]) -> None:
    speak_to(out, errors)
    os.chdir(folder)
    assert "huggingface_hub" not in sys.modules, "it reads the environment when it is imported"
    _be_the_command(args, environment)


def _be_the_command(args: Sequence[str], environment: dict[str, str]) -> None:
    hear_interrupts()
    os.environ |= environment
    sys.argv = ["rewarded-lines", *args]

    from rewarded_lines.cli import main

    main()
