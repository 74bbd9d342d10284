"""Rewards behind HTTP: every score arrives once, whatever the server does, and a failure names its rows."""

import itertools
import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from email.utils import formatdate

import pytest
from pydantic import ValidationError
from stand_in_rewards import RewardServer, score_of

from rewarded_lines.data.rows import COLUMNS
from rewarded_lines.engines import http_answers
from rewarded_lines.errors import UserError
from rewarded_lines.progress import Progress
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.load_rewards import load_reward
from rewarded_lines.rewards.reward import check_columns
from rewarded_lines.rewards.score_cache import ScoreCache
from rewarded_lines.rewards.scorer import Scorer, reward_key
from rewarded_lines.training.training_reward import WeightedReward

BUSY = 503, {"error": {"message": "overloaded"}}
# As OpenRouter tells that the server behind it failed.
BUSY_BEHIND = 200, {"error": {"code": 502, "message": "overloaded"}}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(http_answers, "_FIRST_WAIT", 0.02)


@pytest.fixture
def serve():
    servers = []

    def start(*options, **more):
        servers.append(RewardServer(*options, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def declared(server, **options):
    return RewardSpec(url=server.url, **options)


def scorer_of(spec, path=None, progress=None):
    more = {"progress": progress} if progress else {}
    return Scorer({"judge": load_reward("judge", spec)}, {"judge": spec}, ScoreCache(path), **more)


def pairs(count):
    return [f"prompt {at}" for at in range(count)], [f"response {at % 97} \udc80" for at in range(count)]


def pairs_of(prompts, responses):
    return list(zip(prompts, responses, strict=True))


def expected(prompts, responses):
    return [score_of(*pair) for pair in zip(prompts, responses, strict=True)]


def test_a_server_gets_texts_and_the_columns_that_are_named(serve):
    server = serve()
    reward = load_reward("judge", declared(server, columns=["answer"], batch_size=2))
    rows = [{"answer": {"x": at}, "other": "unsent"} for at in range(3)]
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "p2"}]
    found = reward.score(["p0", "p1", chat], ["r0", "r1", ""], rows)
    assert found == [score_of(*one) for one in [("p0", "r0", {"x": 0}), ("p1", "r1", {"x": 1}), ("p2", "", {"x": 2})]]
    assert sorted(len(one["prompts"]) for one in server.asked) == [1, 2]
    assert all(set(one) == {"prompts", "responses", "columns"} for one in server.asked)
    assert [list(one["columns"]) for one in server.asked] == [["answer"]] * 2
    assert reward.score([], []) == []
    reward.free()
    assert reward.score(["p0"], ["r0"], rows[:1]) == found[:1], "it connects again"


def test_turns_are_sent_as_turns(serve):
    server = serve(lambda number, content: (200, [float(len(content["prompts"][0])), None]))
    reward = load_reward("judge", declared(server, messages=True))
    found = reward.score([[{"role": "user", "content": "a"}] * 3, "text"], ["b", "c"])
    assert found[0] == 3.0 and math.isnan(found[1])
    assert server.asked[0]["prompts"][1] == [{"role": "user", "content": "text"}]
    assert server.asked[0]["responses"][0] == [{"role": "assistant", "content": "b"}]


def test_a_key_is_sent_and_stays_secret(serve, monkeypatch):
    server = serve()
    monkeypatch.setenv("JUDGE_KEY", "sesame-8127")
    load_reward("judge", declared(server, key_env="JUDGE_KEY")).score(["p"], ["r"])
    assert server.headers[-1]["Authorization"] == "Bearer sesame-8127"
    spec = declared(server, key_env="JUDGE_KEY", key_header="api-key")
    reward = load_reward("judge", spec)
    assert server.headers[-1]["api-key"] == "sesame-8127"
    assert "sesame" not in json.dumps(spec.model_dump()) + reward_key(reward, spec)
    server.fault = lambda number, content: (401, {"detail": "bad key sesame-8127"})
    with pytest.raises(UserError, match=r"(?s)status 401: bad key \$JUDGE_KEY.*set JUDGE_KEY to a valid key") as caught:
        reward.score(["p"], ["r"])
    assert "sesame" not in str(caught.value)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(UserError, match="(?s)JUDGE_KEY holds no key.*export JUDGE_KEY"):
        load_reward("judge", spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:80"}, "begins with http"),
        ({"url": "http://me:pass@host/score"}, "holds a secret"),
        ({"url": "http://host/score?api_key=abc"}, "holds a secret"),
        ({"url": "http://host", "workers": 2}, "`workers:` is for rewards with `function:`"),
        ({"model": "m", "missing": "leave_out"}, "`missing:` is for rewards with `url:`"),
        ({"model": "m", "url": "http://host"}, "declare one of"),
        ({"url": "http://host", "concurrency": 0}, "greater than or equal to 1"),
    ],
)
def test_a_declaration_is_checked(options, message):
    with pytest.raises(ValidationError, match=message):
        RewardSpec(**options)


def test_a_key_holds_what_decides_a_score_and_old_rewards_keep_theirs(serve):
    server = serve()

    def key(**options):
        spec = declared(server, **options)
        return reward_key(load_reward("judge", spec), spec)

    same = {key(), key(batch_size=3, concurrency=2, timeout=1, retries=0, missing="leave_out", unit="x")}
    assert len(same) == 1
    assert len({*same, key(version="2"), key(columns=["a"])}) == 3
    assert not {"url", "columns", "version", "missing"} & RewardSpec(function="f.py:f").decides().keys()


def nobody():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/score"


def test_nobody_at_the_address_is_refused_at_the_start():
    with pytest.raises(UserError, match=r"(?s)reward `judge`, http://127.*not usable.*start the server"):
        load_reward("judge", RewardSpec(url=nobody()))


@pytest.mark.parametrize("said", ["drop", (500, "no empty lists"), BUSY, (422, "empty")])
def test_a_server_that_takes_no_empty_lists_is_there_all_the_same(serve, monkeypatch, said):
    monkeypatch.setattr(RewardServer, "answer", lambda self, path, content: said)
    load_reward("judge", declared(serve()))


@pytest.mark.parametrize("status", [401, 404, 405, 307])
def test_a_wrong_address_is_refused_at_the_start(serve, monkeypatch, status):
    monkeypatch.setattr(RewardServer, "answer", lambda self, path, content: (status, "no", {"Location": "/other"}))
    remedy = "key_env: NAME" if status == 401 else "correct `url:`"
    with pytest.raises(UserError, match=f"(?s)status {status}: no.*{remedy}"):
        load_reward("judge", declared(serve()))


def soon(number):
    """Return three forms of `Retry-After`."""
    return [("Retry-After", ["0.05", formatdate(time.time() + 0.05, usegmt=True), "soon"][number % 3])]


@pytest.mark.parametrize("said", ["drop", "cut", "short", BUSY, BUSY_BEHIND, (429, ""), (408, "")])
def test_what_fails_once_is_asked_again(serve, said):
    def fault(number, content):
        if number % 3 == 1:
            return (*said, soon(number // 3)) if isinstance(said, tuple) else said
        return None

    server = serve(fault)
    prompts, responses = pairs(200)
    assert load_reward("judge", declared(server)).score(prompts, responses) == expected(prompts, responses)
    assert set(server.ledger.values()) == {1} and len(server.ledger) == 200


def test_an_answer_that_does_not_come_in_time_is_asked_for_again(serve):
    server = serve(wait=lambda content: time.sleep(1.0 if len(server.asked) == 1 else 0))
    assert load_reward("judge", declared(server, timeout=0.3)).score(["p"], ["r"]) == [score_of("p", "r")]
    server.wait = lambda content: time.sleep(0.5)
    with pytest.raises(UserError, match=r"(?s)no answer in 0.3 s \(prompt 0: 'p' → 'r'\)"):
        load_reward("judge", declared(server, timeout=0.3, retries=1)).score(["p"], ["r"])


def test_a_server_is_given_the_time_it_asks_for(serve):
    server = serve(lambda number, content: (503, "busy", [("Retry-After", "0.6")]) if number == 1 else None)
    reward, started = load_reward("judge", declared(server)), time.perf_counter()
    reward.score(["p"], ["r"])
    assert 0.6 < time.perf_counter() - started < 3
    server.fault = lambda number, content: (429, "come back tomorrow", [("Retry-After", "86400")])
    asked = len(server.asked)
    with pytest.raises(UserError, match="come back tomorrow"):
        reward.score(["p"], ["r"])
    assert len(server.asked) == asked + 1


def test_a_limit_of_requests_costs_no_attempts_while_others_pass(serve):
    """One request in 20 ms passes: each of 20 under way meets more refusals than it has retries."""
    passed = [0.0]

    def fault(number, content):
        if time.perf_counter() - passed[0] < 0.02:
            return 429, "too many"
        passed[0] = time.perf_counter()
        return None

    server = serve(fault)
    prompts, responses = pairs(60)
    spec = declared(server, batch_size=1, concurrency=20, retries=3)
    assert load_reward("judge", spec).score(prompts, responses) == expected(prompts, responses)
    assert len(server.asked) > 120


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ((422, {"detail": "no such word"}), "status 422: no such word"),
        (BUSY, "status 503: overloaded"),
        ((200, "bad"), 'no finite number: "bad"'),
        ("drop", "ServerDisconnectedError"),
    ],
)
def test_a_failure_names_its_rows_and_loses_no_other(serve, tmp_path, said, words):
    def fault(number, content):
        bad = [at for at, one in enumerate(content["prompts"]) if one in ("prompt 7", "prompt 31")]
        if bad and said == (200, "bad"):
            return 200, {"scores": ["bad" if at in bad else 0.5 for at in range(len(content["prompts"]))]}
        return said if bad else None

    server = serve(fault)
    prompts, responses = pairs(40)
    scorer = scorer_of(declared(server, retries=1), tmp_path / "cache.sqlite")
    with pytest.raises(UserError) as caught:
        # The first pair comes twice: a place in the call is not a place among the pairs.
        scorer.score(["prompt 0", *prompts], [responses[0], *responses])
    message = str(caught.value)
    assert "reward `judge`, http://127.0.0.1" in message and "no score for 2 of 41 responses" in message
    assert "prompt 8: 'prompt 7' → 'response 7" in message and "prompt 32: 'prompt 31'" in message
    assert words in message
    assert "all other scores are kept" in message
    server.fault, asked = (lambda number, content: None), len(server.asked)
    got = scorer.score(prompts, responses)["judge"]
    again = sorted(one for content in server.asked[asked:] for one in content["prompts"])
    assert again == ["prompt 31", "prompt 7"] and got[7] == score_of(prompts[7], responses[7])


def test_a_sweep_may_leave_rows_out_and_a_training_may_not(serve):
    server = serve(lambda number, content: BUSY if "prompt 7" in content["prompts"] else None)
    prompts, responses = pairs(40)
    spec = declared(server, retries=0, missing="leave_out")
    scorer = scorer_of(spec)
    got = scorer.score(["prompt 7", *prompts], [responses[7], *responses])["judge"]
    assert [at for at, score in enumerate(got) if math.isnan(score)] == [0, 8]
    assert scorer.failed == {"judge": 2}
    server.fault = lambda number, content: None
    assert scorer.score(prompts, responses)["judge"] == expected(prompts, responses), "a failure is not cached"
    assert scorer.failed == {"judge": 0}
    server.fault = lambda number, content: BUSY if "prompt 7" in content["prompts"] else None
    weighted = WeightedReward({"judge": load_reward("judge", spec)}, {"judge": 1.0})
    with pytest.raises(UserError, match="(?s)no score for 1 of 40.*prompt 7: .*a training needs every score"):
        weighted.score(prompts, responses)


@pytest.mark.parametrize(
    ("said", "words", "missing"),
    [
        ((401, "who are you"), "status 401: who are you", "leave_out"),
        ((422, "unprocessable"), "20 requests in a row failed", "refuse"),
        ((200, {"rewards": []}), "an answer of another form", "leave_out"),
        ((200, {"scores": [1.0]}), "1 scores for 16 pairs", "refuse"),
    ],
)
def test_a_server_that_cannot_answer_stops_the_work_soon(serve, said, words, missing):
    server = serve(lambda number, content: said)
    scorer = scorer_of(declared(server, missing=missing, concurrency=4))
    with pytest.raises(UserError, match="(?s)the reward's server is not usable.*" + words):
        scorer.score(*pairs(2000))
    assert len(server.asked) < 40


def test_a_run_that_asks_only_for_what_fails_ends(serve, tmp_path):
    """A first run stops at 25 pairs that fail for good; with `leave_out`, the next one ends without them."""
    bad = {f"prompt {at}" for at in range(0, 400, 16)}
    server = serve(lambda number, content: (422, "no such word") if bad & set(content["prompts"]) else None)
    prompts, responses = pairs(400)
    options = {"concurrency": 4, "batch_size": 1}
    with pytest.raises(UserError, match="missing: leave_out"):
        scorer_of(declared(server, **options), tmp_path / "cache.sqlite").score(prompts, responses)
    scorer = scorer_of(declared(server, missing="leave_out", **options), tmp_path / "cache.sqlite")
    got = scorer.score(prompts, responses)["judge"]
    assert scorer.failed == {"judge": 25} and sum(map(math.isnan, got)) == 25


def test_one_strange_answer_is_one_failure_and_no_key_is_shown(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sesame-8127")
    odd = 200, {"error": {"headers": "Bearer sesame-8127"}}
    server = serve(lambda number, content: odd if "prompt 30" in content["prompts"] else None)
    prompts, responses = pairs(40)
    options = {"concurrency": 1, "batch_size": 1, "key_env": "JUDGE_KEY"}
    with pytest.raises(UserError, match="(?s)no score for 1 of 40.*prompt 30") as raised:
        scorer_of(declared(server, **options)).score(prompts, responses)
    assert "sesame" not in str(raised.value)


def test_a_netrc_file_changes_nothing(serve, tmp_path, monkeypatch):
    (tmp_path / ".netrc").write_text("default login ann password secret-31\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    server = serve()
    load_reward("judge", declared(server)).score(["p"], ["r"])
    assert not any("secret" in str(headers) or "Authorization" in headers for headers in server.headers)


def test_a_server_that_dies_for_good_stops_the_work_and_loses_no_answer(serve, tmp_path):
    server = serve()
    server.fault = lambda number, content: threading.Thread(target=server.stop).start() if number == 30 else None
    prompts, responses = pairs(2000)
    scorer = scorer_of(declared(server, retries=1, concurrency=8), tmp_path / "cache.sqlite")
    with pytest.raises(UserError, match="(?s)20 requests in a row failed.*start the server"):
        scorer.score(prompts, responses)
    kept = scorer._cache.get(scorer._keys["judge"], pairs_of(prompts, responses))
    assert len(server.ledger) >= len(kept) >= len(server.ledger) - 8 * 16 > 0


def test_columns_that_json_cannot_hold_are_refused_before_anything_is_scored(serve):
    reward = load_reward("judge", declared(serve(), columns=["answer"]))
    check_columns([reward], {"rows.jsonl": [{"prompt": "p", COLUMNS: {"answer": [1, None, "x"]}}]})
    with pytest.raises(UserError, match="(?s)rows.jsonl, row 0.*cannot send column `answer`.*nan"):
        check_columns([reward], {"rows.jsonl": [{"prompt": "p", COLUMNS: {"answer": math.nan}}]})
    with pytest.raises(UserError, match="reads column `answer`, which a row does not have"):
        check_columns([reward], {"rows.jsonl": [{"prompt": "p", COLUMNS: {}}]})


class Told(Progress):
    def __init__(self):
        self.steps = []

    def start(self, step, counted=False):
        self.steps.append(step)


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_server_that_fails_often_and_dies_once_gives_every_score_once(serve, tmp_path, count):
    """Every tenth request gets a 503; once, the server dies and comes back after a second at the same port."""
    told = Told()

    def fault(number, content):
        if number == count // 40:
            server.die_for(1.0)
        return BUSY if number % 10 == 0 else None

    server = serve(fault)
    prompts, responses = pairs(count)
    scorer = scorer_of(declared(server, retries=8), tmp_path / "cache.sqlite", told)
    stored = []
    put = scorer._cache.put
    scorer._cache.put = lambda key, scores: (stored.extend(scores), put(key, scores))
    assert scorer.score(prompts, responses)["judge"] == expected(prompts, responses)
    assert len(stored) == len(set(stored)) == len(server.ledger) == count
    # Only answers that were lost with the server were given twice.
    assert sum(server.ledger.values()) <= count + 64 * 16
    assert told.steps[0] == f"scoring judge: 0 of {count:,} responses"
    assert told.steps[-1] == f"scoring judge: {count:,} of {count:,} responses"


def test_64_requests_are_under_way_and_memory_stays_flat(serve):
    """The server answers only when 64 requests wait together, 10 times; 10,240 pairs in all."""
    together = threading.Barrier(64)
    server = serve(wait=lambda content: content["prompts"] and together.wait(30))
    prompts, responses = pairs(10_240)
    reward = load_reward("judge", declared(server))
    tracemalloc.start()
    try:
        for some in reward.stream(prompts, responses):
            assert all(score == score_of(prompts[at], responses[at]) for at, score in some.items())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(server.ledger) == sum(server.ledger.values()) == 10_240
    # Of the server too, in this process: its ledger holds every pair, 3 MB.
    assert server.most == 64 and peak < 12e6


def stuck_after(count):
    """Return how a server waits that lets so many requests pass."""
    numbers = itertools.count()
    return lambda content: content["prompts"] and next(numbers) >= count and time.sleep(15)


def test_an_interrupt_ends_at_once_and_keeps_what_came(serve, tmp_path):
    server = serve(wait=stuck_after(20))
    prompts, responses = pairs(40)
    scorer = scorer_of(declared(server, concurrency=4, batch_size=1), tmp_path / "cache.sqlite")
    # A background job of a script begins with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(1.0, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    timer.start()
    started = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            scorer.score(prompts, responses)
    finally:
        signal.signal(signal.SIGINT, before)
    scorer.close()
    assert time.perf_counter() - started < 8
    assert len(ScoreCache(tmp_path / "cache.sqlite").get(scorer._keys["judge"], pairs_of(prompts, responses))) == 20


SCRIPT = """\
import sys
from pathlib import Path
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.load_rewards import load_reward
from rewarded_lines.rewards.score_cache import ScoreCache
from rewarded_lines.rewards.scorer import Scorer
spec = RewardSpec(url=sys.argv[1], concurrency=4, batch_size=1)
scorer = Scorer({"judge": load_reward("judge", spec)}, {"judge": spec}, ScoreCache(Path("cache.sqlite")))
scorer.score([f"prompt {at}" for at in range(40)], [""] * 40)
"""


@pytest.mark.slow
def test_a_kill_keeps_what_came(serve, tmp_path):
    server = serve(wait=stuck_after(20))
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, server.url], cwd=tmp_path)
    try:
        deadline = time.monotonic() + 100
        while len(server.asked) <= 20 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1.0)
    finally:
        process.kill()
        process.wait()
    spec = declared(server)
    key, wanted = reward_key(load_reward("judge", spec), spec), [(f"prompt {at}", "") for at in range(40)]
    assert len(ScoreCache(tmp_path / "cache.sqlite").get(key, wanted)) == 20
