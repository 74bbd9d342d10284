"""Print the files of slow tests whose subject has changed, for `.ci/run`; every night all slow tests are run.

The subject of the tests in tests/NAME/ is that folder, rewarded_lines/NAME/ and what `MORE` names. Other versions in
constraints.txt concern all. A change is what differs between the commit before the last one and the files here; of a
pull request's merge commit that is the branch it goes into. Without a commit before, nothing is printed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

TRAINING = ("recipes/", "rewarded_lines/training/", "rewarded_lines/rewards/")
MORE = {
    "evaluator": ("rewarded_lines/engines/",),
    "recipes": (*TRAINING, "eval/suites/", "tests/ready_tasks.py"),
    "demo": (*TRAINING, "rewarded_lines/pipelines/", "eval/suites/"),
    "pipelines": ("recipes/", "rewarded_lines/training/"),
    "cli": ("rewarded_lines/doctor.py",),
}
EVERYBODYS = "constraints.txt"


def subject(test: str) -> tuple[str, ...]:
    """Return the files and folders that a test file is about, each folder with a slash at its end."""
    name = test.split("/")[1]
    return (f"tests/{name}/", f"rewarded_lines/{name}/", *MORE.get(name, ()))


def chosen(tests: Iterable[str], changed: Iterable[str]) -> list[str]:
    """Return the test files that have something changed as their subject."""
    paths = list(changed)
    if EVERYBODYS in paths:
        return list(tests)
    return [test for test in tests if any(path.startswith(subject(test)) for path in paths)]


def slow_tests(root: Path) -> list[str]:
    """Return the test files that mark a test as slow, relative to the checkout."""
    files = sorted((root / "tests").glob("*/**/test_*.py"))
    return [path.relative_to(root).as_posix() for path in files if "mark.slow" in path.read_text(encoding="utf-8")]


def changed_files(root: Path) -> list[str]:
    """Return what has changed since the commit before the last one; nothing where there is none, or no git."""
    try:
        done = subprocess.run(
            ["git", "diff", "--name-only", "HEAD^1"], cwd=root, capture_output=True, text=True, check=False
        )
    except OSError:
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


if __name__ == "__main__":
    here = Path(__file__).resolve().parents[1]
    sys.stdout.write("\n".join(chosen(slow_tests(here), changed_files(here))))
