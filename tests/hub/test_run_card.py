"""The scores of a run on a card: only of a run of the same models; the row of the merge and of the nearest points."""

import json
import shutil

import pytest
from invented_runs import synthetic_run
from plain_checkpoints import save_family
from tiny_adapters import save_adapter

from rewarded_lines import merge, report
from rewarded_lines.checkpoints.hashing import model_hash, policy_hash
from rewarded_lines.evaluator.records import read_header
from rewarded_lines.folders import write_json

NAMES = ("cheerful", "detailed", "kind")


def make_project(folder, policies=2, **options):
    """Write a base, policies and a finished run of them, `sweep`, beside a project file."""
    save_family(folder, ("sft", *NAMES[:policies]))
    run = synthetic_run(folder / "sweep", policies=policies, prompts=40, points=5, resamples=100, **options)
    header = read_header(run)
    header["base"] = {"path": "../sft", "hash": model_hash(folder / "sft")}
    for name in NAMES[:policies]:
        header["policies"][name] = {"path": f"../{name}", "hash": policy_hash(folder / name)}
    header["identity"] = {"engine": {"kind": "vllm", "as": "whole models", "versions": {"vllm": "0.27.1"}}}
    header["generation"]["dtype"] = "float32"
    write_json(run / "run.json", header)
    lines = ["base: sft", "policies:", *(f"  {name}: {name}" for name in NAMES[:policies])]
    (folder / "rewarded-lines.yaml").write_text("\n".join(lines) + "\n")
    return run


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A project with a run that has its report."""
    folder = tmp_path_factory.mktemp("source") / "project"
    report(make_project(folder))
    return folder


@pytest.fixture
def project(reported, tmp_path, monkeypatch):
    """A copy of the project, as the working directory."""
    # copytree keeps times: the report must not be older than the records.
    shutil.copytree(reported, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture
def card(cli):
    """Merge by the command line and return the card."""

    def make(*args):
        shutil.rmtree("out", ignore_errors=True)
        answer = cli("merge", *args, "--out", "out")
        assert answer.code == 0, answer
        with open("out/README.md", encoding="utf-8") as file:
            return file.read()

    return make


def rows(text):
    """Return the cells of the table of scores."""
    table = text.split("## Scores")[1].split("\n\n")[2]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_projects_own_run(project, card):
    text = card("--lam", "0.5")
    assert "This merge was evaluated on the 40 prompts of the run “synthetic” (vllm 0.27.1, whole models" in text
    assert [row[:2] for row in rows(text)] == [
        ["sft", ""],
        ["lines", "0.25"],
        ["**lines, this model**", "**0.50**"],
        ["lines", "0.75"],
    ]
    # The numbers are the report's.
    summary = json.loads((project / "sweep/report/summary.json").read_text())
    point = next(p for p in summary["points"] if p["method"] == "lines" and p["weights"] == [0.5, 0.5])
    mean = point["rewards"]["positive"]
    half = (mean["high"] - mean["low"]) / 2
    assert rows(text)[2][2] == f"**{mean['value']:.2f} ±{half:.2f}**"
    assert "95% intervals: percentile bootstrap over 40 prompts" in text
    assert (project / "out/front.png").read_bytes() == (project / "sweep/report/front.png").read_bytes()
    assert "![The fronts of the run](front.png)" in text and "this model is the point λ = 0.50 of lines" in text


def test_the_end_of_a_curve_and_another_schedule(project, card):
    assert [row[1] for row in rows(card("--lam", "1", "--beta", "0"))] == ["", "0.50", "0.75", "**1.00**"]


def test_a_merge_that_was_not_evaluated(project, card):
    text = card("--lam", "0.6", "--alpha", "0.9")
    assert "This very merge was not evaluated. These points, the nearest to it" in text
    assert [row[:2] for row in rows(text)] == [["sft", ""], ["lines", "0.50"], ["lines", "0.75"]]
    assert "this merge is none of its points" in text and ", this model" not in text
    # The same numbers with another rule for embeddings were not evaluated.
    assert "This very merge was not evaluated" in card("--lam", "0.5", "--outside", "depth")


def test_another_rule(project, card):
    text = card("--lam", "0.5", "--method", "ties")
    assert "nor any by its rule" in text and [row[0] for row in rows(text)] == ["sft"]
    # The same sum by another name is the same merge.
    assert "This merge was evaluated" in card("--lam", "0.5,0.5", "--method", "task-arithmetic", "--beta", "0")


def test_policies_go_by_their_weights_not_by_their_names(project, card):
    text = card("--base", "sft", "--policy", "b=detailed", "--policy", "a=cheerful", "--lam", "0.25,0.75")
    assert [row[1] for row in rows(text)] == ["", "0.50", "**0.75**", "1.00"]


def test_several_outputs_have_their_own_rows(project, cli):
    assert cli("merge", "--lam", "0.25", "--lam", "0.5", "--out", "out").code == 0
    for lam in ("0.25", "0.50"):
        assert f"**{lam}**" in (project / f"out/lam={lam}/README.md").read_text()


def test_a_replay_has_it_too(project, card):
    first = card("--lam", "0.5")
    shutil.move("out", "first")
    assert card("--from", "first/merge.json") == first


def test_other_weights_have_no_part_in_it(project, card):
    shutil.rmtree("detailed")
    save_family(project / "other", ("sft", "x", "y", "z"))
    shutil.move("other/z", "detailed")
    assert "## Scores" not in card("--lam", "0.5") and not (project / "out/front.png").exists()


def test_an_unfinished_or_unreported_run_beside_the_project_is_left_alone(project, card):
    header = read_header(project / "sweep")
    write_json(project / "sweep/run.json", {**header, "complete": False})
    assert "## Scores" not in card("--lam", "0.5")
    write_json(project / "sweep/run.json", header)
    assert "## Scores" in card("--lam", "0.5")
    shutil.rmtree("sweep/report")
    assert "## Scores" not in card("--lam", "0.5")
    (project / "sweep/run.json").write_text("{}")
    assert "## Scores" not in card("--lam", "0.5")


@pytest.mark.parametrize("why", ["averaged", "older", "other points", "damaged"])
def test_a_report_that_is_not_the_runs_is_not_taken(project, card, why):
    path = project / "sweep/report/summary.json"
    summary = json.loads(path.read_text())
    if why == "averaged":
        path.write_text(json.dumps(summary | {"runs": 3}))
    elif why == "older":
        next((project / "sweep/points").iterdir()).touch()
    elif why == "other points":
        path.write_text(json.dumps(summary | {"points": summary["points"][:-1]}))
    else:
        path.write_text("{")
    assert "## Scores" not in card("--lam", "0.5")
    # A named run is read itself, and its figure drawn.
    text = card("--lam", "0.5", "--run", "sweep")
    assert "**lines, this model**" in text and (project / "out/front.png").read_bytes().startswith(b"\x89PNG")


def test_a_named_run_must_belong(project, cli, tmp_path):
    other = make_project(tmp_path / "other", policies=3)
    for run, why in ((other, "it has more policies"), ("sft", "not a run folder"), ("nothing", "not a run folder")):
        answer = cli("merge", "--lam", "0.5", "--run", run, "--out", "out")
        assert answer.code == 1 and why in answer.err and "Traceback" not in answer.err, answer
    save_family(tmp_path / "others", ("other", "x", "y", "z"))
    shutil.copytree(tmp_path / "others/z", project / "z")
    answer = cli("merge", "--policy", "cheerful", "--policy", "z", "--run", "sweep", "--out", "out")
    assert "the run is one of other models" in answer.err and "not in it: z" in answer.err
    header = read_header(project / "sweep")
    write_json(project / "sweep/run.json", {**header, "base": {"path": "../sft", "hash": "0"}})
    assert "not in it: the base" in cli("merge", "--run", "sweep", "--out", "out").err
    assert not (project / "out").exists()


def test_adapters_over_a_base_that_is_not_read(tiny, card, monkeypatch):
    """The run hashes the base, the merge does not read it: its path is compared."""
    for seed, name in enumerate(NAMES[:2]):
        save_adapter(tiny / "sft", tiny / name, seed=seed)
    run = synthetic_run(tiny / "sweep", prompts=40, points=5, resamples=100)
    header = read_header(run)
    for name in NAMES[:2]:
        header["policies"][name] = {"path": f"../{name}", "hash": policy_hash(tiny / name)}
    write_json(run / "run.json", {**header, "base": {"path": "../sft", "hash": "not read"}})
    report(run)
    (tiny / "rewarded-lines.yaml").write_text("base: sft\npolicies: {cheerful: cheerful, detailed: detailed}\n")
    assert rows(card("--lam", "0.25"))[2][1] == "**0.25**"
    write_json(run / "run.json", {**header, "base": {"path": "../elsewhere", "hash": "not read"}})
    assert "## Scores" not in card("--lam", "0.25")


@pytest.mark.slow
def test_three_policies(tmp_path, card, monkeypatch):
    run = make_project(tmp_path / "three", policies=3, rewards=3)
    monkeypatch.chdir(tmp_path / "three")
    report(run)
    found = rows(card("--lam", "0.5,0.25,0.25"))
    assert found[0][0] == "sft" and sum("this model" in row[0] for row in found) == 1 and len(found) == 4
    assert found[[("this model" in row[0]) for row in found].index(True)][1] == "**0.50,0.25,0.25**"


def test_from_python_without_a_run(project):
    """Python's `merge` adds no run to the card."""
    merge("sft", ["cheerful", "detailed"], 0.5, out="out")
    assert "## Scores" not in (project / "out/README.md").read_text()


def test_hostile_titles(project, card):
    for path in (project / "sweep/run.json", project / "sweep/report/summary.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"title": "<b>|`x`|\n# y"}))
    text = card("--lam", "0.5")
    assert r"\<b\>\|\`x\`\| \# y" in text and "\n# y" not in text
