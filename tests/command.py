"""The command line as a process of its own, for what cannot be done in this one: kills, limits, other folders."""

import os
import sys

COMMAND = (
    sys.executable,
    "-c",
    "import sys; sys.argv[0] = 'rewarded-lines'; from rewarded_lines.cli import main; main()",
)
# One thread each: the tests run beside others.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
