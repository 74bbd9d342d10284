"""Write the pages whose numbers are those of the records: this folder's READMEs and docs/which-merge.md.

    python eval/results/pages.py              # write them, and the figures
    python eval/results/pages.py --check      # say which differ; exit code 1 if one does
    python eval/results/pages.py --records runs/evidence-quick/results   # the pages of other records, beside them

The templates in `templates/` hold the text. Each number is an expression over the records, see `kept_records.py`. A row
or a paragraph whose record is missing is left out, and the page says so.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import jinja2
from kept_records import HERE, MissingRecord, Record, every_method, record, records

from rewarded_lines.config import SFT
from rewarded_lines.pareto.bootstrap import Estimate

ROOT = HERE.parents[1]
# Template → page.
PAGES = {
    "results.md": "eval/results/README.md",
    "movie_reviews.md": "eval/results/movie_reviews/README.md",
    "which-merge.md": "docs/which-merge.md",
}
_OTHER = (
    "> The tables below are those of the records in this folder. The text between them was written about the records\n"
    "> of the full run; here it may be wrong. So may labels, such as the number of seeds or the form of the demo.\n\n"
)
_FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def fixed(value: float, places: int = 0) -> str:
    """Return a rounded number; 0 only for less than half a digit of one decimal."""
    text = f"{value:.{places}f}"
    if float(text) == 0 and value and not places:
        text = f"{value:.1f}"
    return text.replace("-", "") if float(text) == 0 else text.replace("-", "−")


def ci(one: Estimate, places: int = 0, scale: float = 1.0) -> str:
    """Return `value [low, high]`."""
    value, low, high = (fixed(scale * number, places) for number in (one.value, one.low, one.high))
    return f"{value} [{low}, {high}]"


def delta(one: Estimate, places: int = 0, scale: float = 1.0) -> str:
    """Return `+value [low, high]`; what is rounded to 0 has no sign."""
    text = ci(one, places, scale)
    return text if text.startswith("−") or not float(text.split()[0]) else f"+{text}"


def pm(one: Estimate, places: int = 2) -> str:
    """Return `value ±half the interval`."""
    return f"{fixed(one.value, places)} ±{(one.high - one.low) / 2:.{places}f}"


def cells(one: Record, methods: str, above: str = SFT, places: int = 0, scale: float = 1.0) -> str:
    """Return the hypervolumes of methods as cells of a table."""
    return " | ".join(ci(one.hv(method, above), places, scale) for method in methods.split())


def changes(one: Record, pairs: str, above: str = SFT, places: int = 0, scale: float = 1.0) -> str:
    """Return differences of pairs such as "lines−soup" as cells; "–" for a method and itself."""
    found = (pair.split("−") for pair in pairs.split())
    return " | ".join("–" if a == b else delta(one.diff(a, b, above), places, scale) for a, b in found)


def share(value: float) -> str:
    """Return a whole percentage."""
    return f"{100 * value:.0f}%"


def seed_of(name: str) -> str:
    """Return the training seed in a record's name, or "all, averaged"."""
    return "all, averaged" if name.endswith("-all-seeds") else name.rpartition("seed")[2]


def others(root: Path = HERE) -> list[Record]:
    """Return the records that no template looks up."""
    text = "".join((HERE / "templates" / template).read_text(encoding="utf-8") for template in PAGES)
    folders = {"packages": "packages/", "reviews": "movie_reviews/", "records": ""}
    known = [(how, folders[how] + name) for how, name in re.findall(r'\b(packages|reviews|records)\("([^"]+)"\)', text)]

    def looked_up(name: str) -> bool:
        return any(name.startswith(known) if how == "records" else name == known for how, known in known)

    return [one for one in records("", root) if not looked_up(one.name)]


def gains(name: str, root: Path = HERE) -> Iterator[tuple[dict[str, str], Estimate]]:
    """Yield the rows of a task's `policies.csv` with their gains."""
    path = root / name / "policies.csv"
    if not path.is_file():
        raise MissingRecord(f"{name}/policies.csv")
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield row, Estimate(*(float(row[f"gain{end}"]) for end in ("", ".low", ".high")))


def environment(root: Path = HERE) -> jinja2.Environment:
    """Return jinja's environment, in which an unknown name is an error."""
    made = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    made.filters |= {"ci": ci, "delta": delta, "pm": pm, "n": fixed, "percent": share, "seed": seed_of}
    made.globals |= {
        "cells": cells,
        "changes": changes,
        "record": partial(record, root=root),
        "records": partial(records, root=root),
        "every_method": partial(every_method, root),
        "others": partial(others, root),
        "gains": lambda name: list(gains(name, root)),
        "packages": lambda name: record(f"packages/{name}", root),
        "reviews": lambda name: record(f"movie_reviews/{name}", root),
    }
    return made


def units(text: str) -> Iterator[str]:
    """Yield what is rendered together: a block of code, a paragraph, or a row of a table."""
    for part in _FENCE.split(text):
        if part.startswith("```"):
            yield part
            continue
        for block in re.split(r"(\n\n+)", part):
            rows = block.lstrip("\n").startswith("|") and "{%" not in block
            yield from block.splitlines(keepends=True) if rows else [block]


def render(template: str, root: Path = HERE) -> tuple[str, list[str]]:
    """Return a page and what it lacks."""
    made, text = environment(root), (HERE / "templates" / template).read_text(encoding="utf-8")
    done, lacking, told = [], [], []
    for unit in units(text):
        try:
            done.append(_filled(unit, made))
        except MissingRecord as error:
            lacking.append(str(error))
            told.append(str(error))
        if told and not unit.strip():
            done.append(_left_out(told) + "\n\n")
            told = []
    return "".join(done) + (f"\n\n{_left_out(told)}\n" if told else ""), lacking


def _left_out(what: list[str]) -> str:
    named = ", ".join(f"`{one}`" for one in dict.fromkeys(what))
    return f"*Left out, for it is not among the records: {named}.*"


def _filled(unit: str, made: jinja2.Environment) -> str:
    """Return a unit with its numbers, and its lines folded anew where it had expressions."""
    if unit.startswith("```") or "{" not in unit:
        return unit
    text = made.from_string(unit).render().strip("\n")
    if not text:
        return ""
    before, after = unit[: len(unit) - len(unit.lstrip("\n"))], unit[len(unit.rstrip("\n")) :]
    if not text.startswith(("|", "#", "!")):
        items = re.split(r"\n(?=- )", text)
        text = "\n".join(
            _fold(" ".join(item.split()), subsequent_indent="  " * item.startswith("- ")) for item in items
        )
    return before + text + after


_fold = partial(textwrap.fill, width=125, break_long_words=False, break_on_hyphens=False)


def written(root: Path = HERE) -> Iterator[tuple[Path, str, list[str]]]:
    """Yield the path, the text and the gaps of every page; pages of other records stand beside these."""
    for template, page in PAGES.items():
        text, lacking = render(template, root)
        if root == HERE:
            yield ROOT / page, text, lacking
            continue
        inside = (ROOT / page).relative_to(HERE) if (ROOT / page).is_relative_to(HERE) else Path(page).name
        yield root / inside, _OTHER + text.replace("../eval/results/", ""), lacking


def main(argv: Sequence[str]) -> int:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--records", type=Path, default=HERE, metavar="FOLDER", help="by default those kept here")
    options = parser.parse_args(argv)
    root, differing = options.records.resolve(), 0
    if not any(root.rglob("points.csv")):
        sys.exit(f"no record in {options.records}: expected folders with a points.csv, such as `make evidence` writes")
    for path, text, lacking in written(root):
        for one in dict.fromkeys(lacking):
            print(f"{path.name}: left out, for it is not there: {one}", file=sys.stderr)
        if options.check:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                print(f"{path.relative_to(ROOT)} is not what the records say; run this script", file=sys.stderr)
                differing += 1
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if not options.check and records("movie_reviews/methods-", root):
        from decision_figures import DOCS, write_figures

        write_figures(DOCS if root == HERE else root, root)
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
