"""The command line as a process of its own, for what cannot be done in this one: kills, limits, other folders."""

import os
import signal
import sys
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


def speak_to(log: Path) -> None:
    """Send all that this process prints, from Python or from below it, to a file."""
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    for stream in (1, 2):
        os.dup2(sys.stdout.fileno(), stream)


def run(log: Path, *args: str) -> None:
    """Be the command line, in a process that another test process made; what it prints goes to `log`."""
    speak_to(log)
    hear_interrupts()
    os.environ |= ENVIRONMENT
    sys.argv = ["rewarded-lines", *args]

    from rewarded_lines.cli import main

    main()
