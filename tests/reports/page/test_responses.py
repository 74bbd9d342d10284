"""Responses in a real browser: beside each other, searched, sorted, paged; hostile ones; the command; first paint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rewarded_lines.evaluator.choose import command_for
from rewarded_lines.evaluator.records import Point, Run

Opening = Callable[..., Any]
HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><img src=x onerror='window.hacked = 2'>",
    "<!-- <script> --!> ]]>",
    "&lt;b&gt; &amp;amp; &nbsp; &#x202e;",
    "\u202eright to left, never closed",
    "\u05e2\u05d1\u05e8\u05d9\u05ea \u2067 then English",
    "half \ud800 a pair, \udc00 the other half",
    "</textarea></style><style>* { display: none }</style>",
    "lines \u2028 and \u2029 and \x85 and \x00 and \r\n\ttabs",
    "$title ${title} %{x} {{ x }} \\u003c \\",
    "w" * 3000,
)


def answers(page: Any, column: int) -> list[str]:
    """Return the shown responses of one column, as text."""
    return page.locator(f"#list .beside > :nth-child({column + 1}) .text").all_text_contents()


def scores(page: Any, column: int, name: str) -> list[float]:
    """Return the scores of one column that are shown, unrounded."""
    items = page.locator(f"#list .beside > :nth-child({column + 1}) .scores > div").filter(has_text=name)
    titles = items.evaluate_all("items => items.map((item) => item.querySelector('dd').title)")
    return [float(title.split()[0]) for title in titles]


def choose(opened: Any, name: str, other: str = "") -> Any:
    """Choose a point, and another to compare it with."""
    opened.page.get_by_role("button", name=name, exact=True).click()
    if other:
        opened.page.get_by_label("Beside SFT and").select_option(other)
    return opened.settled()


def point(run: Run, method: str, lam: float) -> Point:
    return next(one for one in run.points if one.spec.method == method and one.spec.lam == lam)


def count(page: Any) -> int:
    return int(page.locator("#count").inner_text().split()[0])


def test_a_point_is_read_beside_sft_and_another(shown: Any, written: Any) -> None:
    page = choose(shown, "lines λ = 0.25", "soup λ = 1.00")
    (run,) = written.runs
    three = [run.sft, point(run, "lines", 0.25), point(run, "soup", 1.0)]
    article = page.locator("#list article").first
    assert article.locator("h4").all_inner_texts() == ["SFT", "lines λ = 0.25", "soup λ = 1.00"]
    assert page.locator("#list .row > .text").all_text_contents() == run.sft.prompts[:20]
    for column, one in enumerate(three):
        assert answers(page, column) == one.responses[:20]
        for name in ("positive", "detailed"):
            assert scores(page, column, name) == pytest.approx(one.scores[name][:20], rel=1e-8)
    told = article.locator(".answer").nth(1).inner_text()
    gain = three[1].scores["positive"][0] - three[0].scores["positive"][0]
    assert f"({gain:+.4g})".replace("-", "−") in told
    assert f"{three[1].kl[0]:.4g}".replace("-", "−") in told
    assert f"words\n{three[1].words[0]}" in told


def test_searching_finds_prompts_and_responses(shown: Any, written: Any) -> None:
    page = choose(shown, "lines λ = 0.50")
    (run,) = written.runs
    both = list(zip(run.sft.responses, point(run, "lines", 0.5).responses, strict=True))
    for query in ("SHARP turns", "Quite", "(7)", "prompt 12", "[a-z", "nowhere"):
        page.get_by_role("searchbox").fill(query)
        shown.settled()
        rows = enumerate(both)
        expected = [row for row, pair in rows if query.lower() in f"prompt {row}|{'|'.join(pair)}".lower()]
        assert count(page) == len(expected), query
        found = page.locator("#list mark").all_text_contents()
        assert bool(found) == bool(expected)
        assert {text.lower() for text in found} <= {query.lower()}
    assert page.locator("#list article").count() == 0
    assert page.locator("#pages").inner_text() == "of 1"


def test_pages_are_turned(shown: Any) -> None:
    page = shown.page
    number = page.get_by_role("spinbutton", name="Page")
    back, onward = (page.get_by_role("button", name=name) for name in ("Previous", "Next"))

    def titles() -> list[str]:
        return shown.settled().locator("#list h3").all_inner_texts()

    assert (titles()[0], len(titles()), back.is_disabled()) == ("Prompt 1", 20, True)
    onward.click()
    assert (titles()[0], number.input_value()) == ("Prompt 21", "2")
    onward.click()
    assert (titles()[0], len(titles()), onward.is_disabled()) == ("Prompt 41", 10, True)
    back.click()
    assert titles()[0] == "Prompt 21"
    for typed, first in (("3", "Prompt 41"), ("99", "Prompt 41"), ("0", "Prompt 1"), ("", "Prompt 1")):
        number.fill(typed)
        number.press("Enter")
        assert titles()[0] == first, typed


def test_responses_are_sorted_by_any_score_or_difference(shown: Any, written: Any) -> None:
    page = choose(shown, "lines λ = 0.75", "soup λ = 0.75")
    (run,) = written.runs
    chosen, other = point(run, "lines", 0.75), point(run, "soup", 0.75)
    keys = {
        "positive of lines λ = 0.75": chosen.scores["positive"],
        "detailed, difference to SFT": chosen.scores["detailed"] - run.sft.scores["detailed"],
        "positive, difference to soup λ = 0.75": chosen.scores["positive"] - other.scores["positive"],
        "KL of lines λ = 0.75": chosen.kl,
    }
    for label, key in keys.items():
        page.get_by_label("Sort by").select_option(label)
        for order, sign in (("largest first", -1), ("smallest first", 1)):
            page.get_by_role("combobox", name="Order").select_option(order)
            shown.settled()
            expected = [chosen.responses[row] for row in (sign * key).argsort(kind="stable")[:20]]
            assert answers(page, 1) == expected, label
    page.get_by_label("Beside SFT and").select_option("no other point")
    assert page.get_by_label("Sort by").locator("option").count() == 7


def test_a_missing_score_is_a_dash_and_comes_last(opening: Opening, write: Callable[..., Any]) -> None:
    """The first responses of `lines λ = 0.50` have no score of `positive`, the last ones of SFT have none."""

    def holed(run: Run) -> Run:
        gaps = {run.sft.spec: slice(-3, None), point(run, "lines", 0.5).spec: slice(0, 4)}
        for one in run.points:
            if one.spec in gaps:
                one.scores["positive"] = one.scores["positive"].copy()
                one.scores["positive"][gaps[one.spec]] = np.nan
        return run

    written = write(holed, points=3, prompts=18)
    opened = opening(written)
    page = choose(opened, "lines λ = 0.50")
    run = written.runs[0]
    chosen, sft = point(run, "lines", 0.5), run.sft
    shown = page.locator("#list .beside > :nth-child(2) .scores > div").filter(has_text="positive").all_inner_texts()
    assert [text.split()[-1] == "–" for text in shown] == [True] * 4 + [False] * 14
    # Without SFT's score there is no difference in brackets.
    assert ["(" in text for text in shown] == [False] * 4 + [True] * 11 + [False] * 3
    for label, key in (
        ("positive of lines λ = 0.50", chosen.scores["positive"]),
        ("positive, difference to SFT", chosen.scores["positive"] - sft.scores["positive"]),
    ):
        page.get_by_label("Sort by").select_option(label)
        for order, sign in (("largest first", -1), ("smallest first", 1)):
            page.get_by_role("combobox", name="Order").select_option(order)
            opened.settled()
            # NumPy, too, sorts NaN to the end.
            assert answers(page, 1) == [chosen.responses[row] for row in (sign * key).argsort(kind="stable")], label
    assert "reward `positive`: 7 of 126 responses have no score (7 abstained)." in page.locator("#note").inner_text()


@pytest.mark.slow
def test_several_responses_to_a_prompt_stand_under_it(opening: Opening, write: Callable[..., Any]) -> None:
    def twice(run: Run) -> Run:
        index = run.sft.prompt_index // 2
        prompts = [f"prompt {place}" for place in index]
        return replace(run, points=[replace(one, prompt_index=index, prompts=prompts) for one in run.points])

    page = opening(write(twice, points=3, prompts=30)).page
    assert page.locator("#list h3").all_inner_texts()[:4] == ["Prompt 1", "Prompt 1", "Prompt 2", "Prompt 2"]
    assert count(page) == 30


def test_the_very_command_is_copied(shown: Any, written: Any) -> None:
    page = choose(shown, "lines λ = 0.25")
    (run,) = written.runs
    copy = page.get_by_role("button", name="Copy")
    expected = command_for(run, point(run, "lines", 0.25).spec)
    copy.click()
    page.get_by_text("Copied.").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == expected
    assert expected.startswith("rewarded-lines merge --base") and "--lam 0.25 " in expected
    # Where the browser refuses, the command is selected.
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no')); }")
    copy.click()
    page.get_by_text("the command is selected").wait_for()
    assert page.evaluate("getSelection().toString()") == expected
    choose(shown, "SFT")
    assert copy.is_hidden() and page.locator("#command").inner_text() == "# nothing to merge: sft"


@pytest.mark.slow
def test_training_runs_have_responses_and_commands_of_their_own(opening: Opening, write: Callable[..., Any]) -> None:
    def seeded(run: Run) -> Run:
        name = run.folder.name
        run.header["base"]["path"] = f"sft-{name}"
        return replace(run, points=[replace(one, responses=[name] * len(one.prompts)) for one in run.points])

    opened = opening(write(seeded, count=2, points=3, prompts=30))
    page = opened.page
    assert answers(page, 0)[0] == "run0"
    page.get_by_label("Training run").select_option(index=1)
    assert answers(opened.settled(), 0)[0] == "run1"
    assert "--base sft-run1" in page.locator("#command").inner_text()


def test_hostile_texts_are_texts_and_change_nothing_else(opening: Opening, write: Callable[..., Any]) -> None:
    def hostile(run: Run) -> Run:
        texts = [HOSTILE[row % len(HOSTILE)] for row in range(len(run.sft.prompts))]
        return replace(run, points=[replace(one, prompts=texts, responses=texts) for one in run.points])

    def harmless(run: Run) -> Run:
        # Another word for each, so that lengths and all else are the same.
        words = {word: f"word{place}" for place, word in enumerate(dict.fromkeys(" ".join(HOSTILE).split()))}
        said = [" ".join(words[word] for word in text.split()) for text in hostile(run).sft.responses]
        return replace(run, points=[replace(one, prompts=said, responses=said) for one in run.points])

    rest = """() => {
        const copy = document.body.cloneNode(true);
        copy.querySelectorAll("script, #plot, #list").forEach((part) => part.replaceChildren());
        return copy.innerHTML;
    }"""
    quiet = opening(write(harmless, points=3, prompts=20))
    opened = opening(write(hostile, points=3, prompts=20))
    page = opened.page
    assert page.evaluate(rest) == quiet.page.evaluate(rest)
    wanted = json.dumps([HOSTILE[row % len(HOSTILE)] for row in range(20)])
    for place in ("#list .row > .text", "#list .answer:nth-child(2) .text"):
        shown = f"JSON.stringify([...document.querySelectorAll({place!r})].map(e => e.textContent))"
        assert json.loads(page.evaluate(shown)) == json.loads(wanted)
    assert page.evaluate("window.hacked") is None
    assert page.locator("#list :is(script, img, style)").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    # What is written right to left ends with its text: the scores after it keep their order.
    for row in (4, 5):
        boxes = [page.locator(f"#list article >> nth={row}").locator(tag).last.bounding_box() for tag in ("dt", "h4")]
        assert boxes[0]["x"] > boxes[1]["x"]
    page.locator("#responses").evaluate("e => e.scrollIntoView()")
    opened.picture("hostile")


@pytest.mark.slow
def test_hostile_names_are_names(opening: Opening, write: Callable[..., Any]) -> None:
    name = "<b>a</b> & </script><script>window.hacked = 1</script> \ud800"

    def named(run: Run) -> Run:
        for reward in run.header["rewards"].values():
            reward["unit"] = name
        run.header["title"] = f"</title>{name}"
        merged = [replace(one, spec=replace(one.spec, method=name)) for one in run.points if one.spec.weights]
        return replace(run, points=[run.sft, *merged])

    opened = opening(write(named, points=3, prompts=30, methods={"soup": (1.0, 0.0)}))
    page = opened.drawn()
    shown = name.replace("\ud800", "\ufffd")
    assert page.title() == page.locator("h1").inner_text() == f"</title>{shown}"
    title = page.locator("#plot .xtitle").text_content()
    assert title.replace("\ufffd", "\ud800") == f"positive [{name}], higher is better"
    assert page.evaluate("window.hacked") is None


@pytest.fixture(scope="module")
def large(write: Callable[..., Any]) -> Any:
    """25 points, 500 prompts, responses of 60 words: 12,500 of them."""
    return write(points=12, prompts=500, words=60)


@pytest.mark.slow
def test_thousands_of_responses_are_painted_at_once(opening: Opening, large: Any, capsys: Any) -> None:
    opened = opening(large)
    page = opened.drawn()
    paint = "performance.getEntriesByType('paint').find((one) => one.name === 'first-contentful-paint').startTime"
    marks = "Object.fromEntries(performance.getEntriesByType('mark').map((one) => [one.name, one.startTime]))"
    first, times = page.evaluate(paint), page.evaluate(marks)
    size = large.path.stat().st_size / 1e6
    with capsys.disabled():
        shown = f"first responses {times['responses']:.0f} ms, front {times['front']:.0f} ms"
        print(f"\n25 points, 500 prompts, {size:.1f} MB: first contentful paint {first:.0f} ms, {shown}")  # noqa: T201
    # Two seconds are promised on a quiet machine; other tests run beside this one.
    assert first < 4000
    asked = """async () => {
        const list = document.getElementById("list");
        const start = performance.now();
        const query = document.getElementById("query");
        query.value = "quiet wit";
        query.dispatchEvent(new Event("input"));
        while (list.getAttribute("aria-busy") === "true") await new Promise((next) => setTimeout(next));
        return performance.now() - start;
    }"""
    assert page.evaluate(asked) < 2000
    assert 0 < count(page) < 500
