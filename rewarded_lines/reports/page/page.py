"""The page of a report: a template filled with its style, its script, plotly and the run.

A model's text stands only inside JSON, as ASCII without `<`, and the script shows it only in text nodes.
Responses and plotly are compressed. The page unpacks the responses of a chosen point, and plotly after
the first paint.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from rewarded_lines.config import SFT
from rewarded_lines.evaluator.choose import command_for
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.records import Point, Run
from rewarded_lines.extras import install, is_installed
from rewarded_lines.pareto.choice import knee
from rewarded_lines.references import located
from rewarded_lines.reports import texts
from rewarded_lines.reports.figures.figure_style import COLOURS
from rewarded_lines.reports.summary import PointSummary, Summary

# Joined in this order.
SCRIPTS = ("numbers.js", "state.js", "front.js", "controls.js", "responses.js", "start.js")
# Plotly's names of the figures' markers, in their order.
_MARKS = (
    "square", "circle", "triangle-up", "triangle-down", "cross", "x", "diamond", "triangle-left", "triangle-right",
    "pentagon",
)  # fmt: skip


def lacking() -> str:
    """Return a message if plotly is missing, or ""."""
    if is_installed("plotly"):
        return ""
    return f"No report.html: it needs plotly, which is not installed ({install('report')})."


def page(runs: Sequence[Run], summary: Summary) -> bytes:
    """Return the report of the summarised runs as a deterministic HTML file; needs plotly."""
    from plotly.offline import get_plotlyjs

    packed = {f"prompts-{index}": _prompts(run) for index, run in enumerate(runs)}
    records = [_records(run, summary) for run in runs]
    for index, run in enumerate(runs):
        for place, record in enumerate(records[index]):
            packed[f"records-{index}-{place}"] = _responses(run, record)
    blocks = [_block(name, _json(content)) for name, content in packed.items()]
    filled = Template(_template("page.html")).substitute(
        title=html.escape(summary.title or "Front"),
        style=_template("palette.css") + _template("page.css"),
        overview=_unmarked(_json(_overview(runs, summary, records))),
        script="\n".join(map(_template, SCRIPTS)),
        blocks="\n".join([*blocks, _block("plotly", get_plotlyjs())]),
    )
    # UTF-8 cannot encode a lone surrogate in a title; a browser shows its reference as U+FFFD.
    return filled.encode("utf-8", "xmlcharrefreplace")


def _template(name: str) -> str:
    return (files("rewarded_lines.reports.page") / name).read_text(encoding="utf-8")


def _json(content: Any) -> str:
    """Return JSON in ASCII, which escapes lone surrogates."""
    return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def _unmarked(text: str) -> str:
    """Escape the characters of JSON that could end a script element or begin a comment."""
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _block(name: str, text: str) -> str:
    """Return an element that browsers do not run, with a text gzipped in base64."""
    packed = gzip.compress(text.encode("utf-8"), compresslevel=6, mtime=0)
    encoded = base64.b64encode(packed).decode("ascii")
    return f'<script type="text/plain" id="{name}">{encoded}</script>'


def _overview(runs: Sequence[Run], summary: Summary, records: Sequence[Sequence[Point]]) -> dict[str, Any]:
    """Return the page's data without responses; it opens at the point of `choose --knee`."""
    points, names = summary.points, summary.objectives
    merged = [index for index, point in enumerate(points) if point.method != SFT]
    means = [[points[index].rewards[name].value for name in names] for index in merged]
    return {
        "scope": texts.scope_note(summary),
        "note": texts.points_note(summary),
        "level": f"{summary.level:.0%}",
        "volume": texts.volume_unit(summary),
        "runs": [str(run.folder) for run in runs],
        "measures": _measures(runs[0], summary),
        "methods": _methods(summary),
        "points": [_point(runs, point, own) for point, own in zip(points, zip(*records, strict=True), strict=True)],
        "start": merged[knee(means)],
    }


def _measures(run: Run, summary: Summary) -> list[dict[str, str]]:
    """Return the axes, rewards before costs, in the order of a point's `values`."""
    rows = []
    for name, unit in summary.rewards.items():
        about = str(run.header["rewards"][name].get("description", ""))
        role = "audit" if name in summary.audits else "reward"
        rows.append((name, unit, role, "higher", about))
    rows.append(("KL to SFT", "nats", "cost", "lower", "of the sampled responses, k1"))
    rows.append(("length", "words", "cost", "", "of the responses"))
    for name in summary.controls:
        rows.append((f"{name} perplexity", "", "cost", "lower", "of texts of no task"))
    keys = ("name", "unit", "role", "better", "about")
    return [dict(zip(keys, row, strict=True)) for row in rows]


def _methods(summary: Summary) -> list[dict[str, Any]]:
    """Return the methods with the colours and marks of the figures; single policies are rings."""
    volumes = {row.method: row.hypervolume for row in summary.hypervolumes if row.reference == SFT}
    labels, merged = texts.method_labels(summary), list(summary.merged_methods())
    found = []
    for name, points in summary.methods().items():
        place = merged.index(name) % len(COLOURS) if name in merged else None
        joined = len(summary.policies) <= 2 and all(point.weights for point in points)
        found.append(
            {
                "name": name,
                "label": labels[name],
                "colours": None if place is None else _light_and_dark(COLOURS[place]),
                "mark": "circle-open" if place is None else _MARKS[place],
                "line": joined and place is not None,
                "volume": texts.interval_text(volumes[name]),
                "points": [index for index, point in enumerate(summary.points) if point.method == name],
            }
        )
    return found


def _light_and_dark(colour: str) -> list[str]:
    """Return a colour of the figures and its variant for a dark page, lighter if it is dark."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    # Relative luminance by WCAG 2, which requires a contrast of 3 between marks and background.
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    share = max(0.0, 0.5 * (1 - luminance / 0.25))
    return [colour, "#" + "".join(f"{round(255 * (c + share * (1 - c))):02x}" for c in channels)]


def _point(runs: Sequence[Run], point: PointSummary, records: Sequence[Point]) -> dict[str, Any]:
    estimates = [*point.rewards.values(), point.kl, point.words, *point.perplexities.values()]
    values = [[one.value, one.low, one.high] for one in estimates]
    place = texts.place_text(point, list(runs[0].header["policies"]))
    return {
        "method": point.method,
        "place": place,
        "label": f"{point.method} {place}" if place else "SFT",
        # JSON cannot hold an infinite perplexity.
        "values": [one if all(map(math.isfinite, one)) else None for one in values],
        "ended": point.ended,
        "distinct2": point.distinct2,
        "adds": point.contribution,
        "commands": [_command(run, record.spec) for run, record in zip(runs, records, strict=True)],
    }


def _command(run: Run, spec: PointSpec) -> str:
    if spec.method == SFT:
        return f"# nothing to merge: {located(run.header['base']['path'], run.folder)}"
    return command_for(run, spec)


def _records(run: Run, summary: Summary) -> list[Point]:
    """Return a run's records of the summary's points, in their order."""
    # Not one pass over all points for each.
    found = {(one.spec.method, one.spec.weights, one.spec.checkpoint): one for one in reversed(run.points)}
    return [found[point.method, point.weights, point.checkpoint] for point in summary.points]


def _prompts(run: Run) -> dict[str, Any]:
    """Return the different prompts of a run, and the index of each response's prompt."""
    sft = run.sft
    _, first, which = np.unique(sft.prompt_index, return_index=True, return_inverse=True)
    return {"texts": [sft.prompts[row] for row in first], "which": which.tolist()}


def _responses(run: Run, record: Point) -> dict[str, Any]:
    """Return the responses of a point in one run."""
    return {
        "responses": record.responses,
        "scores": [_numbers(record.scores[name]) for name in run.rewards],
        "kl": _numbers(record.kl),
        "words": record.words.tolist(),
        "tokens": record.tokens.tolist(),
        "ended": record.ended.astype(int).tolist(),
    }


def _numbers(values: np.ndarray) -> list[float | None]:
    """Return numbers with nine digits, which distinguish all float32 values; None for a missing score."""
    return [None if math.isnan(value) else float(f"{value:.9g}") for value in values.tolist()]
