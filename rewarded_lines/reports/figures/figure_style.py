"""Styles, palette, sizes and files of figures. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewarded_lines.errors import did_you_mean, fail
from rewarded_lines.extras import require
from rewarded_lines.folders import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

FORMATS = ("png", "svg", "pdf")
PAPER = "paper"
STYLES = (PAPER, "slides", "grey")
_PAPER, _SLIDES = (str(Path(__file__).with_name(f"{name}.mplstyle")) for name in STYLES[:2])
# Okabe and Ito, "Color Universal Design", 2008, with wine, indigo, olive and red added.
# The first four also differ in grey; all ten differ in their marker.
COLOURS = (
    "#E69F00", "#0072B2", "#009E73", "#882255", "#56B4E9",  # orange, blue, green, wine, sky
    "#D55E00", "#CC79A7", "#332288", "#999933", "#A50026",  # vermillion, pink, indigo, olive, red
)  # fmt: skip
MARKERS = ("s", "o", "^", "v", "P", "X", "D", "<", ">", "p")
_LINES = ("-",) * 6 + ("--",) * 4
_GREYS = ("0.68", "0.22", "0.50", "0.36", "0.78", "0.10", "0.60", "0.44", "0.30", "0.72")
_GREY_LINES = ("-", "-", "--", "-.", ":", "--", "-.", ":", "-", "--")
# Widths in inches: of a page's text, and of a figure with one plane.
WIDE = 7.0
PLANE = 4.6
# Applied over every style: the salt makes SVG files repeatable, TeX cannot set λ and α, and a "$" in the name or the
# unit of a reward is no formula.
_FIXED: dict[str, Any] = {"svg.hashsalt": "rewarded-lines", "text.usetex": False, "text.parse_math": False}

# Fonts with Chinese, Japanese and Korean letters. matplotlib's own has none, and would draw empty boxes.
_EAST_ASIAN = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"),
    *("Droid Sans Fallback", "Arial Unicode MS"),
)


@dataclass(frozen=True)
class Look:
    """Colour, marker and line style of a method or policy, as matplotlib names them."""

    colour: str
    marker: str
    line: str

    def keywords(self, **more: Any) -> dict[str, Any]:
        """Return keywords of `Axes.plot` for a line with white marker edges; `more` overrides them."""
        look = dict(color=self.colour, marker=self.marker, linestyle=self.line)
        return look | dict(markeredgecolor="white", markeredgewidth=0.5) | more


def check_style(style: str) -> None:
    """Refuse an unknown style; a style file is read only if matplotlib is installed.

    Raises:
        UserError: `style` is neither in `STYLES` nor a file, or matplotlib refuses a line of the file.
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
    """Apply a style while figures are drawn and saved, without the user's matplotlib settings.

    A style file is applied over "paper".

    Raises:
        UserError: matplotlib is not installed, or see `check_style`.
    """
    require("report", "figures", "matplotlib")
    from cycler import cycler
    from matplotlib import rcParams
    from matplotlib import style as styles
    from matplotlib.font_manager import fontManager

    check_style(style)
    colours, lines = (_GREYS, _GREY_LINES) if style == "grey" else (COLOURS, _LINES)
    palette = {"axes.prop_cycle": cycler(color=colours, marker=MARKERS, linestyle=lines)}
    over: dict[str, Any] = {PAPER: {}, "grey": {"image.cmap": "gray"}, "slides": _SLIDES}
    own = over[style] if style in STYLES else _read_style(Path(style))
    with styles.context(["default", _PAPER, palette, own, _FIXED]):
        # For letters that the style's own fonts lack.
        installed = [font for font in _EAST_ASIAN if font in fontManager.get_font_names()]
        rcParams["font.family"] = [*rcParams["font.family"], *installed[:1]]
        yield


def looks(count: int) -> list[Look]:
    """Return the looks of `count` lines in the current style; they repeat after ten."""
    from matplotlib import rcParams

    given = rcParams["axes.prop_cycle"].by_key()
    usual = {"color": COLOURS, "marker": MARKERS, "linestyle": _LINES}
    parts = [given.get(name, values) for name, values in usual.items()]
    return [Look(*(part[index % len(part)] for part in parts)) for index in range(count)]


def blank_figure(width: float, height: float) -> Figure:
    """Return an empty figure with sides in inches on paper; other styles scale them."""
    from matplotlib import rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    factor = rcParams["figure.figsize"][0] / PLANE
    figure = Figure(figsize=(factor * width, factor * height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def columns_of(count: int, most: int) -> tuple[int, int]:
    """Return rows and columns of a grid for `count` panels with at most `most` columns."""
    columns = min(count, most)
    return -(-count // columns), columns


def legend_above(
    figure: Figure,
    lines: Iterable[tuple[str, Mapping[str, Any]]],
    columns: int,
    side: str = "left",
) -> None:
    """Add a legend above the panels from (label, keywords of the line), at the left or right."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=label, **look) for label, look in lines]
    look: dict[str, Any] = dict(loc=f"outside upper {side}", ncols=columns, frameon=False, columnspacing=1.5)
    figure.legend(handles=handles, **look)


def settled(figure: Figure) -> Figure:
    """Lay out a finished figure, fix the layout, and return the figure."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def figure_bytes(figure: Figure, format: str) -> bytes:
    """Return the deterministic bytes of a figure in one of `FORMATS`."""
    metadata = {
        "png": {"Software": "rewarded-lines"},
        "svg": {"Date": None, "Creator": "rewarded-lines"},
        "pdf": {"CreationDate": None, "Creator": "rewarded-lines"},
    }
    file = io.BytesIO()
    figure.savefig(file, format=format, dpi=figure.dpi, metadata=metadata[format])
    return file.getvalue()


def check_figure_file(file: str | Path) -> str:
    """Return the format that a figure's file name names.

    Raises:
        UserError: the ending is unknown, the folder does not exist, or matplotlib is not installed.
    """
    path = Path(file)
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise fail(
            "no format of a figure",
            where=str(file),
            expected="a file name ending in .png, .svg or .pdf",
            got=path.suffix or "no ending",
            remedy=did_you_mean(kind, FORMATS),
        )
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "its folder is not there"
        raise fail(what, where=str(file), expected="a file in a folder that exists")
    with house_style():
        return kind


def write_figure(file: str | Path, draw: Callable[[], Figure]) -> None:
    """Draw a figure in the house style and write it, atomically; the file's name must pass `check_figure_file`."""
    kind = check_figure_file(file)
    with house_style():
        write_bytes(Path(file), figure_bytes(draw(), kind))


def number_blocks(axes: Axes, label: str) -> None:
    """Number the blocks below a panel; `label` is that of its other axis."""
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="block [index from 0]", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def mix(colour: str, other: str, share: float) -> tuple[float, float, float]:
    """Return a mix of two colours as (red, green, blue), 0 to 1; `share` is that of `other`."""
    from matplotlib.colors import to_rgb

    pairs = zip(to_rgb(colour), to_rgb(other), strict=True)
    red, green, blue = ((1 - share) * a + share * b for a, b in pairs)
    return red, green, blue


def pixels_per_point(figure: Figure | SubFigure) -> float:
    """Return the pixels of a typographic point (1/72 inch) in a figure."""
    return float(figure.dpi) / 72


def _read_style(path: Path) -> dict[str, Any]:
    """Return the settings of a style file; unknown keys, of which matplotlib only warns, are refused."""
    import matplotlib

    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            key = line.partition("#")[0].partition(":")[0].strip()
            if key and key not in matplotlib.rcParams:
                remedy = did_you_mean(key, matplotlib.rcParams)
                raise fail(f"matplotlib has no setting `{key}`", where=str(path), remedy=remedy)
        found = matplotlib.rc_params_from_file(path, fail_on_error=True, use_default_template=False)
    except (OSError, ValueError) as error:
        raise fail(
            "not a matplotlib style file",
            where=str(path),
            expected="lines of KEY: VALUE",
            got=" ".join(str(error).split()),
        ) from error
    # Settings of the session, not of a figure.
    return {key: value for key, value in found.items() if not key.startswith(("backend", "savefig.directory"))}
