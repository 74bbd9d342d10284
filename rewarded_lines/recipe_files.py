"""The recipes' files: where they are, which there are, and copies that run in a folder of the user's.

In a checkout they are `recipes/` and `eval/suites/` at its top. A wheel holds both below `rewarded_lines/shipped/`.
A copy makes the user's folder what `runs/TASK` is in a checkout: its project file and models lie at the top.
"""

from __future__ import annotations

import ast
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rewarded_lines.config import ProjectConfig
from rewarded_lines.errors import Problem, UserError, did_you_mean, fail
from rewarded_lines.extras import INSTALL_REVIEWS
from rewarded_lines.projects import PROJECT_FILE, check_project, load_project

DEMO = "demo"
_PACKAGE = Path(__file__).resolve().parent
# Suites that have another name than their task.
_SUITES = {DEMO: "movie_reviews", "smollm2": "packages"}
# Where the files of a checkout are in a copy.
_MOVES = (
    (r"(?<![\w./-])(?:\.\./\.\./)?recipes/(?=configs/)", ""),
    (r"(?<![\w./-])recipes/(?=accelerate/)", "configs/"),
    (r"(?<![\w./-])recipes/(?=\w+\.py\b)", ""),
    (r"(?<![\w./-])(?:\.\./\.\./)?eval/suites/", ""),
)
# What makes the data of a task that no page of the Hub has.
_DEMO_DATA = "rewarded-lines demo --until data --out demo-data && cp -r demo-data/data ."
_DATA = {
    DEMO: f" (`{INSTALL_REVIEWS} && {_DEMO_DATA}` makes them)",
    "smollm2": " (`python configs/smollm2/packages.py FILE data` makes them; its first lines say what FILE is)",
}
# A command in a recipe's docstring, with the lines in which it goes on.
_EXAMPLE = re.compile(r"^    accelerate launch .*\n(?:        .*\n)*", re.MULTILINE)


@dataclass(frozen=True)
class Recipe:
    """A training script, what it does in one sentence, and its ready config for each task."""

    name: str
    about: str
    script: Path
    configs: Mapping[str, Path]


@dataclass(frozen=True)
class RecipeRun:
    """The command that runs a copied recipe, and what the folder still lacks for it."""

    command: str
    lacks: list[str]


@dataclass(frozen=True)
class CopiedRecipes:
    """The files that a copy wrote, those that stay as the user has them, and how each recipe is run."""

    written: list[str]
    kept: list[str]
    runs: list[RecipeRun]


def files_root() -> Path:
    """Return the folder that holds `recipes/` and `eval/suites/`: the checkout, or the wheel's own copy of both."""
    shipped = _PACKAGE / "shipped"
    return shipped if shipped.is_dir() else _PACKAGE.parent


def recipes() -> dict[str, Recipe]:
    """Return the recipes by name.

    Raises:
        UserError: this installation has none.
    """
    folder = files_root() / "recipes"
    found = {}
    for script in sorted(folder.glob("*.py")):
        configs = {path.parent.name: path for path in sorted(folder.glob(f"configs/*/{script.stem}.yaml"))}
        found[script.stem] = Recipe(script.stem, _first_sentence(script), script, configs)
    if not found:
        raise fail("this installation holds no recipes", where=str(folder), remedy="install rewarded-lines again")
    return found


def copy_recipes(
    names: Sequence[str], task: str | None = None, folder: Path | str = ".", overwrite: bool = False
) -> CopiedRecipes:
    """Copy recipes and their configs into a folder, where `accelerate launch NAME.py` runs them.

    The folder gets NAME.py, configs/TASK/NAME.yaml and configs/accelerate/. With a task also all else that belongs to
    it: its other configs, row functions and chat template, and its rewards and prompts as rewarded-lines.yaml. All
    paths in the copies are right there. Either all files are written or none.

    Args:
        names: of the recipes.
        task: whose configs; by default the demo's, without its rewards and prompts.
        folder: where.
        overwrite: replace NAME.py and configs/TASK/NAME.yaml if they differ. Nothing else is ever replaced.

    Raises:
        UserError: a recipe or task is unknown, a recipe has no config for the task, a file is in the way, or the
            folder's own project file cannot be read.
    """
    chosen, folder = [_known(name) for name in dict.fromkeys(names)], Path(folder)
    asked, along = _asked(chosen, task or DEMO, folder), _along(task)
    _refuse_collisions(folder, asked, along, overwrite)
    text = "" if (folder / PROJECT_FILE).exists() else along.get(PROJECT_FILE, "")
    project = _project(folder / PROJECT_FILE, text)
    written = {name: text for name, text in asked.items() if _differs(folder / name, text)}
    written |= {name: text for name, text in along.items() if name not in asked and not (folder / name).exists()}
    _write_all(folder, written)
    runs = [_run(one, task or DEMO, folder, project) for one in chosen]
    kept = [name for name, text in along.items() if name not in asked | written and _differs(folder / name, text)]
    return CopiedRecipes(list(written), kept, runs)


def _first_sentence(script: Path) -> str:
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", paragraph)[0]


def _known(name: str) -> Recipe:
    known = recipes()
    if name not in known:
        remedy = did_you_mean(name, known, "see `rewarded-lines recipes`")
        raise fail(f"no recipe `{name}`", where="recipes copy", expected=", ".join(known), remedy=remedy)
    return known[name]


def _config(recipe: Recipe, task: str) -> Path:
    if task not in recipe.configs:
        tasks = {task for one in recipes().values() for task in one.configs}
        what = f"{recipe.name} has no config for {task}" if task in tasks else f"no task `{task}`"
        known = ", ".join(recipe.configs)
        raise fail(what, where="--task", expected=known, remedy=did_you_mean(task, recipe.configs))
    return recipe.configs[task]


def _asked(chosen: Sequence[Recipe], task: str, folder: Path) -> dict[str, str]:
    """Return the files of these recipes alone, by their place in a copy: scripts and configs.

    Copies of a script differ with the task in the examples only, so one for another task stays in the folder.
    """
    found = {}
    for recipe in chosen:
        name, config = f"{recipe.name}.py", _moved(_config(recipe, task), task)
        copies = {one: _script(recipe, one) for one in recipe.configs}
        found[name] = next((text for text in copies.values() if not _differs(folder / name, text)), copies[task])
        found[f"configs/{task}/{recipe.name}.yaml"] = config
    return found


def _along(task: str | None) -> dict[str, str]:
    """Return the files that come along, by their place: for machines, and all that belongs to the task."""
    root = files_root()
    found = {f"configs/accelerate/{path.name}": path for path in sorted(root.glob("recipes/accelerate/*.yaml"))}
    if task is not None:
        belongings = sorted(path for path in root.glob(f"recipes/configs/{task}/*.*") if path.is_file())
        found |= {f"configs/{task}/{path.name}": path for path in belongings}
        suite = root / "eval" / "suites" / f"{_SUITES.get(task, task)}.yaml"
        found[PROJECT_FILE] = suite
        functions = [path for path in sorted(suite.parent.glob("*.py")) if path.name in suite.read_text("utf-8")]
        found |= {path.name: path for path in functions}
    return {name: _moved(path, task or DEMO) for name, path in found.items()}


def _moved(path: Path, task: str) -> str:
    """Return a file's text with the paths of the checkout replaced by those of a copy."""
    text = path.read_text(encoding="utf-8")
    for pattern, replacement in _MOVES:
        text = re.sub(pattern, replacement, text)
    return text.replace(f"runs/{task}/", "")


def _script(recipe: Recipe, task: str) -> str:
    """Return a recipe's script; its docstring shows the config's own command first, and no config of another task."""
    script = _moved(recipe.script, task)
    own, first = f"    {_command(_moved(recipe.configs[task], task))}\n", _EXAMPLE.search(script)

    def kept(example: re.Match[str]) -> str:
        others = set(re.findall(r"configs/(\w+)/", example[0])) - {task, "accelerate"}
        return "" if others or example[0] == own else example[0]

    start = first.start() if first else 0
    return script[:start] + (own if first else "") + _EXAMPLE.sub(kept, script[start:])


def _command(config: str) -> str:
    """Return the command in the first line of a config."""
    return config.partition("\n")[0].removeprefix("# ")


def _differs(path: Path, text: str) -> bool:
    return not path.is_file() or path.read_bytes() != text.encode()


def _refuse_collisions(folder: Path, asked: Mapping[str, str], along: Mapping[str, str], overwrite: bool) -> None:
    problems = []
    for name in {**asked, **along}:
        path = folder / name
        above = [one for one in path.parents if one.exists() and not one.is_dir()]
        if above:
            problems.append(Problem("a file is in the place of a folder", where=str(above[0]), remedy="move it"))
        elif path.is_dir():
            problems.append(Problem("a folder is in the place of a file", where=str(path), remedy="move it"))
        elif name in asked and path.exists() and _differs(path, asked[name]) and not overwrite:
            remedy = "pass --overwrite to replace it, or copy into another folder"
            problems.append(Problem("the file exists and differs; nothing was copied", where=str(path), remedy=remedy))
    if problems:
        raise UserError(dict.fromkeys(problems))


def _write_all(folder: Path, texts: Mapping[str, str]) -> None:
    """Write all texts below a folder: first beside their places, then under their names."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".recipes-") as scratch:
        for number, text in enumerate(texts.values()):
            Path(scratch, str(number)).write_text(text, encoding="utf-8")
        for number, name in enumerate(texts):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Path(scratch, str(number)).replace(folder / name)


def _project(path: Path, text: str) -> ProjectConfig | None:
    """Return the project at `path`, or the one that `text` will make there; None without either."""
    if path.exists():
        return load_project(path).config
    return check_project(yaml.safe_load(text), path) if text else None


def _run(recipe: Recipe, task: str, folder: Path, project: ProjectConfig | None) -> RecipeRun:
    """Return the command of a copied config, with a reward that the folder's project has, and what is lacking."""
    config = _moved(_config(recipe, task), task)
    command, settings = _command(config), yaml.safe_load(config)
    project = project or ProjectConfig()
    known = project.objectives
    wanted = [settings["reward"]] if settings.get("reward") else list(settings.get("rewards") or ())
    if len(wanted) == 1 and known and wanted[0] not in known:
        output = Path(settings["output_dir"]).with_name(known[0])
        command = command.replace(f"--reward {wanted[0]}", f"--reward {known[0]} --output_dir {output}")
        wanted = known[:1]
    return RecipeRun(command, list(_lacks(settings, task, folder, project, wanted)))


def _lacks(
    settings: Mapping[str, Any], task: str, folder: Path, project: ProjectConfig, wanted: Sequence[str]
) -> Iterator[str]:
    """Yield what a config reads and the folder does not have; `wanted` are the rewards that it trains for."""
    files = [str(settings[key]) for key in ("train_file", "validation_file") if key in settings]
    if missing := [name for name in files if not (folder / name).exists()]:
        yield ", ".join(missing) + _DATA.get(task, "")
    if unknown := [name for name in wanted if name not in project.rewards]:
        yield f"{', '.join(unknown)} under `rewards` in {PROJECT_FILE}"
    makers = _makers(task)
    used = [
        settings.get("model_name_or_path"),
        *(project.rewards[name].model for name in wanted if name not in unknown),
    ]
    for model in used:
        if model in makers and not (folder / str(model)).exists():
            yield f"{model} (the recipe {makers[model]} makes it)"
    if wanted and not settings.get("model_name_or_path") and not project.base:
        yield f"`base` in {PROJECT_FILE}" + (" (the recipe sft makes it)" if "sft" in makers.values() else "")


def _makers(task: str) -> dict[str | None, str]:
    """Return the recipe that makes each output of a task's configs, by the output's place in a copy."""
    configs = {one.name: one.configs[task] for one in recipes().values() if task in one.configs}
    return {yaml.safe_load(_moved(path, task))["output_dir"]: name for name, path in configs.items()}
