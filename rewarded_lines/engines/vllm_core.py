"""One vLLM engine as a generator: it answers requests with a seed each, and scores texts."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from itertools import zip_longest
from os.path import commonprefix
from typing import Any

from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.engines.base import Generator, Pairs, Response, Tokens, Workload, seeded_rows
from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.engines.tokenizers import load_config, load_tokens
from rewarded_lines.engines.vllm_arguments import check_length
from rewarded_lines.engines.vllm_memory import few_scored_at_once
from rewarded_lines.engines.vllm_process import end_vllm, take_turn, vllm_device
from rewarded_lines.engines.vllm_versions import finds_compiler, start_vllm
from rewarded_lines.errors import Problem, UserError
from rewarded_lines.out_of_memory import empty_cache

Row = tuple[tuple[int, ...], tuple[int, ...]]
"""The tokens of a head and of its tail."""


# One list of numbers in the place of an object for each token, and no deep copy of a request's settings.
_LEAN: dict[str, Any] = {"flat_logprobs": True, "skip_clone": True}
# Settings with the same name and meaning in vLLM.
_SAME = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens"}


class VllmCore(Generator):
    """One engine. Responses do not depend on earlier requests. `loaded`: LoRA requests, or None for the model."""

    def _start(self, work: Workload, **options: Any) -> None:
        """Start the engine; `options` go to `start_vllm`."""
        self._tokenizer, self._ends, longest = load_tokens(work)
        check_length(work.settings, longest)
        # On a CPU blocks are short, since prompts share only whole blocks. No prompt is split between two batches: vLLM
        # would have to rewind the request's generator, and a CPU's generator cannot be rewound.
        usual: dict[str, Any] = {"enforce_eager": True, "block_size": 32, "enable_chunked_prefill": False}
        if vllm_device() == "cuda":
            # With CUDA graphs: swaps write to the addresses that they read.
            config = load_config(work.model)
            few = few_scored_at_once(longest, config.get_text_config() is not config, work.settings.args)
            usual = {"enforce_eager": not finds_compiler(), **few}
        self._llm: Any = start_vllm(
            settings=work.settings,
            spare=work.spare,
            model=work.model,
            tokenizer=work.texts,
            dtype=work.spec.dtype,
            max_model_len=longest,
            # By name: a worker may be another process.
            worker_extension_cls="rewarded_lines.engines.vllm_models.MergingWorker",
            **{**usual, **options},
        )
        # The worker processes end when this object is collected or Python exits.
        shared = self.call("shared_memory_name")[0] if work.settings.tensor_parallel > 1 else ""
        self._shut_down = weakref.finalize(self, end_vllm, self._llm, shared)

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of `MergingWorker` on every worker; return what each returns."""
        take_turn(self._llm)
        return list(self._llm.collective_rpc(method, args=args))

    def ask(self, method: str, *args: Any) -> str:
        """Call a method that answers why a worker fails: vLLM cannot send errors from process to process.

        Returns:
            The reason; "" if all goes well.

        Raises:
            UserError: the reason has "problems".
        """
        reason = ""
        for answer in self.call(method, *args):
            if problems := answer.get("problems"):
                raise UserError(Problem(**problem) for problem in problems)
            reason = reason or answer.get("reason", "")
        return reason

    def _generate(self, prompts: Sequence[Prompt], spec: GenerationSpec, loaded: Sequence[Any]) -> list[list[Response]]:
        """See `Generator.generate`; all requests share one batch."""
        from vllm import SamplingParams

        rows = seeded_rows(self.encode(prompts), spec)
        reader = ResponseReader.of(self._tokenizer, self._ends, spec)
        settings = [sampling_settings(spec, seed, reader) for _, seed in rows]
        # vLLM needs the text only to find stop texts; responses are decoded from the tokens.
        params = [SamplingParams(**one, **_LEAN, detokenize=bool(spec.stop)) for one in settings] * len(loaded)
        heads = [row for row, _ in rows] * len(loaded)
        outputs = self._run(heads, params, [adapter for adapter in loaded for _ in rows])
        made = []
        for head, output in zip(heads, outputs, strict=True):
            (one,) = output.outputs
            made.append(make_response(reader, head, one.token_ids, _given(one.logprobs), one.finish_reason))
        return [made[k * len(rows) : (k + 1) * len(rows)] for k in range(len(loaded))]

    def _logprobs(self, pairs: Pairs, loaded: Any) -> list[float]:
        """See `Generator.logprobs`. A prefill reads head and tail together; the token generated after it is ignored.

        Pairs are sorted, so that a shared head is computed once; equal pairs are scored once.
        """
        keys = [(tuple(head), tuple(tail)) for head, tail in pairs]
        assert all(head for head, _ in keys), "a first token has no probability"
        asked = sorted(set(keys), key=lambda row: row[0] + row[1])
        totals: dict[Row, float] = {}
        before: tuple[int, ...] = ()
        logprobs: list[float] = []
        for (head, tail), own in zip(asked, self._score(asked, loaded, shared=True), strict=True):
            # vLLM reports no probability for cached tokens. Of all earlier rows, the last shares most tokens with this.
            shared = logprobs[: len(commonprefix([before, head + tail]))]
            logprobs = [old if math.isnan(new) else new for old, new in zip_longest(shared, own, fillvalue=math.nan)]
            before, totals[head, tail] = head + tail, sum(logprobs[len(head) :])
        # Score again the rows whose first token after a cached block was never computed.
        left = [row for row in asked if math.isnan(totals[row])]
        for (head, tail), own in zip(left, self._score(left, loaded, shared=False), strict=True):
            totals[head, tail] = sum(own[len(head) :])
        return [totals[key] for key in keys]

    def _score(self, rows: Sequence[Row], adapter: Any, shared: bool) -> list[list[float]]:
        """Return the log-probabilities of each row's tokens; NaN for its first token and those after cached ones."""
        if not rows:
            return []
        from vllm import SamplingParams

        how = {**_LEAN, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
        params = SamplingParams(**how, skip_reading_prefix_cache=not shared)
        outputs = self._run([head + tail for head, tail in rows], [params] * len(rows), [adapter] * len(rows))
        found = []
        for (head, tail), output in zip(rows, outputs, strict=True):
            row, known = head + tail, output.num_cached_tokens + 1
            # Counted from the end: some of vLLM's runners return no entries for cached tokens.
            own = _given(output.prompt_logprobs[known - len(row) :]) if known < len(row) else []
            found.append([math.nan] * (len(row) - len(own)) + own)
        return found

    def close(self) -> None:
        """See `Generator.close`."""
        self._shut_down()
        self.__dict__.pop("_llm", None)
        empty_cache()

    def _run(self, rows: Sequence[Tokens], params: Sequence[Any], adapters: Sequence[Any]) -> list[Any]:
        import torch._dynamo

        take_turn(self._llm)
        # Cached prefixes may be another model's. They also change the batch's shape and so its last bits.
        self._llm.reset_prefix_cache()
        asked = [{"prompt_token_ids": list(row)} for row in rows]
        # On a CPU torch would compile a small function: that takes seconds, and needs a C++ compiler.
        with torch._dynamo.config.patch(disable=vllm_device() == "cpu"):
            return list(self._llm.generate(asked, list(params), lora_request=list(adapters), use_tqdm=False))


def _given(entries: Any) -> list[float]:
    """Return the log-probabilities of the tokens that are there: each position's first entry."""
    return [entries.logprobs[start] for start in entries.start_indices]


def make_response(
    reader: ResponseReader, prompt: Tokens, tokens: Tokens, logprobs: Sequence[float], finish_reason: str | None
) -> Response:
    """Return a response from what vLLM returns, here or from a server; each token has a logprob."""
    own, ended = reader.cut(prompt, tokens)
    return reader.response(prompt, own, ended or finish_reason == "stop", float(sum(logprobs[: len(own)])))


def sampling_settings(spec: GenerationSpec, seed: int, reader: ResponseReader) -> dict[str, Any]:
    """Return the settings of a request, for vLLM here or on a server."""
    return {
        **spec.model_dump(include=_SAME),
        "stop": list(spec.stop),
        # The same end tokens in every engine; they include vLLM's own.
        "stop_token_ids": sorted(reader.ends),
        "seed": seed,
        "logprobs": 0,
    }
