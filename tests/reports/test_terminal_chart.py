"""The chart in a terminal: each mark lies where its means are on the axes as they are drawn."""

import io
import itertools
import re
import string
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from invented_runs import synthetic_run
from rich.cells import cell_len
from rich.console import Console

from rewarded_lines.evaluator.records import load_run
from rewarded_lines.reports.summary import Summary, summarise
from rewarded_lines.reports.terminal_chart import FrontChart

METHODS = {"soup": (1.0, 0.0), "lines": (1.0, 1.0), "ties-lines": (1.5, 0.0), "late": (0.5, 1.5)}


def drawn(summary, width=80, encoding="utf-8", **more):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    console = Console(file=stream, width=width, **more)
    console.print(FrontChart(summary))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def read(text, upright="│", tick="┤", down="┬"):
    """Return marks as (character, x, y) by a linear fit through the ticks, and the size of half a cell."""
    lines = text.splitlines()
    rows = [line for line in lines if re.match(rf" *[-\d.]* ?[{upright}{tick}] ?", line)]
    start = min(line.index(upright) for line in rows if upright in line) + 2
    heights = {len(rows) - 1 - at: float(line.split(tick)[0]) for at, line in enumerate(rows) if tick in line}
    axis, numbers = lines[lines.index(rows[-1]) + 1 :][:2]
    # A number stands below the middle of its tick.
    ticks = [at for at, character in enumerate(axis) if character == down and at >= start]
    labels = [(found.start() + len(found[0]) // 2, float(found[0])) for found in re.finditer(r"\S+", numbers)]
    widths = {at - start: value for at, value in labels if at in ticks}
    assert len(heights) >= 2 and len(widths) >= 2
    (y0, *_, y1), (x0, *_, x1) = sorted(heights), sorted(widths)
    up, along = (heights[y1] - heights[y0]) / (y1 - y0), (widths[x1] - widths[x0]) / (x1 - x0)
    marks = [
        (character, widths[x0] + along * (column - x0), heights[y0] + up * (len(rows) - 1 - at - y0))
        for at, line in enumerate(rows)
        for column, character in enumerate(line[start:])
        if character != " "
    ]
    # A mark and both ticks are each rounded to a cell.
    return marks, (1.5 * along, 1.5 * up)


@pytest.fixture
def summary(make_run):
    return lambda **options: summarise(load_run(make_run(prompts=64, resamples=100, **options)))


@pytest.mark.parametrize("width", [60, 80, 100])
def test_marks_lie_at_the_means(summary, width):
    found = summary(methods=METHODS, points=5)
    text = drawn(found, width)
    marks, (near_x, near_y) = read(text)
    points = {"S": "soup", "L": "lines", "T": "ties-lines", "A": "late", "+": "sft"}
    means = {
        mark: [tuple(point.rewards[name].value for name in ("positive", "detailed")) for point in found.points
               if point.method == method] for mark, method in points.items()
    }  # fmt: skip
    means |= {"1": [means["S"][-1]], "2": [means["S"][0]]}
    assert [point.lam for point in found.points if point.method == "soup"][::4] == [0.0, 1.0]
    assert {mark for mark, _, _ in marks} == set(means)
    for mark, x, y in marks:
        assert any(abs(x - at_x) <= near_x and abs(y - at_y) <= near_y for at_x, at_y in means[mark]), (mark, x, y)
    # SFT and the policies are never covered.
    assert [sum(one == mark for one, _, _ in marks) for mark in "+12"] == [1, 1, 1]
    lines = text.splitlines()
    assert max(map(len, lines)) <= width and 18 <= len(lines) <= 22 and all(line == line.rstrip() for line in lines)
    assert lines[1] == "detailed [words]" and "positive [logit]" in text
    for entry in ("S Rewarded Soups (β = 0)", "L LiNeS (α = β = 1)", "1 cheerful alone", "2 detailed alone", "+ SFT"):
        assert entry in text


def test_a_terminal_has_colours_and_a_pipe_plain_characters(summary):
    found = summary(points=5)
    plain, coloured = drawn(found), drawn(found, force_terminal=True, color_system="standard")
    assert "\x1b[" in coloured and "\x1b" not in plain
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    ascii_only = drawn(found, encoding="ascii")
    assert set(ascii_only) <= set(string.printable) and "\\u25" not in ascii_only and "\n   | " in ascii_only


@pytest.mark.parametrize(("rewards", "said"), [(1, ""), (3, "the first two of 3 rewards"), (4, "of 4 rewards")])
def test_other_numbers_of_rewards(summary, rewards, said):
    text = drawn(summary(rewards=rewards, policies=max(2, rewards), points=3))
    assert said in text and bool(text) == (rewards > 1)


def test_equal_means_and_many_methods(summary):
    methods = {f"{kind}-{number}": (1.0, 0.1 * number) for number in range(6) for kind in "ab"}
    text = drawn(summary(methods=methods, points=2, gain=0.0, spread=0.0))
    assert len(set(re.findall(r"(?m)(?:^|   )(\w) \S+: |(?:^|   )(\w) LiNeS", text))) >= 10


# ---- any means, names and terminals


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    methods = {f"merge-{number}": (1.0, 0.1 * number) for number in range(4)}
    run = synthetic_run(tmp_path_factory.mktemp("run"), prompts=16, resamples=20, points=2, methods=methods)
    return summarise(load_run(run))


def with_means(base: Summary, means) -> Summary:
    """Return a summary of SFT and a method for each further pair of means."""
    points = [base.sft, *(points[0] for points in base.merged_methods().values())][: len(means)]
    moved = [
        replace(
            point,
            rewards={
                name: replace(point.rewards[name], value=value) for name, value in zip(base.rewards, pair, strict=True)
            },
        )
        for point, pair in zip(points, means, strict=True)
    ]
    return replace(base, points=moved)


def places(text, characters="+MERG"):
    """Return where marks are drawn, as (column, height) by character; a covered one is absent."""
    rows = [re.split("[│┤] ?", line)[1] for line in text.splitlines() if re.search("[│┤]", line)]
    return {one: (row.index(one), -at) for at, row in enumerate(rows) for one in characters if one in row}


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
FEW = st.sampled_from([0.0, -1.0, 1.0, 1.0 + 1e-15, 1e300, -1e300, 1e-300, 5e-324, 1.79e308, -1.79e308, 123456.7])
MEANS = st.lists(st.tuples(NUMBERS | FEW, NUMBERS | FEW), min_size=1, max_size=5)


@given(means=MEANS, width=st.integers(20, 120))
@example(means=[(0.3, 0.3), (0.1 + 0.2, 0.1 + 0.2)], width=80)
@example(means=[(1e16, 1e22), (1.5e16, 1.0)], width=40)
@example(means=[(-5.0, 1e300), (-5.0, -1e300)], width=20)
@example(means=[(1e6, 1000000.5), (1000000.5, 1e6)], width=20)
def test_any_means_are_drawn_in_their_order_within_the_terminal(base, means, width):
    text = drawn(with_means(base, means), width)
    assert max(map(cell_len, text.splitlines())) <= width
    drawn_at = places(text)
    assert "+" in drawn_at and len(text.splitlines()) >= 17
    at = [(drawn_at[mark], pair) for mark, pair in zip("+MERG", means, strict=False) if mark in drawn_at]
    for (one, first), (other, second) in itertools.permutations(at, 2):
        assert all(a <= b for a, b, x, y in zip(one, other, first, second, strict=True) if x <= y)


@pytest.mark.parametrize(
    ("means", "labels"),
    [
        # Rounding is no difference: the axis is that of equal means.
        ([0.3, 0.1 + 0.2], ["0.29", "0.30", "0.31"]),
        ([0.0, 2e300], ["0.0", "0.5e+300", "1.0e+300", "1.5e+300", "2.0e+300"]),
        ([-1e-7, 1e-7], ["-1.0e-07", "-0.5e-07", "0.0", "0.5e-07", "1.0e-07"]),
        ([0.0, 100.0], ["0", "50", "100"]),
    ],
)
def test_labels_are_short(base, means, labels):
    text = drawn(with_means(base, [(mean, mean) for mean in means]), 80)
    assert re.findall(r"(?m)^ *(\S+) ┤", text)[::-1] == labels


@pytest.mark.parametrize("width", [20, 33, 80])
def test_names_are_broken_at_spaces_only(base, width):
    names = ["much-longer-than-it-is", "übermäßig-höflich und-lang", "p-" * 60]
    objectives = dict(zip(["positive-and-very-friendly-tone", "名前" * 20], base.rewards.values(), strict=True))
    points = [
        replace(point, rewards=dict(zip(objectives, point.rewards.values(), strict=True))) for point in base.points
    ]
    text = drawn(replace(base, rewards=objectives, points=points, policies=names[: len(base.policies)]), width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert width == 20 or "much-longer-than-it-is alone" in text
    assert text.count("+ SFT") == 1


def test_report_shows_it_unless_told_to_be_quiet(cli, make_run, monkeypatch):
    run = make_run(prompts=64, resamples=100)
    found = summarise(load_run(run))
    # Without the figures, which take long.
    monkeypatch.setattr("rewarded_lines.reports.report.report", lambda *args, **options: found)
    answers = [cli("report", run, *more) for more in ((), ("-q",), ("--json",))]
    assert [answer.code for answer in answers] == [0, 0, 0]
    assert ["Mean rewards of every point" in answer.out for answer in answers] == [True, False, False]
