"""The tables of methods in the documents agree with the table in the code."""

import re
from pathlib import Path

from rewarded_lines.merger.methods import METHODS

ROOT = Path(__file__).parents[2]
WEIGHTS = {"simplex": "sum 1", "free": "any", "share": "0 to 1", "none": "none"}
# An option of `merge` itself, because it is a command and no number.
BESIDE = {"greedy": "`--score`"}


def tables():
    """Yield name and rows of every table of methods in the documents."""
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for table in re.findall(r"^\| `--method` \|.*\n\|[:|-]+\|\n((?:\|.*\n)+)", path.read_text(), re.MULTILINE):
            cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()]
            yield path.name, [[cell.strip() for cell in row] for row in cells]


def test_every_method_is_in_every_table():
    found = dict(tables())
    assert list(found) == ["README.md", "how-it-works.md"]
    for name, rows in found.items():
        assert [method for row in rows for method in re.findall(r"`([\w-]+)`", row[0])] == list(METHODS), name


def test_the_readme_has_weights_options_and_defaults():
    for name, text, weights, options in dict(tables())["README.md"]:
        row = METHODS[name.strip("`")]
        assert weights == WEIGHTS[row.weights], name
        defaults = " ".join(f"`--{key} {option.default}`" for key, option in row.options.items())
        assert options == BESIDE.get(name.strip("`"), defaults), name
        linked = re.findall(r"https://arxiv.org/abs/([\d.]+)", text)
        assert set(linked) <= {"2306.04488", *(number for _, number in row.papers)}, name
