"""The settings of a merged adapter, as PEFT reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rewarded_lines.checkpoints.adapter_config import TRAINING_ONLY
from rewarded_lines.checkpoints.adapters import Adapter
from rewarded_lines.checkpoints.families import TIED_HEADS
from rewarded_lines.merger.lora_stacking import AdapterOutput, Stack

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's max_lora_rank can take."""


def served_rank(rank: int) -> int:
    """Return the max_lora_rank that vLLM needs for adapters of a rank; a rank above all of them stays."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), rank)


def adapter_config(adapters: Sequence[Adapter], output: AdapterOutput, modules: int, base: str) -> dict[str, Any]:
    """Return the adapter_config.json of an output: α = r for every module, so that its scaling is 1.

    r is the largest rank, by which engines allocate memory. `rank_pattern` and `alpha_pattern` name modules of another
    rank, anchored and in full. An output that repeats a policy keeps that policy's settings. `modules` is the number
    of modules of all policies; `base` is recorded if the policies name different bases or none.
    Without `adapters`, every module is named.
    """
    if output.copied is not None:
        content = adapters[output.copied].config.content
        return {key: value for key, value in content.items() if not (value and key in TRAINING_ONLY)}
    rank = max((stack.rank for stack in output.stacks.values()), default=1)
    # PEFT adds `(.*\.)?(` before a pattern and `)$` after it.
    others = {f"^{re.escape(name)}": stack.rank for name, stack in output.stacks.items() if stack.rank != rank}
    contents = [adapter.config.content for adapter in adapters]
    shared: dict[str, Any] = {}
    for key in ("auto_mapping", "base_model_name_or_path", "revision", "task_type"):
        values = [content.get(key) for content in contents]
        shared[key] = values[0] if values and all(value == values[0] for value in values) else None
    settings = {
        "auto_mapping": shared["auto_mapping"],
        "base_model_name_or_path": shared["base_model_name_or_path"] or base,
        "bias": _bias(adapters, output),
        "fan_in_fan_out": any(adapter.config.fan_in_fan_out for adapter in adapters),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": _modules_to_save(adapters, output),
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "revision": shared["revision"],
        "task_type": shared["task_type"],
        "use_dora": False,
        "use_rslora": False,
        "trainable_token_indices": _tokens(output),
        **_targets(adapters, output.stacks, modules),
    }
    # Earlier versions of PEFT do not know these keys.
    newer = {"trainable_token_indices", "target_parameters"}
    return {key: value for key, value in settings.items() if value is not None or key not in newer}


def _targets(adapters: Sequence[Adapter], stacks: Mapping[str, Stack], modules: int) -> dict[str, Any]:
    """Return the keys that choose modules: the policies' own if they are equal, else every module by name."""
    keys = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern")
    wanted = [[_sorted(adapter.config.content.get(key)) for key in keys] for adapter in adapters]
    # With `ensure_weight_tying` PEFT does not name the head, whose factors are written here.
    tied = any(adapter.config.tied for adapter in adapters)
    if wanted and all(other == wanted[0] for other in wanted) and len(stacks) == modules and not tied:
        return dict(zip(keys, wanted[0], strict=True))
    named = [name for name, stack in stacks.items() if not stack.like.experts]
    bare = [name for name, stack in stacks.items() if stack.like.experts]
    return dict.fromkeys(keys) | {"target_modules": named or None, "target_parameters": bare or None}


def _tokens(output: AdapterOutput) -> dict[str, list[int]] | None:
    """Return the tokens whose rows the output replaces, by embedding."""
    names = {output.own_names.get(name, name): tokens for name, tokens in output.rows.items() if name in output.whole}
    return {name.removesuffix(".weight"): list(tokens) for name, tokens in names.items()} or None


def _modules_to_save(adapters: Sequence[Adapter], output: AdapterOutput) -> list[str] | None:
    """Return the policies' entries for a tensor saved whole, or for a module that contains one."""
    parts = [output.own_names.get(name, name).split(".")[:-1] for name in output.whole]
    around = {".".join(names[:count]) for names in parts for count in range(1, len(names) + 1)}
    entries = sorted({entry for adapter in adapters for entry in adapter.config.modules_to_save})
    if any(adapter.config.tied for adapter in adapters):
        # PEFT ties the head without naming it.
        entries += [head.removesuffix(".weight") for head in TIED_HEADS if head in output.whole]
    return [entry for entry in entries if any(name.endswith(entry) for name in around)] or None


def _bias(adapters: Sequence[Adapter], output: AdapterOutput) -> str:
    """Return the widest of the policies' settings, "none" if the output has no biases."""
    kinds = {adapter.config.bias for adapter in adapters}
    if not any(name.endswith(".bias") for name in output.whole):
        return "none"
    return next((kind for kind in ("all", "lora_only") if kind in kinds), "none")


def _sorted(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
