"""How a reward's function is found and called: its parameters decide what it gets.

A function may be ours, `(prompts, responses, **columns)`, or TRL's, `(completions, answer, **kwargs)`. It may be
`async`, an object with `__call__`, a class, a partial, or return such a function.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import sys
import threading
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.hashing import file_hash
from rewarded_lines.errors import did_you_mean, fail
from rewarded_lines.references import find_function, local_path
from rewarded_lines.rewards.ready_functions import ready_function

# The column of the tokens of a response, which `tokenizer:` makes.
TOKENS = "completion_ids"
_ANSWERS = ("completions", "responses")
_TEXTS = ("prompts", *_ANSWERS)
# First and second parameters that are not the prompts and the responses, as in OpenRLHF's (queries, prompts) and verl's
# (data_source, solution_str).
_NO_PROMPTS, _NO_ANSWERS = (
    ("response", "completion", "data_source", "data_sources", "solution_str", "solution_strs"),
    ("prompt", "prompts", "query", "queries", "question", "questions"),
)
# What TRL's trainers give beside texts and columns. The loggers are optional there too; nothing is kept.
_LOGGERS = ("log_extra", "log_metric")
_TRAINERS_OWN = (TOKENS, "trainer_state", *_LOGGERS)
_REMEDIES = {
    TOKENS: "name a tokenizer, which makes tokens of the text of each response: `tokenizer: FOLDER_OR_HUB_ID`",
    "trainer_state": "give the parameter a default: a score depends on its row alone, not on a training's progress",
}


@dataclass(frozen=True)
class UserFunction:
    """A function as its user wrote it, called as `(prompts, responses, **columns) -> scores`.

    Attributes:
        function: the user's.
        texts: which of `prompts`, `completions` and `responses` it takes by name; none: its first two parameters.
        columns: names of the columns that it needs.
        optional: names of the columns that it also takes; None for all.
        hidden: names of columns that it does not get, since these parameters have another value.
        loggers: names of the loggers that it needs.
        fingerprint: a hash of all that decides its scores but its options; "" if unknown.
    """

    function: Callable[..., Any]
    texts: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    optional: tuple[str, ...] | None = ()
    hidden: frozenset[str] = frozenset()
    loggers: tuple[str, ...] = ()
    fingerprint: str = ""

    @property
    def is_trls(self) -> bool:
        """True if TRL's trainers can call it: with `completions`, and `**kwargs` for all else that they give."""
        return "completions" in self.texts and self.optional is None

    @property
    def reads_prompts(self) -> bool:
        """False if it only takes responses."""
        return not self.texts or "prompts" in self.texts

    def __call__(self, prompts: Sequence[Any], responses: Sequence[Any], /, **columns: Any) -> Any:
        """Return what the function returns, awaited if it is `async`."""
        texts = {name: prompts if name == "prompts" else responses for name in self.texts}
        given = {name: values for name, values in columns.items() if name not in self.hidden}
        loggers = dict.fromkeys(self.loggers, lambda *_: None)
        result = self.function(*(() if texts else (prompts, responses)), **texts, **given, **loggers)
        if isinstance(result, AsyncIterable):
            result = _collect(result)
        return _wait(result) if inspect.isawaitable(result) else result


def load_function(reference: str, root: Path, where: str, options: Mapping[str, Any], tokens: bool) -> UserFunction:
    """Return the function `module:name` or `file.py:name`, or the ready function `name`, with `options`.

    A class is made with the options. A function that returns a function is called with them. Files are relative to
    `root`; with `tokens` the function gets the tokens of each response.

    Raises:
        UserError: there is no such function, it has no such option, or it needs what nobody can give it.
    """
    if ":" not in reference:
        ready, fingerprint = ready_function(reference, options, root, where)
        return replace(read_signature(ready, _parameters(ready), {}, where, tokens), fingerprint=fingerprint)
    function = find_function(reference, root, where)
    source = _source(function, reference, root)
    parameters = _parameters(function)
    _check_options(parameters, options, where)
    if _is_class(function) or _makes_function(parameters, options):
        function, options = _made(function, options, where), {}
        parameters = _parameters(function)
    elif options:
        function = functools.partial(function, **options)
    found = read_signature(function, parameters, options, where, tokens)
    if source is None:
        return found
    # A function that another file makes: what the named file gives it counts, too.
    files = dict.fromkeys(one.resolve() for one in (source, _named_file(reference, root)) if one and one.is_file())
    return replace(found, fingerprint=":".join(map(file_hash, files)))


def read_signature(
    function: Callable[..., Any],
    parameters: Sequence[inspect.Parameter] | None,
    options: Mapping[str, Any],
    where: str,
    tokens: bool,
) -> UserFunction:
    """Return how to call a function; `parameters` are None if it does not tell them. See `load_function`."""
    if parameters is None:
        return UserFunction(function, hidden=frozenset(_TRAINERS_OWN))
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
    named = {one.name: one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    texts = _texts(parameters, named, takes_all)
    first = [] if texts else [one.name for one in parameters[:2] if one.kind is not one.VAR_POSITIONAL]
    if not texts and len(first) < 2 and not any(one.kind is one.VAR_POSITIONAL for one in parameters):
        raise fail(
            "the function does not take prompts and responses",
            where=where,
            expected="(prompts, responses), or TRL's (completions, **kwargs)",
            got=f"({', '.join(map(str, parameters))})",
        )
    if first and (first[0] in _NO_PROMPTS or first[1:2] and first[1] in _NO_ANSWERS):
        raise fail(
            "the function's first two parameters have other names than prompts and responses",
            where=where,
            expected="(prompts, responses, …), in this order, each a list",
            got=f"({', '.join(map(str, parameters))})",
            remedy="rename them, or write a function (prompts, responses, …) that calls this one",
        )
    bound = {*first, *_TEXTS, *options}
    open_ = {name: one.default is one.empty for name, one in named.items() if name not in bound}
    for name, remedy in _REMEDIES.items():
        if open_.get(name) and not (tokens and name == TOKENS):
            raise fail(f"the function needs `{name}`, which only TRL's trainers have", where=where, remedy=remedy)
    columns = {name: needed for name, needed in open_.items() if name not in _TRAINERS_OWN}
    gets_tokens = tokens and (takes_all or TOKENS in named)
    return UserFunction(
        function,
        texts,
        tuple(name for name, needed in columns.items() if needed),
        None if takes_all else tuple(name for name, needed in columns.items() if not needed),
        frozenset({*bound, *_TRAINERS_OWN} - ({TOKENS} if gets_tokens else set())),
        tuple(name for name in _LOGGERS if open_.get(name)),
    )


def _texts(
    parameters: Sequence[inspect.Parameter], named: Mapping[str, inspect.Parameter], takes_all: bool
) -> tuple[str, ...]:
    """Return the texts that a function takes by name, or none if it takes them by position."""
    positions = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    spread = any(one.kind is one.VAR_POSITIONAL for one in parameters)
    if spread or any(one.kind is one.POSITIONAL_ONLY for one in positions):
        return ()
    by_name = any(name in named for name in (*_ANSWERS, TOKENS))
    if not by_name and not (takes_all and len(positions) < 2):
        return ()
    answers = [name for name in _ANSWERS if name in named] or (["completions"] if takes_all else [])
    return (*(["prompts"] if takes_all or "prompts" in named else []), *answers)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        # Some functions written in C do not tell.
        return None


def _check_options(parameters: Sequence[inspect.Parameter] | None, options: Mapping[str, Any], where: str) -> None:
    if parameters is None or any(one.kind is one.VAR_KEYWORD for one in parameters):
        return
    named = [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    known = [name for name in named if name not in (*_TEXTS, *_TRAINERS_OWN)]
    for name in options:
        if name not in known:
            what, remedy = f"the function has no option `{name}`", did_you_mean(name, known)
            raise fail(what, where=where, expected=", ".join(known) or "no options", remedy=remedy)


def _is_class(function: Callable[..., Any]) -> bool:
    """True for a class whose objects can be called."""
    return inspect.isclass(function) and any("__call__" in vars(one) for one in function.__mro__)


def _makes_function(parameters: Sequence[inspect.Parameter] | None, options: Mapping[str, Any]) -> bool:
    """True if a function with these options needs nothing else: it returns a function, as TRL's `get_…` do."""
    if not options or parameters is None:
        return False
    rest = [one for one in parameters if one.name not in options]
    return all(one.default is not one.empty and one.name not in (*_TEXTS, TOKENS) for one in rest)


def _made(function: Callable[..., Any], options: Mapping[str, Any], where: str) -> Callable[..., Any]:
    try:
        made = function(**options)
    except Exception as error:  # noqa: BLE001 - a user's code may raise anything
        what = f"making the function raised {type(error).__name__}: {error}"
        raise fail(what, where=where, remedy="correct the reward's `options:`") from error
    if not callable(made):
        name, got = getattr(function, "__name__", "it"), type(made).__name__
        raise fail(
            "`options:` leave no parameter for responses", where=where, expected=f"{name} to return a function", got=got
        )
    return made


def _source(function: Callable[..., Any], reference: str, root: Path) -> Path | None:
    """Return the file of a function; for an object, the file that `reference` names."""
    if inspect.isbuiltin(function):
        return None
    if inspect.isroutine(function) and "." not in reference.rpartition(":")[2]:
        found = inspect.getsourcefile(inspect.unwrap(function))
        return Path(found) if found else None
    return _named_file(reference, root)


def _named_file(reference: str, root: Path) -> Path | None:
    """Return the file that a reference names, if there is one."""
    source = reference.rpartition(":")[0]
    if source.endswith(".py"):
        return local_path(source, root)
    found = getattr(sys.modules.get(source), "__file__", None)
    return Path(found) if found else None


async def _collect(values: AsyncIterable[Any]) -> list[Any]:
    return [value async for value in values]


async def _as_coroutine(result: Awaitable[Any]) -> Any:
    return await result


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of all async rewards; a client that a function keeps belongs to one loop.

    It runs in a thread, so that a reward can also be called inside a running loop.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async rewards", daemon=True).start()
    return loop


# A forked process has no thread of its parent.
os.register_at_fork(after_in_child=_loop.cache_clear)


def _wait(result: Awaitable[Any]) -> Any:
    """Return the value of an awaitable; an interrupt cancels it."""
    future = asyncio.run_coroutine_threadsafe(_as_coroutine(result), _loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise
