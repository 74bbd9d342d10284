"""Rewards that a sequence classifier gives: template and tokens here, logits by a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.hashing import model_hash
from rewarded_lines.config import RewardSpec
from rewarded_lines.config_values import parse_format
from rewarded_lines.data.lengths import positions_of
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.errors import Problem, fail
from rewarded_lines.references import looks_local
from rewarded_lines.rewards.classifier_backends import Backend, cannot_load
from rewarded_lines.rewards.classifier_inputs import ClassifierReading
from rewarded_lines.rewards.reward_devices import find_device
from rewarded_lines.rewards.score_checks import PairError, check_scores
from rewarded_lines.rewards.transformers_classifier import HuggingFaceClassifier
from rewarded_lines.rewards.vllm_classifier import VllmClassifier

# Of a classifier that used to be read at other tokens: scores of before are not taken for today's.
_READ_ANEW = ":2"
_BACKENDS: Mapping[str, Callable[[str, RewardSpec, str, str, Any], Backend]] = {
    "hf": HuggingFaceClassifier,
    "vllm": VllmClassifier,
}


class ModelReward:
    """A sequence classifier read through its declared template and format; see `Reward` for the attributes."""

    def __init__(self, name: str, spec: RewardSpec, reference: str, device: str = "auto") -> None:
        """Load the classifier.

        Args:
            name: the reward's name.
            spec: its declaration.
            reference: a folder or a Hub id.
            device: see `load_reward`.

        Raises:
            UserError: it cannot be loaded, or its head lacks a class that the format names.
        """
        self.name = name
        self.unit = spec.unit or "logit"
        self._where = f"reward `{name}`"
        self._spec, self._reference = spec, reference
        self._terms = parse_format(spec.format)
        self.device = find_device(spec.device or device, self._where)
        _check_folder(self._where, reference)
        self._tokenizer: Any = None
        self._backend: Backend | None = None
        self.fingerprint = self._content = ""
        backend = self._load()
        self.size, self._longest = backend.size, backend.longest
        self._content = _fingerprint(reference)
        self.fingerprint = self._content + (_READ_ANEW if self._reading.is_new(self._pad) else "")
        self._check_classes(backend.classes)

    @property
    def loaded(self) -> bool:
        """Say whether the weights are in memory."""
        return self._backend is not None

    def load(self) -> None:
        """Bring the weights into memory, if they are not there.

        Raises:
            UserError: the model cannot be loaded any more, or is another by now.
        """
        self._load()

    def free(self) -> None:
        """Let go of the weights; the next score loads them again."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    @property
    def limit(self) -> int | None:
        """The most tokens that it reads: `max_tokens`, else its positions; never more than its backend can."""
        limits = [self._spec.max_tokens or self._positions, self._longest]
        return min((limit for limit in limits if limit), default=None)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer by which its lengths count."""
        return self._tokenizer

    def lengths(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[int]:
        """Return how many tokens it reads of each prompt and response."""
        return [len(row) for row in self._reading.tokens(prompts, responses)[0]]

    def check(self, prompts: Sequence[Prompt]) -> str:
        """Return what it will not read of some prompts; see `Reward.check`."""
        return self._reading.check(prompts)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return the declared combination of logits for each pair; see `Reward.score`.

        With the backend "hf" a pair's score is the same to the bit, whatever pairs it comes with, in whatever order.
        """
        if not prompts:
            return []
        backend = self._load()
        ids, types = self._reading.tokens(prompts, responses)
        self._check_lengths(ids, prompts, responses)
        logits = backend.logits([self._read_part(row) for row in ids], types)
        scores = [sum(weight * row[index] for index, weight in self._terms) for row in logits]
        return check_scores(self._where, scores, prompts, responses)

    def _read_part(self, row: list[int]) -> list[int]:
        """Return a text's tokens up to the one that the classifier reads.

        A decoder passes over the padding token of its config where a text ends with it, as transformers does with a
        text by itself. Without those tokens, every backend reads the same one.
        """
        kept = list(row)
        while len(kept) > 1 and kept[-1] == self._pad:
            kept.pop()
        # A text that is empty for the tokenizer still needs one position for the classifier to read.
        return kept or [self._tokenizer.eos_token_id]

    def _load(self) -> Backend:
        if self._backend is None:
            if self._tokenizer is None:
                self._tokenizer = _load_tokenizer(self._where, self._reference)
                self._reading = ClassifierReading(self._tokenizer, self._spec.template, self._where)
                self._pad, self._positions = _facts(self._where, self._reference)
            build = _BACKENDS[self._spec.backend]
            if self._content and self._content != _fingerprint(self._reference):
                raise fail(
                    "the model changed since it was first loaded",
                    where=self._where,
                    got=self._reference,
                    remedy="start again once it is complete",
                )
            self._backend = build(self._where, self._spec, self._reference, self.device, self._tokenizer)
        return self._backend

    def _check_classes(self, classes: int) -> None:
        if max(index for index, _ in self._terms) >= classes:
            self.free()
            raise fail(
                f"format {self._spec.format!r} names a class that the model does not have",
                where=self._where,
                expected=f"classes 0 to {classes - 1}",
                got=self._reference,
            )

    def _check_lengths(self, ids: list[list[int]], prompts: Sequence[Prompt], responses: Sequence[str]) -> None:
        """Refuse what the classifier would only read in part: cut on the right, it would miss the response."""
        limit = self.limit
        index = max(range(len(ids)), key=lambda index: len(ids[index]))
        if limit is None or len(ids[index]) <= limit:
            return
        problem = Problem(
            "a text is too long for the classifier",
            where=self._where,
            expected=f"at most {limit} tokens "
            + ("(`max_tokens` of the reward)" if limit == self._spec.max_tokens else "(all that the model can read)"),
            got=f"{len(ids[index])} tokens for",
            remedy="raise `max_tokens` if the model can read more, or shorten prompts or responses",
        )
        raise PairError(problem, index, (prompts[index], responses[index]))


def _check_folder(where: str, reference: str) -> None:
    if looks_local(reference) and not Path(reference, "config.json").is_file():
        raise fail(
            "no model there",
            where=where,
            expected="a folder with config.json and weights",
            got=reference,
            remedy="train it with recipes/reward.py, or name a Hub id",
        )


def _load_tokenizer(where: str, reference: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(reference)
    except (OSError, ValueError, RuntimeError) as error:
        raise cannot_load(where, reference, error) from error


def _facts(where: str, reference: str) -> tuple[int | None, int | None]:
    """Return the padding token of a model's config, and for how many tokens it has positions, if it says so."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(reference).get_text_config()
    except (OSError, ValueError) as error:
        raise cannot_load(where, reference, error) from error
    return config.pad_token_id, positions_of(config)


def _fingerprint(reference: str) -> str:
    """Return the hash of a folder's content; a model of the Hub is known by its commit, which names its place there."""
    from transformers.utils import cached_file

    if Path(reference).is_dir():
        return model_hash(Path(reference))
    return Path(str(cached_file(reference, "config.json"))).parent.name
