"""Corpora with declared columns, and what is said of those that lack them."""

import json

import pytest

from rewarded_lines.errors import UserError
from rewarded_lines.training.corpus import COMPLETIONS, PAIRS, read_corpus


def test_declared_columns_are_kept(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{"prompt": f"p{i}", "completion": f" c{i}", "label": "fresh"} for i in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    corpus = read_corpus(path, COMPLETIONS, limit=2)
    assert corpus.column_names == ["prompt", "completion"]
    assert corpus["completion"][:] == [" c0", " c1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the corpus is empty"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{oops\n', "line 2: not JSON"),
        ("[1]\n", "line 1: not a JSON object"),
        (
            '{"prompt": "a", "completion": "b"}\n',
            "no text in column `chosen`(.|\n)*columns prompt, completion",
        ),
        ('{"prompt": "a", "chosen": 1, "rejected": "c"}\n', "no text in column `chosen`"),
    ],
)
def test_faults_are_told_with_their_place(tmp_path, text, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_corpus(path, PAIRS)


def test_a_missing_corpus_comes_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="rewarded-lines demo --until data"):
        read_corpus(tmp_path / "train.jsonl", COMPLETIONS)
