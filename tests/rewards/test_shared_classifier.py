"""Rewards on one model load it once and run it once for a text, with the bits that each has alone."""

import json
import random
from collections import Counter

import pytest

from rewarded_lines.config_values import parse_format
from rewarded_lines.errors import UserError
from rewarded_lines.projects import load_project
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards import reward_memory
from rewarded_lines.rewards import scorer as scorer_module
from rewarded_lines.rewards import transformers_classifier as classifier_module
from rewarded_lines.rewards.load_rewards import load_reward, load_rewards
from rewarded_lines.rewards.score_cache import ScoreCache
from rewarded_lines.rewards.scorer import Scorer, reward_key
from rewarded_lines.training.training_reward import WeightedReward

WORDS = ["the", "quick", "brown", "fox", "film", "of", "great", "beauty"]
FORMATS = {"help": "helpful", "both": "helpful - 0.2 x too-long", "second": "1"}


def texts(count, seed):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(count)]


@pytest.fixture
def named(classifiers, tmp_path):
    """A classifier whose classes have names."""
    import shutil

    shutil.copytree(classifiers["llama"], tmp_path / "named")
    config = json.loads((tmp_path / "named/config.json").read_text())
    config["id2label"] = {"0": "helpful", "1": "too-long"}
    (tmp_path / "named/config.json").write_text(json.dumps(config))
    return tmp_path / "named"


@pytest.fixture
def counted(monkeypatch):
    """Counts of loads, and of the texts that went through the model."""
    counts = Counter()
    load, logits = classifier_module.load_model, classifier_module.HuggingFaceClassifier.logits

    def loaded(*given):
        counts["loads"] += 1
        return load(*given)

    def passed(self, ids, types=None):
        counts["texts"] += len(ids)
        return logits(self, ids, types)

    monkeypatch.setattr(classifier_module, "load_model", loaded)
    monkeypatch.setattr(classifier_module.HuggingFaceClassifier, "logits", passed)
    return counts


def declared(named, **more):
    return {name: RewardSpec(model=str(named), format=form) for name, form in FORMATS.items()} | more


def shared(specs):
    models = {}
    return {name: load_reward(name, spec, device="cpu", models=models) for name, spec in specs.items()}


def alone(specs, prompts, responses):
    """Return each reward's scores from a model of its own."""
    return {name: load_reward(name, spec, device="cpu").score(prompts, responses) for name, spec in specs.items()}


@pytest.mark.parametrize("offload", ["auto", "always"])
def test_a_sweeps_rewards_share_one_model(named, classifiers, counted, monkeypatch, offload):
    monkeypatch.setattr(scorer_module, "_MODEL_CHUNK", 8)
    other = RewardSpec(model=str(classifiers["bert"]), format="1")
    specs = declared(named, other=other)
    prompts, responses = texts(30, 0), texts(30, 1)
    expected = alone(specs, prompts, responses)
    counted.clear()
    scorer = Scorer(shared(specs), specs, ScoreCache(), offload)
    assert counted["loads"] == 2
    assert scorer.score(prompts, responses) == expected
    different = len(set(zip(prompts, responses, strict=True)))
    assert counted["texts"] == 2 * different
    # Whichever came last is still in memory, unless all were freed.
    assert counted["loads"] == (3 if offload == "always" else 2)
    assert [reward.loaded for reward in scorer._rewards.values()] == [offload != "always"] * 4
    scorer.score(prompts[:5], texts(5, 3))
    assert counted["texts"] == 2 * (different + 5)
    scorer.close()


def test_a_cache_with_some_scores_leaves_each_reward_its_own(named, counted):
    specs, prompts, responses = declared(named), texts(12, 0), texts(12, 1)
    cache = ScoreCache()
    rewards = shared(specs)
    Scorer({"help": rewards["help"]}, specs, cache).score(prompts[:6], responses[:6])
    counted.clear()
    assert Scorer(rewards, specs, cache).score(prompts, responses) == alone(specs, prompts, responses)
    assert counted["texts"] == 12 + 36, "12 for all together, and 12 for each alone"


def test_a_weighted_sum_in_training_runs_the_model_once(named, counted):
    specs = declared(named)
    weights = {"help": 0.5, "both": 0.3, "second": 0.2}
    reward = WeightedReward(shared(specs), weights)
    prompts, responses = texts(10, 0), texts(10, 1)
    total = reward.score(prompts, responses)
    assert counted == {"loads": 1, "texts": 10}
    parts = alone(specs, prompts, responses)
    expected = [sum(weights[name] * parts[name][at] for name in weights) for at in range(10)]
    assert total == pytest.approx(expected, abs=1e-12)


def test_one_of_several_may_be_freed(named, counted):
    rewards = shared(declared(named))
    first = rewards["help"].score(["a"], ["film"])
    rewards["both"].free()
    assert not rewards["help"].loaded
    assert rewards["help"].score(["a"], ["film"]) == first and rewards["second"].loaded
    assert counted["loads"] == 2


def test_what_decides_logits_keeps_models_apart(named, counted, tmp_path):
    specs = declared(named, template=RewardSpec(model=str(named), format="0", template="{response}"))
    specs["dtype"] = RewardSpec(model=str(named), format="0", dtype="bfloat16")
    specs["batch"] = RewardSpec(model=str(named), format="0", batch_size=2)
    rewards = shared(specs)
    assert counted["loads"] == 4 and len({id(reward.shared) for reward in rewards.values()}) == 4
    old = RewardSpec(model=str(named), format="1")
    assert reward_key(rewards["second"], specs["second"]) == reward_key(load_reward("r", old, device="cpu"), old)


def test_memory_counts_a_shared_model_once(named, monkeypatch):
    specs = declared(named)
    scorer = Scorer(shared(specs), specs, ScoreCache())
    size = scorer._rewards["help"].size
    for reward in scorer._rewards.values():
        reward.free()
    monkeypatch.setattr(reward_memory, "available_memory", lambda device: 2 * size)
    assert scorer._staying(list(specs)) == {id(scorer._rewards["help"].shared)}
    monkeypatch.setattr(reward_memory, "available_memory", lambda device: 0.5 * size)
    assert scorer._staying(list(specs)) == set()


def test_a_projects_rewards_share_one_model(tiny, named, counted):
    project = tiny / "rewarded-lines.yaml"
    models = "".join(f"  {name}:\n    model: {named}\n    format: {form}\n" for name, form in FORMATS.items())
    project.write_text(project.read_text().replace("prompts:\n", models + "prompts:\n", 1))
    rewards = load_rewards(load_project(), device="cpu")
    assert counted["loads"] == 1 and list(rewards)[2:] == list(FORMATS)


def test_an_unknown_class_is_refused_with_the_names(named):
    def load(form):
        return load_reward("r", RewardSpec(model=str(named), format=form), device="cpu")

    with pytest.raises(UserError, match="(?s)class that the model does not have.*'helpful', 'too-long'.*'helful'"):
        load("helful")
    with pytest.raises(UserError, match="put spaces around the signs"):
        load("helpful+1")
    config = named / "config.json"
    config.write_text(config.read_text().replace("too-long", "helpful"))
    with pytest.raises(UserError, match="(?s)several classes have the name 'helpful'.*use the number"):
        load("helpful")


@pytest.mark.parametrize(
    ("text", "names", "terms"),
    [
        ("helpful", (), (("helpful", 1.0),)),
        ("helpful - 0.2 x too-long + 3", (), (("helpful", 1.0), ("too-long", -0.2), (3, 1.0))),
        ("-1 x toxic", (), (("toxic", -1.0),)),
        ("- toxic", (), (("toxic", -1.0),)),
        ("-x-", ("-x-",), (("-x-", 1.0),)),
        ("helpfulx0.4 - 0x2", (), (("helpful", 0.4), (0, -2.0))),
        ("5 x 2 - 1 star", ("1 star", "5 x 2"), (("5 x 2", 1.0), ("1 star", -1.0))),
        ("maxx2", ("maxx2",), (("maxx2", 1.0),)),
        ("maxx2", ("max",), (("max", 2.0),)),
        ("a - b", ("a - b", "a", "b"), (("a - b", 1.0),)),
        ('"a - b" + 2 x b', (), (("a - b", 1.0), ("b", 2.0))),
        ("1", ("1", "0"), ((1, 1.0),)),
        ("1-0", ("1-0",), ((1, 1.0), (0, -1.0))),
    ],
)
def test_formats_with_names(text, names, terms):
    assert parse_format(text, names) == terms


@pytest.mark.parametrize("text", ["a + ", " - a", "0.5 x ", "x", "1 -- 2"])
def test_formats_with_names_refused(text):
    with pytest.raises(ValueError, match="not a reward format"):
        parse_format(text)
