"""Engines: Hugging Face as the reference, vLLM equal to it, weights swapped in place, seeds of prompts."""

import pytest
import torch
from tiny_models import PROMPTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewarded_lines import merge
from rewarded_lines.config import GenerationSpec
from rewarded_lines.errors import UserError
from rewarded_lines.engines.huggingface import SeededSampling
from rewarded_lines.engines.generation import load_generator, prompt_seed
from rewarded_lines.planning.plan import MergeSpec, plan_merge

GREEDY = GenerationSpec(temperature=0, max_tokens=12)
SAMPLED = GenerationSpec(temperature=1.0, top_p=0.9, max_tokens=12, seed=3)


def answers(generator, spec, prompts=PROMPTS):
    return [response.tokens for response in generator.generate(prompts, spec)]


def fresh(engine, folder, spec):
    generator = load_generator(engine, str(folder), spec, PROMPTS)
    try:
        return answers(generator, spec)
    finally:
        generator.close()


@pytest.fixture
def hf(tiny):
    generator = load_generator("hf", "sft", SAMPLED, PROMPTS)
    yield generator
    generator.close()


def test_greedy_is_the_models_own_argmax(tiny, hf):
    model = AutoModelForCausalLM.from_pretrained("sft").eval()
    tokenizer = AutoTokenizer.from_pretrained("sft")
    for prompt, response in zip(PROMPTS, hf.generate(PROMPTS, GREEDY), strict=True):
        ids = tokenizer(prompt)["input_ids"]
        total = 0.0
        for token in response.tokens:
            with torch.no_grad():
                scores = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            assert int(scores.argmax()) == token
            total += float(scores[token])
            ids.append(token)
        assert response.logprob == pytest.approx(total, abs=1e-3)
        assert response.ended == (2 in response.tokens)


def test_a_prompts_answer_does_not_depend_on_the_others(hf):
    first = answers(hf, SAMPLED)
    assert answers(hf, SAMPLED) == first
    assert answers(hf, SAMPLED, PROMPTS[:2]) == first[:2]
    assert answers(hf, SAMPLED.model_copy(update={"seed": 4})) != first


def test_seeds_of_two_runs_never_meet():
    seeds = {prompt_seed(GenerationSpec(seed=seed), index) for seed in range(3) for index in range(1000)}
    assert len(seeds) == 3000


def test_seeded_sampling_draws_from_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    spec = GenerationSpec(temperature=0.7)
    draws = [int(SeededSampling([seed], spec)(None, logits).argmax()) for seed in range(4000)]
    shares = torch.bincount(torch.tensor(draws), minlength=4) / 4000
    assert torch.allclose(shares, (logits[0] / 0.7).softmax(-1), atol=0.03)
    tail = GenerationSpec(temperature=1.0, top_p=0.5)
    assert {int(SeededSampling([seed], tail)(None, logits).argmax()) for seed in range(200)} == {0}


def test_swap_in_place_equals_merge_and_load(tiny, hf):
    plan = plan_merge("sft", {"first": "first", "second": "second"})
    spec = MergeSpec((0.3, 0.7), 1.0, 1.0)
    merge("sft", ["first", "second"], 0.3, out="out")
    hf.use(plan.tensors(spec))
    assert answers(hf, SAMPLED) == fresh("hf", tiny / "out", SAMPLED)


def test_vllm_equals_the_reference_and_swaps_in_place(tiny, hf):
    """One test, since the engine is slow to build: greedy equality, endpoints, and the way back to the base."""
    pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
    vllm = load_generator("vllm", "sft", SAMPLED, PROMPTS)
    try:
        assert answers(vllm, GREEDY) == answers(hf, GREEDY)
        base = answers(vllm, SAMPLED)
        assert answers(vllm, SAMPLED, PROMPTS[:2]) == base[:2]
        plan = plan_merge("sft", {"first": "first", "second": "second"})
        swapped = {}
        for lam in (0.0, 0.3, 1.0):
            weights = MergeSpec((lam, round(1 - lam, 9)), 1.0, 0.0)
            vllm.use(plan.tensors(weights))
            hf.use(plan.tensors(weights))
            assert answers(vllm, GREEDY) == answers(hf, GREEDY)
            swapped[lam] = answers(vllm, SAMPLED)
            responses = vllm.generate(PROMPTS, SAMPLED)
            own = [response.logprob for response in responses]
            assert vllm.logprobs(PROMPTS, responses) == pytest.approx(own, abs=1e-3)
            assert hf.logprobs(PROMPTS, responses) == pytest.approx(own, abs=1e-3)
        vllm.use(plan.tensors(MergeSpec((0.0, 0.0), 0.0, 0.0)))
        assert answers(vllm, SAMPLED) == base
    finally:
        vllm.close()
    merge("sft", ["first", "second"], ["1.0", "0.0"], beta=0, out="ends")
    for lam, policy in ((1.0, "first"), (0.0, "second")):
        own = fresh("vllm", tiny / policy, SAMPLED)
        assert swapped[lam] == own == fresh("vllm", tiny / f"ends/lam={lam:.2f}", SAMPLED)


def test_weights_of_another_layout_are_refused(hf):
    with pytest.raises(UserError, match="no parameter other.weight"):
        hf.use([("other.weight", torch.zeros(1))])
    with pytest.raises(UserError, match="parameters without weights"):
        hf.use([])


def test_a_models_own_penalties_do_not_count(tiny, hf):
    plain = answers(hf, GREEDY)
    config = tiny / "sft/generation_config.json"
    config.write_text(config.read_text().replace("{", '{"repetition_penalty": 5.0,', 1))
    assert fresh("hf", tiny / "sft", GREEDY) == plain


def test_prompts_that_do_not_fit_are_refused(tiny):
    with pytest.raises(UserError, match="do not fit the model"):
        load_generator("hf", "sft", GenerationSpec(max_tokens=500), PROMPTS)
