"""Prompts, as texts or as turns of a chat, and the way from them to tokens and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewarded_lines.config import DataSpec
from rewarded_lines.data.rows import Row, read_rows
from rewarded_lines.errors import fail
from rewarded_lines.projects import Project

Messages = list[dict[str, str]]
# A text that the model goes on from, or the turns of a chat that it answers.
Prompt = str | Messages


def load_prompts(project: Project) -> list[Prompt]:
    """Return the prompts that the project's `prompts:` section names, the first `limit` of them.

    Raises:
        UserError: the section or its data is missing, or a row has no `prompt`.
    """
    project.require("prompts")
    spec = project.config.prompts
    assert spec is not None
    return read_prompts(spec, project.root)


def read_prompts(spec: DataSpec, root: Path) -> list[Prompt]:
    """Return the prompts that a declaration of data names; relative paths in it start at `root`.

    Raises:
        UserError: the data are missing, or a row has no `prompt`.
    """
    return [row["prompt"] for row in with_turns(read_rows(spec, [("prompt",)], root), spec)]


def with_turns(rows: list[Row], spec: DataSpec) -> list[Row]:
    """Return the rows with their texts as turns of a chat where the data's declaration asks for it.

    `prompt` becomes the user's turn, after the system's if there is one; `completion`, `chosen` and `rejected` the
    assistant's.
    """
    if not spec.chat:
        return rows
    system: Messages = [{"role": "system", "content": spec.system}] if spec.system is not None else []
    return [
        {role: _turns(role, value, system) if role != "text" else value for role, value in row.items()} for row in rows
    ]


def _turns(role: str, value: Prompt, system: Messages) -> Messages:
    if isinstance(value, str):
        speaker = "user" if role == "prompt" else "assistant"
        value = [{"role": speaker, "content": value}]
    opens = role in ("prompt", "messages") and value[0]["role"] != "system"
    return [*system, *value] if opens else value


def prompt_text(prompt: Prompt) -> str:
    """Return what a reward reads of a prompt: a text as it is; of a chat what was said, without the system's turn."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(turn["content"] for turn in prompt if turn["role"] != "system")


def encode(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return the token ids of each prompt: a text with the special tokens that the tokenizer itself adds, a chat in the
    tokenizer's chat template, up to where the answer starts.

    Raises:
        UserError: there are chats, and the tokenizer has no chat template.
    """
    if not prompts:
        return []
    if all(isinstance(prompt, str) for prompt in prompts):
        ids: list[list[int]] = tokenizer(list(prompts))["input_ids"]
        return ids
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise fail(
            "the tokenizer has no chat template",
            where=str(tokenizer.name_or_path),
            expected="chat_template.jinja beside it, since the prompts are chats",
            remedy="set `chat: false`, or give the SFT model's tokenizer a template",
        )
    chats = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
    try:
        made = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    except TemplateError as error:
        raise fail(
            "the tokenizer's chat template fails on the chats",
            where=str(tokenizer.name_or_path),
            got=f"{type(error).__name__}: {error}",
            remedy="mend the template, or leave out what it does not know (a system turn?)",
        ) from error
    return [list(row) for row in made["input_ids"]]


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
