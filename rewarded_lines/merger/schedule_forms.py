"""The forms in which users and records give a schedule: numbers, texts, lists, mappings by policy, files."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.families import KINDS
from rewarded_lines.errors import Problem, UserError, did_you_mean, fail
from rewarded_lines.merger.lines_schedule import Line, Outside, Schedule
from rewarded_lines.options import split_named

# α or β, coefficients by block, factors by kind of module, as Python's callers give them.
Values = float | str | Sequence[str] | Mapping[str, float] | None
Coefficients = str | Sequence[float] | Sequence[str] | Mapping[str, Sequence[float]] | None
Factors = str | Sequence[str] | Mapping[str, float] | None
FORMS = ("alpha", "beta", "schedule", "modules")
# The key of a value for all policies that are not named.
_REST = ""
# A file of coefficients is short; a larger one is another file.
_LARGEST = 1 << 20


def read_schedule(
    policies: Sequence[str],
    alpha: Any = None,
    beta: Any = None,
    schedule: Any = None,
    modules: Any = None,
    root: Path | None = None,
) -> dict[str, Any]:
    """Return lines and modules of a `MergeSpec`.

    α and β are a number, a mapping from policies to numbers, a list in their order, or texts such as `0.5` and
    `helpful=1,brief=0.5`. A schedule is a list of coefficients, one for each block, or a mapping from policies to such
    lists; a text `1,1,1.2` or `helpful=1,1,1.2`, or the name of a file with any of these. Modules are a mapping from
    kinds to factors, or a text `attention=1,mlp=0.8`. A value without a policy is for all that are not named.

    Args:
        policies: their names, in order.
        alpha: α of LiNeS; None is 1.
        beta: β; None is 1.
        schedule: coefficients by block, in place of α and β.
        modules: factors by kind of module.
        root: the folder of relative file names; without it no file is read.

    Raises:
        UserError: no finite numbers, unknown policies or kinds, or forms that contradict each other.
    """
    found: dict[str, dict[str, Any]] = {}
    problems: list[Problem] = []
    for form, given in zip(FORMS, (alpha, beta, schedule, modules), strict=True):
        try:
            found[form] = _read_form(f"--{form}", given, policies, root)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    sources = {name: _sources(name, found) for name in policies or [_REST]}
    used = {source for taken in sources.values() for source in taken}
    if problems := [_idle(form, name) for form in FORMS[:3] for name in found[form] if (form, name) not in used]:
        raise UserError(problems)
    lines = []
    for taken in sources.values():
        values = {form: found[form][name] for form, name in taken if name in found[form]}
        lines.append(Line(values.get("alpha", 1.0), values.get("beta", 1.0), values.get("schedule", ())))
    return {"lines": tuple(lines), "modules": tuple(found["modules"].items())}


def named_schedules(own: str, given: Sequence[Any], outside: Outside) -> tuple[Schedule, dict[str, Schedule]]:
    """Return the schedule of the policy `own`, and by name those of all policies that α, β or a schedule name.

    `given` are the forms that `read_schedule` takes. Policies that only a file names are not known.
    """
    named: dict[str, None] = {}
    for form in given[:3]:
        texts = [form] if isinstance(form, str) else form if isinstance(form, list | tuple) else ()
        inline = [text for text in texts if isinstance(text, str) and not os.path.isfile(text)]
        parts = [part for text in inline for part in split_named(text, [own]) if "=" in part]
        named |= dict.fromkeys(
            form if isinstance(form, Mapping) else (part.rpartition("=")[0].strip() for part in parts)
        )
    names = list(dict.fromkeys([own, *map(str, named)]))
    read = read_schedule(names, **dict(zip(FORMS, given, strict=True)), root=Path())
    lines = zip(names, read["lines"], strict=True)
    each = {name: Schedule((line,), read["modules"], outside) for name, line in lines}
    return each[own], {name: each[name] for name in map(str, named)}


def recorded_schedule(content: Mapping[str, Any], policies: Sequence[str] | int) -> dict[str, Any]:
    """Return lines and modules from a record that `Schedule.as_dict` wrote; `policies` by name or their number.

    A KeyError if α or β is missing. No file is read: records may come from others.
    """
    names = list(map(str, range(policies))) if isinstance(policies, int) else policies
    return read_schedule(names, content["alpha"], content["beta"], content.get("schedule"), content.get("modules"))


def _sources(policy: str, found: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the form and name of each value that a policy's line is made from: its own before those for all."""
    alphas, betas, lists = (found[form] for form in FORMS[:3])
    listed = policy in lists or (_REST in lists and policy not in alphas and policy not in betas)
    return [(form, policy if policy in found[form] else _REST) for form in (("schedule",) if listed else FORMS[:2])]


def _idle(form: str, name: str) -> Problem:
    return Problem(
        "this value would decide nothing",
        f"--{form}",
        "for each policy either --schedule, or --alpha and --beta",
        f"--{form} for {name or 'all policies'}, beside other values for them",
        f"leave out --{form}{f' {name}=...' if name else ''}, or the others",
    )


def _read_form(option: str, given: Any, policies: Sequence[str], root: Path | None) -> dict[str, Any]:
    """Return the values by policy, for modules by kind."""
    known = KINDS if option == "--modules" else (_REST, *policies)
    found: dict[str, Any] = {}
    for name, value in _pairs(option, given, policies, root):
        if name not in known:
            what = f"no kind of module `{name}`" if known is KINDS else f"no policy `{name}`"
            expected, remedy = ", ".join(filter(None, known)), did_you_mean(name, known)
            raise fail(what, where=option, expected=expected, remedy=remedy)
        if name in found:
            raise fail("given twice", where=option, got=name or "two values for all policies")
        found[name] = _coefficients(value) if option == "--schedule" else _number(option, value)
    return found


def _pairs(option: str, given: Any, policies: Sequence[str], root: Path | None) -> list[tuple[str, Any]]:
    """Return what is given as pairs of a name and a value; the name is "" for all policies."""
    if given is None:
        return []
    if isinstance(given, Mapping):
        return [(str(name), value) for name, value in given.items() if value is not None]
    if isinstance(given, str):
        return _from_text(option, given, policies, root)
    if not isinstance(given, Iterable):
        return [(_REST, given)]
    given = list(given)
    if given and all(isinstance(part, str) for part in given):
        return [pair for text in given for pair in _from_text(option, text, policies, root)]
    if option == "--schedule" and all(isinstance(part, str | Real) for part in given):
        return [(_REST, given)]
    if len(given) != len(policies):
        expected = f"{len(policies)}, for {', '.join(policies)}"
        raise fail("not a value for each policy", where=option, expected=expected, got=f"{len(given)} values")
    return [pair for pair in zip(policies, given, strict=True) if pair[1] is not None]


def _from_text(option: str, text: str, policies: Sequence[str], root: Path | None) -> list[tuple[str, Any]]:
    if option != "--schedule":
        pairs = [part.rpartition("=") for part in split_named(text, policies)]
        return [(name.strip(), value) for name, _, value in pairs]
    if named := [name for name in policies if text.startswith(f"{name}=")]:
        # Names may have `=` in them, as folders of merged models have.
        name = max(named, key=len)
        return [(name, value) for _, value in _from_text(option, text[len(name) + 1 :], (), root)]
    if re.fullmatch(r"[-+\d.eE,\s]*", text):
        return [(_REST, text)]
    path = None if root is None else root / Path(text).expanduser()
    # Path.is_file would raise on coefficients that are too long for the name of a file.
    if path is None or not os.path.isfile(path) or path.stat().st_size > _LARGEST:
        expected = "coefficients such as 1,1,1.2 or a file with them, for one of several policies POLICY=1,1,1.2"
        raise fail("neither coefficients nor a file", where=option, expected=expected, got=text)
    return _from_file(path, policies)


def _from_file(path: Path, policies: Sequence[str]) -> list[tuple[str, Any]]:
    """Return the lists in a file: numbers with commas, spaces or lines between them, or YAML (so JSON)."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise fail("not readable as numbers or YAML", where=str(path)) from error
    # Texts in it are numbers, not names of further files.
    single = not isinstance(content, Mapping | list)
    return [(_REST, str(content))] if single else _pairs("--schedule", content, policies, None)


def _coefficients(value: Any) -> tuple[float, ...]:
    """Return the coefficients of one list, or of a text with commas or spaces between them."""
    parts = re.split(r"\s*,\s*|\s+", value.strip(" ,\n")) if isinstance(value, str) else value
    if not isinstance(parts, Iterable) or isinstance(parts, Mapping) or not (parts := list(parts)):
        expected = "one number for each block"
        raise fail("no list of coefficients", where="--schedule", expected=expected, got=str(value)[:100])
    return tuple(_number("--schedule", part) for part in parts)


def _number(option: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        forms = {"--alpha": "a number, or auto", "--modules": "KIND=NUMBER, as in attention=1,mlp=0.8"}
        raise fail("not a finite number", where=option, expected=forms.get(option, "a number"), got=str(value)[:100])
    return number
