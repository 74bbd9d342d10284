"""Rewards from a causal model that judges: the probability of a token, a number that it writes, a win rate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from rewarded_lines.config_values import CHAT
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.data.rows import COLUMNS, Row
from rewarded_lines.errors import Problem, UserError
from rewarded_lines.judge_settings import SFT_MODEL
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.classifier_inputs import check_texts
from rewarded_lines.rewards.judge_questions import (
    Answer,
    NextToken,
    Question,
    QuestionForm,
    of_answer,
    of_next_token,
    verdict_texts,
    win_share,
)
from rewarded_lines.rewards.reward import SFT_RESPONSE, Columns, Reward
from rewarded_lines.rewards.score_checks import check_lengths

# Prompts that are tried as questions before anything is generated.
_TRIED = 64


class JudgeReward(Reward, ABC):
    """A judge with a template and a form of verdict; a model in this process answers, or a server.

    An answer depends on its question alone, not on the others. Answers come by place, as they are there. A question
    that fails for good gets a `Problem`, so that the other answers are kept.
    """

    # The judge's; None if it is not known here, and then there is no `limit`.
    tokenizer: Any = None

    def __init__(self, name: str, spec: RewardSpec) -> None:
        """Make the form of the questions."""
        self.name = name
        self.unit = spec.unit or ("win rate" if spec.against else "probability" if spec.token else "")
        self._where, self._spec = f"reward `{name}`", spec
        self._form = QuestionForm(spec, self._where)
        self.columns = self._form.columns
        self.reads_sft = spec.against == SFT_MODEL
        self.optional = (SFT_RESPONSE,) if self.reads_sft else ()
        # Tokens of the longest columns in the rows that were checked.
        self._column_tokens = 0

    @abstractmethod
    def _answers(self, questions: Sequence[Question]) -> Iterator[Mapping[int, Answer | Problem]]:
        """Yield the judge's answer to each question."""

    @abstractmethod
    def _next_tokens(
        self, questions: Sequence[Question], texts: Sequence[str]
    ) -> Iterator[Mapping[int, NextToken | Problem]]:
        """Yield how likely each of `texts` is as the judge's next token after each question.

        A text of several tokens counts by its first; a text whose first token says too little is refused.
        """

    def _lengths(self, questions: Sequence[Question]) -> list[int]:
        """Return the tokens of each question; only called where there is a `limit`."""
        raise NotImplementedError

    def _check(self, questions: Sequence[Question]) -> None:
        """Refuse questions that the judge would misread, for instance chats that its template cuts."""

    def lengths(self, prompts: Sequence[Prompt], responses: Sequence[str], columns: Columns = None) -> list[int]:
        """Return the tokens of each question; without `columns`, those of the longest that were checked count."""
        if self.limit is None:
            return [0] * len(prompts)
        asked = [
            self._form.ask(*one)[0] for one in zip(prompts, responses, columns or self._blank(prompts), strict=True)
        ]
        more = 0 if columns else self._column_tokens
        return [length + more for length in self._lengths(asked)]

    def column_faults(self, rows: Sequence[Row], where: str) -> list[Problem]:
        """See `Reward.column_faults`; columns must not be empty, either, and a reference must be an answer."""
        faults = super().column_faults(rows, where)
        texts = []
        for at, row in enumerate(rows if self.columns and not faults else ()):
            try:
                texts.append(Question("\n".join(self._form.texts(row[COLUMNS]))))
            except UserError as error:
                return [replace(problem, where=f"{where}, row {at}: {problem.where}") for problem in error.problems]
        if self.limit is not None:
            self._column_tokens = max([self._column_tokens, *self._lengths(texts)])
        return faults

    def check(self, prompts: Sequence[Prompt]) -> str:
        """See `Reward.check`."""
        note = "" if self._spec.template == CHAT else check_texts(prompts, self._where, "template: chat")
        some = prompts[:_TRIED]
        # Not empty, since the question's end decides how the judge writes its next token.
        asked = (self._form.ask(prompt, ".", row) for prompt, row in zip(some, self._blank(some, "."), strict=True))
        self._check(list(chain.from_iterable(asked)))
        return note

    def _verdicts(
        self, prompts: Sequence[Prompt], responses: Sequence[str], columns: Columns = None
    ) -> Iterator[dict[int, float | Problem]]:
        """Yield scores by place as they come, or why there is none; see `RewardSpec` and `Reward.score`."""
        pairs = list(zip(prompts, responses, strict=True))
        rows = columns or [{}] * len(pairs)
        asked = [self._questions(*pair, row) for pair, row in zip(pairs, rows, strict=True)]
        owners = [at for at, several in enumerate(asked) for _ in several]
        questions, texts = list(chain.from_iterable(asked)), verdict_texts(self._spec)
        if self.limit is not None:
            found = iter(self._lengths([several[0] for several in asked if several]))
            lengths = [next(found) if several else 0 for several in asked]
            check_lengths(self._where, "the judge", lengths, self.limit, "with room for its answer", pairs)
        yield {at: 0.5 for at, several in enumerate(asked) if not several}
        values: dict[int, dict[int, float | Problem]] = defaultdict(dict)
        answers = self._next_tokens(questions, texts) if texts else self._answers(questions)
        for some in answers if questions else ():
            done = {}
            for place, answer in some.items():
                at = owners[place]
                values[at][place] = self._value(answer)
                if len(values[at]) == len(asked[at]):
                    done[at] = self._score([value for _, value in sorted(values.pop(at).items())])
            yield done

    def _questions(self, prompt: Prompt, response: str, row: Row) -> list[Question]:
        """Return the questions on a response; none where it equals its reference, which is a tie."""
        same = self._spec.against and self._form.reference(row) == response
        return [] if same else self._form.ask(prompt, response, row)

    def _value(self, found: NextToken | Answer | Problem) -> float | Problem:
        """Return the value of one verdict, NaN where the judge may abstain."""
        if isinstance(found, Problem):
            return found
        if isinstance(found, Answer):
            value = of_answer(found, self._spec, self._where)
        else:
            value = of_next_token(found, self._spec, self._where)
        return math.nan if isinstance(value, Problem) and self._spec.unmatched == "abstain" else value

    def _score(self, values: Sequence[float | Problem]) -> float | Problem:
        numbers = [one for one in values if not isinstance(one, Problem)]
        if len(numbers) < len(values):
            return next(one for one in values if isinstance(one, Problem))
        return win_share(numbers) if self._spec.against else numbers[0]

    def _blank(self, prompts: Sequence[Prompt], text: str = "") -> list[Row]:
        return [dict.fromkeys((*self.columns, SFT_RESPONSE), text)] * len(prompts)
