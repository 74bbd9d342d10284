"""The options of `search --shape`, for Python and for the command line. Importing this loads no heavy library."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from rewarded_lines.errors import did_you_mean, fail
from rewarded_lines.options import option, takes_fields

SHAPES, SAMPLERS = ("linear", "spline"), ("tpe", "botorch")


def _option(default: Any, about: str, **more: Any) -> Any:
    return option(default, about, rich_help_panel="The best shape over depth", **more)


@dataclass(frozen=True)
class ShapeOptions:
    """How the best shape over depth is searched; a UserError for values that are wrong or do not go together."""

    shape: str | None = _option(
        None, "Search a shape over depth, not λ: linear between knots, or a spline.", metavar="KIND", offers=SHAPES
    )
    knots: int = _option(4, "Depths at which the scale is searched.", min=2)
    each_policy: bool = _option(False, "A shape for each policy; otherwise one for all.")
    trials: int = _option(24, "Shapes to try, and as many α and β to compare with.", min=1)
    trial_points: int = _option(3, "λ of each trial, counted as `sweep --points`.", min=2)
    validation: str | None = _option(None, "File of validation prompts; by default `sweep.tune`'s.", metavar="FILE")
    prompts: int = _option(200, "Validation prompts, at most.", min=2)
    screen: int = _option(50, "Prompts that each shape sees; only promising ones see the rest. 0: all.", min=0)
    most: float = _option(3.0, "Largest scale; the smallest is 0.", min=0.1)
    max_kl: float | None = _option(None, "Ceiling for the mean KL to SFT of each point, in nats.", min=0)
    low_kl: bool = _option(False, "Seek little KL, too, as a second objective.")
    sampler: str = _option("tpe", "Who proposes shapes: tpe, or botorch (its EHVI with --low-kl).", offers=SAMPLERS)
    seed: int = _option(0, "Of the proposals.", min=0)

    def __post_init__(self) -> None:
        """Refuse values that are wrong, and options of a shape without `shape`."""
        for one in fields(self):
            value, flag = getattr(self, one.name), f"--{one.name.replace('_', '-')}"
            if self.shape is None and value != one.default:
                raise fail("an option of the search for a shape", where=flag, remedy="add --shape linear")
            words, least = one.metadata.get("offers"), one.metadata.get("min")
            if words and value is not None and value not in words:
                remedy = did_you_mean(value, words)
                raise fail(f"unknown value `{value}`", where=flag, expected=", ".join(words), remedy=remedy)
            if least is not None and value is not None and not least <= value < math.inf:
                raise fail("out of range", where=flag, expected=f"{least} or more", got=str(value))


takes_shape_options = partial(takes_fields, ShapeOptions, "shapes")
"""Lets callers pass the options one by one, or whole as `shapes`; see `takes_fields`."""
