"""What the page shows, as JSON can hold it: the numbers of a summary, the records of a point, its merge command."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rewarded_lines.config import SFT
from rewarded_lines.drawing.style import COLOURS, MARKERS
from rewarded_lines.evaluation.points import PointSpec
from rewarded_lines.evaluation.records import Point, Run
from rewarded_lines.evaluation.setup import located
from rewarded_lines.fronts.choose import knee
from rewarded_lines.fronts.intervals import Estimate
from rewarded_lines.summaries.names import merged_methods, method_labels
from rewarded_lines.summaries.summary import PointSummary, Summary
from rewarded_lines.summaries.tables import interval_text, points_sheet, scope_note, volume_unit, weights_text
from rewarded_lines.sweeping.choose import command_for

# What plotly calls the marks of the figures.
_MARKS = {
    "s": "square",
    "o": "circle",
    "^": "triangle-up",
    "v": "triangle-down",
    "P": "cross",
    "X": "x",
    "D": "diamond",
    "<": "triangle-left",
    ">": "triangle-right",
    "p": "pentagon",
}
# As many digits as a float32 has.
_DIGITS = 9


def overview(runs: Sequence[Run], summary: Summary) -> dict[str, Any]:
    """Return all that the page shows but the responses.

    Args:
        runs: those that were summarised.
        summary: their numbers.
    """
    return {
        "scope": scope_note(summary),
        "note": points_sheet(summary).note,
        "level": f"{summary.level:.0%}",
        "volume": volume_unit(summary),
        "runs": [str(run.folder) for run in runs],
        "measures": _measures(runs[0], summary),
        "methods": _methods(summary),
        "points": [_point(runs, summary, point) for point in summary.points],
        "start": _start(summary),
    }


def prompts(run: Run) -> dict[str, Any]:
    """Return the prompts of a run, each once, and which of them every response answers."""
    _, first, which = np.unique(run.sft.prompt_index, return_index=True, return_inverse=True)
    return {"texts": [run.sft.prompts[row] for row in first], "which": which.tolist()}


def records(run: Run, point: PointSummary) -> dict[str, Any]:
    """Return the responses of a point in one run, with every score to nine digits."""
    record = _record(run, point)
    return {
        "responses": record.responses,
        "scores": [_numbers(record.scores[name]) for name in run.rewards],
        "kl": _numbers(record.kl),
        "words": record.words.tolist(),
        "tokens": record.tokens.tolist(),
        "ended": record.ended.astype(int).tolist(),
    }


def _measures(run: Run, summary: Summary) -> list[dict[str, str]]:
    """Return what can be an axis: rewards, then what they cost. A point's `values` have the same order."""
    found = []
    for name, unit in summary.rewards.items():
        role = "audit" if name in summary.audits else "reward"
        about = str(run.header["rewards"][name].get("description", ""))
        found.append({"name": name, "unit": unit, "role": role, "better": "higher", "about": about})
    cost = {"role": "cost", "better": "lower"}
    found.append({"name": "KL to SFT", "unit": "nats", "about": "of the sampled responses, k1", **cost})
    found.append({"name": "length", "unit": "words", "role": "cost", "better": "", "about": "of the responses"})
    found += [
        {"name": f"{name} perplexity", "unit": "", "about": "of texts of no task", **cost} for name in summary.controls
    ]
    return found


def _methods(summary: Summary) -> list[dict[str, Any]]:
    """Return the methods in the colours and marks of the figures; single policies are rings there, and here."""
    volumes = {row.method: row.hypervolume for row in summary.hypervolumes if row.reference == SFT}
    labels, merged = method_labels(summary), list(merged_methods(summary))
    found = []
    for name, points in summary.methods().items():
        place = merged.index(name) if name in merged else None
        joined = len(summary.policies) <= 2 and all(point.weights for point in points)
        found.append(
            {
                "name": name,
                "label": labels[name],
                "colours": None if place is None else _light_and_dark(COLOURS[place % len(COLOURS)]),
                "mark": "circle-open" if place is None else _MARKS[MARKERS[place % len(MARKERS)]],
                "line": joined and place is not None,
                "volume": interval_text(volumes[name]),
                "points": [index for index, point in enumerate(summary.points) if point.method == name],
            }
        )
    return found


def _light_and_dark(colour: str) -> list[str]:
    """Return a colour of the figures, and what stands for it on a dark page, nearer to white if it is dark itself."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    # Relative luminance as WCAG 2 has it, which asks for a contrast of 3 between marks and what is behind them.
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    share = max(0.0, 0.5 * (1 - luminance / 0.25))
    return [colour, "#" + "".join(f"{round(255 * (c + share * (1 - c))):02x}" for c in channels)]


def _point(runs: Sequence[Run], summary: Summary, point: PointSummary) -> dict[str, Any]:
    estimates = [*point.rewards.values(), point.kl, point.words, *point.perplexities.values()]
    weights = weights_text(point)
    place = weights if point.checkpoint or not weights else f"λ = {weights}"
    return {
        "method": point.method,
        "place": place,
        "label": f"{point.method} {place}" if place else "SFT",
        "values": [_estimate(one) for one in estimates],
        "ended": point.ended,
        "distinct2": point.distinct2,
        "adds": point.contribution,
        "commands": [_command(run, _record(run, point).spec) for run in runs],
    }


def _command(run: Run, spec: PointSpec) -> str:
    if spec.method == SFT:
        return f"# nothing to merge: {located(run.header['base']['path'], run.folder)}"
    return command_for(run, spec)


def _start(summary: Summary) -> int:
    """Return the point that the page opens with: the knee of the front, what `choose --knee` takes."""
    merged = [index for index, point in enumerate(summary.points) if point.method != SFT]
    means = [[summary.points[index].rewards[name].value for name in summary.objectives] for index in merged]
    return merged[knee(means).index]


def _record(run: Run, point: PointSummary) -> Point:
    """Return what a run recorded of a point of the summary."""
    place = (point.method, point.weights, point.checkpoint)
    return next(one for one in run.points if (one.spec.method, one.spec.weights, one.spec.checkpoint) == place)


def _estimate(estimate: Estimate) -> list[float] | None:
    """Return value, low and high; a perplexity beyond all numbers is none."""
    values = [estimate.value, estimate.low, estimate.high]
    return values if all(map(math.isfinite, values)) else None


def _numbers(values: np.ndarray) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values.tolist()]
