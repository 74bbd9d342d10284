"""What every engine reads of a model: tokenizer, chat template, end tokens, the longest sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.adapter_config import read_adapter_config
from rewarded_lines.checkpoints.adapters import is_adapter
from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.chat_templates import with_settings
from rewarded_lines.data.lengths import positions_of
from rewarded_lines.data.prompts import Prompt, encode
from rewarded_lines.engines.base import Workload
from rewarded_lines.errors import fail


def load_tokenizer(model: str, spec: GenerationSpec) -> Any:
    """Return a model's tokenizer, with the chat template of `spec` if it has one."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    set_template(tokenizer, spec)
    return tokenizer


def set_template(tokenizer: Any, spec: GenerationSpec) -> None:
    """Give a tokenizer the chat template and the template variables of `spec`, if it has any."""
    if spec.chat_template is not None:
        tokenizer.chat_template = read_template(spec.chat_template)
    if spec.chat_template_kwargs:
        tokenizer.chat_template = with_settings(tokenizer.chat_template, spec.chat_template_kwargs)


def end_tokens(tokenizer: Any, generation_config: Any, more: Iterable[int] = ()) -> frozenset[int]:
    """Return the ids that end a response: the generation config's, the tokenizer's, and `more`."""
    ends = generation_config.eos_token_id if generation_config is not None else None
    several = [ends] if isinstance(ends, int) else list(ends or [])
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return frozenset([*several, *own, *more])


def load_generation_config(model: str) -> Any:
    """Return the generation config that transformers gives the model; for an adapter, the base's."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(base_model(model))
    except OSError:
        return GenerationConfig.from_model_config(load_config(model))


def read_template(path: str, key: str = "generation.chat_template") -> str:
    """Return the chat template in a file; `key` is the setting that names it."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = "the chat template " + ("cannot be read" if isinstance(error, OSError) else "is not text")
        expected = "a Jinja template, in UTF-8"
        raise fail(what, where=f"{key}: {path}", expected=expected, got=str(error)) from error


def load_config(model: str) -> Any:
    """Return a model's configuration; for an adapter, its base's."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base_model(model), trust_remote_code=False)
    except ValueError as error:
        remedy = "name a model of a class that transformers has: the code in a model's folder is not run here"
        raise fail("the model's config cannot be read", where=model, got=str(error), remedy=remedy) from error


def attention_of(config: Any) -> dict[str, str]:
    """Return how transformers must be told to load a model that caps the logits of its attention, as Gemma 2 does.

    Its default, torch's SDPA, leaves the caps out in silence; vLLM computes them.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return {"attn_implementation": "eager"} if capped else {}


def base_model(model: str) -> str:
    """Return the base of an adapter, or the model itself."""
    folder = Path(model)
    return read_adapter_config(folder).base if folder.is_dir() and is_adapter(folder) else model


def load_tokens(work: Workload) -> tuple[Any, frozenset[int], int]:
    """Return a model's tokenizer, the ids that end a response, and the tokens of the longest sequence.

    Raises:
        UserError: the chat template cannot be read, or prompts do not fit the model.
    """
    tokenizer = load_tokenizer(work.texts, work.spec)
    ends = end_tokens(tokenizer, load_generation_config(work.texts))
    return tokenizer, ends, longest_sequence(tokenizer, load_config(work.model), work)


def longest_sequence(tokenizer: Any, config: Any, work: Workload) -> int:
    """Return how many tokens the longest sequence of a workload has.

    Raises:
        UserError: a prompt without tokens, or one that does not fit the model with its response.
    """
    lengths = [len(ids) for ids in encode(tokenizer, work.prompts)]
    refuse_empty("prompts", work.prompts, lengths)
    room, limit = positions_of(config), work.spec.max_tokens
    # One position more than generation needs: scoring a response of full length generates one token.
    answered, scored = max(lengths, default=0) + limit + 1, work.longest + 1
    for what, needed, parts, remedy in (
        (
            "a prompt and its response do not fit the model",
            answered,
            f"the longest prompt, generation.max_tokens = {limit}, and one",
            "shorten prompts or generation.max_tokens",
        ),
        ("a text to be scored does not fit the model", scored, "the longest text, and one", "shorten it"),
    ):
        if room is not None and needed > room:
            expected, got = f"at most {room} tokens", f"{needed} ({parts})"
            raise fail(what, where=work.model, expected=expected, got=got, remedy=remedy)
    return max(answered, scored)


def refuse_empty(where: str, prompts: Sequence[Prompt], lengths: Sequence[int]) -> None:
    """Refuse prompts without tokens: a model cannot continue an empty text."""
    if 0 in lengths:
        index = lengths.index(0)
        raise fail(
            "a prompt has no tokens",
            where=f"{where}: prompt {index}",
            got=repr(prompts[index]),
            remedy="begin it with at least one token, such as the tokenizer's BOS",
        )
