"""Functions that take the fields of a dataclass as parameters of their own, and get them as one object."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import MISSING, Field, fields, replace
from functools import wraps
from typing import Any, TypeVar, get_type_hints

Result = TypeVar("Result")
Annotate = Callable[[Field[Any], Any], Any]


def takes_fields(
    kind: type[Any],
    whole: str,
    without: Collection[str] = (),
    annotate: Annotate = lambda field, annotation: annotation,
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Let callers give the fields of a dataclass one by one, in the place of a parameter that gets them whole.

    Callers may give the parameter itself, too: what they give one by one replaces its fields. A parameter that has
    the name of a field is left to the function.

    Args:
        kind: the dataclass; each field needs a default.
        whole: the name of the parameter.
        without: fields that callers do not give.
        annotate: what the signature says of a field, given the field and its type.
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


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
