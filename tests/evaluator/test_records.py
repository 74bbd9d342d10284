"""Point records as other tools read them."""

import json
import socket

import pyarrow.parquet as pq
import pytest

from rewarded_lines.errors import UserError
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.records import load_run


def test_records_load_with_datasets(make_run, tmp_path, monkeypatch):
    """`datasets.load_dataset` reads every response of every point without a network."""
    import datasets

    def refuse(*args, **options):
        raise AssertionError("a socket for local files")

    run = make_run(points=3, prompts=20, policies=3)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    files, cache = f"{run}/points/*.parquet", str(tmp_path / "cache")
    data = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
    points = load_run(run).points
    assert len(data) == 20 * len(points)
    assert set(data.features) == set(pq.read_schema(next((run / "points").iterdir())).names)
    assert data.features["merge"].dtype == "string"
    told = {(*row["weights"], row["alpha"], row["beta"], row["prompt"], row["score.positive"]) for row in data}
    assert told == {
        (*point.spec.weights, point.spec.merge.alpha, point.spec.merge.beta, prompt, score)
        for point in points
        for prompt, score in zip(point.prompts, point.scores["positive"].tolist(), strict=True)
    }


def test_a_point_with_unknown_keys_is_refused():
    content = PointSpec("sft").as_dict()
    assert PointSpec.from_dict(content) == PointSpec("sft")
    with pytest.raises(TypeError, match="gamma"):
        PointSpec.from_dict({**content, "gamma": 1.0})


@pytest.mark.parametrize(
    ("points", "why"),
    [
        ("[" * 100_000 + "]" * 100_000, "not a run folder"),
        ('[{"method": "sft"}]', "its points cannot be read"),
        ('[{"key": "a", "method": "sft", "weights": 1}]', "its points cannot be read"),
        ("[1]", "its points cannot be read"),
        ("{}", "too few"),
    ],
    ids=["deep", "no key", "no weights", "no point", "none"],
)
def test_a_forged_run_is_refused(tmp_path, points, why):
    (tmp_path / "run.json").write_text(f'{{"format": 2, "points": {points}}}')
    with pytest.raises(UserError, match=why):
        load_run(tmp_path)


def test_a_run_without_points_is_refused(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(UserError, match="its points cannot be read"):
        load_run(tmp_path)
