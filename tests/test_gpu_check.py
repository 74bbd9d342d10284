"""`make gpu-check` without a GPU: steps that fail or take too long are rows, and a rehearsal goes from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from benchmark_scripts import BENCHMARKS, load

STEPS = """\
import json, subprocess, sys, time
_, step, work, rows, *_ = sys.argv
open(rows, "a").write(json.dumps({"what": step, "found": "1 s", "beside": "", "wanted": ""}) + "\\n")
if step == "merge":
    sys.exit("the disk is full")
if step == "swaps":
    subprocess.run([sys.executable, "-c", "import time; time.sleep(60)", rows])
"""


@pytest.fixture
def check(monkeypatch, tmp_path):
    module = load("gpu_check", monkeypatch)
    (tmp_path / "gpu_steps.py").write_text(STEPS)
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    # The project is not in the stand-in's folder, and is not needed there.
    monkeypatch.setattr(module, "card", lambda: "none")
    return module


@pytest.fixture
def steps(monkeypatch):
    return load("gpu_steps", monkeypatch)


def run(check, monkeypatch, *words):
    """Run the check; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        check.main()
    return ended.value.code


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def left_of(folder):
    """Return the processes with a folder in their command line."""
    return subprocess.run(["pgrep", "-af", str(folder)], capture_output=True, text=True).stdout


def test_no_step_stops_the_others(check, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "LIMITS", {**check.LIMITS, "swaps": 5.5})
    assert run(check, monkeypatch, "--only", "swaps,sweep,merge", "--work", tmp_path / "work", "--tiny") == 1
    content = json.loads((tmp_path / "work" / "results.json").read_text())
    # The models come first, and every step leaves what it had measured.
    states = {step["step"]: step["state"] for step in content["steps"]}
    assert states == {"models": "done", "merge": "failed, code 1", "swaps": "ended after 6 s", "sweep": "done"}
    assert all(step["rows"][0]["what"] == step["step"] for step in content["steps"])
    out = capsys.readouterr().out
    assert "| merge | **failed, code 1** |" in out and "the disk is full" in out
    assert "\nrehearsal with tiny models, card: none" in out
    assert not left_of(tmp_path)


def test_ctrl_c_ends_the_step(check, tmp_path, monkeypatch):
    class Interrupted(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is not None:
                raise KeyboardInterrupt
            return super().wait()

    monkeypatch.setattr(check.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        check.Check(tmp_path / "work", tmp_path / "results.json", tiny=True).run("swaps", 30)
    monkeypatch.undo()
    assert not left_of(tmp_path)


@pytest.mark.parametrize(
    ("words", "made", "anew"),
    [
        ([], ("gpu-check", "3B"), False),
        ([], ("gpu-check", "tiny"), True),
        ([], ("gpu-check-tiny", "3B"), True),
        (["--tiny"], ("gpu-check-tiny", "tiny"), False),
        (["--tiny"], ("gpu-check", "tiny"), True),
    ],
)
def test_models_of_another_size_are_not_measured(check, tmp_path, monkeypatch, words, made, anew):
    folder = tmp_path / "runs" / made[0]
    folder.mkdir(parents=True)
    (folder / "models.done").write_text(made[1])
    began = []
    monkeypatch.setattr(check.Check, "run", lambda self, step, limit: began.append(step))
    assert run(check, monkeypatch, "--only", "sweep", *words) == 0
    assert began == (["models", "sweep"] if anew else ["sweep"])


def test_models_replace_those_of_another_size(steps, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "random_models", MagicMock())
    left = tmp_path / "large" / "base" / "model-00002-of-00002.safetensors"
    left.parent.mkdir(parents=True)
    left.touch()
    steps.models(steps.Step(tmp_path, tmp_path / "rows", tiny=True))
    assert not left.exists() and (tmp_path / "models.done").read_text() == "tiny"


@pytest.mark.parametrize(("body", "code", "found"), [("pass", 0, "1 passed"), ("pytest.skip('no GPU')", 1, "0 passed")])
def test_a_card_that_torch_does_not_see_is_a_failure(steps, tmp_path, monkeypatch, body, code, found):
    (tmp_path / "tests" / "engines").mkdir(parents=True)
    test = f"import pytest\n\n\n@pytest.mark.gpu\ndef test_one():\n    {body}\n"
    (tmp_path / "tests" / "engines" / "test_one.py").write_text(test)
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    with pytest.raises(SystemExit) as ended:
        steps.tests(steps.Step(tmp_path, tmp_path / "rows", tiny=False))
    assert ended.value.code == code and rows_of(tmp_path / "rows")[-1]["found"] == found


@pytest.mark.parametrize(
    ("tiny", "last", "code", "found"),
    [(False, "cpu", 0, ["the same"]), (False, "cuda", 1, ["DIFFERENT"]), (True, "cpu", 0, [])],
)
def test_the_bits_of_two_merges_are_compared(steps, tmp_path, monkeypatch, tiny, last, code, found):
    def merged(command, environment):
        out = tmp_path / "merged"
        out.mkdir(exist_ok=True)
        (out / "model.safetensors").write_text(last if "cuda" in command else "cpu")
        return SimpleNamespace(seconds=1.0, peak=1)

    measure = SimpleNamespace(clear=lambda out: None, warm=lambda inputs: None, run_once=merged)
    monkeypatch.setitem(sys.modules, "measure", measure)
    with pytest.raises(SystemExit) as ended:
        steps.merge(steps.Step(tmp_path, tmp_path / "rows", tiny))
    rows = rows_of(tmp_path / "rows")
    assert ended.value.code == code and len(rows) == (2 if tiny else 4)
    assert [row["found"] for row in rows if row["what"] == "bits of the merges"] == found


def test_steps_are_checked_and_have_their_time(check, tmp_path, monkeypatch, capsys):
    assert run(check, monkeypatch, "--only", "swap", "--work", tmp_path) == 2
    assert "no step swap; there are doctor, models" in capsys.readouterr().err
    late = check.Check(tmp_path / "work", tmp_path / "results.json", tiny=False)
    late.run("merge", 3)
    table = late.table()
    assert not late.good and "| merge | **no time left** |" in table and not table.startswith("rehearsal")


@pytest.mark.slow
def test_a_rehearsal_measures_everything(tmp_path):
    words = ["--tiny", "--only", "doctor,models,merge,swaps,sweep", "--work", str(tmp_path), "--minutes", "4"]
    done = subprocess.run([sys.executable, str(BENCHMARKS / "gpu_check.py"), *words], capture_output=True, text=True)
    content = json.loads((tmp_path / "results.json").read_text())
    assert done.returncode == 0, done.stdout
    found = [row["what"] for step in content["steps"] for row in step["rows"]]
    wanted = ("merge --device cpu", "swap, resident: host", "tokens a second when scored", "sweep: generate")
    assert set(wanted) <= set(found) and "bits of the merges" not in found
