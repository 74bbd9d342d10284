"""Where vLLM asks for an adapter: the server's list of names, its check of a request, and the workers' loader.

vLLM has resolvers of its own for adapters, but asks them only if requests may also load any path
(VLLM_ALLOW_RUNTIME_LORA_UPDATING). Here requests name what is on the menu, and nothing else.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from http import HTTPStatus
from multiprocessing import parent_process
from typing import Any

from rewarded_lines.engines.cpu_adapters import group_adapters
from rewarded_lines.engines.vllm_process import vllm_device
from rewarded_lines.engines.vllm_versions import last_slot_is_shared


def install() -> None:
    """Wrap vLLM's methods in this process, once."""
    from vllm.lora import worker_manager

    _wrap(worker_manager.WorkerLoRAManager, "_load_adapter", _load_adapter)
    _wrap(worker_manager.LRUCacheWorkerLoRAManager, "add_adapter", _add_adapter)
    if vllm_device() == "cuda":
        from vllm.v1.worker.gpu import lora_utils

        _wrap(lora_utils.LoraState, "__init__", _wide_numbers)
    elif last_slot_is_shared():
        group_adapters()
    if parent_process() is None or "vllm.entrypoints.openai.models.serving" in sys.modules:
        # A server's process, not one of a worker.
        from vllm.entrypoints.openai.models import serving as models
        from vllm.entrypoints.serve.engine import serving
        from vllm.v1.metrics import stats

        _wrap(models.OpenAIServingModels, "init_static_loras", _open_menu)
        _wrap(serving.BaseServing, "_check_model", _check_model)
        _wrap(stats.LoRARequestStates, "update_scheduler_stats", _count_together)


def _wrap(kind: Any, name: str, function: Callable[..., Any]) -> None:
    """Let a method be `function`, whose first argument is what the method was."""
    own = getattr(kind, name)
    if getattr(own, "func", None) is not function:
        setattr(kind, name, _Method(function, own))


class _Method(functools.partial):
    """A method with its first argument bound."""

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """Bind the object, as functions do."""
        return self if instance is None else functools.partial(self, instance)


def _load_adapter(own: Callable[..., Any], loader: Any, request: Any) -> Any:
    """Return a merged adapter in the place of one in files."""
    from rewarded_lines.serving.merged_adapters import is_merged, merged_adapter

    return merged_adapter(loader, request) if is_merged(request) else own(loader, request)


def _add_adapter(own: Callable[..., Any], loader: Any, request: Any) -> Any:
    """Refuse a merged adapter with modules that vLLM would leave out."""
    from rewarded_lines.serving.merged_adapters import is_merged, refuse_left_out

    there = request.lora_int_id in loader.list_adapters()
    added = own(loader, request)
    if is_merged(request) and not there:
        refuse_left_out(loader, request)
    return added


def _wide_numbers(own: Callable[..., Any], state: Any, *args: Any, **named: Any) -> None:
    """Let numbers of adapters have 64 bits in vLLM's second GPU runner, too."""
    own(state, *args, **named)
    state.lora_ids = state.lora_ids.astype("int64")


async def _open_menu(own: Callable[..., Any], models: Any) -> None:
    """Open the menu once the engine runs."""
    from rewarded_lines.serving.served_policies import serve_policies

    await own(models)
    await serve_policies(models)


async def _check_model(own: Callable[..., Any], serving: Any, request: Any) -> Any:
    """Let a preference pass, or say what is wrong with it in the place of vLLM, which only knows its own names."""
    from rewarded_lines.serving.preference_names import PreferenceError

    served, name = getattr(serving.models, "served", None), request.model
    # vLLM's own adapters keep their names.
    if served and not serving._is_model_supported(name) and not dict.__contains__(serving.models.lora_requests, name):
        try:
            await served.ready(name)
        except PreferenceError as error:
            status = HTTPStatus(error.status)
            kind = "NotFoundError" if status == HTTPStatus.NOT_FOUND else "BadRequestError"
            return serving.create_error_response(str(error), kind, status, "model")
    return await own(serving, request)


def _count_together(own: Callable[..., Any], states: Any, counts: Any) -> None:
    """Count all preferences as one adapter: Prometheus keeps every set of names that it has ever seen."""
    from rewarded_lines.serving.served_policies import TOGETHER, is_served

    own(states, counts)
    for one in (counts.waiting_lora_adapters, counts.running_lora_adapters) if counts else ():
        if names := [name for name in one if is_served(name)]:
            one[TOGETHER] = sum(one.pop(name) for name in names)
