"""Every ready config is run by its recipe for two steps, and so is every command of the ready configs' README.

A hub on the loopback interface has tiny models and data under the ids of the real ones; only sizes are overridden.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ready_tasks
import yaml
from stand_in_hub import stand_in_hub

from rewarded_lines.projects import load_project

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs"
SUITES = {"assistant": "assistant", "smollm2": "packages", "summary": "summary"}
# The demo's configs are run in test_recipes.py.
READY = [path for task in SUITES for path in sorted((CONFIGS / task).glob("*.yaml"))]
BLOCKS = re.findall(r"```bash\n(.*?)```", (CONFIGS / "README.md").read_text(), re.DOTALL)
SHOWN = [line for block in BLOCKS for line in block.splitlines() if line.startswith(("accelerate", "rewarded-lines"))]
# A config says itself how it is run.
REST = [path.read_text().splitlines()[0].removeprefix("# ") for path in READY]
COMMANDS = SHOWN + [command for command in REST if not any(command.split()[4] in shown for shown in SHOWN)]


def test_none_is_overlooked():
    found = {path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "demo"}
    assert found == set(READY) and len(READY) == 14
    assert all(sum(str(path.relative_to(ROOT)) in command for command in COMMANDS) for path in READY)
    assert len(SHOWN) == 18 and len(COMMANDS) == 26


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder where all of them ran, as in a checkout, and what went wrong in each."""
    place = tmp_path_factory.mktemp("checkout")
    for name in ("recipes", "eval"):
        (place / name).symlink_to(ROOT / name)
    for task, suite in SUITES.items():
        (place / "runs" / task).mkdir(parents=True)
        text = (ROOT / "eval" / "suites" / f"{suite}.yaml").read_text()
        (place / "runs" / task / "rewarded-lines.yaml").write_text(text)
    ready_tasks.make_packages(place / "runs" / "smollm2" / "data")
    ready_tasks.make_hub(place / "hub")
    with stand_in_hub(place / "hub") as hub:
        places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
        # Threads that wait for one another cost more than such small models do.
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        # The tasks at the same time, since they have nothing in common.
        with ThreadPoolExecutor() as pool:
            of_tasks = pool.map(lambda task: run(task, place, {**os.environ, **places, **quiet}), SUITES)
            return place, {command: fault for faults in of_tasks for command, fault in faults.items()}


def run(task, place, environment):
    """Run the commands of a task one after another, and return what went wrong in each."""
    commands = [command for command in COMMANDS if f"/{task}/" in command]
    done = subprocess.run(
        [sys.executable, ready_tasks.__file__, *commands],
        env=environment,
        cwd=place,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(commands, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs(ran, command):
    _, faults = ran
    assert not faults[command], faults[command]


@pytest.mark.parametrize("path", READY, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_config_leaves_a_model_in_its_place(ran, path):
    place, _ = ran
    config = yaml.safe_load(path.read_text())
    task = f"runs/{path.parent.name}"
    assert config["project_file"] == f"{task}/rewarded-lines.yaml" and config["output_dir"].startswith(f"{task}/")
    assert json.loads((place / config["output_dir"] / "training.json").read_text())["complete"]
    project = load_project(place / config["project_file"]).config
    if path.stem == "sft":
        assert project.base == "sft"
    elif path.stem == "reward":
        assert project.rewards[config["reward_name"]].template == config["template"]
    else:
        assert config["reward"] in project.policies and config["output_dir"].endswith("/" + config["reward"])


@pytest.mark.parametrize("task", SUITES)
def test_a_task_ends_in_a_report(ran, task):
    place, _ = ran
    folder = place / "runs" / task
    assert len(load_project(folder / "rewarded-lines.yaml").config.policies) == 2
    assert (folder / "merged" / "merge.json").is_file() and (folder / "sweep" / "report" / "table.md").is_file()


def test_the_summary_model_keeps_the_template(ran):
    place, _ = ran
    template = (CONFIGS / "summary" / "template.jinja").read_text()
    assert (place / "runs/summary/sft/chat_template.jinja").read_text() == template
