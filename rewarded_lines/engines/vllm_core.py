"""One vLLM engine in this process: it answers requests with a seed each, and scores texts."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.prompts import Prompt, encode
from rewarded_lines.engines.base import Generator, Pairs, Response, Tokens, Workload, seeded_rows
from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.engines.tokenizers import ModelTokens
from rewarded_lines.processes import prepare_vllm

Row = tuple[tuple[int, ...], tuple[int, ...]]
"""The tokens of a head and of its tail."""


class VllmCore:
    """One engine. Responses do not depend on earlier requests."""

    def __init__(self, work: Workload, **options: Any) -> None:
        """Start the engine; `options` go to vLLM's `LLM`."""
        prepare_vllm()
        self._tokens = ModelTokens.load(work)
        from vllm import LLM

        self._llm: Any = LLM(
            model=work.model,
            tokenizer=work.texts,
            dtype=work.spec.dtype,
            max_model_len=self._tokens.longest,
            tensor_parallel_size=work.tensor_parallel,
            enforce_eager=True,
            seed=0,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            # By name: a worker may be another process.
            worker_extension_cls="rewarded_lines.engines.vllm_models.MergingWorker",
            **_device_options(),
            **options,
        )
        # The worker processes end when this object is collected or Python exits.
        shared = self.call("shared_memory_name")[0] if work.tensor_parallel > 1 else ""
        self._shut_down = weakref.finalize(self, _end, self._llm.llm_engine.engine_core, shared)

    @property
    def engine(self) -> Any:
        """Return vLLM's own engine, which loads and drops adapters."""
        return self._llm.llm_engine

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """See `Generator.encode`."""
        return encode(self._tokens.tokenizer, prompts)

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of `MergingWorker` on every worker; return what each returns."""
        return list(self._llm.collective_rpc(method, args=args))

    def generate(
        self, prompts: Sequence[Prompt], spec: GenerationSpec, adapters: Sequence[Any] = (None,)
    ) -> list[list[Response]]:
        """Return for each adapter `spec.n` responses to each prompt; all requests share one batch.

        An adapter is a `LoRARequest`, or None for the model itself.
        """
        from vllm import SamplingParams

        rows = seeded_rows(self.encode(prompts), spec)
        reader = ResponseReader.of(self._tokens.tokenizer, self._tokens.ends, spec)
        settings = [sampling_settings(spec, seed, reader) for _, seed in rows]
        # vLLM needs the text only to find stop texts; responses are decoded from the tokens.
        params = [SamplingParams(**one, detokenize=bool(spec.stop)) for one in settings] * len(adapters)
        heads = [row for row, _ in rows] * len(adapters)
        outputs = self._run(heads, params, [adapter for adapter in adapters for _ in rows])
        made = []
        for head, output in zip(heads, outputs, strict=True):
            (one,) = output.outputs
            logprobs = [entry[token].logprob for entry, token in zip(one.logprobs, one.token_ids, strict=True)]
            made.append(make_response(reader, head, one.token_ids, logprobs, one.finish_reason))
        return [made[k * len(rows) : (k + 1) * len(rows)] for k in range(len(adapters))]

    def logprobs(self, pairs: Pairs, adapter: Any = None) -> list[float]:
        """See `Generator.logprobs`. A prefill reads head and tail together; the token generated after it is ignored.

        Pairs are sorted, so that a shared head is computed once; equal pairs are scored once.
        """
        keys = [(tuple(head), tuple(tail)) for head, tail in pairs]
        assert all(head for head, _ in keys), "a first token has no probability"
        asked = sorted(set(keys))
        # vLLM reports no probability for cached tokens: the row that computed them has it. So each prefix of a row gets
        # a number, and `seen` keeps the log-probability of the prefix's last token.
        prefixes: dict[tuple[int, int], int] = {}
        seen: dict[int, float] = {}
        paths: dict[Row, list[int]] = {}
        for (head, tail), (cached, logprobs) in zip(asked, self._score(asked, adapter, shared=True), strict=True):
            prefix, path = 0, []
            for place, token in enumerate(head + tail):
                prefix = prefixes.setdefault((prefix, token), len(prefixes) + 1)
                path.append(prefix)
                if place > cached:
                    seen[prefix] = logprobs[place]
            paths[head, tail] = path[len(head) :]
        # Score again the rows whose first token after a cached block was never computed.
        left = [row for row in asked if any(prefix not in seen for prefix in paths[row])]
        for (head, tail), (_, logprobs) in zip(left, self._score(left, adapter, shared=False), strict=True):
            seen |= dict(zip(paths[head, tail], logprobs[len(head) :], strict=True))
        totals = {row: sum(seen[prefix] for prefix in path) for row, path in paths.items()}
        return [totals[key] for key in keys]

    def _score(self, rows: Sequence[Row], adapter: Any, shared: bool) -> list[tuple[int, list[float]]]:
        """Return each row's number c of cached tokens and its log-probabilities: 0 for the first c + 1 tokens."""
        if not rows:
            return []
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, skip_reading_prefix_cache=not shared
        )
        outputs = self._run([head + tail for head, tail in rows], [params] * len(rows), [adapter] * len(rows))
        found = []
        for (head, tail), output in zip(rows, outputs, strict=True):
            row, cached = head + tail, output.num_cached_tokens
            # Counted from the end: some of vLLM's runners return no entries for cached tokens.
            entries = {place: output.prompt_logprobs[place - len(row)] for place in range(cached + 1, len(row))}
            found.append((cached, [entries[i][t].logprob if i in entries else 0.0 for i, t in enumerate(row)]))
        return found

    def close(self) -> None:
        """Free the engine, its memory and its processes."""
        self._shut_down()
        self.__dict__.pop("_llm", None)
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _run(self, rows: Sequence[Tokens], params: Sequence[Any], adapters: Sequence[Any]) -> list[Any]:
        import torch._dynamo

        # Cached prefixes may be another model's. They also change the batch's shape and so its last bits.
        self._llm.reset_prefix_cache()
        asked = [{"prompt_token_ids": list(row)} for row in rows]
        # On a CPU torch would compile a small function: that takes seconds, and needs a C++ compiler.
        with torch._dynamo.config.patch(disable=not torch.cuda.is_available()):
            return list(self._llm.generate(asked, list(params), lora_request=list(adapters), use_tqdm=False))


class CoreGenerator(Generator):
    """A generator over one `VllmCore`. `loaded`: LoRA requests, or None for the model itself."""

    _core: VllmCore

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """See `Generator.encode`."""
        return self._core.encode(prompts)

    def close(self) -> None:
        """See `Generator.close`."""
        self._core.close()

    def _generate(self, prompts: Sequence[Prompt], spec: GenerationSpec, loaded: Sequence[Any]) -> list[list[Response]]:
        return self._core.generate(prompts, spec, loaded)

    def _logprobs(self, pairs: Pairs, loaded: Any) -> list[float]:
        return self._core.logprobs(pairs, loaded)


def make_response(
    reader: ResponseReader, prompt: Tokens, tokens: Tokens, logprobs: Sequence[float], finish_reason: str | None
) -> Response:
    """Return a response from what vLLM returns, here or from a server; each token has a logprob."""
    own, ended = reader.cut(prompt, tokens)
    return reader.response(prompt, own, ended or finish_reason == "stop", float(sum(logprobs[: len(own)])))


def _device_options() -> dict[str, Any]:
    """Return vLLM's options for a GPU or a CPU.

    GPU: vLLM takes most of the free memory; reward models may use the rest.
    CPU: blocks are short, since prompts share only whole blocks of keys and values. No prompt is split between two
    batches: vLLM would have to rewind the request's generator, and a CPU's generator cannot be rewound.
    """
    import torch

    if not torch.cuda.is_available():
        return {"block_size": 32, "enable_chunked_prefill": False}
    free, total = torch.cuda.mem_get_info()
    return {"gpu_memory_utilization": round(0.9 * free / total, 3)}


def sampling_settings(spec: GenerationSpec, seed: int, reader: ResponseReader) -> dict[str, Any]:
    """Return the settings of a request, for vLLM here or on a server."""
    return {
        "temperature": spec.temperature,
        "top_p": spec.top_p,
        "top_k": spec.top_k,
        "min_p": spec.min_p,
        "repetition_penalty": spec.repetition_penalty,
        "max_tokens": spec.max_tokens,
        "stop": list(spec.stop),
        # The same end tokens in every engine; they include vLLM's own.
        "stop_token_ids": sorted(reader.ends),
        "seed": seed,
        "logprobs": 0,
    }


def _end(engine_core: Any, shared: str) -> None:
    """End an engine and remove the shared memory that vLLM's CPU workers leave behind."""
    engine_core.shutdown()
    if shared:
        for path in Path("/dev/shm").glob(f"{shared}-*-cpushm_*"):
            path.unlink(missing_ok=True)
