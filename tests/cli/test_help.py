"""Help and version load nothing heavy and fit 80 columns; typos name the nearest word."""

import importlib
import json
import os
import runpy
import subprocess
import sys

import pytest

from rewarded_lines import __version__
from rewarded_lines.cli import COMMANDS

# Whatever takes more than some milliseconds to load. Not pydantic: typer reads every value with it.
HEAVY = {
    "torch", "numpy", "pyarrow", "transformers", "yaml", "llvmlite", "safetensors", "blake3", "matplotlib",
    "plotly", "scipy", "pandas", "vllm", "trl", "peft", "datasets", "ray", "optuna", "moocore", "huggingface_hub",
    "httpx", "asyncio", "multiprocessing",
}  # fmt: skip
LIGHT = {
    "rewarded_lines",
    # `tensor_depth` and `families` only.
    "rewarded_lines.checkpoints",
    "rewarded_lines.cli",
    # `stages` only.
    "rewarded_lines.demo",
    # `plan_options` only.
    "rewarded_lines.engines",
    "rewarded_lines.errors",
    # `sweep_options` only.
    "rewarded_lines.evaluator",
    # `spec`, and the files that it reads.
    "rewarded_lines.merger",
    "rewarded_lines.options",
    # `round_options` only.
    "rewarded_lines.pipelines",
    "rewarded_lines.processes",
    "rewarded_lines.progress",
    # `serve_options` only.
    "rewarded_lines.serving",
}
ASK = """\
import contextlib, io, json, sys

told, before = {}, set()
for args in json.loads(sys.argv[1]):
    sys.argv = ["rewarded-lines", *args]
    text, code = io.StringIO(), 0
    with contextlib.redirect_stdout(text):
        from rewarded_lines.cli import main
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    told[" ".join(args)] = {"modules": sorted(set(sys.modules) - before), "code": code, "text": text.getvalue()}
    before = set(sys.modules)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def asked():
    """The output of each command line, and the modules that it loaded in addition to earlier ones."""
    lines = [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS), ["sweep", "-h"], []]
    done = subprocess.run([sys.executable, "-c", ASK, json.dumps(lines)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("line", ["--version", "--help", *(f"{name} --help" for name in COMMANDS)])
def test_nothing_heavy_is_loaded(asked, line):
    modules = asked[line]["modules"]
    assert asked[line]["code"] == 0
    assert not {name.partition(".")[0] for name in modules} & HEAVY
    ours = {".".join(name.split(".")[:2]) for name in modules if name.split(".")[0] == "rewarded_lines"}
    assert ours <= LIGHT


def test_every_command_is_asked(asked):
    assert len(COMMANDS) >= 9 and {"doctor", "merge", "sweep"} <= set(COMMANDS)
    assert asked["--version"]["text"] == f"rewarded-lines {__version__}\n"
    assert asked["sweep -h"]["text"] == asked["sweep --help"]["text"]


def test_no_command_shows_help_and_is_no_success(asked):
    assert asked[""]["code"] == 2 and "Usage: rewarded-lines" in asked[""]["text"]


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_whole_in_80_columns(asked, command):
    module = importlib.import_module(f"rewarded_lines.cli.{command}_command")
    _, _, examples = getattr(module, command).__doc__.partition("\b\n")
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    shown = [line.strip() for line in asked[f"{command} --help"]["text"].splitlines()]
    assert any(line.startswith(f"rewarded-lines {command}") for line in lines)
    assert [line for line in lines if line not in shown] == []
    assert max(len(line.rstrip()) for line in asked[f"{command} --help"]["text"].splitlines()) <= 80


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["swep"], ["rewarded-lines: no command `swep`", "did you mean `sweep`?"]),
        (["xyz"], ["no command `xyz`", "expected: merge", "see rewarded-lines --help"]),
        (["sweep", "--pionts", "3"], ["rewarded-lines sweep: no option `--pionts`", "did you mean `--points`?"]),
        (["--verison"], ["no option `--verison`", "did you mean `--version`?"]),
        (["sweep", "--points", "1"], ["sweep --points: not a valid value", "greater than or equal to 2", "got: 1"]),
        (["sweep", "--points=many"], ["sweep --points", "expected: a valid integer", "got: many"]),
        (["sweep", "--points"], ["option '--points' requires an argument"]),
        (["sweep", "--json=3"], ["option '--json' does not take a value"]),
        (["choose"], ["rewarded-lines choose RUN: missing", "see rewarded-lines choose --help"]),
        (["sweep", "stray"], ["rewarded-lines sweep: got unexpected extra argument", "stray"]),
    ],
)
def test_a_command_line_that_cannot_be_read(cli, args, said):
    answer = cli(*args)
    assert answer.code == 2 and answer.out == ""
    assert "Traceback" not in answer.err and all(part in answer.err for part in said)


@pytest.mark.parametrize("command", COMMANDS)
def test_work_can_be_quiet(asked, command):
    assert "--quiet" in asked[f"{command} --help"]["text"]


def test_the_hubs_library_reports_nothing_of_what_a_user_does():
    script = (
        "import sys\n"
        "sys.argv = ['rewarded-lines', '--version']\n"
        "from rewarded_lines.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "from huggingface_hub import constants\n"
        "print(constants.HF_HUB_DISABLE_TELEMETRY)\n"
    )
    environment = {
        name: value for name, value in os.environ.items() if "TELEMETRY" not in name and "HF_HUB" not in name
    }
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "True"


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rewarded-lines", "--version"])
    runpy.run_module("rewarded_lines", run_name="__main__")
    assert capsys.readouterr().out.startswith("rewarded-lines 0.")
