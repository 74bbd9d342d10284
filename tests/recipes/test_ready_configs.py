"""Every ready config is run by its recipe for two steps, and so is every command of the ready configs' README.

A hub on the loopback interface has tiny models and data under the ids of the real ones; only sizes are overridden.
All are slow: recipes with small settings are run by test_recipes.py each time.
"""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import ready_chats
import ready_tasks
import yaml
from stand_in_hub import stand_in_hub

from rewarded_lines.projects import load_project

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs"
SUITES = {
    "assistant": "assistant", "chat": "chat", "helpsteer": "helpsteer", "safety": "safety", "smollm2": "packages",
    "summary": "summary",
}  # fmt: skip
# The demo's configs are run in test_recipes.py.
READY = [path for task in SUITES for path in sorted((CONFIGS / task).glob("*.yaml"))]
BLOCKS = re.findall(r"```bash\n(.*?)```", (CONFIGS / "README.md").read_text(), re.DOTALL)
SHOWN = [line for block in BLOCKS for line in block.splitlines() if line.startswith(("accelerate", "rewarded-lines"))]
# A config says itself how it is run.
REST = [path.read_text().splitlines()[0].removeprefix("# ") for path in READY]
COMMANDS = SHOWN + [command for command in REST if not any(command.split()[4] in shown for shown in SHOWN)]


def task_of(command):
    """Return the task that a command belongs to."""
    return next(task for task in SUITES if f"/{task}/" in command)


def test_none_is_overlooked():
    found = {path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "demo"}
    assert found == set(READY) and len(READY) == 21
    assert all(sum(str(path.relative_to(ROOT)) in command for command in COMMANDS) for path in READY)
    assert len(SHOWN) == 31 and len(COMMANDS) == 42


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A function that runs a task's commands once, as in a checkout, and returns the folder and each one's fault."""
    place = tmp_path_factory.mktemp("checkout")
    for name in ("recipes", "eval"):
        (place / name).symlink_to(ROOT / name)
    ready_tasks.make_packages(place / "runs" / "smollm2" / "data")
    ready_tasks.make_hub(place / "hub")
    ready_chats.make_hub(place / "hub")
    with stand_in_hub(place / "hub") as hub:
        places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
        # Threads that wait for one another cost more than such small models do.
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        yield cache(lambda task: (place, run(task, place, {**os.environ, **places, **quiet})))


def run(task, place, environment):
    """Run the commands of a task one after another, and return what went wrong in each."""
    (place / "runs" / task).mkdir(parents=True, exist_ok=True)
    text = (ROOT / "eval" / "suites" / f"{SUITES[task]}.yaml").read_text()
    small = re.sub(r"^  max_tokens: 512", "  max_tokens: 8", text, flags=re.MULTILINE)
    (place / "runs" / task / "rewarded-lines.yaml").write_text(small)
    commands = [command for command in COMMANDS if task_of(command) == task]
    done = subprocess.run(
        [sys.executable, ready_tasks.__file__, *commands],
        env=environment,
        cwd=place,
        capture_output=True,
        text=True,
        timeout=220,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(commands, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs(ran, command):
    _, faults = ran(task_of(command))
    assert not faults[command], faults[command]


@pytest.mark.slow
@pytest.mark.parametrize("path", READY, ids=[f"{path.parent.name}/{path.stem}" for path in READY])
def test_a_config_leaves_a_model_in_its_place(ran, path):
    place, _ = ran(path.parent.name)
    config = yaml.safe_load(path.read_text())
    task = f"runs/{path.parent.name}"
    assert config["project_file"] == f"{task}/rewarded-lines.yaml" and config["output_dir"].startswith(f"{task}/")
    assert json.loads((place / config["output_dir"] / "training.json").read_text())["complete"]
    project = load_project(place / config["project_file"]).config
    # A reward model's start is no base of policies.
    if "model_name_or_path" in config and path.stem not in ("sft", "reward"):
        assert project.base == config["model_name_or_path"]
    if path.stem == "sft":
        assert project.base == "sft"
    elif path.stem == "reward":
        assert project.rewards[config["reward_name"]].template == config["template"]
    else:
        name, made = (
            (config["policy_name"], project.baselines) if "rewards" in config else (config["reward"], project.policies)
        )
        assert name in made and config["output_dir"].endswith("/" + name)


@pytest.mark.slow
@pytest.mark.parametrize("task", SUITES)
def test_a_task_ends_in_a_report(ran, task):
    place, _ = ran(task)
    folder = place / "runs" / task
    assert len(load_project(folder / "rewarded-lines.yaml").config.policies) == 2
    merges = any(f"/{task}/merged" in command for command in SHOWN)
    assert (folder / "merged" / "merge.json").is_file() == merges
    assert (folder / "sweep" / "report" / "table.md").is_file()


@pytest.mark.slow
def test_the_summary_model_keeps_the_template(ran):
    place, _ = ran("summary")
    template = (CONFIGS / "summary" / "template.jinja").read_text()
    assert (place / "runs/summary/sft/chat_template.jinja").read_text() == template
