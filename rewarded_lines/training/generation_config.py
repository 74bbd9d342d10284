"""Generation settings in training: the project's, padding, and the saved generation config."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import blake3
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from rewarded_lines.config import GenerationSpec, decides
from rewarded_lines.engines.tokenizers import read_template
from rewarded_lines.errors import fail
from rewarded_lines.folders import write_json
from rewarded_lines.projects import load_project

_CHANGES_TRAINING = ("stop", "stop_token_ids", "chat_template", "chat_template_kwargs", "strip")
# Entries of well-known vocabularies that are made for padding, or that no text contains.
_PADDING = (
    "<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|endoftext|>", "<unk>", "[UNK]",
    "<|reserved_special_token_0|>",
)  # fmt: skip


def generation_of(project_file: str) -> GenerationSpec:
    """Return a project's generation settings; the defaults if there is no project file."""
    return load_project(project_file).generation if Path(project_file).is_file() else GenerationSpec()


def generation_inputs(spec: GenerationSpec) -> dict[str, str]:
    """Return the hash of the generation settings that change training, as one of a run's inputs.

    Without such settings there is no entry, so runs recorded before they existed stay the same runs.
    """
    content = {name: value for name, value in decides(spec).items() if name in _CHANGES_TRAINING and value}
    if spec.chat_template is not None:
        content["chat_template"] = read_template(spec.chat_template)
    text = json.dumps(content, sort_keys=True)
    return {"generation": blake3.blake3(text.encode("utf-8", "surrogatepass")).hexdigest()} if content else {}


def usable_padding(
    tokenizer: PreTrainedTokenizerBase, base: str, ends: Collection[int], prompts: Sequence[Sequence[int]] = ()
) -> None:
    """Give the tokenizer in memory a padding token that ends no response and is in no prompt.

    PPO's masks depend on it. The policy keeps the base's tokenizer files.
    """
    taken = {*ends, *(token for row in prompts for token in row)}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in taken:
        return
    vocabulary = tokenizer.get_vocab()
    special = sorted(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    # First tokens made for padding, then entries that no text contains, then unused special tokens.
    made = [name for name in _PADDING if name in special] + [name for name in special if "pad" in name.lower()]
    for token in (*made, *_PADDING, *special):
        if token in vocabulary and vocabulary[token] not in taken:
            tokenizer.pad_token = token
            return
    if len(tokenizer) < AutoConfig.from_pretrained(base, trust_remote_code=False).get_text_config().vocab_size:
        # The model's embedding has a row that the tokenizer does not use.
        tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
        return
    raise fail(
        "PPO needs a padding token that ends no response",
        where=base,
        got=f"pad {tokenizer.pad_token!r}, end tokens {tokenizer.convert_ids_to_tokens(sorted(ends))}",
        remedy="give the SFT model's tokenizer one: an entry of the vocabulary that no text contains",
    )


def plain_generation(model: PreTrainedModel, ends: Collection[int], pad: int | None) -> Callable[[], None]:
    """Remove a model's sampling settings before training; return a function to call before saving.

    transformers fills in settings that a trainer leaves open (top_k, a repetition penalty) from the model's
    generation config. Trainers write the tokenizer's special tokens into the model's config; the function
    undoes that.
    """
    config = model.config.get_text_config()
    ids = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    plain = {"eos_token_id": sorted(ends), "pad_token_id": pad}
    model.generation_config = GenerationConfig(**plain)

    def restore() -> None:
        for name, value in ids.items():
            setattr(config, name, value)
        # PPO made padding an end token, too.
        model.generation_config = GenerationConfig(**plain)

    return restore


def keep_generation_config(base: str, folder: Path, ends: Collection[int] = ()) -> None:
    """Copy the base's generation config into a trained model's folder, with `ends` as more end tokens.

    A folder that holds only an adapter gets none.
    """
    target = folder / "generation_config.json"
    if not (folder / "config.json").is_file():
        return
    source = cached_file(base, target.name, _raise_exceptions_for_missing_entries=False)
    if source is None:
        content = GenerationConfig.from_model_config(
            AutoConfig.from_pretrained(base, trust_remote_code=False)
        ).to_diff_dict()
    else:
        content = json.loads(Path(source).read_text(encoding="utf-8"))
    known = content.get("eos_token_id")
    named = {known} if isinstance(known, int) else set(known or [])
    if not named.issuperset(ends):
        content["eos_token_id"] = sorted(named.union(ends))
    write_json(target, content)
