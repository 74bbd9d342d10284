"""What tokenizer and generation settings of the inputs say, in one form, and whether the policies agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.block_counts import of_text
from rewarded_lines.checkpoints.reader import read_json_object
from rewarded_lines.checkpoints.tokenizer_files import tokenizer_file
from rewarded_lines.errors import Problem
from rewarded_lines.merger.tokenizer_checks import Differences, shortened, shown

Settings = Mapping[str, Any]
BASE, AUTO = "base", "auto"
IDS = ("eos_token_id", "bos_token_id", "pad_token_id")
_SPECIAL = ("eos_token", "bos_token", "pad_token")
_GENERATION = "generation_config.json"
# Where transformers puts chat templates with a name, such as tool_use.jinja.
OTHER_TEMPLATES = "additional_chat_templates"
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
        others = sorted((folder / OTHER_TEMPLATES).glob("*.jinja"))
        read = {path.stem: _text(path) for path in (file, *others)}
        return {"default": read.pop(file.stem), **read} if others else read[file.stem]
    found = config.get("chat_template") or _json(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list) and all(isinstance(one, dict) for one in found):
        named = {str(one.get("name")): str(one.get("template")).removesuffix("\n") for one in found}
        return named["default"] if set(named) == {"default"} else named
    return found.removesuffix("\n") if isinstance(found, str) else found


def _text(path: Path) -> str:
    """Return a template; Jinja ignores a newline at the end."""
    return path.read_text(encoding="utf-8", errors="replace").removesuffix("\n")


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


def _ids(value: Any) -> Any:
    """Return ids in one form: several ones sorted, a single one alone."""
    if not isinstance(value, list):
        return value
    return value[0] if len(value) == 1 else sorted(map(str, value))


def _json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


@dataclass(frozen=True)
class Question:
    """Whose files of one kind the output gets.

    Attributes:
        option: the user's, which answers it.
        what: the kind of files.
        settings: what base and policies say in them; None for an input that has none.
    """

    option: str
    what: str
    settings: Mapping[str, Settings | None]

    def answer(self, adapter: bool, problems: list[Problem], notes: list[str]) -> str:
        """Return the first policy if all policies agree on something that is not the base's, else the base."""
        told = {name: one for name, one in self.settings.items() if name != BASE}
        base = self.settings[BASE]
        holders = {name: _filled(one, base or {}) for name, one in told.items() if one is not None}
        if not holders:
            return "" if adapter else BASE
        first = next(iter(holders))
        values = {key: [one.get(key) for one in holders.values()] for one in holders.values() for key in one}
        apart = [key for key, all_ in values.items() if any(one != all_[0] for one in all_)]
        # Where only padding differs, no answer changes.
        apart = [key for key in apart if "pad" not in key]
        shared = [key for key, all_ in values.items() if all(one == all_[0] for one in all_)]
        own = [*apart, *(key for key in shared if values[key][0] != (base or {}).get(key))]
        if base is not None and not own:
            return first if adapter else BASE
        if apart or (base is not None and len(holders) < len(told)):
            problems.append(self._disagreement(apart or own, told, holders))
        elif base is None:
            notes.append(f"{self.what} of `{first}`, the base has none")
        else:
            lost = [key for key, value in base.items() if value is not None and (told[first] or {}).get(key) is None]
            parts = [f"{key} {_short(values[key][0])}, not {_short(base.get(key))}" for key in own]
            parts += [f"without the base's {', '.join(lost)}"] if lost else []
            listed = "; ".join([*parts, f"{self.option} base keeps the base's"])
            notes.append(f"{self.what} of `{first}`, as all policies have: {listed}")
        return first

    def _disagreement(
        self, keys: Sequence[str], told: Mapping[str, Settings | None], holders: Mapping[str, Settings]
    ) -> Problem:
        given = {name: ", ".join(f"{key} {_short(one.get(key))}" for key in keys) for name, one in holders.items()}
        got = "; ".join(f"{name}: {given.get(name, 'none')}" for name in told)
        remedy = choices(self.option, [*([] if self.settings[BASE] is None else [BASE]), *holders])
        what = f"the policies differ in {self.what}: {', '.join(keys)}"
        return Problem(what, "policies", "the same in all policies, or a choice", got, remedy)


def _filled(settings: Settings, base: Settings) -> Settings:
    """Return a policy's settings, those that it leaves open filled in from the base's."""
    said = {key: value for key, value in settings.items() if value is not None}
    return {**base, **said}


def _short(value: Any) -> str:
    """Return a value on one line. Templates are long, and often begin alike."""
    if isinstance(value, str):
        length = f" ({len(value):,} characters)" if shortened(value) != value else ""
        return shown(value) + length
    return "none" if value is None else shortened(repr(value))


def choices(option: str, names: Sequence[str]) -> str:
    """Return the remedy that lists the choices."""
    choices = [f"{option} {name}" for name in names]
    return (
        f"choose whose the output gets: {', '.join(choices[:-1])} or {choices[-1]}"
        if len(choices) > 1
        else f"pass {choices[0]}"
    )
