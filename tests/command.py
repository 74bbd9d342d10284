"""The command line as a process of its own, for what cannot be done in this one: kills, limits, other folders."""

import os
import sys
from pathlib import Path

COMMAND = (
    sys.executable,
    "-c",
    "import sys; sys.argv[0] = 'rewarded-lines'; from rewarded_lines.cli import main; main()",
)
# One thread each: the tests run beside others.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}


def run(log: Path, *args: str) -> None:
    """Be the command line, in a process that another test process made; what it prints goes to `log`."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= ENVIRONMENT
    sys.argv = ["rewarded-lines", *args]

    from rewarded_lines.cli import main

    main()
