"""What a run adds to the card of a merge: the scores of that merge or of the nearest points, and the run's figure.

A run is used only if its base and policies have the same hashes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
"""The point of a run that a merge is, or None if it was not evaluated, and the points near it."""


class RunCard:
    """One run, ready to say what it knows of merges."""

    def __init__(self, folder: Path, required: bool) -> None:
        """Read the run's header.

        Args:
            folder: of the run.
            required: the user named the run, so it must belong to the merge, and its numbers are computed if its report
                does not have them. A run that was found beside the project adds only what its report has.

        Raises:
            UserError: the folder is no run.
        """
        self._folder, self._required = folder, required
        self.header = read_header(folder)

    def additions(self, plan: Plan) -> Callable[[MergeSpec], CardAddition]:
        """Return what the run adds to the card of each merge of a plan; see `rewarded_lines.merger.model_card`.

        Raises:
            UserError: the user named the run, and it is one of other models.
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
        place = locate(spec, listed_points(self.header), summary)
        parts = ["## Scores", _opening(place, self.header, summary), _table(place, summary)]
        if figure:
            parts += [f"![The fronts of the run]({FIGURE})", _caption(place, summary)]
        return CardAddition("\n\n".join(parts), {FIGURE: figure} if figure else {})

    def _names(self, plan: Plan) -> dict[str, str] | None:
        """Return the plan's name of every policy of the run, or None where the run is one of other models."""
        policies = {name: entry.get("hash") for name, entry in self.header["policies"].items()}
        left = {name: policy_hash(policy.folder) for name, policy in plan.policies.items()}
        names: dict[str, str] = {}
        for name, wanted in policies.items():
            same = [other for other, found in left.items() if found == wanted]
            # Of equal policies, the one with the same name first.
            if chosen := (name if name in same else next(iter(same), "")):
                names[name] = chosen
                del left[chosen]
        strange = [*left, *(["the base"] if not self._same_base(plan) else [])]
        if not strange and len(names) == len(policies):
            return names
        if not self._required:
            return None
        raise fail(
            "the run is one of other models",
            where=f"--run {self._folder}",
            expected=f"a run of this base and these policies, by the hashes in its {RUN_FILE}",
            got=f"not in it: {', '.join(strange)}" if strange else "it has more policies",
            remedy="name the run that was made of these, or leave --run out",
        )

    def _same_base(self, plan: Plan) -> bool:
        told = self.header.get("base", {})
        bare = not plan.reads_base
        if bare and located(str(told.get("path")), self._folder) in (plan.reference, str(plan.base.folder.resolve())):
            # The adapters' own hashes say the rest: a base that is not read for the merge is not read for the card.
            return True
        if bare and not self._required:
            return False
        try:
            return bool(model_hash(plan.base.folder) == told.get("hash"))
        except UserError:
            return False

    def _numbers(self) -> tuple[Summary, bytes] | None:
        """Return the run's numbers and its figure (empty where there is none): the report's, else computed."""
        report = self._folder / "report"
        summary = read_summary(report / "summary.json")
        if summary and is_current(summary, report / "summary.json", self._folder, self.header):
            figure = report / FIGURE
            return summary, figure.read_bytes() if figure.is_file() else b""
        if not self._required:
            return None
        summary = summarise(load_run(self._folder))
        return summary, _drawn(summary)


def run_card(run: Path | None, usual: Path) -> RunCard | None:
    """Return the run that a merge's card shows: the one that was named, else a finished one in its usual place.

    Args:
        run: as the user named it.
        usual: the folder where a project has its run, there or not.

    Raises:
        UserError: the user named something that is no run.
    """
    if run is not None:
        return RunCard(run, required=True)
    try:
        found = RunCard(usual, required=False)
    except UserError:
        return None
    return found if found.header.get("complete") is True else None


def locate(spec: MergeSpec, points: Sequence[tuple[PointSpec, str]], summary: Summary) -> Place:
    """Return where a merge, its weights in the order of the run's policies, lies among the points that the run lists.

    If the merge was evaluated, its neighbours on its own curve are near it. If not, near it are the two points of its
    rule with the least Σ|Δλᵢ| + |Δα| + |Δβ|.
    """
    specs = {_name(point): point for point, _ in points}
    alike = [point for point in summary.points if _same_rule(spec, specs[_name(point)])]
    near = sorted(alike, key=lambda point: _distance(spec, specs[_name(point)]))
    if not near or _distance(spec, specs[_name(near[0])]) > _SAME or spec.outside != "alpha":
        return None, near[:2]
    curve = [point for point in summary.methods()[near[0].method] if point.weights]
    if len(summary.policies) == 2:
        here = curve.index(near[0])
        return near[0], [*curve[max(0, here - 1) : here], *curve[here + 1 : here + 2]]
    others = [point for point in curve if point is not near[0]]
    return near[0], sorted(others, key=lambda point: _distance(spec, specs[_name(point)]))[:2]


def read_summary(path: Path) -> Summary | None:
    """Return the points of a report's summary.json; None where it is missing or of another version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        points = [PointSummary.from_dict(entry) for entry in content["points"]]
        return Summary(**{**content, "points": points, "hypervolumes": [], "differences": [], "policy_gains": []})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def is_current(summary: Summary, path: Path, folder: Path, header: Mapping[str, Any]) -> bool:
    """Say whether a summary has this run alone, all its points, and none that was written later."""
    told = sorted((*_name(point), point.merge.alpha, point.merge.beta) for point in summary.points)
    listed = sorted((*_name(point), point.merge.alpha, point.merge.beta) for point, _ in listed_points(header))
    written = path.stat().st_mtime_ns
    older = all(file.stat().st_mtime_ns <= written for file in (folder / "points").glob("*.parquet"))
    return summary.runs == 1 and told == listed and older


def _name(point: PointSpec | PointSummary) -> tuple[str, tuple[float, ...], str]:
    return point.method, tuple(point.weights), point.checkpoint


def _same_rule(spec: MergeSpec, point: PointSpec) -> bool:
    """Say whether a point's residuals are joined by the merge's rule; SFT and baselines have no residuals joined."""
    one, other = METHODS[spec.method], METHODS[point.merge.method]
    same = (one.rule, one.weigh) == (other.rule, other.weigh) and dict(spec.options) == dict(point.merge.options)
    return same and len(point.merge.weights) == len(spec.weights)


def _distance(spec: MergeSpec, point: PointSpec) -> float:
    merge = point.merge
    steps = [abs(a - b) for a, b in zip(spec.weights, merge.weights, strict=True)]
    return sum(steps) + abs(spec.alpha - merge.alpha) + abs(spec.beta - merge.beta)


def _opening(place: Place, header: Mapping[str, Any], summary: Summary) -> str:
    """Say what was measured, and how."""
    exact, near = place
    if exact:
        first = "This merge was evaluated"
    elif near:
        first = "This very merge was not evaluated. These points, the nearest to it, were evaluated"
    else:
        first = "This merge was not evaluated, nor any by its rule. The SFT model was evaluated"
    told, generation = header.get("identity", {}).get("engine", {}), header["generation"]
    versions = [f"{name} {version}" for name, version in told.get("versions", {}).items()]
    how = [*(versions or [str(told.get("kind", ""))]), str(told.get("as", "")), str(generation.get("dtype", ""))]
    how.append(f"temperature {generation.get('temperature', 1.0):g}")
    how.append(f"at most {generation.get('max_tokens')} tokens")
    title = f" of the run “{escaped(summary.title)}”" if summary.title else ""
    return f"{first} on the {summary.prompts} prompts{title} ({escaped(', '.join(filter(None, how)))})."


def _table(place: Place, summary: Summary) -> str:
    """Return the scores of SFT, of the merge, and of the points near it, with half their intervals, and the notes."""
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


def _caption(place: Place, summary: Summary) -> str:
    """Say where in the figure the merge lies."""
    exact, _ = place
    if not exact:
        return "*The fronts of the run; this merge is none of its points.*"
    scores = [
        f"{escaped(with_unit(name, unit))} {exact.rewards[name].value:.4g}" for name, unit in summary.objectives.items()
    ]
    point = f"the point λ = {escaped(weights_text(exact))} of {escaped(exact.method)}"
    return f"*The fronts of the run; this model is {point}: {', '.join(scores)}.*"


def _drawn(summary: Summary) -> bytes:
    """Return the figure; nothing where matplotlib is not installed, since a card can do without it."""
    from rewarded_lines.reports.figures.figure_style import figure_bytes, house_style
    from rewarded_lines.reports.figures.front_figures import front_figure

    try:
        with house_style():
            return figure_bytes(front_figure(summary), "png")
    except UserError:
        return b""
