"""Descriptions and synopses of Debian's packages, as data: `python recipes/configs/smollm2/packages.py FILE FOLDER`.

FILE is the index Translation-en of a Debian or Ubuntu archive, unpacked. To fetch one:

    curl https://deb.debian.org/debian/dists/stable/main/i18n/Translation-en.xz | xz -d > Translation-en

FOLDER gets train.jsonl, validation.jsonl and test.jsonl. The texts are their authors', under the packages' licences.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

# Percent of the packages; the rest are for training.
PARTS = {"validation": 5, "test": 5}
# Characters of a description: short ones, so that a laptop can train and measure.
SHORTEST, LONGEST = 100, 200


def packages(index: str) -> Iterator[dict[str, str]]:
    """Yield package, synopsis and description of every stanza whose description has 100 to 200 characters.

    The first line of the field `Description-en` is the synopsis. The lines of the description begin with a space; a
    single dot is an empty line. Bullets and other indented lines are joined as they are.
    """
    for stanza in index.split("\n\n"):
        head, _, body = stanza.partition("\nDescription-en: ")
        synopsis, _, lines = body.partition("\n")
        indented = [line.strip() for line in lines.splitlines() if line.startswith(" ")]
        description = " ".join(line for line in indented if line != ".")
        name = head.partition("Package: ")[2].partition("\n")[0]
        if name and synopsis and SHORTEST <= len(description) <= LONGEST:
            yield {"package": name, "synopsis": synopsis.strip(), "description": description}


def part(description: str) -> str:
    """Return the split of a description; it depends only on the text."""
    number = zlib.crc32(description.encode()) % 100
    for name, share in PARTS.items():
        if number < share:
            return name
        number -= share
    return "train"


def write(index: Path, folder: Path) -> dict[str, int]:
    """Write the three files, every description once; return the number of rows of each."""
    rows: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    once = {row["description"]: row for row in packages(index.read_text(encoding="utf-8"))}
    for description, row in once.items():
        rows[part(description)].append(json.dumps(row, ensure_ascii=False) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {name: len(lines) for name, lines in rows.items()}


if __name__ == "__main__":
    print(write(Path(sys.argv[1]), Path(sys.argv[2])))
