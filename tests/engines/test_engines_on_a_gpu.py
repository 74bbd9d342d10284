"""Engines on a card: a swap is a fresh engine token for token, and both engines agree on probabilities.

pytest -m gpu                  # on a card
pytest -m gpu --rehearse       # the same bodies with the CPU as device
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from tiny_adapters import save_adapter
from tiny_models import PROMPTS

from rewarded_lines import merge
from rewarded_lines.config import GenerationSpec
from rewarded_lines.engine_settings import EngineSettings
from rewarded_lines.engines.load_engine import load_generator
from rewarded_lines.merger.open_inputs import plan_adapters, plan_merge
from rewarded_lines.merger.spec import MergeSpec

pytestmark = pytest.mark.gpu

POLICIES = {"first": "first", "second": "second"}
MERGED = MergeSpec((0.3, 0.7), 1.0, 1.0)
# Blocks of keys and values hold 16 tokens: these prompts share several.
LONG = [f"{'the quick brown fox jumps over the lazy dog ' * 4}{prompt}" for prompt in PROMPTS]


@pytest.fixture
def spec(device):
    """Sampling in the type that the device is made for."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    return GenerationSpec(temperature=1.0, top_p=0.9, max_tokens=12, seed=3, dtype=dtype)


@pytest.fixture
def plan(tiny, spec):
    return plan_merge("sft", POLICIES, dtype=spec.dtype)


@contextmanager
def engine(name, model, spec, prompts=PROMPTS, **more):
    generator = load_generator(name, str(model), spec, prompts, **more)
    try:
        yield generator
    finally:
        generator.close()


def tokens(generator, spec, prompts=PROMPTS, model=None):
    return [response.tokens for response in generator.generate(prompts, spec, [model])[0]]


def settings_of(device, graphs, **more):
    """Return the settings of an engine, with CUDA graphs where they exist."""
    return EngineSettings.model_validate({"enforce_eager": device == "cpu" or not graphs, **more})


@pytest.mark.parametrize(("graphs", "levels"), [(False, ("gpu", "host", "disk")), (True, ("gpu",))])
def test_a_swap_is_a_fresh_engine(graphs, levels, device, spec, plan):
    """Cached prefixes of the model before must not count, and graphs must read the new weights."""
    pytest.importorskip("vllm")
    from rewarded_lines.engines.vllm_models import plan_message

    merge("sft", ["first", "second"], 0.3, dtype=spec.dtype, out="out")
    with engine("vllm", "out", spec, LONG, settings=settings_of(device, graphs)) as fresh:
        expected = tokens(fresh, spec, LONG)
    with engine("vllm", "sft", spec, LONG, plan=plan, settings=settings_of(device, graphs, resident="gpu")) as one:
        base = tokens(one, spec, LONG)
        for level in levels:
            # One engine for all places: it has left room for the first.
            one.call("open_plan", plan_message(plan), level)
            assert tokens(one, spec, LONG, MERGED) == expected != base, level
            assert tokens(one, spec, LONG) == base, level


def test_adapters_answer_as_in_a_fresh_engine(device, spec, tiny):
    pytest.importorskip("vllm")
    for seed, name in enumerate(POLICIES, start=1):
        save_adapter(tiny / "sft", tiny / f"lora-{name}", seed, target_modules="all-linear")
    plan = plan_adapters("sft", {name: f"lora-{name}" for name in POLICIES})
    other = MergeSpec((0.8, 0.2), 1.0, 0.5)
    # Through files, and in memory.
    with engine("vllm", "sft", spec, LONG, plan=plan, settings=settings_of(device, True, resident="disk")) as fresh:
        expected = tokens(fresh, spec, LONG, MERGED)
    with engine("vllm", "sft", spec, LONG, plan=plan, settings=settings_of(device, True)) as one:
        others = tokens(one, spec, LONG, other)
        assert one._folders is None
        assert tokens(one, spec, LONG, MERGED) == expected != others
        assert tokens(one, spec, LONG, other) == others


def test_both_engines_agree_on_probabilities(device, spec, plan):
    pytest.importorskip("vllm")
    answers = {}
    with engine("vllm", "sft", spec, plan=plan, settings=settings_of(device, graphs=True)) as one:
        (responses,) = one.generate(PROMPTS, spec, [MERGED])
        pairs = [(head, answer.tokens) for head, answer in zip(one.encode(PROMPTS), responses, strict=True)]
        answers["vllm"] = one.logprobs(pairs, MERGED)
    with engine("hf", "sft", spec, plan=plan) as reference:
        answers["hf"] = reference.logprobs(pairs, MERGED)
    # A sum over 12 tokens; bfloat16 has eight bits.
    error = 0.5 if spec.dtype == "bfloat16" else 1e-3
    assert answers["vllm"] == pytest.approx(answers["hf"], abs=error)
    assert [answer.logprob for answer in responses] == pytest.approx(answers["vllm"], abs=error)


def test_transformers_swaps_on_the_device(device, spec, plan):
    merge("sft", ["first", "second"], 0.3, dtype=spec.dtype, out="out")
    with engine("hf", "out", spec) as fresh:
        expected = tokens(fresh, spec)
    with engine("hf", "sft", spec, plan=plan) as one:
        assert {weight.device.type for weight in one._model.parameters()} == {device}
        base = tokens(one, spec)
        assert tokens(one, spec, model=MERGED) == expected != base
        assert tokens(one, spec) == base
