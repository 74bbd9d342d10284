"""Sweep the Pareto front of a project and report it in one command.

    python eval/pareto.py --config runs/demo/rewarded-lines.yaml --out runs/front
    python eval/pareto.py --config runs/demo/rewarded-lines.yaml --points 5 --engine hf --out runs/quick
    python eval/pareto.py --config runs/demo/rewarded-lines.yaml --search 15 --out runs/adaptive

A restarted command skips the points that are already evaluated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rewarded_lines import search, sweep
from rewarded_lines.errors import UserError
from rewarded_lines.progress import Progress
from rewarded_lines.reports.report import report


def main(argv: Sequence[str]) -> None:
    """Sweep along λ, search for more λ with `--search`, then write the report into the run folder."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", default="rewarded-lines.yaml", help="the project file")
    parser.add_argument("--out", required=True, help="the run folder")
    parser.add_argument("--points", type=int, help="number of λ from 0 to 1; the project's by default")
    parser.add_argument("--engine", default="vllm", help="vllm, hf, or the URL of a server that takes adapters")
    parser.add_argument("--search", type=int, metavar="N", help="then add λ that raise the front, up to N per method")
    parser.add_argument("--ray", metavar="ADDRESS", help="distribute the points over Ray workers")
    parser.add_argument("--workers", type=int, help="with --ray: number of workers")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="devices per vLLM engine")
    parser.add_argument("--engine-arg", action="append", metavar="KEY=VALUE", help="an argument of vLLM (repeat)")
    options = parser.parse_args(argv)

    how = {"engine": options.engine, "ray": options.ray, "workers": options.workers}
    how |= {"tensor_parallel": options.tensor_parallel, "engine_args": options.engine_arg, "progress": _Names()}
    run = sweep(options.config, points=options.points, out=options.out, **how)
    if options.search:
        search(run.folder, points=options.search, **how)
    summary = report(run.folder)
    for row in summary.hypervolumes:
        volume = row.hypervolume
        print(f"{row.method} above {row.reference}: {volume.value:.4g} [{volume.low:.4g}, {volume.high:.4g}]")
    print(f"table and figure: {Path(run.folder) / 'report'}")


class _Names(Progress):
    """Prints the steps and the finished points."""

    def start(self, step: str, counted: bool = False) -> None:
        print(step, file=sys.stderr)

    def advance(self, count: int, name: str = "") -> None:
        print(name, file=sys.stderr)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
