"""Files that somebody damaged: refused with one message, or merged to exactly what the format's library reads.

For each mutated input `merge` either ends with exit code 1 and one message, leaving nothing, or succeeds, and then
every tensor is the formula's on what the `safetensors` library itself reads of the same files.
"""

import json
import shutil
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import blake3
import pytest
import typer
from mutations import JSONS, WEIGHTS
from plain_checkpoints import INDEX, SINGLE, check_formula, read_plain, save_family

SHARD = "model-00001-of-00002.safetensors"
# Mutated inputs by kind: the file that is changed, and how many times by default.
TRIED = {SINGLE: 1100, SHARD: 200, INDEX: 250, "config.json": 400, "tokenizer.json": 100, "training.json": 100}
MORE = 24
# What numpy has to say of values that are not finite would stand on the terminal beside our own message.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
NAMES = ("sft", "first", "second")
ALPHA, BETA, LAM = 0.5, 1.0, 0.25
TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
    "added_tokens": [{"id": 0, "content": "a"}],
    "normalizer": None,
}


def test_thousands_of_files_are_tried():
    assert sum(TRIED.values()) >= 2000
    assert sum(TRIED.values()) * MORE >= 50_000


@dataclass
class Attempt:
    """One mutated input: what every file that was touched holds now, and how it came about."""

    label: str
    files: dict[Path, bytes]
    dry: bool


def attempts(place: Path, file: str, count: int, seed: str) -> Iterator[Attempt]:
    """Yield `count` different mutated inputs; the base, one policy or all three have the changed file."""
    random, seen = Random(f"{seed} {file}"), set()
    mutations = WEIGHTS if file.endswith(".safetensors") else JSONS
    while len(seen) < count:
        number, mutation = random.getrandbits(64), random.choice(mutations)
        scope = random.choice((NAMES, NAMES, NAMES[:1], NAMES[1:2]))
        sound = {place / name / file: (place / name / file).read_bytes() for name in scope}
        files = {path: mutation(Random(number), raw) for path, raw in sound.items()}
        key = tuple(files.items())
        if files == sound or key in seen:
            continue
        seen.add(key)
        yield Attempt(f"{mutation.__name__}({number}) of {file} in {scope}", files, dry=len(seen) % 4 == 0)


def judge(cli, place: Path, attempt: Attempt) -> tuple[str, bool]:
    """Return what is wrong with the answer to a mutated input ("" for nothing), and whether it was merged."""
    before, begun = contents(place), time.monotonic()
    args = ["merge", "--base", "sft", "--policy", "first", "--policy", "second", "--out", "out", "--json"]
    numbers = ["--lam", LAM, "--alpha", ALPHA, "--beta", BETA]
    try:
        answer = cli(*args, *numbers, *(["--dry-run"] if attempt.dry else []))
    except Exception:  # noqa: BLE001 - whatever comes through is what we look for
        return traceback.format_exc(), False
    if time.monotonic() - begun > 5:
        return f"took {time.monotonic() - begun:.1f} s", False
    after = contents(place)
    if {path: raw for path, raw in after.items() if path.parts[0] != "out"} != before:
        return "something beside the output was touched or left", False
    if answer.code == 1:
        said = answer.err
        clean = said.strip() and all(char.isprintable() or char == "\n" for char in said)
        if not clean or len(said) > 4000 or "Traceback" in said or (place / "out").exists() or answer.out:
            return f"no clean refusal: {said!r}", False
        return "", False
    if answer.code != 0 or answer.err:
        return f"neither merged nor refused: {answer}", False
    try:
        check_merged(place, json.loads(answer.out)[0], attempt.dry)
    except Exception:  # noqa: BLE001 - likewise
        return traceback.format_exc(), True
    return "", True


def check_merged(place: Path, result: dict, dry: bool) -> None:
    """Hold a success against the library's reading of the inputs, and `merge.json` against their bytes."""
    inputs = {name: read_plain(place / name) for name in NAMES}
    left_out = {note.split()[2].rstrip(",") for note in result["notes"] if note.startswith("left out: ")}
    assert set(inputs["sft"]) - left_out == set(inputs["first"]) - left_out == set(inputs["second"]) - left_out
    if dry:
        assert not (place / "out").exists()
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
    # As text, in which NaN equals itself.
    assert json.dumps(configs[0], sort_keys=True) == json.dumps(configs[1], sort_keys=True)


def contents(place: Path) -> dict[Path, bytes]:
    return {path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.is_file()} | {
        path.relative_to(place): b"" for path in place.iterdir()
    }


@pytest.fixture
def family(tmp_path, monkeypatch):
    """Make a base and two policies, in one file each or in two, and stand beside them."""

    def make(shards: int = 1) -> Path:
        place = save_family(tmp_path / "place", shards=shards)
        for name in NAMES:
            (place / name / "tokenizer.json").write_text(json.dumps(TOKENIZER))
            (place / name / "training.json").write_text(json.dumps({"base_hash": None, "seed": 1}))
        monkeypatch.chdir(place)
        return place

    return make


@pytest.fixture
def quick(cli, monkeypatch):
    """The command line, with its parser built once: that is half the time of a small merge."""
    from rewarded_lines import cli as module

    monkeypatch.setattr(module, "app", typer.main.get_command(module.app))
    # Nobody pulls the plug here, and waiting for the disk is most of what is left.
    monkeypatch.setattr("rewarded_lines.folders.sync_folder", lambda folder: None)
    return cli


def try_all(cli, place: Path, file: str, count: int, seed: str) -> int:
    """Try `count` mutated inputs, each from sound files; return how many were merged."""
    wrong, merged = [], 0
    for attempt in attempts(place, file, count, seed):
        sound = {path: path.read_bytes() for path in attempt.files}
        for path, raw in attempt.files.items():
            path.write_bytes(raw)
        fault, success = judge(cli, place, attempt)
        merged += success
        if fault:
            wrong.append(f"{attempt.label}: {fault}")
        shutil.rmtree(place / "out", ignore_errors=True)
        for path, raw in sound.items():
            path.write_bytes(raw)
    assert not wrong, f"{len(wrong)} of {count}\n" + "\n".join(wrong[:5])
    return merged


@pytest.mark.parametrize("file", TRIED)
def test_refused_or_right(quick, family, file):
    place = family(shards=2 if file in (SHARD, INDEX) else 1)
    merged = try_all(quick, place, file, TRIED[file], "default")
    # Neither everything refused nor everything let through.
    assert TRIED[file] / 50 < merged < TRIED[file] * 0.9


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("file", TRIED)
def test_refused_or_right_many_times(quick, family, file):
    try_all(quick, family(shards=2 if file in (SHARD, INDEX) else 1), file, TRIED[file] * MORE, "slow")
