"""Read adapter_config.json strictly: an unknown setting that may change the adapter is refused."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from rewarded_lines.checkpoints.headers import damaged
from rewarded_lines.checkpoints.reader import read_json_object
from rewarded_lines.errors import Problem, UserError, fail

ADAPTER_CONFIG = "adapter_config.json"
MERGE_IN_PEFT = "merge it into its base with PEFT's merge_and_unload, save that, and merge the full checkpoints"
_LARGEST = 1 << 20
_MOST_ROWS = 1 << 30
_LONGEST_PATTERN = 2000
_SECONDS_OF_MATCHING = 20.0
# A quantifier on a group, a lookaround, a back reference: these can make the time of a match explode.
_UNSAFE = re.compile(r"\)[*+{]|\(\?(?!:)|\\[1-9kK]")
_OPEN_ENDED = re.compile(r"[*+{]")
_MOST_OPEN_ENDED = 3
# Settings that do not change B·A, or that `AdapterConfig` reads.
_KNOWN = frozenset(
    "peft_type task_type auto_mapping base_model_name_or_path revision inference_mode peft_version r lora_alpha "
    "lora_dropout rank_pattern alpha_pattern use_rslora fan_in_fan_out bias modules_to_save init_lora_weights "
    "target_modules exclude_modules layers_to_transform layers_pattern megatron_core qalora_group_size runtime_config "
    "eva_config corda_config loftq_config lora_ga_config target_parameters trainable_token_indices "
    "ensure_weight_tying velora_config monteclora_config merge_weights".split()
)
# Of these only training is another: a merged adapter is a plain one, so its settings do not have them.
TRAINING_ONLY = ("velora_config", "monteclora_config")
_REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA scales whole columns by learned magnitudes: a sum of adapters is not an adapter",
    "use_qalora": "QA-LoRA pools its inputs, B·A is not its residual",
    "lora_bias": "B has a bias, which no matrix of the base can hold",
    "layer_replication": "it repeats the base's blocks: another architecture",
    "megatron_config": "its tensors are cut for Megatron",
    "alora_invocation_tokens": "aLoRA works from an invocation on, not on every token",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes between adapters token by token",
    "kasa_config": "KaSA changes the base's own weights",
}


# PEFT cannot merge these into the base, or makes another architecture of it.
_NEVER_MERGED = ("use_qalora", "layer_replication", "megatron_config", "alora_invocation_tokens", "arrow_config")
# Nor these types, which add something beside the base's matrices.
_UNMERGEABLE = frozenset(
    "PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING ADAPTION_PROMPT CPT CARTRIDGE XLORA POLY".split()
)


def _matchable(pattern: str) -> str:
    """Return the pattern; refuse one that is not a regular expression or may take too long to match."""
    if len(pattern) > _LONGEST_PATTERN:
        raise ValueError("the pattern is too long")
    if _UNSAFE.search(pattern) or len(_OPEN_ENDED.findall(pattern)) > _MOST_OPEN_ENDED:
        raise ValueError("the pattern is too involved: no repeated groups, no lookarounds, few of * + {")
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError("the pattern is not a regular expression") from error
    return pattern


_Rank = Annotated[int, Field(ge=1, le=_LARGEST)]
_Limits = Field(ge=-_LARGEST, le=_LARGEST)
_Pattern = Annotated[str, AfterValidator(_matchable)]
_Name = Annotated[str, Field(min_length=1)]
_Row = Annotated[int, Field(ge=0, le=_MOST_ROWS)]


class AdapterConfig(BaseModel):
    """The settings of a LoRA adapter that determine what it computes.

    Attributes:
        content: the whole file.
        base: the model that it was trained from; "" if unknown.
        rank: r of the modules that no pattern matches.
        alpha: α of the modules that no pattern matches.
        rslora: the scaling is α/√r instead of α/r.
        fan_in_fan_out: the layers store [in, out].
        modules_to_save: ends of the names of modules that the adapter replaces as a whole.
        target_modules: ends of the names of modules with a matrix that the adapter changes, or one pattern.
        target_parameters: ends of the names of bare parameters that it changes, such as the fused experts of a mixture.
        tokens: the rows that it replaces in an embedding; in several, by the end of the embedding's name.
        tied: it changes head and embeddings alike.
        start: the initialization. Other ways change the base; True and False are PEFT's own.
    """

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    content: dict[str, Any]
    base: str = Field("", alias="base_model_name_or_path")
    rank: _Rank = Field(8, alias="r")
    alpha: Annotated[float, _Limits] = Field(8.0, alias="lora_alpha")
    rank_pattern: dict[_Pattern, _Rank] = {}
    # Whole numbers stay whole: the hash of the settings identifies an adapter in runs.
    alpha_pattern: dict[_Pattern, Annotated[int, _Limits] | Annotated[float, _Limits]] = {}
    rslora: bool = Field(False, alias="use_rslora")
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[_Name] = []
    target_modules: list[_Name] | str = []
    target_parameters: list[_Name] = []
    tokens: list[_Row] | dict[_Name, list[_Row]] = Field([], alias="trainable_token_indices")
    tied: bool = Field(False, alias="ensure_weight_tying")
    start: bool | Literal["gaussian", "eva", "orthogonal", "mica"] = Field(True, alias="init_lora_weights")

    def computes(self) -> dict[str, Any]:
        """Return the settings that determine what the adapter computes, for its hash."""
        # Settings that later versions read count only if they are set, so that hashes in run folders stay.
        later = {name for name in ("target_parameters", "tokens", "tied") if not getattr(self, name)}
        return self.model_dump(exclude={"content", "base", "start", "target_modules", *later})

    def scaling(self, rank: int, alpha: float) -> float:
        """Return the factor of B·A: α/r, or α/√r for rsLoRA (arXiv 2312.03732)."""
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Return the settings of a PEFT folder.

    Raises:
        UserError: all problems: not LoRA, a variant that is not a sum of B·A, wrong values.
    """
    path = folder / ADAPTER_CONFIG
    content = read_json_object(path)
    if content.get("peft_type") != "LORA":
        raise _other_type(content, path)
    problems = _unknown(content, path)
    try:
        given = {name: value for name, value in content.items() if value is not None}
        config = AdapterConfig.model_validate({**given, "content": content})
    except ValidationError as error:
        problems += _wrong_values(error, content, path)
    if not problems and config.alpha == 0:
        what, remedy = "lora_alpha is 0, so the adapter changes nothing", "write there what the training had"
        problems.append(Problem(what, str(path), remedy=f"{remedy}; verl's model_merger leaves a 0 to be filled in"))
    if problems:
        raise UserError(problems)
    return config


def _other_type(content: Mapping[str, Any], path: Path) -> UserError:
    """Return the error for an adapter that is not PEFT's LoRA."""
    kind = content.get("peft_type")
    if kind is None:
        what = "no adapter of PEFT: the settings have no peft_type"
        remedy = "fold it into its base with the tool that made it (MLX: mlx_lm.fuse), and merge the full checkpoints"
        return fail(what, where=str(path), expected="peft_type LORA", remedy=remedy)
    remedy = "" if str(kind) in _UNMERGEABLE else MERGE_IN_PEFT
    return fail(f"an adapter of type {_shown(kind)}", where=str(path), expected="LORA", remedy=remedy)


def match_patterns(
    patterns: Mapping[str, float], modules: Iterable[str], default: float, path: Path
) -> dict[str, float]:
    """Return the value of each module: of the first pattern that matches the end of its name, as in PEFT.

    PEFT matches `(.*\\.)?(PATTERN)$` from the start of the name. Malicious patterns take too long and are refused.

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


def is_matchable(pattern: str) -> bool:
    """Return whether a pattern is a regular expression that cannot take too long to match."""
    try:
        return bool(_matchable(pattern))
    except ValueError:
        return False


def _unknown(content: Mapping[str, Any], path: Path) -> list[Problem]:
    """Return the problems of settings that change the meaning of A and B, or may change it."""
    problems = []
    for name, value in content.items():
        if not value or name in _KNOWN:
            continue
        what, remedy = f"`{name}`: {_REFUSED.get(name)}", "" if name in _NEVER_MERGED else MERGE_IN_PEFT
        if name == "lora_bias":
            remedy = f"if the base's layers have biases, {MERGE_IN_PEFT}; otherwise PEFT cannot merge it either"
        if name not in _REFUSED:
            what = f"`{name[:80]}` is not known here, and may change what the adapter computes"
            remedy = "remove the key if it does not; otherwise " + MERGE_IN_PEFT
        problems.append(Problem(what, str(path), got=_shown(value), remedy=remedy))
    return problems


def _wrong_values(error: ValidationError, content: Mapping[str, Any], path: Path) -> list[Problem]:
    """Return one problem for each wrong value, and for each wrong entry of the patterns."""
    problems: dict[str, Problem] = {}
    for detail in error.errors():
        name, *entry = map(str, detail["loc"])
        place = f"{name}: {entry[0][:80]}" if entry and isinstance(content[name], dict) else name
        what, remedy = f"not a value of `{place}`", ""
        expected = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        if name == "init_lora_weights":
            what = "training began by changing the base (PiSSA, OLoRA, CorDA, LoftQ …), or in an unknown way"
            expected = "init_lora_weights true, false, gaussian, eva, orthogonal or mica"
            conversion = "save_pretrained(path_initial_model_for_weight_conversion=…)"
            remedy = f"save the adapter as plain LoRA: PEFT's {conversion}"
        problems.setdefault(place, Problem(what, str(path), expected, _shown(detail["input"]), remedy))
    return list(problems.values())


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
