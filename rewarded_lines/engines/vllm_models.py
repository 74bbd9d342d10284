"""vLLM with whole merged models: the engine starts once, merged weights stream into it.

Its workers run in this process, or in several that each hold a part of the model.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from itertools import chain
from typing import Any, cast

from rewarded_lines.engines.base import SwappingGenerator, Workload, base_spec
from rewarded_lines.engines.cpu_adapters import group_adapters
from rewarded_lines.engines.memory_levels import Level, place_for
from rewarded_lines.engines.resident import Resident
from rewarded_lines.engines.resident_adapters import ResidentAdapters, give_to_vllm
from rewarded_lines.engines.vllm_core import VllmCore
from rewarded_lines.engines.vllm_versions import last_slot_is_shared, let_vllm_search_modules
from rewarded_lines.engines.worker_shares import share_of
from rewarded_lines.errors import UserError
from rewarded_lines.merger.open_inputs import plan_adapters, plan_merge
from rewarded_lines.merger.plan import Plan
from rewarded_lines.merger.spec import MergeSpec

# A worker process of vLLM imports this module before it builds its model.
let_vllm_search_modules()

# Memory runs out, or this vLLM has other names.
_OTHERWISE_FILES = (AttributeError, ImportError, TypeError, RuntimeError, MemoryError)
# Workers in this process use its plans as they are, with their measurements.
_plans: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()


class VllmGenerator(VllmCore, SwappingGenerator):
    """Every process that holds a part of the model merges that part itself."""

    def __init__(self, work: Workload) -> None:
        """Start the engine; see `load_generator`."""
        super().__init__(work)
        place = None
        if self._plan is not None:
            place = place_for(self._plan, work.settings, spare=work.spare, engines=work.engines)
        # Room for the inputs is left when the engine takes its memory.
        self._start(work, beside=place.beside if place else 0)
        if self._plan is not None and place is not None:
            self.told = (f"resident: {place.why}",) if place.why else ()
            try:
                self.call("open_plan", plan_message(self._plan), place.level)
            except BaseException:
                self.close()
                raise

    def _swap(self, spec: MergeSpec) -> None:
        self.ask("use_merge", spec_message(spec))


def spec_message(spec: MergeSpec) -> dict[str, Any]:
    """Return a merge in plain types, for `MergeSpec.from_dict`."""
    return spec.as_dict([str(index) for index in range(len(spec.weights))])


def plan_message(plan: Plan) -> dict[str, Any]:
    """Return in plain types what a worker needs to find a plan, or to open it again."""
    _plans[id(plan)] = plan
    return {
        "process": os.getpid(),
        "key": id(plan),
        "kind": plan.kind,
        "base": plan.reference,
        "policies": dict(plan.references),
        "dtype": plan.dtype_name,
        "layers": plan.layers,
        "tower": plan.tower,
        "carried": {"tokenizer": plan.carried.tokenizer, "config_from": plan.carried.config_from},
    }


def _opened(message: Mapping[str, Any]) -> Any:
    """Return the plan of a `plan_message`."""
    if message["process"] == os.getpid():
        return _plans[message["key"]]
    assert message["base"], "only a plan from plan_merge or plan_adapters can be opened again"
    how = {name: message[name] for name in ("dtype", "layers", "tower")} | message["carried"]
    opened = plan_adapters if message["kind"] == "adapter" else plan_merge
    return opened(message["base"], message["policies"], **how)


def _answer(work: Callable[[], Any], known: tuple[type[Exception], ...] = ()) -> dict[str, Any]:
    """Do a worker's work; return why it fails, by a `UserError` or an error of the classes `known`: see `ask`."""
    try:
        work()
    except UserError as error:
        return {"problems": [asdict(problem) for problem in error.problems]}
    except known as error:
        return {"reason": str(error) or type(error).__name__}
    return {}


class MergingWorker:
    """An extension of vLLM's worker. The engine calls its methods by name on every worker."""

    def open_plan(self, message: Mapping[str, Any], level: Level) -> None:
        """Get ready to merge; see `plan_message`, and `Resident` for the level."""
        plan = _opened(message)
        worker: Any = self
        self.merge_plan, self.share, self.in_use = plan, share_of(worker), base_spec(plan)
        self.resident = Resident(plan, level, worker.device, self.share)
        # Reward models come back later, to the memory that is left.
        with self.share.together():
            self.resident.load()
        # Merging the smallest tensor loads the kernels before the first swap.
        smallest = min(plan.outputs(), key=lambda info: info.elements).name
        for _ in plan.tensors(base_spec(plan), [smallest]):
            pass

    def use_merge(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Stream a merge's tensors into the running model; the message is `spec_message`'s.

        vLLM copies them into the memory that its weights have already, layer by layer, so CUDA graphs stay valid. If
        the merge fails, the model has the weights from before.

        The answer is for `VllmCore.ask`.
        """

        def swap() -> None:
            with self.share.together():
                self._load(MergeSpec.from_dict(message))

        return _answer(swap)

    def _load(self, spec: MergeSpec) -> None:
        worker: Any = self
        failed: list[Exception] = []
        tensors = self._complete(spec, failed)
        # What fails at once leaves the model alone.
        first = next(tensors)
        worker.reload_weights(weights_iterator=chain([first], tensors))
        if failed:
            worker.reload_weights(weights_iterator=self._complete(self.in_use, []))
        _repack_tied_head(worker.get_model())
        if failed:
            raise failed[0]
        self.in_use = spec

    def _complete(self, spec: MergeSpec, failed: list[Exception]) -> Iterator[tuple[str, Any]]:
        """Yield a merge's tensors; if it fails in between, note why and yield those in use for the rest.

        vLLM must get every tensor of a layer: what it has of half a layer would end up in the next merge.
        """
        given = set()
        try:
            for name, tensor in self.resident.tensors(spec):
                given.add(name)
                yield name, tensor
        except Exception as error:
            if not given or spec == self.in_use:
                raise
            failed.append(error)
            yield from (pair for pair in self.resident.tensors(self.in_use) if pair[0] not in given)

    def hold_factors(self, message: Mapping[str, Any], on_gpu: bool) -> dict[str, Any]:
        """Load the factors of a plan's adapters, on the GPU or in the host's memory."""
        worker: Any = self

        def hold() -> None:
            self.factors = ResidentAdapters(_opened(message), worker.device if on_gpu else "cpu")

        return _answer(hold, _OTHERWISE_FILES)

    def add_merged(self, number: int, message: Mapping[str, Any]) -> dict[str, Any]:
        """Merge adapters, and give the result to vLLM under a new number."""
        runner = cast(Any, self).model_runner
        spec = MergeSpec.from_dict(message)
        return _answer(lambda: give_to_vllm(runner, number, self.factors.tensors(spec)), _OTHERWISE_FILES)

    def shared_memory_name(self) -> str:
        """Return the prefix of the names in /dev/shm that several CPU workers share; "" on a GPU."""
        return os.environ.get("VLLM_DIST_IDENT", "")

    def group_adapters(self) -> None:
        """Make adapters faster on a CPU, where vLLM has no kernels for them; see `cpu_adapters`."""
        worker: Any = self
        if worker.device.type == "cpu" and last_slot_is_shared():
            group_adapters()

    def unserved_modules(self, adapter: int) -> list[str]:
        """Return the modules of a loaded adapter that vLLM silently ignores: the model has no such layer."""
        worker: Any = self
        manager = worker.model_runner.lora_manager._adapter_manager
        return sorted(set(manager.get_adapter(adapter).loras) - set(manager.modules))


def _repack_tied_head(model: Any) -> None:
    """Update a tied head on a CPU.

    vLLM keeps a packed copy of the head's weight there. A reload packs only the tensors that it loads, and a tied head
    is not among them: without this call the head would keep the old embeddings.
    """
    head: Any = getattr(model, "lm_head", None)
    if hasattr(head, "cpu_linear") and getattr(model.config, "tie_word_embeddings", False):
        head.quant_method.process_weights_after_loading(head)
