"""The scores of a run on a merge's model card: those of the merge or of the nearest points, and the run's figure.

A run counts only if its base and policies have the hashes of the merge's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.hashing import model_hash, policy_hash
from rewarded_lines.errors import UserError, fail
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.records import RUN_FILE, listed_points, load_run, read_header
from rewarded_lines.merger.methods import METHODS, MOD
from rewarded_lines.merger.model_card import CardAddition, escaped, table
from rewarded_lines.merger.plan import Plan
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.references import located
from rewarded_lines.reports.summary import PointSummary, Summary, summarise
from rewarded_lines.reports.tables import points_sheet
from rewarded_lines.reports.texts import scope_note, weights_text, with_unit

FIGURE = "front.png"
_SAME = 1e-9
Place = tuple[PointSummary | None, list[PointSummary]]
"""The evaluated point that equals a merge, if there is one, and the points near it."""


def run_additions(folder: Path, plan: Plan, required: bool) -> Callable[[MergeSpec], CardAddition]:
    """Return a function from each merge of a plan to what a run adds to its card.

    A run that the user named is `required`: it must fit the merge, and numbers that its report lacks are computed.
    Another run adds only what its report has, if it is finished and of the same models.

    Raises:
        UserError: a required folder is no run, or a run of other models.
    """
    try:
        header = read_header(folder)
    except UserError:
        if required:
            raise
        header = {}
    if required:
        _names(plan, folder, header, required)

    def addition(spec: MergeSpec) -> CardAddition:
        # Only now, since the merge has hashed what it read.
        usable = required or header.get("complete") is True
        names = _names(plan, folder, header, required) if usable else None
        summary, figure = _numbers(folder, header, required) if names else (None, b"")
        if names is None or summary is None:
            return CardAddition()
        weights = dict(zip(plan.policies, spec.weights, strict=True))
        own = replace(spec, weights=tuple(weights[names[name]] for name in header["policies"]))
        place = _locate(own, header, summary)
        parts = ["## Scores", _opening(place, header, summary), _table(place, summary)]
        if figure:
            parts += [f"![The fronts of the run]({FIGURE})", _caption(place[0], summary)]
        return CardAddition("\n\n".join(parts), {FIGURE: figure} if figure else {})

    return addition


def _names(plan: Plan, folder: Path, header: Mapping[str, Any], required: bool) -> dict[str, str] | None:
    """Return the plan's name of every policy of the run, or None for a run of other models."""
    left = {name: policy_hash(policy.folder) for name, policy in plan.policies.items()}
    names: dict[str, str] = {}
    for name, entry in header["policies"].items():
        same = next((other for other, found in left.items() if found == entry["hash"]), None)
        if same is not None:
            names[name] = same
            del left[same]
    strange = [*left, *([] if _same_base(plan, folder, header["base"], required) else ["the base"])]
    if not strange and len(names) == len(header["policies"]):
        return names
    if not required:
        return None
    raise fail(
        "the run is one of other models",
        where=f"--run {folder}",
        expected=f"a run of this base and these policies, by the hashes in its {RUN_FILE}",
        got=f"not in it: {', '.join(strange)}" if strange else "it has more policies",
        remedy="name the run of these models, or leave --run out",
    )


def _same_base(plan: Plan, folder: Path, base: Mapping[str, str], required: bool) -> bool:
    if not plan.reads_base:
        # A merge of adapters reads no base; the card should not either, and compares paths first.
        same = located(base["path"], folder) in (plan.reference, str(plan.base.folder.resolve()))
        if same or not required:
            return same
    try:
        return bool(model_hash(plan.base.folder) == base["hash"])
    except UserError:
        return False


def _numbers(folder: Path, header: Mapping[str, Any], required: bool) -> tuple[Summary | None, bytes]:
    """Return a run's numbers and its figure, None and b"" if absent: from its report, or else computed."""
    summary, figure = _reported(folder, header), folder / "report" / FIGURE
    if summary or not required:
        return summary, figure.read_bytes() if figure.is_file() else b""
    summary = summarise(load_run(folder))
    from rewarded_lines.reports.figures.figure_style import figure_bytes, house_style
    from rewarded_lines.reports.figures.front_figures import front_figure

    try:
        with house_style():
            return summary, figure_bytes(front_figure(summary), "png")
    except UserError:
        # Matplotlib is not installed.
        return summary, b""


def _reported(folder: Path, header: Mapping[str, Any]) -> Summary | None:
    """Return the summary in a run's report; None if it is of other points or older than their records."""
    path = folder / "report" / "summary.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        points = [PointSummary.from_dict(entry) for entry in content["points"]]
        left_out = ("hypervolumes", "differences", "policy_gains", "power", "kl_budgets")
        summary = Summary(**(content | {"points": points} | {name: [] for name in left_out}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # Missing, damaged or of another version.
        return None
    same = Counter(map(_key, points)) == Counter(_key(point) for point, _ in listed_points(header))
    written = path.stat().st_mtime_ns
    older = all(file.stat().st_mtime_ns <= written for file in (folder / "points").glob("*.parquet"))
    return summary if same and older and summary.runs == 1 else None


def _key(point: PointSpec | PointSummary) -> tuple[Any, ...]:
    return point.method, point.weights, point.checkpoint, point.merge.schedule


def _locate(spec: MergeSpec, header: Mapping[str, Any], summary: Summary) -> Place:
    """Return the point that equals a merge, and the two nearest points of its curve, or else of its rule.

    The distance is Σ|Δλᵢ| + |Δα| + |Δβ|; the merge's weights are in the order of the run's policies.
    """
    # A summary leaves out the options of a merge.
    merges = {_key(point): point.merge for point, _ in listed_points(header)}
    far = [(_distance(spec, merges[_key(point)]), point) for point in summary.points]
    near = sorted((one for one in far if one[0] < inf), key=lambda one: one[0])
    points = [point for _, point in near]
    if not near or near[0][0] > _SAME or spec.outside != "alpha":
        return None, points[:2]
    exact, *others = points
    return exact, [point for point in others if point.method == exact.method][:2]


def _distance(spec: MergeSpec, merge: MergeSpec) -> float:
    """Return how far two merges are from each other: ∞ for another rule, and for SFT and baselines."""
    if MOD in (spec.method, merge.method):
        return inf
    rows = [(METHODS[one.method], one) for one in (spec, merge)]
    rules = [(row.rule, row.weigh, row.relative, dict(one.options), one.lines, one.modules) for row, one in rows]
    if rules[0] != rules[1] or len(merge.weights) != len(spec.weights):
        return inf
    steps = [abs(a - b) for a, b in zip(spec.weights, merge.weights, strict=True)]
    return sum(steps) + abs(spec.alpha - merge.alpha) + abs(spec.beta - merge.beta)


def _opening(place: Place, header: Mapping[str, Any], summary: Summary) -> str:
    """Return the sentence that tells what was evaluated, and how."""
    exact, near = place
    first = "This merge was not evaluated, nor any by its rule. The SFT model was evaluated"
    if exact:
        first = "This merge was evaluated"
    elif near:
        first = "This very merge was not evaluated. These points, the nearest to it, were evaluated"
    engine, generation = header.get("identity", {}).get("engine", {}), header["generation"]
    versions = [f"{name} {version}" for name, version in engine.get("versions", {}).items()]
    how = [*(versions or [str(engine.get("kind", ""))]), str(engine.get("as", "")), str(generation.get("dtype", ""))]
    how += [f"temperature {generation.get('temperature', 1.0):g}", f"at most {generation.get('max_tokens')} tokens"]
    title = f" of the run “{escaped(summary.title)}”" if summary.title else ""
    return f"{first} on the {summary.prompts} prompts{title} ({escaped(', '.join(filter(None, how)))})."


def _table(place: Place, summary: Summary) -> str:
    """Return the scores of SFT, the merge and the points near it, with half their intervals, and the notes."""
    exact, near = place
    ordered = [point for point in summary.points if point in (summary.sft, exact, *near)]
    sheet = points_sheet(replace(summary, points=ordered))
    headings, *rows = ([escaped(cell) for cell in row] for row in (sheet.headings, *sheet.rows))
    for point, row in zip(ordered, rows, strict=True):
        if point is exact:
            row[:] = [f"**{cell}**" for cell in [f"{row[0]}, this model", *row[1:]]]
    notes = f"{escaped(sheet.note)} {escaped(scope_note(summary))}"
    return table([headings, *rows], right=range(1, len(headings))) + f"\n\n{notes}"


def _caption(exact: PointSummary | None, summary: Summary) -> str:
    """Return the figure's caption: where the merge lies in it."""
    if not exact:
        return "*The fronts of the run; this merge is none of its points.*"
    scores = [
        f"{escaped(with_unit(name, unit))} {exact.rewards[name].value:.4g}" for name, unit in summary.objectives.items()
    ]
    point = f"the point λ = {escaped(weights_text(exact, summary.policies))} of {escaped(exact.method)}"
    return f"*The fronts of the run; this model is {point}: {', '.join(scores)}.*"
