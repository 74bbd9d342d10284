"""Tokens of prompts and answers, and the way back: the same for trainers, engines and measurements."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from rewarded_lines.data.chat_templates import render
from rewarded_lines.data.messages import Messages, Prompt, as_turns
from rewarded_lines.errors import fail

__all__ = ["Messages", "Prompt", "encode", "encode_answers", "prompt_key", "prompt_text", "split_text"]


def prompt_text(prompt: Prompt) -> str:
    """Return a prompt as one text: of a chat, all turns but the system's, joined by blank lines."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(turn["content"] or "" for turn in prompt if turn["role"] != "system")


def prompt_key(prompt: Prompt) -> str:
    """Return a text that identifies a prompt: the prompt itself, or the JSON of its turns."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)


def encode(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return the token ids of each prompt, up to where the answer starts.

    A text gets the tokenizer's special tokens, but no second BOS and no end token. A chat is rendered by the
    chat template; among chats, a text becomes a user's turn.
    """
    if not prompts:
        return []
    if all(isinstance(prompt, str) for prompt in prompts):
        made = tokenizer(list(prompts))["input_ids"]
        return [_open(tokenizer, str(prompt), ids) for prompt, ids in zip(prompts, made, strict=True)]
    chats = [as_turns(prompt) for prompt in prompts]
    made = render(tokenizer, chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    return [list(row) for row in made["input_ids"]]


def encode_answers(
    tokenizer: Any, prompts: Sequence[Prompt], answers: Sequence[Prompt], ends: Collection[int]
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the token ids of prompts, and those of their answers in training, each with its end token.

    A text gets the tokenizer's end token. A rendered chat is cut after the last of `ends`, the ids that end a
    response. The answers are texts if the prompts are texts, else turns.
    """
    if not prompts:
        return [], []
    heads = encode(tokenizer, prompts)
    if isinstance(prompts[0], str):
        end = tokenizer.eos_token or ""
        known = tuple(text for text in {end, *(tokenizer.decode([one]) for one in ends)} if text.strip())
        texts = [f"{one}" if known and str(one).endswith(known) else f"{one}{end}" for one in answers]
        joined = [f"{prompt}{text}" for prompt, text in zip(prompts, texts, strict=True)]
        wholes = [one_bos(tokenizer, ids) for ids in tokenizer(joined)["input_ids"]]
        # If one token would span the border, the answer is encoded by itself.
        return heads, [
            whole[len(head) :]
            if whole[: len(head)] == head
            else list(tokenizer(text, add_special_tokens=False)["input_ids"])
            for head, whole, text in zip(heads, wholes, texts, strict=True)
        ]
    chats = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    made = render(tokenizer, chats, tokenize=True, return_dict=True)["input_ids"]
    pairs = zip(heads, made, strict=True)
    return heads, [_tail(tokenizer, head, list(whole), ends) for head, whole in pairs]


def _tail(tokenizer: Any, head: list[int], whole: list[int], ends: Collection[int]) -> list[int]:
    """Return the ids of a conversation after its prompt, up to the last end token."""
    if whole[: len(head)] != head:
        raise fail(
            "the chat template renders a prompt differently when an answer follows",
            where=str(tokenizer.name_or_path),
            expected=f"a conversation that begins with {tokenizer.decode(head)[-120:]!r}",
            got=repr(tokenizer.decode(whole)[:240]),
            remedy="set what the template needs, for instance `generation: {chat_template_kwargs: "
            "{enable_thinking: false}}` in the project, or name a template that ignores what follows",
        )
    tail = whole[len(head) :]
    last = max((place + 1 for place, token in enumerate(tail) if token in ends), default=len(tail))
    return tail[:last]


def _open(tokenizer: Any, prompt: str, ids: Sequence[int]) -> list[int]:
    """Return a prompt's ids without the end token that some tokenizers add to every text."""
    row, end = one_bos(tokenizer, ids), tokenizer.eos_token
    if end is not None and row[-1:] == [tokenizer.eos_token_id] and not prompt.rstrip().endswith(end):
        del row[-1]
    return row


def one_bos(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Return token ids with at most one BOS at the start."""
    bos, row = tokenizer.bos_token_id, list(ids)
    while bos is not None and row[:2] == [bos, bos]:
        del row[0]
    return row


def split_text(ids: Sequence[int], prompt_tokens: int, tokenizer: Any) -> tuple[str, str]:
    """Return the texts of prompt and response without special tokens.

    Decoded alone, a response would lose its first space under a SentencePiece tokenizer. So the whole text is
    decoded and the prompt removed, unless a character spans the border.
    """
    prompt, whole = _decode(ids[:prompt_tokens], tokenizer), _decode(ids, tokenizer)
    if whole.startswith(prompt):
        return prompt, whole[len(prompt) :]
    return prompt, _decode(ids[prompt_tokens:], tokenizer)


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
