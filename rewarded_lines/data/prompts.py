"""Prompts, as texts or as turns of a chat, and the way from them to tokens and back.

Trainers, engines and measurements take tokens from here, so all of them see the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from rewarded_lines.data.messages import Messages, Prompt, render
from rewarded_lines.errors import fail

__all__ = ["Messages", "Prompt", "encode", "encode_answers", "prompt_key", "prompt_text", "split_text"]


def prompt_text(prompt: Prompt) -> str:
    """Return what a reward that reads text gets of a prompt: a text as it is; of a chat its turns but the system's."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(turn["content"] or "" for turn in prompt if turn["role"] != "system")


def prompt_key(prompt: Prompt) -> str:
    """Return a text by which a prompt is known: itself, or the JSON of its turns."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)


def encode(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return the token ids of each prompt: a text with the special tokens that the tokenizer itself adds, a chat in the
    tokenizer's chat template, up to where the answer starts.

    A text that begins with the tokenizer's BOS already does not get a second one, and no end token is put behind a
    prompt, which the model goes on from.

    Raises:
        UserError: there are chats, and the tokenizer has no chat template.
    """
    if not prompts:
        return []
    if all(isinstance(prompt, str) for prompt in prompts):
        made = tokenizer(list(prompts))["input_ids"]
        return [_open(tokenizer, str(prompt), ids) for prompt, ids in zip(prompts, made, strict=True)]
    chats = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
    made = render(tokenizer, chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    return [list(row) for row in made["input_ids"]]


def encode_answers(
    tokenizer: Any, prompts: Sequence[Prompt], answers: Sequence[Prompt], ends: Collection[int]
) -> tuple[list[list[int]], list[list[int]]]:
    """Return prompts as token ids, and those that follow each in training: an answer with its end, nothing behind it.

    A text ends with the tokenizer's end token. A chat ends with the last of `ends` in what the chat template makes of
    the answer.

    Args:
        tokenizer: of the model.
        prompts: see `encode`.
        answers: to each a text where the prompt is one, else turns.
        ends: the ids that end a response.

    Raises:
        UserError: the chat template renders a prompt otherwise when an answer follows.
    """
    if not prompts:
        return [], []
    heads = encode(tokenizer, prompts)
    if isinstance(prompts[0], str):
        end = tokenizer.eos_token or ""
        known = tuple(text for text in {end, *(tokenizer.decode([one]) for one in ends)} if text.strip())
        texts = [str(answer) if known and str(answer).endswith(known) else f"{answer}{end}" for answer in answers]
        joined = [f"{prompt}{text}" for prompt, text in zip(prompts, texts, strict=True)]
        wholes = [one_bos(tokenizer, ids) for ids in tokenizer(joined)["input_ids"]]
        # Where the tokenizer would join the border into one token, the model goes on from the prompt's own tokens.
        return heads, [
            whole[len(head) :]
            if whole[: len(head)] == head
            else list(tokenizer(text, add_special_tokens=False)["input_ids"])
            for head, whole, text in zip(heads, wholes, texts, strict=True)
        ]
    chats = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    made = render(tokenizer, chats, tokenize=True, return_dict=True)["input_ids"]
    return heads, [_tail(tokenizer, head, list(whole), ends) for head, whole in zip(heads, made, strict=True)]


def _tail(tokenizer: Any, head: list[int], whole: list[int], ends: Collection[int]) -> list[int]:
    """Return what a conversation has after its prompt, up to the last end token."""
    if whole[: len(head)] != head:
        raise fail(
            "the chat template renders a prompt otherwise when an answer follows",
            where=str(tokenizer.name_or_path),
            expected=f"a conversation that begins with {tokenizer.decode(head)[-120:]!r}",
            got=repr(tokenizer.decode(whole)[:240]),
            remedy="set what the template needs, for instance `generation: {chat_template_kwargs: {enable_thinking: "
            "false}}` in the project, or name a template that does not depend on what follows",
        )
    tail = whole[len(head) :]
    last = max((place + 1 for place, token in enumerate(tail) if token in ends), default=len(tail))
    return tail[:last]


def _open(tokenizer: Any, prompt: str, ids: Sequence[int]) -> list[int]:
    """Return a prompt's tokens without the end token that some tokenizers put behind every text."""
    row, end = one_bos(tokenizer, ids), tokenizer.eos_token
    if end is not None and row[-1:] == [tokenizer.eos_token_id] and not prompt.rstrip().endswith(end):
        del row[-1]
    return row


def one_bos(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Return token ids without a second BOS at their beginning."""
    bos, row = tokenizer.bos_token_id, list(ids)
    while bos is not None and row[:2] == [bos, bos]:
        del row[0]
    return row


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
