"""The causal models of judges, each in memory once for all rewards that ask it, and their engines.

The engines are those that generate in a sweep, with the probabilities of the next token. They take tokens, since a
judge's answer may begin with a given text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rewarded_lines.checkpoints.reader import resolve_folder
from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.lengths import positions_of
from rewarded_lines.engines.base import SwappingGenerator, Tokens, Workload
from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.engines.tokenizers import attention_of, base_model, load_config, load_tokenizer
from rewarded_lines.engines.transformers_engine import HfGenerator
from rewarded_lines.engines.vllm_core import sampling_settings
from rewarded_lines.engines.vllm_models import VllmGenerator
from rewarded_lines.errors import fail
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.classifier_backends import bytes_held, cannot_load, with_dtype
from rewarded_lines.rewards.judge_questions import Answer
from rewarded_lines.rewards.model_sizes import LONGEST, engine_size, refuse_too_large, weights_size
from rewarded_lines.rewards.reward_checkpoints import content_hash
from rewarded_lines.rewards.shared_model import SharedModel
from rewarded_lines.rewards.text_batches import Batch, TextBatches, width_of
from rewarded_lines.rewards.vllm_classifier import check_vllm

Found = TypeVar("Found")


@dataclass(frozen=True)
class Next:
    """Probabilities of the next token: of those that were asked for, by id, and of the likeliest."""

    shares: dict[int, float]
    likeliest: int


class HfJudge(HfGenerator):
    """A judge in transformers. A row's length alone decides the shape of its batch, and so its last bits."""

    def __init__(self, work: Workload, loaded: tuple[Any, Any], shapes: TextBatches) -> None:
        """Take over a model with its tokenizer; `shapes` outlive it."""
        super().__init__(work, loaded)
        self._shapes = shapes

    def move(self, device: str) -> None:
        """Move the weights to another device."""
        self._model.to(device)

    def answers(self, heads: Sequence[Tokens], seeds: Sequence[int], spec: GenerationSpec) -> list[Answer]:
        """Return the text that the model writes after each row of tokens."""
        reader = ResponseReader.of(self._tokenizer, self._ends, spec)

        def write(members: Sequence[int], places: Sequence[int]) -> list[Answer]:
            rows = [list(heads[at]) for at in places]
            made, stops = self._sample(rows, [seeds[at] for at in places], spec, reader)
            cuts = [reader.cut(heads[at], row[:stop]) for at, row, stop in zip(members, made, stops, strict=False)]
            return [
                Answer(reader.text(heads[at], tokens)[0], ended)
                for at, (tokens, ended) in zip(members, cuts, strict=True)
            ]

        return self._in_batches(heads, write)

    def next_tokens(self, heads: Sequence[Tokens], asked: Sequence[Sequence[int]]) -> list[Next]:
        """Return the probabilities of the ids in `asked`, those of each row, at temperature 1."""
        import torch

        def read(members: Sequence[int], places: Sequence[int]) -> list[Next]:
            rows = self._padded([list(heads[at]) for at in places], "left")
            with torch.inference_mode():
                # `generate` knows how each model reads a row that is padded on the left.
                output = self._model.generate(
                    **rows, do_sample=False, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
                )
                table = output.logits[0].double().softmax(-1).cpu()
            return [
                Next({token: float(row[token]) for token in asked[at]}, int(row.argmax()))
                for at, row in zip(members, table, strict=False)
            ]

        return self._in_batches(heads, read)

    def _in_batches(
        self, heads: Sequence[Tokens], work: Callable[[Sequence[int], Sequence[int]], list[Found]]
    ) -> list[Found]:
        """Return what `work` makes of each row; it gets the places of a batch's rows, and those with fillers."""

        def one(batch: Batch) -> list[Found]:
            fillers = [batch.members[0]] * (batch.rows - len(batch.members))
            return work(batch.members, [*batch.members, *fillers])

        return self._shapes.run([len(head) for head in heads], one)

    def _padded(self, rows: Sequence[list[int]], side: str) -> Any:
        padded = self._tokenizer.pad(
            {"input_ids": rows},
            padding="max_length",
            max_length=width_of(max(map(len, rows))),
            padding_side=side,
            return_tensors="pt",
        )
        return padded.to(self._model.device)


class VllmJudge(VllmGenerator):
    """A judge in vLLM, which chooses its batches itself: other rows can change the last bits."""

    def __init__(self, work: Workload, size: float) -> None:
        """Start the engine; it may take `size` bytes of a GPU."""
        SwappingGenerator.__init__(self, work)
        # Without CUDA graphs: a judge is loaded again and again, and its memory is counted.
        self._start(work, size=size, enforce_eager=True)

    def answers(self, heads: Sequence[Tokens], seeds: Sequence[int], spec: GenerationSpec) -> list[Answer]:
        """See `HfJudge.answers`."""
        from vllm import SamplingParams

        reader = ResponseReader.of(self._tokenizer, self._ends, spec)
        settings = [sampling_settings(spec, seed, reader) for seed in seeds]
        params = [SamplingParams(**{**one, "logprobs": None}, detokenize=False) for one in settings]
        found = []
        for head, output in zip(heads, self._run(heads, params, [None] * len(heads)), strict=True):
            tokens, ended = reader.cut(head, output.outputs[0].token_ids)
            found.append(Answer(reader.text(head, tokens)[0], ended))
        return found

    def next_tokens(self, heads: Sequence[Tokens], asked: Sequence[Sequence[int]]) -> list[Next]:
        """See `HfJudge.next_tokens`."""
        from vllm import SamplingParams

        how = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
        params = [SamplingParams(**how, logprob_token_ids=list(ids)) for ids in asked]
        found = []
        for ids, output in zip(asked, self._run(heads, params, [None] * len(heads)), strict=True):
            (one,) = output.outputs
            entry = one.logprobs[0]
            found.append(Next({token: math.exp(entry[token].logprob) for token in ids}, one.token_ids[0]))
        return found


class JudgeModel(SharedModel[HfJudge | VllmJudge]):
    """A causal model with an engine."""

    def __init__(self, where: str, spec: RewardSpec, reference: str, device: str, beside: Mapping[str, Any]) -> None:
        """Load nothing yet; see `SharedModel`."""
        super().__init__(where, reference, device, beside)
        self._config = load_config(reference)
        self._spec = with_dtype(where, spec, self._config)
        self._shapes = TextBatches(where, device, self._spec)
        refuse_too_large(where, base_model(reference), self._spec, self._config, device)
        limits = [spec.max_tokens, positions_of(self._config), LONGEST if spec.backend == "vllm" else None]
        self.longest = min((limit for limit in limits if limit), default=None)

    def _build(self) -> HfJudge | VllmJudge:
        if self._spec.backend == "vllm":
            return self._vllm()
        model = load_causal(self._where, self._spec, self._reference).to(self.device)
        self.size = bytes_held(model)
        return HfJudge(self._work(), (model, load_tokenizer(self._reference, GenerationSpec())), self._shapes)

    def _content(self) -> str:
        parts = dict.fromkeys([self._reference, base_model(self._reference)])
        return ":".join(map(content_hash, parts))

    def _work(self) -> Workload:
        spec = GenerationSpec(dtype=self._spec.dtype, max_tokens=1)
        return Workload(self._reference, spec, (), longest=(self.longest or 1) - 1)

    def _vllm(self) -> VllmJudge:
        check_vllm(self._where, self.device)
        weights = weights_size(str(resolve_folder(base_model(self._reference))), self._spec, self._config)
        needed, self.size = engine_size(self._config, self._spec, weights, self.longest or LONGEST, self.device)
        try:
            return VllmJudge(self._work(), needed)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise cannot_load(self._where, self._reference, error, "use `backend: hf`") from error


def share_judge(known: dict[str, Any], where: str, spec: RewardSpec, reference: str, device: str) -> JudgeModel:
    """Return the model in `known` that another reward asks, too, or a new one."""
    key = repr(
        ("judge", reference, device, spec.backend, spec.dtype, spec.batch_size, spec.max_tokens, spec.batch_tokens)
    )
    if key not in known:
        known[key] = JudgeModel(where, spec, reference, device, known)
    found: JudgeModel = known[key]
    return found


def load_causal(where: str, spec: RewardSpec, reference: str) -> Any:
    """Return a causal model in evaluation mode; refuse one whose head would be random."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            reference,
            dtype=getattr(torch, spec.dtype),
            output_loading_info=True,
            trust_remote_code=False,
            **attention_of(load_config(reference)),
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise cannot_load(where, reference, error) from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise fail(
            "not a language model: weights are missing",
            where=where,
            expected="a causal model with its head",
            got=f"{reference} without {', '.join(missing[:3])}",
            remedy="declare a classifier with `model:` in place of `judge:`",
        )
    return model.eval()
