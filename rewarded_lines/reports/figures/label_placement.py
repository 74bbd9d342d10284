"""Text in figures: names cut to a length, and labels put near their points over nothing else. Geometry is in pixels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rewarded_lines.reports.figures.figure_style import pixels_per_point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Directions from a point to its label, the best first: up and to the right, where a front is open.
_ANGLES = np.radians([45, 22, 68, 0, 90, -22, 112, -45, 135, 180, 225, 270, 202, 158, 248, 292])
# Further distances from the point to try, in typographic points.
_STEPS = (0, 3, 6, 12)
# Room around a label, in typographic points.
_ROOM = 1.4


@dataclass(frozen=True)
class Label:
    """A text for the point `anchor`, [2], at least `clearance` away; only one that `must` be written may cover another.

    `size` is one of matplotlib's names for sizes, which are relative to the style's.
    """

    text: str
    anchor: np.ndarray
    clearance: float
    must: bool = False
    size: str = "medium"
    colour: str | tuple[float, ...] = "black"


def write_labels(axes: Axes, labels: Iterable[Label], taken: np.ndarray, thin: np.ndarray) -> None:
    """Write labels in turn, each where it covers nothing; a label without a free place is left out.

    Args:
        axes: drawn once, so that its size is final.
        labels: the most important first.
        taken: boxes that no label may touch, [boxes, 4].
        thin: boxes that a label touches only if it has no other place, [boxes, 4].
    """
    from matplotlib.text import Text

    unit = pixels_per_point(axes.figure)
    written = taken[:0]
    for label in labels:
        style: dict[str, Any] = dict(fontsize=label.size, color=label.colour, ha="center", va="center", zorder=7)
        extent = Text(0, 0, label.text, figure=axes.figure, **style).get_window_extent()
        size = (extent.width + _ROOM * unit, extent.height + _ROOM * unit)
        # First over nothing, then over thin lines; a label that must be written covers marks, at worst other labels.
        tries = [np.concatenate([taken, thin]), taken, *([written, taken[:0]] if label.must else [])]
        distances = [label.clearance + step * unit for step in _STEPS]
        boxes = (place(label.anchor, size, obstacles, axes.bbox.extents, distances) for obstacles in tries)
        box = next((box for box in boxes if box is not None), None)
        if box is not None:
            taken, written = (np.concatenate([boxes, box[None]]) for boxes in (taken, written))
            x, y = axes.transData.inverted().transform((box[:2] + box[2:]) / 2)
            axes.text(x, y, label.text, **style)


def shorten(text: str, longest: int) -> str:
    """Return a name of at most `longest` characters: its beginning and its end, where names of one family differ."""
    if len(text) <= longest:
        return text
    end = (longest - 1) // 2
    return f"{text[: longest - 1 - end]}…{text[len(text) - end :]}"


def boxes_along(line: np.ndarray, step: float = 3.0) -> np.ndarray:
    """Return small boxes, `step` apart at most, that cover a polyline: [vertices, 2] → [boxes, 4]."""
    centres = [line[:1]]
    for start, end in zip(line[:-1], line[1:], strict=True):
        count = max(1, int(np.hypot(*(end - start)) / step))
        centres.append(start + (end - start) * np.linspace(0, 1, count + 1)[1:, None])
    return boxes_around(np.concatenate(centres), 1)


def boxes_around(points: np.ndarray, radius: float) -> np.ndarray:
    """Return square boxes (left, bottom, right, top) of half-width `radius`: [points, 2] → [points, 4]."""
    return np.concatenate([points - radius, points + radius], axis=1)


def overlaps(box: Sequence[float] | np.ndarray, boxes: np.ndarray) -> int:
    """Return how many of `boxes`, [boxes, 4], share area with `box`."""
    left, bottom, right, top = box
    apart = (boxes[:, 0] >= right) | (boxes[:, 2] <= left) | (boxes[:, 1] >= top) | (boxes[:, 3] <= bottom)
    return int((~apart).sum())


def place(
    anchor: np.ndarray,
    size: tuple[float, float],
    obstacles: np.ndarray,
    frame: Sequence[float],
    distances: Iterable[float],
) -> np.ndarray | None:
    """Return the first box for a label near its point that is inside the frame and free of obstacles, [boxes, 4].

    The distances from the point to the box's edge are tried in turn; None when no box is free.
    """
    half = np.array(size) / 2
    directions = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
    for distance in distances:
        for direction in directions:
            centre = anchor + direction * (distance + np.abs(direction) @ half)
            box = np.concatenate([centre - half, centre + half])
            inside = (box[:2] >= frame[:2]).all() and (box[2:] <= frame[2:]).all()
            if inside and not overlaps(box, obstacles):
                return box
    return None
