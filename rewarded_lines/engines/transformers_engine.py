"""transformers as an engine: slower, but it needs nothing else; tests compare the other engines with it."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.prompts import Prompt, encode
from rewarded_lines.engines.base import Model, Response, Tokens, Workload, prompt_seed
from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.engines.tokenizers import end_tokens, load_config, load_tokenizer, longest_sequence, set_template
from rewarded_lines.engines.transformers_sampling import SeededSampling, StopTexts
from rewarded_lines.errors import fail
from rewarded_lines.merger.model_plan import ModelPlan
from rewarded_lines.merger.spec import MergeSpec

if TYPE_CHECKING:
    import torch

_BATCH = 64
# At most this many probabilities are in memory at once: 512 MB of float32.
_CELLS = 1 << 27
_HALF_WRITTEN: Final = "half-written"


class HfGenerator:
    """transformers' own generation. Merged weights are copied into the model's parameters, tensor by tensor."""

    at_once = 1

    def __init__(self, work: Workload, loaded: tuple[Any, Any] | None = None) -> None:
        """Load the model, a whole one or an adapter over its base; see `load_generator`.

        Args:
            work: a plan must be one of whole models; `plan_merge` folds adapters into their base.
            loaded: a model and its tokenizer that exist already; `close` restores their settings.

        Raises:
            UserError: prompts do not fit the model, or the chat template cannot be read.
        """
        self.swap_seconds = 0.0
        self._plan = cast(ModelPlan | None, work.plan)
        self._in_use: Model | str = None
        self._model, self._tokenizer = loaded or _load_model(work)
        self._remember()
        try:
            if loaded:
                set_template(self._tokenizer, work.spec)
                longest_sequence(self._tokenizer, self._model.config, work)
            self._set_up()
        except BaseException:
            self.close()
            raise

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """See `Generator.encode`."""
        return encode(self._tokenizer, prompts)

    def generate(
        self, prompts: Sequence[Prompt], spec: GenerationSpec, models: Sequence[Model] = (None,)
    ) -> list[list[Response]]:
        """See `Generator.generate`."""
        ids = self.encode(prompts)
        asked = [(row, prompt_seed(spec, index, k)) for index, row in enumerate(ids) for k in range(spec.n)]
        answers = []
        for model in models:
            self._use(model)
            responses: list[Response] = []
            for start in range(0, len(asked), _BATCH):
                responses += self._answer(asked[start : start + _BATCH], spec)
            answers.append(responses)
        return answers

    def logprobs(self, pairs: Sequence[tuple[Tokens, Tokens]], model: Model = None) -> list[float]:
        """See `Generator.logprobs`."""
        self._use(model)
        return self._score(pairs)

    def close(self) -> None:
        """See `Generator.close`."""
        training, self._tokenizer.pad_token, self._tokenizer.chat_template = self._before
        self._model.train(training)
        for holder, config in self._configs:
            holder.generation_config = config
        del self._model, self._configs
        gc.collect()

    def _remember(self) -> None:
        """Keep the settings that `close` restores."""
        # PEFT's wrapper passes its generation config on to the model inside.
        inner = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        self._configs = [(one, one.generation_config) for one in (inner, self._model)]
        tokenizer = self._tokenizer
        self._before = self._model.training, tokenizer.pad_token, getattr(tokenizer, "chat_template", None)

    def _set_up(self) -> None:
        """Stop and sample as vLLM does: with the tokenizer's end token, without the model's own sampling defaults."""
        from transformers import GenerationConfig

        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model.eval()
        self._ends = end_tokens(self._tokenizer, self._model.generation_config)
        self._model.generation_config = GenerationConfig(
            eos_token_id=sorted(self._ends), pad_token_id=self._tokenizer.pad_token_id
        )

    def _use(self, model: Model) -> None:
        """Load a merge's weights into the model, unless it has them already."""
        if model == self._in_use:
            return
        assert self._plan is not None, "without a plan there is only the SFT model"
        started = time.perf_counter()
        self._in_use = _HALF_WRITTEN
        base = MergeSpec((0.0,) * len(self._plan.policies), 0.0, 0.0)
        self._load(self._plan.tensors(base if model is None else model))
        self._in_use = model
        self.swap_seconds += time.perf_counter() - started

    def _load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy weights into the parameters.

        Raises:
            UserError: the names are not those of the model's parameters.
        """
        import torch

        slots = {**dict(self._model.named_parameters(remove_duplicate=False)), **dict(self._model.named_buffers())}
        left = {id(parameter): name for name, parameter in self._model.named_parameters()}
        with torch.no_grad():
            for name, tensor in weights:
                if name not in slots:
                    raise fail(f"transformers has no parameter {name}", where="--engine hf", remedy="use --engine vllm")
                slots[name].copy_(tensor)
                left.pop(id(slots[name]), None)
        if left:
            names = ", ".join(list(left.values())[:3])
            raise fail("parameters without weights", where="--engine hf", got=names, remedy="use --engine vllm")

    def _answer(self, asked: Sequence[tuple[list[int], int]], spec: GenerationSpec) -> list[Response]:
        """Return a response for each pair of prompt and seed, all in one batch."""
        reader = ResponseReader.of(self._tokenizer, self._ends, spec)
        heads = [head for head, _ in asked]
        rows, stops = self._sample(heads, [seed for _, seed in asked], spec, reader)
        cuts = [reader.cut(head, row[:stop]) for head, row, stop in zip(heads, rows, stops, strict=True)]
        totals = self._score([(head, tokens) for head, (tokens, _) in zip(heads, cuts, strict=True)])
        return [
            reader.response(head, tokens, ended, total)
            for head, (tokens, ended), total in zip(heads, cuts, totals, strict=True)
        ]

    def _sample(
        self, heads: Sequence[list[int]], seeds: Sequence[int], spec: GenerationSpec, reader: ResponseReader
    ) -> tuple[list[list[int]], list[int | None]]:
        """Return the tokens after each prompt, and how many of them it takes to complete a stop text."""
        import torch
        from transformers import StoppingCriteriaList

        padded = self._tokenizer.pad({"input_ids": heads}, padding_side="left", return_tensors="pt")
        rows = padded.to(self._model.device)
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

    def _score(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[float]:
        """Return the probabilities under the weights in use; see `logprobs`."""
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        totals: list[float] = []
        while len(totals) < len(pairs):
            rest = pairs[len(totals) : len(totals) + _BATCH]
            longest = max(len(head) + len(tail) for head, tail in rest)
            totals += self._batch_logprobs(rest[: max(1, _CELLS // (longest * vocabulary))])
        return totals

    def _batch_logprobs(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[float]:
        import torch

        rows = [[*head, *tail] for head, tail in pairs]
        padded = self._tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
        with torch.inference_mode():
            logits = self._model(**padded.to(self._model.device)).logits.float()
            table = logits[:, :-1].log_softmax(-1)
            picked = table.gather(-1, padded["input_ids"].to(table.device)[:, 1:, None])[..., 0].double().cpu()
        return [
            float(picked[i, len(head) - 1 : len(row) - 1].sum())
            for i, ((head, _), row) in enumerate(zip(pairs, rows, strict=True))
        ]


def _load_model(work: Workload) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(work.model, work.spec)
    # Before the weights, which take a while.
    longest_sequence(tokenizer, load_config(work.model), work)
    model: Any = AutoModelForCausalLM.from_pretrained(work.model, dtype=getattr(torch, work.spec.dtype))
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer
