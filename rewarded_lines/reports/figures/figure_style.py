"""How figures look: named styles, the palette, sizes, and the bytes of a file. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewarded_lines.errors import did_you_mean, fail

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

FORMATS = ("png", "svg", "pdf")
PAPER = "paper"
# Orange, blue, green, sky, vermillion and pink are those of Okabe and Ito, "Color Universal Design", 2008; wine,
# indigo, olive and red were added. The first four differ in lightness, so also in grey; all ten differ in their marker.
COLOURS = tuple("#E69F00 #0072B2 #009E73 #882255 #56B4E9 #D55E00 #CC79A7 #332288 #999933 #A50026".split())
MARKERS = ("s", "o", "^", "v", "P", "X", "D", "<", ">", "p")
_LINES = ("-",) * 6 + ("--",) * 4
_GREYS = ("0.68", "0.22", "0.50", "0.36", "0.78", "0.10", "0.60", "0.44", "0.30", "0.72")
_GREY_LINES = ("-", "-", "--", "-.", ":", "--", "-.", ":", "-", "--")
# Widths in inches: WIDE fills the text of a page, PLANE is for a figure of one plane.
WIDE = 7.0
PLANE = 4.6
_SETTINGS: dict[str, Any] = {
    "figure.figsize": (PLANE, PLANE),
    "figure.dpi": 300,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.title_fontsize": 8,
    "lines.linewidth": 1.5,
    "lines.markersize": 5.5,
    "grid.color": "0.88",
    "grid.linewidth": 0.5,
    "image.cmap": "cividis",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}
# For a screen at the other end of a room: text and lines are enlarged more than the figure.
_SLIDES: dict[str, Any] = {
    "figure.figsize": (6.4, 6.4),
    "figure.dpi": 200,
    "font.size": 14,
    "axes.labelsize": 14,
    "axes.titlesize": 14,
    "axes.linewidth": 1.2,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "legend.fontsize": 12,
    "legend.title_fontsize": 12,
    "lines.linewidth": 2.6,
    "lines.markersize": 8.5,
    "grid.linewidth": 0.8,
}
# These win over every style: the salt makes SVG files repeatable, and TeX cannot set texts with λ and α.
_FIXED: dict[str, Any] = {"svg.hashsalt": "rewarded-lines", "text.usetex": False}
STYLES: Mapping[str, dict[str, Any]] = {
    PAPER: {},
    "slides": _SLIDES,
    "grey": {"image.cmap": "gray", "colours": _GREYS, "lines": _GREY_LINES},
}


@dataclass(frozen=True)
class Look:
    """The colour, marker and line style of one method or policy, by matplotlib's names."""

    colour: str
    marker: str
    line: str

    def keywords(self, **more: Any) -> dict[str, Any]:
        """Return the keywords of `Axes.plot` for a line of this look with white edges; those in `more` go over them."""
        look = dict(color=self.colour, marker=self.marker, linestyle=self.line)
        return look | dict(markeredgecolor="white", markeredgewidth=0.5) | more


def check_style(style: str) -> None:
    """Refuse an unknown style before any work is done for it; without matplotlib a style file is not read.

    Raises:
        UserError: it is neither one of `STYLES` nor a file, or matplotlib does not know a line of the file.
    """
    if style in STYLES:
        return
    if not Path(style).is_file():
        raise fail(
            "no such style",
            where=f"--style {style}",
            expected=f"{', '.join(STYLES)}, or a .mplstyle file",
            remedy=did_you_mean(style, STYLES),
        )
    with suppress(ImportError):
        _read_style(Path(style))


@contextmanager
def house_style(style: str = PAPER) -> Iterator[None]:
    """Hold a style while figures are drawn and saved; the user's own matplotlib settings play no part.

    Args:
        style: one of `STYLES`, or the path of a matplotlib style file, whose settings go over those of "paper". TeX
            and the salt of SVG files cannot be set.

    Raises:
        UserError: matplotlib is not installed, or see `check_style`.
    """
    try:
        from matplotlib import style as styles
    except ImportError as error:
        remedy = "pip install 'rewarded-lines[report]'"
        raise fail("the figure needs matplotlib, which is not installed", remedy=remedy) from error
    check_style(style)
    named = dict(STYLES.get(style, {}))
    palette = _palette(named.pop("colours", COLOURS), named.pop("lines", _LINES))
    own = [] if style in STYLES else [_read_style(Path(style))]
    with styles.context(["default", _SETTINGS | palette | named, *own, _FIXED]):
        yield


def looks(count: int) -> list[Look]:
    """Return the looks of `count` lines in the style that is held; they repeat after ten."""
    from matplotlib import rcParams

    given = rcParams["axes.prop_cycle"].by_key()
    usual = {"color": COLOURS, "marker": MARKERS, "linestyle": _LINES}
    parts = [cycle(given.get(name, values)) for name, values in usual.items()]
    return [Look(*one) for one in islice(zip(*parts, strict=False), count)]


def blank_figure(width: float, height: float) -> Figure:
    """Return an empty figure in the style that is held; its sides are inches on paper, other styles enlarge them."""
    from matplotlib import rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    factor = rcParams["figure.figsize"][0] / PLANE
    figure = Figure(figsize=(factor * width, factor * height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def columns_of(count: int, most: int) -> tuple[int, int]:
    """Return rows and columns of a grid for `count` panels, at most `most` beside each other."""
    columns = min(count, most)
    return -(-count // columns), columns


def legend_above(
    figure: Figure, lines: Iterable[tuple[str, Mapping[str, Any]]], columns: int, side: str = "left"
) -> None:
    """Put a legend above the panels, at their "left" or "right" side: a label and a line's keywords for each entry."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=label, **look) for label, look in lines]
    look: dict[str, Any] = dict(loc=f"outside upper {side}", ncols=columns, frameon=False, columnspacing=1.5)
    figure.legend(handles=handles, **look)


def settled(figure: Figure) -> Figure:
    """Lay a finished figure out, and return it with every part fixed in its place."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def figure_bytes(figure: Figure, format: str) -> bytes:
    """Return a figure, drawn in the style that is held, as a file of one of `FORMATS`: the same bytes every time."""
    metadata = {
        "png": {"Software": "rewarded-lines"},
        "svg": {"Date": None, "Creator": "rewarded-lines"},
        "pdf": {"CreationDate": None, "Creator": "rewarded-lines"},
    }
    file = io.BytesIO()
    figure.savefig(file, format=format, dpi=figure.dpi, metadata=metadata[format])
    return file.getvalue()


def mix(colour: str, other: str, share: float) -> tuple[float, float, float]:
    """Return `colour` with a share of another in it, as red, green and blue from 0 to 1."""
    from matplotlib.colors import to_rgb

    red, green, blue = ((1 - share) * a + share * b for a, b in zip(to_rgb(colour), to_rgb(other), strict=True))
    return red, green, blue


def pixels_per_point(figure: Figure | SubFigure) -> float:
    """Return how many pixels a typographic point, 1/72 inch, is in a figure."""
    return float(figure.dpi) / 72


def _palette(colours: tuple[str, ...], lines: tuple[str, ...]) -> dict[str, Any]:
    from cycler import cycler

    return {"axes.prop_cycle": cycler(color=colours, marker=MARKERS, linestyle=lines)}


def _read_style(path: Path) -> dict[str, Any]:
    """Return the settings of a style file, and refuse unknown keys, of which matplotlib itself only warns."""
    import matplotlib

    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            key = line.partition("#")[0].partition(":")[0].strip()
            if key and key not in matplotlib.rcParams:
                remedy = did_you_mean(key, matplotlib.rcParams)
                raise fail(f"matplotlib has no setting `{key}`", where=str(path), remedy=remedy)
        found = matplotlib.rc_params_from_file(path, fail_on_error=True, use_default_template=False)
    except (OSError, ValueError) as error:
        what = "not a matplotlib style file"
        raise fail(what, where=str(path), expected="lines of KEY: VALUE", got=" ".join(str(error).split())) from error
    return {key: value for key, value in found.items() if not key.startswith(("backend", "savefig.directory"))}
