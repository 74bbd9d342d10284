"""Models that cap the logits of their attention (Gemma 2): transformers' default attention leaves the caps out."""

import pytest
import torch
from tiny_models import make_tokenizer
from transformers import AutoModelForSequenceClassification, Gemma2Config, Gemma2ForCausalLM
from transformers import Gemma2ForSequenceClassification as Classifier
from trl import ModelConfig

from rewarded_lines.config import GenerationSpec
from rewarded_lines.engines.load_engine import load_generator
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.judge_models import load_causal
from rewarded_lines.rewards.load_rewards import load_reward
from rewarded_lines.training.load_models import load_classifier, load_policy

IDS = make_tokenizer()("the quick brown fox jumps")["input_ids"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A causal model and a classifier, with weights so large that caps count."""
    root = tmp_path_factory.mktemp("capped")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32, "vocab_size": 300}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "query_pre_attn_scalar": 32, "num_labels": 1}
    for kind in (Gemma2ForCausalLM, Classifier):
        torch.manual_seed(0)
        kind(Gemma2Config(**sizes, **heads, initializer_range=0.6)).save_pretrained(root / kind.__name__)
        make_tokenizer().save_pretrained(root / kind.__name__)
    return root


def by(model):
    """Return the log-probability of the tokens after the first, or the logit of all."""
    with torch.inference_mode():
        table = model.eval()(torch.tensor([IDS])).logits[0]
    if table.ndim == 1:
        return float(table[0])
    return float(table.log_softmax(-1)[:-1].gather(1, torch.tensor(IDS)[1:, None]).sum())


def test_caps_count_wherever_a_model_is_loaded(folder):
    path = str(folder / "Gemma2ForCausalLM")
    capped, without = (
        by(Gemma2ForCausalLM.from_pretrained(path, attn_implementation=one)) for one in ("eager", "sdpa")
    )
    assert abs(capped - without) > 0.01
    engine = load_generator("hf", path, GenerationSpec(max_tokens=1), ["the"])
    assert engine.logprobs([(IDS[:1], IDS[1:])]) == [pytest.approx(capped, abs=1e-4)]
    spec = RewardSpec(judge=path, token="yes", template="{response}")
    assert by(load_causal("here", spec, path)) == pytest.approx(capped, abs=1e-4)
    assert by(load_policy(path, ModelConfig(dtype="float32"))) == pytest.approx(capped, abs=1e-4)
    # The user's word counts.
    chosen = load_policy(path, ModelConfig(dtype="float32", attn_implementation="sdpa"))
    assert by(chosen) == pytest.approx(without, abs=1e-4)


def test_caps_count_in_a_classifier_and_its_old_scores_do_not(folder):
    path = str(folder / "Gemma2ForSequenceClassification")
    capped = by(AutoModelForSequenceClassification.from_pretrained(path, attn_implementation="eager"))
    reward = load_reward("r", RewardSpec(model=path), device="cpu")
    assert reward.score(["the quick"], [" brown fox jumps"]) == [pytest.approx(capped, abs=1e-4)]
    assert reward.fingerprint.endswith(":capped")
    assert load_classifier(path, ModelConfig(dtype="float32")).config._attn_implementation == "eager"
