"""The scores of a run on a merge's model card: those of the merge or of the nearest points, and the run's figure.

A run counts only if its base and policies have the hashes of the merge's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.hashing import model_hash, policy_hash
from rewarded_lines.errors import UserError, fail
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.records import RUN_FILE, listed_points, load_run, read_header
from rewarded_lines.merger.methods import METHODS
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


class RunCard:
    """One run, for the cards of merges.

    A run that the user named is `required`: it must fit the merge, and numbers that its report lacks are computed. A
    run found beside the project adds only what its report has.
    """

    def __init__(self, folder: Path, required: bool) -> None:
        """Read the run's header; a folder that is no run raises UserError."""
        self._folder, self._required = folder, required
        self.header = read_header(folder)

    def additions(self, plan: Plan) -> Callable[[MergeSpec], CardAddition]:
        """Return a function from each merge of a plan to what the run adds to its card.

        Raises:
            UserError: a required run is one of other models.
        """
        if self._required:
            self._names(plan)
        return lambda spec: self._addition(plan, spec)

    def _addition(self, plan: Plan, spec: MergeSpec) -> CardAddition:
        names = self._names(plan)
        found = self._numbers() if names else None
        if names is None or found is None:
            return CardAddition()
        summary, figure = found
        weights = dict(zip(plan.policies, spec.weights, strict=True))
        spec = replace(spec, weights=tuple(weights[names[name]] for name in self.header["policies"]))
        place = _locate(spec, listed_points(self.header), summary)
        parts = ["## Scores", _opening(place, self.header, summary), _table(place, summary)]
        if figure:
            parts += [f"![The fronts of the run]({FIGURE})", _caption(place[0], summary)]
        return CardAddition("\n\n".join(parts), {FIGURE: figure} if figure else {})

    def _names(self, plan: Plan) -> dict[str, str] | None:
        """Return the plan's name of every policy of the run, or None for a run of other models."""
        left = {name: policy_hash(policy.folder) for name, policy in plan.policies.items()}
        names: dict[str, str] = {}
        for name, entry in self.header["policies"].items():
            same = [other for other, found in left.items() if found == entry.get("hash")]
            # Of equal policies, the one with the same name first.
            if chosen := (name if name in same else next(iter(same), "")):
                names[name] = chosen
                del left[chosen]
        strange = [*left, *([] if self._same_base(plan) else ["the base"])]
        if not strange and len(names) == len(self.header["policies"]):
            return names
        if not self._required:
            return None
        raise fail(
            "the run is one of other models",
            where=f"--run {self._folder}",
            expected=f"a run of this base and these policies, by the hashes in its {RUN_FILE}",
            got=f"not in it: {', '.join(strange)}" if strange else "it has more policies",
            remedy="name the run of these models, or leave --run out",
        )

    def _same_base(self, plan: Plan) -> bool:
        base = self.header.get("base", {})
        if not plan.reads_base:
            # A merge of adapters reads no base; the card should not either, and compares paths first.
            path = located(str(base.get("path")), self._folder)
            same = path in (plan.reference, str(plan.base.folder.resolve()))
            if same or not self._required:
                return same
        try:
            return bool(model_hash(plan.base.folder) == base.get("hash"))
        except UserError:
            return False

    def _numbers(self) -> tuple[Summary, bytes] | None:
        """Return the run's numbers and its figure, b"" for none: from its report, or else computed."""
        report = self._folder / "report"
        summary = _read_summary(report / "summary.json")
        if summary and _is_current(summary, report / "summary.json", self._folder, self.header):
            figure = report / FIGURE
            return summary, figure.read_bytes() if figure.is_file() else b""
        if not self._required:
            return None
        summary = summarise(load_run(self._folder))
        return summary, _drawn(summary)


def _locate(spec: MergeSpec, points: Sequence[tuple[PointSpec, str]], summary: Summary) -> Place:
    """Return the point that equals a merge, and the two nearest points of its curve, or else of its rule.

    The distance is Σ|Δλᵢ| + |Δα| + |Δβ|; the merge's weights are in the order of the run's policies.
    """
    specs = {_key(point): point for point, _ in points}
    far = {id(point): _distance(spec, specs[_key(point)]) for point in summary.points}
    near = sorted((point for point in summary.points if far[id(point)] < inf), key=lambda point: far[id(point)])
    if not near or far[id(near[0])] > _SAME or spec.outside != "alpha":
        return None, near[:2]
    return near[0], [point for point in near[1:] if point.method == near[0].method][:2]


def _distance(spec: MergeSpec, point: PointSpec) -> float:
    """Return how far a point is from a merge: ∞ for another rule, and for SFT and baselines."""
    merge = point.merge
    one, other = METHODS[spec.method], METHODS[merge.method]
    if (one.rule, one.weigh, dict(spec.options)) != (other.rule, other.weigh, dict(merge.options)):
        return inf
    if len(merge.weights) != len(spec.weights):
        return inf
    steps = [abs(a - b) for a, b in zip(spec.weights, merge.weights, strict=True)]
    return sum(steps) + abs(spec.alpha - merge.alpha) + abs(spec.beta - merge.beta)


def _read_summary(path: Path) -> Summary | None:
    """Return the points of a report's summary.json, or None for a missing file or another version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        points = [PointSummary.from_dict(entry) for entry in content["points"]]
        return Summary(**{**content, "points": points, "hypervolumes": [], "differences": [], "policy_gains": []})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_current(summary: Summary, path: Path, folder: Path, header: Mapping[str, Any]) -> bool:
    """True if a summary is of this run alone, has all its points and is not older than their records."""
    specs = [point for point, _ in listed_points(header)]
    shown, listed = (
        sorted((*_key(point), point.merge.alpha, point.merge.beta) for point in points)
        for points in (summary.points, specs)
    )
    written = path.stat().st_mtime_ns
    older = all(file.stat().st_mtime_ns <= written for file in (folder / "points").glob("*.parquet"))
    return summary.runs == 1 and shown == listed and older


def _key(point: PointSpec | PointSummary) -> tuple[str, tuple[float, ...], str]:
    return point.method, tuple(point.weights), point.checkpoint


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
    how.append(f"temperature {generation.get('temperature', 1.0):g}")
    how.append(f"at most {generation.get('max_tokens')} tokens")
    title = f" of the run “{escaped(summary.title)}”" if summary.title else ""
    return f"{first} on the {summary.prompts} prompts{title} ({escaped(', '.join(filter(None, how)))})."


def _table(place: Place, summary: Summary) -> str:
    """Return the scores of SFT, the merge and the points near it, with half their intervals, and the notes."""
    exact, near = place
    shown = [summary.sft, exact, *near]
    ordered = [point for point in summary.points if any(point is one for one in shown)]
    sheet = points_sheet(replace(summary, points=ordered))
    headings, *rows = ([escaped(cell) for cell in row] for row in (sheet.headings, *sheet.rows))
    for point, row in zip(ordered, rows, strict=True):
        if point is exact:
            row[:] = [f"**{cell}**" if cell else "" for cell in [f"{row[0]}, this model", *row[1:]]]
    notes = f"{escaped(sheet.note)} {escaped(scope_note(summary))}"
    return table([headings, *rows], right=range(1, len(headings))) + f"\n\n{notes}"


def _caption(exact: PointSummary | None, summary: Summary) -> str:
    """Return the figure's caption: where the merge lies in it."""
    if not exact:
        return "*The fronts of the run; this merge is none of its points.*"
    scores = [
        f"{escaped(with_unit(name, unit))} {exact.rewards[name].value:.4g}" for name, unit in summary.objectives.items()
    ]
    point = f"the point λ = {escaped(weights_text(exact))} of {escaped(exact.method)}"
    return f"*The fronts of the run; this model is {point}: {', '.join(scores)}.*"


def _drawn(summary: Summary) -> bytes:
    """Return the figure, or b"" without matplotlib."""
    from rewarded_lines.reports.figures.figure_style import figure_bytes, house_style
    from rewarded_lines.reports.figures.front_figures import front_figure

    try:
        with house_style():
            return figure_bytes(front_figure(summary), "png")
    except UserError:
        return b""
