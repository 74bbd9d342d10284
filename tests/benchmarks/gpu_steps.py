"""The steps of gpu_check.py; each runs as a process of its own: `gpu_steps.py STEP WORK ROWS [--tiny]`.

A step writes each figure to ROWS as soon as it has it, so that a step that is ended has lost nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))
COMMAND = (
    sys.executable,
    "-c",
    "import sys; sys.argv[0] = 'rewarded-lines'; from rewarded_lines.cli import main; main()",
)
# Seconds wanted for a swap of 3B parameters, by where the models wait.
WANTED = {"gpu": 0.3, "host": 1.5, "disk": None}
LEVELS = ("gpu", "host", "disk")
RECIPES = ("ppo", "rloo", "grpo", "dpo")
# The tests need no project file of pytest: a bare machine may lack the plugins that ours names.
PYTEST = """\
[pytest]
pythonpath = {root}/tests
addopts = --strict-markers --import-mode=importlib -p no:cacheprovider
markers =
    slow: takes long
    nightly: takes very long
    gpu: needs a GPU
    network: needs the network
"""


class Step:
    """Where a step works, what it measures with, and where its figures go."""

    def __init__(self, work: Path, rows: Path, tiny: bool) -> None:
        """Choose sizes: large ones in bfloat16 on a card, tiny ones in float32 for a rehearsal."""
        self.work, self.tiny, self._rows = work, tiny, rows
        self.size, self.device = ("tiny", "cpu") if tiny else ("3B", "cuda")
        self.dtype = "float32" if tiny else "bfloat16"
        self.prompts, self.tokens = (8, 8) if tiny else (200, 64)
        self.large, self.small = work / "large", work / "small"

    def tell(self, what: str, found: str, beside: str = "", wanted: str = "") -> None:
        """Write a row of the table."""
        row = {"what": what, "found": found, "beside": beside, "wanted": wanted}
        with self._rows.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")


def doctor(step: Step) -> None:
    """What the doctor finds, and what it plans for the large model."""
    done = subprocess.run([*COMMAND, "doctor", "--json"], capture_output=True, text=True, cwd=step.work)
    checks = json.loads(done.stdout)["checks"]
    broken = [one for one in checks if one["state"] == "broken"]
    step.tell("checks that are fine", f"{len(checks) - len(broken)} of {len(checks)}")
    for one in broken:
        step.tell(f"doctor: {one['name']}", one["found"].replace("\n", " ")[:200])
    planned = subprocess.run(
        [*COMMAND, "doctor", "--for", "3B", "--json"], capture_output=True, text=True, cwd=step.work
    )
    plan = json.loads(planned.stdout)
    step.tell("planned for 3B and two policies", f"resident: {plan['resident']}", f"{plan['sequences']} sequences")


def models(step: Step) -> None:
    """Write all models; the steps after this one read them."""
    from random_models import (
        ONE_B,
        THREE_B,
        TINY,
        write_classifier,
        write_policies,
        write_sweep_project,
        write_training_project,
    )

    large, small = (TINY, TINY) if step.tiny else (THREE_B, ONE_B)
    done = step.work / "models.done"
    done.unlink(missing_ok=True)
    # Files of other models would stay beside the new ones.
    for folder in (step.large, step.small):
        shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    write_policies(step.large, large, step.dtype, step.device, ("base", "first", "second"))
    step.tell(f"write three models, {step.size}", seconds(time.perf_counter() - began), size_of(step.large))
    write_classifier(step.large / "judge", small, step.dtype, step.device)
    write_sweep_project(step.large, step.dtype, step.prompts, step.tokens)
    write_policies(step.small, small, step.dtype, step.device, ("sft",))
    write_classifier(step.small / "rewards" / "positive", small, step.dtype, step.device)
    write_training_project(step.small, 64 if step.tiny else 512)
    done.write_text(step.size)


def tests(step: Step) -> None:
    """The tests with the marker `gpu`; in a rehearsal with the CPU as their device."""
    if find_spec("pytest") is None:
        step.tell("pytest", "not installed: no test ran")
        sys.exit(1)
    settings = step.work / "pytest.ini"
    settings.write_text(PYTEST.format(root=ROOT))
    # To collect all tests takes as long as to run these.
    files = [path for path in sorted((ROOT / "tests").glob("*/test_*.py")) if "mark.gpu" in path.read_text()]
    words = [sys.executable, "-m", "pytest", "-c", settings, "--rootdir", ROOT, *files, "-m", "gpu", "-v", "--tb=short"]
    words += ["--rehearse"] if step.tiny else []
    counts: Counter[str] = Counter()
    with subprocess.Popen(list(map(str, words)), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            sys.stdout.write(line)
            sys.stdout.flush()
            if found := re.match(r"(\S+::.*) (PASSED|FAILED|ERROR|SKIPPED)", line):
                counts[found[2]] += 1
                if found[2] in ("FAILED", "ERROR"):
                    step.tell(found[1], "failed")
    step.tell("pytest -m gpu", f"{counts['PASSED']} passed", f"{counts['SKIPPED']} skipped", "passed, no failure")
    # Without a card that torch can use, all are skipped.
    sys.exit(process.returncode or int(not counts["PASSED"]))


def merge(step: Step) -> None:
    """A merge of the large model by CPU and card, beside `cp`, with their bits: whole processes, warm page cache."""
    from measure import clear, run_once, warm

    inputs = [step.large / name for name in ("base", "first", "second")]
    policies = [word for path in inputs[1:] for word in ("--policy", path)]
    base, out = ["merge", "--base", inputs[0], *policies, "--lam", "0.3"], step.work / "merged"
    ways: dict[str, Sequence[Any]] = {"cp -r of one model": ("cp", "-r", inputs[0], out)}
    for device in ("cpu", *([] if step.tiny else ["cuda"])):
        ways[f"merge --device {device}"] = (*COMMAND, *base, "--device", device, "--out", out)
    peer, digests = 0.0, {}
    for name, command in ways.items():
        clear(out)
        warm(inputs)
        run = run_once(command, dict(os.environ))
        digests[name] = weights_of(out)
        peer = peer or run.seconds
        step.tell(name, seconds(run.seconds), f"{run.seconds / peer:.1f} × cp, peak {run.peak / 1e9:.1f} GB")
    clear(out)
    merged = [digest for name, digest in digests.items() if name.startswith("merge")]
    # A rehearsal has one merge: nothing to compare.
    if len(merged) > 1:
        step.tell("bits of the merges", "the same" if len(set(merged)) == 1 else "DIFFERENT", wanted="the same")
    sys.exit(int(len(set(merged)) > 1))


def swaps(step: Step) -> None:
    """Seconds of a swap from each place where the models may wait, and tokens a second, in one engine."""
    from random_models import sentences

    from rewarded_lines.config import GenerationSpec
    from rewarded_lines.engine_settings import EngineSettings
    from rewarded_lines.engines.load_engine import load_generator
    from rewarded_lines.engines.vllm_models import plan_message
    from rewarded_lines.merger.open_inputs import plan_merge

    prompts = sentences(8 if step.tiny else 256, 32)
    spec = GenerationSpec(temperature=1.0, max_tokens=8 if step.tiny else 128, dtype=step.dtype)
    base, *policies = (str(step.large / name) for name in ("base", "first", "second"))
    plan = plan_merge(base, dict(zip(("first", "second"), policies, strict=True)), dtype=step.dtype)
    settings = EngineSettings.model_validate({"resident": LEVELS[0], "enforce_eager": step.tiny})
    began = time.perf_counter()
    engine: Any = load_generator("vllm", base, spec, prompts, plan=plan, settings=settings)
    step.tell("start of the engine", seconds(time.perf_counter() - began), "; ".join(engine.told))
    speed(step, engine, prompts, spec)
    failed = []
    for turn, level in enumerate(LEVELS):
        try:
            # The engine has left room for the first level, so the others fit, too.
            engine.call("open_plan", plan_message(plan), level)
            swap(step, engine, prompts[:1], spec.model_copy(update={"max_tokens": 1}), turn)
        except Exception as error:  # noqa: BLE001 - whatever it is, the next place is measured, too
            step.tell(f"swap, resident: {level}", f"failed: {type(error).__name__}: {str(error)[:150]}")
            failed.append(level)
    engine.close()
    sys.exit(1 if failed else 0)


def swap(step: Step, engine: Any, prompts: Sequence[str], spec: Any, turn: int) -> None:
    """Measure swaps from one place; the first one loads the models."""
    from rewarded_lines.merger.spec import MergeSpec

    level, taken = LEVELS[turn], []
    for number in range(4):
        share = (1 + number + 4 * turn) / 16
        before = engine.swap_seconds
        engine.generate(prompts, spec, [MergeSpec((share, 1 - share))])
        taken.append(engine.swap_seconds - before)
    wanted = f"≤ {WANTED[level]} s on an H100" if WANTED[level] else ""
    step.tell(f"swap, resident: {level}", seconds(median(taken[1:])), f"the first {seconds(taken[0])}", wanted)


def speed(step: Step, engine: Any, prompts: Sequence[str], spec: Any) -> None:
    """Tokens a second of one batch, and of scoring it."""
    engine.generate(prompts[:4], spec)
    began = time.perf_counter()
    (answers,) = engine.generate(prompts, spec)
    taken = time.perf_counter() - began
    count = sum(len(answer.tokens) for answer in answers)
    step.tell(f"tokens a second, {len(prompts)} prompts", f"{count / taken:,.0f}")
    pairs = [(head, answer.tokens) for head, answer in zip(engine.encode(prompts), answers, strict=True)]
    began = time.perf_counter()
    engine.logprobs(pairs)
    taken = time.perf_counter() - began
    step.tell("tokens a second when scored", f"{sum(len(a) + len(b) for a, b in pairs) / taken:,.0f}")


def sweep(step: Step) -> None:
    """A sweep of 11 λ with a function and a classifier."""
    out = step.work / "sweep"
    words = ["sweep", "--config", step.large / "rewarded-lines.yaml", "--out", out, "--overwrite"]
    began = time.perf_counter()
    subprocess.run([*COMMAND, *map(str, words)], check=True)
    whole = time.perf_counter() - began
    header = json.loads((out / "run.json").read_text())
    spent = header["seconds_last"]
    points = header["evaluated_last"]
    step.tell(f"sweep, {points} points × {step.prompts} prompts", seconds(whole), f"engine {seconds(spent['engine'])}")
    for part in ("generate", "score", "swap"):
        step.tell(f"sweep: {part}", seconds(spent[part]), f"{seconds(spent[part] / points)} a point")


def recipes(step: Step) -> None:
    """A training step of each recipe with LoRA, beside the bare TRL trainer."""
    settings: dict[str, Any] = {
        "use_peft": True, "lora_r": 16, "lora_alpha": 32, "learning_rate": 1e-4, "validation_limit": 8,
        "train_limit": 64,
    }  # fmt: skip
    settings |= {} if step.tiny else {"dtype": "bfloat16", "bf16": True}
    with ThreadPoolExecutor(2 if step.tiny else 1) as pool:
        done = list(pool.map(lambda name: recipe(step, name, settings), RECIPES))
    sys.exit(0 if all(done) else 1)


def recipe(step: Step, name: str, settings: dict[str, Any]) -> bool:
    """Measure one recipe; return whether it ran."""
    file, what = step.work / f"{name}.json", f"step of {name}, LoRA"
    words = [Path(__file__).with_name("recipe_overhead.py"), "--only", name, "--rounds", 1]
    words += ["--steps", 4 if step.tiny else 8, "--models", step.small, "--settings", json.dumps(settings)]
    if subprocess.run([sys.executable, *map(str, words), "--json", str(file)], cwd=ROOT).returncode:
        step.tell(what, "failed")
        return False
    (row,) = json.loads(file.read_text())
    if row["bare"] is None:
        step.tell(what, seconds(row["ours"]), "no peer in TRL")
    else:
        beside = f"bare TRL {seconds(row['bare'])}, ratio {row['ours'] / row['bare']:.2f}"
        step.tell(what, seconds(row["ours"]), beside, "≤ 1.05 × TRL")
    return True


def weights_of(folder: Path) -> str:
    """Return a hash of the tensors in a folder."""
    from rewarded_lines.checkpoints.hashing import file_hash

    return " ".join(file_hash(path) for path in sorted(folder.glob("*.safetensors")))


def seconds(value: float) -> str:
    """Return seconds as text."""
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def size_of(folder: Path) -> str:
    """Return the bytes below a folder as text."""
    return f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e9:.1f} GB"


STEPS: dict[str, Callable[[Step], None]] = {
    "doctor": doctor,
    "models": models,
    "tests": tests,
    "merge": merge,
    "swaps": swaps,
    "sweep": sweep,
    "recipes": recipes,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("work", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    STEPS[given.step](Step(given.work.absolute(), given.rows.absolute(), given.tiny))
