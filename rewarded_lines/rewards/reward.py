"""What a reward is: it scores responses to prompts, and says which columns of a row it reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rewarded_lines.data.prompts import Prompt
from rewarded_lines.data.rows import COLUMNS, Row
from rewarded_lines.errors import Problem, UserError, listed
from rewarded_lines.rewards.score_checks import rows_failed
from rewarded_lines.rewards.shared_model import SharedModel

_MOST_NAMES = 12
SFT_RESPONSE = "@sft"
"""The column in which a sweep gives a judge the SFT model's response to the same prompt, with the same seed."""
Columns = Sequence[Row] | None
"""The columns of each prompt's row, by name; None if there are none."""


class Reward:
    """Scores responses to prompts; a higher score is better. A reward defines `score`, or `stream` if it `streams`.

    Attributes:
        name: in the project.
        unit: of the scores, for figures.
        fingerprint: a hash of all that decides the scores beside the declaration; "" if unknown.
        columns: names of the columns that a row must have for this reward.
        optional: names of the columns that it reads from rows that have them; None for all columns.
        reads_sft: it compares with the SFT model's response, which a sweep adds to the columns.
        size: bytes of its weights in memory; 0 without weights.
        device: where the weights are while in memory.
        streams: whether scores come one after another, so that one call may hold any number of pairs.
        limit: the most tokens of a prompt with its response; None without a limit.
        beside_engine: whether a thread scores while an engine in this process generates. That pays where other
            processes do the work; two models in one process slow each other down.
    """

    name: str
    unit: str = ""
    fingerprint: str = ""
    columns: tuple[str, ...] = ()
    optional: tuple[str, ...] | None = ()
    reads_sft: bool = False
    size: int = 0
    device: str = "cpu"
    streams: bool = False
    limit: int | None = None
    beside_engine: bool = False
    _model: SharedModel[Any] | None = None

    @property
    def loaded(self) -> bool:
        """Whether the weights, if any, are in memory."""
        return self._model is None or self._model.loaded

    @property
    def shared(self) -> object:
        """What is in memory for it: rewards with the same object are loaded, scored and freed together."""
        return self._model or self

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], columns: Columns = None) -> list[float]:
        """Return a score for each prompt (a text or the turns of a chat) with its response.

        A score is NaN where the reward abstains. `columns` are the further columns of each prompt's row.

        Raises:
            PairError: the reward failed on a pair, or its score is not finite.
            UserError: the reward failed otherwise.
        """
        found = {at: one for some in self.stream(prompts, responses, columns) for at, one in some.items()}
        if failed := {at: one for at, one in found.items() if isinstance(one, Problem)}:
            raise rows_failed(self.name, failed, prompts, responses)
        return [found[at] for at in range(len(prompts))]  # type: ignore[misc]

    def stream(
        self, prompts: Sequence[Prompt], responses: Sequence[str], columns: Columns = None
    ) -> Iterator[dict[int, float | Problem]]:
        """Yield the scores by place as they come, a `Problem` where the reward gives none after all attempts.

        See `score` for the rest.
        """
        yield dict(enumerate(self.score(prompts, responses, columns)))

    def free(self) -> None:
        """Free memory and processes, of all rewards on the same model; the next score loads it again."""
        if self._model is not None:
            self._model.free()

    def rest(self) -> None:
        """Let weights leave the device between two uses; the next score brings them back."""
        self.free() if self._model is None else self._model.rest()

    def lengths(self, prompts: Sequence[Prompt], responses: Sequence[str], columns: Columns = None) -> list[int]:
        """Return the tokens of each prompt with its response and the columns that are read; zeros without a limit."""
        return [0] * len(prompts)

    def check(self, prompts: Sequence[Prompt]) -> str:
        """Return a sentence on what the reward skips of prompts, or ""; refuse prompts that it misreads."""
        return ""

    @property
    def reads_columns(self) -> bool:
        """True if a score may depend on more than prompt and response."""
        return bool(self.columns) or self.optional != ()

    def reads(self, row: Row) -> Row:
        """Return those of a row's columns that decide the score."""
        if self.optional is None:
            # What a sweep adds for a judge is no column of the data.
            return {name: value for name, value in row.items() if name != SFT_RESPONSE}
        return {name: row[name] for name in (*self.columns, *self.optional) if name in row}

    def column_remedy(self, name: str) -> str:
        """Return what a user can do about rows without a column."""
        return f"add the column, or name yours: `columns: {{{name}: YOUR_COLUMN}}`"

    def column_faults(self, rows: Sequence[Row], where: str) -> list[Problem]:
        """Return a problem for each column that it needs and a row lacks; `where` names the rows."""
        problems: dict[str, Problem] = {}
        for at, row in enumerate(rows):
            known = list(row.get(COLUMNS, {}))
            for name in set(self.columns) - {*known, *problems}:
                problems[name] = Problem(
                    f"reward `{self.name}` reads column `{name}`, which a row does not have",
                    where=f"{where}, row {at}",
                    expected=f"columns {', '.join(self.columns)}",
                    got=f"columns {listed(known, _MOST_NAMES) or 'none'} beside the prompt",
                    remedy=self.column_remedy(name),
                )
        return [problems[name] for name in self.columns if name in problems]


def check_columns(rewards: Iterable[Reward], sets: Mapping[str, Sequence[Row]]) -> None:
    """Refuse rows without a column that a reward needs, all faults together; `sets` has the rows by their names."""
    faults = [one.column_faults(rows, where) for one in rewards for where, rows in sets.items()]
    if problems := [problem for some in faults for problem in some]:
        raise UserError(problems)


def columns_of(rows: Iterable[Row]) -> list[Row]:
    """Return the columns of each row beside its prompt."""
    return [row.get(COLUMNS, {}) for row in rows]


def deciding(rows: Iterable[Row], rewards: Iterable[Reward] = ()) -> Iterator[Row]:
    """Yield what decides responses and scores: the roles of each row, and the columns that a reward reads."""
    readers = [reward for reward in rewards if reward.reads_columns]
    for row in rows:
        roles = {role: value for role, value in row.items() if role != COLUMNS}
        read = [reward.reads(row.get(COLUMNS, {})) for reward in readers]
        yield {**roles, **({COLUMNS: {name: one[name] for one in read for name in one}} if any(read) else {})}
