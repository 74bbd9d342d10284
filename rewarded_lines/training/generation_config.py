"""Generation settings in training: the project's, padding, and the saved generation config."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path

import blake3
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from rewarded_lines.config import GenerationSpec, decides
from rewarded_lines.engines.tokenizers import read_template
from rewarded_lines.folders import write_json
from rewarded_lines.projects import load_project

_CHANGES_TRAINING = ("stop", "stop_token_ids", "chat_template", "chat_template_kwargs", "strip")


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
