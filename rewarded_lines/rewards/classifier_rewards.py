"""Rewards from a sequence classifier with a declared template, backend and format."""

from __future__ import annotations

from collections.abc import Sequence

from rewarded_lines.config_values import parse_format
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.errors import Problem, did_you_mean, fail, listed
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.classifier_inputs import ClassifierReading
from rewarded_lines.rewards.reward import Columns, Reward
from rewarded_lines.rewards.score_checks import PairError, check_scores
from rewarded_lines.rewards.shared_classifier import SharedClassifier

# Marks classifiers that older versions read with other tokens; their cached scores do not count.
_READ_ANEW, _READ_LAST = ":2", ":last"
_MOST_NAMES = 40


class ModelReward(Reward):
    """A sequence classifier with a declared template and format."""

    _model: SharedClassifier

    def __init__(self, name: str, spec: RewardSpec, shared: SharedClassifier) -> None:
        """Read scores from `shared`; check that it has the classes of the format."""
        self.name = name
        self.unit = spec.unit or "logit"
        self._where = f"reward `{name}`"
        self._spec, self._model = spec, shared
        self.device, self.size, self.tokenizer = shared.device, shared.size, shared.tokenizer
        self._reading = ClassifierReading(shared.tokenizer, spec.template, self._where)
        old = _READ_LAST if shared.reads_last else _READ_ANEW if self._reading.is_new(shared.pad) else ""
        self.fingerprint = shared.fingerprint + old
        limits = [spec.max_tokens or shared.positions, shared.longest]
        self.limit = min((limit for limit in limits if limit), default=None)
        self._terms = [(self._class(one, shared), weight) for one, weight in parse_format(spec.format, shared.classes)]

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
        ids, types = self._reading.tokens(prompts, responses)
        self._check_lengths(ids, prompts, responses)
        logits = self._model.rows([self._without_padding(row) for row in ids], types)
        scores = [sum(weight * row[index] for index, weight in self._terms) for row in logits]
        return check_scores(self._where, scores, prompts, responses)

    def _without_padding(self, row: list[int]) -> list[int]:
        """Return a text's tokens without padding tokens at the end.

        A decoder's head reads the last token that is not the padding token of the config.
        """
        kept = list(row)
        while len(kept) > 1 and kept[-1] == self._model.pad:
            kept.pop()
        # The classifier needs at least one token.
        return kept or [self.tokenizer.eos_token_id]

    def _class(self, wanted: int | str, shared: SharedClassifier) -> int:
        """Return the place of a class that the format names or numbers."""
        names = shared.classes
        if isinstance(wanted, int) and wanted < len(names):
            return wanted
        if isinstance(wanted, str) and names.count(wanted) == 1:
            return names.index(wanted)
        shared.free()
        signs = "put spaces around the signs between names"
        alike = signs if any(name in str(wanted) for name in names) else did_you_mean(str(wanted), names, signs)
        raise fail(
            f"format {self._spec.format!r} names a class that the model does not have"
            if wanted not in names
            else f"several classes have the name {wanted!r}",
            where=self._where,
            expected=f"classes 0 to {len(names) - 1}, or one of {listed([repr(name) for name in names], _MOST_NAMES)}",
            got=f"{wanted!r} in {self._spec.model}",
            remedy="use the number" if wanted in names else alike,
        )

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
