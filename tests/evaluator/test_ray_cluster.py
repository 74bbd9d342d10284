"""Points on Ray workers: the same records, dead workers replaced, nothing left behind.

Each time the workers are in this process, behind a stand-in for Ray; those of a real cluster are slow to start.
"""

import os
import signal
import socket
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from stand_in_ray import StandInRay, stand_in_ray

from rewarded_lines import sweep
from rewarded_lines.engines import memory_levels
from rewarded_lines.engines.memory_levels import choose_level
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator.ray_cluster import RayEvaluator
from rewarded_lines.evaluator.ray_machines import check_devices, check_kernels, worker_shares
from rewarded_lines.evaluator.sweep_options import SweepOptions
from rewarded_lines.evaluator.sweep_setup import open_setup
from rewarded_lines.projects import load_project
from rewarded_lines.rewards.function_rewards import FunctionReward

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


def test_workers_get_what_single_machines_have():
    for machines, parallel, workers, found in (
        ([{"CPU": 4}, {"CPU": 4}], 1, None, (2, {"num_cpus": 4}, 1)),
        ([{"CPU": 8}, {"CPU": 2}], 1, 2, (2, {"num_cpus": 4}, 2)),
        ([{"CPU": 8}, {"CPU": 2}], 1, 5, (5, {"num_cpus": 2}, 4)),
        ([{"CPU": 8}, {}], 1, None, (1, {"num_cpus": 8}, 1)),
        ([{"CPU": 9, "GPU": 8}, {"CPU": 9, "GPU": 3}], 1, None, (11, {"num_gpus": 1}, 8)),
        ([{"CPU": 9, "GPU": 8}, {"CPU": 9, "GPU": 3}], 2, None, (5, {"num_gpus": 2}, 4)),
        ([{"CPU": 9, "GPU": 8}, {"CPU": 9}], 4, 1, (1, {"num_gpus": 4}, 1)),
    ):
        assert worker_shares(machines, parallel, workers, "--ray auto") == found


def test_workers_that_no_machine_has_room_for_are_refused():
    for machines, parallel, workers, found in (
        ([{"CPU": 2}], 1, 3, "room for 2 workers[^$]*expected: a CPU for each of 3\n  got: CPUs of each machine: 2"),
        ([{}], 1, None, "room for 0 workers"),
        ([{"CPU": 9, "GPU": 8}], 1, 9, "room for 8 workers[^$]*a GPU and a CPU for each of 9"),
        ([{"CPU": 9, "GPU": 3}, {"CPU": 9, "GPU": 3}], 2, 3, "room for 2 workers"),
        ([{"CPU": 9, "GPU": 4}] * 2, 8, None, "room for 0 workers[^$]*8 GPUs and a CPU, on one machine, for each of 1"),
        ([{"CPU": 1, "GPU": 4}], 1, 2, "room for one worker[^$]*GPUs of each machine: 4; CPUs: 1"),
    ):
        with pytest.raises(UserError, match=f"--ray auto: the cluster has {found}"):
            worker_shares(machines, parallel, workers, "--ray auto")


def test_more_workers_than_the_cluster_has_room_for_are_refused(greedy, monkeypatch):
    freed = []
    monkeypatch.setattr(FunctionReward, "free", lambda self: freed.append(self.name))
    ray = StandInRay(dies=lambda calls: False)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(UserError, match="room for 2 workers"):
        sweep(engine="hf", points=2, ray="local", workers=3)
    assert not ray.actors and not ray.running
    # Before a worker is hired, the rewards of this process leave the memory that is the workers' now.
    assert set(freed) == {"words", "letters"}


def test_a_gpu_that_workers_do_not_see_is_refused(greedy):
    project = greedy / "rewarded-lines.yaml"
    project.write_text(project.read_text().replace("rewards:\n", "rewards:\n  r: {model: m, device: 'cuda:1'}\n", 1))
    with pytest.raises(UserError, match="(?s)rewards.r.device: a Ray worker does not see this GPU.*write `cuda`"):
        sweep(engine="hf", ray="local")
    with pytest.raises(UserError, match="(?s)--device: a Ray worker does not see.*expected: cuda:0 to cuda:1"):
        check_devices(load_project(greedy / "rewarded-lines.yaml"), "cuda:2", 2)


def test_workers_give_the_scores_of_none_and_a_death_costs_one_point(greedy, monkeypatch):
    engines = []
    monkeypatch.setattr(memory_levels, "choose_level", lambda *facts: engines.append(facts[-1]) or choose_level(*facts))
    alone = sweep(engine="hf", out="alone")
    with stand_in_ray(monkeypatch, dies=lambda calls: calls == 2) as ray:
        same(alone, sweep(engine="hf", out="shared", ray="local", workers=2))
    # Alone, then each worker as one of two on its machine.
    assert engines[0] == 1 and set(engines[1:]) == {2}
    assert len(ray.actors) == 3 and ray.calls == len(list((greedy / "alone/points").iterdir())) + 1


def test_workers_have_the_settings_of_this_process(greedy, monkeypatch):
    project = greedy / "rewarded-lines.yaml"
    said = "engine: {resident: host, attention: batch-invariant, quantization: fp8_per_tensor, max_num_seqs: 3}\n"
    project.write_text(project.read_text() + said)
    # What the command line takes back; transformers takes one of them.
    back = {"quantization": None, "attention": "default", "resident": "auto", "tensor_parallel_size": 2}
    plain = open_setup(load_project(), SweepOptions("hf", ray="local"))
    wanted = {"max_num_seqs": 3, "tensor_parallel_size": 2}
    auto = SweepOptions("hf", engine_args={"resident": "auto"}, ray="local")
    whole = SweepOptions(engine_args=back, ray="local")
    for options, found in ((plain.options, {"resident": "host"}), (auto, {}), (whole, wanted)):
        setup = replace(plain, options=options)
        with stand_in_ray(monkeypatch) as ray:
            RayEvaluator(setup).close()
        worker = ray.actors[0].made
        there = replace(setup, project=worker._project, options=worker._options)
        assert there.settings.as_dict() == setup.settings.as_dict() == found


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed in this environment")
def test_a_worker_with_other_kernels_is_refused(greedy, monkeypatch):
    evaluate = RayEvaluator.evaluate

    def elsewhere(*args):
        # The variable is set where the workers are, not here.
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
        yield from evaluate(*args)

    monkeypatch.setattr(RayEvaluator, "evaluate", elsewhere)
    with stand_in_ray(monkeypatch), pytest.raises(UserError, match="(?s)VLLM_BATCH_INVARIANT=1 on .*unset it there"):
        sweep(points=2, ray="local", workers=1)
    check_kernels(SweepOptions(engine_args={"attention": "batch-invariant"}))
    check_kernels(SweepOptions("hf"))


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
