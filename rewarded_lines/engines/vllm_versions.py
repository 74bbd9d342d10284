"""The start of vLLM, whichever version is installed, and what differs between versions.

What the project calls in vLLM has the same names from 0.26 to 0.32, on both of its GPU runners; `USED_NAMES` in
tests/engines/test_vllm_versions.py lists them. What differs stands here.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from packaging.version import Version

from rewarded_lines.engine_settings import EngineSettings
from rewarded_lines.engines.vllm_arguments import WHERE, check_device, choose_kernels, vllm_version
from rewarded_lines.engines.vllm_memory import few_at_once, memory_share
from rewarded_lines.engines.vllm_process import enlist, vllm_device
from rewarded_lines.errors import fail
from rewarded_lines.out_of_memory import ran_out
from rewarded_lines.processes import VLLM_SETTINGS

_OTHERWISE = "see what vLLM wrote above, or use `--engine hf`"
_MORE_ROOM = (
    "leave it more memory: `resident: host`, a smaller `max_model_len`, another `gpu_memory_utilization`, or more "
    "devices with `tensor_parallel_size`. Or give rewards less: `--reward-memory`, `--offload always`, "
    "`dtype: bfloat16`, `device: cpu`. An engine on a CPU keeps VLLM_CPU_KVCACHE_SPACE gigabytes, 1 by default"
)


def start_vllm(
    size: float = 0, settings: EngineSettings | None = None, spare: int = 0, beside: int = 0, **options: Any
) -> Any:
    """Start a vLLM engine in this process.

    Args:
        size: bytes of a GPU that it may take; 0 means most of the free ones.
        spare: bytes of a GPU that it must leave free beside a tenth, for reward models.
        beside: bytes of a GPU that it must leave free for base and policies and their merges.
        settings: the user's, whose arguments replace those of `options`; by default none, and vLLM keeps its mode.
        options: of vLLM's `LLM`. Without `enforce_eager`, nothing is compiled and no CUDA graph is captured.

    Raises:
        UserError: the engine of a policy does not start, or this machine cannot serve the settings.
        MemoryError: there is no room for one of `size` bytes; others may leave.
    """
    if settings is not None:
        check_device(settings)
    let_vllm_search_modules()
    LLM = load_vllm(settings)
    options, own = {"enforce_eager": True, **options}, settings.args if settings else {}
    if vllm_device() == "cuda":
        options = (few_at_once(options.get("max_model_len", 0)) if size else {}) | options
        if "gpu_memory_utilization" not in own:
            devices = settings.tensor_parallel if settings else 1
            options["gpu_memory_utilization"] = memory_share(size, spare, beside, devices)
    options |= own
    with warnings.catch_warnings(), _told(size, settings):
        # While it searches modules for kernels, it comes across names that torch deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        llm = LLM(seed=0, disable_log_stats=True, use_tqdm_on_load=False, **options)
    enlist(llm)
    return llm


@contextmanager
def _told(size: float, settings: EngineSettings | None) -> Iterator[None]:
    """Tell a failed start as a user's error; of a reward's engine, which has a size, only that memory ran out."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        full = ran_out(error)
        if size and full:
            raise MemoryError(str(error)) from error
        if size or settings is None:
            raise
        given = ", ".join(f"{name}: {value}" for name, value in settings.as_dict().items())
        remedy = f"correct the settings, or leave them out; or {_OTHERWISE}" if given else _OTHERWISE
        what = "vLLM does not start" + (f" with {given}" if given else "")
        raise fail(what, where=WHERE, got=str(error), remedy=_MORE_ROOM if full else remedy) from error


def finds_compiler() -> bool:
    """Return whether Triton can build what CUDA graphs need: with a C compiler and Python's headers; warn if not."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if compiler and headers.is_file():
        return True
    lacking = f"{headers} is missing" if compiler else "there is no C compiler"
    warnings.warn(f"{lacking}: vLLM runs without CUDA graphs, slower; install gcc and python3-dev", stacklevel=2)
    return False


def load_vllm(settings: EngineSettings | None = None) -> Any:
    """Import vLLM, which takes ten seconds, and return its class `LLM`.

    Raises:
        UserError: an earlier import in this process chose other kernels than the settings ask for.
    """
    if settings is not None:
        choose_kernels(settings)
    # vLLM reads the environment at its import; the user's own settings stay.
    for name, value in VLLM_SETTINGS.items():
        os.environ.setdefault(name, value)
    # vLLM sets this level, too, but not before its first warning.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    from vllm import LLM

    return LLM


def let_vllm_search_modules() -> None:
    """Let vLLM's search for kernels pass llvmlite, which merges import. Call it before vLLM builds its model.

    From 0.31 vLLM looks, on a CPU, at `__dict__` of each object in all modules. llvmlite's library gives a function for
    any name, so for that, too, and vLLM fails: "'_lib_fn_wrapper' object has no attribute 'get'".
    """
    foreign = sys.modules.get("llvmlite.binding.ffi")
    library = getattr(foreign, "lib", None)
    if library is None or isinstance(getattr(library, "__dict__", {}), dict):
        return
    kind = type(library)
    own = kind.__getattr__

    def of_its_functions(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return own(self, name)

    kind.__getattr__ = of_its_functions


def last_slot_is_shared() -> bool:
    """Return whether vLLM on a CPU gives tokens without an adapter (slot -1) the adapter of the last slot."""
    return Version(vllm_version()) < Version("0.33")


def without_stacking(mapper: Any) -> Any:
    """Return the renames of a model's tensors without those that fuse several, as vLLM takes them for adapters."""
    if mapper is None:
        return None
    # vLLM 0.29 gave the method another name.
    return mapper.get_rename_mapper() if hasattr(mapper, "get_rename_mapper") else mapper.get_unstacked_mapper()
