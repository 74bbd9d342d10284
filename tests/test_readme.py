"""What the README has that other pages need not: its order, its first command, the table of methods."""

import re

from documents import ROOT, Page
from test_architecture import PACKAGES

from rewarded_lines.merger.methods import METHODS

README = Page(ROOT / "README.md")


def test_the_first_command_comes_early_and_the_page_stays_short():
    before = README.text[: README.text.index("make demo")]
    assert before.count("\n") < 25
    assert len(README.text.splitlines()) <= 230


def test_a_newcomer_activates_before_the_first_command_of_ours():
    # Without this, a newcomer's first command after `make demo` is not found.
    assert README.text.index("source .venv/bin/activate") < README.text.index("\nrewarded-lines merge")


def test_its_parts_are_in_order():
    wanted = ["run-it", "what-we-measured", "merge", "where-things-are", "limits"]
    titles = [re.sub(r"\W", "-", title.lower()) for title in re.findall(r"^## (.*)$", README.text, re.MULTILINE)]
    assert [title for title in titles if title in wanted] == wanted


def test_every_method_is_in_the_table_with_its_options_and_defaults():
    rows = dict(re.findall(r"^\| `([a-z][a-z-]*)` \|.*\| ([^|]*)\|$", README.text, re.MULTILINE))
    written = {name: set(re.findall(r"`(--[^`]+)`", options)) for name, options in rows.items()}
    expected = {name: {f"--{key} {one.default}" for key, one in row.options.items()} for name, row in METHODS.items()}
    assert written == expected | {"greedy": {"--score"}}


def test_the_map_names_every_package_in_the_order_of_imports():
    tree = README.text[README.text.index("imports go down this list") : README.text.index("recipes/    ")]
    named = [name for line in tree.splitlines()[1:] for name in re.findall(r"(\w+)/(?= )", line[:38])]
    assert named == PACKAGES
