"""Classifiers in vLLM: the logits that transformers gives, and an engine that ends when it is freed."""

import random
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from rewarded_lines.config import GenerationSpec
from rewarded_lines.engines.load_engine import load_generator
from rewarded_lines.engines.tokenizers import load_config
from rewarded_lines.engines.vllm_process import vllm_device
from rewarded_lines.errors import UserError
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.judge_models import JudgeModel
from rewarded_lines.rewards.load_rewards import load_reward

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed in this environment", allow_module_level=True)
WORDS = ["the", "quick", "brown", "fox", "film", "of", "great", "beauty", "qq", "?!", "Ω"]


def test_logits_equal_those_of_transformers(wide_classifier):
    rng = random.Random(0)
    prompts = [" ".join(rng.choices(WORDS, k=rng.randint(0, 9))) for _ in range(40)]
    responses = [" ".join(rng.choices(WORDS, k=rng.randint(0, 9))) for _ in range(40)]
    spec = {"model": str(wide_classifier), "format": "1-0x0.5", "template": "Q{prompt}A{response}", "max_tokens": 512}
    expected = load_reward("r", RewardSpec(**spec), device="cpu")
    reward = load_reward("r", RewardSpec(**spec, backend="vllm"), device="cpu")
    scores = reward.score(prompts, responses)
    assert scores == pytest.approx(expected.score(prompts, responses), abs=1e-5)
    assert max(map(abs, scores)) > 1.0, "no sigmoid"
    assert reward.fingerprint == expected.fingerprint and reward.size == pytest.approx(expected.size, rel=0.1)
    with pytest.raises(UserError, match="(?s)too long for the classifier.*prompt 1"):
        reward.score(["a", "b"], ["c", "q" * 600])
    reward.free()
    assert not reward.loaded
    from vllm.platforms import current_platform

    assert vllm_device() == current_platform.device_type


@pytest.mark.slow
def test_a_freed_one_is_loaded_again_beside_a_policys_engine(wide_classifier, tiny):
    # Another test of this process may have left it so.
    before = torch.distributed.is_initialized()
    reward = load_reward("r", RewardSpec(model=str(wide_classifier), format="0", backend="vllm"), device="cpu")
    scores = reward.score(WORDS, WORDS)
    spec = GenerationSpec(max_tokens=8, temperature=0)
    policy = load_generator("vllm", "sft", spec, WORDS)
    answers = policy.generate(WORDS, spec)
    # Each outlives the end of the other. Texts of the last call would not be read again.
    reward.free()
    assert policy.generate(WORDS, spec) == answers
    assert reward.score(WORDS, WORDS) == pytest.approx(scores, abs=1e-5) and reward.loaded
    assert reward.score(["of"], ["of"]) == pytest.approx([scores[5]], abs=1e-5)
    policy.close()
    assert reward.score(WORDS, WORDS) == pytest.approx(scores, abs=1e-5)
    reward.free()
    assert torch.distributed.is_initialized() == before


def test_the_memory_of_a_judge_from_the_hub_is_known_once_it_is_downloaded(tiny, monkeypatch):
    """Before, its size was unknown, and it took nine tenths of a GPU."""
    sizes, judge = [], object.__new__(JudgeModel)
    judge._where, judge._reference, judge.device, judge.longest = "reward `r`", "org/judge", "cpu", 100
    declared = {"judge": "org/judge", "template": "{prompt}{response}?", "token": "yes", "backend": "vllm"}
    judge._spec, judge._config = RewardSpec(**declared), load_config("sft")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda reference, **_: str(tiny / "sft"))
    monkeypatch.setattr("rewarded_lines.rewards.judge_models.VllmJudge", lambda work, size: sizes.append(size))
    judge._vllm()
    weights = sum(tensor.numel() * 4 for tensor in load_file(tiny / "sft/model.safetensors").values())
    assert judge.size == weights and sizes[0] >= weights + (2 << 30)


@pytest.mark.parametrize("error", [ValueError("No available memory for the cache blocks."), MemoryError()])
def test_where_memory_runs_out_the_other_models_leave(wide_classifier, tiny, monkeypatch, error):
    starts, own = [], {"backend": "vllm", "template": "{prompt}{response}"}

    def start(**options):
        starts.append(options)
        raise error

    monkeypatch.setattr("rewarded_lines.engines.vllm_versions.load_vllm", lambda settings: start)
    for declared in ({"model": str(wide_classifier)}, {"judge": "sft", "token": "o"}):
        starts.clear()
        with pytest.raises(UserError, match="reward `r`: out of memory: .* does not fit"):
            load_reward("r", RewardSpec(**declared, **own), tiny, "cpu").score(["a"], ["b"])
        assert len(starts) == 2


def test_what_vllm_cannot_score_is_refused(wide_classifier, tiny):
    with pytest.raises(UserError, match="not a classifier.*"):
        load_reward("r", RewardSpec(model="sft", backend="vllm"), tiny, "cpu")
    with pytest.raises(UserError, match="class that the model does not have"):
        load_reward("r", RewardSpec(model=str(wide_classifier), backend="vllm", format="5"), device="cpu")
