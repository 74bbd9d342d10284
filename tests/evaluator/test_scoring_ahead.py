"""Rewards that score beside the engine: the same records, errors and resumptions as in turn."""

import multiprocessing
import os
import signal
import threading
import time

import pytest
from progress_told import Told
from run_records import contents

from rewarded_lines import sweep
from rewarded_lines.engines.transformers_engine import HfGenerator
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator import evaluate
from rewarded_lines.evaluator.evaluate import LocalEvaluator
from rewarded_lines.progress import SILENT
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.api_judge import ApiJudge
from rewarded_lines.rewards.classifier_rewards import ModelReward
from rewarded_lines.rewards.function_rewards import FunctionReward
from rewarded_lines.rewards.http_rewards import HttpReward
from rewarded_lines.rewards.local_judge import LocalJudge
from rewarded_lines.rewards.scoring_ahead import ScoringAhead, _WhileWaited, score_ahead

THREAD = "scoring ahead"
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def beside(tiny, monkeypatch):
    """The tiny project, whose functions may be called in another thread; each turn has one point."""
    made = FunctionReward.__init__

    def able(reward, *given):
        made(reward, *given)
        reward.beside_engine = True

    monkeypatch.setattr(FunctionReward, "__init__", able)
    monkeypatch.setattr(evaluate, "_POINTS_A_SPELL", 1)
    return tiny


@pytest.fixture
def callers(monkeypatch):
    """The names of the threads that called a function."""
    names, score = [], FunctionReward.score

    def told(reward, *given):
        names.append(threading.current_thread().name)
        return score(reward, *given)

    monkeypatch.setattr(FunctionReward, "score", told)
    return names


def test_the_records_are_those_of_scoring_in_turn(beside, callers, monkeypatch):
    ahead = sweep(engine="hf", points=2, out="ahead")
    assert set(callers) == {THREAD}
    assert THREAD not in {thread.name for thread in threading.enumerate()}
    seconds = ahead.header["seconds_last"]
    assert set(seconds) == {"engine", "generate", "swap", "score", "total"}
    callers.clear()
    monkeypatch.setattr(evaluate, "score_ahead", lambda *_: None)
    sweep(engine="hf", points=2, out="turns")
    assert THREAD not in callers
    assert contents(beside / "ahead") == contents(beside / "turns")


def test_scores_are_made_while_the_engine_generates(beside, monkeypatch):
    generated, second = HfGenerator.generate, threading.Event()
    score = FunctionReward.score

    def generate(engine, prompts, spec, models=(None,)):
        if models != (None,):
            second.set()
        return generated(engine, prompts, spec, models)

    def late(reward, *given):
        # The score of the first point needs the generation of the second to have begun.
        assert second.wait(20)
        return score(reward, *given)

    monkeypatch.setattr(HfGenerator, "generate", generate)
    monkeypatch.setattr(FunctionReward, "score", late)
    assert sweep(engine="hf", points=2).header["complete"]


def test_a_reward_that_fails_ends_the_sweep_as_in_turn_and_its_drafts_stay(beside, monkeypatch, cli):
    source = (beside / "rewards.py").read_text()
    fails = "    if 'dog' in prompts:\n        raise RuntimeError('no dogs')\n    return [len("
    (beside / "rewards.py").write_text(source.replace("    return [len(", fails))
    messages = []
    for out in ("ahead", "turns"):
        answer = cli("sweep", "--engine", "hf", "--points", "2", "--out", out)
        assert answer.code == 1 and "no dogs" in answer.err and "Traceback" not in answer.err
        messages.append(answer.err)
        monkeypatch.setattr(evaluate, "score_ahead", lambda *_: None)
    assert messages[0] == messages[1]
    assert list((beside / "ahead/drafts").glob("*.parquet"))
    assert THREAD not in {thread.name for thread in threading.enumerate()}


def test_an_interrupt_leaves_no_thread_and_the_run_goes_on(beside, callers, monkeypatch):
    generated, calls = LocalEvaluator._made, []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generated(*given)

    monkeypatch.setattr(LocalEvaluator, "_made", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(engine="hf", points=2, out="run")
    assert THREAD not in {thread.name for thread in threading.enumerate()}
    assert len(list((beside / "run/drafts").glob("*.parquet"))) == 1
    # Without scores, the draft's are made while the engine generates: by the same thread, for a reward knows one.
    (beside / "run/scores.sqlite").unlink()
    callers.clear()
    assert sweep(engine="hf", points=2, out="run").header["evaluated_last"] == 4
    assert set(callers) == {THREAD}
    sweep(engine="hf", points=2, out="whole")
    assert contents(beside / "run") == contents(beside / "whole")


def run_slowly(folder):
    os.chdir(folder)
    score = FunctionReward.score

    def slow(*given):
        time.sleep(0.2)
        return score(*given)

    FunctionReward.score = slow
    sweep(engine="hf", points=2, out="run")


def test_a_kill_between_generating_and_scoring_loses_no_response(beside):
    child = FORK.Process(target=run_slowly, args=(beside,))
    child.start()
    deadline = time.monotonic() + 60
    while len(list((beside / "run/drafts").glob("*.parquet"))) < 2:
        assert child.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    drafts = {path.name for path in (beside / "run/drafts").glob("*.parquet")}
    assert sweep(engine="hf", points=2, out="run").header["complete"]
    sweep(engine="hf", points=2, out="whole")
    assert contents(beside / "run") == contents(beside / "whole") and drafts <= set(contents(beside / "run"))


class Recorder:
    """A scorer that records its calls, waits for `go`, and fails at a response "bad"."""

    def __init__(self):
        self.calls, self.go = [], threading.Event()

    def score(self, prompts, responses, columns):
        self.calls.append(list(responses))
        assert self.go.wait(10)
        if "bad" in responses:
            raise UserError([])

    def close(self):
        self.calls.append("closed")


def test_what_waits_is_scored_in_one_call_and_an_error_is_that_of_its_work():
    scorer = Recorder()
    ahead = ScoringAhead(scorer, _WhileWaited(SILENT))
    ahead.add((["p"], ["first"], [{}]))
    while not scorer.calls:
        time.sleep(0.001)
    ahead.add((["p"], ["second"], [{}]))
    ahead.add((["p"], ["bad"], [{}]))
    assert ahead.added == 3 and not ahead.failed
    scorer.go.set()
    ahead.wait(1)
    for _ in range(2):
        with pytest.raises(UserError):
            ahead.wait(3)
    assert scorer.calls == [["first"], ["second", "bad"]] and ahead.failed
    ahead.wait(1)
    ahead.stop()
    ahead.join()
    assert scorer.calls[2:] == ["closed"]
    assert THREAD not in {thread.name for thread in threading.enumerate()}


def test_the_engines_steps_are_shown_and_those_of_scores_while_they_are_waited_for():
    told = Told()
    steps = _WhileWaited(told)
    steps.start("scoring a")
    steps.shown = True
    steps.start("scoring b", counted=True)
    assert told.steps == {"scoring b": True}


@pytest.mark.parametrize(
    ("workers", "missing", "fingerprint", "beside"),
    [
        (1, "refuse", "known", True),
        (0, "refuse", "known", False),
        (1, "leave_out", "known", False),
        (1, "refuse", "", False),
    ],
    ids=["in a process of its own", "in this process", "may fail", "unknown content"],
)
def test_which_functions_score_beside_the_engine(tiny, workers, missing, fingerprint, beside):
    spec = RewardSpec(function="rewards.py:words", **({"workers": workers} if workers else {}))
    reward = FunctionReward("words", spec, tiny)
    reward.fingerprint = fingerprint
    declared = {"words": spec.model_copy(update={"missing": missing})}
    ahead = score_ahead({"words": reward}, declared, tiny / "scores.sqlite")
    assert (ahead is not None) == beside
    # Servers do, models in this process do not.
    assert HttpReward.beside_engine and ApiJudge.beside_engine
    assert not ModelReward.beside_engine and not LocalJudge.beside_engine
