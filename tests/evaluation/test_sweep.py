"""The sweep with the reference engine: records, pairing, resuming, refusing."""

import json

import numpy as np
import pytest

import rewarded_lines.evaluation.sweep as sweep_module
from rewarded_lines import merge, sweep
from rewarded_lines.config import GenerationSpec
from rewarded_lines.errors import UserError
from rewarded_lines.engines.generation import load_generator
from rewarded_lines.evaluation.records import load_run
from rewarded_lines.folders import folder_lock


def test_every_point_keeps_every_response_and_unrounded_score(tiny):
    run = sweep(engine="hf")
    assert [str(point.spec) for point in run.points] == [
        "sft",
        *(f"{name} λ={lam}" for name in ("soup", "lines") for lam in ("0.00,1.00", "0.50,0.50", "1.00,0.00")),
    ]
    for point in run.points:
        assert point.prompts == run.sft.prompts and (point.seeds == run.sft.seeds).all()
        assert point.scores["words"].tolist() == [len(text.split()) for text in point.responses]
        letters = [sum(map(str.isalpha, text)) / (1 + len(text)) for text in point.responses]
        assert point.scores["letters"].tolist() == letters
        assert (point.tokens <= 12).all() and np.isfinite(point.kl).all()
    assert (run.sft.kl == 0).all()
    assert run.header["complete"] is True and run.header["engine"] == "hf"
    assert len(list((tiny / "sweep/points").iterdir())) == 7


def test_points_answer_as_a_merged_checkpoint_would(tiny):
    run = sweep(engine="hf")
    spec = GenerationSpec(max_tokens=12)
    for name, beta, lam in (("soup", 0.0, 1.0), ("soup", 0.0, 0.0), ("lines", 1.0, 0.5)):
        merge("sft", ["first", "second"], lam, beta=beta, out="out", overwrite=True)
        generator = load_generator("hf", "out", spec, run.sft.prompts)
        texts = [response.text for response in generator.generate(run.sft.prompts, spec)]
        (point,) = [p for p in run.points if p.spec.method == name and p.spec.lam == lam]
        assert point.responses == texts


def test_rows_load_without_us(tiny):
    import pyarrow.parquet as pq

    sweep(engine="hf", points=2)
    tables = [pq.read_table(path) for path in (tiny / "sweep/points").iterdir()]
    assert {table.column("method")[0].as_py() for table in tables} == {"sft", "soup", "lines"}
    assert all(table.num_rows == 15 for table in tables)


def test_a_second_sweep_makes_nothing_again_and_more_points_only_the_new_ones(tiny):
    sweep(engine="hf", points=2)
    before = {path.name: path.stat().st_mtime_ns for path in (tiny / "sweep/points").iterdir()}
    told = []
    sweep(engine="hf", points=3, progress=lambda name, done, total: told.append((name, done)))
    after = {path.name: path.stat().st_mtime_ns for path in (tiny / "sweep/points").iterdir()}
    assert all(after[name] == time for name, time in before.items()) and len(after) == 7
    assert told[0] == ("points already there", 5) and len(told) == 3
    assert sweep(engine="hf", points=3).header["evaluated_last"] == 0


def test_a_changed_reward_makes_every_point_anew(tiny):
    sweep(engine="hf", points=2)
    source = (tiny / "rewards.py").read_text().replace("len(response.split())", "2 * len(response.split())")
    (tiny / "rewards.py").write_text(source)
    run = sweep(engine="hf", points=2)
    assert run.header["evaluated_last"] == 5
    assert run.sft.scores["words"][0] == 2 * len(run.sft.responses[0].split())


def test_other_stop_tokens_or_other_depths_make_every_point_anew(tiny):
    sweep(engine="hf", points=2)
    config = tiny / "sft/generation_config.json"
    config.write_text(config.read_text().replace('"eos_token_id": 2', '"eos_token_id": 3'))
    assert sweep(engine="hf", points=2).header["evaluated_last"] == 5
    layers = r"model\.layers\.([0-9]+)\.mlp\."
    assert sweep(engine="hf", points=2, layers=layers).header["evaluated_last"] == 5


def test_too_few_points_are_refused(tiny):
    for points in (0, 1):
        with pytest.raises(UserError, match="2 or more"):
            sweep(engine="hf", points=points)


def test_a_sweep_that_dies_keeps_its_finished_points(tiny, monkeypatch):
    evaluate = sweep_module._evaluate

    def dying(bench, spec):
        if spec.lam == 1.0:
            raise KeyboardInterrupt
        return evaluate(bench, spec)

    monkeypatch.setattr(sweep_module, "_evaluate", dying)
    with pytest.raises(KeyboardInterrupt):
        sweep(engine="hf", points=2)
    assert json.loads((tiny / "sweep/run.json").read_text())["complete"] is False
    assert len(load_run(tiny / "sweep").points) == 2
    monkeypatch.setattr(sweep_module, "_evaluate", evaluate)
    assert sweep(engine="hf", points=2).header["evaluated_last"] == 3


def test_two_at_once_are_kept_apart(tiny):
    (tiny / "sweep").mkdir()
    with folder_lock(tiny / "sweep"), pytest.raises(UserError, match="another process"):
        sweep(engine="hf", points=2)
    assert sweep(engine="hf", points=2).header["complete"]


def test_a_folder_of_something_else_is_left_alone(tiny):
    with pytest.raises(UserError, match="holds something else"):
        sweep(engine="hf", out="sft")


def test_three_policies_take_the_simplex(tiny):
    text = (tiny / "rewarded-lines.yaml").read_text().replace("policies:\n", "policies:\n  again: first\n")
    (tiny / "rewarded-lines.yaml").write_text(text)
    run = sweep(engine="hf", points=2)
    assert {p.spec.weights for p in run.methods()["soup"]} == {(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)}
