"""What methods and points are called where people read them: in legends, on labels, in headings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rewarded_lines.config import POLICIES, TUNED
from rewarded_lines.rules.methods import METHODS
from rewarded_lines.summaries.summary import PointSummary, Summary, is_policy


def method_label(points: Sequence[PointSummary]) -> str:
    """Return what a method is called in a legend, e.g. "LiNeS (α = β = 1)".

    Args:
        points: all of the method, at least one.
    """
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
    """Return what the table of methods calls a method; an old run may have one that is no longer there."""
    return (METHODS[method].label if method in METHODS else "") or method


def method_labels(summary: Summary) -> dict[str, str]:
    """Return what every method is called, those that would be called the same with their own names before it."""
    labels = {name: method_label(points) for name, points in summary.methods().items()}
    times = Counter(labels.values())
    return {name: label if times[label] == 1 else f"{name}: {label}" for name, label in labels.items()}


def merged_methods(summary: Summary) -> dict[str, list[PointSummary]]:
    """Return the methods that make a front, with their points; single policies are no method to be compared."""
    return {name: points for name, points in summary.methods().items() if name != POLICIES}


def policy_points(summary: Summary) -> list[tuple[PointSummary, str]]:
    """Return the points that are a policy itself, unmerged, with its name."""
    found = []
    for index, policy in enumerate(summary.policies):
        point = next((point for point in summary.points if is_policy(point, index)), None)
        if point is not None:
            found.append((point, policy))
    return found


def spread(points: Sequence[PointSummary], count: int = 5) -> list[PointSummary]:
    """Return the ends of a front and some points between, where all would be clutter.

    Args:
        points: in the order of λ.
        count: how many to keep at most; 1 keeps the middle.
    """
    last = len(points) - 1
    shares = [0.5] if count == 1 else [place / (count - 1) for place in range(count)]
    return [points[index] for index in sorted({round(share * last) for share in shares})]


def _number(value: float, form: str = "g") -> str:
    """Return a number with the minus sign that axes have, not a hyphen."""
    return format(value, form).replace("-", "\N{MINUS SIGN}")
