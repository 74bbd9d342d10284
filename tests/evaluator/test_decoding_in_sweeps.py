"""`mod` in a sweep: a control while decoding, with records like any point, that no command turns into a model."""

import json
from pathlib import Path

from progress_told import Told

from rewarded_lines import sweep
from rewarded_lines.evaluator.choose import command_for
from rewarded_lines.evaluator.records import load_run
from rewarded_lines.reports.figures.depth_figure import schedules
from rewarded_lines.reports.summary import summarise
from rewarded_lines.reports.tables import markdown
from rewarded_lines.reports.texts import method_labels


def listed(folder, *methods):
    path = folder / "rewarded-lines.yaml"
    path.write_text(path.read_text().replace("points: 3", f"points: 3\n  methods: [{', '.join(methods)}]"))


def test_a_sweep_measures_it_resumes_and_labels_it(cli, tiny):
    listed(tiny, "mod", "policies", "soup")
    (tiny / "rewarded-lines.yaml").write_text(
        (tiny / "rewarded-lines.yaml").read_text() + "control: {file: test.jsonl, columns: {text: prompt}}\n"
    )
    told = Told()
    run = sweep(engine="hf", progress=told)
    assert any("mod: 2 models of" in fact for fact in told.facts)
    by_place = {(point.spec.method, point.spec.weights): point for point in run.points}
    for corner in ((1.0, 0.0), (0.0, 1.0)):
        mine, policy = by_place["mod", corner], by_place["policies", corner]
        assert mine.responses == policy.responses and (mine.kl == policy.kl).all()
        assert (mine.control == policy.control).all()
    middle, soup = by_place["mod", (0.5, 0.5)], by_place["soup", (0.5, 0.5)]
    assert middle.responses != soup.responses and middle.kl.mean() > 0 and (middle.control != soup.control).any()
    # A killed sweep makes what is missing again, the same.
    keys = {
        entry["key"] for entry in run.header["points"] if entry["method"] == "mod" and entry["weights"] == [0.5, 0.5]
    }
    (path,) = (tiny / "sweep/points" / f"{key}.parquet" for key in keys)
    before = path.read_bytes()
    path.unlink()
    assert sweep(engine="hf").header["evaluated_last"] == 1 and path.read_bytes() == before
    summary = summarise(load_run("sweep"), resamples=100)
    assert method_labels(summary)["mod"] == "MOD (no merge: policies mixed while decoding)"
    assert "mod: a control while decoding, no merged model; all 2 policies answer together" in markdown(summary)
    assert [names for names in schedules(summary).values()] == [["soup"]]
    assert command_for(run, middle.spec).startswith("# nothing to merge: mod λ=0.5,0.5")
    # No candidate of a choice, and no method of a merge.
    assert json.loads(cli("choose", "sweep", "--maximize", "words", "--json").out)["method"] != "mod"
    answer = cli("choose", "sweep", "--maximize", "words", "--method", "mod")
    assert answer.code == 1 and "its points are no models" in answer.err and "choose another --method" in answer.err
    assert cli("merge", "--lam", "0.5", "--run", "sweep").code == 0
    assert "MOD" not in (Path("merged/lam=0.50") / "README.md").read_text()


def test_what_cannot_be_is_refused_before_anything_is_generated(cli, tiny):
    answer = cli("merge", "--method", "mod")
    assert answer.code == 1 and "it mixes policies while they decode" in answer.err and "--engine hf" in answer.err
    listed(tiny, "mod")
    answer = cli("sweep", "--engine", "http://127.0.0.1:9")
    assert answer.code == 1 and "sweep.methods.mod" in answer.err and "use --engine hf" in answer.err
    path = tiny / "rewarded-lines.yaml"
    for methods, message in [
        ("{mine: {merge: mod, alpha: 2}}", "takes no other key"),
        ("{mod: null, u: {match: mod}}", "norms of these two cannot be matched"),
        # Definitions that would be LiNeS under another name.
        ("{mod: {}}", "the keys define LiNeS, not `mod`"),
        ("{ties: {alpha: 0.5}}", "add `merge: ties`"),
        ("{soup: {}}", "write `soup:` with nothing behind it"),
    ]:
        path.write_text(path.read_text().split("  methods:")[0] + f"  methods: {methods}\n")
        answer = cli("sweep", "--engine", "hf")
        assert answer.code == 1 and message in answer.err, answer.err
