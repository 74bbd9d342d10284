"""Whose tokenizer, chat template and generation settings an output gets: the base's, a policy's, or a folder's.

Without the user's word it is what all policies share. Inputs whose tokens differ are refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.adapters import Adapter, BareBase
from rewarded_lines.checkpoints.block_counts import of_text
from rewarded_lines.checkpoints.hashing import file_hash
from rewarded_lines.checkpoints.reader import Checkpoint, read_json_object, resolve_folder
from rewarded_lines.checkpoints.tokenizer_files import tokenizer_file
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.merger.carried_settings import (
    AUTO,
    BASE,
    IDS,
    OTHER_TEMPLATES,
    Question,
    Settings,
    choices,
    generation_settings,
    tokenizer_settings,
)
from rewarded_lines.merger.config_checks import REMEDY
from rewarded_lines.merger.tokenizer_checks import SHOWN, Differences, compare_tokenizers, shown
from rewarded_lines.references import looks_local

_TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*"),
    "*.model",
)
# Of tokenizers with a class of their own, and chat templates beside the usual one.
_SPECIAL = (
    *("tekken.json", "*.tiktoken", "*.spm", "*vocab*.json", "bpe.codes", "dict.txt", "normalizer.json", "emoji.json"),
    *("word_shape.json", "word_pronunciation.json", "byte_maps.json", "*.tokenizer", f"{OTHER_TEMPLATES}/*.jinja"),
)
_GENERATION, _PROCESSOR = ("generation_config.json",), ("*processor_config.json",)
# Only classes that their `auto_map` names need the code beside them. It is copied and never run.
_CODE, _MAPPED = ("*.py",), ("config.json", "tokenizer_config.json", *_PROCESSOR)
_AUDIO = ("audio_tokenizer_config.json",)
_LATER = (*_SPECIAL, *_AUDIO, *_CODE)


@dataclass(frozen=True)
class Carried:
    """The files that an output gets beside weights and config.

    Attributes:
        folders: of the base and the policies, by name; with the folder of `tokenizer` if that is none of them.
        tokenizer: whose tokenizer files: "base", a policy's name, a folder or Hub id, or "" for none.
        config_from: likewise whose generation_config.json and token ids in config.json.
        processor: likewise whose image and audio processors.
        beside: the tokenizer's folder or Hub id if it is neither the base's nor a policy's, else "".
        token_ids: for config.json.
        changed: whether tokenizer or generation settings are not the base's in meaning.
        asked: the user's options, for the command that makes the merge again.
        notes: for the user.
    """

    folders: Mapping[str, Path]
    tokenizer: str = BASE
    config_from: str = BASE
    processor: str = BASE
    beside: str = ""
    token_ids: Mapping[str, Any] = field(default_factory=dict)
    changed: bool = False
    asked: Mapping[Any, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def files_of(self, name: str) -> list[Path]:
        """Return the files that come from one of the folders."""
        sources = [
            *((self.tokenizer, (*_TOKENIZER, *_SPECIAL)), (self.config_from, _GENERATION)),
            (self.processor, (*_PROCESSOR, *_AUDIO)),
        ]
        if name in (self.tokenizer, self.processor) and _has_code(self.folders[name]):
            sources.append((name, _CODE))
        found = [_found(self.folders[name], patterns) for source, patterns in sources if source == name]
        return sorted({path for paths in found for path in paths})

    def copy(self, folder: Path) -> None:
        """Copy the files to an output's folder; of files with one name the base's stays."""
        for name in reversed(list(self.folders)):
            for path in self.files_of(name):
                place = folder / path.relative_to(self.folders[name])
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, place)

    def config(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """Return the base's config with the token ids."""
        config = dict(base)
        for key, value in self.token_ids.items():
            inner = config.get("text_config")
            if isinstance(inner, Mapping) and key not in config and key in inner:
                config["text_config"] = {**inner, key: value}
            else:
                config[key] = value
        return config


def choose_files(
    base: Checkpoint | BareBase,
    policies: Mapping[str, Checkpoint | Adapter],
    tokenizer: str = AUTO,
    config_from: str = AUTO,
    adapter: bool = False,
) -> Carried:
    """Compare the tokenizers of all inputs, and return the files that the output gets.

    Args:
        base: the SFT model.
        policies: by name.
        tokenizer: "auto", "base", a policy's name, a folder or a Hub id.
        config_from: "auto", "base" or a policy's name.
        adapter: whether the output is an adapter, which gets nothing from its base unless the user says so.

    Raises:
        UserError: tokens differ, or policies disagree and the user did not choose.
    """
    policies = {key_of(name): policy for name, policy in policies.items()}
    folders = {BASE: base.folder, **{name: policy.folder for name, policy in policies.items()}}
    if tokenizer not in (AUTO, "", *folders):
        folders[tokenizer] = _other_folder(tokenizer, list(folders))
    if config_from not in (AUTO, "", BASE, *policies):
        raise fail("no such policy", where="--config-from", expected=f"base, {', '.join(policies)}", got=config_from)
    problems: list[Problem] = []
    notes: list[str] = []
    compared = _compare(folders, policies, tokenizer, problems, notes)
    _check_rows(base, policies, compared, tokenizer, problems)
    settings = {name: tokenizer_settings(folders[name], compared.get(name)) for name in (BASE, *policies)}
    tokens = Question("--tokenizer", "tokenizer and chat template", settings)
    chosen = tokens.answer(adapter, problems, notes) if tokenizer == AUTO else tokenizer
    configs = {BASE: generation_settings(base.folder, base.config)}
    for name, policy in policies.items():
        configs[name] = generation_settings(policy.folder, policy.config if isinstance(policy, Checkpoint) else None)
    generation = Question("--config-from", "generation settings", configs)
    source = generation.answer(adapter, problems, notes) if config_from == AUTO else config_from
    if problems:
        raise UserError(problems)
    config_of = policies.get(source)
    ids = {key: of_text(config_of.config, key) for key in IDS} if isinstance(config_of, Checkpoint) else {}
    beside = "" if chosen in ("", BASE, *policies) else chosen
    asked = {"tokenizer": tokenizer, "config_from": config_from}
    return Carried(
        folders,
        chosen,
        source,
        chosen if adapter else BASE,
        beside,
        {key: value for key, value in ids.items() if value is not None},
        bool(beside) or _differs(settings, chosen) or _differs(configs, source),
        {key: value for key, value in asked.items() if value not in (AUTO, "")},
        notes,
    )


def carried_later(name: str) -> bool:
    """Return whether earlier versions left a file of this name out, so that their records do not have it."""
    return any(fnmatch(name, pattern.rpartition("/")[2]) for pattern in _LATER)


def key_of(name: str) -> str:
    """Return the key of a policy among `Carried.folders`: its name, which may be that of the base."""
    return f"policy {BASE}" if name == BASE else name


def _found(folder: Path, patterns: Sequence[str]) -> set[Path]:
    return {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}


def _has_code(folder: Path) -> bool:
    """True if a config in the folder names a class in a Python file beside it."""
    maps = [read_json_object(path).get("auto_map") for path in _found(folder, _MAPPED)]
    named = [values for each in maps if isinstance(each, Mapping) for values in each.values()]
    flat = [value for values in named for value in (values if isinstance(values, list) else [values])]
    # REPOSITORY--MODULE.CLASS lies on the Hub.
    return any(isinstance(value, str) and "--" not in value for value in flat)


def _other_folder(reference: str, known: Sequence[str]) -> Path:
    """Return the folder that `--tokenizer` names; it may be a Hub id."""
    if looks_local(reference) and not Path(reference).expanduser().is_dir():
        expected = f"{', '.join(known)}, or a folder with a tokenizer"
        raise fail("no such policy or folder", where="--tokenizer", expected=expected, got=reference)
    return resolve_folder(reference, weights=False)


def _compare(
    folders: Mapping[str, Path],
    policies: Collection[str],
    choice: str,
    problems: list[Problem],
    notes: list[str],
) -> dict[str, Differences]:
    """Compare every tokenizer with the base's or, if it has none, with the first policy's; return the differences."""
    holders = [name for name, folder in folders.items() if tokenizer_file(folder)]
    if choice in folders and choice not in holders and holders:
        problems.append(Problem("no tokenizer there", f"--tokenizer {choice}", got=str(folders[choice])))
    found: dict[str, Differences] = {}
    alike: dict[tuple[str, ...], Differences] = {}
    for name in holders[1:]:
        # Policies often have the same file, and large ones take a while.
        same = tuple(file_hash(path) for path in sorted(_found(folders[name], _TOKENIZER)))
        if same not in alike:
            alike[same] = compare_tokenizers(folders[holders[0]], folders[name])
        found[name] = one = alike[same]
        title = f"policy `{name}`" if name in policies else "--tokenizer"
        where, other = f"{title} ({folders[name]})", "the base's" if holders[0] == BASE else f"that of `{holders[0]}`"
        if one.vocabulary:
            what = f"the tokenizer differs from {other} in its tokens: {'; '.join(one.vocabulary)}"
            problems.append(Problem(what, where, remedy=REMEDY))
        lost = [f"{shown(token)} ({number}) is missing" for token, number in list(one.missing.items())[:SHOWN]]
        if choice == AUTO and (one.behaviour or lost):
            what = f"the tokenizer differs from {other}: {'; '.join([*one.behaviour, *lost])}"
            problems.append(Problem(what, where, remedy=choices("--tokenizer", holders)))
    notes += [f"tokenizer of {', '.join(names)}: {text}" for text, names in _by_text(found).items()]
    return found


def _by_text(found: Mapping[str, Differences]) -> dict[str, list[str]]:
    """Return what to tell about tokenizers of one meaning, with the inputs that it is about."""
    said: dict[str, list[str]] = {}
    for name, one in found.items():
        parts = []
        if one.form and not one.behaviour:
            parts = [f"written differently from the base's, with the same meaning: {', '.join(one.form)}"]
        for text in [*parts, *one.unsure]:
            said.setdefault(text, []).append(f"`{name}`")
    return said


def _check_rows(
    base: Checkpoint | BareBase,
    policies: Mapping[str, Checkpoint | Adapter],
    compared: Mapping[str, Differences],
    choice: str,
    problems: list[Problem],
) -> None:
    """Refuse tokens that two policies added at one id, and added tokens without a row in the embeddings."""
    seen: dict[int, tuple[str, str]] = {}
    for name, one in compared.items():
        for token, number in one.extra.items():
            other, first = seen.setdefault(number, (token, name))
            if other != token:
                what = f"the tokenizers differ: token {number} is {shown(other)} in {first}, {shown(token)} in {name}"
                problems.append(Problem(what, "policies", remedy=REMEDY))
        policy = policies.get(name)
        rows = of_text(policy.config, "vocab_size") if isinstance(policy, Checkpoint) else None
        without = [f"{shown(token)} ({number})" for token, number in one.extra.items() if rows and number >= rows]
        if choice == AUTO and without:
            what = f"its tokenizer has tokens that the model has no row for: {', '.join(without[:SHOWN])}"
            problems.append(
                Problem(what, f"policy `{name}`", f"ids below {rows}", remedy=choices("--tokenizer", [BASE]))
            )


def _differs(settings: Mapping[str, Settings | None], chosen: str) -> bool:
    """True if the chosen settings differ from the base's in more than padding, which changes no answer."""
    one, base = settings.get(chosen) or {}, settings[BASE] or {}
    return any(value is not None and value != base.get(key) for key, value in one.items() if "pad" not in key)
