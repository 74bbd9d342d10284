"""Labels, numbers and notes for tables, legends, the page and model cards."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from rewarded_lines.config import TUNED
from rewarded_lines.evaluator.missing_scores import missing_lines
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.merger.methods import METHODS, MOD
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.pareto.bootstrap import Estimate
from rewarded_lines.reports.summary import PointSummary, Summary

# From more policies on, all weights of a λ are too long for a table.
_MANY = 4
_MOST_DECIMALS = 6
# Told only where they change the samples.
_MORE_SETTINGS = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def method_label(points: Sequence[PointSummary | PointSpec]) -> str:
    """Return the legend label of a method from its points, e.g. "LiNeS (α = β = 1)"."""
    name, merge = points[0].method, points[0].merge
    alpha, beta = merge.alpha, merge.beta
    if any(point.checkpoint for point in points):
        return name
    if merge.method == MOD:
        return "MOD (no merge: policies mixed while decoding)"
    alphas = sorted(point.merge.alpha for point in points)
    low, high = _number(alphas[0], ".2f"), _number(alphas[-1], ".2f")
    if any(point.edit for point in points):
        return f"LiNeS, edited (α = {low} to {high}, β = 1 − α)"
    if alphas[0] < alphas[-1]:
        ends = low if low == high else f"{low} to {high}"
        return f"{name} (α = {ends}, β = {_number(beta)})"
    kind = _kind(merge) + (", tuned" if name == TUNED else "")
    forms = merge.schedule.forms
    if merge.lines:
        return f"{kind}, scaled by {forms}"
    if forms:
        kind += f", scaled by {forms}"
    if beta == 0 and alpha == 1:
        return f"{kind} (β = 0)"
    if alpha == beta != 0:
        return f"{kind} (α = β = {_number(alpha)})"
    return f"{kind} (α = {_number(alpha)}, β = {_number(beta)})"


def _kind(merge: MergeSpec) -> str:
    """Return the label of a merge method; LiNeS is named where it is the schedule."""
    lines = merge.beta != 0 and not merge.schedule.forms
    if merge.method == "soup":
        return "LiNeS" if lines else "Rewarded Soups"
    # An old run may have a method that no longer exists.
    known = METHODS.get(merge.method)
    return ((known.label if known else "") or merge.method) + (" + LiNeS" if lines else "")


def method_labels(summary: Summary) -> dict[str, str]:
    """Return the label of every method; equal labels get the method's name in front."""
    labels = {name: method_label(points) for name, points in summary.methods().items()}
    times = Counter(labels.values())
    return {name: label if times[label] == 1 else f"{name}: {label}" for name, label in labels.items()}


def accuracy_note(summary: Summary) -> str:
    """Return the note on hypervolumes that are approximated; "" if all are exact."""
    rows = [row for row in summary.hypervolumes if row.resample_error]
    if not rows:
        return ""
    where = ", ".join(dict.fromkeys(row.reference for row in rows))
    value, resample = max(row.error for row in rows), max(row.resample_error for row in rows)
    first = f"values have a relative standard error up to {value:.1%}" if value else "values are exact"
    return (
        f" Above {where}, {first}; their intervals are approximated, with relative errors up to {resample:.1%} in the "
        "resamples that were checked. `report --exact` computes all exactly."
    )


def constant_note(summary: Summary) -> str:
    """Return the note on rewards that have one mean at all points, so that nothing is above SFT; "" without any."""
    means = {name: {point.rewards[name].value for point in summary.points} for name in summary.objectives}
    same = [name for name, values in means.items() if len(values) == 1 and len(summary.points) > 1]
    return f" All points have the same {' and '.join(same)}, so that no hypervolume is above 0." if same else ""


def weights_text(point: PointSummary, policies: Sequence[str]) -> str:
    """Return λ (two policies), all weights (more), a baseline's name, or "" for SFT.

    Of more than four policies, λ that at most two share names them; others are rounded to two decimals.
    """
    if point.checkpoint:
        return point.checkpoint
    return _many_weights(point.weights, policies) if len(point.weights) > _MANY else shares_text(point.weights)


def shares_text(weights: Sequence[float]) -> str:
    """Return the first of two weights, or all of more."""
    return ",".join(map(_weight, weights[:1] if len(weights) == 2 else weights))


def place_text(point: PointSummary, policies: Sequence[str]) -> str:
    """Return where a point lies: `λ = 0.30`, with `, μ = 0.40` if its preference is known; a baseline's name; ""."""
    weights = weights_text(point, policies)
    if point.checkpoint or not weights:
        return weights
    return f"λ = {weights}" + (f", μ = {shares_text(point.place)}" if point.preference else "")


def with_unit(name: str, unit: str) -> str:
    """Return a measure's name with its unit, if it has one."""
    return f"{name} [{unit}]" if unit else name


def volume_unit(summary: Summary) -> str:
    """Return the product of the rewards' units; a reward without a unit contributes its name."""
    return " × ".join(unit or name for name, unit in summary.objectives.items())


def reference_text(summary: Summary, reference: str) -> str:
    """Return the coordinates of a reference point in the order of the rewards."""
    values = summary.references[reference].values()
    return f"({', '.join(f'{value:.3g}' for value in values)})"


def interval_text(estimate: Estimate) -> str:
    """Return `value [low, high]`, with decimals that fit the interval's width."""
    return bracketed([estimate])[0]


def bracketed(estimates: Sequence[Estimate]) -> list[str]:
    """Return `value [low, high]` for a column of estimates, all with the same decimals.

    Numbers that six decimals cannot show, such as volumes of eight rewards, have two significant digits.
    """
    places = _decimals([one for one in estimates if not _is_tiny(one)])
    return [
        f"{one.value:.2g} [{one.low:.2g}, {one.high:.2g}]"
        if _is_tiny(one)
        else "{} [{}, {}]".format(*(_fixed(value, places) for value in (one.value, one.low, one.high)))
        for one in estimates
    ]


def plus_minus(estimates: Iterable[Estimate]) -> list[str]:
    """Return `value ±half the interval's width` for a column, all with the same decimals; tiny ones as `bracketed`."""
    column = list(estimates)
    places = _decimals([one for one in column if not _is_tiny(one)])
    return [
        f"{one.value:.3g} ±{(one.high - one.low) / 2:.2g}"
        if _is_tiny(one)
        else f"{_fixed(one.value, places)} ±{(one.high - one.low) / 2:.{places}f}"
        for one in column
    ]


def two_digits(value: float) -> str:
    """Return a number above 0 with two digits or as many as it has before the point; 0 for 0."""
    places = 1 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(_MOST_DECIMALS, max(0, places))}f}"


def scope_note(summary: Summary) -> str:
    """Return the note on intervals, tuning and missing points."""
    single = summary.runs == 1
    over = "" if single else f"{summary.runs} training runs and "
    note = (
        f"{summary.level:.0%} intervals: percentile bootstrap over {over}{summary.prompts} prompts, "
        f"{summary.resamples} resamples, seed {summary.seed}. "
    )
    if single:
        note += "They do not cover another training run."
    else:
        note += "Means and hypervolumes are averages over the runs; "
        note += "so few make intervals rather too narrow."
    if found := summary.tuned:
        note += f" tuned: α = {found['alpha']:g}, β = {found['beta']:g}, chosen in "
        note += f"{len(found['trials'])} trials on {found['prompts']['count']} validation prompts."
    if summary.missing_points:
        total = len(summary.points) + summary.missing_points
        missing = "evaluated yet" if single else "in every run"
        note += f" {summary.missing_points} of {total} points are not {missing}."
    return note


def points_note(summary: Summary) -> str:
    """Return the note that explains ±, λ, KL and missing scores in the table of points."""
    note = "± is half the interval's width; all points share their prompts, so differences are surer than that."
    first, *others = summary.policies or [""]
    if len(others) > 1:
        rounded = "; points.csv has all decimals" if len(summary.policies) > _MANY else ""
        note = f"λ: weights of {', '.join(summary.policies)}{rounded}. {note}"
    elif others:
        note = f"λ: weight of {first}, 1 − λ that of {others[0]}. {note}"
    elif first:
        edited = any(point.edit for point in summary.points)
        note = f"λ: weight of {first}{'; of `edit` α, and β = 1 − α' if edited else ''}. {note}"
    if mixed := [name for name, points in summary.methods().items() if points[0].merge.method == MOD]:
        note += f" {', '.join(mixed)}: a control while decoding, no merged model; all {len(summary.policies)} policies "
        note += "answer together, at that many times the cost."
    if rewards := next((list(point.preference) for point in summary.points if point.preference), []):
        what = f"weights of {', '.join(rewards)}" if len(rewards) > 2 else f"weight of {rewards[0]}"
        note += f" μ: {what} in the preference; policies were trained for mixtures B, and λ = B⁻¹μ."
    note += " KL: mean of log π(y|x) − log π_SFT(y|x)"
    settings = {name: summary.generation.get(name, 1.0) for name in ("temperature", "top_p")}
    more = {name: summary.generation.get(name, usual) for name, usual in _MORE_SETTINGS.items()}
    settings |= {name: value for name, value in more.items() if value != _MORE_SETTINGS[name]}
    if settings != {"temperature": 1.0, "top_p": 1.0}:
        sampled = ", ".join(f"{name} {value:g}" for name, value in settings.items())
        note += f" of responses sampled at {sampled}, "
        note += "where it is not an unbiased estimate of KL(π‖π_SFT)"
    return " ".join([note + ".", *(f"{line}." for line in missing_lines(summary.missing))])


def _number(value: float, form: str = "g") -> str:
    """Return a number with the minus sign of matplotlib's axes."""
    return format(value, form).replace("-", "\N{MINUS SIGN}")


def _many_weights(weights: Sequence[float], policies: Sequence[str]) -> str:
    if len(set(weights)) == 1:
        return f"{weights[0]:.4g} each"
    used = [(name, weight) for name, weight in zip(policies, weights, strict=True) if weight]
    if len(used) > 2:
        return " ".join(f"{weight:.2f}".removeprefix("0") for weight in weights)
    return ", ".join(f"{_weight(weight)} {name}" for name, weight in used)


def _weight(weight: float) -> str:
    return f"{weight:.2f}" if round(weight, 2) == round(weight, 4) else f"{weight:.4f}".rstrip("0")


def _fixed(value: float, places: int) -> str:
    """Return a rounded number, 0.00 instead of -0.00."""
    return f"{round(value, places) + 0.0:.{places}f}"


def _decimals(estimates: Iterable[Estimate]) -> int:
    """Return the decimals at which the median half-width of a column shows two digits."""
    widths = sorted(width / 2 for one in estimates if (width := _width(one)))
    if not widths:
        return 2
    return min(_MOST_DECIMALS, max(0, 1 - math.floor(math.log10(widths[len(widths) // 2]))))


def _width(estimate: Estimate) -> float:
    """Return the width of an interval; 0 if it is only rounding, as of the mean of a score that is 0.1 everywhere."""
    width = estimate.high - estimate.low
    return width if width > 1e-9 * max(abs(estimate.low), abs(estimate.high)) else 0.0


def _is_tiny(estimate: Estimate) -> bool:
    """Return whether six decimals show nothing of an interval's width."""
    return 0 < _width(estimate) < 2 * 10.0**-_MOST_DECIMALS
