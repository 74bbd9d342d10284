"""Damaged files are refused with one message, or merged exactly as the format's library reads them.

For each mutated input, `merge` either exits with 1 and one message and leaves nothing, or every tensor equals the
formula on the tensors that the `safetensors` library reads from the same files.
"""

import json
from dataclasses import replace
from pathlib import Path

import blake3
import pytest
from attempts import attempts, try_all
from plain_checkpoints import INDEX, SINGLE, check_formula, read_plain, save_family

SHARD = "model-00001-of-00002.safetensors"
# Mutated inputs by kind: the file that is changed, and how many times by default.
TRIED = {SINGLE: 50, SHARD: 20, INDEX: 20, "config.json": 30, "tokenizer.json": 15, "training.json": 15}
RECORDS = 20
# So many times more are tried every night.
MORE = 400
# What numpy has to say of values that are not finite would stand on the terminal beside our own message.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
NAMES = ("sft", "first", "second")
ALPHA, BETA, LAM = 0.5, 1.0, 0.25
ARGS = (
    *("merge", "--base", "sft", "--policy", "first", "--policy", "second", "--out", "out", "--json"),
    *("--lam", LAM, "--alpha", ALPHA, "--beta", BETA),
)
TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
    "added_tokens": [{"id": 0, "content": "a"}],
    "normalizer": None,
}


def test_thousands_of_files_are_tried_every_night():
    assert sum(TRIED.values()) >= 150
    assert sum(TRIED.values()) * MORE >= 50_000


def check_merged(place: Path, printed: str, dry: bool) -> None:
    """Compare a merge with the library's reading of the inputs, and `merge.json` with their bytes."""
    inputs = {name: read_plain(place / name) for name in NAMES}
    notes = json.loads(printed)[0]["notes"]
    left_out = {note.split()[2].rstrip(",") for note in notes if note.startswith("left out: ")}
    assert set(inputs["sft"]) - left_out == set(inputs["first"]) - left_out == set(inputs["second"]) - left_out
    if dry:
        return
    policies = [place / name for name in NAMES[1:]]
    check_formula(place / "out", place / "sft", policies, [LAM, 1 - LAM], ALPHA, BETA, left_out)
    record = json.loads((place / "out/merge.json").read_text())
    for name, entry in {"sft": record["base"], **record["policies"]}.items():
        for file, digest in entry["files"].items():
            assert digest == blake3.blake3((place / name / file).read_bytes()).hexdigest()
    configs = [json.loads((place / folder / "config.json").read_text()) for folder in ("out", "sft")]
    for config in configs:
        config.pop("dtype", None), config.pop("torch_dtype", None)
    # As text, because NaN does not equal itself.
    assert json.dumps(configs[0], sort_keys=True) == json.dumps(configs[1], sort_keys=True)


@pytest.fixture
def family(tmp_path, monkeypatch):
    """Make a base and two policies, in one file each or in two, in the working directory."""

    def make(shards: int = 1) -> Path:
        place = save_family(tmp_path / "place", shards=shards)
        for name in NAMES:
            (place / name / "tokenizer.json").write_text(json.dumps(TOKENIZER))
            (place / name / "training.json").write_text(json.dumps({"base_hash": None, "seed": 1}))
        monkeypatch.chdir(place)
        return place

    return make


@pytest.mark.parametrize("file", TRIED)
def test_refused_or_right(quick, family, file):
    place = family(shards=2 if file in (SHARD, INDEX) else 1)
    tried, merged = try_all(quick, ARGS, check_merged, attempts(place, NAMES, file, TRIED[file], "default"))
    # Some files are refused and some merged.
    assert tried == TRIED[file] and tried / 50 < merged < tried * 0.9


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("file", TRIED)
def test_refused_or_right_many_times(quick, family, file):
    place = family(shards=2 if file in (SHARD, INDEX) else 1)
    try_all(quick, ARGS, check_merged, attempts(place, NAMES, file, TRIED[file] * MORE, "slow"))


def check_replayed(place: Path, printed: str, dry: bool) -> None:
    """Compare a merge from a record with the formula and the printed numbers."""
    (told,) = json.loads(printed)
    policies = [place / name for name in told["weights"]]
    check_formula(place / "out", place / "sft", policies, list(told["weights"].values()), told["alpha"], told["beta"])


@pytest.mark.parametrize("count", [RECORDS, pytest.param(RECORDS * MORE, marks=pytest.mark.nightly)])
def test_records_that_are_merged_again(quick, family, count):
    place = family()
    assert quick(*(("again" if arg == "out" else arg) for arg in ARGS)).code == 0
    args = ("merge", "--from", "again/merge.json", "--out", "out", "--json")
    inputs = (replace(attempt, dry=False) for attempt in attempts(place, ("again",), "merge.json", count, "records"))
    tried, merged = try_all(quick, args, check_replayed, inputs)
    assert tried == count and tried / 50 < merged < tried * 0.9
