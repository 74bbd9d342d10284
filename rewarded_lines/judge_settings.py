"""Checks of the settings of a judge: what its template reads, and how its verdict becomes a number."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

from rewarded_lines.config_values import CHAT, checked

# The value of `against:` that stands for the SFT model's response to the same prompt.
SFT_MODEL = "sft"
# `{name}` is a place for a text; `{{name}}` is the text `{name}` itself.
PLACE = re.compile(r"\{\{(\w+)\}\}|\{([^\W\d]\w*)\}")
# Half a win for each.
_TIE = "tie"
# The places of two answers: {a} and {b}, or {response} and {reference}.
_PAIRED = {"a", "b", "response", "reference"}
# The forms of a verdict.
_VERDICTS = ("token", "tokens", "pattern")


def judge_columns(template: Any, against: str | None) -> tuple[str, ...]:
    """Return the columns of a row that a judge's template names."""
    if template == CHAT:
        return ()
    own = {"prompt", "response"} | ({"a", "b", "reference"} if against else set())
    return tuple(name for name in places(str(template)) if name not in own)


def places(template: str) -> list[str]:
    """Return the names of the places in a template, each once."""
    return list(dict.fromkeys(found[2] for found in PLACE.finditer(template) if found[2]))


def _texts(value: Any) -> Any:
    """Return one text or several as a list of texts."""
    return [_text(one) for one in ([value] if isinstance(value, (str, bool, int)) else value or ())]


def _values(value: Any) -> Any:
    """Return texts with their values; of a list, the first counts 1 and the others 0."""
    if isinstance(value, (list, tuple)):
        value = {_text(one): float(not place) for place, one in enumerate(value)}
    if not isinstance(value, Mapping):
        return value
    return {_text(name): 0.5 if one == _TIE else one for name, one in value.items()}


def _text(value: Any) -> Any:
    """Return a text that YAML may have read as something else."""
    if isinstance(value, bool):
        raise ValueError('YAML reads yes, no, on and off as true and false; write them in quotes: "yes"')
    return str(value) if isinstance(value, int) else value


def _check_pattern(value: str | None) -> None:
    if value is None:
        return
    try:
        groups = re.compile(value).groups
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    if groups > 1:
        raise ValueError("name the verdict with one group ( ); write other groups as (?: )")


Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
Values = Annotated[dict[str, float], BeforeValidator(_values)]
Pattern = Annotated[str, checked(_check_pattern)]


def check_judge(spec: Any) -> None:
    """Refuse settings of a judge that do not make a question and a verdict."""
    given = [key for key in _VERDICTS if getattr(spec, key)]
    if len(given) != 1:
        raise ValueError(
            'a judge needs one of `token: "yes"` (its probability), `tokens: ["yes", "no"]` (the share of the first) '
            "and `pattern: 'Score: (\\d+)'` (a number that it writes)"
        )
    if spec.verdicts and given != ["pattern"]:
        raise ValueError("`verdicts:` are the values of what `pattern:` finds; give those of tokens in `tokens: {…}`")
    if len(spec.tokens) == 1:
        raise ValueError("`tokens:` are compared with each other, so name two or more; `token:` is for one")
    if spec.temperature and given != ["pattern"]:
        raise ValueError("`temperature:` is for a verdict that the judge writes, with `pattern:`")
    if spec.format is not None:
        raise ValueError("`format:` is for the classes of a classifier; a judge's verdict is `token:` or `pattern:`")
    _check_template(spec)
    if spec.against:
        _check_pair(spec, spec.tokens or spec.verdicts)


def _check_template(spec: Any) -> None:
    if "template" not in spec.model_fields_set or not isinstance(spec.template, str):
        raise ValueError(
            "a judge needs `template:`, the text that it is asked, with {prompt} and {response}; `template: chat` "
            "gives the conversation itself to the judge's chat template, as guards expect"
        )
    if spec.template != CHAT and not spec.against and "response" not in places(spec.template):
        raise ValueError("the template must contain {response}; {a} and {b} are for `against:`")
    if spec.template == CHAT and spec.system is not None:
        raise ValueError("`template: chat` has the conversation's own turns; leave out `system:`")
    if spec.plain and (spec.system is not None or spec.template == CHAT):
        raise ValueError("`plain: true` is for a text without turns; leave out `system:` and `template: chat`")


def _check_pair(spec: Any, values: Mapping[str, float]) -> None:
    if _PAIRED.intersection(places(spec.template)) not in ({"a", "b"}, {"response", "reference"}):
        raise ValueError("`against:` needs a template with {a} and {b}, which hold both answers, in both orders")
    if not values or not all(0 <= value <= 1 for value in values.values()):
        raise ValueError(
            "`against:` needs what each verdict means: 1 where the first answer wins, 0 where the second wins, `tie`; "
            "for instance `tokens: {A: 1, B: 0}`, or `verdicts: {A: 1, B: 0, C: tie}` with a pattern"
        )
