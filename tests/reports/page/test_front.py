"""The front in a real browser: hover, click, slide, switch off, constrain, by mouse and by keyboard, small and dark."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import pytest

Opening = Callable[..., Any]


def spot(page: Any, trace: int, point: int) -> tuple[float, float]:
    """Return where a point of the picture is, in pixels."""
    box = page.locator("#plot .scatterlayer .trace").nth(trace).locator(".point").nth(point).bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def chosen(page: Any) -> str:
    return page.locator("#chosen-title").text_content()


def row(page: Any, name: str) -> Any:
    return page.get_by_role("row").filter(has=page.get_by_role("button", name=name, exact=True))


def mean(cells: Any) -> float:
    """Return the first reward's mean in a row of the table."""
    return float(cells.locator("td").first.inner_text().split()[0].replace("−", "-"))


def test_hovering_tells_lambda_scores_with_intervals_kl_and_length(shown: Any) -> None:
    page = shown.page
    page.mouse.move(*spot(page, 1, 2))
    told = page.locator("#plot .hoverlayer text.nums").text_content()
    assert told.startswith("lines λ = 0.50")
    number = r"−?\d+(\.\d+)?"
    for measure, unit in (("positive", "logit"), ("detailed", "words"), ("KL to SFT", "nats"), ("length", "words")):
        assert re.search(rf"{measure}: {number} \[{number},\s{number}\] {unit}", told), told


def test_a_click_chooses_a_point(shown: Any) -> None:
    page = shown.page
    page.mouse.click(*spot(page, 0, 1))
    shown.settled()
    assert chosen(page) == "Chosen: soup λ = 0.25"
    headings = page.locator("#list article").first.locator("h4").all_inner_texts()
    assert headings == ["SFT", "soup λ = 0.25"]
    assert page.locator("#points tr.chosen").inner_text().startswith("soup λ = 0.25")
    assert page.get_by_label("Point of Rewarded Soups").get_attribute("aria-valuetext") == "λ = 0.25"
    shown.picture("light")


def test_a_slider_steps_through_a_methods_points(shown: Any) -> None:
    page = shown.page
    slider = page.get_by_label("Point of LiNeS")
    slider.fill("0")
    assert chosen(page) == "Chosen: lines λ = 0.00"
    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert chosen(page) == "Chosen: lines λ = 0.75"
    assert slider.get_attribute("aria-valuetext") == "λ = 0.75"


def test_methods_switch_off_and_on(shown: Any) -> None:
    page = shown.page
    assert page.locator("#plot .scatterlayer .trace").count() == 3
    box = page.get_by_role("checkbox", name="Rewarded Soups")
    box.uncheck()
    assert page.locator("#plot .scatterlayer .trace").count() == 2
    assert page.locator("#points tbody tr:visible").count() == 6
    assert page.get_by_label("Point of Rewarded Soups").is_disabled()
    box.check()
    assert page.locator("#plot .scatterlayer .trace").count() == 3
    assert page.locator("#points tbody tr:visible").count() == 11


def test_a_minimum_tells_what_qualifies(shown: Any) -> None:
    page = shown.page
    field = page.get_by_label("positive [logit] ≥")
    means = [mean(row(page, f"soup λ = {lam}")) for lam in ("0.00", "1.00")]
    field.fill(str(sum(means) / 2))
    assert re.fullmatch(r"\d of 10 points qualify\.", page.locator("#qualify").inner_text())
    assert row(page, "soup λ = 0.00").locator("td").last.inner_text() == "no"
    assert row(page, "soup λ = 1.00").locator("td").last.inner_text() == "yes"
    faint = page.locator("#plot .scatterlayer .trace").first.locator(".point")
    assert [faint.nth(place).evaluate("e => e.style.opacity") for place in (0, 4)] == ["0.2", "1"]
    least = page.get_by_label("Least positive [logit]")
    assert float(least.input_value()) == pytest.approx(sum(means) / 2, abs=0.01)
    page.get_by_role("button", name="No minimum").click()
    assert page.locator("#qualify").inner_text() == ""
    assert field.input_value() == ""
    # The slider ends where a point is left, and begins where all are.
    least.focus()
    page.keyboard.press("End")
    assert 1 <= int(page.locator("#qualify").inner_text().split()[0]) < 10
    page.keyboard.press("Home")
    assert page.locator("#qualify").inner_text() == ""


@pytest.mark.slow
def test_every_measure_is_an_axis_and_an_audit_no_minimum(opening: Opening, write: Callable[..., Any]) -> None:
    def audited(run: Any) -> Any:
        run.header["rewards"]["polite"]["role"] = "audit"
        return run

    page = opening(write(audited, rewards=3, points=3, prompts=30, control=1.0)).drawn()
    across = page.get_by_label("Across")
    offered = ["positive [logit]", "detailed [words]", "polite", "KL to SFT [nats]", "length [words]"]
    assert across.locator("option").all_inner_texts() == [*offered, "control perplexity"]
    across.select_option("KL to SFT [nats]")
    page.get_by_label("Upwards").select_option("polite")
    assert page.locator("#plot .xtitle").text_content() == "KL to SFT [nats], lower is better"
    assert page.locator("#plot .ytitle").text_content() == "polite, higher is better"
    assert "audit polite" in page.locator("#points thead").inner_text()
    assert page.locator("#bounds .bound label").all_inner_texts() == ["positive [logit] ≥", "detailed [words] ≥"]
    assert "polite" in page.locator("#list article").first.inner_text()


@pytest.mark.slow
def test_one_reward_is_drawn_over_kl(opening: Opening, write: Callable[..., Any]) -> None:
    page = opening(write(rewards=1, points=3, prompts=30)).drawn()
    assert page.locator("#plot .xtitle").text_content() == "KL to SFT [nats], lower is better"
    assert page.locator("#plot .ytitle").text_content() == "positive [logit], higher is better"


def test_numbers_have_the_decimals_of_their_intervals(shown: Any) -> None:
    found = {"[1.234, 1.1, 1.36]": 2, "[3e-9, 1e-9, 5e-9]": 10, "[12.3, 12.299999999999997, 12.300000000000002]": 2}
    # The page's script keeps its names to itself.
    script = (files("rewarded_lines.reports.page") / "numbers.js").read_text()
    asked = [f"(() => {{ {script}; return decimals([{one}, null]); }})()" for one in found]
    assert list(map(shown.page.evaluate, asked)) == list(found.values())


@pytest.mark.slow
def test_three_policies_are_stepped_through(opening: Opening, write: Callable[..., Any]) -> None:
    page = opening(write(rewards=3, policies=3, points=3, prompts=30)).page
    page.get_by_label("Point of LiNeS").fill("0")
    assert chosen(page) == "Chosen: lines λ = 0.00,0.00,1.00"


@pytest.mark.slow
def test_the_keyboard_reaches_everything_and_everything_has_a_name(opening: Opening, written: Any) -> None:
    page = opening(written).drawn()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the responses"
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or page.evaluate("document.activeElement === document.body")
    for control in ("axis-x", "axis-y", "least-0", "least-1", "soup λ = 0.50", "other", "command", "copy", "query"):
        assert control in reached, control
    page.get_by_role("button", name="soup λ = 0.50", exact=True).focus()
    page.keyboard.press("Enter")
    assert chosen(page) == "Chosen: soup λ = 0.50"
    assert page.get_by_role("button", name="soup λ = 0.50", exact=True).get_attribute("aria-pressed") == "true"

    nameless = page.evaluate(
        "[...document.querySelectorAll('input, select')].filter(e => !e.labels.length && !e.ariaLabel).map(e => e.id)"
    )
    assert nameless == []
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(e => Number(e.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


@pytest.mark.slow
def test_small_screens_scroll_one_way_only(opening: Opening, written: Any) -> None:
    opened = opening(written, width=400, height=800)
    page = opened.drawn()
    page.get_by_label("Beside SFT and").select_option("soup λ = 0.00")
    opened.settled()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.locator("#plot .main-svg").first.bounding_box()["width"] <= 400
    for part in ("front-title", "chosen-title", "responses"):
        page.locator(f"#{part}").evaluate("e => e.scrollIntoView()")
        opened.picture(f"small-{part}")


def brightness(colour: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


@pytest.mark.slow
def test_the_page_and_the_picture_follow_dark_mode(opening: Opening, written: Any) -> None:
    opened = opening(written, color_scheme="light")
    page = opened.drawn()

    def colours() -> list[float]:
        found = [page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")]
        title, paper = page.locator("#plot .xtitle"), page.locator("#plot .main-svg").first
        found += [paper.evaluate("e => e.style.background"), title.evaluate("e => e.style.fill")]
        return [brightness(colour) for colour in found]

    paper, ink, plot_paper, plot_ink = colours()
    assert paper > 230 and plot_paper > 230 and ink < 60 and plot_ink < 60
    page.emulate_media(color_scheme="dark")
    paper, ink, plot_paper, plot_ink = colours()
    assert paper < 40 and plot_paper < 40 and ink > 200 and plot_ink > 200
    opened.picture("dark")
