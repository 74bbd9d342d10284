"""Sweeps over preferences: λ comes from the project's mixtures, and tables, cards and choices tell μ beside it."""

import csv
import io
import json
import shlex

import numpy as np
import pytest
from invented_runs import synthetic_run

from rewarded_lines import search, sweep
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator.records import load_run
from rewarded_lines.reports.summary import PointSummary, summarise
from rewarded_lines.reports.tables import markdown, points_csv

MIXTURES = "mixtures:\n  first: {words: 0.8, letters: 0.2}\n  second: {words: 0.3, letters: 0.7}\n"
SHARES = np.array([[0.8, 0.3], [0.2, 0.7]])


def change(folder, *pairs):
    path = folder / "rewarded-lines.yaml"
    text = path.read_text()
    for before, after in pairs:
        assert before in text
        text = text.replace(before, after)
    path.write_text(text)


def test_a_sweep_over_preferences_is_told_found_and_chosen_by_preference(cli, tiny):
    change(tiny, ("rewards:\n", MIXTURES + "rewards:\n"), ("points: 3", "points: 3\n  methods: [soup]"))
    answer = cli("sweep", "--engine", "hf")
    assert answer.code == 0 and "leaves the simplex for 2 of " in " ".join(answer.err.split()), answer.err
    run = load_run("sweep")
    found = {point.spec.weights for point in run.points if point.spec.weights}
    for preference in ([0, 1], [0.5, 0.5], [1, 0]):
        expected = np.linalg.solve(SHARES, preference)
        assert any(weights == pytest.approx(expected, abs=1e-11) for weights in found)
    assert len(found) == 3 and run.header["mixtures"]["first"] == {"words": 0.8, "letters": 0.2}
    summary = summarise(run, resamples=100)
    assert [point.preference.get("words") for point in summary.points] == [None, 0, 0.5, 1]
    assert PointSummary.from_dict(json.loads(json.dumps(summary.points[1].as_dict()))) == summary.points[1]
    assert "| method | λ | μ |" in markdown(summary) and "μ: weight of words in the preference" in markdown(summary)
    rows = list(csv.DictReader(io.StringIO(points_csv(summary))))
    assert [row["preference.letters"] for row in rows] == ["", "1.0", "0.5", "0.0"]

    chosen = json.loads(cli("choose", "sweep", "--preference", "words=1", "--json").out)
    assert chosen["preference"] == {"words": 1, "letters": 0}
    assert chosen["weights"] == pytest.approx(np.linalg.solve(SHARES, [1, 0]))
    # The weights are the carrier: the command needs no mixtures.
    assert cli(*shlex.split(chosen["command"])[1:]).code == 0
    assert json.loads((tiny / "chosen/merge.json").read_text())["weights"]["first"] == chosen["weights"][0]
    assert "the nearest is words 0.5, letters 0.5" in cli("choose", "sweep", "--preference", "0.6").err
    assert "remedy" not in cli("choose", "sweep", "--preference", "1.2,-0.2").err


@pytest.mark.slow
def test_a_search_goes_on_between_preferences_and_figures_show_them(cli, tiny):
    change(tiny, ("rewards:\n", MIXTURES + "rewards:\n"), ("points: 3", "points: 3\n  methods: [soup]"))
    sweep(engine="hf")
    _, (searched,) = search("sweep", points=5, gain=0.0)
    places = {round(point.preference["words"], 4) for point in summarise(load_run("sweep"), resamples=100).points[1:]}
    assert len(places) == searched.points > 3 and places <= {0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1}
    assert cli("report", "sweep", "--format", "svg").code == 0
    assert (tiny / "sweep/report/front.svg").is_file()


def test_a_run_without_mixtures_has_no_preference_and_a_singular_project_no_sweep(cli, tiny):
    synthetic_run(tiny / "plain", prompts=8, points=2)
    assert "the run has no mixtures" in cli("choose", "plain", "--preference", "0.5").err
    assert all("preference" not in point.as_dict() for point in summarise(load_run("plain"), resamples=100).points)
    change(tiny, ("rewards:\n", MIXTURES.replace("0.8", "0.3").replace("0.2", "0.7") + "rewards:\n"))
    with pytest.raises(UserError, match="(?s)rewarded-lines.yaml: mixtures: the mixtures give a preference many"):
        sweep(engine="hf", points=2)
