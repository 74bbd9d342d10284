"""Greedy model soup: policies join one by one, best first, while the user's score does not fall."""

from __future__ import annotations

import math
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rewarded_lines.errors import UserError, fail
from rewarded_lines.folders import scratch_folder
from rewarded_lines.merger.merge_options import MergeOptions
from rewarded_lines.merger.plan import Plan
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.references import find_function


def choose_greedily(count: int, score: Callable[[tuple[int, ...]], float]) -> list[int]:
    """Return the members of the greedy soup by index, in the order in which they join.

    Candidates are ordered by their own score, best first; each joins if the soup with it scores at least as high.
    `score` takes the indices of a soup's members; higher is better.

    Source: Model soups, arXiv 2203.05482, recipe 1.
    """
    alone = [score((index,)) for index in range(count)]
    order = sorted(range(count), key=lambda index: -alone[index])
    members, best = order[:1], alone[order[0]]
    for candidate in order[1:]:
        value = score(tuple(sorted([*members, candidate])))
        if value >= best:
            members.append(candidate)
            best = value
    return members


def greedy_weights(plan: Plan, spec: MergeSpec, out: Path, how: MergeOptions) -> tuple[float, ...]:
    """Return 1/n for each of the n members of the greedy soup and 0 for the others.

    Every candidate is merged with the output's schedule into a scratch folder beside `out`, and scored there. With
    `how.alpha` "auto", each candidate gets its own α. The weights of `spec` are ignored.

    Raises:
        UserError: no score is given, it fails, or it returns no finite number.
    """
    if how.score is None:
        raise fail(
            "the greedy soup needs a score",
            where="--score",
            expected="a command that prints a number for a model's folder, or file.py:function",
            remedy="for example --score 'python score.py {model}'",
        )
    judge = _load_score(how.score)
    names = list(plan.policies)

    def score_soup(members: tuple[int, ...]) -> float:
        title = " + ".join(names[index] for index in members)
        how.progress.start(f"trying {title}")
        with scratch_folder(out) as folder:
            soup = replace(spec, weights=_uniform(members, len(names)))
            if how.alpha == "auto":
                soup = replace(soup, alpha=plan.auto_alpha([soup])[0])
            plan.prepare([soup])
            nonfinite = plan.write([soup], [folder], max_shard_size=5 * 10**9)
            if not how.allow_nonfinite:
                nonfinite.refuse()
            value = judge(folder)
        plan.notes.append(f"score of {title}: {value:.6g}")
        return value

    # Sorted by name, so that ties between scores do not depend on the user's order.
    order = sorted(range(len(names)), key=names.__getitem__)
    members = choose_greedily(len(names), lambda chosen: score_soup(tuple(sorted(order[index] for index in chosen))))
    return _uniform([order[index] for index in members], len(names))


def _uniform(members: Sequence[int], count: int) -> tuple[float, ...]:
    return tuple(1 / len(members) if index in members else 0.0 for index in range(count))


def _load_score(score: str | Callable[[Path], float]) -> Callable[[Path], float]:
    """Return the user's score as a function from a model's folder to a finite number.

    Args:
        score: a function, `module:function`, `file.py:function`, or a command. `{model}` in a command is replaced by
            the folder; without `{model}` the folder is appended. The last line of its output is the number.
    """
    if callable(score):
        return lambda folder: _finite(score(folder), getattr(score, "__name__", "score"))
    words = shlex.split(score)
    if len(words) == 1 and ":" in score:
        function = find_function(score, Path(), "--score")
        return lambda folder: _finite(_call(function, folder, score), score)
    command = words if any("{model}" in word for word in words) else [*words, "{model}"]
    return lambda folder: _finite(_run([word.replace("{model}", str(folder)) for word in command]), score)


def _call(function: Callable[..., Any], folder: Path, name: str) -> Any:
    try:
        return function(folder)
    except Exception as error:  # noqa: BLE001 - a user's function may raise anything; the message reports it
        raise _failed(name, f"{type(error).__name__}: {error}") from error


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise _failed(shlex.join(command), str(error)) from error
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise _failed(shlex.join(command), f"exit code {done.returncode}; {''.join(last)}")
    return (done.stdout.strip().splitlines() or [""])[-1]


def _finite(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise _failed(name, repr(value)[:80])
    return number


def _failed(name: str, got: str) -> UserError:
    return fail(
        "the score gave no number",
        where=f"--score {name}",
        expected="a finite number, for a command as the last line of its output",
        got=got,
        remedy="try it by hand on one of the policies",
    )
