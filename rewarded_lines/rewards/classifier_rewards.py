"""Rewards from a sequence classifier with a declared template, backend and format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.hashing import model_hash
from rewarded_lines.config_values import parse_format
from rewarded_lines.data.lengths import positions_of
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.errors import Problem, fail
from rewarded_lines.references import looks_local
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.classifier_backends import cannot_load, find_device
from rewarded_lines.rewards.classifier_inputs import ClassifierReading
from rewarded_lines.rewards.reward import Columns, Reward
from rewarded_lines.rewards.score_checks import PairError, check_scores
from rewarded_lines.rewards.transformers_classifier import HuggingFaceClassifier
from rewarded_lines.rewards.vllm_classifier import VllmClassifier

# Marks classifiers that older versions read with other tokens; their cached scores do not count.
_READ_ANEW = ":2"
Backend = HuggingFaceClassifier | VllmClassifier
_BACKENDS: dict[str, type[Backend]] = {"hf": HuggingFaceClassifier, "vllm": VllmClassifier}


class ModelReward(Reward):
    """A sequence classifier with a declared template and format."""

    def __init__(self, name: str, spec: RewardSpec, reference: str, device: str = "auto") -> None:
        """Load the classifier; check that it has the classes of the format."""
        self.name = name
        self.unit = spec.unit or "logit"
        self._where = f"reward `{name}`"
        self._spec, self._reference = spec, reference
        self._terms = parse_format(spec.format)
        self.device = find_device(spec.device or device, self._where)
        self.tokenizer, config = _read_folder(self._where, reference)
        self._reading = ClassifierReading(self.tokenizer, spec.template, self._where)
        self._pad, self._positions = config.pad_token_id, positions_of(config)
        self._backend: Backend | None = None
        self._content = ""
        backend = self._load()
        self.size, self._longest = backend.size, backend.longest
        self._content = _fingerprint(reference)
        self.fingerprint = self._content + (_READ_ANEW if self._reading.is_new(self._pad) else "")
        if max(index for index, _ in self._terms) >= backend.classes:
            self.free()
            raise fail(
                f"format {spec.format!r} names a class that the model does not have",
                where=self._where,
                expected=f"classes 0 to {backend.classes - 1}",
                got=reference,
            )

    @property
    def loaded(self) -> bool:
        """See `Reward.loaded`."""
        return self._backend is not None

    def free(self) -> None:
        """See `Reward.free`."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    @property
    def limit(self) -> int | None:
        """See `Reward.limit`."""
        limits = [self._spec.max_tokens or self._positions, self._longest]
        return min((limit for limit in limits if limit), default=None)

    def lengths(self, prompts: Sequence[Prompt], responses: Sequence[str], columns: Columns = None) -> list[int]:
        """See `Reward.lengths`."""
        return [len(row) for row in self._reading.tokens(prompts, responses)[0]]

    def check(self, prompts: Sequence[Prompt]) -> str:
        """See `Reward.check`."""
        return self._reading.check(prompts)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], columns: Columns = None) -> list[float]:
        """Return the format's combination of logits for each pair; see `Reward.score`.

        With the backend "hf", a pair's score has the same bits whatever the other pairs and their order.
        """
        if not prompts:
            return []
        backend = self._load()
        ids, types = self._reading.tokens(prompts, responses)
        self._check_lengths(ids, prompts, responses)
        logits = backend.logits([self._without_padding(row) for row in ids], types)
        scores = [sum(weight * row[index] for index, weight in self._terms) for row in logits]
        return check_scores(self._where, scores, prompts, responses)

    def _without_padding(self, row: list[int]) -> list[int]:
        """Return a text's tokens without padding tokens at the end.

        A decoder's head reads the last token that is not the padding token of the config.
        """
        kept = list(row)
        while len(kept) > 1 and kept[-1] == self._pad:
            kept.pop()
        # The classifier needs at least one token.
        return kept or [self.tokenizer.eos_token_id]

    def _load(self) -> Backend:
        if self._backend is None:
            if self._content and self._content != _fingerprint(self._reference):
                raise fail(
                    "the model changed since it was first loaded",
                    where=self._where,
                    got=self._reference,
                    remedy="start again once it is complete",
                )
            build = _BACKENDS[self._spec.backend]
            self._backend = build(self._where, self._spec, self._reference, self.device)
        return self._backend

    def _check_lengths(self, ids: list[list[int]], prompts: Sequence[Prompt], responses: Sequence[str]) -> None:
        """Refuse texts over the limit: a cut would remove the response."""
        limit = self.limit
        index = max(range(len(ids)), key=lambda index: len(ids[index]))
        if limit is None or len(ids[index]) <= limit:
            return
        declared = limit == self._spec.max_tokens
        origin = "`max_tokens` of the reward" if declared else "all that the model can read"
        problem = Problem(
            "a text is too long for the classifier",
            where=self._where,
            expected=f"at most {limit} tokens ({origin})",
            got=f"{len(ids[index])} tokens for",
            remedy="raise `max_tokens` if the model can read more, or shorten prompts or responses",
        )
        raise PairError(problem, index, (prompts[index], responses[index]))


def _read_folder(where: str, reference: str) -> tuple[Any, Any]:
    """Return the tokenizer of a model, and the config of its text part."""
    from transformers import AutoConfig, AutoTokenizer

    if looks_local(reference) and not Path(reference, "config.json").is_file():
        raise fail(
            "no model there",
            where=where,
            expected="a folder with config.json and weights",
            got=reference,
            remedy="train it with recipes/reward.py, or name a Hub id",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(reference)
        return tokenizer, AutoConfig.from_pretrained(reference).get_text_config()
    except (OSError, ValueError, RuntimeError) as error:
        raise cannot_load(where, reference, error) from error


def _fingerprint(reference: str) -> str:
    """Return the hash of a folder, or the commit of a Hub model, which names its cache folder."""
    from transformers.utils import cached_file

    if Path(reference).is_dir():
        return model_hash(Path(reference))
    return Path(str(cached_file(reference, "config.json"))).parent.name
