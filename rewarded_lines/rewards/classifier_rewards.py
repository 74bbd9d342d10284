"""Rewards from sequence classifiers with a declared template, backend and format.

Rewards that declare one model alike share it: it is loaded once, and reads a text once.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rewarded_lines.config_values import parse_format
from rewarded_lines.data.lengths import positions_of
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.engines.tokenizers import attention_of
from rewarded_lines.errors import did_you_mean, fail, listed
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.classifier_backends import Ids, cannot_load, find_device, with_dtype
from rewarded_lines.rewards.classifier_inputs import ClassifierReading
from rewarded_lines.rewards.model_sizes import refuse_too_large
from rewarded_lines.rewards.reward import Columns, Reward
from rewarded_lines.rewards.reward_checkpoints import (
    RewardCheckpoint,
    fingerprint_of,
    open_reward_checkpoint,
    tokenizer_of,
)
from rewarded_lines.rewards.reward_heads import TRUST, load_config, runs_own_code
from rewarded_lines.rewards.score_checks import check_lengths, check_scores
from rewarded_lines.rewards.shared_model import SharedModel
from rewarded_lines.rewards.text_batches import TextBatches
from rewarded_lines.rewards.transformers_classifier import HuggingFaceClassifier
from rewarded_lines.rewards.vllm_classifier import VllmClassifier

# Marks classifiers that older versions read with other tokens; their cached scores do not count.
_READ_ANEW, _READ_LAST, _READ_CHATS = ":2", ":last", ":chats"
# Marks those whose attention older versions computed without its caps.
_CAPPED = ":capped"
_MOST_NAMES = 40
Backend = HuggingFaceClassifier | VllmClassifier
_BACKENDS: dict[str, type[Backend]] = {"hf": HuggingFaceClassifier, "vllm": VllmClassifier}
# Settings of a reward that are its own, whatever reads the texts.
_OWN = {"format", "role", "unit", "description", "model", "tokenizer", "device"}


class SharedClassifier(SharedModel[Backend]):
    """A classifier with its tokenizer.

    Attributes:
        tokenizer: of the model.
        classes: names of the classes, in the order of the rows that `rows` returns.
        longest: the most tokens that the model can read, or None without a limit.
        positions: the config's limit, which `max_tokens` may extend.
        pad: the token that ends no text, or None if any token may.
        capped: whether its attention has caps.
        last: the token that must end each text, as of InternLM2's reward models; None if any token may.
    """

    def __init__(
        self,
        where: str,
        spec: RewardSpec,
        reference: str,
        tokenizer: str | None,
        device: str,
        beside: Mapping[str, Any] | None = None,
    ) -> None:
        """Load the model and its tokenizer, which is the model's own by default; see `SharedModel` for the rest."""
        super().__init__(where, reference, device, beside)
        self._elsewhere, self._stored = tokenizer, self._open()
        config = load_config(where, self._stored, spec.trust_remote_code)
        self._spec = with_dtype(where, spec, config)
        self._batches = TextBatches(where, device, self._spec)
        refuse_too_large(where, self._stored.base, self._spec, config, device)
        self.tokenizer = _load_tokenizer(where, tokenizer or tokenizer_of(self._stored), spec.trust_remote_code)
        self.positions = positions_of(config)
        self.capped = bool(attention_of(config))
        self.last: int | None = getattr(config, "reward_token_id", None)
        self._known: dict[tuple[bytes, bytes], list[float]] = {}
        backend = self.held
        self.size, self.longest, self.classes, self.pad = backend.size, backend.longest, backend.classes, backend.pad

    @property
    def reads_last(self) -> bool:
        """Whether the head reads the last token, whatever it is."""
        return self._stored.reads_last

    def rows(self, ids: Ids, types: Ids | None = None) -> list[list[float]]:
        """Return the logits of each text.

        Texts of the last call are not computed again: the next reward on this model asks for the same ones.
        """
        keys = [
            (array("q", row).tobytes(), b"" if types is None else array("q", types[at]).tobytes())
            for at, row in enumerate(ids)
        ]
        new = {key: at for at, key in reversed(list(enumerate(keys))) if key not in self._known}
        if new:
            places = sorted(new.values())
            found = self.held.logits(
                [ids[at] for at in places], None if types is None else [types[at] for at in places]
            )
            known = {keys[at]: row for at, row in zip(places, found, strict=True)}
            self._known = {key: known[key] if key in known else self._known[key] for key in keys}
        return [self._known[key] for key in keys]

    def free(self) -> None:
        """See `SharedModel.free`."""
        self._known = {}
        super().free()

    def _open(self) -> RewardCheckpoint:
        return open_reward_checkpoint(self._where, self._reference)

    def _content(self) -> str:
        own_code = runs_own_code(self._stored, self._spec.trust_remote_code)
        return fingerprint_of(self._stored, own_code, self._elsewhere)

    def _build(self) -> Backend:
        build = _BACKENDS[self._spec.backend]
        return build(self._where, self._spec, self._stored, self.device, self._batches, self._example)

    def _example(self) -> list[int]:
        """Return the tokens of a text in the reward's template, which own code may look for."""
        return self.reading(self._spec, self._where).tokens(["a"], ["b"])[0][0]

    def reading(self, spec: RewardSpec, where: str) -> ClassifierReading:
        """Return how a reward on this model reads its texts."""
        undeclared = "template" not in spec.model_fields_set and self.tokenizer.chat_template
        return ClassifierReading(self.tokenizer, None if undeclared else spec.template, where, self.last)


def share_classifier(
    known: dict[str, Any],
    where: str,
    spec: RewardSpec,
    reference: str,
    tokenizer: str | None,
    device: str,
) -> SharedClassifier:
    """Return the classifier in `known` that another reward declared alike, or a new one."""
    device = find_device(spec.device or device, where)
    key = repr((reference, tokenizer, device, spec.model_dump(mode="json", exclude=_OWN)))
    if key not in known:
        known[key] = SharedClassifier(where, spec, reference, tokenizer, device, known)
    found: SharedClassifier = known[key]
    return found


def _load_tokenizer(where: str, reference: str, trust: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(reference, trust_remote_code=trust)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        remedy = TRUST if "trust_remote_code" in str(error) else "name another folder or Hub id as `tokenizer`"
        raise cannot_load(where, reference, error, remedy) from error


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
        self._reading = shared.reading(spec, self._where)
        old = _READ_LAST if shared.reads_last else _READ_ANEW if self._reading.is_new(shared.pad) else ""
        old += _READ_CHATS if self._reading.template is None else ""
        self.fingerprint = shared.fingerprint + old + (_CAPPED if shared.capped else "")
        limits = [spec.max_tokens or shared.positions, shared.longest]
        self.limit = min((limit for limit in limits if limit), default=None)
        self._terms = [(self._class(one, shared), weight) for one, weight in self._format(shared)]

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
        origin = "`max_tokens` of the reward" if self.limit == self._spec.max_tokens else "all that the model can read"
        pairs = list(zip(prompts, responses, strict=True))
        check_lengths(self._where, "the classifier", list(map(len, ids)), self.limit, origin, pairs)
        logits = self._model.rows([self._without_padding(row) for row in ids], types)
        scores = [sum(weight * row[index] for index, weight in self._terms) for row in logits]
        return check_scores(self._where, scores, prompts, responses)

    def _without_padding(self, row: list[int]) -> list[int]:
        """Return a text's tokens without padding at the end: a decoder's head reads the last token before it."""
        kept = list(row)
        while len(kept) > 1 and kept[-1] == self._model.pad:
            kept.pop()
        # The classifier needs at least one token.
        return kept or [self.tokenizer.eos_token_id]

    def _format(self, shared: SharedClassifier) -> Iterable[tuple[int | str, float]]:
        """Return the terms of the format; refuse several classes without one: class 0 may be NEGATIVE."""
        names = shared.classes
        if self._spec.format is not None:
            return parse_format(self._spec.format, names)
        if len(names) == 1:
            return [(0, 1.0)]
        shared.free()
        raise fail(
            "the model has several classes, and `format:` does not say what is the score",
            where=self._where,
            expected=f"classes 0 to {len(names) - 1}: {listed([repr(one) for one in names], _MOST_NAMES)}",
            got=str(self._spec.model),
            remedy=f'write `format: "{len(names) - 1}"` for the logit of the last, or "1-0" for a difference',
        )

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
