"""Out of memory: batches shrink, every score and response comes, and a row that fits nowhere is an error."""

import json
import random

import pytest
import torch
from tiny_models import PROMPTS

from rewarded_lines.config import GenerationSpec
from rewarded_lines.engines.load_engine import load_generator
from rewarded_lines.errors import UserError
from rewarded_lines.out_of_memory import FittingBatches, ran_out
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.load_rewards import load_reward
from rewarded_lines.rewards.text_batches import batch_size_on, make_batches

WORDS = ["the", "quick", "brown", "fox", "film", "of", "great", "beauty"]


def texts(count, longest=12):
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(count)]


@pytest.fixture
def card(monkeypatch):
    """A device on which a call of a model with more tokens than `most` finds no memory; it logs the sizes of calls."""

    class Card:
        most = 1 << 40
        calls = []

    forward = torch.nn.Embedding.forward

    def limited(self, ids):
        Card.calls.append(tuple(ids.shape))
        if ids.numel() > Card.most:
            torch.empty(1 << 52, dtype=torch.uint8, device=ids.device)
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", limited)
    Card.calls = []
    return Card


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "rewarded_lines"]


@pytest.mark.parametrize(
    ("device", "architecture"),
    [("cpu", "llama"), ("cpu", "bart"), pytest.param("cuda", "llama", marks=pytest.mark.gpu)],
)
def test_a_classifier_reads_all_texts_in_smaller_batches(classifiers, card, caplog, device, architecture):
    more = {"template": "{prompt}{response}</s>"} if architecture == "bart" else {}
    more["batch_size"] = 64
    prompts, pool = [""] * 60, texts(60, 9)
    reward = load_reward("r", RewardSpec(model=str(classifiers[architecture]), format="0", **more), device=device)
    before = reward.score(prompts, pool)
    reward.free()
    card.most = 200
    found = reward.score(prompts, pool)
    assert found == pytest.approx(before, abs=1e-5)
    (line,) = told(caplog)
    assert line.startswith("reward `r`: memory ran out with 64 texts of 8 tokens in a batch; such texts go in smaller")
    assert line.endswith(
        "256` in the reward in place of `batch_size:` gives every text that is scored from then on the same batches"
    )
    # Later calls begin with what fits, and a score still depends on its pair alone.
    card.calls.clear()
    again = reward.score(prompts[:40], [f"{text} fox" for text in pool[:40]])
    assert all(rows * width <= card.most for rows, width in card.calls)
    reward.free()
    assert reward.score(prompts[:40], [f"{text} fox" for text in pool[:40]]) == again
    assert len(told(caplog)) == 1


def test_smaller_batches_are_those_of_batch_tokens(classifiers, card):
    pool = [text for text in texts(40) if len(text) > 12]
    spec = RewardSpec(model=str(classifiers["llama"]), format="0", template="{response}")
    reward = load_reward("r", spec, device="cpu")
    card.most = 128
    found = reward.score([""] * len(pool), pool)
    declared = RewardSpec(**{**spec.model_dump(exclude_defaults=True), "batch_tokens": 128})
    card.most = 1 << 40
    card.calls.clear()
    assert load_reward("r", declared, device="cpu").score([""] * len(pool), pool) == found
    assert max(rows * width for rows, width in card.calls) == 128


def test_what_does_not_fit_in_the_smallest_batch_is_one_clear_error(classifiers, card):
    reward = load_reward("r", RewardSpec(model=str(classifiers["llama"]), format="0"), device="cpu")
    card.most = 20
    with pytest.raises(UserError, match="(?s)reward `r`: out of memory: not even 2 texts of 16 tokens fit.*memory"):
        reward.score([""], ["the quick brown fox of great beauty"])
    assert len(reward.score([""], ["the"])) == 1


def test_errors_of_other_kinds_pass(classifiers, monkeypatch):
    reward = load_reward("r", RewardSpec(model=str(classifiers["llama"]), format="0"), device="cpu")

    def broken(self, ids):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.nn.Embedding, "forward", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        reward.score([""], ["the"])


@pytest.mark.parametrize(
    "settings", [{"token": "o"}, {"pattern": "[a-z]+", "unmatched": "abstain", "temperature": 1.0}]
)
def test_a_judge_asks_in_smaller_batches(tiny, card, caplog, settings):
    settings = {**settings, **({"verdicts": {"a": 1.0}} if "pattern" in settings else {"unmatched": "abstain"})}
    spec = RewardSpec(judge="sft", template="{response}\n", max_new_tokens=4, **settings)
    reward = load_reward("j", spec, device="cpu")
    before = reward.score([""] * 40, texts(40, 4))
    card.most = 100
    assert reward.score([""] * 40, texts(40, 4)) == pytest.approx(before, abs=1e-6, nan_ok=True)
    assert len(told(caplog)) == 1 and "in the reward gives every text" in told(caplog)[0]


def test_the_engine_writes_the_same_responses_in_smaller_batches(tiny, card, caplog):
    spec = GenerationSpec(temperature=1.0, top_p=0.9, max_tokens=8, seed=3, n=8)
    generator = load_generator("hf", "sft", spec, PROMPTS)
    try:
        (before,) = generator.generate(PROMPTS, spec)
        card.most = 60
        (found,) = generator.generate(PROMPTS, spec)
        assert [one.tokens for one in found] == [one.tokens for one in before]
        assert [one.logprob for one in found] == pytest.approx([one.logprob for one in before], abs=1e-4)
        assert told(caplog) == ["sft: memory ran out with 40 rows in a batch; batches get smaller, and nothing is lost"]
        card.most = 1
        with pytest.raises(UserError, match="(?s)out of memory: a single row does not fit.*gpu_memory_utilization"):
            generator.generate(PROMPTS, spec)
    finally:
        generator.close()


def test_a_cpus_own_error_counts():
    def work(rows):
        torch.empty(len(rows) << 52, dtype=torch.uint8)
        return list(rows)

    with pytest.raises(RuntimeError) as caught:
        work([1])
    assert ran_out(caught.value) and not ran_out(RuntimeError("shapes differ"))
    with pytest.raises(UserError, match="(?s)a single row does not fit.*allocate"):
        FittingBatches("here", 8).run(range(3), work)
    signs = ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"]
    assert all(ran_out(error) for error in (torch.OutOfMemoryError("x"), MemoryError(), *map(RuntimeError, signs)))


def test_batches_are_counted_in_tokens():
    for device, settings, size in (
        ("cpu", {}, 64),
        ("cuda:1", {}, 512),
        ("cuda", {"batch_size": 64}, 64),
        ("cuda", {"batch_tokens": 4096}, 256),
    ):
        found = batch_size_on(device, RewardSpec(model="m", **settings))
        assert found == size
        for batch in make_batches([3, 17, 100, 300, 900], found):
            assert batch.rows * batch.width <= max(16 * size, 2 * batch.width)


def test_a_user_loses_nothing_of_a_run(tiny, classifiers, card, cli, caplog):
    project = tiny / "rewarded-lines.yaml"
    model = f"  liked:\n    model: {classifiers['llama']}\n    format: 0\n    unit: logit\n"
    project.write_text(project.read_text().replace("prompts:\n", model + "prompts:\n", 1))
    found = []
    for most in (1 << 40, 100):
        card.most = most
        out = f"run-{most}"
        answer = cli("score", "first", "--engine", "hf", "--reward-memory", "50%", "--json", "--out", out)
        assert answer.code == 0, answer.err
        content = json.loads(answer.out)
        rewards = [content[one]["rewards"] for one in ("model", "sft")]
        found.append({name: [one[name]["value"] for one in rewards] for name in content["gain"]})
        assert len(told(caplog)) == (0 if most > 100 else 2)
    assert list(found[0]) == ["words", "letters", "liked"]
    assert found[1] == {name: pytest.approx(values, abs=1e-5) for name, values in found[0].items()}
