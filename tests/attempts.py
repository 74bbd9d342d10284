"""Mutated inputs one after another through the command line, and the judgement of each answer."""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from mutations import JSONS, WEIGHTS

# Holds a success against what other means make of the same files: place, what was printed, whether it was dry.
Check = Callable[[Path, str, bool], None]


@dataclass
class Attempt:
    """One mutated input: what every file that was touched holds now, and how it came about."""

    label: str
    files: dict[Path, bytes]
    dry: bool


def attempts(place: Path, folders: Sequence[str], file: str, count: int, seed: str) -> Iterator[Attempt]:
    """Yield `count` different mutated inputs: the first folder, the second, or all have the changed file."""
    random, seen = Random(f"{seed} {file}"), set()
    mutations = WEIGHTS if file.endswith(".safetensors") else JSONS
    while len(seen) < count:
        number, mutation = random.getrandbits(64), random.choice(mutations)
        scope = random.choice((folders, folders, folders[:1], folders[1:2]))
        sound = {place / name / file: (place / name / file).read_bytes() for name in scope}
        files = {path: mutation(Random(number), raw) for path, raw in sound.items()}
        key = tuple(files.items())
        if files == sound or key in seen:
            continue
        seen.add(key)
        yield Attempt(f"{mutation.__name__}({number}) of {file} in {scope}", files, dry=len(seen) % 4 == 0)


def try_all(cli, args: Sequence[object], check: Check, inputs: Iterator[Attempt]) -> tuple[int, int]:
    """Run a merge into `out` for each mutated input, starting from sound files; return how many, and how many merged.

    Raises:
        AssertionError: with what is wrong with the first answers that are.
    """
    wrong, tried, merged = [], 0, 0
    for attempt in inputs:
        sound = {path: path.read_bytes() for path in attempt.files}
        for path, raw in attempt.files.items():
            path.write_bytes(raw)
        fault, success = judge(cli, args, check, attempt)
        tried, merged = tried + 1, merged + success
        if fault:
            wrong.append(f"{attempt.label}: {fault}")
        shutil.rmtree("out", ignore_errors=True)
        for path, raw in sound.items():
            path.write_bytes(raw)
    assert not wrong, f"{len(wrong)} of {tried}\n" + "\n".join(wrong[:5])
    return tried, merged


def judge(cli, args: Sequence[object], check: Check, attempt: Attempt) -> tuple[str, bool]:
    """Return what is wrong with the answer to a mutated input ("" for nothing), and whether it was merged."""
    place, begun = Path.cwd(), time.process_time()
    before = contents(place)
    try:
        answer = cli(*args, *(["--dry-run"] if attempt.dry else []))
    except Exception:  # noqa: BLE001 - whatever comes through is what we look for
        return traceback.format_exc(), False
    if time.process_time() - begun > 5:
        return f"took {time.process_time() - begun:.1f} s of the processor", False
    after = contents(place)
    if {path: raw for path, raw in after.items() if path.parts[0] != "out"} != before:
        return "something beside the output was touched or left", False
    if answer.code == 1:
        said = answer.err
        clean = said.strip() and all(char.isprintable() or char == "\n" for char in said)
        if not clean or len(said) > 4000 or "Traceback" in said or (place / "out").exists() or answer.out:
            return f"no clean refusal: {answer}", False
        return "", False
    if answer.code != 0 or answer.err:
        return f"neither merged nor refused: {answer}", False
    try:
        assert (place / "out").exists() != attempt.dry
        check(place, answer.out, attempt.dry)
    except Exception:  # noqa: BLE001 - likewise
        return traceback.format_exc(), True
    return "", True


def contents(place: Path) -> dict[Path, bytes]:
    """Return every file and folder below a place, with what the files hold."""
    return {path.relative_to(place): path.read_bytes() if path.is_file() else b"" for path in place.rglob("*")}
