"""The messages between the generator and vLLM's workers, with a stand-in for vLLM."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_models import PROMPTS

from rewarded_lines.config import GenerationSpec
from rewarded_lines.engine_settings import EngineSettings
from rewarded_lines.engines import vllm_models
from rewarded_lines.engines.base import Workload, base_spec
from rewarded_lines.engines.transformers_engine import HfGenerator
from rewarded_lines.engines.vllm_models import MergingWorker, VllmGenerator, plan_message
from rewarded_lines.errors import Problem, UserError
from rewarded_lines.merger.lines_schedule import Line
from rewarded_lines.merger.model_plan import ModelPlan
from rewarded_lines.merger.open_inputs import plan_merge
from rewarded_lines.merger.spec import MergeSpec

GREEDY = GenerationSpec(temperature=0, max_tokens=2)
TIES = MergeSpec((0.3, 0.7), 1.0, 0.5, "ties", {"density": 0.5}).complete(2)
APART = MergeSpec((0.3, 0.7), lines=(Line(0.5, 1.0), Line(blocks=(1.0, 2.0, 0.0, 0.7))), modules=(("mlp", 0.5),))


class Worker(MergingWorker):
    device = torch.device("cpu")

    def reload_weights(self, weights_iterator):
        self.weights = {name: tensor.clone() for name, tensor in weights_iterator}

    def get_model(self):
        return SimpleNamespace()


class StandIn(VllmGenerator):
    """Sends messages as JSON, and answers with the worker's weights."""

    def _start(self, work, beside):
        assert beside == 0
        self.worker = Worker()

    def call(self, method, *args):
        return [json.loads(json.dumps(getattr(self.worker, method)(*json.loads(json.dumps(args)))))]

    def _generate(self, prompts, spec, loaded):
        assert loaded == [None]
        return [self.worker.weights]


@pytest.fixture
def generator(tiny):
    plan = plan_merge("sft", {"first": "first", "second": "second"})
    return StandIn(Workload("sft", GREEDY, PROMPTS, plan))


def check(generator, plan):
    merges = [TIES, MergeSpec((1.0, 0.0)), APART]
    found = generator.generate(PROMPTS, GREEDY, [*merges, None])
    for spec, weights in zip((*merges, base_spec(plan)), found, strict=True):
        expected = {name: tensor.clone() for name, tensor in plan.tensors(spec)}
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert generator.swap_seconds > 0


def test_a_worker_in_this_process_uses_the_plan_itself(generator):
    assert generator.worker.merge_plan is generator._plan
    check(generator, generator._plan)


@pytest.mark.parametrize("kind", [StandIn, HfGenerator])
def test_base_and_policies_are_loaded_with_the_engine(kind, tiny):
    plan = plan_merge("sft", {"first": "first", "second": "second"})
    engine = kind(Workload("sft", GREEDY, PROMPTS, plan, settings=EngineSettings(resident="host")))
    held = engine._inputs if kind is HfGenerator else engine.worker.resident
    assert held.level == "host" and held._arrays.keys() == {*plan.names}


def test_a_worker_in_another_process_opens_the_plan_again(tiny, monkeypatch):
    monkeypatch.setattr(vllm_models, "plan_message", lambda plan: {**plan_message(plan), "process": 0})
    plan = plan_merge("sft", {"first": "first", "second": "second"}, layers=r"model\.layers\.(\d+)\.")
    generator = StandIn(Workload("sft", GREEDY, PROMPTS, plan))
    assert generator.worker.merge_plan is not plan
    check(generator, plan)


def test_a_merge_that_fails_in_the_middle_leaves_the_weights_from_before(generator, monkeypatch):
    worker, own = generator.worker, Worker.reload_weights
    loads = []

    def reload_weights(self, weights_iterator):
        own(self, weights_iterator)
        loads.append(list(self.weights))

    def refuse_half(self, spec, *more):
        for index, pair in enumerate(plain(self, spec, *more)):
            if spec == TIES and index == 5:
                raise UserError(Problem("a weight is not finite"))
            yield pair

    generator.generate(PROMPTS, GREEDY, [APART])
    before, plain = worker.weights, ModelPlan.tensors
    monkeypatch.setattr(Worker, "reload_weights", reload_weights)
    monkeypatch.setattr(ModelPlan, "tensors", refuse_half)
    with pytest.raises(UserError, match="not finite"):
        generator.generate(PROMPTS, GREEDY, [TIES])
    # vLLM got every tensor, twice.
    assert [sorted(names) for names in loads] == [sorted(before)] * 2
    assert all(torch.equal(worker.weights[name], tensor) for name, tensor in before.items())


def test_a_users_error_comes_back_from_the_worker(generator, monkeypatch):
    def refuse(plan, spec, *more):
        raise UserError([Problem("a weight is not finite", "layer", remedy="none"), Problem("another")])

    with monkeypatch.context() as patch:
        patch.setattr(ModelPlan, "tensors", refuse)
        with pytest.raises(UserError, match="layer: a weight is not finite") as caught:
            generator.generate(PROMPTS, GREEDY, [TIES])
    assert len(caught.value.problems) == 2
    check(generator, generator._plan)
