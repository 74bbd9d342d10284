"""The engines: vLLM, and Hugging Face's generate as the reference that it is held against."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewarded_lines.checkpoints.adapter_config import read_adapter_config
from rewarded_lines.checkpoints.adapters import is_adapter
from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.prompts import Prompt, encode, split_text
from rewarded_lines.errors import fail
from rewarded_lines.engines.generation import Response, Weights, prompt_seed

if TYPE_CHECKING:
    import torch


class VllmGenerator:
    """vLLM in this process: the engine is built once, weights stream into it layer by layer."""

    def __init__(self, model: str, spec: GenerationSpec, prompts: Sequence[Prompt]) -> None:
        """Build the engine; see `load_generator`."""
        _prepare_vllm()
        from vllm import LLM

        self._tokenizer, length = _tokenizer_and_length(model, spec, prompts)
        self._llm: Any = LLM(
            model=model,
            dtype=spec.dtype,
            max_model_len=length,
            enforce_eager=True,
            seed=0,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **_share_of_gpu(),
        )

    def use(self, weights: Weights) -> None:
        """See `Generator.use`. Cached prefixes belong to the old weights, so they are dropped."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self._llm.apply_model(_repack_tied_head)
        self._llm.reset_prefix_cache()

    def generate(self, prompts: Sequence[Prompt], spec: GenerationSpec) -> list[Response]:
        """See `Generator.generate`."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=spec.temperature,
                top_p=spec.top_p,
                max_tokens=spec.max_tokens,
                seed=prompt_seed(spec, index),
                logprobs=0,
            )
            for index in range(len(prompts))
        ]
        ids = encode(self._tokenizer, prompts)
        outputs = self._llm.generate([{"prompt_token_ids": row} for row in ids], params, use_tqdm=False)
        return [self._response(row, output.outputs[0]) for row, output in zip(ids, outputs, strict=True)]

    def logprobs(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        """See `Generator.logprobs`: one prefill of prompt and response together, nothing is generated beyond it."""
        from vllm import SamplingParams

        rows = [
            [*ids, *response.tokens] for ids, response in zip(encode(self._tokenizer, prompts), responses, strict=True)
        ]
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        outputs = self._llm.generate([{"prompt_token_ids": row} for row in rows], params, use_tqdm=False)
        return [
            _total(output.prompt_logprobs[-len(response.tokens) :], response.tokens) if response.tokens else 0.0
            for output, response in zip(outputs, responses, strict=True)
        ]

    def close(self) -> None:
        """See `Generator.close`."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()

    def _response(self, prompt: list[int], completion: Any) -> Response:
        tokens = tuple(completion.token_ids)
        return Response(
            text=split_text([*prompt, *tokens], len(prompt), self._tokenizer)[1],
            tokens=tokens,
            ended=completion.finish_reason == "stop",
            logprob=_total(completion.logprobs, tokens),
        )


class HfGenerator:
    """transformers' own generation: slower, needs no engine, and what the tests compare vLLM with."""

    _BATCH = 64

    def __init__(
        self, model: str, spec: GenerationSpec, prompts: Sequence[Prompt], loaded: tuple[Any, Any] | None = None
    ) -> None:
        """Load the model, a whole one or an adapter over its base; see `load_generator`.

        Args:
            model: its folder, or a Hub id.
            spec: dtype and response length.
            prompts: see `load_generator`.
            loaded: model and tokenizer that are there already; they are given back as they were by `close`.
        """
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        if loaded is not None:
            _check_lengths(loaded[1], loaded[0].config, model, spec, prompts)
        else:
            tokenizer, _ = _tokenizer_and_length(model, spec, prompts)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, spec.dtype))
            loaded = whole.to(device), tokenizer
        self._model, self._tokenizer = loaded
        # An adapter's wrapper hands its own configuration down to the model inside.
        inner = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        self._configs = [(one, one.generation_config) for one in (inner, self._model)]
        self._before = self._model.training, self._tokenizer.pad_token
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model.eval()
        ends = self._model.generation_config.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends or [])
        if self._tokenizer.eos_token_id is not None:
            self._ends.add(self._tokenizer.eos_token_id)
        # As vLLM stops and samples: the tokenizer's end counts too, a model's own penalties and defaults do not.
        self._model.generation_config = GenerationConfig(
            eos_token_id=sorted(self._ends), pad_token_id=self._tokenizer.pad_token_id
        )

    def use(self, weights: Weights) -> None:
        """See `Generator.use`.

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

    def generate(self, prompts: Sequence[Prompt], spec: GenerationSpec) -> list[Response]:
        """See `Generator.generate`."""
        responses: list[Response] = []
        for start in range(0, len(prompts), self._BATCH):
            batch = prompts[start : start + self._BATCH]
            seeds = [prompt_seed(spec, index) for index in range(start, start + len(batch))]
            ids = encode(self._tokenizer, batch)
            rows = self._sample(ids, seeds, spec)
            drafts = [self._draft(prompt, row) for prompt, row in zip(ids, rows, strict=True)]
            for draft, logprob in zip(drafts, self.logprobs(batch, drafts), strict=True):
                responses.append(Response(draft.text, draft.tokens, draft.ended, logprob))
        return responses

    def logprobs(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        """See `Generator.logprobs`."""
        totals: list[float] = []
        for start in range(0, len(prompts), self._BATCH):
            batch = slice(start, start + self._BATCH)
            totals += self._batch_logprobs(prompts[batch], responses[batch])
        return totals

    def close(self) -> None:
        """See `Generator.close`."""
        training, self._tokenizer.pad_token = self._before
        self._model.train(training)
        for holder, config in self._configs:
            holder.generation_config = config
        del self._model, self._configs
        gc.collect()

    def _sample(self, ids: list[list[int]], seeds: Sequence[int], spec: GenerationSpec) -> list[list[int]]:
        import torch

        padded = self._tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        rows = padded.to(self._model.device)
        sampler = [SeededSampling(seeds, spec)] if spec.temperature > 0 else []
        with torch.inference_mode():
            output = self._model.generate(
                **rows,
                do_sample=False,
                max_new_tokens=spec.max_tokens,
                logits_processor=sampler,
            )
        tokens: list[list[int]] = output[:, rows["input_ids"].shape[1] :].tolist()
        return tokens

    def _draft(self, prompt: list[int], row: list[int]) -> Response:
        end = next((position for position, token in enumerate(row) if token in self._ends), None)
        tokens = tuple(row if end is None else row[: end + 1])
        text = split_text([*prompt, *tokens], len(prompt), self._tokenizer)[1]
        return Response(text, tokens, end is not None, 0.0)

    def _batch_logprobs(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        import torch

        heads = encode(self._tokenizer, prompts)
        rows = [[*ids, *response.tokens] for ids, response in zip(heads, responses, strict=True)]
        padded = self._tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
        with torch.inference_mode():
            logits = self._model(**padded.to(self._model.device)).logits.float()
            table = logits[:, :-1].log_softmax(-1)
            picked = table.gather(-1, padded["input_ids"].to(table.device)[:, 1:, None])[..., 0].double().cpu()
        return [
            float(picked[i, len(head) - 1 : len(row) - 1].sum())
            for i, (head, row) in enumerate(zip(heads, rows, strict=True))
        ]


class SeededSampling:
    """Sampling with a seed for each row, as a logits processor for greedy search: the Gumbel-max trick.

    argmax(logits/T + g), g standard Gumbel noise from the row's own generator, is a draw from softmax(logits/T); a
    row's noise does not depend on which other rows are in the batch. top_p masks the tail first.
    """

    def __init__(self, seeds: Sequence[int], spec: GenerationSpec) -> None:
        """Make a generator for every row.

        Args:
            seeds: one for each row.
            spec: temperature > 0 and top_p.
        """
        import torch
        from transformers import TopPLogitsWarper

        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature = spec.temperature
        self._top_p = TopPLogitsWarper(spec.top_p) if spec.top_p < 1 else None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return perturbed scores [rows, vocabulary] whose argmax is a sample."""
        import torch

        scaled = scores.float() / self._temperature
        if self._top_p is not None:
            scaled = self._top_p(input_ids, scaled)
        noise = torch.stack([torch.rand(scaled.shape[-1], generator=g) for g in self._generators])
        return scaled - torch.log(-torch.log(noise.clamp_min(1e-20))).to(scaled.device)


def _prepare_vllm() -> None:
    """Set what vLLM reads from the environment when it is imported; a user's own settings stand."""
    defaults = {
        # In this process: quick to build, and an iterator of tensors can be handed to the worker.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _share_of_gpu() -> dict[str, Any]:
    """Return vLLM's share of a GPU: most of what is free, since reward models may be there already."""
    import torch

    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"gpu_memory_utilization": round(0.9 * free / total, 3)}


def _repack_tied_head(model: Any) -> None:
    """Bring a tied head up to date on a CPU.

    vLLM packs the head's weight into a layout of its own there. A reload packs what it has loaded, and a tied head
    is not loaded: it would go on with the packed copy of the old embeddings.
    """
    head: Any = getattr(model, "lm_head", None)
    if hasattr(head, "cpu_linear") and getattr(model.config, "tie_word_embeddings", False):
        head.quant_method.process_weights_after_loading(head)


def _tokenizer_and_length(model: str, spec: GenerationSpec, prompts: Sequence[Prompt]) -> tuple[Any, int]:
    """Return the tokenizer and the longest sequence needed, which the model must be able to hold."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, _check_lengths(tokenizer, AutoConfig.from_pretrained(_base_of(model)), model, spec, prompts)


def _check_lengths(tokenizer: Any, config: Any, model: str, spec: GenerationSpec, prompts: Sequence[Prompt]) -> int:
    """Return the longest sequence needed.

    Raises:
        UserError: a prompt without tokens, or one that does not fit the model with its response.
    """
    lengths = [len(ids) for ids in encode(tokenizer, prompts)]
    if 0 in lengths:
        index = lengths.index(0)
        raise fail(
            "a prompt has no tokens",
            where=f"prompt {index}",
            got=repr(prompts[index]),
            remedy="begin it with at least one token, such as the tokenizer's BOS",
        )
    # One position more than generation needs: scoring a full-length response generates a token to get at the rest.
    longest = max(lengths, default=0) + spec.max_tokens + 1
    room = getattr(config, "max_position_embeddings", longest)
    if longest > room:
        raise fail(
            "a prompt and its response do not fit the model",
            where=model,
            expected=f"at most {room} tokens",
            got=f"{longest} (the longest prompt, generation.max_tokens = {spec.max_tokens}, and one)",
            remedy="shorten prompts or generation.max_tokens",
        )
    return longest


def _base_of(model: str) -> str:
    """Return the model under an adapter's folder; any other model is its own."""
    folder = Path(model)
    return read_adapter_config(folder).base if folder.is_dir() and is_adapter(folder) else model


def _total(logprobs: Sequence[Any], tokens: Sequence[int]) -> float:
    return float(sum(entry[token].logprob for entry, token in zip(logprobs, tokens, strict=True)))
