"""Trace the Pareto front of a project and report it: the sweep and its report in one command.

    python eval/pareto.py --config runs/demo/rewarded-lines.yaml --out runs/front
    python eval/pareto.py --config runs/demo/rewarded-lines.yaml --points 5 --engine hf --out runs/quick

Points that are there already are not evaluated again, so it can be stopped and started.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rewarded_lines import sweep
from rewarded_lines.errors import UserError
from rewarded_lines.engines.generation import ENGINES
from rewarded_lines.reporting.report import report


def main(argv: Sequence[str]) -> None:
    """Sweep along λ, then write the report into the run folder.

    Args:
        argv: the arguments shown above.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", default="rewarded-lines.yaml", help="the project file")
    parser.add_argument("--out", required=True, help="the run folder")
    parser.add_argument("--points", type=int, help="λ values from 0 to 1; the project's by default")
    parser.add_argument("--engine", default="vllm", choices=ENGINES)
    options = parser.parse_args(argv)

    run = sweep(
        options.config,
        points=options.points,
        out=options.out,
        engine=options.engine,
        progress=lambda name, done, total: print(name, file=sys.stderr),
    )
    summary = report(run.folder)
    for row in summary.hypervolumes:
        volume = row.hypervolume
        print(f"{row.method} above {row.reference}: {volume.value:.4g} [{volume.low:.4g}, {volume.high:.4g}]")
    print(f"table and figure: {Path(run.folder) / 'report'}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
