"""transformers as an engine: slower, but needs nothing else; the reference for the other engines."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rewarded_lines.checkpoints.reader import total_bytes
from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.engines.base import Model, Pairs, Response, SwappingGenerator, Workload, seeded_rows
from rewarded_lines.engines.decoding_mixture import mixed
from rewarded_lines.engines.kv_cache import kv_bytes, kv_layers
from rewarded_lines.engines.memory_levels import place_for
from rewarded_lines.engines.resident import Resident
from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.engines.tokenizers import (
    attention_of,
    end_tokens,
    load_config,
    load_generation_config,
    load_tokens,
    longest_sequence,
    set_template,
)
from rewarded_lines.engines.transformers_sampling import SeededSampling, StopTexts
from rewarded_lines.errors import fail
from rewarded_lines.merger.methods import MOD
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.out_of_memory import NO_MEMORY, FittingBatches, empty_cache, no_room, ran_out

# A batch has 64 rows; of a small model more, until their keys and values fill 256 MB.
_BATCH, _MOST_ROWS, _CACHE = 64, 512, 1 << 28
# At most this many probabilities are in memory at once: 512 MB of float32.
_CELLS = 1 << 27
# Bytes of a GPU that generation takes beside the model.
_GENERATION = 4 << 30
Item = TypeVar("Item")
Result = TypeVar("Result")


class HfGenerator(SwappingGenerator):
    """transformers' own generation. Merged weights are copied into the model, tensor by tensor.

    For a mixture while decoding (MOD) the model becomes the first policy, and each other policy is one more model.
    """

    def __init__(self, work: Workload, loaded: tuple[Any, Any] | None = None) -> None:
        """Load the model, a whole one or an adapter over its base; see `load_generator`.

        Or take over a model and its tokenizer that are `loaded` already; `close` restores their settings. For adapters
        `plan_merge` makes a plan that folds them into their base.

        Raises:
            UserError: prompts do not fit the model, or the chat template cannot be read.
        """
        super().__init__(work)
        self._inputs: Resident | None = None
        # The policies after the first, by place, once a mixture needs them.
        self._copies: dict[int, Any] = {}
        if loaded:
            (self._model, self._tokenizer), rows = loaded, _BATCH
        else:
            self._model, self._tokenizer, rows = _load_model(work)
        self._batches = FittingBatches(work.model, rows)
        tokenizer, model = self._tokenizer, self._model
        # PEFT's wrapper passes its generation config on to the model inside.
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._configs = [(one, one.generation_config) for one in (inner, model)]
        self._before = model.training, tokenizer.pad_token, getattr(tokenizer, "chat_template", None)
        try:
            if loaded:
                set_template(tokenizer, work.spec)
                longest_sequence(tokenizer, model.config, work)
            self._set_up()
            self._inputs = self._hold(work)
            if self._inputs:
                self._inputs.load()
        except BaseException:
            self.close()
            raise

    def _hold(self, work: Workload) -> Resident | None:
        """Return what merges are made from; the model is in its place already."""
        if self._plan is None:
            return None
        each = total_bytes(self._plan.outputs())
        place = place_for(self._plan, work.settings, work.spare, _GENERATION + (work.models - 1) * each, work.engines)
        mod = f"mod: {work.models} models of {each / 1e9:.3g} GB each stay in memory and answer together"
        self.told = [*([f"resident: {place.why}"] if place.why else []), *([mod] if work.models > 1 else [])]
        return Resident(self._plan, place.level, self._model.device)

    def close(self) -> None:
        """See `Generator.close`."""
        if self._inputs:
            self._inputs.close()
        training, self._tokenizer.pad_token, self._tokenizer.chat_template = self._before
        self._model.train(training)
        for holder, config in self._configs:
            holder.generation_config = config
        del self._model, self._configs, self._copies
        # Other models can use the memory.
        empty_cache()

    def _set_up(self) -> None:
        """Stop at the tokenizer's end token, too, and drop the model's sampling defaults, as vLLM does."""
        from transformers import GenerationConfig

        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model.eval()
        self._ends = end_tokens(self._tokenizer, self._model.generation_config)
        self._model.generation_config = GenerationConfig(
            eos_token_id=sorted(self._ends), pad_token_id=self._tokenizer.pad_token_id
        )

    @contextmanager
    def _loaded(self, models: Sequence[Model]) -> Iterator[list[Any]]:
        (model,) = models
        if model is None or model.method != MOD:
            with super()._loaded(models) as loaded:
                yield loaded
            return
        first, *others = (place for place, weight in enumerate(model.weights) if weight)
        with super()._loaded([_alone(first, model)]) as loaded:
            parts = [(model.weights[place], self._copy(place, model)) for place in others]
            with mixed(self._model, model.weights[first], parts):
                yield loaded

    def _copy(self, place: int, model: MergeSpec) -> Any:
        """Return a model of its own with the weights of one policy."""
        if place not in self._copies:
            try:
                made = copy.deepcopy(self._model)
            except NO_MEMORY as error:
                if not ran_out(error):
                    raise
                raise no_room("--engine hf, mod", "it needs a model for each policy", error) from error
            self._fill(made, _alone(place, model))
            self._copies[place] = made
        return self._copies[place]

    def _swap(self, spec: MergeSpec) -> None:
        self._fill(self._model, spec)

    def _fill(self, model: Any, spec: MergeSpec) -> None:
        import torch

        assert self._inputs is not None
        slots = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        left = {id(parameter): name for name, parameter in model.named_parameters()}
        with torch.no_grad():
            for name, tensor in self._inputs.tensors(spec):
                if name not in slots:
                    raise fail(f"transformers has no parameter {name}", where="--engine hf", remedy="use --engine vllm")
                slots[name].copy_(tensor)
                left.pop(id(slots[name]), None)
        if left:
            names = ", ".join(list(left.values())[:3])
            raise fail("parameters without weights", where="--engine hf", got=names, remedy="use --engine vllm")

    def _generate(self, prompts: Sequence[Prompt], spec: GenerationSpec, loaded: Sequence[Any]) -> list[list[Response]]:
        rows = seeded_rows(self.encode(prompts), spec)
        # A row has its own seed, so in another batch it draws the same.
        return [in_order_of_length(rows, lambda row: len(row[0]), lambda some: self._answered(some, spec))]

    def _answered(self, rows: Sequence[tuple[list[int], int]], spec: GenerationSpec) -> list[Response]:
        return self._batches.run(rows, lambda batch: self._answer(batch, spec))

    def _answer(self, asked: Sequence[tuple[list[int], int]], spec: GenerationSpec) -> list[Response]:
        """Return a response for each pair of prompt and seed, all in one batch."""
        reader = ResponseReader.of(self._tokenizer, self._ends, spec)
        heads = [head for head, _ in asked]
        rows, stops = self._sample(heads, [seed for _, seed in asked], spec, reader)
        cuts = [reader.cut(head, row[:stop]) for head, row, stop in zip(heads, rows, stops, strict=True)]
        totals = self._logprobs([(head, tokens) for head, (tokens, _) in zip(heads, cuts, strict=True)])
        return [
            reader.response(head, tokens, ended, total)
            for head, (tokens, ended), total in zip(heads, cuts, totals, strict=True)
        ]

    def _sample(
        self, heads: Sequence[list[int]], seeds: Sequence[int], spec: GenerationSpec, reader: ResponseReader
    ) -> tuple[list[list[int]], list[int | None]]:
        """Return the tokens after each prompt, and how many of them complete a stop text."""
        import torch
        from transformers import StoppingCriteriaList

        rows = self._padded(heads, "left")
        stops = StopTexts(reader, heads)
        changes = spec.temperature > 0 or spec.repetition_penalty != 1
        with torch.inference_mode():
            output = self._model.generate(
                **rows,
                do_sample=False,
                max_new_tokens=spec.max_tokens,
                eos_token_id=sorted(reader.ends),
                logits_processor=[SeededSampling(seeds, spec, heads)] if changes else [],
                stopping_criteria=StoppingCriteriaList([stops] if spec.stop else []),
            )
        return output[:, rows["input_ids"].shape[1] :].tolist(), stops.lengths

    def _logprobs(self, pairs: Pairs, loaded: Any = None) -> list[float]:
        return in_order_of_length(pairs, lambda pair: len(pair[0]) + len(pair[1]), self._sorted_logprobs)

    def _sorted_logprobs(self, pairs: Pairs) -> list[float]:
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        totals: list[float] = []
        while len(totals) < len(pairs):
            rest = pairs[len(totals) : len(totals) + _BATCH]
            longest = max(len(head) + len(tail) for head, tail in rest)
            rest = rest[: max(1, _CELLS // (longest * vocabulary))]
            totals += self._batches.run(rest, self._batch_logprobs)
        return totals

    def _batch_logprobs(self, pairs: Pairs) -> list[float]:
        import torch

        rows = [[*head, *tail] for head, tail in pairs]
        padded = self._padded(rows, "right")
        with torch.inference_mode():
            table = self._model(**padded).logits.float()[:, :-1].log_softmax(-1)
            picked = table.gather(-1, padded["input_ids"].to(table.device)[:, 1:, None])[..., 0].double().cpu()
        return [
            float(picked[i, len(head) - 1 : len(row) - 1].sum())
            for i, ((head, _), row) in enumerate(zip(pairs, rows, strict=True))
        ]

    def _padded(self, rows: Sequence[list[int]], side: str) -> Any:
        padded = self._tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
        return padded.to(self._model.device)


def _alone(place: int, model: MergeSpec) -> MergeSpec:
    """Return the merge that is one of a mixture's policies."""
    return MergeSpec(tuple(float(at == place) for at in range(len(model.weights))), 1.0, 0.0)


def in_order_of_length(
    items: Sequence[Item], length: Callable[[Item], int], work: Callable[[list[Item]], Sequence[Result]]
) -> list[Result]:
    """Return what `work` makes of each item; it gets them sorted by length, so that batches need little padding."""
    order = sorted(range(len(items)), key=lambda at: length(items[at]))
    made = dict(zip(order, work([items[at] for at in order]), strict=True))
    return [made[at] for at in range(len(items))]


def rows_of(config: Any, longest: int, itemsize: int) -> int:
    """Return the rows of a batch for sequences of `longest` tokens."""
    try:
        each = kv_bytes(kv_layers(config.to_dict())[0], longest, itemsize)
    except (KeyError, TypeError, ValueError):
        # A model without attention, or with other names.
        return _BATCH
    return max(_BATCH, min(_MOST_ROWS, _CACHE // max(each, 1)))


def _load_model(work: Workload) -> tuple[Any, Any, int]:
    """Return the model, its tokenizer and the rows of a batch."""
    import torch
    from transformers import AutoModelForCausalLM

    # Before the weights, which take a while.
    tokenizer, _, longest = load_tokens(work)
    kind, attention = getattr(torch, work.spec.dtype), attention_of(load_config(work.model))
    model: Any = AutoModelForCausalLM.from_pretrained(work.model, dtype=kind, trust_remote_code=False, **attention)
    if work.texts != work.model:
        model.generation_config = load_generation_config(work.texts)
    try:
        placed = model.to("cuda" if torch.cuda.is_available() else "cpu")
    except NO_MEMORY as error:
        if not ran_out(error):
            raise
        raise no_room(f"--engine hf, {work.model}", "the model does not fit", error) from error
    return placed, tokenizer, rows_of(model.config, longest, model.dtype.itemsize)
