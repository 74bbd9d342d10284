"""Rewards: one declaration, a classifier or a Python function, scored alike by recipes and evaluator.

A score is a Python float per (prompt, response) pair, never rounded. Special tokens are the tokenizer's business;
text is never stripped here.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rewarded_lines.checkpoints.hashing import file_hash, model_hash
from rewarded_lines.config import Project, RewardSpec, parse_format
from rewarded_lines.errors import Problem, UserError, fail, nearest
from rewarded_lines.references import find_function, looks_local

ScoreFunction = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


class Reward(Protocol):
    """Anything that scores responses to prompts; higher is better."""

    name: str
    unit: str
    fingerprint: str
    """A hash of the weights or the source file behind the scores: other scores, other fingerprint."""

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Return one finite float per pair.

        Raises:
            UserError: the reward failed, returned a wrong number of scores, or a score that is not finite.
        """
        ...


def load_rewards(project: Project, names: Sequence[str] = (), device: str = "auto") -> dict[str, Reward]:
    """Return the project's rewards by name, all of them or only `names`, in the order declared.

    Raises:
        UserError: an unknown name, or a reward that cannot be loaded; all faults at once.
    """
    declared = project.config.rewards
    problems = [_unknown_reward(name, list(declared), project) for name in names if name not in declared]
    rewards: dict[str, Reward] = {}
    for name, spec in declared.items():
        if names and name not in names:
            continue
        try:
            rewards[name] = load_reward(name, spec, project.root, device)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return rewards


def load_reward(name: str, spec: RewardSpec, root: Path = Path(), device: str = "auto") -> Reward:
    """Return the reward that `spec` declares.

    Args:
        name: how it is called in records and figures.
        spec: its declaration.
        root: the folder that relative paths in `spec` start from.
        device: "auto" (a GPU when there is one), "cpu", "cuda" or "cuda:1".

    Raises:
        UserError: the function or the model does not exist or does not fit the declaration.
    """
    if spec.function is not None:
        return FunctionReward(name, spec.unit, find_function(spec.function, root, where=f"reward `{name}`"))
    assert spec.model is not None
    reference = str(root / spec.model) if looks_local(spec.model, root) else spec.model
    return ModelReward(name, spec, reference, device)


class FunctionReward:
    """A reward computed by a Python function `(prompts, responses) -> scores`."""

    def __init__(self, name: str, unit: str, function: ScoreFunction) -> None:
        """Wrap `function`, whose every answer will be checked."""
        self.name = name
        self.unit = unit
        source = inspect.getsourcefile(inspect.unwrap(function)) if inspect.isroutine(function) else None
        self.fingerprint = file_hash(Path(source)) if source else ""
        self._function = function

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Return the function's scores; see `Reward.score`."""
        where = f"reward `{self.name}`"
        try:
            scores = list(self._function(list(prompts), list(responses)))
        except Exception as error:  # noqa: BLE001 - a user's function may raise anything; it is reported, not lost
            raise self._blame(prompts, responses, error) from error
        if len(scores) != len(prompts):
            raise fail(
                "the function returned the wrong number of scores",
                where=where,
                expected=f"{len(prompts)}, one for each prompt",
                got=f"{len(scores)}, so the first prompt without a score of its own is "
                + _pair(min(len(scores), len(prompts) - 1), prompts, responses),
                remedy="return a list with one float for each (prompt, response) pair",
            )
        return check_scores(where, scores, prompts, responses)

    def _blame(self, prompts: Sequence[str], responses: Sequence[str], error: Exception) -> UserError:
        """Name the first pair on which the function raises by itself, or the whole batch when none does."""
        culprit = f"a batch of {len(prompts)} prompts, though on none of them alone"
        for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            try:
                self._function([prompt], [response])
            except Exception as again:  # noqa: BLE001 - looking for the pair that makes it raise
                culprit, error = _pair(index, prompts, responses), again
                break
        return fail(
            f"the function raised {type(error).__name__}: {error}",
            where=f"reward `{self.name}`",
            got=culprit,
            remedy="make the function return a float for every response, the empty one included",
        )


class ModelReward:
    """A sequence classifier read through its declared template and format, with its own tokenizer."""

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
        self._spec = spec
        self._terms = parse_format(spec.format)
        self._tokenizer, self._model = _load_classifier(name, spec, reference, device)
        # A model of the Hub is known by its commit.
        local = Path(reference).is_dir()
        self.fingerprint = model_hash(Path(reference)) if local else _commit(reference)
        classes = self._model.config.num_labels
        if max(index for index, _ in self._terms) >= classes:
            raise fail(
                f"format {spec.format!r} names a class that the model does not have",
                where=f"reward `{name}`",
                expected=f"classes 0 to {classes - 1}",
                got=reference,
            )

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Return the declared combination of logits for each pair; see `Reward.score`.

        Batches are made of texts of similar length, so little is spent on padding; the order returned is the
        order given.
        """
        pairs = zip(prompts, responses, strict=True)
        texts = [fill_template(self._spec.template, prompt, response) for prompt, response in pairs]
        ids = self._tokenizer(texts)["input_ids"]
        self._check_lengths(ids, prompts, responses)
        order = sorted(range(len(texts)), key=lambda index: len(ids[index]))
        scores = [math.nan] * len(texts)
        for start in range(0, len(order), self._spec.batch_size):
            batch = order[start : start + self._spec.batch_size]
            for index, score in zip(batch, self._score_ids([ids[i] for i in batch]), strict=True):
                scores[index] = score
        return check_scores(f"reward `{self.name}`", scores, prompts, responses)

    def _check_lengths(self, ids: list[list[int]], prompts: Sequence[str], responses: Sequence[str]) -> None:
        """Refuse what the classifier would only read in part: cut on the right, it would miss the response."""
        longest = max(range(len(ids)), key=lambda index: len(ids[index]), default=None)
        if longest is not None and len(ids[longest]) > self._spec.max_tokens:
            raise fail(
                "a text is too long for the classifier",
                where=f"reward `{self.name}`",
                expected=f"at most {self._spec.max_tokens} tokens (`max_tokens` of the reward)",
                got=f"{len(ids[longest])} tokens for {_pair(longest, prompts, responses)}",
                remedy="raise `max_tokens` if the model can read more, or shorten prompts or responses",
            )

    def _score_ids(self, batch: list[list[int]]) -> list[float]:
        import torch

        # A text that is empty for the tokenizer still needs one position for the classifier to read.
        batch = [ids or [self._tokenizer.eos_token_id] for ids in batch]
        padded = self._tokenizer.pad({"input_ids": batch}, padding_side="right", return_tensors="pt")
        with torch.inference_mode():
            logits = self._model(**padded.to(self._model.device)).logits.double()
        return sum(weight * logits[:, index] for index, weight in self._terms).tolist()


def fill_template(template: str, prompt: str, response: str) -> str:
    """Return the text that a classifier reads; what looks like a placeholder in prompt or response is left alone."""
    parts = {"{prompt}": prompt, "{response}": response}
    return re.sub(r"\{prompt\}|\{response\}", lambda found: parts[found[0]], template)


def check_scores(where: str, scores: Sequence[Any], prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return `scores` as floats.

    Raises:
        UserError: naming the first pair whose score is not a finite number.
    """
    checked: list[float] = []
    for index, score in enumerate(scores):
        try:
            value = float(score)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise fail(
                "a score is not a finite number",
                where=where,
                expected="a float",
                got=f"{score!r} for {_pair(index, prompts, responses)}",
                remedy="return a finite float for every response, the empty one included",
            )
        checked.append(value)
    return checked


def _load_classifier(name: str, spec: RewardSpec, reference: str, device: str) -> tuple[Any, Any]:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if looks_local(reference) and not Path(reference, "config.json").is_file():
        raise fail(
            "no model there",
            where=f"reward `{name}`",
            expected="a folder with config.json and weights",
            got=reference,
            remedy="train it with recipes/reward.py, or name a Hub id",
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(reference)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            reference, dtype=getattr(torch, spec.dtype), output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise fail("the model cannot be loaded", where=f"reward `{name}`", got=f"{reference}: {error}") from error
    if loading["missing_keys"]:
        # transformers would make the missing head up, and its scores would be noise.
        raise fail(
            "not a classifier: weights of the head are missing",
            where=f"reward `{name}`",
            expected="a sequence classification checkpoint",
            got=f"{reference} without {', '.join(sorted(loading['missing_keys']))}",
            remedy="train one with recipes/reward.py",
        )
    _agree_on_padding(name, tokenizer, model)
    return tokenizer, model.eval().to(device)


def _commit(reference: str) -> str:
    """Return the commit of a model of the Hub, by which its place in the cache is named."""
    from transformers.utils import cached_file

    return Path(str(cached_file(reference, "config.json"))).parent.name


def _agree_on_padding(name: str, tokenizer: Any, model: Any) -> None:
    """Let tokenizer and classifier pad with one token: the classifier reads the last position before it."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise fail("the tokenizer has no padding token and no end token", where=f"reward `{name}`")
    model.config.pad_token_id = tokenizer.pad_token_id


def _unknown_reward(name: str, known: list[str], project: Project) -> Problem:
    alike = nearest(name, known)
    return Problem(
        f"no reward `{name}`",
        where=str(project.path),
        expected="one of " + ", ".join(known) if known else "a `rewards:` section",
        remedy=f"did you mean `{alike}`?" if alike else "",
    )


def _pair(index: int, prompts: Sequence[str], responses: Sequence[str]) -> str:
    return f"prompt {index}: {prompts[index]!r} → {responses[index]!r}"
