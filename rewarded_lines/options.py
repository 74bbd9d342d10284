"""Options declared once, as fields of a dataclass: for Python's callers and for the command line."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, Field, field, fields, replace
from functools import wraps
from typing import Any, TypeVar, get_type_hints

from rewarded_lines.errors import fail

Result = TypeVar("Result")
Annotate = Callable[[Field[Any], Any], Any]


def option(default: Any, about: str, **more: Any) -> Any:
    """Return a field with the help text of its command-line option, and more that `as_option` takes."""
    return field(default=default, metadata={"help": about, **more})


def takes_fields(
    kind: type[Any],
    whole: str,
    without: Collection[str] = (),
    annotate: Annotate = lambda one, annotation: annotation,
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Let callers of a function pass the fields of a dataclass one by one, or the whole object, or both.

    Single fields replace those of the object. A parameter of the function with the name of a field stays its own.

    Args:
        kind: the dataclass; each field needs a default.
        whole: the function's parameter that receives the object.
        without: fields that callers cannot pass.
        annotate: returns the annotation in the signature, for a field and its type.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        signature, types = inspect.signature(function, eval_str=True), get_type_hints(kind)
        taken = [one for one in fields(kind) if one.name not in {*without, *signature.parameters}]

        @wraps(function)
        def call(*args: Any, **given: Any) -> Result:
            each = {one.name: given.pop(one.name) for one in taken if one.name in given}
            return function(*args, **{whole: replace(given.pop(whole, None) or kind(), **each)}, **given)

        parameters: list[inspect.Parameter] = []
        for one in signature.parameters.values():
            each = [
                one.replace(name=field.name, default=_default(field), annotation=annotate(field, types[field.name]))
                for field in taken
            ]
            parameters += each if one.name == whole else [one]
        call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return call

    return decorate


def parse_assignments(given: Mapping[str, Any] | Iterable[str] | None) -> dict[str, Any]:
    """Return the texts of a repeated option, each KEY=VALUE with a value in YAML, as a mapping; a mapping stays.

    Raises:
        ValueError: a text has no "=", a value is not YAML, or a key is given twice.
    """
    if isinstance(given, Mapping):
        return dict(given)
    from yaml import YAMLError

    from rewarded_lines.yaml_files import yaml_value

    found: dict[str, Any] = {}
    for text in given or ():
        key, sign, value = text.partition("=")
        # vLLM's own command line spells its arguments with dashes.
        name = key.strip().lstrip("-").replace("-", "_")
        if not sign or not name:
            raise ValueError(f"{text!r} is not KEY=VALUE")
        if name in found:
            raise ValueError(f"`{name}` is given twice")
        try:
            found[name] = yaml_value(value)
        except YAMLError as error:
            raise ValueError(f"{text!r} is not readable as YAML") from error
    return found


def split_named(text: str, names: Iterable[str]) -> list[str]:
    """Return the parts between commas, such as `a=1` of `a=1,b=2`; the names may have commas, too."""
    known = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.findall(rf"(?:^|,)\s*((?:{known})=[^,]*|[^,]*)", text)


def parse_numbers(flag: str, given: Mapping[str, float] | Iterable[str] | None) -> dict[str, float]:
    """Return the texts of a repeated option, each NAME=NUMBER, as a mapping; a mapping stays.

    Raises:
        UserError: a text is something else, or a name is given twice; `flag` is the option.
    """
    if isinstance(given, Mapping):
        return dict(given)
    found: dict[str, float] = {}
    for text in given or ():
        # A name may have this sign, too.
        name, equals, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            equals = ""
        if not equals or not name or name in found or not abs(number) < float("inf"):
            raise fail("not NAME=NUMBER", where=flag, expected="each reward once, as in brevity=-12", got=text)
        found[name] = number
    return found


def _default(one: Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()
