"""Reward models beside an engine on a simulated card: who stays, who takes turns, and what the engine leaves."""

import json
import shutil

import pytest
import torch

from rewarded_lines.config_values import parse_memory
from rewarded_lines.engines import vllm_versions
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator.sweep_options import SweepOptions
from rewarded_lines.progress import Progress
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.load_rewards import load_reward
from rewarded_lines.rewards.model_sizes import refuse_too_large, weights_size
from rewarded_lines.rewards.reward import Reward
from rewarded_lines.rewards.reward_memory import RewardMemory, spare_memory, those_that_stay
from rewarded_lines.rewards.score_cache import ScoreCache
from rewarded_lines.rewards.scorer import Scorer, reward_key
from rewarded_lines.rewards.shared_model import SharedModel

GIB = 1 << 30


def test_the_smallest_stay_beside_the_largest():
    for sizes, room, stay in (
        ([], 0, set()),
        ([5, 5], 10, {0, 1}),
        ([5, 5], 9, set()),
        ([9], 8, set()),
        ([8, 1, 8, 2], 11, {1, 3}),
        ([8, 1, 8, 2], 10, {1}),
        ([8, 1, 8, 2], 19, {0, 1, 2, 3}),
        ([8, 1, 8, 2], 18, {1, 3}),
    ):
        assert those_that_stay(sizes, room) == stay, (sizes, room)


class Card:
    """A GPU of some GiB."""

    def __init__(self, total):
        self.total, self.used = total * GIB, 0

    def take(self, size):
        if self.used + size > self.total:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.used += size


@pytest.fixture
def card(monkeypatch):
    found = Card(80)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("rewarded_lines.engines.vllm_process.installed", lambda package: "0.32.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (found.total - found.used, found.total))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: 0)
    return found


class Spy(Reward):
    """A model of some GiB on the card."""

    def __init__(self, name, size, card, log):
        self.name, self.size, self.fingerprint, self.device = name, size * GIB, name, "cuda:0"
        self._card, self._log, self._held = card, log, False
        self.load()

    @property
    def loaded(self):
        return self._held

    def load(self):
        if not self._held:
            self._card.take(self.size)
            self._log.append(f"+{self.name}")
        self._held = True

    def free(self):
        if self._held:
            self._card.used -= self.size
            self._log.append(f"-{self.name}")
        self._held = False

    def score(self, prompts, responses, columns=None):
        self.load()
        self._log.append(self.name)
        return [1.0] * len(prompts)


class Told(Progress):
    def __init__(self):
        self.facts = []

    def tell(self, fact):
        self.facts.append(fact)


def spies(card, log, **sizes):
    return {name: Spy(name, size, card, log) for name, size in sizes.items()}


@pytest.mark.parametrize(
    ("sizes", "budget", "offload", "spare", "loaded", "fact"),
    [
        # Both fit into half of the card and stay; the engine leaves what one of them needs to work.
        (
            {"a": 14, "b": 14},
            None,
            "auto",
            2,
            "ab",
            "30.0 GiB for reward models; in memory: a (14.0 GiB), b (14.0 GiB)",
        ),
        (
            {"a": 14, "b": 14},
            "20GiB",
            "auto",
            16,
            "",
            "16.0 GiB for reward models; taking turns: a (14.0 GiB), b (14.0 GiB)",
        ),
        (
            {"a": 14, "b": 2, "c": 14},
            "25%",
            "auto",
            16,
            "b",
            "18.0 GiB for reward models; in memory: b (2.0 GiB); taking turns",
        ),
        ({"a": 14, "b": 4}, None, "always", 16, "", "16.0 GiB for reward models; taking turns: a (14.0 GiB), b (4.0"),
        # More than half of the card is needed.
        ({"a": 50}, None, "auto", 2, "a", "52.0 GiB for reward models; in memory: a (50.0 GiB)"),
    ],
)
def test_the_engine_leaves_what_reward_models_need(card, sizes, budget, offload, spare, loaded, fact):
    rewards, told = spies(card, [], **sizes), Told()
    assert spare_memory(rewards.values(), RewardMemory(budget), offload, 1, told.tell) == spare * GIB
    assert "".join(name for name, one in rewards.items() if one.loaded) == loaded
    assert len(told.facts) == 1 and told.facts[0].startswith(f"cuda:0: {fact}")


def test_a_budget_below_what_must_be_there_is_refused(card):
    rewards = spies(card, [], a=14, b=4).values()
    with pytest.raises(
        UserError, match="(?s)--reward-memory: .*too small.*expected: 14.0 GiB for.*got: 15GiB, 15.0 GiB"
    ):
        spare_memory(rewards, RewardMemory("15GiB"))
    with pytest.raises(UserError, match="(?s)too small.*expected: 18.0 GiB"):
        spare_memory(rewards, RewardMemory("19GiB"), "never")
    assert spare_memory([load_reward("f", RewardSpec(function="length"))], RewardMemory("15GiB")) == 0


def test_vllm_takes_what_is_left(card, monkeypatch):
    given = {}
    monkeypatch.setattr(vllm_versions, "load_vllm", lambda settings: lambda **options: given.update(options))
    monkeypatch.setattr(vllm_versions, "enlist", lambda llm: None)
    card.take(30 * GIB)
    vllm_versions.start_vllm(spare=10 * GIB)
    assert given["gpu_memory_utilization"] == pytest.approx(0.9 * 40 / 80, abs=1e-3)
    vllm_versions.start_vllm(size=5 * GIB, spare=10 * GIB)
    assert given["gpu_memory_utilization"] == pytest.approx(5 / 80, abs=1e-3)
    with pytest.raises(UserError, match="(?s)reward models.*leave no memory for the engine.*got: 50.0 GiB of 80.0"):
        vllm_versions.start_vllm(spare=50 * GIB)


@pytest.mark.parametrize(("budget", "large", "beside"), [("20GiB", 14, 0), ("20GiB", 14, 30), (None, 30, 30)])
def test_a_sweep_beside_an_engine_keeps_the_small_model_and_turns_the_large_ones(card, budget, large, beside):
    """Base and policies come later to what the engine leaves for them: it is not for reward models."""
    log, told, memory = [], Told(), RewardMemory(budget)
    rewards = spies(card, log, a=large, b=2, c=large)
    spare = spare_memory(rewards.values(), memory, "auto", 1, told.tell)
    card.take(card.total - card.used - spare - beside * GIB)  # The engine.
    log.clear()
    specs = {name: RewardSpec(model=name) for name in rewards}
    scorer = Scorer(rewards, specs, ScoreCache(), progress=told, memory=memory)
    for text in "xy":
        scorer.score(["p"], [text])
    assert log == ["+a", "a", "-a", "b", "+c", "c", "-c"] * 2
    assert len(told.facts) == 2 and f"taking turns: a ({large}.0 GiB), c ({large}.0 GiB)" in told.facts[1]


class Weights:
    """A model that is loaded, moves and closes on a card."""

    def __init__(self, card, size, log):
        self._card, self._size, self._log, self._place = card, size, log, "cpu"
        self.move("cuda")

    def move(self, device):
        if device == "cuda":
            self._card.take(self._size)
        elif self._place == "cuda":
            self._card.used -= self._size
        self._place = device
        self._log.append(device)

    def close(self):
        self.move("gone")


class Model(SharedModel):
    def __init__(self, name, card, size, log, beside):
        super().__init__(f"reward `{name}`", name, "cuda", beside)
        self._card, self.size, self.log = card, size * GIB, log
        beside[name] = self

    def _build(self):
        return Weights(self._card, self.size, self.log)

    def _content(self):
        return self._reference


def test_a_model_that_does_not_fit_lets_the_others_wait_in_host_memory(card, monkeypatch, caplog):
    models = {}
    monkeypatch.setattr("rewarded_lines.rewards.shared_model.available_memory", lambda device: 60 * GIB)
    a, b, c = (Model(name, card, size, [], models) for name, size in (("a", 30), ("b", 60), ("c", 90)))
    held = a.held
    assert a.loaded and b.held is not None and b.loaded and not a.loaded
    assert a.log == ["cuda", "cpu"] and "1 others leave cuda" in caplog.text
    # Too large for the host: it is freed, and read again for its next use.
    assert (
        a.held is held and a.loaded and not b.loaded and (a.log, b.log) == (["cuda", "cpu", "cuda"], ["cuda", "gone"])
    )
    with pytest.raises(UserError, match="(?s)reward `c`: out of memory: c does not fit.*device: cpu"):
        _ = c.held
    a.free()
    assert a.log[-1] == "gone" and not a.loaded


def test_a_model_that_moved_has_the_same_scores(classifiers, monkeypatch):
    reward = load_reward("r", RewardSpec(model=str(classifiers["llama"]), format="0"), device="cpu")
    scores = reward.score(["a", "b"], ["film", ""])
    held = reward.shared.held
    # "cpu:0" stands for a card.
    reward.shared.device = "cpu:0"
    reward.rest()
    assert not reward.loaded and reward.score(["a", "b"], ["fox", "x"]) != scores
    assert reward.loaded and reward.shared.held is held and reward.score(["a", "b"], ["film", ""]) == scores


@pytest.mark.gpu
def test_a_resting_model_leaves_the_card(classifiers):
    reward = load_reward("r", RewardSpec(model=str(classifiers["llama"]), format="0"), device="cuda")
    scores, taken = reward.score(["a", "b"], ["film", ""]), torch.cuda.memory_allocated()
    reward.rest()
    assert torch.cuda.memory_allocated() <= taken - 0.9 * reward.size
    reward.score(["a"], ["x"])
    assert reward.score(["a", "b"], ["film", ""]) == scores


def test_a_model_larger_than_the_card_is_refused_before_it_is_read(card, classifiers):
    from transformers import AutoConfig

    spec, config = RewardSpec(model="m"), AutoConfig.from_pretrained(classifiers["llama"])
    refuse_too_large("reward `r`", str(classifiers["llama"]), spec, config, "cuda")
    card.total = GIB
    with pytest.raises(UserError, match="(?s)larger than the GPU.*dtype: auto.*url:"):
        refuse_too_large("reward `r`", str(classifiers["llama"]), spec, config, "cuda")
    refuse_too_large("reward `r`", str(classifiers["llama"]), spec, config, "cpu")
    held = load_reward("r", RewardSpec(model=str(classifiers["llama"]), format="0", dtype="bfloat16"), device="cpu")
    stored = weights_size(str(classifiers["llama"]), RewardSpec(model="m", dtype="bfloat16"), config)
    # Beside the weights, the model holds the rotary frequencies.
    assert stored == pytest.approx(held.size, rel=0.01)


def test_dtype_auto_is_the_stored_one(classifiers, tmp_path):
    from transformers import AutoModelForSequenceClassification

    half = tmp_path / "half"
    shutil.copytree(classifiers["llama"], half)
    AutoModelForSequenceClassification.from_pretrained(half, dtype=torch.bfloat16).save_pretrained(half)
    specs = [RewardSpec(model=str(half), format="0", dtype=dtype) for dtype in ("auto", "bfloat16", "float32")]
    auto, declared, wide = (load_reward("r", spec, device="cpu") for spec in specs)
    pairs = ["a film", "the fox"], ["of beauty", ""]
    assert auto.score(*pairs) == declared.score(*pairs) != wide.score(*pairs) and auto.size == declared.size
    assert len({reward_key(one, spec) for one, spec in zip((auto, declared, wide), specs, strict=True)}) == 3
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({key: one for key, one in config.items() if "dtype" not in key}))
    with pytest.raises(UserError, match="(?s)does not say in which dtype.*declare one of them"):
        load_reward("r", specs[0], device="cpu")


def test_amounts_of_memory():
    for text, amount in (("24GiB", 24 * GIB), ("24 GB", 24e9), ("30%", 0.3), ("1.5GiB", 1.5 * GIB)):
        assert parse_memory(text) == pytest.approx(amount)
    for wrong in ("24", "0GiB", "101%", "-1GiB", "much"):
        with pytest.raises(UserError, match="--reward-memory.*no amount of memory such as 24GiB"):
            SweepOptions(engine="hf", reward_memory=wrong)


def test_settings_that_contradict_are_refused():
    with pytest.raises(ValueError, match="either `batch_tokens:` or `batch_size:`"):
        RewardSpec(model="m", batch_tokens=4096, batch_size=4)
    with pytest.raises(ValueError, match="`batch_tokens:` is for rewards with `model:` or `judge:`"):
        RewardSpec(function="length", batch_tokens=4096)
