"""What the rules need to know of whole tensors: from a method's options to the measures of `Facts`.

Each function takes the `Facts` of the inputs, a tensor's name, the method's options, and the policies that take part,
in the order of the sum. It returns parameters of the rule, by name; "kept" draws masks, see `Mask` in kernels/blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rewarded_lines.merger.merge_rules import spread

Options = Mapping[str, Any]
Measured = dict[str, Any]


def thresholds(facts: Any, name: str, options: Options, rows: Sequence[int]) -> Measured:
    """Return for each policy the smallest magnitude that TIES keeps."""
    found = facts.thresholds(name, options["density"], options["scope"])
    return {"thresholds": [found[row] for row in rows]}


def random_masks(facts: Any, name: str, options: Options, rows: Sequence[int]) -> Measured:
    """Return DARE's masks."""
    return {"kept": facts.random_masks(name, rows, options["density"], options["seed"])}


def ranked_masks(facts: Any, name: str, options: Options, rows: Sequence[int]) -> Measured:
    """Return DELLA's masks, which are divided by the probability to keep the value."""
    # Without a window nobody needs ranks; with all values kept there is nothing to draw.
    window = options["window"] if options["density"] < 1 else 0.0
    return {"kept": facts.ranked_masks(name, rows, options["density"], window, options["seed"])}


def window_fits(options: Options) -> str:
    """Return what DELLA's options must be together, or "" if all probabilities are above 0 and at most 1."""
    density, half = options["density"], options["window"] / 2
    inside = density > half and density + half < 1 + 1e-12
    return "" if density == 1 or inside else "--density − --window/2 above 0, and --density + --window/2 at most 1"


def bands(facts: Any, name: str, options: Options, rows: Sequence[int]) -> Measured:
    """Return for each policy the smallest and the largest magnitude that Breadcrumbs keeps."""
    lower, upper = facts.bands(name, options["density"], options["outliers"])
    return {"lower": [lower[row] for row in rows], "upper": [upper[row] for row in rows]}


def boosts(facts: Any, name: str, options: Options, rows: Sequence[int]) -> Measured:
    """Return by how much RAM+ enlarges the values that only one policy changed, for each policy."""
    found = facts.overlaps(name, rows, options["changed"], options["scope"])
    return {"boosts": [options["boost"] * min(ratio, options["cap"]) for ratio in found]}


def selection(facts: Any, name: str, options: Options, rows: Sequence[int]) -> Measured:
    """Return the smallest spread of a value that SCE selects, and each policy's share of the selected squares."""
    least, squares = facts.selection(name, rows, options["select"], spread)
    return {"least": least, "squares": squares}
