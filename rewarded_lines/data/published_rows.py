"""Ready row functions for published data, as in `rows: rewarded_lines.data.published_rows:pku_safer`.

Each takes a row as it was published. It returns the row with a prompt and its answers, or None for a tie.
The user names the function: one data set may hold several preferences.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

Row = dict[str, Any]
_FORMS = (
    (("context", "response1", "response2", "overall_preference"), ("helpsteer3",), "context"),
    (("response_0", "response_1", "better_response_id", "safer_response_id"), ("pku_better", "pku_safer"), "prompt"),
    (("response_0", "response_1", "better_response_id"), ("pku_better",), "prompt"),
    (("prompt", "response_1", "response_2", "preference_strength"), ("helpsteer2",), "prompt"),
    (("prompt", "answers", "turns"), ("nectar",), "prompt"),
    (("conversation_a", "conversation_b", "winner"), ("arena",), ""),
    (("prompt", "response_a", "response_b", "winner_model_a"), ("arena",), ""),
    (("instruction", "completions"), ("ultrafeedback",), "instruction"),
    (("instruction", "output"), ("alpaca",), ""),
    (("instruction", "chosen", "rejected"), ("alpaca",), ""),
)


def conversion(row: Mapping[str, Any]) -> str:
    """Return what reads a row of a published form: a line of a project file, or "" if the form is not known."""
    for columns, functions, prompt in _FORMS:
        if all(name in row for name in columns):
            lines = [f"`rows: {__name__}:{name}`" for name in functions]
            prompts = f"; for prompts alone `columns: {{prompt: {prompt}}}`" if prompt not in ("", "prompt") else ""
            return " or ".join(lines) + f" (in a recipe `row_function`){prompts}"
    return ""


def helpsteer2(row: Row) -> Row | None:
    """Return a pair of nvidia/HelpSteer2's preferences: `preference_strength` is from -3 (response 1) to 3."""
    strength = row["preference_strength"]
    return _pair(row, row["prompt"], [row["response_1"], row["response_2"]], int(strength > 0)) if strength else None


def helpsteer3(row: Row) -> Row | None:
    """Return a pair of nvidia/HelpSteer3, whose `overall_preference` is from -3 (response 1) to 3 (response 2)."""
    preference = row["overall_preference"]
    answers = [row["response1"], row["response2"]]
    return _pair(row, row["context"], answers, int(preference > 0)) if preference else None


def pku_better(row: Row) -> Row | None:
    """Return a pair of PKU-Alignment/PKU-SafeRLHF by helpfulness."""
    return _pair(row, row["prompt"], [row["response_0"], row["response_1"]], row["better_response_id"])


def pku_safer(row: Row) -> Row | None:
    """Return a pair of PKU-Alignment/PKU-SafeRLHF by harmlessness."""
    return _pair(row, row["prompt"], [row["response_0"], row["response_1"]], row["safer_response_id"])


def nectar(row: Row) -> Row | None:
    """Return the best and the worst ranked answer of a row of berkeley-nest/Nectar."""
    return _extremes(row, row["prompt"], [(one["answer"], -one["rank"]) for one in row["answers"]])


def arena(row: Row) -> Row | None:
    """Return a pair of chats of LMArena's and LMSYS's votes; 55k of them hold the turns as lists in JSON."""
    if "conversation_a" in row:
        sides, votes = [row["conversation_a"], row["conversation_b"]], [row["winner"] == f"model_{one}" for one in "ab"]
    else:
        asked, *answers = (json.loads(row[name]) for name in ("prompt", "response_a", "response_b"))
        if None in (*answers[0], *answers[1]):
            return None
        sides, votes = [_turns(asked, one) for one in answers], [int(row[f"winner_model_{one}"]) for one in "ab"]
    if not any(votes):
        return None
    # Both chats begin with the prompt.
    kept = {name: value for name, value in row.items() if name != "prompt"}
    return {**kept, "chosen": sides[bool(votes[1])], "rejected": sides[bool(votes[0])]}


def ultrafeedback(row: Row) -> Row | None:
    """Return the best and the worst answer of openbmb/UltraFeedback, by the mean of its four ratings."""
    scored = [(one["response"], one.get("fine-grained_score")) for one in row["completions"]]
    rated = [(text, score) for text, score in scored if score is not None and isfinite(score)]
    return _extremes(row, row["instruction"], rated)


def alpaca(row: Row) -> Row:
    """Return prompt and completion, or the pair, of a row in the form of Alpaca and LLaMA-Factory.

    The prompt is `instruction`, a line end and `input`, after the turns of `history` if there are any.
    """
    asked = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    turns = _turns(*zip(*row["history"], strict=True)) if row.get("history") else []
    made = {**row, "prompt": [*turns, {"role": "user", "content": asked}] if turns else asked}
    answer = row.get("output")
    if isinstance(answer, list):
        made["chosen"], made["rejected"] = answer
        return made
    return made if answer is None else {**made, "completion": answer}


def _turns(asked: Sequence[str], answers: Sequence[str]) -> list[Row]:
    pairs = zip(asked, answers, strict=True)
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _pair(row: Row, prompt: Any, answers: Sequence[Any], better: int) -> Row:
    if better not in (0, 1):
        raise ValueError(f"the better answer is 0 or 1, not {better}")
    return {**row, "prompt": prompt, "chosen": answers[better], "rejected": answers[1 - better]}


def _extremes(row: Row, prompt: Any, scored: Sequence[tuple[Any, float]]) -> Row | None:
    ordered = sorted(scored, key=lambda one: one[1])
    if not ordered or ordered[0][1] == ordered[-1][1]:
        return None
    return _pair(row, prompt, [ordered[0][0], ordered[-1][0]], 1)
