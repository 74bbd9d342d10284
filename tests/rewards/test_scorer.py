"""The scorer computes no score twice, loses none, and lets models take turns in memory."""

import json
import math
import sqlite3

import blake3
import pytest

from rewarded_lines.config import decides
from rewarded_lines.errors import UserError
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards import reward_memory
from rewarded_lines.rewards import scorer as module
from rewarded_lines.rewards.load_rewards import load_reward
from rewarded_lines.rewards.reward import Reward
from rewarded_lines.rewards.score_cache import ScoreCache
from rewarded_lines.rewards.scorer import Scorer, reward_key


def make(root, cache=None, offload="auto", **declared):
    specs = {
        name: RewardSpec(function=f"functions.py:{spec}") if isinstance(spec, str) else spec
        for name, spec in declared.items()
    }
    rewards = {name: load_reward(name, spec, root, "cpu") for name, spec in specs.items()}
    return Scorer(rewards, specs, cache or ScoreCache(), offload)


def calls(root):
    file = root / "calls.txt"
    found = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return found


def test_equal_pairs_are_scored_once_and_known_ones_not_at_all(functions):
    scorer = make(functions, length=RewardSpec(function="functions.py:counted"), words="words")
    found = scorer.score(["p", "q", "p", "p"], ["one", "two three", "one", "four"])
    assert found == {"length": [3.0, 9.0, 3.0, 4.0], "words": [1.0, 2.0, 1.0, 1.0]}
    assert calls(functions) == ["p|one", "q|two three", "p|four"]
    assert scorer.seconds > 0
    assert scorer.score(["p", "new"], ["four", "one"])["length"] == [4.0, 3.0]
    assert calls(functions) == ["new|one"]
    assert scorer.score([], []) == {"length": [], "words": []}


def test_scores_outlive_the_scorer_until_the_reward_changes(functions):
    path = functions / "cache.sqlite"
    for _ in range(2):
        scorer = make(functions, ScoreCache(path), length="counted")
        assert scorer.score(["p"], ["one"]) == {"length": [3.0]}
        scorer.close()
    assert calls(functions) == ["p|one"]
    file = functions / "functions.py"
    file.write_text(file.read_text() + "\n# another function now\n")
    scorer = make(functions, ScoreCache(path), length="counted")
    scorer.score(["p"], ["one"])
    assert calls(functions) == ["p|one"]


def test_a_key_holds_what_decides_a_score_and_nothing_else(classifiers):
    def key(**options):
        spec = RewardSpec(model=str(classifiers["llama"]), **{"format": "0", **options})
        return reward_key(load_reward("r", spec, device="cpu"), spec)

    same = [key(), key(batch_size=3, unit="x", description="y", role="audit", device="cpu")]
    assert same[0] == same[1]
    others = [key(format="1"), key(template="{response}"), key(dtype="bfloat16")]
    assert len({*same, *others}) == 4


def test_a_cards_scores_are_its_own_and_old_ones_of_a_cpu_stay(classifiers, monkeypatch):
    spec = RewardSpec(model=str(classifiers["llama"]), format="0")
    reward = load_reward("r", spec, device="cpu")
    old = {"declaration": decides(spec), "device": "cpu", "fingerprint": reward.fingerprint}
    keys = [blake3.blake3(json.dumps(old, sort_keys=True).encode()).hexdigest()]
    assert reward_key(reward, spec) == keys[0]
    monkeypatch.setattr("torch.cuda.get_device_name", {"cuda:0": "H100", "cuda:1": "A100", "cuda:2": "H100"}.get)
    for device in ("cuda:0", "cuda:1", "cuda:2"):
        reward.device = device
        keys.append(reward_key(reward, spec))
    assert keys[1] == keys[3] and len({*keys}) == 3


def test_a_function_of_unknown_source_is_never_taken_for_known():
    spec = RewardSpec(function="math:sumprod_of_no_file")
    reward = load_reward("r", RewardSpec(function="statistics:fmean"))
    assert reward_key(reward, spec) == reward_key(reward, spec)
    reward.fingerprint = ""
    assert reward_key(reward, spec) != reward_key(reward, spec)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failure_names_the_pair_and_loses_nothing(functions, monkeypatch, workers):
    monkeypatch.setattr(module, "_FUNCTION_CHUNK", 10)
    cache = ScoreCache(functions / "cache.sqlite")
    spec = RewardSpec(function="functions.py:raises", workers=workers)
    scorer = make(functions, cache, words="words", inverse=spec)
    prompts = [f"p{index}" for index in range(40)]
    responses = ["x" * (index + 1) for index in range(40)]
    responses[27] = ""
    # The first pair comes twice, so the failing pair has another place in its chunk.
    with pytest.raises(UserError, match="(?s)reward `inverse`.*ZeroDivisionError.*prompt 28: 'p27' → ''"):
        scorer.score(["p0", *prompts], ["x", *responses])
    scorer.close()
    again = make(functions, ScoreCache(functions / "cache.sqlite"), words="words", inverse=spec)
    kept = 27 if workers == 0 else 29
    known = again._cache.get(again._keys["inverse"], list(zip(prompts, responses, strict=True)))
    assert len(known) == kept and set(zip(prompts[:27], responses[:27], strict=True)) <= known.keys()
    assert again.score(prompts[:27], responses[:27])["inverse"] == [1 / len(text) for text in responses[:27]]
    again.close()


def test_a_text_that_is_too_long_stops_after_those_that_are_not(functions, classifiers, monkeypatch):
    monkeypatch.setattr(module, "_MODEL_CHUNK", 4)
    scorer = make(
        functions, length="words", judge=RewardSpec(model=str(classifiers["llama"]), format="0", max_tokens=30)
    )
    responses = ["q" * 50, *["q" * length for length in range(1, 12)]]
    with pytest.raises(UserError, match="(?s)reward `judge`.*too long.*50 tokens for prompt 0: '' → 'qqq"):
        scorer.score([""] * 12, responses)
    kept = [scorer._cache.get(key, [("", response) for response in responses]) for key in scorer._keys.values()]
    assert list(map(len, kept)) == [12, 8]
    scorer.close()


class Spy(Reward):
    """A model of `size` bytes that logs its calls."""

    def __init__(self, name, size, log):
        self.name, self.size, self.fingerprint = name, size, name
        self._held = False
        self._log = log

    @property
    def loaded(self):
        return self._held

    def load(self):
        if not self._held:
            self._log.append(f"+{self.name}")
        self._held = True

    def free(self):
        if self._held:
            self._log.append(f"-{self.name}")
        self._held = False

    def score(self, prompts, responses, columns=None):
        self.load()
        self._log.append(f"{self.name}:{len(prompts)}")
        return [1.0] * len(prompts)


def spies(log, offload, size=10):
    rewards = {name: Spy(name, size, log) for name in "ab"}
    specs = {name: RewardSpec(model=name) for name in rewards}
    return Scorer(rewards, specs, ScoreCache(), offload)


def test_models_take_turns_where_they_do_not_fit_together(monkeypatch):
    log = []
    monkeypatch.setattr(reward_memory, "available_memory", lambda device: 20)
    spies(log, "auto").score(["p", "q"], ["r", "r"])
    assert log == ["+a", "a:2", "-a", "+b", "b:2", "-b"]


def test_models_that_fit_together_stay(monkeypatch):
    log = []
    monkeypatch.setattr(reward_memory, "available_memory", lambda device: 26)
    scorer = spies(log, "auto")
    scorer.score(["p", "q"], ["r", "r"])
    monkeypatch.setattr(reward_memory, "available_memory", lambda device: 0)
    scorer.score(["s"], ["r"])
    # Loaded models need no more memory.
    assert log == ["+a", "a:2", "+b", "b:2", "a:1", "b:1"]
    scorer.close()
    assert log[-2:] == ["-a", "-b"]


def test_offload_can_be_asked_for_and_forbidden(monkeypatch):
    log = []
    scorer = spies(log, "always", size=1)
    for reward in scorer._rewards.values():
        reward.load()
    scorer.score(["p"], ["r"])
    assert log == ["+a", "+b", "-b", "a:1", "-a", "+b", "b:1", "-b"]
    log.clear()
    scorer.score(["p"], ["r"])
    assert log == [], "nothing is missing, so nothing is loaded"
    monkeypatch.setattr(reward_memory, "available_memory", lambda device: 0)
    spies(log, "never").score(["p"], ["r"])
    assert log == ["+a", "a:1", "+b", "b:1"]


def test_offloaded_scores_are_the_same(functions, classifiers):
    specs = {name: RewardSpec(model=str(classifiers[name]), format="0") for name in ("llama", "bert")}
    prompts, responses = ["a film", "the dog"] * 5, ["of", "beauty of little", "else", "x", ""] * 2
    together, apart = make(functions, **specs, offload="never"), make(functions, **specs, offload="always")
    assert together.score(prompts, responses) == apart.score(prompts, responses)
    assert [reward.loaded for reward in together._rewards.values()] == [True, True]
    assert [reward.loaded for reward in apart._rewards.values()] == [False, False]


def test_columns_decide_a_score_where_a_reward_reads_them(functions, tmp_path):
    (functions / "answers.py").write_text(
        "def exact(prompts, completions, answer, level=None):\n"
        "    return [None if l else float(a in c) for a, c, l in zip(answer, completions, level)]\n"
        "def nothing(prompts, completions):\n    return [0.5 for _ in prompts]\n"
    )
    specs = {name: RewardSpec(function=f"answers.py:{name}") for name in ("exact", "nothing")}
    cache = ScoreCache(tmp_path / "scores.sqlite")
    scorer = make(functions, cache=cache, **specs)
    columns = [{"answer": "4", "level": None}, {"answer": "5", "level": None}, {"answer": "4", "level": 2}]
    for _ in range(2):
        found = scorer.score(["2+2?"] * 3, ["4"] * 3, columns)
        assert found["exact"][:2] == [1.0, 0.0] and math.isnan(found["exact"][2])
        assert found["nothing"] == [0.5] * 3
    # One pair for the function of two texts, three for the one that reads a column.
    connection = sqlite3.connect(tmp_path / "scores.sqlite")
    assert [connection.execute(f"SELECT count(*) FROM {name}_1").fetchone() for name in ("scores", "abstained")] == [
        (3,),
        (1,),
    ]
