"""Every YAML of recipes and suites says what its reader understands, and opens with the command that runs it."""

import contextlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from rewarded_lines.projects import PROJECT_FILE, load_project, save_project
from rewarded_lines.rewards.load_rewards import load_rewards
from rewarded_lines.training.arguments import parse_recipe

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
READMES = [
    path.read_text(encoding="utf-8").replace("\\\n", " ")
    for path in (ROOT / "README.md", ROOT / "recipes" / "README.md")
]
DOCSTRINGS = [path.read_text(encoding="utf-8").split('"""')[1].replace("\\\\\n", " ") for path in RECIPES]
# What the READMEs and the recipes' docstrings show; inside a sentence a command ends where its code does.
SHOWN = [
    " ".join(line.split())
    for text in [*READMES, *DOCSTRINGS]
    for line in re.findall(r"^ *(accelerate launch [^`\n]+)|`(accelerate launch [^`]+)`", text, re.MULTILINE)
    for line in line
    if line
]
LAUNCHES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


def test_all_of_them_are_found():
    assert [path.stem for path in RECIPES] == ["dpo", "grpo", "ppo", "reward", "rloo", "sft"]
    assert [path.stem for path in CONFIGS if path.parent.name == "demo"] == [path.stem for path in RECIPES]
    assert {path.stem for path in CONFIGS} <= {path.stem for path in RECIPES}
    assert {path.parent.name for path in CONFIGS} == {
        "assistant", "chat", "demo", "helpsteer", "safety", "smollm2", "summary",
    }  # fmt: skip
    assert len(SHOWN) >= 20
    assert [path.stem for path in LAUNCHES] == ["cpu", "ddp", "fsdp2", "gpu", "two_nodes", "zero2", "zero3"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_config_opens_with_its_command_and_parses(path):
    shown = path.relative_to(ROOT)
    recipe = f"recipes/{path.stem}.py"
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# accelerate launch {recipe} --config {shown}")
    seen = []
    module = load(ROOT / recipe)
    module.parse_recipe = lambda *parts: seen.append(parse_recipe(*parts)) or stop()
    with pytest.raises(Stop):
        module.main(["--config", str(path)])
    parsed = {key: value for part in seen[0] for key, value in vars(part).items()}
    content = yaml.safe_load(path.read_text())
    assert parsed["output_dir"] == content["output_dir"] and seen[0].given == content.keys()
    files = [value for key, value in content.items() if key == "row_function" and ".py:" in value]
    assert all((ROOT / file.rpartition(":")[0]).is_file() for file in files)


@pytest.mark.parametrize("command", SHOWN, ids=lambda command: command[:60])
def test_a_command_that_is_shown_parses(command):
    words = shlex.split(command)
    script = next(index for index, word in enumerate(words) if word.startswith("recipes/") and word.endswith(".py"))
    launch_command_parser().parse_args(words[2:])
    module = load(ROOT / words[script])
    module.parse_recipe = lambda *parts: parse_recipe(*parts) and stop()
    with pytest.raises(Stop), contextlib.chdir(ROOT):
        module.main(words[script + 1 :])


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_accelerate_reads_its_configs_as_they_are_meant(path, monkeypatch):
    assert path.read_text().startswith("# ") and f"--config_file recipes/accelerate/{path.name}" in path.read_text()
    parser = launch_command_parser()
    given = parser.parse_args(["--config_file", str(path), "recipes/ppo.py"])
    arguments, config, _ = _validate_launch_command(given)
    kind, processes = {
        "cpu": ("MULTI_GPU", 2),
        "gpu": ("NO", 1),
        "ddp": ("MULTI_GPU", 8),
        "fsdp2": ("FSDP", 8),
        "zero2": ("DEEPSPEED", 8),
        "zero3": ("DEEPSPEED", 8),
        "two_nodes": ("MULTI_GPU", 16),
    }[path.stem]
    assert config.distributed_type == kind and arguments.num_processes == processes
    assert arguments.use_cpu == (path.stem == "cpu")
    # Every key is one that accelerate knows: a typo would be carried along in silence.
    known = set(vars(parser.parse_args(["x"])))
    for section, prefix in (("fsdp_config", "fsdp_"), ("deepspeed_config", "")):
        for key in getattr(config, section) or {}:
            assert key in known or prefix + key in known, key


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_shows_how_to_launch_it_and_stays_short(path):
    text = path.read_text()
    assert f"accelerate launch recipes/{path.name} --config recipes/configs/" in text
    assert len(text.splitlines()) <= 200


def test_the_movie_suite_is_a_project_without_models(tmp_path):
    suite = load_project(ROOT / "eval" / "suites" / "movie_reviews.yaml").config
    assert suite.base is None and suite.policies == {} and list(suite.rewards) == ["positive", "detailed"]
    (tmp_path / "movie_rewards.py").write_text((ROOT / "eval" / "suites" / "movie_rewards.py").read_text())
    save_project(tmp_path / PROJECT_FILE, suite)
    reward = load_rewards(load_project(tmp_path / PROJECT_FILE), ["detailed"])["detailed"]
    assert reward.score(["a"] * 3, ["", " two words", " word" * 50]) == [0.0, 2.0, 20.0]


class Stop(Exception):
    """Ends a recipe once its arguments are read."""


def stop():
    raise Stop


def load(path):
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
