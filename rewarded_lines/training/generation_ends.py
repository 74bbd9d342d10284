"""What a policy generates with while it is trained, and keeps: padding, end tokens, the base's generation config."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from rewarded_lines.errors import fail
from rewarded_lines.folders import write_json

# Entries of well-known vocabularies that are made for padding, or that no text contains.
_PADDING = (
    "<|finetune_right_pad_id|>",
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|endoftext|>",
    "<unk>",
    "[UNK]",
    "<|reserved_special_token_0|>",
)
_NEW_PADDING = "<|padding|>"


def usable_padding(
    tokenizer: PreTrainedTokenizerBase, base: str, ends: Collection[int], prompts: Sequence[Sequence[int]] = ()
) -> None:
    """Give the tokenizer a padding token that ends no response and is in no prompt: PPO's masks are made from it.

    Only the tokenizer in memory is changed; the policy keeps the base's files.

    Args:
        tokenizer: of the policy.
        base: its model, for messages.
        ends: the ids that end a response.
        prompts: as tokens.

    Raises:
        UserError: its vocabulary has no entry that could serve.
    """
    taken = {*ends, *(token for row in prompts for token in row)}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in taken:
        return
    vocabulary = tokenizer.get_vocab()
    special = sorted(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    # Those made for padding come first, then entries that no text makes, then whatever special token nobody uses here.
    made = [name for name in _PADDING if name in special] + [name for name in special if "pad" in name.lower()]
    for token in (*made, *_PADDING, *special):
        if token in vocabulary and vocabulary[token] not in taken:
            tokenizer.pad_token = token
            return
    rows = AutoConfig.from_pretrained(base).get_text_config().vocab_size
    if len(tokenizer) < rows:
        # The model has rows for more tokens than its tokenizer has, as many do.
        tokenizer.add_special_tokens({"pad_token": _NEW_PADDING})
        return
    raise fail(
        "PPO needs a padding token that ends no response",
        where=base,
        got=f"pad {tokenizer.pad_token!r}, end tokens {tokenizer.convert_ids_to_tokens(sorted(ends))}",
        remedy="give the SFT model's tokenizer one: an entry of the vocabulary that no text contains",
    )


def plain_generation(model: PreTrainedModel, ends: Collection[int], pad: int | None) -> Callable[[], None]:
    """Let a model generate as it is told, without sampling settings of its own.

    transformers fills in what a trainer leaves open (top_k, a repetition penalty) from the model's generation config.
    Trainers, for their part, write the tokenizer's special tokens over those of the model's config.

    Args:
        model: to be trained.
        ends: the ids that end a response.
        pad: what follows the end in a batch.

    Returns:
        What undoes the trainer's changes, before the model is saved and measured.
    """
    config = model.config.get_text_config()
    ids = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    plain = {"eos_token_id": sorted(ends), "pad_token_id": pad}
    model.generation_config = GenerationConfig(**plain)

    def restore() -> None:
        for name, value in ids.items():
            setattr(config, name, value)
        # PPO has let padding end a response, too.
        model.generation_config = GenerationConfig(**plain)

    return restore


def keep_generation_config(base: str, folder: Path, ends: Collection[int] = ()) -> None:
    """Give a trained model the generation config of the model that it started from.

    Args:
        base: that model.
        folder: the trained one's; an adapter has no generation config, and gets none.
        ends: ids that end a response beside those that the base names.
    """
    target = folder / "generation_config.json"
    if not (folder / "config.json").is_file():
        return
    source = cached_file(base, target.name, _raise_exceptions_for_missing_entries=False)
    if source is None:
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(base))
        content = config.to_diff_dict()
    else:
        content = json.loads(Path(source).read_text(encoding="utf-8"))
    known = content.get("eos_token_id")
    named = {known} if isinstance(known, int) else set(known or [])
    if not named.issuperset(ends):
        content["eos_token_id"] = sorted(named.union(ends))
    write_json(target, content)
