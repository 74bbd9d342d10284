"""Prompts of an evaluation: a JSONL file, read strictly, and the way from text to tokens and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rewarded_lines.config import Project
from rewarded_lines.errors import fail


def load_prompts(project: Project) -> list[str]:
    """Return the prompts that the project's `prompts:` section names, the first `limit` of them.

    Raises:
        UserError: the section or the file is missing, a line is not JSON or has no `prompt`, or there is none.
    """
    project.require("prompts")
    spec = project.config.prompts
    assert spec is not None
    path = project.root / spec.file
    if not path.is_file():
        raise fail("no such file", where=f"{project.path}: prompts.file", got=str(path))
    prompts: list[str] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if spec.limit is not None and len(prompts) == spec.limit:
                break
            if line.strip():
                prompts.append(_prompt(line, f"{path}, line {number}"))
    if not prompts:
        raise fail("no prompts in the file", where=str(path), expected='lines such as {"prompt": "..."}')
    return prompts


def encode(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each prompt, with the special tokens that the tokenizer itself adds."""
    ids: list[list[int]] = tokenizer(list(prompts))["input_ids"]
    return ids


def split_text(ids: Sequence[int], prompt_tokens: int, tokenizer: Any) -> tuple[str, str]:
    """Return the texts of prompt and response, special tokens left out by the tokenizer.

    The response is what the whole text has after the prompt: decoded by itself it would lose the space it starts with
    under a SentencePiece tokenizer. Where a character straddles the border, it is decoded by itself after all.
    """
    prompt = _decode(ids[:prompt_tokens], tokenizer)
    whole = _decode(ids, tokenizer)
    if whole.startswith(prompt):
        return prompt, whole[len(prompt) :]
    return prompt, _decode(ids[prompt_tokens:], tokenizer)


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _prompt(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise fail("not JSON", where=where, got=str(error)) from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise fail("no `prompt` text", where=where, expected='{"prompt": "..."}', got=found)
    return str(row["prompt"])
