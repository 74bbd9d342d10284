"""How methods, points, numbers and what they mean are written: in tables, in legends, on the page and on cards."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from rewarded_lines.config import TUNED
from rewarded_lines.merger.methods import METHODS
from rewarded_lines.pareto.bootstrap import Estimate
from rewarded_lines.reports.summary import PointSummary, Summary


def method_label(points: Sequence[PointSummary]) -> str:
    """Return what the method of some points is called in a legend, e.g. "LiNeS (α = β = 1)"."""
    name, merge = points[0].method, points[0].merge
    alpha, beta = merge.alpha, merge.beta
    if any(point.checkpoint for point in points):
        return name
    low, high = (end(point.merge.alpha for point in points) for end in (min, max))
    if any(point.edit for point in points):
        return f"LiNeS, edited (α = {_number(low, '.2f')} to {_number(high, '.2f')}, β = 1 − α)"
    if low < high:
        ends = dict.fromkeys([_number(low, ".2f"), _number(high, ".2f")])
        return f"{name} (α = {' to '.join(ends)}, β = {_number(beta)})"
    kind = "Rewarded Soups" if beta == 0 else "LiNeS"
    if merge.method != "soup":
        kind = _label(merge.method) + (" + LiNeS" if beta != 0 else "")
    if name == TUNED:
        kind += ", tuned"
    if beta == 0:
        return f"{kind} (β = 0)" if alpha == 1 else f"{kind} (α = {_number(alpha)}, β = 0)"
    schedule = f"α = β = {_number(alpha)}" if alpha == beta else f"α = {_number(alpha)}, β = {_number(beta)}"
    return f"{kind} ({schedule})"


def _label(method: str) -> str:
    """Return the label of a merge method; an old run may have a method that no longer exists."""
    return (METHODS[method].label if method in METHODS else "") or method


def method_labels(summary: Summary) -> dict[str, str]:
    """Return what every method is called; methods of one label have their own names before it."""
    labels = {name: method_label(points) for name, points in summary.methods().items()}
    times = Counter(labels.values())
    return {name: label if times[label] == 1 else f"{name}: {label}" for name, label in labels.items()}


def weights_text(point: PointSummary) -> str:
    """Return λ of two policies, the weights of more, the name of a model that is not merged, or "" for SFT."""
    if point.checkpoint:
        return point.checkpoint
    return _weight(point.weights[0]) if len(point.weights) == 2 else ",".join(map(_weight, point.weights))


def with_unit(name: str, unit: str) -> str:
    """Return a measure's name with its unit, if it has one."""
    return f"{name} [{unit}]" if unit else name


def volume_unit(summary: Summary) -> str:
    """Return the product of the rewards' units; a reward without a unit is there by its name."""
    return " × ".join(unit or name for name, unit in summary.objectives.items())


def reference_text(summary: Summary, reference: str) -> str:
    """Return the coordinates of a reference point, in the order of the rewards."""
    return "(" + ", ".join(f"{value:.3g}" for value in summary.references[reference].values()) + ")"


def interval_text(estimate: Estimate) -> str:
    """Return `value [low, high]` with as many decimals as the interval deserves."""
    return bracketed([estimate])[0]


def bracketed(estimates: Sequence[Estimate]) -> list[str]:
    """Return `value [low, high]` of every estimate of a column, all with the same decimals."""
    places = _decimals(estimates)
    return [f"{_fixed(e.value, places)} [{_fixed(e.low, places)}, {_fixed(e.high, places)}]" for e in estimates]


def plus_minus(estimates: Iterable[Estimate]) -> list[str]:
    """Return `value ±half`, half the width of its interval, of every estimate of a column with the same decimals."""
    column = list(estimates)
    places = _decimals(column)
    return [f"{_fixed(e.value, places)} ±{(e.high - e.low) / 2:.{places}f}" for e in column]


def scope_note(summary: Summary) -> str:
    """Return what the intervals cover, what was tuned, and how many points are still missing."""
    single = summary.runs == 1
    over = f"{summary.prompts} prompts" if single else f"{summary.runs} training runs and {summary.prompts} prompts"
    note = (
        f"{summary.level:.0%} intervals: percentile bootstrap over {over}, "
        f"{summary.resamples} resamples, seed {summary.seed}. "
    )
    several = "Means and hypervolumes are averages over the runs; so few make intervals rather too narrow."
    note += "They do not cover another training run." if single else several
    if found := summary.tuned:
        note += (
            f" tuned: α = {found['alpha']:g}, β = {found['beta']:g}, chosen in {len(found['trials'])} trials on "
            f"{found['prompts']['count']} validation prompts."
        )
    if summary.missing_points:
        total = len(summary.points) + summary.missing_points
        note += f" {summary.missing_points} of {total} points are not {'evaluated yet' if single else 'in every run'}."
    return note


def points_note(summary: Summary) -> str:
    """Return what ±, λ and KL in the table of points are."""
    note = "± is half the interval's width; all points share their prompts, so differences are surer than that."
    first, *others = summary.policies or [""]
    if len(others) > 1:
        note = f"λ: weights of {', '.join(summary.policies)}. {note}"
    elif others:
        note = f"λ: weight of {first}, 1 − λ that of {others[0]}. {note}"
    elif first:
        edited = any(point.edit for point in summary.points)
        note = f"λ: weight of {first}{'; of `edit` α, and β = 1 − α' if edited else ''}. {note}"
    note += " KL: mean of log π(y|x) − log π_SFT(y|x)"
    settings = {name: summary.generation.get(name, 1.0) for name in ("temperature", "top_p")}
    if any(value != 1.0 for value in settings.values()):
        sampled = ", ".join(f"{name} {value:g}" for name, value in settings.items())
        note += f" of responses sampled at {sampled}, where it is not an unbiased estimate of KL(π‖π_SFT)"
    return note + "."


def _number(value: float, form: str = "g") -> str:
    """Return a number with the minus sign that axes have, not a hyphen."""
    return format(value, form).replace("-", "\N{MINUS SIGN}")


def _weight(weight: float) -> str:
    return f"{weight:.2f}" if round(weight, 2) == round(weight, 4) else f"{weight:.4f}".rstrip("0")


def _fixed(value: float, places: int) -> str:
    """Return a number that never reads −0.00."""
    return f"{round(value, places) + 0.0:.{places}f}"


def _decimals(estimates: Iterable[Estimate]) -> int:
    """Return the decimals at which the middle one of a column's half-widths shows two digits."""
    widths = sorted((e.high - e.low) / 2 for e in estimates if e.high > e.low)
    if not widths:
        return 2
    return min(6, max(0, 1 - math.floor(math.log10(widths[len(widths) // 2]))))
