"""Every YAML of recipes and suites says what its reader understands, and opens with the command that runs it."""

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml

from rewarded_lines.config import PROJECT_FILE, load_project, save_project
from rewarded_lines.evaluation.rewards import load_rewards
from rewarded_lines.training.arguments import parse_recipe

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))


def test_all_of_them_are_found():
    assert [path.stem for path in CONFIGS if path.parent.name == "demo"] == ["dpo", "ppo", "reward", "sft"]
    assert {path.stem for path in CONFIGS} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_config_opens_with_its_command_and_parses(path):
    shown = path.relative_to(ROOT)
    recipe = f"recipes/{path.stem}.py"
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# accelerate launch {recipe} --config {shown}")
    seen = []
    module = load(ROOT / recipe)
    module.parse_recipe = lambda classes, argv: seen.append(parse_recipe(classes, argv)) or stop()
    with pytest.raises(Stop):
        module.main(["--config", str(path)])
    parsed = {key: value for part in seen[0] for key, value in vars(part).items()}
    assert parsed["output_dir"] == yaml.safe_load(path.read_text())["output_dir"]


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
