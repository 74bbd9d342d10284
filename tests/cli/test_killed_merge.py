"""A merge that is killed or interrupted, runs out of space or loses a race leaves a complete output or none."""

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from random import Random

import blake3
import command
import pytest
from command import COMMAND, ENVIRONMENT
from plain_checkpoints import SINGLE, save_family, tiny_shapes

MANY = pytest.mark.parametrize("kills", [4, pytest.param(80, marks=pytest.mark.slow)])
SIZES = {"hidden": 1024, "vocabulary": 2048}
# Bytes of the tensors, 25 MB: whole pages, so that a disk of just this size has no room for a header.
NEEDED = sum(
    4 * int(rows) * int(columns) for rows, columns in ((*shape, 1)[:2] for shape in tiny_shapes(**SIZES).values())
)
ARGS = ("merge", "--base", "sft", "--policy", "first", "--policy", "second", "--out", "out")
NAMES = ["first", "second", "sft"]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Checkpoints so large that a merge takes some tenths of a second."""
    return save_family(tmp_path_factory.mktemp("family") / "place", **SIZES)


@pytest.fixture
def place(family, monkeypatch):
    """The family's folder as the working directory; other files are removed after each test."""
    monkeypatch.chdir(family)
    before = {name: hashes(Path(name)) for name in NAMES}
    yield family
    assert {name: hashes(Path(name)) for name in NAMES} == before
    for path in set(family.iterdir()) - {family / name for name in NAMES}:
        shutil.rmtree(path)


@pytest.fixture
def begin(place, tmp_path):
    """Start a merge in its own process, which has finished its imports, so that a kill hits the merge."""

    def run(*args):
        process = command.prepared().Process(target=command.run, args=(tmp_path / f"log-{time.monotonic_ns()}", *args))
        process.log = process._args[0]
        process.start()
        return process

    return run


def hashes(folder):
    return {path.name: blake3.blake3(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def names():
    return sorted(path.name for path in Path().iterdir())


def finished(begin, *args):
    """Run a merge to its end; return its output and its seconds."""
    begun, process = time.monotonic(), begin(*args)
    process.join(60)
    assert process.exitcode == 0, process.log.read_text()
    assert names() == sorted([*NAMES, "out"])
    return hashes(Path("out")), time.monotonic() - begun


def kill(begin, random, longest, args):
    """Kill a merge at a random moment, from its start or from its first write; return its folders."""
    there = set(names())
    process = begin(*args)
    delay = random.uniform(0, longest)
    if random.random() < 0.75:
        while process.is_alive() and not set(names()) - there:
            time.sleep(0.001)
        # Writing takes a small share of the whole.
        delay = longest * 10 ** random.uniform(-3, -1)
    process.join(delay)
    process.kill()
    process.join(60)
    return [name for name in names() if name.startswith(".out.")]


@MANY
def test_killed_at_any_moment_an_output_is_complete_or_absent(begin, kills):
    random, left = Random(3), 0
    finished(begin, *ARGS)
    shutil.rmtree("out")
    whole, longest = finished(begin, *ARGS)
    inputs = {name: hashes(Path(name)) for name in NAMES}
    shutil.rmtree("out")
    for number in range(kills):
        remains = kill(begin, random, longest, ARGS)
        left += bool(remains)
        # The next merge removes what the killed one left before it writes.
        assert len(remains) <= 2, remains
        assert {name: hashes(Path(name)) for name in NAMES} == inputs
        if Path("out").exists():
            assert hashes(Path("out")) == whole
            shutil.rmtree("out")
        elif number % 10 == 9:
            assert finished(begin, *ARGS)[0] == whole
            shutil.rmtree("out")
    assert left >= kills / 5, "too few kills fell into the writing"
    assert finished(begin, *ARGS)[0] == whole


@MANY
def test_killed_while_it_replaces_an_output_the_old_or_the_new_one_is_there(begin, kills):
    random, seen = Random(4), set()
    whole = {}
    for lam in ("0.25", "0.75"):
        whole[lam], longest = finished(begin, *ARGS, "--lam", lam, "--overwrite")
    lam = "0.25"
    for _ in range(kills // 2):
        kill(begin, random, longest, (*ARGS, "--lam", lam, "--overwrite"))
        now = hashes(Path("out"))
        assert now in whole.values()
        seen.add(replaced := now == whole[lam])
        if replaced:
            lam = "0.75" if lam == "0.25" else "0.25"
    assert finished(begin, *ARGS, "--lam", lam, "--overwrite")[0] == whole[lam]


def test_several_at_once_make_one_complete_output(begin):
    whole, _ = finished(begin, *ARGS)
    for count in (2, 3):
        shutil.rmtree("out")
        together = [begin(*ARGS) for _ in range(count)]
        for process in together:
            process.join(60)
        assert sorted(process.exitcode for process in together) == [0] + [1] * (count - 1)
        for said in (process.log.read_text() for process in together if process.exitcode):
            assert "out: another process made the output folder meanwhile" in said or "the output folder exists" in said
            assert "Traceback" not in said and said.count("remedy") == 1
        assert hashes(Path("out")) == whole and names() == sorted([*NAMES, "out"])


def test_several_at_once_replace_one_another(begin):
    whole, _ = finished(begin, *ARGS)
    together = [begin(*ARGS, "--overwrite") for _ in range(3)]
    for process in together:
        process.join(60)
        assert process.exitcode == 0, process.log.read_text()
    assert hashes(Path("out")).keys() == whole.keys() and names() == sorted([*NAMES, "out"])
    assert json.loads(Path("out/merge.json").read_text())["weights"] == {"first": 0.5, "second": 0.5}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_cleans_up(place, number, code):
    process = subprocess.Popen(
        [*COMMAND, *ARGS],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=command.hear_interrupts,
    )
    while process.poll() is None and not list(Path().glob(".out.partial-*/*.safetensors")):
        time.sleep(0.002)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == code and b"Traceback" not in said
    assert names() == NAMES


def refused(*prefix, args=ARGS, **options):
    """Run a merge in a process that must fail with one message; return the message."""
    done = subprocess.run([*prefix, *COMMAND, *args], env=ENVIRONMENT, capture_output=True, text=True, **options)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr, done
    return done.stderr


def test_a_limit_on_the_size_of_files(place):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    said = refused(preexec_fn=limit)
    assert f"expected: {NEEDED:,} bytes" in said and "not enough disk space, or a limit on the size of files" in said
    assert names() == NAMES


def mounted(folder, *options):
    """Return a command's prefix that mounts a small disk at `folder`; skip where that is not allowed."""
    mount = f'mount -t tmpfs -o "{",".join(options)}" tmpfs "{folder}" && exec "$@"'
    prefix = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh"]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    return prefix


@pytest.mark.parametrize(
    ("options", "before"),
    [([f"size={NEEDED - 4096}"], True), ([f"size={NEEDED}"], False), (["size=99m", "nr_inodes=5"], False)],
    ids=["too small", "full by a header", "no more files"],
)
def test_a_full_disk(place, tmp_path, options, before):
    (tmp_path / "disk").mkdir()
    # The shell lists what is left before the disk is unmounted.
    look = ["sh", "-c", f'"$@"; code=$?; ls -A "{tmp_path}/disk" >"{tmp_path}/left"; exit $code', "sh"]
    said = refused(*mounted(tmp_path / "disk", *options), *look, args=(*ARGS[:-1], tmp_path / "disk/out"))
    assert said.count("not enough disk space") == 1 and f"expected: {NEEDED:,} bytes" in said
    assert (f"got: {NEEDED - 4096:,} bytes" in said) == before
    assert (tmp_path / "left").read_text() == ""


def test_space_is_looked_at_before_writing(cli, place, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 1234, 1234))
    monkeypatch.setattr("rewarded_lines.merger.model_plan.ModelPlan.write", None)
    answer = cli(*ARGS)
    assert answer.code == 1 and f"expected: {NEEDED:,} bytes" in answer.err and "got: 1,234 bytes" in answer.err
    assert names() == NAMES


def test_a_folder_that_takes_nothing(place, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    prefix = []
    if os.geteuid() == 0:
        prefix = mounted(closed, "ro")
    closed.chmod(0o555)
    for out in (closed / "out", closed / "deep/out"):
        said = refused(*prefix, args=(*ARGS[:-1], out))
        assert str(closed) in said and said.count("\n") == 1
    assert not list(closed.iterdir())


def test_a_place_that_is_no_disk(cli, place):
    for out in ("/proc/out", "/dev/null/out", f"sft/{SINGLE}/out", "n" * 300, f"out/{'n' * 250}"):
        answer = cli(*ARGS[:-1], out)
        assert answer.code == 1 and "Traceback" not in answer.err and answer.err.strip(), answer
    assert names() == NAMES
