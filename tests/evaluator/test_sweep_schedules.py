"""Schedules in the rows of `sweep.methods:`: their points, their names on disk, what is refused."""

from __future__ import annotations

import json

import pytest
from invented_runs import synthetic_run
from safetensors.torch import load_file

from rewarded_lines import merge, sweep
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator.paired_scores import tabulate
from rewarded_lines.evaluator.points import PointSpec, point_key
from rewarded_lines.evaluator.project_methods import Methods
from rewarded_lines.evaluator.records import load_run
from rewarded_lines.merger.lines_schedule import Line
from rewarded_lines.merger.open_inputs import plan_as
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.projects import load_project
from rewarded_lines.reports.summary import _average_merge
from rewarded_lines.reports.texts import method_label

LIST = (1.0, 1.0, 0.5, 2.0)


def methods(tiny, rows):
    """Return the methods of the tiny project with these rows."""
    path = tiny / "own.yaml"
    path.write_text((tiny / "rewarded-lines.yaml").read_text() + f"  methods: {rows}\n")
    return Methods(load_project(path), plan_as("full", "sft", {"first": "first", "second": "second"}, "soup"))


def test_rows_take_every_form_and_points_survive_json(tiny):
    (tiny / "plan.txt").write_text("1 1 0.5 2")
    made = methods(
        tiny,
        "{apart: {alpha: {first: 0.5}, beta: 0}, listed: {schedule: [1, 1, 0.5, 2]}, file: {schedule: plan.txt},"
        " mixed: {schedule: {second: [1, 1, 0.5, 2]}, modules: {mlp: 0.5}}, even: {match: mixed},"
        " same: {alpha: {first: 1, second: 1}}, lines: null}",
    )
    points = {name: made.at(name, (0.25, 0.75)) for name in made.specs}
    assert points["apart"].merge == MergeSpec((0.25, 0.75), lines=(Line(0.5, 0.0), Line(1.0, 0.0)))
    assert points["listed"].merge == points["file"].merge == MergeSpec((0.25, 0.75), lines=(Line(blocks=LIST),))
    mixed = MergeSpec((0.25, 0.75), lines=(Line(), Line(blocks=LIST)), modules=(("mlp", 0.5),))
    assert points["mixed"].merge == mixed
    plan = plan_as("full", "sft", {"first": "first", "second": "second"}, "soup")
    assert points["even"].merge.alpha == plan.matched_alpha((0.25, 0.75), mixed) != 1
    assert points["same"].merge == points["lines"].merge == MergeSpec((0.25, 0.75))
    for point in points.values():
        again = PointSpec.from_dict(json.loads(json.dumps(point.as_dict())))
        assert again == point and made.declares(again)
    assert len({point_key({}, point, {}) for point in points.values()}) == 5


@pytest.mark.parametrize("row", ["{merge: ties", "{merge: dare, options: {density: 0.5}", "{merge: sum"])
def test_a_matched_method_has_the_others_norm(tiny, row):
    made = methods(tiny, f"{{shaped: {row}, alpha: 0.5}}, even: {row}, match: shaped}}}}")
    points = [made.at(name, (0.25, 0.75)).merge for name in ("shaped", "even")]
    assert points[1].method == points[0].method and (points[1].alpha, points[1].beta) != (points[0].alpha, 0)
    base = {name: values.double() for name, values in load_file("sft/model.safetensors").items()}
    norms = []
    for spec in points:
        (result,) = merge(
            "sft",
            ["first", "second"],
            0.25,
            alpha=spec.alpha,
            beta=spec.beta,
            method=spec.method,
            options=spec.options,
            out="out",
            overwrite=True,
        )
        moved = load_file(result.out / "model.safetensors")
        norms.append(sum(float(((moved[name].double() - values) ** 2).sum()) for name, values in base.items()))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_points_of_older_runs_keep_their_names_and_their_form():
    spec = PointSpec("lines", MergeSpec((0.3, 0.7), 1.0, 0.5, "ties", {"density": 0.2}))
    assert point_key({"a": 1}, spec, {}) == "5805d054dac393f6"
    assert list(spec.as_dict()) == ["method", "weights", "alpha", "beta", "merge", "options", "checkpoint", "edit"]


REFUSED = {
    "{schedule: [1, 2]}": "sweep.methods.mine: schedule, model.layers: a schedule needs one coefficient",
    "{schedule: [1, 1, 1, 1], beta: 0}": "sweep.methods.mine: beta: this value would decide nothing",
    "{alpha: {third: 1}}": "sweep.methods.mine: alpha: no policy `third`",
    "{merge: ties, alpha: {first: 2}}": "sweep.methods.mine: method ties: ties is not linear",
    "{modules: {atention: 1}}": "sweep.methods.mine: modules: no kind of module `atention`(?s:.)*`attention`",
    "{match: lines, schedule: [1, 1, 1, 1]}": "leave both out, and `schedule:`",
    "{schedule: []}": "sweep.methods.mine.schedule: \\[\\] is not a finite number",
    "{beta: {first: .inf}}": "sweep.methods.mine.beta: inf is not a finite number",
}


def test_rows_that_are_refused(tiny):
    for row, said in REFUSED.items():
        with pytest.raises(UserError, match=said):
            methods(tiny, f"{{mine: {row}, lines: null}}")


def test_runs_are_averaged_line_by_line_and_legends_say_what_scales_differ_by():
    runs = [MergeSpec((0.5, 0.5), lines=(Line(1, beta), Line(blocks=(beta, 2)))) for beta in (0.0, 1.0)]
    mean = _average_merge(runs)
    assert mean.lines == (Line(1, 0.5), Line(blocks=(0.5, 2)))
    assert Line(blocks=(1, 0.8, 1.2, 1)).text() == "4 coefficients, 0.8 to 1.2"

    class Point:
        method, merge, checkpoint, edit = "mine", mean, "", False

    assert method_label([Point]) == "Rewarded Soups, scaled by policy and block"


def test_a_choice_tells_schedules_by_the_names_of_the_policies(tiny, cli):
    path = tiny / "rewarded-lines.yaml"
    path.write_text(path.read_text() + "  methods: {mine: {alpha: {first: 0.5}, beta: 0}}\n")
    sweep(engine="hf")
    assert "first: α = 0.5, β = 0; second: α = 1, β = 0" in cli("choose", "sweep", "--maximize", "words").out


@pytest.mark.parametrize("more", [{"schedule": [1, 1, 1, 1]}, {"modules": {"mlp": 0.5}}, {"merge": "ties"}])
def test_methods_that_differ_by_more_than_numbers_are_not_averaged(tmp_path, more):
    runs = [synthetic_run(tmp_path / name, prompts=8, points=3) for name in "ab"]
    header = json.loads((runs[1] / "run.json").read_text())
    for point in header["points"]:
        point |= more if point["weights"] else {}
        point |= {"alpha": None, "beta": None} if "schedule" in point else {}
    (runs[1] / "run.json").write_text(json.dumps(header))
    with pytest.raises(UserError, match="the runs have different methods `soup`"):
        tabulate(list(map(load_run, runs)))
