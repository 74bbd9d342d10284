"""Rewards that a sequence classifier gives: template and tokens here, logits by a backend."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.hashing import model_hash
from rewarded_lines.config import RewardSpec, parse_format
from rewarded_lines.errors import Problem, fail
from rewarded_lines.references import looks_local
from rewarded_lines.scoring.backends import Backend, cannot_load
from rewarded_lines.scoring.checks import PairError, check_scores
from rewarded_lines.scoring.devices import find_device
from rewarded_lines.scoring.huggingface_classifier import HuggingFaceClassifier
from rewarded_lines.scoring.vllm_classifier import VllmClassifier

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
        self.fingerprint = ""
        backend = self._load()
        self.size = backend.size
        self.fingerprint = _fingerprint(reference)
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

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Return the declared combination of logits for each pair; see `Reward.score`.

        With the backend "hf" a pair's score is the same to the bit, whatever pairs it comes with, in whatever order.
        """
        pairs = zip(prompts, responses, strict=True)
        texts = [fill_template(self._spec.template, prompt, response) for prompt, response in pairs]
        if not texts:
            return []
        backend = self._load()
        ids = self._tokenizer(texts)["input_ids"]
        self._check_lengths(ids, backend.longest, prompts, responses)
        # A text that is empty for the tokenizer still needs one position for the classifier to read.
        logits = backend.logits([row or [self._tokenizer.eos_token_id] for row in ids])
        scores = [sum(weight * row[index] for index, weight in self._terms) for row in logits]
        return check_scores(self._where, scores, prompts, responses)

    def _load(self) -> Backend:
        if self._backend is None:
            self._tokenizer = self._tokenizer or _load_tokenizer(self._where, self._reference)
            build = _BACKENDS[self._spec.backend]
            if self.fingerprint and self.fingerprint != _fingerprint(self._reference):
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

    def _check_lengths(
        self, ids: list[list[int]], longest: int | None, prompts: Sequence[str], responses: Sequence[str]
    ) -> None:
        """Refuse what the classifier would only read in part: cut on the right, it would miss the response."""
        limit = min(self._spec.max_tokens, longest or self._spec.max_tokens)
        index = max(range(len(ids)), key=lambda index: len(ids[index]))
        if len(ids[index]) <= limit:
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


def fill_template(template: str, prompt: str, response: str) -> str:
    """Return the text that a classifier reads; what looks like a placeholder in prompt or response is left alone."""
    parts = {"{prompt}": prompt, "{response}": response}
    return re.sub(r"\{prompt\}|\{response\}", lambda found: parts[found[0]], template)


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
    """Return a tokenizer that can pad."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(reference)
    except (OSError, ValueError, RuntimeError) as error:
        raise cannot_load(where, reference, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise fail("the tokenizer has no padding token and no end token", where=where)
    return tokenizer


def _fingerprint(reference: str) -> str:
    """Return the hash of a folder's content; a model of the Hub is known by its commit, which names its place there."""
    from transformers.utils import cached_file

    if Path(reference).is_dir():
        return model_hash(Path(reference))
    return Path(str(cached_file(reference, "config.json"))).parent.name
