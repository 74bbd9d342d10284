"""Rewards that read columns: each row's own, where a policy trains, where it is measured, and in a sweep."""

import json

import pytest
from small_recipes import run

from rewarded_lines import sweep
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator.records import load_run

REWARDS = """
import json

def exact(prompts, completions, answer, level=0):
    with open("SEEN", "a") as file:
        for row in zip(prompts, answer, level, strict=True):
            file.write(json.dumps(row) + "\\n")
    return [len(text) + 100.0 * place for text, place in zip(completions, level, strict=True)]
"""
# One prompt twice, with another answer: a score is not the prompt's and the response's alone.
ROWS = [
    {"prompt": "a warm and", "answer": "funny", "level": 1},
    {"prompt": "one of the", "answer": "best", "level": 2},
    {"prompt": "a warm and", "answer": "small", "level": 3},
    {"prompt": "a dull and", "answer": ["lifeless", "little"], "level": 4},
]


@pytest.fixture
def columns(work):
    """The project with a reward that reads columns, and the function that returns what it saw."""
    (work / "columns.py").write_text(REWARDS.replace("SEEN", str(work / "seen.jsonl")))
    (work / "rewarded-lines.yaml").write_text(
        "base: sft\nrewards:\n  exact: {function: columns.py:exact}\nprompts: {file: validation.jsonl}\n"
    )
    for name, count in (("train", 2), ("validation", 1)):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * count))
    return work


def seen(work):
    return [tuple(map(json.dumps, json.loads(line))) for line in (work / "seen.jsonl").read_text().splitlines()]


def options(work, **more):
    files = {"train_file": work / "train.jsonl", "validation_file": work / "validation.jsonl"}
    return {**files, "reward": "exact", "output_dir": work / "policy", "train_limit": "null", **more}


@pytest.mark.parametrize(
    ("name", "more"),
    [("rloo", {"max_steps": 2}), ("grpo", {"max_steps": 2}), ("ppo", {}), ("dpo", {"margin": 0.001, "max_steps": 2})],
)
def test_a_policy_trains_on_each_rows_own_columns(columns, name, more):
    run(name, columns, **options(columns, validation_limit="null", **more))
    whole = {tuple(json.dumps(row[key]) for key in ("prompt", "answer", "level")) for row in ROWS}
    assert set(seen(columns)) == whole
    # Before and after training, each validation row once.
    assert sum(row == min(whole) for row in seen(columns)) >= 2


@pytest.mark.parametrize("name", ["rloo", "ppo", "dpo"])
def test_a_column_that_a_row_lacks_is_told_before_anything_is_trained(columns, name):
    (columns / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"prompt": "a dull"}]))
    with pytest.raises(UserError, match="reads column `answer`, which a row does not have") as raised:
        run(name, columns, **options(columns))
    assert "training rows, row 4" in str(raised.value) and not (columns / "seen.jsonl").exists()


def test_a_sweep_scores_each_row_with_its_own_columns(columns):
    run("rloo", columns, **options(columns, max_steps=1, save_strategy="no"))
    (columns / "seen.jsonl").unlink()
    project = (columns / "rewarded-lines.yaml").read_text()
    settings = "generation: {max_tokens: 4}\nsweep: {points: 2, methods: [policies]}\n"
    (columns / "rewarded-lines.yaml").write_text(project + settings)
    sweep(columns / "rewarded-lines.yaml", engine="hf", out=columns / "run")
    for point in load_run(columns / "run").points:
        expected = [len(text) + 100.0 * row["level"] for text, row in zip(point.responses, ROWS, strict=True)]
        assert point.scores["exact"].tolist() == expected
    assert len(set(seen(columns))) == len(ROWS)
