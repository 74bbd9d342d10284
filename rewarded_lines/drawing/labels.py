"""Labels of a figure, each near its point and over nothing else. All geometry is in pixels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rewarded_lines.drawing.style import pixels_per_point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Directions from a point to its label, the best first: up and to the right, where a front is open.
_ANGLES = np.radians([45, 22, 68, 0, 90, -22, 112, -45, 135, 180, 225, 270, 202, 158, 248, 292])

# Further from its point, in typographic points, if a label does not fit right beside it.
_STEPS = (0, 3, 6, 12)
# Room around a label, in typographic points.
_ROOM = 1.4


@dataclass(frozen=True)
class Label:
    """A text for a point, `clearance` pixels or more from its centre; if it `must`, whatever it covers.

    `size` is one of matplotlib's names, so that it goes with the style's.
    """

    text: str
    anchor: np.ndarray
    clearance: float
    must: bool = False
    size: str = "medium"
    colour: str | tuple[float, ...] = "black"


def write_labels(axes: Axes, labels: Iterable[Label], taken: np.ndarray, thin: np.ndarray) -> None:
    """Write labels in turn, each where it covers nothing; one without such a place is left out.

    Args:
        axes: drawn once, so that its size is final.
        labels: the most important first.
        taken: boxes that no label may touch, [boxes, 4].
        thin: boxes that a label touches only where there is no place beside them, [boxes, 4].
    """
    from matplotlib.text import Text

    unit = pixels_per_point(axes.figure)
    written = taken[:0]
    for label in labels:
        style: dict[str, Any] = {
            "fontsize": label.size,
            "color": label.colour,
            "ha": "center",
            "va": "center",
            "zorder": 7,
        }
        extent = Text(0, 0, label.text, figure=axes.figure, **style).get_window_extent()
        size = (extent.width + _ROOM * unit, extent.height + _ROOM * unit)
        # Rather over a line than over another label, and rather there than nowhere.
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
    """Return small boxes that cover a polyline.

    Args:
        line: [vertices, 2].
        step: distance between the boxes' centres.

    Returns:
        [boxes, 4], each (left, bottom, right, top).
    """
    centres = [line[:1]]
    for start, end in zip(line[:-1], line[1:], strict=True):
        count = max(1, int(np.hypot(*(end - start)) / step))
        centres.append(start + (end - start) * np.linspace(0, 1, count + 1)[1:, None])
    centre = np.concatenate(centres)
    return np.concatenate([centre - 1, centre + 1], axis=1)


def boxes_around(points: np.ndarray, radius: float) -> np.ndarray:
    """Return the square boxes of half-width `radius` around points, [points, 2] → [points, 4]."""
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
    """Return the first free box for a label near its point.

    Args:
        anchor: the point, [2].
        size: width and height of the label.
        obstacles: boxes that it must not touch, [boxes, 4].
        frame: the box that it must stay inside.
        distances: from the point to the label's edge, to try in turn.

    Returns:
        The label's box (left, bottom, right, top), or None when none is free.
    """
    half = np.array(size) / 2
    for distance in distances:
        for angle in _ANGLES:
            direction = np.array([np.cos(angle), np.sin(angle)])
            centre = anchor + direction * (distance + np.abs(direction) @ half)
            box = np.concatenate([centre - half, centre + half])
            inside = (box[:2] >= frame[:2]).all() and (box[2:] <= frame[2:]).all()
            if inside and not overlaps(box, obstacles):
                return box
    return None
