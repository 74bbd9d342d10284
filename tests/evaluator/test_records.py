"""Point records as other tools read them."""

import gc
import json
import socket
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from rewarded_lines.errors import UserError
from rewarded_lines.evaluator import run_folder
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.records import load_run, total_missing
from rewarded_lines.evaluator.run_folder import RunFolder
from rewarded_lines.merger.spec import MergeSpec


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


def test_a_run_folder_in_use_keeps_no_points(make_run, tmp_path, monkeypatch):
    """Memory must not grow with the points, neither where they are made nor where they are read again."""
    points = load_run(make_run(points=3, prompts=4)).points
    keys = {point.spec: f"{at:016x}" for at, point in enumerate(points)}
    setup, made = SimpleNamespace(key=keys.__getitem__), []

    def kept(point):
        made.append(weakref.ref(point))
        return point

    class Maker:
        def evaluate(self, setup, keys, missing):
            for key in missing:
                yield key, kept(replace(points[int(key, 16)]))

    first = RunFolder(tmp_path, setup)
    first.evaluator = Maker()
    found = first.fill(setup, list(keys))
    gc.collect()
    assert len(made) == len(points) and not any(one() for one in made)
    whole = run_folder.whole_point
    monkeypatch.setattr(run_folder, "whole_point", lambda path: (point := whole(path)) and kept(point))
    second = RunFolder(tmp_path, setup)
    again = second.fill(setup, list(keys))
    gc.collect()
    assert len(made) == 2 * len(points) and not any(one() for one in made)
    # They are read when they are asked for.
    assert len(found) == len(points) and [one.spec for one in again] == list(keys)
    assert [one.responses for one in found[1:3]] == [one.responses for one in points[1:3]]
    assert found[-1].scores["positive"].tolist() == points[-1].scores["positive"].tolist()


def test_missing_scores_are_counted_in_one_pass(make_run):
    class Passes(list):
        count = 0

        def __iter__(self):
            self.count += 1
            return super().__iter__()

    points = load_run(make_run(points=3, prompts=4)).points
    some = np.array([1.0, np.nan, np.nan, 0.0])
    holed = Passes(replace(point, scores={"positive": some}, failed={"positive": 1}) for point in points)
    found = total_missing(holed)["positive"]
    assert (found.responses, found.abstained, found.failed) == (4 * len(points), len(points), len(points))
    assert holed.count == 1


def test_the_points_of_a_run_share_their_prompts(make_run):
    first, *others = load_run(make_run(points=3, prompts=4)).points
    assert first.prompts[1] == "prompt 1" and all(one.prompts is first.prompts for one in others)


def test_adding_points_reads_the_run_once(make_run, monkeypatch):
    """A search adds them one by one: reading all of them each time would take as long as the square."""
    listed, reads = run_folder.listed_points, []
    monkeypatch.setattr(run_folder, "listed_points", lambda header: reads.append(header) or listed(header))
    written = []
    monkeypatch.setattr(RunFolder, "write", lambda self, specs, added, tuned: written.append((len(specs), len(added))))
    folder = make_run(points=3, prompts=4)
    setup = SimpleNamespace(methods=SimpleNamespace(declares=lambda spec: spec.method != "lines"))
    run = RunFolder(folder, setup)
    assert [one.method for one in run.listed] == ["sft", "soup", "soup", "soup"] and run.added == []
    more = [PointSpec("soup", MergeSpec((share, 1 - share), 1.0, 0.0)) for share in (0.1, 0.2)]
    for one in more:
        run.add([one])
    # One that is there is not added again.
    run.add(more)
    assert written == [(5, 1), (6, 2)] and run.listed[4:] == run.added == more
    assert len(reads) == 1
