"""A child dies with its parent if the environment asks for it."""

import os
import signal
import subprocess
import sys
import time

import pytest
from command import alive

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline(), child.pid, flush=True)
child.wait()
"""
CHILD = """
import time
from rewarded_lines.processes import die_with_parent
die_with_parent()
print("ready", flush=True)
time.sleep(60)
"""


def test_a_child_whose_ancestor_died_before_it_could_ask_goes_at_once():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    environment = {**os.environ, "REWARDED_LINES_DIE_WITH_PARENT": str(gone.pid)}
    child = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=30)
    assert child.returncode == (1 if sys.platform.startswith("linux") else 0) and child.stdout == ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's help is Linux's")
@pytest.mark.parametrize("asked", [True, False])
def test_the_child_goes_with_its_parent_when_asked(asked):
    environment = {**os.environ, "REWARDED_LINES_DIE_WITH_PARENT": "1" if asked else ""}
    command = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline().strip() == "ready"
        child = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
    try:
        deadline = time.monotonic() + 5
        while asked and alive(child) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert alive(child) != asked
    finally:
        if alive(child):
            os.kill(child, signal.SIGKILL)


def test_between_fork_and_exec_no_library_is_loaded_and_nothing_looked_up():
    # Another thread may have held the loader's lock at the fork; nobody in the child gives it back.
    script = (
        "import os, sys\n"
        "from rewarded_lines.processes import DIE_WITH_PARENT, die_with_parent\n"
        "os.environ[DIE_WITH_PARENT], seen = '1', []\n"
        "sys.addaudithook(lambda event, _: seen.append(event))\n"
        "die_with_parent()\n"
        "print([one for one in seen if one.startswith(('ctypes', 'import', 'exec'))], DIE_WITH_PARENT in os.environ)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\n"


def test_memory_that_was_freed_goes_back():
    # In its own process: other memory of this one decides what can be returned.
    script = (
        "from rewarded_lines.processes import give_back_memory\n"
        "size = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "pieces = [bytearray(50_000) for _ in range(2000)]\n"
        "kept = pieces[::50]\n"
        "del pieces\n"
        "held = size()\n"
        "give_back_memory()\n"
        "print(held - size())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 50_000_000
