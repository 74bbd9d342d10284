"""The settings of the vLLM engine: `engine:` in a project file, and `--engine-arg KEY=VALUE`.

Nothing here needs vLLM. Which arguments the installed version has is checked where an engine is chosen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, model_validator

from rewarded_lines.config_values import Strict

_WEIGHTS = "the weights are those of the files that are merged"
_TEXTS = "merges bring their own tokenizer; write `tokenizer:`"
_ADAPTERS = "the policies' adapters decide it"
_WORKERS = "this project spreads points over engines by itself; use `--ray`"
_GENERATES = "this engine writes texts"
_ANSWERS = "write `generation:`"
# Arguments of vLLM that this project sets by itself, with the reason or what to write instead.
_OWN = {
    "model": "write `base:`",
    "dtype": "write `generation.dtype`",
    "seed": "each response has a seed of its own; write `generation.seed`",
    **dict.fromkeys(("tokenizer", "tokenizer_mode", "tokenizer_revision", "skip_tokenizer_init"), _TEXTS),
    **dict.fromkeys(("load_format", "model_loader_extra_config", "model_weights", "ignore_patterns"), _WEIGHTS),
    **dict.fromkeys(("revision", "code_revision", "hf_config_path", "config_format"), _WEIGHTS),
    **dict.fromkeys(("enable_lora", "max_loras", "max_lora_rank", "max_cpu_loras", "lora_target_modules"), _ADAPTERS),
    **dict.fromkeys(("runner", "convert", "pooler_config", "task"), _GENERATES),
    **dict.fromkeys(("generation_config", "override_generation_config"), _ANSWERS),
    "pipeline_parallel_size": "a merge enters workers that hold a part of every layer; use `tensor_parallel_size`",
    **dict.fromkeys(("worker_cls", "worker_extension_cls"), "merged weights enter the engine through it"),
    "logprobs_mode": "the KL needs the raw log-probabilities",
    "trust_remote_code": "code that comes with a checkpoint is never run",
    "hf_token": "records would show it; set the variable HF_TOKEN",
    "disable_log_stats": "progress and times are told by this project",
    "use_tqdm_on_load": "progress and times are told by this project",
}
# Arguments that change speed and memory, and of an answer at most how its last bits are rounded.
_FREE = {
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "swap_space", "block_size"),
    *("max_num_seqs", "max_num_batched_tokens", "max_num_partial_prefills", "enable_chunked_prefill"),
    *("enable_prefix_caching", "prefix_caching_hash_algo", "async_scheduling", "scheduling_policy"),
    *("tensor_parallel_size", "distributed_executor_backend", "disable_custom_all_reduce"),
    *("enforce_eager", "cudagraph_capture_sizes", "max_cudagraph_capture_size"),
    *("max_parallel_loading_workers", "download_dir", "served_model_name", "log_level"),
}
_FREE_BEGINNINGS = ("offload_", "cpu_offload_", "safetensors_", "numa_", "distributed_timeout_")


class EngineSettings(Strict):
    """How vLLM starts. Each key beside these two is an argument of vLLM's `EngineArgs` and stands in `args`.

    `resident` says where base and policies wait for the next merge: in the memory of the GPU, in that of the host, or
    on disk. With `attention: batch-invariant` a response has the same bits whatever else is in its batch.
    """

    model_config = ConfigDict(extra="allow")
    resident: Literal["auto", "gpu", "host", "disk"] = "auto"
    attention: Literal["default", "batch-invariant"] = "default"

    @model_validator(mode="after")
    def _usable(self) -> EngineSettings:
        parallel = self.args.get("tensor_parallel_size", 1)
        if type(parallel) is not int or parallel < 1:
            raise ValueError(f"`tensor_parallel_size` is a number of devices, not {parallel!r}")
        share = self.args.get("gpu_memory_utilization")
        if share is not None and (type(share) not in (int, float) or not 0 < share <= 1):
            raise ValueError(f"`gpu_memory_utilization` is a number above 0 and at most 1, not {share!r}")
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            count = self.args.get(name)
            if count is not None and (type(count) is not int or count < 1):
                raise ValueError(f"`{name}` is a whole number of 1 or more, not {count!r}")
        for name, value in self.args.items():
            if reason := own_reason(name):
                raise ValueError(f"`{name}` is not for you to set: {reason}")
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(f"`{name}`: {value!r} is no text, number, list or mapping; quote it") from error
        return self

    @property
    def args(self) -> dict[str, Any]:
        """The arguments of vLLM's `EngineArgs`."""
        return dict(self.model_extra or {})

    @property
    def tensor_parallel(self) -> int:
        """The number of devices over which vLLM spreads the model."""
        return int(self.args.get("tensor_parallel_size", 1))

    def as_dict(self) -> dict[str, Any]:
        """Return what differs from the defaults."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def over(self, given: Mapping[str, Any]) -> EngineSettings:
        """Return these settings with others over them; None takes a setting back.

        Raises:
            ValidationError: a value does not fit, or the project sets it by itself.
        """
        content = {name: value for name, value in {**self.as_dict(), **given}.items() if value is not None}
        return EngineSettings.model_validate(content)

    def decides(self) -> dict[str, Any]:
        """Return the settings that decide responses: all but those of speed and memory."""
        free = {"resident", *_FREE}
        found = self.as_dict().items()
        return {name: one for name, one in found if name not in free and not name.startswith(_FREE_BEGINNINGS)}


def own_reason(name: str) -> str:
    """Return why the user cannot set an argument of vLLM, "" for those that are the user's."""
    return _WORKERS if name.startswith("data_parallel_") else _OWN.get(name, "")
