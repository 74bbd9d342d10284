"""What an adapter_config.json says, read strictly: what may change what an adapter computes is known, or refused."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.headers import damaged
from rewarded_lines.checkpoints.reader import read_json_object
from rewarded_lines.errors import Problem, UserError, fail

ADAPTER_CONFIG = "adapter_config.json"
_LARGEST = 1 << 20
_LONGEST_PATTERN = 2000
_SECONDS_OF_MATCHING = 20.0
# A quantifier on a group, a lookaround, a reference back: what makes the time of a match explode.
_UNSAFE = re.compile(r"\)[*+{]|\(\?(?!:)|\\[1-9kK]")
_OPEN_ENDED = re.compile(r"[*+{]")
_MOST_OPEN_ENDED = 3
# How training began, where that leaves the base as it was; True and False are PEFT's own ways.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva")
# What has no part in B·A, or is read below.
_KNOWN = frozenset(
    "peft_type task_type auto_mapping base_model_name_or_path revision inference_mode peft_version r lora_alpha "
    "lora_dropout rank_pattern alpha_pattern use_rslora fan_in_fan_out bias modules_to_save init_lora_weights "
    "target_modules exclude_modules layers_to_transform layers_pattern megatron_core qalora_group_size runtime_config "
    "eva_config corda_config loftq_config lora_ga_config".split()
)
_REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA scales whole columns by learned magnitudes: a sum of such adapters is none",
    "use_qalora": "QA-LoRA pools its inputs, B·A is not its residual",
    "lora_bias": "B has a bias, which no matrix of the base can take",
    "layer_replication": "it repeats the base's blocks: another architecture",
    "megatron_config": "its tensors are cut for Megatron",
    "trainable_token_indices": "it replaces single rows of the embeddings",
    "target_parameters": "it changes bare parameters (fused experts), which have no module",
    "alora_invocation_tokens": "aLoRA works from an invocation on, not on every token",
    "ensure_weight_tying": "it ties the adapters of embeddings and head to each other",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes between adapters token by token",
    "kasa_config": "KaSA changes the base's own weights",
}


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of a LoRA adapter that decide what it computes.

    Attributes:
        content: the whole file.
        base: what the adapter says it was trained from; "" where it does not say.
        rank: r of the modules that no pattern names.
        alpha: α, likewise.
        rank_pattern: r by pattern.
        alpha_pattern: α by pattern.
        rslora: the scaling is α/√r instead of α/r.
        fan_in_fan_out: the layers store [in, out].
        bias: "none", "all" or "lora_only".
        modules_to_save: ends of the names of modules that the adapter replaces as a whole.
    """

    content: Mapping[str, Any]
    base: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    fan_in_fan_out: bool
    bias: str
    modules_to_save: tuple[str, ...]

    def scaling(self, rank: int, alpha: float) -> float:
        """Return the factor of B·A: α/r, or α/√r for rsLoRA (arXiv 2312.03732)."""
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Return the settings of a PEFT folder.

    Raises:
        UserError: with all that is wrong with them: not LoRA, a variant that is not a sum of B·A, values that are none.
    """
    path = folder / ADAPTER_CONFIG
    content = read_json_object(path)
    if content.get("peft_type") != "LORA":
        raise fail(
            f"an adapter of type {_shown(content.get('peft_type'))}",
            where=str(path),
            expected="LORA",
            remedy="merge it into its base with PEFT's merge_and_unload, save that, and merge the full checkpoints",
        )
    problems = [*_unknown(content, path), *_start(content, path)]
    fields = _Fields(content, path)
    config = AdapterConfig(
        content=content,
        base=fields.text("base_model_name_or_path"),
        rank=int(fields.number("r", 8, whole=True)),
        alpha=fields.number("lora_alpha", 8),
        rank_pattern=fields.patterns("rank_pattern", whole=True),
        alpha_pattern=fields.patterns("alpha_pattern"),
        rslora=fields.flag("use_rslora"),
        fan_in_fan_out=fields.flag("fan_in_fan_out"),
        bias=fields.text("bias") or "none",
        modules_to_save=fields.names("modules_to_save"),
    )
    if config.bias not in ("none", "all", "lora_only"):
        problems.append(Problem("unknown value of `bias`", str(path), "none, all or lora_only", _shown(config.bias)))
    if found := [*problems, *fields.problems]:
        raise UserError(found)
    return config


def match_patterns(
    patterns: Mapping[str, float], modules: Iterable[str], default: float, path: Path
) -> dict[str, float]:
    """Return the value of each module: that of the first pattern that matches the end of its name, as in PEFT.

    PEFT matches `(.*\\.)?(PATTERN)$` from the start of the name.

    Raises:
        UserError: matching takes as long as only a malicious pattern makes it take.

    Source: get_pattern_key in peft/utils/other.py, version 0.21.
    """
    compiled = [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()]
    deadline = time.monotonic() + _SECONDS_OF_MATCHING
    found = {}
    for module in modules:
        found[module] = next((value for pattern, value in compiled if pattern.match(module)), default)
        if time.monotonic() > deadline:
            raise damaged(path, f"matching its {len(compiled)} patterns takes too long")
    return found


class _Fields:
    """Reads values of one file, each of its type, and gathers what is wrong with them."""

    def __init__(self, content: Mapping[str, Any], path: Path) -> None:
        self.problems: list[Problem] = []
        self._content = content
        self._path = path

    def text(self, name: str) -> str:
        value = self._content.get(name)
        return value if isinstance(value, str) else self._wrong(name, "text", value, "")

    def flag(self, name: str) -> bool:
        value = self._content.get(name)
        return value if isinstance(value, bool) else self._wrong(name, "true or false", value, False)

    def names(self, name: str) -> tuple[str, ...]:
        value = self._content.get(name)
        if isinstance(value, list) and all(isinstance(item, str) and item for item in value):
            return tuple(value)
        self._wrong(name, "a list of names", value, ())
        return ()

    def number(self, name: str, default: float, whole: bool = False) -> float:
        value = self._content.get(name)
        if not isinstance(value, int | float) or not _is_number(value, whole):
            self._wrong(name, _kind(whole), value, default)
            return default
        return float(value)

    def patterns(self, name: str, whole: bool = False) -> dict[str, float]:
        value = self._content.get(name)
        if not isinstance(value, dict):
            self._wrong(name, f"{_kind(whole)} by pattern", value, {})
            return {}
        for pattern, number in value.items():
            if not _is_number(number, whole):
                what = f"not a value of `{name}: {pattern[:80]}`"
                self.problems.append(Problem(what, str(self._path), _kind(whole), _shown(number)))
            elif reason := _refuse_pattern(pattern):
                what = f"a pattern of `{name}` that {reason}"
                self.problems.append(Problem(what, str(self._path), got=_shown(pattern)))
        return value

    def _wrong(self, name: str, expected: str, value: Any, default: Any) -> Any:
        if value is not None:
            self.problems.append(Problem(f"not a value of `{name}`", str(self._path), expected, _shown(value)))
        return default


def _is_number(value: Any, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return False
    return 1 <= value <= _LARGEST if whole else abs(value) <= _LARGEST


def _kind(whole: bool) -> str:
    return f"a whole number from 1 to {_LARGEST}" if whole else "a number"


def _refuse_pattern(pattern: str) -> str:
    """Return why a pattern is not matched: it is no regular expression, or one that can take for ever."""
    if len(pattern) > _LONGEST_PATTERN:
        return "is too long"
    if _UNSAFE.search(pattern) or len(_OPEN_ENDED.findall(pattern)) > _MOST_OPEN_ENDED:
        return "is too involved: no repeated groups, no lookarounds, few of * + {"
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError):
        return "is no regular expression"
    return ""


def _unknown(content: Mapping[str, Any], path: Path) -> list[Problem]:
    """Refuse what changes the meaning of A and B, and what may do so for all that is known here."""
    merged = "merge it into its base with PEFT's merge_and_unload, save that, and merge the full checkpoints"
    problems = []
    for name, value in content.items():
        if not value or name in _KNOWN:
            continue
        if name in _REFUSED:
            problems.append(Problem(f"`{name}`: {_REFUSED[name]}", str(path), got=_shown(value), remedy=merged))
        else:
            what = f"`{name[:80]}` is not known here, and may change what the adapter computes"
            remedy = "take the key out if it does not; otherwise " + merged
            problems.append(Problem(what, str(path), got=_shown(value), remedy=remedy))
    return problems


def _start(content: Mapping[str, Any], path: Path) -> list[Problem]:
    start = content.get("init_lora_weights", True)
    if any(start is plain or (isinstance(start, str) and start == plain) for plain in _PLAIN_STARTS):
        return []
    return [
        Problem(
            "training began by changing the base (PiSSA, OLoRA, CorDA, LoftQ …), or in a way that is not known here",
            str(path),
            "init_lora_weights true, false, gaussian or eva",
            _shown(start),
            "save the adapter as plain LoRA: PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)",
        )
    ]


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
