"""Points on Ray workers: the same records, dead workers replaced, nothing left behind.

Each time the workers are in this process, behind a stand-in for Ray; those of a real cluster are slow to start.
"""

import os
import signal
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from stand_in_ray import stand_in_ray

from rewarded_lines import sweep
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator.ray_cluster import RayEvaluator
from rewarded_lines.evaluator.sweep_options import SweepOptions
from rewarded_lines.evaluator.sweep_setup import open_setup
from rewarded_lines.projects import load_project

if find_spec("ray") is None:
    pytest.skip("Ray is not installed in this environment", allow_module_level=True)


@pytest.fixture
def greedy(tiny):
    project = tiny / "rewarded-lines.yaml"
    project.write_text(project.read_text().replace("  max_tokens: 12", "  max_tokens: 12\n  temperature: 0"))
    return tiny


def same(alone, shared):
    """Compare two runs point by point and file by file."""
    assert [point.spec for point in shared.points] == [point.spec for point in alone.points]
    for one, other in zip(alone.points, shared.points, strict=True):
        assert one.responses == other.responses and (one.kl == other.kl).all()
        assert all((one.scores[name] == other.scores[name]).all() for name in one.scores)
    names = [{path.name for path in (run / "points").iterdir()} for run in map(Path, ("alone", "shared"))]
    assert names[0] == names[1]
    assert shared.header["complete"] and shared.header["seconds_last"]["generate"] > 0


def test_workers_give_the_scores_of_none_and_a_death_costs_one_point(greedy, monkeypatch):
    alone = sweep(engine="hf", out="alone")
    with stand_in_ray(monkeypatch, dies=lambda calls: calls == 2) as ray:
        same(alone, sweep(engine="hf", out="shared", ray="local", workers=2))
    assert len(ray.actors) == 3 and ray.calls == len(list((greedy / "alone/points").iterdir())) + 1


def test_a_fault_of_the_user_in_a_worker_ends_the_run_as_one(greedy, monkeypatch):
    spoil(greedy, "raise ValueError('never')")
    with stand_in_ray(monkeypatch), pytest.raises(UserError, match="(?s)reward `words`.*never"):
        sweep(engine="hf", points=2, ray="local", workers=1)


def test_a_point_that_ends_worker_after_worker_ends_the_run(greedy, monkeypatch):
    with (
        stand_in_ray(monkeypatch, dies=lambda calls: calls > 0) as ray,
        pytest.raises(UserError, match="3 workers died over the same point"),
    ):
        sweep(engine="hf", points=2, ray="local", workers=1)
    assert ray.calls == 4


@pytest.mark.slow
def test_two_real_workers_give_the_scores_of_none_and_a_death_costs_one_point(greedy, monkeypatch):
    """One test, since a cluster takes seconds to start."""
    import ray

    alone = sweep(engine="hf", out="alone")
    evaluate, killed = RayEvaluator.evaluate, []

    def murderous(cluster, setup, keys, missing):
        made = evaluate(cluster, setup, keys, missing)
        yield next(made)
        killed.append(ray.get(cluster._workers[-1].__ray_call__.remote(lambda worker: os.getpid())))
        os.kill(killed[0], signal.SIGKILL)
        yield from made

    monkeypatch.setattr(RayEvaluator, "evaluate", murderous)
    shared = sweep(engine="hf", out="shared", ray="local", workers=2)
    assert killed
    same(alone, shared)
    assert not ray.is_initialized()


def spoil(folder, line):
    """Insert a line at the start of the reward's function."""
    path = folder / "rewards.py"
    path.write_text("import os\n\n\n" + path.read_text().replace("    return [len(", f"    {line}\n    return [len("))


@pytest.mark.slow
def test_a_fault_of_the_user_comes_back_as_one(greedy):
    spoil(greedy, "raise ValueError('never')")
    with pytest.raises(UserError, match="(?s)reward `words`.*never"):
        sweep(engine="hf", points=2, ray="local", workers=1)


@pytest.mark.slow
def test_a_point_that_ends_every_worker_ends_the_run(greedy):
    spoil(greedy, "os.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match="3 workers died over the same point"):
        sweep(engine="hf", points=2, ray="local", workers=1)


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "auto", "nowhere"])
def test_a_dead_cluster_is_one_message(greedy, address, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(greedy))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=r"(?s)no Ray cluster answers.*--ray|--ray.*no Ray cluster answers"):
        sweep(engine="hf", points=2, ray=address.format(port=port))


def test_without_ray_the_extra_is_named(greedy, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    setup = open_setup(load_project("rewarded-lines.yaml"), SweepOptions("hf", ray="local"))
    with pytest.raises(UserError, match=r"rewarded-lines\[ray\]"):
        RayEvaluator(setup)
