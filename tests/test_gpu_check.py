"""`make gpu-check` without a GPU: steps that fail or take too long are rows, and a rehearsal goes from end to end."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "benchmarks" / "gpu_check.py"
STEPS = """\
import json, subprocess, sys, time
_, step, work, rows, *_ = sys.argv
open(rows, "a").write(json.dumps({"what": step, "found": "1 s", "beside": "", "wanted": ""}) + "\\n")
if step == "merge":
    sys.exit("the disk is full")
if step == "swaps":
    subprocess.run(["sleep", "60"])
"""


@pytest.fixture
def check(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "gpu_steps.py").write_text(STEPS)
    monkeypatch.setattr(module, "HERE", tmp_path)
    return module


def test_no_step_stops_the_others(check, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "LIMITS", {**check.LIMITS, "swaps": 5.5})
    words = ["--only", "swaps,sweep,merge", "--work", str(tmp_path / "work"), "--tiny"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *words])
    with pytest.raises(SystemExit) as ended:
        check.main()
    assert ended.value.code == 1
    content = json.loads((tmp_path / "work" / "results.json").read_text())
    # The models come first, and every step leaves what it had measured.
    states = {step["step"]: step["state"] for step in content["steps"]}
    assert states == {"models": "done", "merge": "failed, code 1", "swaps": "ended after 6 s", "sweep": "done"}
    assert all(step["rows"][0]["what"] == step["step"] for step in content["steps"])
    out = capsys.readouterr().out
    assert "| merge | **failed, code 1** |" in out and "the disk is full" in out
    assert not subprocess.run(["pgrep", "-f", f"{tmp_path}/gpu_steps.py"], capture_output=True).stdout


def test_steps_are_checked_and_have_their_time(check, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--only", "swap", "--work", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        check.main()
    assert ended.value.code == 2 and "no step swap; there are doctor, models" in capsys.readouterr().err
    late = check.Check(tmp_path / "work", tmp_path / "results.json", tiny=True)
    late.run("merge", 3)
    assert not late.good and "| merge | **no time left** |" in late.table()


@pytest.mark.slow
def test_a_rehearsal_measures_everything(tmp_path):
    words = ["--tiny", "--only", "doctor,models,merge,swaps,sweep", "--work", str(tmp_path), "--minutes", "4"]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)
    content = json.loads((tmp_path / "results.json").read_text())
    assert done.returncode == 0, done.stdout
    found = [row["what"] for step in content["steps"] for row in step["rows"]]
    wanted = ("bits of the merges", "swap, resident: host", "tokens a second when scored", "sweep: generate")
    assert set(wanted) <= set(found)
