"""What every engine does with tokens: tokenizer and chat template, the longest sequence, a response's text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.adapter_config import read_adapter_config
from rewarded_lines.checkpoints.adapters import is_adapter
from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.prompts import Prompt, encode, split_text
from rewarded_lines.errors import fail

Tokens = Sequence[int]


def load_tokenizer(model: str, spec: GenerationSpec) -> Any:
    """Return a model's tokenizer, with the chat template of `spec` if it has one.

    Raises:
        UserError: the template cannot be read.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if spec.chat_template is not None:
        tokenizer.chat_template = read_template(spec.chat_template)
    return tokenizer


def read_template(path: str) -> str:
    """Return the chat template in a file.

    Raises:
        UserError: there is no such file, or it is no text.
    """
    where, expected = f"generation.chat_template: {path}", "a Jinja template, in UTF-8"
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise fail("the chat template cannot be read", where=where, expected=expected, got=str(error)) from error
    except UnicodeDecodeError as error:
        raise fail("the chat template is no text", where=where, expected=expected, got=str(error)) from error


def load_config(model: str) -> Any:
    """Return a model's configuration; an adapter's is that of the model under it."""
    from transformers import AutoConfig

    folder = Path(model)
    base = read_adapter_config(folder).base if folder.is_dir() and is_adapter(folder) else model
    return AutoConfig.from_pretrained(base)


def longest_sequence(
    tokenizer: Any, config: Any, model: str, spec: GenerationSpec, prompts: Sequence[Prompt], longest: int = 0
) -> int:
    """Return how many tokens the longest sequence needed has.

    Args:
        tokenizer: of the model, with its template.
        config: of the model.
        model: its name, for messages.
        spec: the length of a response.
        prompts: each is to be answered.
        longest: tokens of the longest sequence whose probability will be asked for.

    Raises:
        UserError: a prompt without tokens, or one that does not fit the model with its response.
    """
    lengths = [len(ids) for ids in encode(tokenizer, prompts)]
    _refuse_empty(prompts, lengths)
    # One position more than generation needs: scoring a full-length response generates a token to get at the rest.
    answered = max(lengths, default=0) + spec.max_tokens + 1
    room = getattr(config, "max_position_embeddings", None)
    if room is not None and answered > room:
        raise fail(
            "a prompt and its response do not fit the model",
            where=model,
            expected=f"at most {room} tokens",
            got=f"{answered} (the longest prompt, generation.max_tokens = {spec.max_tokens}, and one)",
            remedy="shorten prompts or generation.max_tokens",
        )
    if room is not None and longest + 1 > room:
        raise fail(
            "a text to be scored does not fit the model",
            where=model,
            expected=f"at most {room} tokens",
            got=f"{longest + 1} (the longest text, and one)",
            remedy="shorten it",
        )
    return max(answered, longest + 1)


def response_text(tokenizer: Any, prompt: Tokens, tokens: Tokens, stop: Sequence[str] = ()) -> tuple[str, bool]:
    """Return the text of a response up to the first stop text in it, and whether there was one."""
    text = split_text([*prompt, *tokens], len(prompt), tokenizer)[1]
    found = [place for place in (text.find(end) for end in stop) if place >= 0]
    return (text[: min(found)], True) if found else (text, False)


def tokens_until(tokenizer: Any, prompt: Tokens, tokens: Tokens, stop: Sequence[str]) -> int | None:
    """Return how many tokens complete the first stop text; None if there is none.

    An engine that makes text while it generates may hold a part of a character back, and see the text a little later.
    """
    count = len(tokens)
    while count and response_text(tokenizer, prompt, tokens[:count], stop)[1]:
        count -= 1
    return count + 1 if count < len(tokens) else None


def _refuse_empty(prompts: Sequence[Prompt], lengths: Sequence[int]) -> None:
    if 0 in lengths:
        index = lengths.index(0)
        raise fail(
            "a prompt has no tokens",
            where=f"prompt {index}",
            got=repr(prompts[index]),
            remedy="begin it with at least one token, such as the tokenizer's BOS",
        )
