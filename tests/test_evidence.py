"""`eval/evidence.py` with stand-in stages: it goes on after a kill, makes anew what changed. And every stage file."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import typer.main
import yaml
from command import alive
from documents import ROOT

from rewarded_lines.cli import app
from rewarded_lines.config import POLICIES, PRESETS
from rewarded_lines.errors import UserError
from rewarded_lines.folders import folder_lock, unfinished
from rewarded_lines.merger.methods import METHODS, MOD
from rewarded_lines.projects import load_project, save_project
from rewarded_lines.recipe_files import files_root

FILES = sorted((ROOT / "eval" / "evidence_stages").glob("*.yaml"))
DEMO = {"base": "sft", "policies": {name: f"policies/{name}" for name in ("positive", "detailed")}}
# A run that a stage makes: numbers to keep, and responses, which are not to be kept.
MAKE = """\
import json, pathlib, sys
run, label = pathlib.Path(sys.argv[1]), sys.argv[2]
(run / "report").mkdir(parents=True, exist_ok=True)
with open(run.parent / "made.txt", "a") as file:
    print(run.name, label, file=file)
(run / "run.json").write_text(json.dumps({"base": {"hash": "abc"}, "policies": {"a": {"hash": "def"}}}))
for name in ("report/summary.json", "report/report.html", "secret.parquet"):
    (run / name).write_text(label)
"""
STAGES = """\
title: Stand-ins
stages:
  first:
    about: makes a run for each seed
    each_seed: true
    write: {"{out}/first-seed{seed}.yaml": {seed: "{seed}"}}
    run: ["python {out}/make.py {out}/first-seed{seed} one"]
    output: "{out}/first-seed{seed}/report/summary.json"
    starts_anew: ["{out}/first-seed{seed}"]
    minutes: 1
    records: {"task/first-seed{seed}": "{out}/first-seed{seed}"}
  other:
    about: has nothing to do with it
    run: ["python {out}/make.py {out}/other same"]
    output: "{out}/other"
    minutes: 1
  last:
    about: reads all seeds
    after: [first]
    run: ["python {out}/make.py {out}/last all", "bash -c 'echo $0 $1 > {out}/last/words' {out}/first-seed{seed}"]
    output: "{out}/last/words"
    minutes: 1
"""


@pytest.fixture(scope="module")
def evidence() -> ModuleType:
    sys.path.insert(0, str(ROOT / "eval"))
    try:
        return importlib.import_module("evidence")
    finally:
        sys.path.remove(str(ROOT / "eval"))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "stages.yaml").write_text(STAGES)
    (tmp_path / "out").mkdir()
    # As the work of a run that was killed at once.
    (tmp_path / "out" / "evidence.json").write_text("{}")
    (tmp_path / "out" / "make.py").write_text(MAKE)
    return tmp_path


def words(work: Path, *more: str) -> list[str]:
    return [f"--stages={work / 'stages.yaml'}", f"--out={work / 'out'}", "--seeds=0", "--seeds=1", *more]


def made(work: Path) -> list[str]:
    """Return what was made since the last call."""
    file = work / "out" / "made.txt"
    found = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return found


def change(work: Path, before: str, after: str) -> None:
    text = (work / "stages.yaml").read_text()
    assert before in text
    (work / "stages.yaml").write_text(text.replace(before, after))


def test_what_is_finished_and_unchanged_is_kept(
    evidence: ModuleType, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evidence.main(words(work))
    assert made(work) == ["first-seed0 one", "first-seed1 one", "other same", "last all"]
    out = work / "out"
    assert yaml.safe_load((out / "first-seed1.yaml").read_text()) == {"seed": "1"}
    assert (out / "last" / "words").read_text().split() == [str(out / "first-seed0"), str(out / "first-seed1")]
    evidence.main(words(work))
    assert made(work) == [] and capsys.readouterr().out.count("finished earlier") == 4
    # Another command, so also all that comes after it; what lay there is removed.
    change(work, "first-seed{seed} one", "first-seed{seed} two")
    (out / "first-seed0" / "old").write_text("")
    unfinished(out / "first-seed0").mkdir()
    evidence.main(words(work))
    assert made(work) == ["first-seed0 two", "first-seed1 two", "last all"]
    assert not (out / "first-seed0" / "old").exists() and not unfinished(out / "first-seed0").exists()
    # Lost records and outputs are made again.
    (out / "results" / "task" / "first-seed1" / "run.json").unlink()
    (out / "results" / "task" / "first-seed1" / "summary.json").unlink()
    evidence.main(words(work, "--only", "first"))
    assert made(work) == ["first-seed1 two"]


def test_records_are_numbers_with_how_they_were_made(evidence: ModuleType, work: Path) -> None:
    evidence.main(words(work, "--only", "first-seed0"))
    results = work / "out" / "results"
    files = {str(path.relative_to(results)) for path in results.rglob("*") if path.is_file()}
    assert files == {"made.json", "task/first-seed0/run.json", "task/first-seed0/summary.json"}
    told = json.loads((results / "made.json").read_text())
    assert told["models"] == {"task/first-seed0": {"base": "abc", "a": "def"}}
    assert told["versions"]["python"] and told["machine"]["cores"] >= 1
    assert told["stages"]["first-seed0"]["minutes"] >= 0 and "started_again" not in told["stages"]["first-seed0"]
    evidence.main(words(work, "--only", "other"))
    assert json.loads((results / "made.json").read_text())["stages"].keys() == {"first-seed0", "other"}


def test_of_a_report_and_a_search_the_numbers_are_kept(evidence: ModuleType, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in (
        "run.json",
        "report/table.md",
        "report/report.html",
        "shapes/old.json",
        "shapes/x.json",
        "shapes/x.png",
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    os.utime(run / "shapes" / "old.json", (0, 0))
    evidence.copy_records(run, tmp_path / "whole")
    evidence.copy_records(run / "report", tmp_path / "several")
    evidence.copy_records(run / "run.json", tmp_path / "file.json")
    (run / "shapes").rename(run / "records")
    evidence.copy_records(run / "records", tmp_path / "all")
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"old.json", "x.json", "x.png"}
    found = {path.name: path.read_text() for path in (tmp_path / "whole").iterdir()}
    shapes = {"trials.json": "shapes/x.json", "shape.png": "shapes/x.png"}
    assert found == {"run.json": "run.json", "table.md": "report/table.md", **shapes}
    assert [path.name for path in (tmp_path / "several").iterdir()] == ["table.md"]
    assert (tmp_path / "file.json").read_text() == "run.json"
    places = ("whole", "several", "file.json", "none")
    assert [evidence.copied(tmp_path / one) for one in places] == [True, True, True, False]


def test_a_stage_that_fails_ends_with_its_log_and_later_goes_on(evidence: ModuleType, work: Path) -> None:
    change(work, "bash -c 'echo", "bash -c 'test -f {out}/go || { echo the reason; exit 3; }; echo")
    with pytest.raises(evidence.StageFailed, match="last 2: the stage failed with exit code 3") as caught:
        evidence.main(words(work))
    assert "the reason" in str(caught.value) and "last-2.log" in str(caught.value)
    made(work)
    (work / "out" / "last" / "half").write_text("")
    unfinished(work / "out" / "last" / "words").mkdir()
    (work / "out" / "go").touch()
    evidence.main(words(work))
    # It went on in what was there.
    assert made(work) == ["last all"] and (work / "out" / "last" / "half").exists()
    assert unfinished(work / "out" / "last" / "words").exists()


def test_commands_that_make_nothing_are_told(evidence: ModuleType, work: Path) -> None:
    change(work, '"{out}/other"', '"{out}/elsewhere"')
    with pytest.raises(UserError, match="without their output"):
        evidence.main(words(work, "--only", "other"))


def test_the_list_tells_what_is_done(evidence: ModuleType, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evidence.main(words(work, "--only", "other"))
    capsys.readouterr()
    evidence.main(words(work, "--list"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["open", "first-seed0"],
        ["open", "first-seed1"],
        ["done", "other"],
        ["open", "last"],
    ]
    assert "reads all seeds" in lines[3] and lines[4].startswith("about 3 minutes are left")


def test_two_at_once_are_refused(evidence: ModuleType, work: Path) -> None:
    with folder_lock(work / "out"), pytest.raises(UserError, match="another process is at work"):
        evidence.main(words(work))
    assert made(work) == []


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("about: reads", "abuot: reads", "abuot"),
        ("after: [first]", "after: [third]", "third"),
        ("python {out}/make.py {out}/other", "perl {out}/make.py {out}/other", "perl"),
        ("python {out}/make.py {out}/other", "python eval/no-such-file.py {out}/other", "eval/no-such-file.py"),
        ("  other:", "  first-seed1:", "two stages"),
    ],
)
def test_faults_of_a_stage_file_are_told_before_anything_runs(
    evidence: ModuleType, work: Path, before: str, after: str, told: str
) -> None:
    change(work, before, after)
    with pytest.raises(UserError, match=told):
        evidence.main(words(work))
    assert made(work) == []


@pytest.mark.parametrize(
    ("given", "told"),
    [("--only=lats", "lats"), ("--only=last", "first-seed0"), ("--seeds=0,x", "--seeds"), ("--seeds=", "--seeds")],
)
def test_wrong_options_are_told(evidence: ModuleType, work: Path, given: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        evidence.main(words(work, given))
    # The same command would only fail again.
    assert not isinstance(caught.value, evidence.StageFailed)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's help is Linux's")
def test_a_killed_run_goes_on(evidence: ModuleType, work: Path) -> None:
    out, wait = work / "out", "echo $$ > {out}/pid; touch {out}/last/half; test -f {out}/go || exec sleep 60; "
    change(work, "'echo $0 $1", f"'{wait}echo $0 $1")
    command = [sys.executable, str(ROOT / "eval" / "evidence.py"), *words(work)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not ((out / "pid").is_file() and (out / "pid").read_text().strip()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    child = int((out / "pid").read_text())
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)
    made(work)
    (out / "go").touch()
    evidence.main(words(work))
    assert made(work) == ["last all"] and (out / "last" / "half").exists()
    assert json.loads((out / "results" / "made.json").read_text())["stages"]["last"]["started_again"] is True


# ---- the stage files -------------------------------------------------------------------------------------------------


def stages_of(evidence: ModuleType, files: list[Path], out: Path) -> list:
    places = evidence.Places(out, out / "results", (0, 1, 2))
    return evidence.read_stages(files, places)


@pytest.fixture(scope="module")
def every(evidence: ModuleType) -> list:
    full = [ROOT / "eval" / "evidence_stages" / f"{name}.yaml" for name in evidence.FULL]
    quick = [ROOT / "eval" / "evidence_stages" / f"{name}.yaml" for name in evidence.QUICK]
    assert sorted([*full, *quick]) == FILES
    return [*stages_of(evidence, full, Path("runs/x")), *stages_of(evidence, quick, Path("runs/x"))]


def test_every_stage_is_read_and_commands_parse(every: list) -> None:
    assert len(every) > 60
    group = typer.main.get_command(app)
    parsed = 0
    for stage in every:
        for first, *rest in stage.commands:
            if first == "rewarded-lines":
                with group.make_context("rewarded-lines", [rest[0], "--help"], resilient_parsing=True) as context:
                    name, command, _ = group.resolve_command(context, rest)
                    command.make_context(name, rest[1:], parent=context)
                parsed += 1
    assert parsed > 60


def test_no_recipe_of_a_stage_starts_again_after_a_kill(every: list) -> None:
    assert not [stage.name for stage in every for command in stage.commands if "--overwrite" in " ".join(command)]


def test_every_script_and_config_is_there(every: list) -> None:
    assert {name for stage in every for name in stage.missing} == set()


def test_records_have_one_place_each(evidence: ModuleType) -> None:
    for names in (evidence.FULL, evidence.QUICK):
        files = [ROOT / "eval" / "evidence_stages" / f"{name}.yaml" for name in names]
        targets = [target for stage in stages_of(evidence, files, Path("runs/x")) for target in stage.records]
        assert len(set(targets)) == len(targets) > 5


def recipe_commands(every: list) -> dict[str, set[str]]:
    """Return the options that the stages give each recipe."""
    found: dict[str, set[str]] = {}
    for stage in every:
        for command in stage.commands:
            for part in [list(command), *(shlex.split(word) for word in command if " recipes/" in word)]:
                scripts = [word for word in part if word.startswith("recipes/") and word.endswith(".py")]
                if scripts and part[0] in ("python", "accelerate") and "configs" not in scripts[0]:
                    found.setdefault(scripts[0], set()).update(word for word in part if word.startswith("--"))
    return found


class Parsed(Exception):
    """Carries the dataclasses whose fields are a recipe's options."""


def options_of(script: str) -> set[str]:
    """Return the options of a recipe, from what it hands to the parser."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = recipe
    spec.loader.exec_module(recipe)

    def parse(parts: tuple[type, ...], *_: object) -> None:
        raise Parsed(*parts)

    recipe.parse_recipe = parse
    with pytest.raises(Parsed) as caught:
        recipe.main([])
    return {f"--{one.name}" for part in caught.value.args for one in dataclasses.fields(part)}


@pytest.mark.slow
def test_recipes_know_every_option(every: list) -> None:
    found = recipe_commands(every)
    assert found.keys() == {f"recipes/{name}.py" for name in ("sft", "reward", "ppo", "rloo", "dpo")}
    unknown = {script: options - options_of(script) for script, options in found.items()}
    assert unknown == dict.fromkeys(found, {"--config"})


def test_projects_that_stages_write_are_projects(evidence: ModuleType, tmp_path: Path) -> None:
    suite = load_project(files_root() / "eval" / "suites" / "movie_reviews_short.yaml").config
    known, count = {*PRESETS, *METHODS, MOD, POLICIES}, 0
    for name in (*evidence.FULL, *evidence.QUICK):
        file = ROOT / "eval" / "evidence_stages" / f"{name}.yaml"
        content = yaml.safe_load(file.read_text())
        text = {**content, "stages": {own: {**stage, "after": []} for own, stage in content["stages"].items()}}
        (tmp_path / "stages.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
        for stage in stages_of(evidence, [tmp_path / "stages.yaml"], tmp_path / name):
            for path, project in stage.write.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(yaml.safe_dump(project))
                made = path.parent / "rewarded-lines.yaml"
                if not made.exists():
                    # As the demo writes it.
                    save_project(made, suite.model_copy(update=DEMO))
                read = load_project(path).config
                assert set(read.sweep.methods) <= known or all(
                    method is not None or own in known for own, method in read.sweep.methods.items()
                )
                assert read.base and read.rewards and read.prompts
                count += 1
    assert count > 30
