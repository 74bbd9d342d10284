"""Commands side by side: their steps are told, and one that fails stops the others and shows its log."""

import sys

import pytest
from progress_told import Told

from rewarded_lines.demo.jobs import run_jobs
from rewarded_lines.errors import UserError

STEPS = """\
import json, os, time
for step in (3, 5, 10):
    with open(os.environ["REWARDED_LINES_PROGRESS"], "a") as file:
        file.write(json.dumps({"step": step, "max_steps": 10}) + "\\n")
    time.sleep(0.5)
"""
ENDS = (".log", ".jsonl")
FAILS = "print('what went wrong'); raise SystemExit(3)"


def command(code):
    return [sys.executable, "-c", code]


def test_steps_are_told_once_and_those_of_a_checkpoint_are_not_counted(tmp_path):
    told = {name: Told() for name in ("ppo a.b", "ppo c")}
    (tmp_path / "ppo-c.jsonl").write_text('{"step": 9, "max_steps": 9}\n')
    run_jobs({name: command(STEPS) for name in told}, tmp_path, told.__getitem__)
    for one in told.values():
        assert sum(count for count, _ in one.finished) == 10 and one.totals == [10] and one.steps == {"training": True}
    assert {path.name for path in tmp_path.iterdir()} == {f"ppo-{name}{end}" for name in ("a.b", "c") for end in ENDS}


def test_a_failure_stops_the_others_and_shows_the_log(tmp_path):
    with pytest.raises(UserError, match="(?s)bad: the stage failed with exit code 3.*what went wrong.*bad.log"):
        run_jobs(
            {"long": command("import time; time.sleep(100)"), "bad": command(FAILS)}, tmp_path, lambda name: Told()
        )
