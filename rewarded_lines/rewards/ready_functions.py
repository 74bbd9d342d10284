"""Functions that a project names without a file, such as `function: regex`.

Each scores one response. A required parameter is an option of the reward, or else the column of this name: None where
a row lacks it, and then the function abstains. Nothing here downloads anything.
"""

from __future__ import annotations

import inspect
import json
import re
import threading
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import blake3

from rewarded_lines.data.words import words_in
from rewarded_lines.errors import did_you_mean, fail
from rewarded_lines.extras import install
from rewarded_lines.references import local_path

_FENCE = re.compile(r"```(?:json)?[^\S\n]*\n(.*?)```", re.DOTALL)
_PROSE = re.compile(r"(?<!\\)\b[A-Za-z]{2,} +[A-Za-z]{2,}\b")
_MATH_MARKS = ("$", r"\boxed", r"\(", r"\[", r"\begin")
_MATH_SECONDS = 5
_FORMULAS = ("automated_readability_index", "coleman_liau_index", "lix", "rix")


def math_answer(response: str, answer: Any) -> float | None:
    """Return 1 if the response's final answer equals `answer`, else 0, by math-verify.

    `answer` is a number, LaTeX, a text with \\boxed{…}, or one of GSM8K with "####". None if it cannot be read.
    Reading and comparing may each take 5 seconds; then the answer counts as wrong.
    """
    from math_verify import parse, verify

    if answer is None:
        return None
    # math-verify measures time with a signal, which only the main thread may set.
    seconds: Any = _MATH_SECONDS if threading.current_thread() is threading.main_thread() else None
    gold = parse(_as_math(str(answer)), parsing_timeout=seconds)
    if not gold:
        return None
    return float(verify(gold, parse(response, parsing_timeout=seconds), timeout_seconds=seconds))


def _as_math(answer: str) -> str:
    """Return an answer as math-verify reads it whole: of `(3, 4)` without marks of mathematics it takes the 4."""
    last = answer.rpartition("####")[2].strip()
    return last if _PROSE.search(last) or any(mark in last for mark in _MATH_MARKS) else f"${last}$"


def json_schema(response: str, schema: Any, fenced: bool = False) -> float | None:
    """Return 1 if the response is JSON that a JSON schema allows, else 0, by jsonschema.

    `schema` is a JSON file, a mapping, or a column with either text or mapping. With `fenced`, the last block between
    ``` counts, if there is one. A reference to another file or address is an error.
    """
    from referencing.exceptions import Unresolvable

    if schema is None:
        return None
    validator = _validator(schema if isinstance(schema, str) else json.dumps(schema, sort_keys=True))
    blocks = _FENCE.findall(response) if fenced else []
    try:
        value = json.loads(blocks[-1] if blocks else response, parse_constant=_no_number)
        return float(validator.is_valid(value))
    except Unresolvable as error:
        raise ValueError(f"the schema refers to what it does not hold: {error}") from error
    except (ValueError, RecursionError):
        return 0.0


def regex(response: str, pattern: str, match: str = "search") -> float | None:
    """Return how a response matches a regular expression of Python's `re`.

    `match: search` and `match: full` give 1 or 0, `match: count` the number of matches.
    """
    _check_one("match", match, ("search", "full", "count"))
    if pattern is None:
        return None
    compiled = re.compile(pattern)
    if match == "count":
        return float(sum(1 for _ in compiled.finditer(response)))
    return float(bool((compiled.search if match == "search" else compiled.fullmatch)(response)))


def length(
    response: str, unit: str = "words", target: float | None = None, maximum: float | None = None, margin: float = 0
) -> float:
    """Return the length n of a response in words, characters or lines.

    With `target`, the score is −|n − target|. With `maximum` it is 0 up to maximum − margin, then falls to −1 at the
    maximum, and stays there (DAPO, arXiv 2503.14476, equation 13).
    """
    _check_one("unit", unit, ("words", "characters", "lines"))
    if target is not None and maximum is not None:
        raise ValueError("give either `target` or `maximum`")
    parts = {"words": words_in(response), "characters": response, "lines": response.splitlines()}
    n = float(len(parts[unit]))
    if maximum is not None:
        return 0.0 if n <= maximum - margin else -1.0 if n > maximum else (maximum - margin - n) / margin
    return n if target is None else -abs(n - target)


def language(response: str, language: str) -> float | None:
    """Return the probability that a response is in a language, by py3langid; 0 if it has no letter.

    `language` is a code of two or three letters, such as "en" or "de".
    """
    identifier = _identifier()
    if language is None:
        return None
    _check_one("language", language, tuple(sorted(identifier.labels)))
    if not any(map(str.isalpha, response)):
        return 0.0
    return float(dict(identifier.rank(response))[language])


def readability(response: str, formula: str = _FORMULAS[0], target: float | None = None) -> float:
    """Return how hard a text is to read, by textstat; with `target`, −|value − target|.

    The formulas count letters, words and sentences only, so they need no word list.
    """
    import textstat

    _check_one("formula", formula, _FORMULAS)
    value = float(getattr(textstat, formula)(response))
    return value if target is None else -abs(value - target)


def repetition(response: str, size: int = 3) -> float:
    """Return 0 if no run of `size` words comes twice, and less down to −1: minus the share of repeated runs."""
    if size < 1:
        raise ValueError("`size` is at least 1")
    words = words_in(response)
    runs = [tuple(words[at : at + size]) for at in range(len(words) - size + 1)]
    return len(set(runs)) / len(runs) - 1.0 if runs else 0.0


def _check_one(option: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        remedy = did_you_mean(str(value), known)
        raise ValueError(f"`{option}: {value}` is not one of {', '.join(known)}{'; ' if remedy else ''}{remedy}")


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# Each function, with the packages that it calls.
READY: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "math_answer": (math_answer, ("math-verify",)),
    "json_schema": (json_schema, ("jsonschema",)),
    "regex": (regex, ()),
    "length": (length, ()),
    "language": (language, ("py3langid",)),
    "readability": (readability, ("textstat",)),
    "repetition": (repetition, ()),
}


def ready_function(name: str, options: Mapping[str, Any], root: Path, where: str) -> tuple[Callable[..., Any], str]:
    """Return a ready function `(responses, …columns)`, and a hash of all that decides its scores but the options.

    It is tried once on an empty response, so that a fault of the options is told before anything is generated.
    """
    if name not in READY:
        raise fail(
            f"no ready function `{name}`",
            where=where,
            expected=f"one of {', '.join(READY)}; or your own, as module:name or file.py:name",
            remedy=did_you_mean(name, READY),
        )
    one, packages = READY[name]
    parameters = list(inspect.signature(one).parameters.values())[1:]
    known = [each.name for each in parameters]
    if unknown := [option for option in options if option not in known]:
        got, remedy = f"`{unknown[0]}`", did_you_mean(unknown[0], known)
        raise fail(f"no such option of `{name}`", where=where, expected=", ".join(known), got=got, remedy=remedy)
    given = {key: _read_file(value, root, where) if key == "schema" else value for key, value in options.items()}
    needed = [each.name for each in parameters if each.default is each.empty and each.name not in given]
    try:
        one("", **dict.fromkeys(needed), **given)
        versions = [version(package) for package in packages]
    except ImportError as error:
        what = f"`{name}` needs the package {' and '.join(packages)}"
        raise fail(what, where=where, got=str(error), remedy=install("rewards")) from error
    except Exception as error:  # noqa: BLE001 - each library raises its own
        got = f"{type(error).__name__}: {error}"
        raise fail(
            f"`{name}` cannot use these options", where=where, got=got, remedy=f"correct `options:` {dict(options)}"
        ) from error
    files = [given["schema"]] if "schema" in given else []
    content = json.dumps([inspect.getsource(one), versions, files], sort_keys=True)
    return _of_all(partial(one, **given), needed), blake3.blake3(content.encode()).hexdigest()


def _of_all(one: Callable[..., Any], needed: list[str]) -> Callable[..., Any]:
    """Return a function of all responses of a call, with a parameter for each column that it needs."""

    def scores(responses: Any, **columns: Any) -> list[float | None]:
        rows = zip(responses, *(columns[name] for name in needed), strict=True)
        return [one(response, **dict(zip(needed, row, strict=True))) for response, *row in rows]

    names = ["responses", *needed]
    made = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    scores.__signature__ = inspect.Signature(made)  # type: ignore[attr-defined]
    return scores


def _read_file(schema: Any, root: Path, where: str) -> Any:
    """Return the content of a JSON file; a mapping stays as it is."""
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(local_path(schema, root).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise fail(
            "not a JSON schema", where=where, expected="a JSON file, or a mapping", got=f"{schema}: {error}"
        ) from error


@cache
def _validator(schema: str) -> Any:
    """Return the validator of a schema in JSON, which loads nothing from elsewhere."""
    from jsonschema.validators import validator_for
    from referencing.jsonschema import EMPTY_REGISTRY

    content = json.loads(schema)
    kind = validator_for(content)
    kind.check_schema(content)
    return kind(content, registry=EMPTY_REGISTRY)


@cache
def _identifier() -> Any:
    """Return py3langid's model, which is in its package."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
