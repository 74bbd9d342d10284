"""Copies of recipes run where they lie: their paths are right there, nothing of the user's is replaced."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rewarded_lines.errors import UserError
from rewarded_lines.projects import PROJECT_FILE, load_project, named_places
from rewarded_lines.recipe_files import copy_recipes, files_root, recipes

ROOT = Path(__file__).parents[1]
TASKS = sorted(path.name for path in (ROOT / "recipes/configs").iterdir() if path.is_dir())
# Lists, copies, then prints the heavy modules that this took, and where files are, the demo's too.
IN_THE_WHEEL = """\
import json, sys
import rewarded_lines
from rewarded_lines.cli import main
for words in (["recipes", "--json"], ["recipes"], ["recipes", "copy", "sft", "dpo", "--task", "summary"]):
    sys.argv = ["rewarded-lines", *words]
    main()
heavy = {"torch", "transformers", "pyarrow", "numpy", "trl"} & set(sys.modules)
from rewarded_lines.demo.pipeline import DemoSettings
demo = DemoSettings("x")
print(json.dumps([sorted(heavy), [rewarded_lines.__file__, str(demo.configs / "ppo.yaml"), str(demo.suite)]]))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def texts(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_every_recipe_and_config_of_the_checkout_is_there():
    found = recipes()
    assert files_root() == ROOT and set(found) == {path.stem for path in (ROOT / "recipes").glob("*.py")}
    configs = {path for one in found.values() for path in one.configs.values()}
    assert {path.parent.name for path in configs} == set(TASKS)
    assert configs == set(ROOT.glob("recipes/configs/*/*.yaml")) and {path.parent.name for path in configs} == set(
        TASKS
    )
    assert all(one.about.endswith(".") and "\n" not in one.about for one in found.values())


@pytest.mark.parametrize("task", TASKS)
def test_all_that_a_tasks_copies_name_is_there(task, here):
    names = [one.name for one in recipes().values() if task in one.configs]
    copied = copy_recipes(names, task)
    files = texts(here)
    assert set(copied.written) == set(files) and copied.kept == []
    project = load_project(here / PROJECT_FILE)
    places = [file for _, kind, file in named_places(project.config.model_dump(mode="json")) if kind == "code"]
    for name, text in files.items():
        # The papers' own repositories have such paths, too.
        ours = re.sub(r"(alignment-handbook|RiC|Rewarded Soups|RS|PARM)\b.*", "", text)
        assert not re.findall(r"recipes/(?:configs|accelerate|\w+\.py)|eval/suites|\.\./|runs/" + task, ours), name
        places += re.findall(r"[\w/]*configs/[\w/]+\.(?:yaml|py|jinja)", ours)
    assert len(places) >= 2 * len(names) and [place for place in places if not (here / place).is_file()] == []
    for name, run in zip(names, copied.runs, strict=True):
        config = yaml.safe_load(files[f"configs/{task}/{name}.yaml"])
        assert run.command.startswith(f"accelerate launch {name}.py --config configs/{task}/{name}.yaml")
        assert f"    {run.command}\n" in files[f"{name}.py"]
        assert not Path(config["output_dir"]).is_relative_to("runs") and config["project_file"] == PROJECT_FILE
        # Nothing but paths and examples has changed.
        source = (ROOT / f"recipes/{name}.py").read_text()
        assert files[f"{name}.py"].partition("from __future__")[2] == source.partition("from __future__")[2]


def test_without_a_task_a_recipe_gets_the_demos_config_alone(here):
    copied = copy_recipes(["rloo"])
    machines = [f"configs/accelerate/{path.name}" for path in sorted(ROOT.glob("recipes/accelerate/*"))]
    assert copied.written == ["rloo.py", "configs/demo/rloo.yaml", *machines]
    (run,) = copied.runs
    assert [lack.partition(" (")[0] for lack in run.lacks] == [
        "data/train.jsonl, data/validation.jsonl",
        "positive under `rewards` in rewarded-lines.yaml",
        "`base` in rewarded-lines.yaml",
    ]


def test_the_command_takes_a_reward_of_the_users_project(here):
    rewards = "{fluent: {function: length, role: audit}, brief: {function: length}}"
    (here / PROJECT_FILE).write_text(f"base: sft\nrewards: {rewards}\n")
    (run,) = copy_recipes(["rloo"]).runs
    assert run.command.endswith("rloo.yaml --reward brief --output_dir policies-rloo/brief")
    assert len(run.lacks) == 1 and run.lacks[0].startswith("data/train.jsonl")


def test_a_script_of_another_task_stays_if_the_user_has_not_changed_it(here):
    copy_recipes(["ppo", "reward"])
    script = (here / "ppo.py").read_text()
    copied = copy_recipes(["ppo", "sft"], "summary")
    assert {"sft.py", "configs/summary/ppo.yaml"} <= set(copied.written) and "ppo.py" not in copied.written
    assert (here / "ppo.py").read_text() == script and copy_recipes(["ppo"]).written == []
    (here / "ppo.py").write_text(script + "# mine\n")
    with pytest.raises(UserError, match=r"ppo.py: the file exists and differs"):
        copy_recipes(["ppo"], "assistant")
    assert "ppo.py" in copy_recipes(["ppo"], "assistant", overwrite=True).written


def test_the_hint_makes_the_packages_data(here):
    words = " ".join(["word"] * 30)
    stanzas = [f"Package: p{n}\nDescription-md5: x\nDescription-en: about {n}\n {words} {n}\n" for n in range(80)]
    (here / "index").write_text("\n".join(stanzas))
    (run,) = copy_recipes(["sft"], "smollm2").runs
    (command,) = re.findall(r"`(python .*)`", run.lacks[0])
    subprocess.run([sys.executable, *command.replace("FILE", "index").split()[1:]], check=True, capture_output=True)
    assert not [lack for lack in copy_recipes(["sft"], "smollm2").runs[0].lacks if "data/" in lack]
    copy_recipes(["dpo", "reward"], "smollm2")
    # Nothing sends the reader to a page that is not copied.
    assert not [name for name, text in texts(here).items() if re.search(r"README", text)]


def test_what_another_recipe_makes_is_named(here):
    reward, ppo = copy_recipes(["reward", "ppo"], "demo").runs
    assert "sft (the recipe sft makes it)" in reward.lacks
    assert "rewards/positive (the recipe reward makes it)" in ppo.lacks
    (here / "rewards/positive").mkdir(parents=True)
    assert len(copy_recipes(["ppo"], "demo").runs[0].lacks) == len(ppo.lacks) - 1


def test_nothing_of_the_users_is_replaced(here, cli):
    copy_recipes(["sft"], "summary")
    own = {PROJECT_FILE: "base: mine\n", "configs/summary/rows.py": "# mine\n", "configs/summary/ppo.yaml": "# mine\n"}
    for name, text in own.items():
        (here / name).write_text(text)
    before = texts(here)
    refused = cli("recipes", "copy", "dpo", "ppo", "--task", "summary")
    assert refused.code == 1 and "configs/summary/ppo.yaml: the file exists and differs" in refused.err
    assert "pass --overwrite" in refused.err and texts(here) == before
    copied = copy_recipes(["dpo", "ppo"], "summary", overwrite=True)
    assert set(copied.written) == {"dpo.py", "ppo.py", "configs/summary/ppo.yaml"}
    assert set(copied.kept) == set(own) - {"configs/summary/ppo.yaml"}
    assert (here / PROJECT_FILE).read_text() == "base: mine\n"
    assert copy_recipes(["dpo", "ppo"], "summary").written == []


@pytest.mark.parametrize("at", ["configs", "ppo.py/inner", PROJECT_FILE])
def test_all_files_or_none(here, at):
    # A file in the place of a folder, a folder in the place of a file, a project that cannot be read.
    (here / at).parent.mkdir(exist_ok=True)
    (here / at).write_text("polices: {}\n")
    before = texts(here)
    with pytest.raises(UserError, match="in the place of|unknown key|extra"):
        copy_recipes(["sft", "ppo"])
    assert texts(here) == before


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["ppoo"], ["no recipe `ppoo`", "expected: dpo, ", "did you mean `ppo`?"]),
        (["ppo", "--task", "sumary"], ["no task `sumary`", "assistant, demo", "did you mean `summary`?"]),
        (["sft", "--task", "chat"], ["sft has no config for chat", "expected: assistant, demo, smollm2, summary"]),
    ],
)
def test_unknown_names(args, said, here, cli):
    answer = cli("recipes", "copy", *args)
    assert answer.code == 1 and all(part in answer.err for part in said) and texts(here) == {}


def test_the_list(cli, here):
    text = cli("recipes").out
    assert all(f"\n{name} " in text for name in recipes()) and "README.md" in text
    found = json.loads(cli("recipes", "--json").out)
    assert [one["name"] for one in found] == list(recipes())
    assert all(Path(path).is_file() for one in found for path in [one["script"], *one["configs"].values()])
    copied = json.loads(cli("recipes", "copy", "reward", "--json").out)
    assert copied["written"][0] == "reward.py" and copied["runs"][0]["command"].startswith(
        "accelerate launch reward.py"
    )
    assert cli("recipes", "copy", "reward", "--quiet").out.endswith(copied["runs"][0]["command"] + "\n")
    assert "no command `cpy`" in cli("recipes", "cpy").err


def test_a_wheel_has_them(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling, which builds the wheel, is not installed")
    target, folder, other = (tmp_path / name for name in ("target", "empty", "other"))
    folder.mkdir()
    build = ["hatchling", "build", "-t", "wheel", "-d", tmp_path]
    subprocess.run([sys.executable, "-m", *map(str, build)], cwd=ROOT, check=True, capture_output=True)
    install = ["pip", "install", "--no-deps", "--no-index", "--no-compile", "--target", target, *tmp_path.glob("*.whl")]
    subprocess.run([sys.executable, "-m", *map(str, install)], check=True, capture_output=True)
    how = {"cwd": folder, "env": os.environ | {"PYTHONPATH": str(target)}, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", IN_THE_WHEEL], **how)
    assert done.returncode == 0, done.stderr
    listed, end = json.JSONDecoder().raw_decode(done.stdout)
    *lines, last = done.stdout[end:].splitlines()
    assert [one["name"] for one in listed] == list(recipes())
    assert "accelerate launch sft.py --config configs/summary/sft.yaml" in lines
    # Light, and nothing is from the checkout.
    heavy, paths = json.loads(last)
    assert heavy == [] and len(paths) == 3
    for path in [*paths, *(one["script"] for one in listed)]:
        assert Path(path).is_file() and Path(path).is_relative_to(target)
    copy_recipes(["sft", "dpo"], "summary", other)
    assert texts(folder) == texts(other)
