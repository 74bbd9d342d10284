"""What the project uses in vLLM, by the file that defines it, and whether a vLLM has it.

    python tests/vllm_names.py FOLDER...      # each with the code of a vLLM, such as an unpacked wheel's vllm/

vLLM's code is read, not imported. Without a folder, the installed vLLM is looked at.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_SAMPLING = "temperature top_p top_k min_p repetition_penalty stop stop_token_ids seed logprobs max_tokens"
_SEQUENCES = "inputs lora_{}_weights output_tensor b_seq_start_loc seq_len_tensor lora_indices_tensor batches"
# Of a class: its fields, methods and attributes; of a function: its parameters; of a module ("") any text.
USED_NAMES = [
    ("entrypoints/llm.py", "LLM.__init__", "model tokenizer dtype tensor_parallel_size seed runner convert"),
    ("entrypoints/llm.py", "LLM.__init__", "enforce_eager gpu_memory_utilization"),
    ("entrypoints/llm.py", "LLM.generate", "prompts sampling_params lora_request use_tqdm"),
    ("entrypoints/llm.py", "LLM.reset_prefix_cache", ""),
    ("entrypoints/llm.py", "LLM.collective_rpc", "method args"),
    ("entrypoints/pooling/offline.py", "classify", "prompts pooling_params use_tqdm"),
    ("engine/arg_utils.py", "EngineArgs", "max_model_len worker_extension_cls block_size enable_chunked_prefill"),
    ("engine/arg_utils.py", "EngineArgs", "enable_lora max_lora_rank max_loras max_cpu_loras lora_target_modules"),
    ("engine/arg_utils.py", "EngineArgs", "disable_log_stats use_tqdm_on_load load_format skip_tokenizer_init"),
    ("engine/arg_utils.py", "EngineArgs", "quantization cpu_offload_gb offload_backend pipeline_parallel_size"),
    ("config/quantization.py", "", "fp8_per_tensor fp8_per_block fp8_per_channel int8_per_channel_weight_only online"),
    ("v1/engine/llm_engine.py", "LLMEngine.add_lora", "lora_request"),
    ("v1/engine/llm_engine.py", "LLMEngine.remove_lora", "lora_id"),
    ("v1/engine/core_client.py", "InprocClient.shutdown", ""),
    ("v1/engine/core.py", "", "cleanup_dist_env_and_memory()"),
    ("v1/worker/workspace.py", "", "_manager"),
    ("config/scheduler.py", "SchedulerConfig", "max_num_seqs max_num_batched_tokens"),
    ("sampling_params.py", "SamplingParams", f"{_SAMPLING} prompt_logprobs detokenize"),
    ("sampling_params.py", "SamplingParams", "skip_reading_prefix_cache logprob_token_ids ignore_eos"),
    ("sampling_params.py", "SamplingParams", "flat_logprobs skip_clone"),
    ("logprobs.py", "FlatLogprobs", "logprobs start_indices"),
    ("pooling_params.py", "PoolingParams", "use_activation"),
    ("outputs.py", "CompletionOutput", "token_ids logprobs finish_reason"),
    ("outputs.py", "RequestOutput.__init__", "outputs num_cached_tokens prompt_logprobs"),
    ("outputs.py", "ClassificationOutput", "probs"),
    ("lora/request.py", "LoRARequest", "lora_name lora_int_id lora_path"),
    ("lora/worker_manager.py", "WorkerLoRAManager", "_adapter_manager lora_config device"),
    ("lora/worker_manager.py", "WorkerLoRAManager", "_load_adapter list_adapters remove_adapter"),
    ("lora/worker_manager.py", "LRUCacheWorkerLoRAManager.add_adapter", "lora_request"),
    ("v1/worker/gpu/lora_utils.py", "LoraState", "lora_ids"),
    ("distributed/parallel_state.py", "get_pp_group", ""),
    ("entrypoints/openai/models/serving.py", "OpenAIServingModels", "engine_client static_lora_modules lora_requests"),
    ("entrypoints/openai/models/serving.py", "OpenAIServingModels", "model_config registry"),
    ("entrypoints/serve/engine/serving.py", "BaseServing", "models _is_model_supported create_error_response"),
    ("entrypoints/openai/models/serving.py", "", "init_static_loras"),
    ("entrypoints/serve/engine/serving.py", "", "_check_model"),
    ("v1/metrics/stats.py", "LoRARequestStates.update_scheduler_stats", "scheduler_stats"),
    ("v1/metrics/stats.py", "SchedulerStats", "waiting_lora_adapters running_lora_adapters"),
    ("config/lora.py", "LoRAConfig", "max_lora_rank lora_dtype default_mm_loras"),
    ("lora/model_manager.py", "LoRAModelManager", "modules model get_adapter add_adapter activate_adapter"),
    ("lora/lora_model.py", "LoRAModel", "loras"),
    ("lora/lora_model.py", "LoRAModel.from_lora_tensors", "lora_model_id tensors peft_helper device dtype"),
    ("lora/lora_model.py", "LoRAModel.from_lora_tensors", "weights_mapper skip_prefixes"),
    ("lora/lora_weights.py", "LoRALayerWeights", "lora_a lora_b"),
    ("lora/peft_helper.py", "PEFTHelper", "r lora_alpha target_modules validate_legal"),
    ("config/lora.py", "", "1, 8, 16, 32, 64, 128, 256, 320, 512"),
    ("v1/worker/gpu_worker.py", "Worker", "reload_weights get_model model_runner"),
    ("v1/worker/gpu_model_runner.py", "GPUModelRunner.reload_weights", "weights_iterator"),
    ("v1/worker/gpu/model_runner.py", "GPUModelRunner", "reload_weights get_model lora_manager"),
    ("v1/worker/worker_base.py", "WorkerBase", "device parallel_config"),
    ("distributed/parallel_state.py", "get_tp_group", ""),
    ("distributed/parallel_state.py", "GroupCoordinator", "device_group cpu_group rank_in_group world_size"),
    ("v1/worker/cpu_worker.py", "", "VLLM_DIST_IDENT"),
    ("lora/punica_wrapper/punica_cpu.py", "", "bgmv_shrink bgmv_expand bgmv_expand_slice"),
    ("lora/punica_wrapper/punica_cpu.py", "", "sgmv_shrink sgmv_expand sgmv_expand_slice"),
    (
        "lora/ops/torch_ops/lora_ops.py",
        "bgmv_shrink",
        "inputs lora_b_weights output_tensor lora_indices_tensor scaling",
    ),
    ("lora/ops/torch_ops/lora_ops.py", "sgmv_shrink", f"{_SEQUENCES.format('a')} max_seq_length token_nums scaling"),
    ("lora/ops/torch_ops/lora_ops.py", "sgmv_expand", f"{_SEQUENCES.format('b')} max_seq_length token_nums add_inputs"),
    ("lora/ops/torch_ops/lora_ops.py", "bgmv_expand_slice", "slice_offset slice_size add_inputs"),
    (
        "model_executor/layers/vocab_parallel_embedding.py",
        "UnquantizedEmbeddingMethod",
        "process_weights_after_loading",
    ),
    ("model_executor/layers/utils.py", "", "cpu_linear"),
    ("v1/engine/async_llm.py", "", "pause_generation resume_generation collective_rpc mode"),
    ("entrypoints/openai/api_server.py", "", "__main__ run_server"),
    ("entrypoints/openai/models/serving.py", "", "OpenAIServingModels self.base_model_paths"),
    ("entrypoints/serve/lora/protocol.py", "LoadLoRAAdapterRequest", "lora_name lora_path"),
    ("entrypoints/serve/lora/api_router.py", "", "/v1/load_lora_adapter /v1/unload_lora_adapter"),
    ("entrypoints/openai/completion/protocol.py", "CompletionRequest", f"{_SAMPLING} prompt_logprobs return_token_ids"),
    ("entrypoints/openai/completion/protocol.py", "CompletionRequest", "presence_penalty frequency_penalty"),
    ("envs.py", "", "VLLM_ENABLE_V1_MULTIPROCESSING VLLM_CPU_KVCACHE_SPACE VLLM_CPU_OMP_THREADS_BIND"),
    ("envs.py", "", "VLLM_LOGGING_LEVEL VLLM_LOGGING_STREAM VLLM_NO_USAGE_STATS VLLM_BATCH_INVARIANT"),
    ("envs.py", "", "VLLM_ALLOW_RUNTIME_LORA_UPDATING VLLM_API_KEY"),
]


def missing_names(vllm: Path) -> list[str]:
    """Return what a folder with vLLM's code lacks, such as "outputs.py: CompletionOutput.token_ids"."""
    found = []
    for file, where, names in USED_NAMES:
        path = vllm / file
        if not path.is_file() or (where and _definition(path, where) is None):
            found.append(f"{file}: {where or 'the file'}")
            continue
        have = set(_names_in(path, where)) if where else path.read_text()
        found += [f"{file}: {where}.{name}" for name in names.split() if name not in have]
    return found


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _definition(path: Path, where: str) -> ast.AST | None:
    """Return the class, function or method with a name such as "LLM.generate"."""
    node: ast.AST | None = _tree(path)
    for part in where.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        below = ast.walk(node) if node else ()
        node = next((one for one in below if isinstance(one, kinds) and one.name == part), None)
    return node


def _names_in(path: Path, where: str) -> Iterator[str]:
    """Yield the parameters of a function; of a class the names of its methods, its fields and attributes."""
    definition = _definition(path, where)
    if isinstance(definition, ast.FunctionDef):
        yield from (argument.arg for argument in [*definition.args.args, *definition.args.kwonlyargs])
        return
    assert definition is not None
    for node in ast.walk(definition):
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def installed_vllm() -> Path | None:
    """Return the folder of the installed vLLM, without importing it."""
    found = find_spec("vllm")
    return Path(str(found.origin)).parent if found else None


if __name__ == "__main__":
    for folder in [Path(name) for name in sys.argv[1:]] or [installed_vllm()]:
        sys.stdout.write(f"{folder}: {'; '.join(missing_names(folder)) or 'has all names'}\n")
