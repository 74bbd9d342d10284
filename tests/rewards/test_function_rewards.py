"""Functions in worker processes give the same scores and errors, and no process stays."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from command import hear_interrupts

from rewarded_lines.errors import UserError
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.load_rewards import load_reward
from rewarded_lines.rewards.score_checks import PairError

PROMPTS = [f"p{index}" for index in range(23)]
RESPONSES = ["word " * (index % 5 + 1) for index in range(23)]


@pytest.fixture
def load(functions):
    loaded = []

    def make(name, workers=2):
        loaded.append(load_reward("mine", RewardSpec(function=f"functions.py:{name}", workers=workers), functions))
        return loaded[-1]

    yield make
    for reward in loaded:
        reward.free()


def workers_of(pid):
    """Return the worker processes of a process; multiprocessing's resource tracker does not count."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def gone(processes, patience=20.0):
    return not psutil.wait_procs(processes, timeout=patience)[1]


def test_workers_give_the_same_scores_in_the_same_order(load):
    reward = load("exact")
    assert reward.score(PROMPTS, RESPONSES) == load("exact", 0).score(PROMPTS, RESPONSES)
    assert reward.score(PROMPTS[:1], RESPONSES[:1]) == load("exact", 0).score(PROMPTS[:1], RESPONSES[:1])
    assert reward.score([], []) == []


def test_the_function_is_called_elsewhere_until_it_is_freed(load):
    reward = load("where")
    pids = {int(pid) for pid in reward.score(PROMPTS, RESPONSES)}
    assert os.getpid() not in pids and 1 <= len(pids) <= 2
    processes = workers_of(os.getpid())
    assert pids <= {process.pid for process in processes}
    reward.free()
    assert gone(processes, 5)
    assert not pids & {int(pid) for pid in reward.score(PROMPTS, RESPONSES)}


def test_workers_find_the_function_after_a_change_of_folder(functions, monkeypatch, tmp_path_factory):
    from pathlib import Path

    reward = load_reward("mine", RewardSpec(function="functions.py:words", workers=1), Path())
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    try:
        assert reward.score(["p"], ["two words"]) == [2.0]
    finally:
        reward.free()


@pytest.mark.parametrize("name", ["raises", "nan", "odd", "too_few"])
def test_a_failure_in_a_worker_is_told_as_in_process(load, name):
    responses = ["fine"] * 20 + ["" if name == "raises" else "bad", "fine", "fine"]
    told = []
    for workers in (0, 2):
        with pytest.raises(PairError) as caught:
            load(name, workers).score(PROMPTS, responses)
        told.append(caught.value)
    if name == "too_few":
        assert all("wrong number of scores" in str(one) for one in told)
        return
    lines = [[line for line in str(error).splitlines() if "<lambda>" not in line] for error in told]
    assert lines[0] == lines[1] and told[0].index == told[1].index == 20
    assert f"prompt 20: 'p20' → {responses[20]!r}" in str(told[1]) or name == "odd"
    # The error keeps all other scores; in this process, a function that raises only leaves the earlier ones.
    assert set(range(20)) <= set(told[0].known) <= set(told[1].known) == set(range(23)) - {20}


def test_a_failure_without_a_pair_comes_back_whole(functions, load):
    reward = load("words")
    (functions / "functions.py").write_text("raise RuntimeError('edited meanwhile')\n")
    with pytest.raises(UserError, match=r"(?s)importing .*functions\.py failed.*RuntimeError: edited meanwhile"):
        reward.score(PROMPTS, RESPONSES)


@pytest.mark.parametrize("name", ["dies", "killed"])
def test_a_worker_that_dies_is_one_error_and_no_process_stays(load, name):
    reward = load(name)
    with pytest.raises(UserError, match="a worker process died") as caught:
        reward.score(PROMPTS, ["bad"] * 23)
    assert len(caught.value.problems) == 1 and "functions.py:" in str(caught.value)
    assert gone(workers_of(os.getpid()), 5)
    if name == "dies":
        assert reward.score(["p"], ["good"]) == [1.0]


# A worker imports the script, too; what is below the condition it leaves out.
SCRIPT = """\
if __name__ == "__main__":
    from pathlib import Path
    from rewarded_lines.reward_settings import RewardSpec
    from rewarded_lines.rewards.load_rewards import load_reward

    reward = load_reward("mine", RewardSpec(function="functions.py:{name}", workers=2), Path())
    print(reward.score(["p"] * 8, ["r"] * 8))
"""


def start(functions, name):
    (functions / "script.py").write_text(SCRIPT.format(name=name))
    return subprocess.Popen(
        [sys.executable, "script.py"], cwd=functions, start_new_session=True, preexec_fn=hear_interrupts
    )


# Each signal to the whole group and to its leader alone.
@pytest.mark.parametrize(
    ("how", "group"),
    [
        (signal.SIGINT, True),
        *(pytest.param(how, False, marks=pytest.mark.slow) for how in (signal.SIGINT, signal.SIGKILL)),
        *(pytest.param(signal.SIGTERM, group, marks=pytest.mark.slow) for group in (True, False)),
        pytest.param(signal.SIGKILL, True, marks=pytest.mark.slow),
    ],
)
def test_no_worker_outlives_the_process(functions, how, group):
    process = start(functions, "slow")
    while len(list(functions.glob("started-*"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    processes = workers_of(process.pid)
    assert len(processes) == 2
    # Ctrl-C reaches every process of the terminal, a kill only one process.
    (os.killpg if group else os.kill)(process.pid, how)
    assert process.wait(30) == -how
    assert gone(processes)


@pytest.mark.slow
def test_a_script_ends_without_freeing(functions):
    assert start(functions, "words").wait(60) == 0


def test_an_object_that_is_called_is_known_by_its_file(functions, load):
    twice = load("twice", 0)
    assert twice.score(["p"], ["ab"]) == [4.0] and len(twice.fingerprint) == 64
    assert (twice.size, twice.loaded) == (0, True)
