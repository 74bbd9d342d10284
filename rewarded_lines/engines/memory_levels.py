"""Where base and policies wait for the next merge: the choice, from sizes and free memory. Nothing is loaded here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from rewarded_lines.checkpoints.reader import TensorFiles, total_bytes
from rewarded_lines.engine_settings import EngineSettings
from rewarded_lines.engines.vllm_process import vllm_device
from rewarded_lines.merger.model_plan import ModelPlan
from rewarded_lines.processes import available_memory

# Values that are merged at a time on a device.
CHUNK = 1 << 23
Level = Literal["gpu", "host", "disk"]
LEVELS: tuple[Level, ...] = ("gpu", "host", "disk")
# The engine and the inputs leave the rest of a GPU's free memory to torch's reserve and to others.
_SHARE_OF_GPU = 0.9
# Of all engines on a machine together; the rest of the host's memory serves files and rewards.
_SHARE_OF_HOST = 0.3
# Nobody needs to be told where fewer bytes are.
_WORTH_TELLING = 100 << 20
# Activations, CUDA graphs and the smallest useful cache of keys and values.
_CACHE = 4 << 30


@dataclass(frozen=True)
class Sizes:
    """Bytes that are needed, on one device.

    Attributes:
        inputs: base and policies as stored.
        host: likewise in the host's memory, of all devices that share it.
        working: on a GPU, what is being merged.
        engine: on a GPU, the engine with its weights, at least.
    """

    inputs: int
    host: int
    working: int = 0
    engine: int = 0


@dataclass(frozen=True)
class Place:
    """Where the inputs wait.

    Attributes:
        level: on the GPU, in the host's memory, on disk.
        beside: bytes of a GPU that the engine leaves free.
        why: in words, for the log; "" if it is not worth telling.
    """

    level: Level
    beside: int
    why: str


def choose_level(asked: str, sizes: Sizes, gpu: int, host: int, engines: int = 1) -> Place:
    """Return the fastest level that has room, from the one that is asked for downwards.

    Args:
        asked: "auto" means the fastest; for an engine on a CPU, where the system keeps files that are read again in
            memory anyway, the disk.
        sizes: what is needed.
        gpu: free bytes of the GPU on which the engine runs; 0 without a GPU.
        host: bytes of the host's memory that can be allocated without swapping.
        engines: so many share the host, and may start at the same time.
    """
    first = (0 if gpu else 2) if asked == "auto" else [str(level) for level in LEVELS].index(asked)
    whys = ["there is no GPU"] if asked == "gpu" and not gpu else []
    needed = {"gpu": sizes.inputs + sizes.working, "host": sizes.host}
    room = {"gpu": int(_SHARE_OF_GPU * gpu) - sizes.engine, "host": int(_SHARE_OF_HOST * host) // engines}
    shared = f", as one of {engines} engines" if engines > 1 else ""
    where = {"gpu": "on the GPU, beside the engine", "host": f"in the host's memory{shared}"}
    if gpu and sizes.working > room["gpu"]:
        whys.append(f"no room to merge on the GPU ({_gb(sizes.working)} needed, {_gb(room['gpu'])} there)")
        first = 2
    for level in LEVELS[first:2]:
        if level == "gpu" and not gpu:
            continue
        if needed[level] <= room[level]:
            beside = sizes.working + (sizes.inputs if level == "gpu" else 0)
            stay = f"base and policies stay {where[level]} ({_gb(needed[level])} of {_gb(room[level])})"
            return Place(level, beside, "; ".join([*whys, stay]))
        whys.append(f"no room {where[level]} ({_gb(needed[level])} needed, {_gb(room[level])} there)")
    return Place("disk", 0, "; ".join([*whys, "base and policies are read from disk for every merge"]))


def _gb(size: int) -> str:
    return f"{max(0, size) / 1e9:.1f} GB"


def stored_bytes(plan: ModelPlan) -> int:
    """Return the bytes that base and policies take in memory, as stored."""
    floats = {info.name for info in plan.outputs() if info.dtype.floating}
    base, *policies = plan.sources
    kept = [base.tensors[name] for name in plan.names]
    kept += [source.tensors[name] for source in policies for name in floats if name in source.tensors]
    return total_bytes(kept)


def place_for(
    plan: ModelPlan, settings: EngineSettings, spare: int = 0, engine: int | None = None, engines: int = 1
) -> Place:
    """Return where a plan's inputs wait, beside an engine on this machine's first GPU, or on its CPU.

    Devices share the inputs on GPUs, but not on CPUs. On each GPU `spare` bytes must stay free for others, and the
    `engine` still needs so many: by default those of vLLM, one output and a cache. For `engines` see `choose_level`.
    """
    import torch

    if not all(isinstance(source, TensorFiles) for source in plan.sources):
        told = settings.resident != "auto" or torch.cuda.is_available()
        return Place("disk", 0, "base and adapters are read from disk for every merge, and folded" if told else "")
    devices, inputs, host = settings.tensor_parallel, stored_bytes(plan), available_memory("cpu")
    # Only vLLM leaves out what it needs, and its build may be for CPUs.
    if torch.cuda.is_available() and (engine is not None or vllm_device() == "cuda"):
        largest = max(info.bytes for info in plan.outputs())
        needed = _engine_bytes(plan, settings) if engine is None else engine
        sizes = Sizes(-(-inputs // devices), inputs, working_bytes(len(plan.policies), largest), needed)
        place = choose_level(settings.resident, sizes, max(1, available_memory("cuda") - spare), host, engines)
    else:
        place = choose_level(settings.resident, Sizes(inputs, inputs * devices), 0, host, engines)
    told = settings.resident != "auto" or (torch.cuda.is_available() and inputs >= _WORTH_TELLING)
    return place if told else replace(place, why="")


def _engine_bytes(plan: ModelPlan, settings: EngineSettings) -> int:
    """Return what vLLM takes of each GPU: the user's share, or at least its weights and a cache."""
    import torch

    share: Any = settings.args.get("gpu_memory_utilization")
    if share:
        return int(share * torch.cuda.mem_get_info()[1])
    return least_engine(total_bytes(plan.outputs()) // settings.tensor_parallel)


def least_engine(weights: int) -> int:
    """Return the bytes of a GPU that an engine takes at least, beside so many bytes of weights there."""
    return int(1.1 * weights) + _CACHE


def working_bytes(policies: int, largest: int) -> int:
    """Return the bytes of a GPU that merges take: float64 arrays, the largest tensor, its copies on the way."""
    return 8 * CHUNK * (8 + 2 * policies) + 4 * largest
