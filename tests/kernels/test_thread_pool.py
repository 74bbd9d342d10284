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


def test_a_thread_that_has_not_yet_said_that_it_runs_is_waited_for(monkeypatch):
    """An interrupt may come inside `Thread.start`; `join` then refuses for a moment."""
    join, asked, done = threading.Thread.join, [], []

    def not_yet(thread):
        asked.append(thread)
        if len(asked) < 3:
            raise RuntimeError("cannot join thread before it is started")
        join(thread)

    monkeypatch.setattr(threading.Thread, "join", not_yet)
    share_out([1, 2], lambda: lambda item: (time.sleep(0.02), done.append(item)), threads=2)
    assert len(asked) == 3 and sorted(done) == [1, 2]
