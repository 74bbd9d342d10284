"""A copied recipe trains in a folder of the user's, by the command that `rewarded-lines recipes copy` printed."""

import json
import runpy
import shlex
import shutil

import pytest
from small_recipes import SMALL

from rewarded_lines.projects import load_project


@pytest.mark.parametrize("name", ["sft", "rloo"])
def test_the_printed_command_trains(name, work, cli, monkeypatch):
    monkeypatch.chdir(work)
    small = {key: value for key, value in SMALL[name].items() if key != "reward"}
    if name == "sft":
        # It needs nothing but data, and makes the project.
        shutil.rmtree(work / "sft")
        (work / "rewarded-lines.yaml").unlink()
        small |= {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 300}
    answer = cli("recipes", "copy", name)
    (command,) = [line for line in answer.out.splitlines() if line.startswith("accelerate launch ")]
    assert "needed first" not in answer.out
    _, _, script, *words = shlex.split(command)
    runpy.run_path(script)["main"](
        [*words, *(word for key, value in small.items() for word in (f"--{key}", str(value)))]
    )
    output = "sft" if name == "sft" else "policies-rloo/detailed"
    assert json.loads((work / output / "training.json").read_text())["recipe"] == name
    project = load_project(work / "rewarded-lines.yaml").config
    assert project.base == "sft" and project.policies == ({} if name == "sft" else {"detailed": output})
