"""Judges behind an OpenAI-compatible server: what is asked, and what their verdicts are worth."""

import math

import pytest
from pydantic import ValidationError
from stand_in_rewards import ChatServer

from rewarded_lines.engines import http_answers
from rewarded_lines.errors import UserError
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.load_rewards import load_reward
from rewarded_lines.rewards.score_cache import ScoreCache
from rewarded_lines.rewards.scorer import Scorer

TEMPLATE = "Rate {response} to {prompt}"
BUSY = 503, {"error": {"message": "overloaded"}}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(http_answers, "_FIRST_WAIT", 0.02)
    started = ChatServer()
    started.url = f"http://127.0.0.1:{started.port}/v1"
    yield started
    started.stop()


def judge(server, **options):
    spec = RewardSpec(judge="gpt-4o-mini", url=server.url, **{"template": TEMPLATE, **options})
    return load_reward("judge", spec), spec


def test_a_written_verdict_is_read_by_its_pattern(server):
    server.say = lambda text: f"I think. Score: {len(text)}"
    reward, _ = judge(server, pattern=r"Score: (\d+)", system="Be strict.", max_new_tokens=99, seed=4)
    assert reward.score(["p", "pp"], ["r", "rr"]) == [len("Rate r to p"), len("Rate rr to pp")]
    asked = sorted(server.asked, key=lambda one: len(one["messages"][1]["content"]))
    seeds = [one.pop("seed") for one in asked]
    system, user = {"role": "system", "content": "Be strict."}, {"role": "user", "content": "Rate r to p"}
    settings = {"model": "gpt-4o-mini", "temperature": 0.0, "max_tokens": 99}
    assert asked[0] == {"messages": [system, user], **settings} and len(set(seeds)) == 2


@pytest.mark.parametrize(
    ("options", "said", "score"),
    [
        ({"token": "yes"}, {"yes": 0.6, "no": 0.3, "Yes": 0.1}, 0.6),
        ({"token": ["yes", "Yes"]}, {"yes": 0.6, "no": 0.3, "Yes": 0.1}, 0.7),
        ({"tokens": ["yes", "no"]}, {"yes": 0.6, "no": 0.3, "Yes": 0.1}, 0.6 / 0.9),
        ({"tokens": {"1": 1, "5": 5}}, {"1": 0.25, "5": 0.75}, 4.0),
        ({"token": "unsafe"}, {"safe": 0.995, "x": 0.005}, 0.0),
    ],
)
def test_the_probability_of_tokens(server, options, said, score):
    server.say = lambda text: said
    assert judge(server, **options)[0].score(["p"], ["r"]) == [pytest.approx(score, rel=1e-12)]
    assert {"logprobs": True, "top_logprobs": 20, "max_tokens": 1}.items() <= server.asked[0].items()


@pytest.mark.parametrize(
    ("options", "said", "words"),
    [
        ({"token": "unsafe"}, {"un": 0.9, "safe": 0.1}, "several tokens of the judge; name its first, 'un'"),
        ({"token": "yes"}, {"no": 0.5, "maybe": 0.5}, "likeliest tokens are not all of 'yes'"),
        ({"token": "yes"}, {"Yes": 0.995, "no": 0.005}, "another spelling"),
        ({"token": "yes"}, "yes", "an answer without `logprobs`"),
        ({"token": "yes"}, {"<think>": 0.995, "yes": 0.005}, "thinks before it answers.*enable_thinking: false"),
        ({"pattern": r"Score: (\d)"}, "none", "has no verdict.*correct `pattern:`"),
        ({"pattern": r"Score: (\d)"}, "Score: 10", r"takes 1 of 10.*take the whole number: `\(\\d\+"),
        ({"pattern": r"Score: (\d+)"}, "Score: 7.5", r"takes 7 of 7\.5"),
        ({"pattern": r"Score: (\d)"}, ("Score: 1", "length"), "was cut before its end.*raise `max_new_tokens:`"),
    ],
)
def test_what_is_no_verdict_is_not_a_score(server, options, said, words):
    server.say = lambda text: said
    with pytest.raises(UserError, match=f"(?s)reward `judge`.*{words}"):
        judge(server, **options)[0].score(["p"], ["r"])


def test_an_answer_in_parts_is_its_text_without_the_thoughts(server):
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "Score: 9"}]}
    server.say = lambda text: ([{"type": "text", "text": "Score: 7/10."}, thought], "stop")
    assert judge(server, pattern=r"^Score: (\d+)")[0].score(["p"], ["r"]) == [7.0]


@pytest.mark.parametrize("thoughts", ["<think>Score: 9?</think>\n", "Score: 9?\n</think>", "[THINK]Score: 9?[/THINK]"])
def test_thoughts_are_no_verdict(server, thoughts):
    server.say = lambda text: thoughts + ("Score: 7" if text.startswith("Rate r") else "I cannot say.")
    reward, _ = judge(server, pattern=r"Score: (\d+)")
    assert reward.score(["p"], ["r"]) == [7.0]
    assert judge(server, pattern=r"^Score: (\d+)", match="first")[0].score(["p"], ["r"]) == [7.0]
    with pytest.raises(UserError, match="(?s)has no verdict.*Score: 9"):
        reward.score(["p"], ["s"])
    server.say = lambda text: "<think>Score: 9?" if thoughts.startswith("<") else "[THINK]Score: 9?"
    with pytest.raises(UserError, match="has no verdict"):
        judge(server, pattern=r"Score: (\d+)", match="first")[0].score(["p"], ["r"])


def test_an_error_in_a_choice_is_no_answer(server):
    """OpenRouter sends one with status 200 if the server behind it fails while it writes."""
    told = {"message": {"content": "Score: 9"}, "finish_reason": "error", "error": {"code": 502, "message": "gone"}}
    server.fault = lambda number, content: (200, {"choices": [told]}) if number == 1 else None
    assert judge(server, pattern=r"Score: (\d+)")[0].score(["p"], ["r"]) == [3.0]
    server.fault = lambda number, content: (200, {"choices": [told]})
    with pytest.raises(UserError, match="status 502: gone"):
        judge(server, pattern=r"Score: (\d+)", retries=0)[0].score(["p"], ["r"])


def test_a_key_that_the_model_does_not_take_can_be_taken_out(server):
    said = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    server.fault = lambda number, content: (400, {"error": {"message": said}}) if "max_tokens" in content else None
    with pytest.raises(UserError, match=f"(?s){said}.*`request: {{max_tokens: null, max_completion_tokens: 64}}`"):
        judge(server, pattern=r"(\d)")[0].score(["p"], ["r"])
    changed = {"max_tokens": None, "max_completion_tokens": 64}
    assert judge(server, pattern=r"(\d)", request=changed)[0].score(["p"], ["r"]) == [3.0]


def test_both_orders_are_asked_and_equal_answers_are_a_tie(server):
    server.say = lambda text: {"A": 0.8, "B": 0.2}
    options = {"tokens": {"A": 1, "B": 0}, "against": "reference", "template": "{prompt}: A {a} B {b}"}
    rows = [{"reference": "r0"}, {"reference": "other"}]
    assert judge(server, **options)[0].score(["p", "p"], ["r0", "r1"], rows) == pytest.approx([0.5, (0.8 + 0.2) / 2])
    assert sorted(server.ledger) == ["p: A other B r1", "p: A r1 B other"]


def test_answers_are_kept_as_they_come_and_failures_name_their_rows(server, tmp_path):
    server.fault = lambda number, content: BUSY if number % 10 == 0 else None
    reward, spec = judge(server, pattern=r"Score: (\d)")
    scorer = Scorer({"judge": reward}, {"judge": spec}, ScoreCache(tmp_path / "cache.sqlite"))
    prompts, responses = [f"p{at}" for at in range(100)], ["r"] * 100
    assert scorer.score(prompts, responses)["judge"] == [3.0] * 100
    assert set(server.ledger.values()) == {1}
    server.fault = lambda number, content: BUSY if content["messages"][0]["content"].endswith("q7") else None
    reward, spec = judge(server, pattern=r"Score: (\d)", retries=1, missing="leave_out")
    left = Scorer({"judge": reward}, {"judge": spec}, ScoreCache(tmp_path / "cache.sqlite"))
    found = left.score([f"q{at}" for at in range(20)], ["r"] * 20)["judge"]
    assert [at for at, score in enumerate(found) if math.isnan(score)] == [7] and left.failed == {"judge": 1}
    with pytest.raises(UserError, match="no score for 1 of 1 .*(?s:.*)status 503: overloaded .prompt 0: 'q7'"):
        reward.score(["q7"], ["r"])


@pytest.mark.parametrize("end", ["/", "/chat/completions", "?api-version=1", "/chat/completions?api-version=1"])
def test_an_address_may_have_the_path_and_a_query_as_azures_do(server, end):
    server.url += end
    assert judge(server, pattern=r"Score: (\d)")[0].score(["p"], ["r"]) == [3.0]
    assert server.path == "/v1/chat/completions" + end[end.find("?") :] * ("?" in end)


def test_more_keys_of_a_request(server):
    options = {"pattern": r"Score: (\d)", "request": {"max_tokens": None, "max_completion_tokens": 5, "seed": None}}
    judge(server, **options)[0].score(["p"], ["r"])
    assert server.asked[0].keys() == {"model", "messages", "temperature", "max_completion_tokens"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill": "Score:"}, "`prefill:` is for a judge in this process"),
        ({"backend": "vllm"}, "`backend:` is for a judge in this process"),
        ({"columns": ["answer"]}, "`columns:` is for rewards with `url:`"),
        (
            {"judge": None, "template": "{prompt}{response}", "token": (), "request": {"a": 1}},
            "`request:` is for rewards",
        ),
    ],
)
def test_a_declaration_is_checked(options, message):
    given = {"judge": "m", "url": "http://host/v1", "template": TEMPLATE, "token": "yes", **options}
    with pytest.raises(ValidationError, match=message):
        RewardSpec(**given)
