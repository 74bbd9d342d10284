"""The pages of results: each is what its template and the records say, and no number of a table is typed by hand."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from documents import ROOT

RESULTS = ROOT / "eval" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
sys.path.insert(0, str(RESULTS))

import decision_figures  # noqa: E402
import kept_records  # noqa: E402
import pages  # noqa: E402

from rewarded_lines.pareto.bootstrap import Estimate  # noqa: E402

SOUP = "movie_reviews/methods-seed0"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The records without their pictures."""
    return Path(shutil.copytree(RESULTS, tmp_path / "results", ignore=shutil.ignore_patterns("*.png", "*.svg", "*.py")))


@pytest.mark.parametrize("template", pages.PAGES)
def test_the_page_is_what_the_records_say(template: str) -> None:
    text, lacking = pages.render(template)
    page = ROOT / pages.PAGES[template]
    assert lacking == []
    assert text == page.read_text(encoding="utf-8"), "run `python eval/results/pages.py`"


def test_the_check_says_which_page_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pages.main(["--check"]) == 0 and capsys.readouterr().err == ""
    for page in pages.PAGES.values():
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    (tmp_path / "docs/which-merge.md").write_text("old")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    assert pages.main(["--check"]) == 1
    assert capsys.readouterr().err == "docs/which-merge.md is not what the records say; run this script\n"


def test_pages_of_other_records_stand_beside_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(RESULTS / SOUP, tmp_path / SOUP)
    before = {page: (ROOT / page).read_bytes() for page in pages.PAGES.values()}
    assert pages.main(["--records", str(tmp_path)]) == 0
    assert "README.md: left out, for it is not there: record packages/dpo-seed0\n" in capsys.readouterr().err
    text = (tmp_path / "which-merge.md").read_text()
    assert text.startswith("> The tables below") and (tmp_path / "which-merge-gain.png").stat().st_size > 10_000
    links = re.findall(r"\]\((movie_reviews/[^)#]*)", text)
    assert links and all((tmp_path / link).is_file() for link in links)
    assert "| `soup` |" in (tmp_path / "movie_reviews/README.md").read_text() and (tmp_path / "README.md").is_file()
    assert before == {page: (ROOT / page).read_bytes() for page in pages.PAGES.values()}


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no record in"):
        pages.main(["--records", str(tmp_path)])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("template", pages.PAGES)
def test_no_number_of_a_table_is_typed(template: str) -> None:
    text = (RESULTS / "templates" / template).read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    assert len(rows) > 20 and sum("{{" in row for row in rows) > 10
    typed = []
    for row in rows:
        # What jinja fills in; code; targets of links; names such as SmolLM2-135M; and labels of λ, α, seeds, counts.
        left = re.sub(r"\{\{.*?\}\}|\{%.*?%\}|`[^`]*`|\]\([^)]*\)", "", row)
        left = re.sub(r"SmolLM2(-135M)?|1\.2M|\[?seed \d|(λ|[αβ]|density) =? ?[\d.]+|α = β = 1", "", left)
        typed += [row] if re.search(r"\d", left) else []
    # The task's list of policies and seeds, which are no measurements.
    assert [row for row in typed if "| PPO, RLOO, DPO |" not in row and "| DPO, PPO, RLOO |" not in row] == []


def test_every_expression_looks_something_up() -> None:
    """A number in braces would be typed, too."""
    found = []
    for template in pages.PAGES:
        found += re.findall(r"\{\{(.*?)\}\}", (RESULTS / "templates" / template).read_text(encoding="utf-8"))
    assert len(found) > 150
    # SFT's own KL, and its perplexity over itself.
    assert {one.strip() for one in found if re.fullmatch(r"\W*[\d.−]+\W*(\|.*)?", one)} == {"0", "1"}


def test_the_readme_says_what_the_records_say() -> None:
    rows = re.findall(r"^\|[^|]*\]\(eval/results/(\S+)/table\.md\)[^|]*\|(.*)\|$", README, re.MULTILINE)
    assert len(rows) == 6
    for name, cells in rows:
        one, places = kept_records.record(name), 1 if name.startswith("movie") else 0
        methods = [name for name in ("soup", "lines", "uniform", "reversed") if name in one.methods]
        wanted = [*(pages.ci(one.hv(method), places) for method in methods), *["–"] * (4 - len(methods))]
        assert [cell.strip() for cell in cells.split("|")] == [
            *wanted,
            pages.delta(one.diff("lines", "uniform"), places),
        ]


def test_another_number_in_a_record_is_another_page(copy: Path) -> None:
    path = copy / "packages/dpo-seed0-300/summary.json"
    content = json.loads(path.read_text())
    (row,) = [one for one in content["hypervolumes"] if (one["method"], one["reference"]) == ("lines", "sft")]
    row["hypervolume"]["value"] += 1000
    path.write_text(json.dumps(content))
    before, after = (pages.render("results.md", root)[0].splitlines() for root in (RESULTS, copy))
    changed = [line for line, other in zip(after, before, strict=True) if line != other]
    assert len(changed) == 1 and changed[0].startswith("| above SFT |") and "| 1111 [" in changed[0]


def test_a_missing_record_is_a_row_less_and_told(copy: Path) -> None:
    shutil.rmtree(copy / "packages/dpo-seed1")
    text, lacking = pages.render("results.md", copy)
    assert set(lacking) == {"record packages/dpo-seed1"}
    assert "*Left out, for it is not among the records: `record packages/dpo-seed1`.*" in text
    assert "| [seed 0]" in text and "| [seed 1]" not in text and "| [both, averaged]" in text


def test_new_records_need_no_code(copy: Path) -> None:
    shutil.copytree(copy / SOUP, copy / "movie_reviews/methods-seed9")
    shutil.copytree(copy / "packages/ppo-seed0", copy / "skills/first")
    assert "| methods-seed9 | alone |" in pages.render("movie_reviews.md", copy)[0]
    assert "| [skills/first](skills/first/table.md) | 64 |" in pages.render("results.md", copy)[0]
    assert "## Further records" not in pages.render("results.md")[0]


def test_rows_are_named_by_their_seed_or_all() -> None:
    names = ("movie_reviews/lengths-seed2", "packages/dpo-all-seeds")
    assert [pages.seed_of(name) for name in names] == ["2", "all, averaged"]
    page = pages.render("movie_reviews.md")[0]
    assert "| LiNeS − one factor | all, averaged |" in page and "| LiNeS − one factor | 2 |" in page


def test_tables_and_summaries_say_the_same() -> None:
    """Where `summary.json` is missing, its numbers are read from `table.md`."""
    one = kept_records.record("movie_reviews/ppo-all-seeds")
    table = kept_records.Record(one.name, one.folder)
    table.__dict__["summary"] = {}
    assert table.methods == one.methods and table.prompts == one.summary["prompts"] == 300
    for method in one.methods:
        assert pages.ci(table.hv(method, "worst"), 1) == pages.ci(one.hv(method, "worst"), 1)
    assert (
        pages.delta(table.diff("soup", "lines"), 1) == pages.delta(one.diff("soup", "lines"), 1) == "−9.2 [−10.1, −8.1]"
    )


def test_numbers_are_written_as_pages_write_them() -> None:
    assert [pages.fixed(value, places) for value, places in ((-0.46, 0), (0.0, 0), (-0.04, 1), (-1.25, 1))] == [
        *("−0.5", "0", "0.0", "−1.2")
    ]
    assert (
        pages.delta(Estimate(5.6, -0.46, 13)) == "+6 [−0.5, 13]" and pages.delta(Estimate(-3, -5, -1)) == "−3 [−5, −1]"
    )
    assert pages.ci(Estimate(96100, 91400, 100600), 1, 0.001) == "96.1 [91.4, 100.6]"
    assert pages.delta(Estimate(0.03, -0.001, 0.1), 2) == "+0.03 [0.00, 0.10]"
    assert pages.delta(Estimate(0.03, -0.2, 0.1), 1) == "0.0 [−0.2, 0.1]"
    assert pages.pm(Estimate(0.37, 0.1, 0.6)) == "0.37 ±0.25"


def test_what_lies_between_two_points_is_on_their_line() -> None:
    one = kept_records.record("packages/dpo-seed0")
    low, high = one.beside("soup", faithful=65)
    share = (65 - low["faithful"].value) / (high["faithful"].value - low["faithful"].value)
    assert one.at("soup", "kl", faithful=65) == pytest.approx((1 - share) * low["kl"].value + share * high["kl"].value)
    with pytest.raises(kept_records.MissingRecord):
        one.at("soup", "kl", faithful=99)


def test_the_least_difference_is_that_of_a_normal_interval() -> None:
    one = kept_records.record("packages/dpo-seed0-300")
    found = one.diff("lines", "uniform")
    assert one.least("lines", "uniform") == pytest.approx((found.high - found.low) * 2.8016 / 3.91993, rel=1e-4)
    needed = one.prompts_needed("lines", "uniform")
    # What `report --power` wrote goes first: of several runs it knows more than the interval does.
    asked = kept_records.Record(one.name, one.folder)
    row = {"method": "lines", "other": "uniform", "at": "sft", "least": {"value": 7.0}}
    asked.__dict__["summary"] = one.summary | {"power": [row]}
    assert asked.least("uniform", "lines") == 7.0
    assert needed == pytest.approx(300 * (one.least("lines", "uniform") / found.value) ** 2, abs=1)


def test_the_figures_show_the_record() -> None:
    pytest.importorskip("matplotlib")
    from rewarded_lines.reports.figures.figure_style import house_style

    one = kept_records.every_method()
    with house_style():
        (axes,) = decision_figures.kl_figure(one).axes
        (gains,) = decision_figures.gain_figure(one).axes
    drawn = {
        (float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.lines if len(line.get_xdata()) == 1
    }
    wanted = {(one.most(name, "kl"), one.hv(name).value) for triple in one.triples for name in triple[1:]}
    assert drawn == wanted and len(one.triples) == 12
    shown = {float(line.get_xdata()[0]) for line in gains.lines if len(line.get_xdata()) == 1}
    assert shown == {one.diff(name, "soup").value for triple in one.triples for name in triple[1:] if name != "soup"}
