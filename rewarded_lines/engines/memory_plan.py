"""What fits where, before anything is loaded: bytes of an engine, of the models merged into it, and of reward models.

Pure functions of a model's shape. Exact: weights, keys and values. Upper bounds: LoRA factors, as if every linear layer
had them. Estimates: a batch's values in vLLM, CUDA graphs, and what CUDA itself takes. Each says its equation. With n
GPUs (tensor parallelism) each holds 1/n of the weights; norms and other vectors, which every GPU has whole, are far
below one percent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rewarded_lines.engines.kv_cache import kv_bytes
from rewarded_lines.engines.memory_levels import Place, Sizes, choose_level, least_engine, working_bytes
from rewarded_lines.engines.model_shapes import ModelShape
from rewarded_lines.engines.vllm_memory import (
    WORKING_MEMORY,
    adapters_at_once,
    beside_for_adapters,
    few_scored_at_once,
)
from rewarded_lines.merger.adapter_settings import VLLM_RANKS, served_rank
from rewarded_lines.processes import GIB

ITEMSIZE: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
SLOTS = "slots"
_ENGINE = "the engine"
# vLLM gets this part of the free memory, less what waits beside it.
_SHARE = 0.9
# A context with its kernels, and the buffers between GPUs: typical of drivers of today.
CUDA, _BETWEEN = GIB // 2, GIB // 2
# vLLM's log names between 0.3 and 2 GiB, more with more layers.
_GRAPHS_PER_LAYER = 24 << 20
# Tokens in a batch of vLLM's `LLM`, by the memory of the GPU.
_LARGE_CARD, _LARGE_BATCH, _BATCH = 70 * GIB, 16_384, 8192
# A merge by the processor: kernels and blocks in work, whatever the size of the model.
_MERGE_ON_CPU = GIB // 2


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
        dtype: of the engine's weights, keys and values.
        longest: tokens of the longest sequence, prompt and response.
        at_once: sequences that should be answered at once.
        lora: rank of the policies' adapters; 0: whole models.
        share: the part of a GPU that the engine may take; None: what the others leave.
        resident: where base and policies shall wait; "auto": the fastest place with room.
        rewards: bytes of the reward models that are on the engine's GPUs at once.
        args: the user's arguments of vLLM.
    """

    policies: int = 2
    dtype: str = "bfloat16"
    longest: int = 2048
    at_once: int = 256
    lora: int = 0
    share: float | None = None
    resident: str = "auto"
    rewards: Mapping[str, int] = field(default_factory=dict)
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryPlan:
    """Where everything goes; bytes on each GPU unless said otherwise.

    Attributes:
        engine: parts of the engine.
        beside: parts beside it on the GPU.
        resident: where base and policies wait for the next merge: "gpu", "host" or "disk"; adapters: "slots".
        inputs: bytes of what waits, on all GPUs together or on the host.
        share: the part of a GPU that the engine gets.
        sequence: bytes of the keys and values of one longest sequence.
        sequences: how many of these fit at once.
        host: parts of the host's memory.
        disk: parts of the disk.
        problems: what does not fit; empty: everything does.
    """

    engine: Mapping[str, int]
    beside: Mapping[str, int]
    resident: str
    inputs: int
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
    """Return where a sweep's parts go on a machine.

    The place of base and policies is chosen as the engine chooses it. The engine's part of a GPU is `job.share`, or
    0.9 · (free memory − what reward models compute in) less the models that wait on the GPU. In it are room for
    ⌊(part − weights − batch − graphs − slots) / sequence⌋ sequences.
    """
    plan = _placed(shape, job, machine)
    return replace(plan, problems=tuple(_with_remedy(one, shape, job, machine) for one in plan.problems))


def _placed(shape: ModelShape, job: Job, machine: Machine) -> MemoryPlan:
    """Return the plan with its problems, without their remedies."""
    gpus = machine.gpus
    sequence = kv_bytes(shape.cache, job.longest, cache_itemsize(job), gpus)
    beside = {"CUDA": CUDA + (_BETWEEN if gpus > 1 else 0), **job.rewards}
    free = max(0, machine.card - sum(beside.values()))
    fixed = fixed_bytes(shape, job, machine, free)
    free = max(0, free - (WORKING_MEMORY if job.rewards else 0))
    place, inputs = _waiting(shape, job, machine, free)
    what = "adapters" if job.lora else "base and policies"
    room = job.share * machine.card if job.share is not None else _SHARE * free - place.beside
    count = max(0, int((room - sum(fixed.values())) // sequence))
    engine = {**fixed, "KV cache": sequence * min(count, job.at_once)}
    # Each GPU's worker has all adapters.
    waiting = -(-inputs // (1 if job.lora else gpus)) if place.level == "gpu" else 0
    beside |= {what: waiting} if waiting else {}
    beside |= {"merges": place.beside - waiting} if place.beside > waiting else {}
    at_times = {"log-probabilities": score_bytes(shape, job, machine)}
    at_times |= {"reward models": WORKING_MEMORY} if job.rewards else {}
    # They follow one another, so the largest of them counts.
    name = max(at_times, key=lambda one: at_times[one])
    beside[f"{name}, at times"] = at_times[name]
    level = SLOTS if job.lora else place.level
    host = {"merge on the CPU": _MERGE_ON_CPU}
    if place.level == "host":
        host[what] = inputs * (gpus if job.lora else 1)
    disk = {"inputs": shape.stored + job.policies * _policy_bytes(shape, job), "one merged model": _output(shape, job)}
    left = machine.card - room - sum(beside.values())
    problems = _problems(shape, job, machine, count, left, name)
    if sum(host.values()) > machine.host:
        problems.append("the host's memory does not hold what is meant for it")
    share = round(max(0.0, room) / machine.card, 3)
    return MemoryPlan(engine, beside, level, inputs, share, sequence, count, host, disk, tuple(problems))


def weight_bytes(shape: ModelShape, itemsize: int, gpus: int = 1) -> int:
    """Return parameters · itemsize / gpus."""
    return shape.parameters * itemsize // gpus


def lora_bytes(shape: ModelShape, rank: int, itemsize: int) -> int:
    """Return rank · Σ (rows + columns) · itemsize over all linear layers of the blocks."""
    return rank * shape.edges * itemsize


def cache_itemsize(job: Job) -> int:
    """Return the bytes of a number in the cache; types of less than a byte count as the engine's, as an upper bound."""
    kind = str(job.args.get("kv_cache_dtype", "auto"))
    return 1 if kind.startswith(("fp8", "int8")) else ITEMSIZE.get(kind, ITEMSIZE[job.dtype])


def fixed_bytes(shape: ModelShape, job: Job, machine: Machine, free: int) -> dict[str, int]:
    """Return the parts of the engine on each GPU that do not depend on the number of sequences in its cache."""
    itemsize = ITEMSIZE[job.dtype]
    return {
        "weights": weight_bytes(shape, itemsize, machine.gpus),
        "batch": batch_bytes(shape, job, machine),
        "CUDA graphs": 0 if job.args.get("enforce_eager") else _GRAPHS_PER_LAYER * shape.layers,
        **({"LoRA slots": slot_bytes(shape, job, machine.gpus, free)} if job.lora else {}),
    }


def batch_bytes(shape: ModelShape, job: Job, machine: Machine) -> int:
    """Return an estimate of what vLLM takes for one batch; it measures the true figure at its start.

    tokens · (4 · hidden + inner / gpus) · itemsize, for the residual stream, the attention's output, and gate and up;
    and at_once · vocabulary · (itemsize + 8) for logits, their float32 and the probabilities.
    """
    itemsize, wide = ITEMSIZE[job.dtype], 4 * shape.hidden + shape.inner // machine.gpus
    tokens = batch_tokens(shape, job, machine)
    return tokens * wide * itemsize + job.at_once * shape.vocabulary * (itemsize + 8)


def batch_tokens(shape: ModelShape, job: Job, machine: Machine) -> int:
    """Return the engine's `max_num_batched_tokens`: the user's, few for long sequences, or vLLM's default."""
    default = {"max_num_batched_tokens": _LARGE_BATCH if machine.card >= _LARGE_CARD else _BATCH}
    few = few_scored_at_once(job.longest, shape.towers, job.args)
    return int({**default, **few, **job.args}["max_num_batched_tokens"])


def score_bytes(shape: ModelShape, job: Job, machine: Machine) -> int:
    """Return tokens · vocabulary · (itemsize + 8): logits, log-probabilities and ranks of the longest sequence.

    The KL to the base needs them. vLLM takes them beside the memory that it was given, sequence by sequence, and of a
    sequence no more tokens at once than a batch has.
    """
    return min(job.longest, batch_tokens(shape, job, machine)) * shape.vocabulary * (ITEMSIZE[job.dtype] + 8)


def slot_bytes(shape: ModelShape, job: Job, gpus: int, free: int) -> int:
    """Return slots · rank · (undivided + (edges − undivided) / gpus) · itemsize: vLLM's slots for merged adapters.

    The rank is Σ r, rounded up to one that vLLM serves. An upper bound: every linear layer counts.
    """
    rank = served_rank(job.lora * job.policies)
    slots = 1 + adapters_at_once(free, lora_bytes(shape, rank, ITEMSIZE["float32"]))
    edges = shape.undivided + -(-(shape.edges - shape.undivided) // gpus)
    return slots * rank * edges * ITEMSIZE[job.dtype]


def _waiting(shape: ModelShape, job: Job, machine: Machine, free: int) -> tuple[Place, int]:
    """Return where base and policies wait, and their bytes as stored; of adapters, the policies' and a merged one."""
    if job.lora:
        inputs = 2 * _output(shape, job)
        beside = beside_for_adapters(job.resident, inputs, free)
        return Place("gpu" if beside else "host", beside, ""), 0 if job.resident == "disk" else inputs
    inputs, weights = (1 + job.policies) * shape.stored, weight_bytes(shape, ITEMSIZE[job.dtype], machine.gpus)
    engine = least_engine(weights) if job.share is None else int(job.share * machine.card)
    sizes = Sizes(-(-inputs // machine.gpus), inputs, working_bytes(job.policies, shape.largest), engine)
    return choose_level(job.resident, sizes, free, machine.host), inputs


def _policy_bytes(shape: ModelShape, job: Job) -> int:
    return lora_bytes(shape, job.lora, ITEMSIZE[job.dtype]) if job.lora else shape.stored


def _output(shape: ModelShape, job: Job) -> int:
    """Return the bytes of a merged model; a merged adapter has the rank Σ r."""
    itemsize = ITEMSIZE[job.dtype]
    return lora_bytes(shape, job.lora * job.policies, itemsize) if job.lora else weight_bytes(shape, itemsize)


def _problems(shape: ModelShape, job: Job, machine: Machine, count: int, left: float, name: str) -> list[str]:
    """Return what does not fit on the GPUs; `left`: bytes beside the engine when all of `name` is there."""
    found = []
    if shape.heads % machine.gpus:
        found.append(f"vLLM cannot divide {shape.heads} attention heads among {machine.gpus} GPUs")
    if (rank := job.lora * job.policies) > VLLM_RANKS[-1]:
        found.append(
            f"merged adapters have rank {rank}, and vLLM serves at most {VLLM_RANKS[-1]}; "
            "sweep with `--engine hf`, which folds adapters into their base"
        )
    if not count:
        found.append(f"{_ENGINE} does not fit: not one sequence of this length has room beside the weights")
    elif left < 0:
        found.append(f"{_ENGINE} leaves too little for {name} beside it")
    return found


def _with_remedy(problem: str, shape: ModelShape, job: Job, machine: Machine) -> str:
    """Return a problem of the engine with what would help: the largest share that fits, if there is one."""
    if not problem.startswith(_ENGINE):
        return problem
    shares = (part / 100 for part in range(99, 0, -1))
    fitting = next((one for one in shares if not _placed(shape, replace(job, share=one), machine).problems), None)
    if fitting:
        return f"{problem}; set `gpu_memory_utilization: {fitting:.2f}`"
    if job.dtype == "float32":
        return f"{problem}; set `generation: {{dtype: bfloat16}}`, or --dtype bfloat16"
    return f"{problem}; take more GPUs (--gpus), shorter sequences, or a smaller model"
