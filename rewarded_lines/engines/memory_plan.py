"""What fits where, before anything is loaded: bytes of an engine, of the models merged into it, and of reward models.

Pure functions of a model's shape. Exact: weights, keys and values, LoRA factors. Estimates: a batch's values in vLLM,
CUDA graphs, and what CUDA itself takes. Each says its equation. A GPU holds 1/n of the weights with n GPUs (tensor
parallelism); norms and other vectors, which every GPU has whole, are far below one percent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rewarded_lines.engines.kv_cache import kv_bytes
from rewarded_lines.engines.model_shapes import ModelShape

GIB = 1 << 30
ITEMSIZE: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
Level = Literal["gpu", "host", "disk"]
# vLLM may take this part of the free memory, as the engines here ask for it.
SHARE = 0.9
# A context with its kernels, and the buffers between GPUs: typical of drivers of today.
_CUDA, _BETWEEN = GIB // 2, GIB // 2
# vLLM's log names between 0.3 and 2 GiB, more with more layers.
_GRAPHS_PER_LAYER = 24 << 20
# Tokens in a batch of vLLM's `LLM`, by the memory of the GPU.
_LARGE_CARD, _LARGE_BATCH, _BATCH = 70 * GIB, 16_384, 8192
# A merge by the processor: kernels and blocks in work, whatever the size of the model.
_MERGE_ON_CPU = GIB // 2
# Slots for merged adapters: 16 and a spare one, in at most a tenth of the GPU.
_SLOTS, _SLOT_SHARE = 17, 0.1
# The gpu level must leave room for so many of the longest sequences.
_FEWEST = 16


@dataclass(frozen=True)
class Machine:
    """What there is.

    Attributes:
        gpus: how many share the model by tensor parallelism.
        card: bytes of one GPU.
        host: bytes of memory that the machine has available.
        disk: free bytes where outputs go.
        name: of the GPU.
    """

    gpus: int
    card: int
    host: int
    disk: int
    name: str = ""


@dataclass(frozen=True)
class Job:
    """What is to be done.

    Attributes:
        policies: models that are merged.
        dtype: of weights, keys and values.
        longest: tokens of the longest sequence, prompt and response.
        at_once: sequences that should be answered at once.
        lora: rank of the policies' adapters; 0: whole models.
        share: the part of a GPU that the engine may take; None: what the others leave of 0.9.
        rewards: bytes of each reward model on the engine's GPUs.
        eager: without CUDA graphs.
    """

    policies: int = 2
    dtype: str = "bfloat16"
    longest: int = 2048
    at_once: int = 256
    lora: int = 0
    share: float | None = None
    rewards: Mapping[str, int] = field(default_factory=dict)
    eager: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """Where everything goes; bytes on each GPU unless said otherwise.

    Attributes:
        engine: parts of the engine.
        beside: parts beside it on the GPU.
        resident: where base and policies wait for the next merge.
        levels: bytes of them at each level: of each GPU, of the host, of the disk.
        share: the part of a GPU that the engine gets.
        sequence: bytes of the keys and values of one longest sequence.
        sequences: how many of these fit at once.
        host: parts of the host's memory.
        disk: parts of the disk.
        problems: what does not fit; empty: everything does.
    """

    engine: Mapping[str, int]
    beside: Mapping[str, int]
    resident: Level
    levels: Mapping[str, int]
    share: float
    sequence: int
    sequences: int
    host: Mapping[str, int]
    disk: Mapping[str, int]
    problems: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the plan in plain types."""
        return {"fits": not self.problems, **asdict(self)}


def plan_memory(shape: ModelShape, job: Job, machine: Machine) -> MemoryPlan:
    """Return where a sweep's parts go on a machine: the first level of gpu, host and disk that leaves the engine room.

    With room R = share · card for the engine, n = ⌊(R − weights − batch − graphs − slots) / sequence⌋ sequences fit.
    """
    itemsize, gpus = ITEMSIZE[job.dtype], machine.gpus
    sequence = kv_bytes(shape.cache, job.longest, itemsize, gpus)
    engine = {
        "weights": weight_bytes(shape, itemsize, gpus),
        "batch": batch_bytes(shape, job.at_once, itemsize, machine),
        "CUDA graphs": 0 if job.eager else _GRAPHS_PER_LAYER * shape.layers,
        **({"LoRA slots": slot_bytes(shape, job, itemsize, machine)} if job.lora else {}),
    }
    beside = {
        "CUDA": _CUDA + (_BETWEEN if gpus > 1 else 0),
        "log-probabilities": score_bytes(shape, job.longest, itemsize, machine),
        **job.rewards,
    }
    levels = resident_bytes(shape, job, itemsize, gpus)
    fixed = sum(engine.values())

    def sequences(level: Level) -> tuple[float, int]:
        used = sum(beside.values()) + (levels["gpu"] if level == "gpu" else 0)
        share = job.share if job.share is not None else max(0.0, SHARE - used / machine.card)
        room = min(share * machine.card, machine.card - used) - fixed
        return share, max(0, int(room // sequence))

    level = choose_level(sequences("gpu")[1] >= min(_FEWEST, job.at_once), levels["host"] <= machine.host)
    share, count = sequences(level)
    engine["KV cache"] = sequence * min(count, job.at_once)
    if level == "gpu":
        beside["base and policies"] = levels["gpu"]
    host = {"merge on the CPU": _MERGE_ON_CPU, **({"base and policies": levels["host"]} if level == "host" else {})}
    disk = {"inputs": levels["disk"], "one merged model": weight_bytes(shape, itemsize)}
    if job.lora:
        disk["one merged model"] = lora_bytes(shape, job.lora * job.policies, itemsize)
    problems = _problems(shape, machine, count, host)
    return MemoryPlan(engine, beside, level, levels, round(share, 3), sequence, count, host, disk, problems)


def weight_bytes(shape: ModelShape, itemsize: int, gpus: int = 1) -> int:
    """Return parameters · itemsize / gpus."""
    return shape.parameters * itemsize // gpus


def lora_bytes(shape: ModelShape, rank: int, itemsize: int) -> int:
    """Return rank · Σ (rows + columns) · itemsize over all linear layers of the blocks."""
    return rank * shape.edges * itemsize


def resident_bytes(shape: ModelShape, job: Job, itemsize: int, gpus: int) -> dict[str, int]:
    """Return the bytes of base and policies at each level.

    Whole models: (1 + policies) · weights, of which each GPU or worker holds its part. Of adapters only the factors
    wait: policies · LoRA; the base is the engine's own.
    """
    whole = weight_bytes(shape, itemsize)
    one = lora_bytes(shape, job.lora, itemsize) if job.lora else whole
    waiting = job.policies * one + (0 if job.lora else whole)
    return {"gpu": waiting // gpus, "host": waiting, "disk": whole + job.policies * one}


def batch_bytes(shape: ModelShape, at_once: int, itemsize: int, machine: Machine) -> int:
    """Return an estimate of what vLLM takes for one batch; it measures the true figure at its start.

    tokens · (4 · hidden + inner / gpus) · itemsize, for the residual stream, the attention's output, and gate and up;
    and at_once · vocabulary · (itemsize + 8) for logits, their float32 and the probabilities.
    """
    wide = 4 * shape.hidden + shape.inner // machine.gpus
    return batch_tokens(machine) * wide * itemsize + at_once * shape.vocabulary * (itemsize + 8)


def batch_tokens(machine: Machine) -> int:
    """Return vLLM's default of `max_num_batched_tokens`."""
    return _LARGE_BATCH if machine.card >= _LARGE_CARD else _BATCH


def score_bytes(shape: ModelShape, longest: int, itemsize: int, machine: Machine) -> int:
    """Return tokens · vocabulary · (itemsize + 8): logits, log-probabilities and ranks of the longest sequence.

    The KL to the base needs them. vLLM takes them beside the memory that it was given, sequence by sequence.
    """
    return min(longest, batch_tokens(machine)) * shape.vocabulary * (itemsize + 8)


def slot_bytes(shape: ModelShape, job: Job, itemsize: int, machine: Machine) -> int:
    """Return the bytes of vLLM's slots for merged adapters, each of rank Σ r; a tenth of the GPU bounds them."""
    one = lora_bytes(shape, job.lora * job.policies, itemsize) // machine.gpus
    return one * max(2, min(_SLOTS, int(_SLOT_SHARE * machine.card / max(1, one))))


def choose_level(fits_gpu: bool, fits_host: bool) -> Level:
    """Return the fastest level that fits."""
    if fits_gpu:
        return "gpu"
    return "host" if fits_host else "disk"


def _problems(shape: ModelShape, machine: Machine, count: int, host: Mapping[str, int]) -> tuple[str, ...]:
    found = []
    if shape.heads % machine.gpus:
        found.append(f"vLLM cannot divide {shape.heads} attention heads among {machine.gpus} GPUs")
    if not count:
        what = "the engine does not fit: not one sequence of this length has room beside the weights"
        found.append(f"{what}; take more GPUs (--gpus), shorter sequences, or a smaller model")
    if sum(host.values()) > machine.host:
        found.append("the host's memory does not hold what is meant for it")
    return tuple(found)
