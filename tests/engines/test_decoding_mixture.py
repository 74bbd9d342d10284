"""MOD: several policies answer as one; values against a direct calculation, batches, corners, adapters."""

import pytest
import torch
from tiny_adapters import save_adapter
from tiny_models import PROMPTS
from transformers import AutoModelForCausalLM

from rewarded_lines import merge
from rewarded_lines.config import GenerationSpec
from rewarded_lines.engines.base import seeded_rows
from rewarded_lines.engines.load_engine import load_generator
from rewarded_lines.engines.transformers_sampling import SeededSampling
from rewarded_lines.merger.methods import MOD
from rewarded_lines.merger.open_inputs import plan_merge
from rewarded_lines.merger.spec import MergeSpec

GREEDY = GenerationSpec(temperature=0, max_tokens=8)
SAMPLED = GenerationSpec(temperature=0.9, top_p=0.9, top_k=50, min_p=0.001, repetition_penalty=1.2, max_tokens=8, n=2)


def mod(*weights):
    return MergeSpec(weights, 1.0, 0.0, MOD)


@pytest.fixture
def hf(tiny):
    plan = plan_merge("sft", {"first": "first", "second": "second"})
    generator = load_generator("hf", "sft", GREEDY, PROMPTS, plan=plan, models=2)
    yield generator
    generator.close()


def logits(model, ids):
    """Return the logits of the token after `ids`, computed on the whole text without a cache."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize(
    ("spec", "weights"), [(GREEDY, (0.3, 0.7)), (SAMPLED, (1.5, -0.5))], ids=["greedy", "sampled, outside the simplex"]
)
def test_answers_are_those_of_a_direct_calculation_step_by_step(hf, spec, weights):
    prompts = PROMPTS[:3]
    models = [AutoModelForCausalLM.from_pretrained(name).eval() for name in ("first", "second")]
    (answers,) = hf.generate(prompts, spec, [mod(*weights)])
    pairs = [
        (head, answer.tokens) for (head, _), answer in zip(seeded_rows(hf.encode(prompts), spec), answers, strict=True)
    ]
    for (head, seed), answer in zip(seeded_rows(hf.encode(prompts), spec), answers, strict=True):
        sampling, ids, total = SeededSampling([seed], spec, [head]), list(head), 0.0
        for token in answer.tokens:
            found = [logits(model, ids) for model in models]
            mixed = sum(weight * one for weight, one in zip(weights, found, strict=True))
            assert int(sampling(torch.tensor([ids]), mixed[None])[0].argmax()) == token
            # The distribution is Π πᵢ^λᵢ, normalised.
            logs = [weight * one.log_softmax(-1) for weight, one in zip(weights, found, strict=True)]
            total += float(sum(logs).log_softmax(-1)[token])
            ids.append(token)
        assert answer.logprob == pytest.approx(total, abs=1e-3)
        assert len(answer.tokens) == spec.max_tokens or answer.ended
    assert hf.logprobs(pairs, mod(*weights)) == pytest.approx([one.logprob for one in answers], abs=1e-4)


def test_a_corner_is_the_policy_and_neither_batches_nor_turns_change_an_answer(hf):
    for place, name in enumerate(("first", "second")):
        corner = tuple(float(at == place) for at in range(2))
        alone = load_generator("hf", name, GREEDY, PROMPTS)
        assert hf.generate(PROMPTS, SAMPLED, [mod(*corner)]) == alone.generate(PROMPTS, SAMPLED)
        alone.close()
    model = mod(0.6, 0.4)
    (whole,) = hf.generate(PROMPTS, SAMPLED, [model])
    # A merge, the SFT model and another mixture come between; a smaller batch has other padding.
    soup = MergeSpec((0.6, 0.4), 1.0, 0.0)
    (merged,), (sft,) = hf.generate(PROMPTS, SAMPLED, [soup]), hf.generate(PROMPTS, SAMPLED)
    assert [one.tokens for one in merged] != [one.tokens for one in whole] != [one.tokens for one in sft]
    hf.generate(PROMPTS, SAMPLED, [mod(0.1, 0.9)])
    (again,) = hf.generate(PROMPTS, SAMPLED, [model])
    assert again == whole
    assert [one.tokens for one in hf.generate(PROMPTS[:2], SAMPLED, [model])[0]] == [one.tokens for one in whole[:4]]
    assert hf.generate(PROMPTS, SAMPLED)[0] == sft and hf.generate(PROMPTS, SAMPLED, [soup])[0] == merged
    text = next(one.text for one in whole if len(one.text) > 6)[2:5]
    stopped = hf.generate(PROMPTS, SAMPLED.model_copy(update={"stop": (text,)}), [model])[0]
    assert all(one.text == before.text.split(text)[0] for one, before in zip(stopped, whole, strict=True))
    assert "2 models of" in hf.told[-1]


@pytest.mark.slow
def test_adapters_are_folded_so_a_corner_is_the_point_of_that_policy(tiny):
    folders = {name: str(save_adapter(tiny / "sft", tiny / name, seed)) for seed, name in enumerate(("a", "b"))}
    plan = plan_merge("sft", folders, dtype="float32")
    generator = load_generator("hf", "sft", GREEDY, PROMPTS, plan=plan, models=2)
    (corner,), (policy,) = (
        generator.generate(PROMPTS, SAMPLED, [one]) for one in (mod(0.0, 1.0), MergeSpec((0.0, 1.0), 1.0, 0.0))
    )
    assert corner == policy
    (answers,) = generator.generate(PROMPTS, GREEDY, [mod(0.5, 0.5)])
    for name, folder in folders.items():
        merge("sft", {name: folder}, 1.0, beta=0, as_="full", out=f"{name}-full")
    models = [AutoModelForCausalLM.from_pretrained(f"{name}-full").eval() for name in folders]
    for head, answer in zip(generator.encode(PROMPTS), answers, strict=True):
        for place, token in enumerate(answer.tokens):
            found = [logits(model, [*head, *answer.tokens[:place]]) for model in models]
            assert int(sum(found).argmax()) == token
    generator.close()
