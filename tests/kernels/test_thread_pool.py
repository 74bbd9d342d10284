"""Work shared out among threads: every item once, steps in order, the first fault ends it."""

import gc
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest

from rewarded_lines.kernels.thread_pool import Relay, share_out


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_item_is_done_once(threads):
    done = []
    share_out(range(200), lambda: done.append, threads)
    assert sorted(done) == list(range(200))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_fault_ends_it_and_is_raised(threads):
    begun, before = [], threading.active_count()

    def work(item):
        begun.append(item)
        if item == 3:
            raise ValueError("three")

    with pytest.raises(ValueError, match="three"):
        share_out(range(10_000), lambda: work, threads)
    assert len(begun) < 10_000
    assert threading.active_count() <= before


@pytest.mark.parametrize("threads", [1, 3])
def test_what_failed_work_held_is_free_at_once(threads):
    held = []

    def call():
        array = np.zeros(9)
        held.append(weakref.ref(array))

        def work(item):
            if item == 2:
                raise MemoryError(array.size)

        share_out(range(9), lambda: work, threads)

    gc.disable()
    try:
        call()
    except MemoryError:
        pass
    finally:
        gc.enable()
    assert held[0]() is None


INTERRUPTED = """
import signal, sys, time
from rewarded_lines.kernels.thread_pool import share_out

signal.signal(signal.SIGALRM, signal.default_int_handler)
for turn in range(400):
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-5 * (turn + 1))
        share_out(range(10), lambda: lambda item: time.sleep(0.0005), 4)
        time.sleep(1)
    except KeyboardInterrupt:
        pass
"""


def test_an_interrupt_at_any_moment_ends_it():
    subprocess.run([sys.executable, "-c", INTERRUPTED], timeout=60, check=True)


INTERRUPTED_INSIDE_START = """
import threading, time
from rewarded_lines.kernels.thread_pool import share_out

real, begun = threading._start_new_thread, []

def start(run, given):
    # What an interrupt between the lock that `Thread.start` takes and its wait leaves: the new thread never runs.
    run.__self__._started._cond.acquire()
    real(run, given)
    time.sleep(0.05)
    raise KeyboardInterrupt

threading._start_new_thread = start
try:
    share_out(range(10), lambda: begun.append, 4)
except KeyboardInterrupt:
    print("interrupted", begun)
"""


def test_a_lock_that_an_interrupt_leaves_held_is_not_waited_for():
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_INSIDE_START], timeout=20, check=True, capture_output=True, text=True
    )
    assert done.stdout == "interrupted []\n"


def test_a_relay_keeps_the_order_of_both_steps():
    relay, first, second = Relay(range(60)), [], []

    def work(_):
        here = threading.local()

        def begin(item):
            here.item = item
            first.append(item)

        def go_on():
            # The later the item, the shorter: without the relay the next one would overtake.
            time.sleep((here.item % 3 == 0) * 0.002)
            second.append(here.item)

        assert relay.take(begin, go_on) == here.item

    share_out(range(60), lambda: work, 4)
    assert first == second == list(range(60))


def test_a_relay_lets_go_when_a_step_fails():
    relay = Relay(range(4))
    for step in ((lambda item: 1 / 0, lambda: None), (lambda item: None, lambda: 1 / 0)):
        with pytest.raises(ZeroDivisionError):
            relay.take(*step)
    assert relay.take(lambda item: None, lambda: None) == 2


def test_few_items_need_few_threads(monkeypatch):
    begun = []
    monkeypatch.setattr(threading.Thread, "start", lambda thread: begun.append(thread))
    share_out([1], lambda: lambda item: None, threads=8)
    assert begun == []


def test_an_item_that_is_begun_at_an_interrupt_inside_start_is_waited_for(monkeypatch):
    start, begun, done = threading.Thread.start, threading.Event(), []

    def work(item):
        begun.set()
        time.sleep(0.1)
        done.append(item)

    def interrupted(thread):
        start(thread)
        begun.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        share_out([1, 2, 3], lambda: work, threads=2)
    assert done == [1]
