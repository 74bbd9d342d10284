"""Functions as people have them: TRL's signatures and its published functions, async, objects, options, columns."""

import asyncio
import math

import numpy as np
import pytest
from tiny_models import make_tokenizer

from rewarded_lines.config import decides
from rewarded_lines.data.rows import row_text
from rewarded_lines.errors import UserError
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.load_rewards import load_reward
from rewarded_lines.rewards.score_cache import ScoreCache
from rewarded_lines.rewards.scorer import Scorer

FILE = """\
import asyncio, functools
from fractions import Fraction

def count(texts):
    return [float(len(text if isinstance(text, str) else text[0]["content"])) for text in texts]
def ours(prompts, responses): return count(responses)
def openrlhf(queries, prompts, labels): return count(prompts)
def verl(data_sources, solution_strs, ground_truths): return count(solution_strs)
def turned(response, prompt): return count(response)
def other_names(questions, texts): return count(texts)
def by_name(responses, prompts): return count(responses)
def trl(prompts, completions, **kwargs): return count(completions)
def trl_all(prompts, completions, completion_ids=None, trainer_state=None, **kwargs): return count(completions)
def trl_short(completions, **kwargs): return count(completions)
def trl_bare(**kwargs): return count(kwargs["completions"])
def trl_logs(completions, log_extra, log_metric=None, **kwargs):
    log_extra("length", count(completions)); return count(completions)
async def judge(prompts, completions, **kwargs):
    async def one(text):
        await asyncio.sleep(0); return count([text])[0]
    return await asyncio.gather(*map(one, completions))
async def streamed(prompts, responses):
    for response in responses: yield len(response)
class Judge:
    def __init__(self, scale=1.0): self.scale = scale
    def __call__(self, prompts, completions, **kwargs): return [self.scale * one for one in count(completions)]
    async def slowly(self, completions, **kwargs): return self(None, completions)
    def plain(self, prompts, responses): return count(responses)
judged = Judge()
def scaled(prompts, responses, scale): return [scale * one for one in count(responses)]
plain_scaled = functools.partial(scaled, scale=1)
def wrapped(function):
    @functools.wraps(function)
    def call(*args, **kwargs): return function(*args, **kwargs)
    return call
decorated = wrapped(trl_short)
def get_scaled(scale):
    def reward(completions, **kwargs):
        # The parameter of the outer function does not hide the row's column of this name.
        assert kwargs["scale"] == [7, 7, 7]
        return [scale * one for one in count(completions)]
    return reward
def an_array(prompts, responses):
    import numpy; return numpy.array(count(responses))
def a_tensor(prompts, responses):
    import torch; return torch.tensor(count(responses))
def a_column(prompts, responses): return a_tensor(prompts, responses)[:, None]
def made(prompts, responses): return (Fraction(len(response)) for response in responses)

def exact(completions, answer, level=0, **kwargs):
    assert level == 0 or len(level) == len(answer)
    return [None if one is None else float(one in str(text)) for one, text in zip(answer, completions)]
def seen(prompts, completions, **kwargs):
    SEEN.append(kwargs); kwargs["tags"][0].append("changed"); return [0.0] * len(completions)
SEEN = []
def needs_tokens(completion_ids, **kwargs): return [float(len(ids)) for ids in completion_ids]
def needs_state(completions, trainer_state, **kwargs): return [0.0] * len(completions)
def one(text): return 0.0
def a_text(prompts, responses): return "1" * len(responses)
def a_mapping(prompts, responses): return dict(enumerate(count(responses)))
def nothing(prompts, responses): count(responses)
def a_float(prompts, responses): return 1.0
def digits(prompts, responses): return ["1" for _ in responses]
def raises(completions, answer, **kwargs): return [1 / len(one) for one in answer]
"""
SAME = [
    *("ours", "other_names", "by_name", "trl", "trl_all", "trl_short", "trl_bare", "trl_logs", "judge", "streamed"),
    *("Judge", "judged", "judged.slowly", "judged.plain", "plain_scaled", "decorated"),
    *("an_array", "a_tensor", "a_column", "made"),
]
ROWS = [
    {"answer": "cat", "level": 1, "tags": []},
    {"answer": None, "tags": [1]},
    {"answer": "dog", "level": 2, "tags": []},
]
TEXTS = ["a cat", "", "a bird"]


@pytest.fixture
def load(tmp_path):
    (tmp_path / "file.py").write_text(FILE)

    def make(name, **settings):
        reference = name if ":" in name else f"file.py:{name}"
        return load_reward("mine", RewardSpec(function=reference, **settings), tmp_path)

    return make


def problem(raised):
    return raised.value.problems[0]


def test_every_form_of_a_function_is_called(load):
    # The rows' columns are there, but most functions take none.
    got = {name: load(name).score(["p"] * 3, TEXTS, ROWS) for name in SAME}
    assert got == dict.fromkeys(SAME, [5.0, 0.0, 6.0])


@pytest.mark.parametrize("name", ["trl", "judge", "Judge"])
def test_trls_functions_get_turns_of_chats_and_texts_of_texts(load, name):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    reward = load(name)
    assert reward.score([chat, "p"], ["four", "five!"]) == [4.0, 5.0] and reward.check([chat]) == ""
    # The user's own word wins, and a function that TRL cannot call gets texts as before.
    assert load(name, messages=False).check([chat]) and load("ours").check([chat])
    assert load(name).fingerprint != load(name, messages=False).fingerprint == load("ours").fingerprint


def test_what_old_declarations_decide_is_as_before():
    for messages, known in ((None, None), (False, None), (True, True)):
        settings = decides(RewardSpec(function="a:b", messages=messages))
        assert settings.get("messages") is known and not settings.keys() & {"options", "tokenizer"}
    assert decides(RewardSpec(function="regex", options={"pattern": "a"}))["options"] == {"pattern": "a"}


def test_columns_come_by_name_or_all_of_them(load):
    reward = load("exact")
    assert (reward.columns, reward.optional) == (("answer",), None)
    scores = reward.score(["p"] * 3, TEXTS, ROWS)
    assert scores[0] == 1 and math.isnan(scores[1]) and scores[2] == 0
    everything = load("seen")
    everything.score(["p"] * 3, TEXTS, [*ROWS[:2], {**ROWS[2], "extra": {"a": [1.5]}}])
    given = everything._function.function.__globals__["SEEN"][0]
    assert given["level"] == [1, None, 2] and given["extra"] == [None, None, {"a": [1.5]}]
    # A function may change what it gets; the rows stay.
    assert given["tags"][0] == ["changed"] and ROWS[0]["tags"] == []


def test_the_columns_are_part_of_a_scores_key(load):
    reward, spec = load("exact"), RewardSpec(function="file.py:exact")
    scorer = Scorer({"mine": reward}, {"mine": spec}, ScoreCache())
    rows = [{"answer": "a"}, {"answer": "z"}, {"answer": {"b", "a"}}]
    assert scorer.score(["p"] * 2, ["a", "a"], rows[:2])["mine"] == [1.0, 0.0]
    large = np.arange(5000)
    other = large.copy()
    other[2500] = 0
    assert row_text({"a": large}) == row_text({"a": large.copy()}) != row_text({"a": other})


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("scaled", {"scale": 2}, [10.0, 0.0, 12.0]),
        ("Judge", {"scale": 0.5}, [2.5, 0.0, 3.0]),
        ("get_scaled", {"scale": 3}, [15.0, 0.0, 18.0]),
        ("trl.rewards:get_soft_overlong_punishment", {"max_completion_len": 12, "soft_punish_cache": 4}, None),
        ("trl.rewards:get_repetition_penalty_reward", {"ngram_size": 1}, None),
        ("trl.rewards:think_format_reward", {}, None),
        ("trl.rewards:accuracy_reward", {}, None),
    ],
)
def test_options_and_trls_published_functions(load, tmp_path, name, options, expected):
    import trl.rewards

    texts = ["a cat a cat", "<think>\nx\n</think>\n\\boxed{2}", "\\boxed{3}"] if ":" in name else TEXTS
    more, given = {}, [{"solution": "2", "scale": 7}] * 3
    made = getattr(trl.rewards, name.rpartition(":")[2], None)
    turns = [[{"role": "assistant", "content": text}] for text in texts]
    if made and options:
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        more, ids = {"tokenizer": "tokenizer"}, tokenizer(texts, add_special_tokens=False)["input_ids"]
        expected = made(**options)(completion_ids=ids)
        assert len(set(expected)) > 1
    elif made:
        expected = made(completions=turns, solution=["2"] * 3)
    chats = [[{"role": "user", "content": "u"}]] * 3 if made else ["p"] * 3
    reward = load(name, options=options, **more)
    assert reward.score(chats, texts, given) == expected and len(reward.fingerprint) == 64


@pytest.mark.parametrize(
    ("name", "settings", "what", "part"),
    [
        ("needs_tokens", {}, "the function needs `completion_ids`", "tokenizer: FOLDER"),
        ("needs_state", {}, "the function needs `trainer_state`", "a default"),
        ("ours", {"tokenizer": "t"}, "the function takes no `completion_ids`", "remove `tokenizer:`"),
        ("scaled", {"options": {"scales": 2}}, "the function has no option `scales`", "did you mean `scale`?"),
        ("Judge", {"options": {"scale": 1, "size": 2}}, "the function has no option `size`", ""),
        ("one", {}, "the function does not take prompts and responses", ""),
        ("openrlhf", {}, "the function's first two parameters have other names", "(queries, prompts, labels)"),
        ("verl", {}, "the function's first two parameters have other names", "(data_sources, solution_strs"),
        ("turned", {}, "the function's first two parameters have other names", "(response, prompt)"),
        ("judged.nothing", {}, "no function `judged.nothing`", ""),
    ],
)
def test_what_cannot_be_called_is_refused_at_once(load, name, settings, what, part):
    with pytest.raises(UserError) as raised:
        load(name, **settings)
    assert problem(raised).what.startswith(what) and part in str(raised.value)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("a_text", "the function returned a str"),
        ("a_mapping", "the function returned a dict"),
        ("nothing", "the function returned None"),
        ("a_float", "the function returned a float"),
        ("digits", "a score is not a finite number"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused(load, name, what):
    with pytest.raises(UserError) as raised:
        load(name).score(["p", "q"], ["a", "b"])
    assert problem(raised).what == what


@pytest.mark.parametrize("workers", [0, 1])
def test_async_functions_and_failures_with_columns_here_and_in_workers(load, workers):
    async def inside_a_loop():
        return load("judge").score(["p"] * 3, TEXTS)

    judge, raises = (load(name, workers=workers) for name in ("judge", "raises"))
    assert judge.score(["p"] * 3, TEXTS, ROWS) == [5.0, 0.0, 6.0] == asyncio.run(inside_a_loop())
    with pytest.raises(UserError, match="the function raised ZeroDivisionError") as raised:
        raises.score(["p", "q"], ["a", "b"], [{"answer": "x"}, {"answer": ""}])
    judge.free(), raises.free()
    assert "prompt 1: 'q' → 'b', columns {'answer': ''}" in str(raised.value)


def test_the_file_that_a_project_names_counts_where_another_file_makes_the_function(tmp_path, monkeypatch):
    (tmp_path / "factory.py").write_text(
        "def make(size):\n    def long(prompts, responses):\n"
        "        return [float(len(one) > size) for one in responses]\n    return long\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for size in (3, 50):
        (tmp_path / "rewards.py").write_text(f"from factory import make\nlong = make({size})\n")
        reward = load_reward("r", RewardSpec(function="rewards.py:long"), tmp_path)
        found.append((reward.fingerprint, reward.score(["p"], ["four"])))
    assert found[0][1] == [1.0] and found[1][1] == [0.0] and found[0][0] != found[1][0]
