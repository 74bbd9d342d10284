"""Child processes report their steps, stop when one fails and end with a killed pipeline."""

import os
import signal
import subprocess
import sys
import time

import pytest
from command import alive
from progress_told import Told

from rewarded_lines.demo.demo_settings import DemoSettings
from rewarded_lines.demo.parts import parts_of
from rewarded_lines.errors import UserError
from rewarded_lines.pipelines.recipe_jobs import RecipeJobs

STEPS = """\
import json, os, time
assert os.environ["HF_HUB_OFFLINE"] == "1" and int(os.environ["OMP_NUM_THREADS"]) >= 1
for step in (3, 5, 10):
    with open(os.environ["REWARDED_LINES_PROGRESS"], "a") as file:
        file.write(json.dumps({"step": step, "max_steps": 10}) + "\\n")
    time.sleep(0.5)
print("said")
"""
ENDS = (".log", ".jsonl")
WAIT = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
FAILS = """\
import pathlib, sys, time
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.02)
print(*range(40), sep=chr(10))
sys.exit(3)
"""
RUN = """\
import sys
from pathlib import Path
from rewarded_lines.pipelines.recipe_jobs import RecipeJobs
from rewarded_lines.progress import SILENT
place = Path(sys.argv[1])
RecipeJobs(place).run({"waits": [sys.executable, "-c", sys.argv[2], str(place / "pid")]}, lambda name: SILENT)
"""


def command(code, *arguments):
    return [sys.executable, "-c", code, *map(str, arguments)]


def wait_for_pid(path):
    deadline = time.monotonic() + 60
    while not (path.is_file() and path.read_text()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return int(path.read_text())


def test_steps_are_told_once_and_those_of_a_checkpoint_are_not_counted(tmp_path):
    told = {name: Told() for name in ("ppo a.b", "ppo c")}
    (tmp_path / "ppo-c.jsonl").write_text('{"step": 9, "max_steps": 9}\n')
    RecipeJobs(tmp_path).run({name: command(STEPS) for name in told}, told.__getitem__)
    for one in told.values():
        assert sum(count for count, _ in one.finished) == 10 and one.totals == [10] and one.steps == {"training": True}
    assert {path.name for path in tmp_path.iterdir()} == {f"ppo-{name}{end}" for name in ("a.b", "c") for end in ENDS}
    assert (tmp_path / "ppo-c.log").read_text() == "said\n"


def test_one_that_fails_shows_the_end_of_its_log_and_stops_the_others(tmp_path):
    jobs = {"waits": command(WAIT, tmp_path / "pid"), "fails": command(FAILS, tmp_path / "pid")}
    with pytest.raises(UserError, match="fails: the stage failed with exit code 3") as caught:
        RecipeJobs(tmp_path).run(jobs, lambda name: Told())
    told = str(caught.value)
    # Whole lines: the log's path has numbers, too.
    assert "\n    28\n" in told and "\n    39" in told and "\n    27\n" not in told and "fails.log" in told
    assert not alive(wait_for_pid(tmp_path / "pid"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's help is Linux's")
def test_a_killed_pipeline_leaves_no_job_at_work(tmp_path):
    pipeline = subprocess.Popen(command(RUN, tmp_path, WAIT))
    pid = wait_for_pid(tmp_path / "pid")
    os.kill(pipeline.pid, signal.SIGKILL)
    pipeline.wait()
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


def test_what_comes_next_waits_until_it_is_run_and_ends_with_the_jobs(tmp_path):
    waits = "import sys; print('ready', flush=True); sys.exit(0 if sys.stdin.readline() == '\\n' else 'not told')"
    with RecipeJobs(tmp_path) as jobs:
        jobs.prepare({"next": command(waits), "never": command(waits)})
        jobs.run({"now": command(STEPS)}, lambda name: Told())
        waiting = jobs._jobs["never"].process.pid
        assert (tmp_path / "next.log").read_text() == "ready\n" and alive(waiting)
        jobs.run({"next": command("raise SystemExit('not this one')")}, lambda name: Told())
    assert not alive(waiting)


def test_the_users_folder_is_not_on_the_path_of_the_demos_recipes(tmp_path):
    (tmp_path / "random.py").write_text("raise SystemError('not the library')")
    script = tmp_path / "small.py"
    script.write_text("import random, sys\nmain = print\ndef run_recipe(main): main(sys.argv[1:])\n")
    (part,) = parts_of("sft", DemoSettings(tmp_path / "run"), "")
    python = part.command[: part.command.index("--config") - 1]
    done = subprocess.run([*python, str(script), "said"], cwd=tmp_path, input="\n", capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "['said']\n", "")


def test_a_recipe_loads_waits_and_runs_as_a_program(tmp_path):
    script = tmp_path / "small.py"
    script.write_text("""\
from __future__ import annotations
import sys
from dataclasses import dataclass
from typing import Literal, get_type_hints

from rewarded_lines.training.arguments import run_recipe

print("loaded", flush=True)


@dataclass
class Options:
    kind: Literal["a", "b"] = "a"


def main(argv):
    print(get_type_hints(Options)["kind"].__args__, argv, sys.argv[0])


if __name__ == "__main__":
    run_recipe(main)
""")
    words = [sys.executable, "-m", "rewarded_lines.demo.waiting_recipe", str(script), "--kind", "b"]
    done = subprocess.run(words, input="\n", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"loaded\n('a', 'b') ['--kind', 'b'] {script}\n")


def test_a_recipe_that_is_never_told_to_run_ends(tmp_path):
    script = tmp_path / "small.py"
    script.write_text("print('loaded')\nmain = print\ndef run_recipe(main): main('run')\n")
    words = [sys.executable, "-m", "rewarded_lines.demo.waiting_recipe", str(script)]
    done = subprocess.run(words, input="", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "loaded\n")


@pytest.mark.parametrize("together", [1, 2])
def test_commands_that_share_the_cores_have_their_part_of_them(tmp_path, monkeypatch, together):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    # As `accelerate launch` passes it on.
    shell = ["bash", "-c", 'echo "threads: $OMP_NUM_THREADS"']
    with RecipeJobs(tmp_path, share_cores=True) as jobs:
        jobs.run({f"job {number}": shell for number in range(together)}, lambda _: Told())
    assert (tmp_path / "job-0.log").read_text() == f"threads: {6 // together}\n"
