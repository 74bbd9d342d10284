"""Colours that everybody can tell apart, styles, and the messages for styles that are none."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from rewarded_lines.errors import UserError
from rewarded_lines.reports.figures import figure_style
from rewarded_lines.reports.figures.figure_style import (
    COLOURS,
    MARKERS,
    STYLES,
    blank_figure,
    check_style,
    columns_of,
    figure_bytes,
    house_style,
    looks,
)

pytest.importorskip("matplotlib")

# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency", 2009,
# severity 1, on linear RGB.
SEEN = {
    "everybody": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}


def cielab(colours: tuple[str, ...], seen: str = "everybody") -> np.ndarray:
    """Return L*, a*, b* of colours as someone sees them, by the formulas of CIE 15 for sRGB and D65."""
    from matplotlib.colors import to_rgb

    rgb = np.array([to_rgb(colour) for colour in colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ SEEN[seen].T, 0, 1)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    x, y, z = (linear @ to_xyz.T / [0.95047, 1.0, 1.08883]).T
    x, y, z = (np.where(part > 0.008856, np.cbrt(part), 7.787 * part + 16 / 116) for part in (x, y, z))
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def closest(points: np.ndarray) -> float:
    return min(float(np.linalg.norm(one - other)) for one, other in combinations(points, 2))


def test_lab_of_known_colours() -> None:
    assert cielab(("white", "black", "#FF0000")) == pytest.approx(
        np.array([[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20]]), abs=0.1
    )


@pytest.mark.parametrize("seen", SEEN)
def test_colours_differ_for_everybody(seen: str) -> None:
    # ΔE of 2.3 is just noticed side by side; thin lines need several times that.
    assert closest(cielab(COLOURS, seen)) > 12
    assert closest(cielab(COLOURS[:6], seen)) > 18


def test_the_first_colours_differ_in_grey_and_all_by_marker() -> None:
    lightness = cielab(COLOURS)[:, :1]
    assert closest(lightness[:4]) > 10
    assert len(set(MARKERS)) == len(MARKERS) == len(COLOURS)


def test_white_paper_shows_every_colour() -> None:
    assert (cielab(COLOURS)[:, 0] < 75).all()


@pytest.mark.parametrize("style", STYLES)
def test_methods_differ_in_every_style(style: str) -> None:
    with house_style(style):
        found = looks(10)
        assert len({look.marker for look in found}) == 10
        assert len({(look.colour, look.line) for look in found}) == 10
        assert looks(12)[10] == found[0]


def test_the_grey_style_is_grey() -> None:
    with house_style("grey"):
        assert np.abs(cielab(tuple(look.colour for look in looks(10)))[:, 1:]).max() < 0.1


def test_slides_enlarge_the_text_more_than_the_figure() -> None:
    from matplotlib import rcParams

    size = {}
    for style in ("paper", "slides"):
        with house_style(style):
            size[style] = (blank_figure(4.6, 3.0).get_size_inches()[0], rcParams["font.size"])
    assert size["paper"] == (4.6, 9)
    assert size["slides"][1] / size["paper"][1] > size["slides"][0] / size["paper"][0] > 1


def test_a_file_goes_over_the_paper_style(tmp_path: Path) -> None:
    from matplotlib import rcParams

    file = tmp_path / "mine.mplstyle"
    lines = ("font.size: 11  # larger", "axes.prop_cycle: cycler('color', ['112233', '445566'])", "text.usetex: True")
    file.write_text("\n".join(lines))
    with house_style(str(file)):
        assert rcParams["font.size"] == 11 and rcParams["axes.linewidth"] == 0.7
        assert [look.colour for look in looks(3)] == ["#112233", "#445566", "#112233"]
        assert looks(2)[1].marker == MARKERS[1]
        assert rcParams["svg.hashsalt"] == "rewarded-lines" and rcParams["text.usetex"] is False


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("font.sizes: 11\n", r"no setting `font.sizes`[\s\S]*did you mean `font.size`\?"),
        ("font.size: enormous\n", "not a matplotlib style file"),
        ("just words\n", "no setting `just words`"),
    ],
)
def test_a_file_that_is_no_style_is_refused(tmp_path: Path, content: str, expected: str) -> None:
    file = tmp_path / "mine.mplstyle"
    file.write_text(content)
    with pytest.raises(UserError, match=expected):
        check_style(str(file))


def test_an_unknown_style_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean `slides`\?"):
        check_style("slide")


def test_styles_can_be_checked_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "mine.mplstyle").write_text("font.sizes: 11\n")
    check_style("grey")
    check_style(str(tmp_path / "mine.mplstyle"))
    with pytest.raises(UserError, match="no such style"):
        check_style("gray-ish-thing")
    with pytest.raises(UserError, match=r'pip install "rewarded-lines\[report\]"'), house_style():
        pass


@pytest.mark.parametrize(("count", "expected"), [(1, (1, 1)), (3, (1, 3)), (4, (2, 3)), (7, (3, 3))])
def test_grids_of_panels(count: int, expected: tuple[int, int]) -> None:
    assert columns_of(count, 3) == expected


@pytest.mark.filterwarnings("error")
def test_letters_that_the_usual_font_lacks_are_drawn_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the names of rewards in Chinese; here with a letter that only a font of matplotlib's own has."""
    monkeypatch.setattr(figure_style, "_EAST_ASIAN", ("No Such Font", "STIXGeneral"))
    with house_style():
        figure = blank_figure(1, 1)
        figure.text(0, 0, "\N{SCRIPT SMALL G}")
        assert figure_bytes(figure, "png")
