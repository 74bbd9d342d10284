"""The figure of a checkpoint by depth: what it draws and says, and that it is the same every time."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from rewarded_lines.errors import UserError
from rewarded_lines.merger.inspect import Inspection, Level, Residual, Sum
from rewarded_lines.merger.lines_schedule import Line, Schedule
from rewarded_lines.reports.figures.depth_figure import depth_figure
from rewarded_lines.reports.figures.figure_style import check_figure_file, figure_bytes, write_figure

pytest.importorskip("matplotlib")


def make_inspection(blocks: dict[str, int], base: str | None = "sft", beta: float = 1.0) -> Inspection:
    """Return an inspection of invented numbers; each list has something before its blocks, which is not drawn."""
    levels = []
    for stack, count in blocks.items():
        for block in (None, *range(count)):
            scale = 1 + beta * (block or 0) / max(1, count - 1)
            norm = 2.0 + (block or 0) + count / 7
            residual = Residual(norm, 50.0, abs(scale) * norm, 10, 9) if base else None
            side = "before" if block is None else "in"
            levels.append(Level(1, 10, 40, ("float32",), residual, stack, block, side, scale, ()))
    total = Sum(len(levels), 10, 40, ("float32",), None)
    return Inspection("runs/helpful", base, Schedule((Line(1.0, beta),)), {}, blocks, levels, total, [], None, [])


CASES = {
    "one list": {"model.layers": 32},
    "encoder and decoder": {"encoder.block": 6, "decoder.block": 4},
    "three lists": {"vision_tower.vision_model.encoder.layers": 24, "visual.blocks": 8, "model.layers": 80},
    "one block": {"h": 1},
}


def test_scale_and_norms_are_drawn_as_they_are() -> None:
    inspection = make_inspection({"encoder.block": 6, "decoder.block": 4})
    scales, norms = depth_figure(inspection).axes
    for stack, line in zip(inspection.stacks, scales.lines, strict=True):
        levels = [level for level in inspection.levels if level.stack == stack and level.block is not None]
        np.testing.assert_array_equal(line.get_xdata(), [level.block for level in levels])
        np.testing.assert_array_equal(line.get_ydata(), [level.scale for level in levels])
    drawn = [list(line.get_ydata()) for line in norms.lines]
    first = [level.residual for level in inspection.levels[1:7]]
    assert drawn[0] == [one.norm for one in first if one] and drawn[1] == [one.scaled_norm for one in first if one]


def test_without_a_base_there_is_one_panel() -> None:
    assert len(depth_figure(make_inspection({"h": 4}, base=None)).axes) == 1


def test_axes_are_labelled_with_units() -> None:
    scales, norms = depth_figure(make_inspection({"h": 4}, beta=-1)).axes
    assert scales.get_xlabel() == norms.get_xlabel() == "block [index from 0]"
    assert scales.get_ylabel() == "scale s of the residual [×]"
    assert norms.get_ylabel() == "L2 norm [units of the weights]"
    assert scales.get_title(loc="left") == "LiNeS, α = 1, β = −1"
    assert norms.get_title(loc="left") == "residual τ of helpful over sft"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", ["sft", None])
def test_nothing_overlaps_and_nothing_is_cut(case: str, base: str | None) -> None:
    figure = depth_figure(make_inspection(CASES[case], base))
    figure.canvas.draw()
    parts = [*(axes.get_tightbbox() for axes in figure.axes), *(one.get_window_extent() for one in figure.legends)]
    assert not any(one.overlaps(other) for one, other in combinations(parts, 2))
    for box in parts:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height


@pytest.mark.parametrize("case", CASES)
def test_lists_differ_by_more_than_colour(case: str) -> None:
    lines = depth_figure(make_inspection(CASES[case])).axes[0].lines
    assert len({line.get_marker() for line in lines}) == len({line.get_color() for line in lines}) == len(lines)


@pytest.mark.parametrize("kind", ["svg", "pdf"])
def test_the_same_bytes_every_time(kind: str) -> None:
    inspection = make_inspection(CASES["encoder and decoder"])
    first = figure_bytes(depth_figure(inspection), kind)
    assert first == figure_bytes(depth_figure(inspection), kind)


def test_the_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "depth.svg"
    file.write_text("old")
    write_figure(file, lambda: depth_figure(make_inspection({"h": 3})))
    assert b"residual" in file.read_bytes() and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", ["depth.jpg", "depth", ".png", "none/depth.png"])
def test_files_that_cannot_be_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError):
        check_figure_file(tmp_path / name)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r'pip install "rewarded-lines\[report\]"'):
        check_figure_file(tmp_path / "depth.png")


def test_every_named_policy_and_every_kind_of_module_has_a_line() -> None:
    found = make_inspection({"model.layers": 3}, base=None)
    named = {"helpful": (Line(1.0, 1.0),), "brief": (Line(blocks=(2.0, 0.5, 1.0)),)}
    schedules = {name: Schedule(lines, (("mlp", 0.5),)) for name, lines in named.items()}
    (axes,) = depth_figure(replace(found, schedules=schedules)).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.5, 0.75, 1], [1, 1.5, 2], [1, 0.25, 0.5], [2, 0.5, 1]]
    (legend,) = axes.figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["helpful, mlp", "helpful, other kinds", "brief, mlp", "brief, other kinds"]
    assert axes.get_title(loc="left") == "schedules of the policies"
