"""Rewards behind HTTP: a server gets prompts, responses and columns, and answers with scores."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from rewarded_lines.data.messages import as_answer, as_turns
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.data.rows import COLUMNS, Row
from rewarded_lines.errors import Problem
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.classifier_inputs import check_texts, text_of
from rewarded_lines.rewards.reward import Columns, Reward
from rewarded_lines.rewards.reward_server import Places, RewardServer

_BATCH = 16
_SHOWN = 200


class HttpReward(Reward):
    """A server that answers `{"prompts", "responses", "columns"}` with `{"scores": […]}`, or with the bare list."""

    streams = True
    beside_engine = True

    def __init__(self, name: str, spec: RewardSpec) -> None:
        """Ask the server about no pairs, to learn that it is there."""
        self.name, self.unit, self.columns = name, spec.unit, spec.columns
        self._where = f"reward `{name}`"
        # What the server runs is unknown: the declaration stands for it, with the `version` that the user counts.
        self.fingerprint = "declared"
        self._messages = spec.messages
        self._batch = spec.batch_size if "batch_size" in spec.model_fields_set else _BATCH
        self._server = RewardServer(name, spec, '{"scores": [a number or null for each pair]}')
        nothing = {"prompts": [], "responses": [], "columns": {one: [] for one in spec.columns}}
        self._server.check("POST", "", nothing)

    def free(self) -> None:
        """End all connections."""
        self._server.free()

    def check(self, prompts: Sequence[Prompt]) -> str:
        """See `Reward.check`."""
        return "" if self._messages else check_texts(prompts, self._where, "messages: true")

    def column_faults(self, rows: Sequence[Row], where: str) -> list[Problem]:
        """See `Reward.column_faults`; JSON must also hold each value."""
        faults = super().column_faults(rows, where)
        for at, row in enumerate(rows):
            for name, value in self.reads(row.get(COLUMNS, {})).items():
                try:
                    json.dumps(value, allow_nan=False)
                except (TypeError, ValueError) as error:
                    what = f"reward `{self.name}` cannot send column `{name}`"
                    expected = "texts, finite numbers, booleans, nulls, and lists and mappings of these"
                    got, remedy = f"{value!r}: {error}", "make it a text with a row function"
                    return [*faults, Problem(what, f"{where}, row {at}", expected, got, remedy)]
        return faults

    def stream(
        self, prompts: Sequence[Prompt], responses: Sequence[str], columns: Columns = None
    ) -> Iterator[dict[int, float | Problem]]:
        """See `Reward.stream`."""
        rows = columns or [{}] * len(prompts)
        groups = (range(at, min(at + self._batch, len(prompts))) for at in range(0, len(prompts), self._batch))

        def request(places: Places) -> dict[str, Any]:
            return {
                "prompts": [self._prompt(prompts[at]) for at in places],
                "responses": [as_answer(responses[at]) if self._messages else responses[at] for at in places],
                "columns": {name: [rows[at].get(name) for at in places] for name in self.columns},
            }

        return self._server.answers("", groups, request, self._read)

    def _prompt(self, prompt: Prompt) -> Any:
        return as_turns(prompt) if self._messages else text_of(prompt, self._where)

    def _read(self, content: Any, places: Places) -> list[float | Problem]:
        scores = content.get("scores") if isinstance(content, dict) else content
        if not isinstance(scores, list):
            raise ValueError(f"an answer of another form: {json.dumps(content)[:_SHOWN]}")
        if len(scores) != len(places):
            raise ValueError(f"{len(scores)} scores for {len(places)} pairs")
        return [self._number(score) for score in scores]

    def _number(self, score: Any) -> float | Problem:
        if score is None:
            return math.nan
        with suppress(OverflowError):
            if isinstance(score, (int, float)) and math.isfinite(score):
                return float(score)
        return Problem(f"the server's score is no finite number: {json.dumps(score)[:_SHOWN]}", self._server.where)
