"""Advantages of RLOO and GRPO against direct calculations, with rewards that abstain; and where responses end."""

import json
import logging
import math
from statistics import fmean, stdev

import pytest
import torch
from datasets import Dataset
from tiny_models import make_model, make_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel
from trl import GRPOConfig, RLOOConfig

from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.errors import UserError
from rewarded_lines.training.online_trainer import (
    OnlineTrainer,
    ReadGRPOTrainer,
    ReadRLOOTrainer,
    check_standardization,
)
from rewarded_lines.training.training_record import MetricsCallback
from rewarded_lines.training.training_reward import RewardFunctions, WeightedReward

NAN = math.nan
GROUP, SMALL = 4, 1e-4
# Four groups: with a response that no reward scores, with a single score, without any, and with all.
FIRST = [1.0, NAN, 4.0, NAN, NAN, 5.0, NAN, NAN, *[NAN] * 4, 3.0, 9.0, 2.0, 2.5]
SECOND = [2.0, NAN, NAN, 6.0, *[NAN] * 8, 0.01, 0.02, 0.03, 0.01]
WEIGHTS = {"first": 1.0, "second": 0.5}


class Given:
    """A reward with these scores, whatever the responses."""

    limit, fingerprint = None, ""

    def __init__(self, scores):
        self.scores = scores

    def score(self, prompts, *others):
        return self.scores[: len(prompts)]


def there(values):
    return [value for value in values if not math.isnan(value)]


def around(values, at):
    """Return the scores of a response's group."""
    start = at - at % GROUP
    return there(values[start : start + GROUP])


def summed(columns, weights):
    rows = zip(*columns, strict=True)
    return [
        sum(weight * score for weight, score in zip(weights, row, strict=True) if not math.isnan(score))
        if there(row)
        else NAN
        for row in rows
    ]


def deviation(values):
    return stdev(values) if len(values) > 1 else NAN


def leave_one_out(columns, weights, normalized):
    """A_k = r_k − mean of the others that have a score; without others none."""
    totals = summed(columns, weights)
    found = [
        score - (sum(group) - score) / (len(group) - 1) if len(group := around(totals, at)) > 1 else NAN
        for at, score in enumerate(totals)
    ]
    known = there(found)
    return [(one - fmean(known)) / (stdev(known) + SMALL) if normalized else one for one in found]


def sum_then_normalize(columns, weights, scale):
    totals, found = summed(columns, weights), []
    for at, score in enumerate(totals):
        group = around(totals, at)
        divisor = {
            "group": deviation(group) + SMALL,
            "batch": deviation(there(totals)) + SMALL,
            "none": 1.0,
        }[scale]
        found.append((score - fmean(group)) / divisor if group else NAN)
    return found


def normalize_then_sum(columns, weights):
    own = [
        [
            (score - fmean(group)) / (deviation(group) + SMALL) if len(group := around(column, at)) > 1 else NAN
            for at, score in enumerate(column)
        ]
        for column in columns
    ]
    scored = [bool(there(row)) for row in zip(*columns, strict=True)]
    totals = [
        (0.0 if math.isnan(total) else total) if known else NAN
        for total, known in zip(summed(own, weights), scored, strict=True)
    ]
    known = there(totals)
    return [(total - fmean(known)) / (stdev(known) + SMALL) for total in totals]


@pytest.mark.parametrize(
    ("kind", "settings", "penalty", "by_hand"),
    [
        *(
            (ReadRLOOTrainer, {"normalize_advantages": on}, fine, lambda *given, on=on: leave_one_out(*given, on))
            for on, fine in ((True, None), (False, 0.7))
        ),
        *(
            (
                ReadGRPOTrainer,
                {"scale_rewards": scale},
                fine,
                lambda *given, scale=scale: sum_then_normalize(*given, scale),
            )
            for scale, fine in (("group", 0.7), ("batch", None), ("none", None))
        ),
        *(
            (ReadGRPOTrainer, {"multi_objective_aggregation": "normalize_then_sum"}, fine, normalize_then_sum)
            for fine in (None, 0.7)
        ),
    ],
)
def test_advantages_are_those_of_a_direct_calculation(tmp_path, caplog, kind, settings, penalty, by_hand):
    tokenizer = make_tokenizer()
    # So many that some responses end.
    reader = ResponseReader(tokenizer, frozenset([tokenizer.eos_token_id, *range(100, 160)]))
    reward = WeightedReward({"first": Given(FIRST), "second": Given(SECOND)}, WEIGHTS)
    prompts = ["the quick", "a film", "dog", "one"]
    rewarded = RewardFunctions(reward, reader, [{"prompt": prompt} for prompt in prompts], penalty)
    config = (RLOOConfig if kind is ReadRLOOTrainer else GRPOConfig)(
        output_dir=str(tmp_path),
        per_device_train_batch_size=16,
        num_generations=GROUP,
        max_completion_length=6,
        max_steps=1,
        logging_steps=1,
        beta=0.0,
        temperature=3.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        reward_weights=rewarded.weights,
        **settings,
    )
    trainer = kind(
        model=make_model(0),
        args=config,
        reader=reader,
        chats=False,
        reward_funcs=rewarded.functions,
        train_dataset=Dataset.from_dict({"prompt": prompts, "row": range(4)}),
        processing_class=tokenizer,
        callbacks=[MetricsCallback(tmp_path)],
    )
    made, own = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: made.append(own(inputs)) or made[-1]
    with caplog.at_level(logging.WARNING):
        trainer.train()
    (batch,) = made
    ended = [not reader.ends.isdisjoint(row) for row in batch["completion_ids"].tolist()]
    fines = [-1.0 + end if there(row) else NAN for *row, end in zip(FIRST, SECOND, ended, strict=True)]
    columns, weights = [FIRST, SECOND], list(WEIGHTS.values())
    if penalty:
        assert len(set(there(fines))) == 2
        columns, weights = [*columns, fines], [*weights, penalty]
    wanted = [0.0 if math.isnan(one) else one for one in by_hand(columns, weights)]
    # Sums of scores near 1e-2 in float32, divided by a deviation near 1e-4, have three digits.
    assert batch["advantages"].tolist() == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    assert all(wanted[at] == 0 for at, row in enumerate(zip(*columns, strict=True)) if not there(row))
    assert any(wanted)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (logged,) = [line for line in lines if "reward" in line]
    # A part that abstains adds nothing to the sum.
    assert logged["reward"] == pytest.approx(fmean(there(summed(columns, weights)))) and logged["unscored"] == 8
    assert logged["rewards/second/mean"] == pytest.approx(fmean(there(SECOND)))
    assert (trainer.unscored, trainer.responses) == (8, 16)
    assert "returned None" not in caplog.text


def test_ways_to_standardize_that_trl_would_refuse_late_or_ignore_are_refused(tmp_path):
    common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    wrong = GRPOConfig(**common, scale_rewards="grup", multi_objective_aggregation="gdpo")
    with pytest.raises(UserError, match="sum_then_normalize, normalize_then_sum(.|\n)*group, batch, none"):
        check_standardization(wrong, {"scale_rewards"})
    apart = GRPOConfig(**common, scale_rewards="batch", multi_objective_aggregation="normalize_then_sum")
    with pytest.raises(UserError, match="always divides by the deviation of the group"):
        check_standardization(apart, {"scale_rewards"})
    check_standardization(apart, set())


class Sampler:
    """A trainer that samples `rows`, as RLOO does or, with `logps` in a tuple, as GRPO does."""

    def _generate_single_turn(self, prompt_ids, *rest):
        return (self.rows, *self.logps) if self.logps else self.rows


LOGPS = [[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, -7.0]]


@pytest.mark.parametrize(
    ("logps", "kept"), [((), ()), ((None,), (None,)), ((LOGPS,), ([LOGPS[0][:3], LOGPS[1][:2]],))], ids=str
)
def test_responses_end_at_every_end_and_at_stop_texts_with_their_log_probabilities(logps, kept):
    tokenizer = make_tokenizer()
    word, end, stop = tokenizer(" film dog quick", add_special_tokens=False)["input_ids"][:3]
    trainer = object.__new__(type("Trainer", (OnlineTrainer, Sampler), {}))
    trainer.reader = ResponseReader(tokenizer, frozenset([end]), stop=(tokenizer.decode([stop]),))
    trainer.chats, trainer.logps = False, logps
    trainer.rows = [[word, word, end, word], [word, stop, word]]
    prompts, *rest = trainer._tokenize_prompts(["a film", "the dog"])
    cut = [[word, word, end], [word, stop]]
    assert trainer._generate_single_turn(prompts, *rest) == ((cut, *kept) if kept else cut)


@pytest.mark.parametrize(("use_vllm", "key"), [(False, "eos_token_id"), (True, "stop_token_ids")])
def test_both_ways_to_generate_are_told_every_end(tmp_path, monkeypatch, use_vllm, key):
    built = []
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", lambda **parts: built.append(parts))
    tokenizer = make_tokenizer()
    settings = {"per_device_train_batch_size": 2, "num_generations": 2, "generation_kwargs": {"seed": 3}}
    trainer = ReadGRPOTrainer(
        model=make_model(0),
        args=GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, use_vllm=use_vllm, **settings),
        reader=ResponseReader(tokenizer, frozenset([7, 5])),
        chats=False,
        reward_funcs=len,
        train_dataset=Dataset.from_dict({"prompt": ["a"]}),
        processing_class=tokenizer,
    )
    told = built[0]["generation_kwargs"] if use_vllm else trainer.generation_kwargs
    assert told[key] == [5, 7] and told["seed"] == 3 and trainer.eos_token_ids == [5, 7]
    # vLLM reserves memory for the longest sequence that can come, not for all positions of the model.
    longest = len(tokenizer("a")["input_ids"]) + trainer.max_completion_length
    assert not use_vllm or built[0]["max_model_length"] == longest


@pytest.mark.parametrize(("kind", "settings"), [(ReadRLOOTrainer, RLOOConfig), (ReadGRPOTrainer, GRPOConfig)])
def test_padding_on_the_left_has_no_positions(tmp_path, kind, settings):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=2, pad_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    torch.nn.init.normal_(model.transformer.wpe.weight)
    model.save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer()
    args = settings(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    trainer = kind(
        args=args,
        reader=ResponseReader(tokenizer, frozenset([2])),
        chats=False,
        model=GPT2LMHeadModel.from_pretrained(tmp_path / "model"),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8, "row": range(8)}),
        processing_class=tokenizer,
    )
    text, mask = torch.tensor([[0, 0, 5, 6, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        found, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, text, mask, 3)
        whole = model(text[:, 2:]).logits.log_softmax(-1)[0, 1:4]
    assert torch.allclose(found[0], whole.gather(1, text[0, 4:, None])[:, 0], atol=1e-5)
