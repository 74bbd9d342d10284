"""What the README says can be done: its commands parse, its links lead somewhere, and none of them is overlooked."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer.main
import yaml

from rewarded_lines.cli import app
from rewarded_lines.config import check_project
from rewarded_lines.rules.methods import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
# A backslash at the end of a line goes on in the next one.
LINES = [
    line.split("#")[0].strip() for block in CODE for line in block.replace("\\\n", " ").splitlines() if line.strip()
]
INLINE = re.findall(r"`((?:make|rewarded-lines|accelerate launch|python) [^`]+)`", " ".join(README.split()))
COMMANDS = [command for command in [*LINES, *INLINE] if command]


def starting(word):
    return [command for command in COMMANDS if shlex.split(command)[0] == word]


def test_every_command_is_of_a_kind_that_is_checked_here():
    kinds = {shlex.split(command)[0] for command in COMMANDS}
    assert kinds <= {"make", "rewarded-lines", "accelerate", "python", "cd", "source"}, kinds
    # Without this, a newcomer's first command after `make demo` is not found.
    assert README.index("source .venv/bin/activate") < README.index("rewarded-lines merge")
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize("command", starting("make"))
def test_make_targets_exist(command):
    done = subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", starting("rewarded-lines"))
def test_commands_parse(command):
    arguments = shlex.split(command)[1:]
    group = typer.main.get_command(app)
    with group.make_context("rewarded-lines", arguments[:1] + ["--help"], resilient_parsing=True) as context:
        name, subcommand, _ = group.resolve_command(context, arguments)
        subcommand.make_context(name, arguments[1:], parent=context)


@pytest.mark.parametrize("command", [*starting("accelerate"), *starting("python")])
def test_scripts_and_configs_exist(command):
    files = [word for word in shlex.split(command) if word.endswith((".py", ".yaml")) and not word.startswith("runs/")]
    assert files and all((ROOT / file).is_file() for file in files)


def test_links_and_pictures_exist():
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert len(targets) >= 2
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_first_command_comes_early():
    assert README[: README.index("make demo")].count("\n") < 25


def test_every_method_is_in_the_table_with_its_options_and_defaults():
    rows = dict(re.findall(r"^\| `([a-z][a-z-]*)` \|.*\| ([^|]*)\|$", README, re.MULTILINE))
    written = {name: set(re.findall(r"`(--[^`]+)`", options)) for name, options in rows.items()}
    expected = {name: {f"--{key} {one.default}" for key, one in row.options.items()} for name, row in METHODS.items()}
    assert written == expected | {"greedy": {"--score"}}


def test_the_projects_shown_are_projects():
    shown = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert shown
    for text in shown:
        assert check_project(yaml.safe_load(text), "README.md").sweep.methods
