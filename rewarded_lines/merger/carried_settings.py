"""What a folder's tokenizer and generation settings say, in one form: chat template, special tokens, sampling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.reader import read_json_object
from rewarded_lines.checkpoints.tokenizer_files import tokenizer_file
from rewarded_lines.merger.tokenizer_checks import Differences

Settings = Mapping[str, Any]
IDS = ("eos_token_id", "bos_token_id", "pad_token_id")
_SPECIAL = ("eos_token", "bos_token", "pad_token")
_GENERATION = "generation_config.json"
# Written by transformers, without meaning for the output.
_IGNORED = ("transformers_version", "_from_model_config", "use_cache", "cache_implementation")
# The defaults that some versions of transformers write.
_DEFAULTS = {
    **{"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "num_beams": 1, "max_length": 20},
    **{"repetition_penalty": 1.0, "length_penalty": 1.0, "typical_p": 1.0, "num_return_sequences": 1},
}


def tokenizer_settings(folder: Path, differences: Differences | None) -> Settings | None:
    """Return chat template, special tokens and added tokens of a folder; None without a tokenizer.

    `differences` are those from the base's tokenizer.
    """
    if tokenizer_file(folder) is None:
        return None
    config, older = (_json(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    found: dict[str, Any] = {"chat template": _template(folder, config)}
    for key in _SPECIAL:
        value = config.get(key) or older.get(key)
        found[key] = value.get("content") if isinstance(value, dict) else value
    found["added tokens"] = None if differences is None else tuple(differences.extra) or None
    found["tokens around a text"] = None if differences is None else differences.around
    return found


def _template(folder: Path, config: Mapping[str, Any]) -> Any:
    """Return the chat template, or several by name. Files take the place of what tokenizer_config.json has."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        # Jinja ignores a newline at the end.
        return file.read_text(encoding="utf-8", errors="replace").removesuffix("\n")
    found = config.get("chat_template") or _json(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list) and all(isinstance(one, dict) for one in found):
        named = {str(one.get("name")): str(one.get("template")).removesuffix("\n") for one in found}
        return named["default"] if set(named) == {"default"} else named
    return found.removesuffix("\n") if isinstance(found, str) else found


def generation_settings(folder: Path, config: Mapping[str, Any] | None) -> Settings | None:
    """Return how transformers generates with a folder's model; `config` is None for an adapter, which may not say."""
    path = folder / _GENERATION
    if config is None and not path.is_file():
        return None
    content, config = _json(path), config or {}
    said = {key: value for key, value in content.items() if key not in _IGNORED and value is not False}
    found = {key: value for key, value in said.items() if value != _DEFAULTS.get(key)}
    for key in IDS:
        found[key] = _ids(content.get(key, of_text(config, key)))
        found[f"{key} of the config"] = _ids(of_text(config, key))
    return found


def of_text(config: Mapping[str, Any], key: str) -> Any:
    """Return a setting of the language model; vision-language models have it in `text_config`."""
    text = config.get("text_config")
    return config.get(key, text.get(key) if isinstance(text, Mapping) else None)


def _ids(value: Any) -> Any:
    """Return ids in one form: several ones sorted, a single one alone."""
    if not isinstance(value, list):
        return value
    return value[0] if len(value) == 1 else sorted(map(str, value))


def _json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}
