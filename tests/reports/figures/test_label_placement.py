"""Geometry of the labels, by hand."""

from __future__ import annotations

import numpy as np

from rewarded_lines.reports.figures.label_placement import boxes_along, boxes_around, place, shorten

FRAME = (0.0, 0.0, 100.0, 100.0)
NOTHING = np.zeros((0, 4))


def test_boxes_along_cover_a_line_to_its_ends() -> None:
    boxes = boxes_along(np.array([[0.0, 0.0], [30.0, 0.0], [30.0, 40.0]]))
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert np.hypot(*np.diff(centres, axis=0).T).max() <= 4
    assert centres[0].tolist() == [0.0, 0.0]
    assert centres[-1].tolist() == [30.0, 40.0]


def test_boxes_around_points() -> None:
    assert boxes_around(np.array([[1.0, 2.0]]), 3.0).tolist() == [[-2.0, -1.0, 4.0, 5.0]]


def test_a_free_label_goes_up_and_right() -> None:
    box = place(np.array([50.0, 50.0]), (20, 10), NOTHING, FRAME, [5])
    assert box is not None
    assert (box[:2] > 50).all()
    assert (box[2:] - box[:2]).tolist() == [20.0, 10.0]


def test_a_label_keeps_off_obstacles_and_inside_the_frame() -> None:
    obstacles = np.array([[50.0, 0.0, 100.0, 100.0]])
    box = place(np.array([50.0, 97.0]), (20, 10), obstacles, FRAME, [5])
    assert box is not None
    assert box[2] <= 50
    assert (box[:2] >= 0).all()
    assert (box[2:] <= 100).all()


def test_a_label_may_touch_an_obstacle() -> None:
    # The only free place is as large as the label.
    around = np.array([[0.0, 0.0, 55.0, 100.0], [75.0, 0.0, 100.0, 100.0], [0, 0, 100, 45.0], [0, 55.0, 100, 100.0]])
    box = place(np.array([50.0, 50.0]), (20, 10), around, FRAME, [5])
    assert box is not None and box.tolist() == [55.0, 45.0, 75.0, 55.0]
    around[0, 2] += 0.1
    assert place(np.array([50.0, 50.0]), (20, 10), around, FRAME, [5]) is None


def test_no_place_is_told() -> None:
    assert place(np.array([50.0, 50.0]), (20, 10), np.array([FRAME]), FRAME, [5, 10]) is None


def test_long_names_keep_their_beginning_and_their_end() -> None:
    assert shorten("cheerful", 8) == "cheerful"
    assert shorten("cheerful-seed-12", 11) == "cheer…ed-12"
    assert [len(shorten("x" * 99, longest)) for longest in (10, 11)] == [10, 11]
