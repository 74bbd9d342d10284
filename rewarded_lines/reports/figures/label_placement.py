"""Shortened names, and labels near their points that cover nothing. Geometry is in pixels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rewarded_lines.reports.figures.figure_style import pixels_per_point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Directions from a point to its label, the best first: fronts are open at the upper right.
_ANGLES = np.radians([45, 22, 68, 0, 90, -22, 112, -45, 135, 180, 225, 270, 202, 158, 248, 292])
# In typographic points: further distances to try, and the room around a label.
_STEPS, _ROOM = (0, 3, 6, 12), 1.4


@dataclass(frozen=True)
class Label:
    """A text at least `clearance` away from its point `anchor`, [2].

    With `must` the label is always written, even over another one.
    `size` is a name of matplotlib's, relative to the style's size.
    """

    text: str
    anchor: np.ndarray
    clearance: float
    must: bool = False
    size: str = "medium"
    colour: str | tuple[float, ...] = "black"


def write_labels(axes: Axes, labels: Iterable[Label], taken: np.ndarray, thin: np.ndarray) -> None:
    """Write labels where they cover nothing; a label without a free place is left out.

    Args:
        axes: with its final layout.
        labels: the most important first.
        taken: boxes that no label may touch, [boxes, 4].
        thin: boxes that a label may touch if no other place is free, [boxes, 4].
    """
    from matplotlib.text import Text

    unit = pixels_per_point(axes.figure)
    written = taken[:0]
    for label in labels:
        style: dict[str, Any] = dict(fontsize=label.size, color=label.colour, ha="center", va="center", zorder=7)
        extent = Text(0, 0, label.text, figure=axes.figure, **style).get_window_extent()
        size = (extent.width + _ROOM * unit, extent.height + _ROOM * unit)
        # Try free places, then thin lines; a `must` label also covers marks, at worst labels.
        tries = [np.concatenate([taken, thin]), taken, *([written, taken[:0]] if label.must else [])]
        distances = [label.clearance + step * unit for step in _STEPS]
        frame = axes.bbox.extents
        boxes = (place(label.anchor, size, obstacles, frame, distances) for obstacles in tries)
        box = next((box for box in boxes if box is not None), None)
        if box is not None:
            taken, written = (np.concatenate([boxes, box[None]]) for boxes in (taken, written))
            x, y = axes.transData.inverted().transform((box[:2] + box[2:]) / 2)
            axes.text(x, y, label.text, **style)


def shorten(text: str, longest: int) -> str:
    """Return the beginning and end of a name in at most `longest` characters."""
    if len(text) <= longest:
        return text
    end = (longest - 1) // 2
    return f"{text[: longest - 1 - end]}…{text[len(text) - end :]}"


def boxes_along(line: np.ndarray, step: float = 3.0) -> np.ndarray:
    """Return small boxes at most `step` apart along a polyline: [vertices, 2] → [boxes, 4]."""
    centres = [line[:1]]
    for start, end in zip(line[:-1], line[1:], strict=True):
        count = max(1, int(np.hypot(*(end - start)) / step))
        centres.append(start + (end - start) * np.linspace(0, 1, count + 1)[1:, None])
    return boxes_around(np.concatenate(centres), 1)


def boxes_around(points: np.ndarray, radius: float) -> np.ndarray:
    """Return squares of half-width `radius` as (left, bottom, right, top): [points, 2] → [points, 4]."""
    return np.concatenate([points - radius, points + radius], axis=1)


def place(
    anchor: np.ndarray,
    size: tuple[float, float],
    obstacles: np.ndarray,
    frame: Sequence[float],
    distances: Iterable[float],
) -> np.ndarray | None:
    """Return the first free box for a label inside the frame, or None.

    Obstacles are boxes, [boxes, 4]; distances go from the point to the box's edge, in order.
    """
    half = np.array(size) / 2
    directions = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
    for distance in distances:
        for direction in directions:
            centre = anchor + direction * (distance + np.abs(direction) @ half)
            low, high = centre - half, centre + half
            inside = (low >= frame[:2]).all() and (high <= frame[2:]).all()
            apart = (obstacles[:, :2] >= high) | (obstacles[:, 2:] <= low)
            if inside and apart.any(axis=1).all():
                return np.concatenate([low, high])
    return None
