"""How the policies of runs were trained: what the recipes logged beside them, if it is there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewarded_lines.evaluation.records import Run
from rewarded_lines.evaluation.setup import located
from rewarded_lines.folders import METRICS_FILE, TRAINING_FILE


@dataclass(frozen=True)
class Training:
    """What a recipe logged of one policy.

    Attributes:
        policy: its name.
        run: which of the runs it belongs to, from 0.
        steps: of the optimizer, one for each line of the log.
        values: by the trainer's own name, one for each line; NaN where a line has none.
        standardized: whether rewards were in units of their standard deviation on the SFT model's responses.
    """

    policy: str
    run: int
    steps: list[int]
    values: Mapping[str, list[float]]
    standardized: bool


def read_trainings(runs: Sequence[Run]) -> list[Training]:
    """Return the logs that stand beside the policies that the runs name; what is not there, or not whole, is left out.

    Args:
        runs: of one project.
    """
    found = []
    for index, run in enumerate(runs):
        for name, policy in run.header.get("policies", {}).items():
            folder = Path(located(str(policy.get("path", "")), run.folder)) if isinstance(policy, Mapping) else None
            lines = _lines(folder / METRICS_FILE) if folder else []
            if folder and lines:
                found.append(_training(name, index, lines, _standardized(folder / TRAINING_FILE)))
    return found


def _training(policy: str, run: int, lines: Sequence[Mapping[str, Any]], standardized: bool) -> Training:
    names = dict.fromkeys(key for line in lines for key, value in line.items() if isinstance(value, int | float))
    values = {name: [float(line.get(name, math.nan)) for line in lines] for name in names if name != "step"}
    return Training(policy, run, [int(line["step"]) for line in lines], values, standardized)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log that say a step and measure something; none of a file that is no such log."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if isinstance(line.get("step"), int) and len(line) > 1]
    except (OSError, ValueError, AttributeError):
        return []


def _standardized(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("standardized"))
    except (OSError, ValueError, AttributeError):
        return False
