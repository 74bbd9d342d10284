"""Merged adapters in vLLM's workers: made from the policies' factors when vLLM wants to load one.

A request of vLLM for an adapter carries the merge and the places of base and policies in the place of a path. So every
worker can make the adapter by itself, at any time: vLLM may forget it and ask again. There are no files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rewarded_lines.errors import fail

_PREFIX = "rewarded-lines:"
_HELD = "held_by_rewarded_lines"


def adapter_path(source: Mapping[str, Any], merge: Mapping[str, Any]) -> str:
    """Return what vLLM gets in the place of an adapter's path.

    Args:
        source: the arguments of `plan_adapters`.
        merge: of `MergeSpec.as_dict`.
    """
    # Unsorted: the weights are in the order of the policies.
    return _PREFIX + json.dumps({"source": source, "merge": merge})


def is_merged(request: Any) -> bool:
    """True if a request of vLLM is for a merged adapter."""
    return str(request.lora_path).startswith(_PREFIX)


def merged_adapter(loader: Any, request: Any) -> Any:
    """Return vLLM's form of the merged adapter that a request is for.

    Args:
        loader: vLLM's `WorkerLoRAManager`.
        request: its `LoRARequest`.
    """
    from rewarded_lines.engines.vllm_versions import let_vllm_search_modules

    let_vllm_search_modules()
    from rewarded_lines.engines.resident_adapters import ResidentAdapters, as_vllm_adapter
    from rewarded_lines.merger.open_inputs import plan_adapters
    from rewarded_lines.merger.spec import MergeSpec

    message = json.loads(request.lora_path[len(_PREFIX) :])
    source = message["source"]
    held = getattr(loader, _HELD, None)
    if held is None or held[0] != source:
        # In the host's memory: vLLM has given the GPU's to its cache.
        held = source, ResidentAdapters(plan_adapters(**source), "cpu")
        setattr(loader, _HELD, held)
    return as_vllm_adapter(loader, request.lora_int_id, held[1].tensors(MergeSpec.from_dict(message["merge"])))


def refuse_left_out(loader: Any, request: Any) -> None:
    """Refuse a loaded adapter with modules that the model lacks: vLLM leaves them out without a word."""
    from vllm.distributed.parallel_state import get_pp_group

    manager = loader._adapter_manager
    left = sorted(set(manager.get_adapter(request.lora_int_id).loras) - set(manager.modules))
    # With a pipeline, other workers have the other layers.
    if left and get_pp_group().world_size == 1:
        loader.remove_adapter(request.lora_int_id)
        remedy = "merge with `--as full` and serve the result"
        raise fail(
            "vLLM leaves out modules of the adapters", where=request.lora_name, got=", ".join(left[:3]), remedy=remedy
        )
