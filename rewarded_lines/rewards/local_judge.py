"""A judge in this process: how its questions and verdicts become tokens of its own tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rewarded_lines.config import GenerationSpec
from rewarded_lines.config_values import CHAT
from rewarded_lines.data.chat_templates import check_template, render
from rewarded_lines.data.prompts import Prompt, encode
from rewarded_lines.engines.tokenizers import load_tokenizer
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.references import looks_local
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.classifier_backends import cannot_load, find_device
from rewarded_lines.rewards.judge_models import JudgeModel, share_judge
from rewarded_lines.rewards.judge_questions import Answer, NextToken, Question, refuse_thoughts, seed_of, verdict_texts
from rewarded_lines.rewards.judge_rewards import JudgeReward
from rewarded_lines.rewards.reward import Columns
from rewarded_lines.rewards.score_checks import PairError

# Tokens before a token that decide how it is written: with a blank, or as a part of a character.
_CONTEXT = 8
_SHOWN = 120


class LocalJudge(JudgeReward):
    """A judge in this process; its answer needs room beside the question, so the `limit` is lower than the model's."""

    _model: JudgeModel

    def __init__(self, name: str, spec: RewardSpec, reference: str, device: str, models: dict[str, Any]) -> None:
        """Load the judge; refuse one that cannot be asked as `spec` says. `models` are those of other rewards."""
        super().__init__(name, spec)
        _refuse_missing(self._where, reference)
        self.device = find_device(spec.device or device, self._where)
        own = GenerationSpec(chat_template_kwargs=spec.chat_template_kwargs)
        try:
            self.tokenizer = load_tokenizer(reference, own)
            self._model = share_judge(models, self._where, spec, reference, self.device)
        except (OSError, ValueError) as error:
            raise cannot_load(self._where, reference, error) from error
        self._refuse_without_template(reference)
        room = spec.max_new_tokens if spec.pattern else 1
        self.limit = None if self._model.longest is None else self._model.longest - room
        if self.limit is not None and self.limit < 1:
            raise fail(
                "the judge's answer leaves no room for a question",
                where=self._where,
                expected=f"`max_new_tokens` below the {self._model.longest} tokens that it can read",
                got=str(room),
            )
        _ = self._model.held
        self.size, self.fingerprint = self._model.size, self._model.fingerprint

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], columns: Columns = None) -> list[float]:
        """See `Reward.score`.

        With the backend "hf", a pair's score has the same bits whatever the other pairs and their order.
        """
        found = {at: one for some in self._verdicts(prompts, responses, columns) for at, one in some.items()}
        known = {at: one for at, one in found.items() if not isinstance(one, Problem)}
        for at, one in sorted(found.items()):
            if isinstance(one, Problem):
                raise PairError(one, at, (prompts[at], responses[at]), known)
        return [known[at] for at in range(len(prompts))]

    def _check(self, questions: Sequence[Question]) -> None:
        chats = [one.prompt for one in questions if isinstance(one.prompt, list)]
        if self.tokenizer.chat_template and chats:
            check_template(self.tokenizer, chats, self._where)
        if texts := verdict_texts(self._spec):
            for rendered, question in zip(self._rendered(questions), questions, strict=True):
                refuse_thoughts(rendered + question.prefill, self._where)
            faults = (one for one in self._token_ids(questions, texts)[1] if isinstance(one, Problem))
            if fault := next(faults, None):
                raise UserError(fault)

    def _lengths(self, questions: Sequence[Question]) -> list[int]:
        return [len(ids) for ids in self._ids(questions)]

    def _answers(self, questions: Sequence[Question]) -> Iterator[Mapping[int, Answer | Problem]]:
        spec = GenerationSpec(temperature=self._spec.temperature, max_tokens=self._spec.max_new_tokens)
        seeds = [seed_of(question, self._spec.seed) for question in questions]
        yield dict(enumerate(self._model.held.answers(self._ids(questions), seeds, spec)))

    def _next_tokens(
        self, questions: Sequence[Question], texts: Sequence[str]
    ) -> Iterator[Mapping[int, NextToken | Problem]]:
        heads, asked = self._token_ids(questions, texts)
        yield {at: ids for at, ids in enumerate(asked) if isinstance(ids, Problem)}
        read = {at: ids for at, ids in enumerate(asked) if not isinstance(ids, Problem)}
        unique = [list(dict.fromkeys(ids)) for ids in read.values()]
        made = self._model.held.next_tokens([heads[at] for at in read], unique)
        found = {}
        for (at, ids), one in zip(read.items(), made, strict=True):
            # A token that several texts begin with counts once, for the first.
            shares = [one.shares[token] if token not in ids[:place] else 0.0 for place, token in enumerate(ids)]
            found[at] = NextToken(
                tuple(shares), "" if one.likeliest in ids else self._written(heads[at], one.likeliest)
            )
        yield found

    def _ids(self, questions: Sequence[Question]) -> list[list[int]]:
        """Return the tokens of each question with its prefill."""
        return self._tokens(self._rendered(questions), questions)

    def _token_ids(self, questions: Sequence[Question], texts: Sequence[str]) -> tuple[list[list[int]], list[Any]]:
        """Return the tokens of each question, and the ids of the texts as its next token, or a problem."""
        rendered = self._rendered(questions)
        heads, *wholes = (self._tokens(rendered, questions, text) for text in ("", *texts))
        return heads, [self._first(head, [one[at] for one in wholes], texts) for at, head in enumerate(heads)]

    def _rendered(self, questions: Sequence[Question]) -> list[str]:
        """Return each question as the text that the judge gets."""
        prompts = [one.prompt for one in questions]
        if self._are_chats(questions):
            return list(render(self.tokenizer, prompts, add_generation_prompt=True, tokenize=False))  # type: ignore[arg-type]
        return [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]

    def _tokens(self, rendered: Sequence[str], questions: Sequence[Question], after: str = "") -> list[list[int]]:
        """Return the tokens of questions with a text after each; a chat template writes BOS itself."""
        texts = [f"{text}{one.prefill}{after}" for text, one in zip(rendered, questions, strict=True)]
        if not self._are_chats(questions):
            return encode(self.tokenizer, texts)
        return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def _are_chats(self, questions: Sequence[Question]) -> bool:
        """Return whether the chat template renders these questions: one reward asks all in one form."""
        return bool(self.tokenizer.chat_template and questions and isinstance(questions[0].prompt, list))

    def _first(self, head: list[int], wholes: Sequence[list[int]], texts: Sequence[str]) -> list[int] | Problem:
        """Return the id of each text's first token after a question."""
        first: dict[int, str] = {}
        for text, whole in zip(texts, wholes, strict=True):
            pieces = [self._written(whole[:at], whole[at]) for at in range(len(head), len(whole))]
            if whole[: len(head)] != head or not pieces:
                return self._no_token(
                    f"{text!r} becomes one token with the end of the question",
                    "a text that begins a token of its own",
                    f"a question that ends with {self.tokenizer.decode(head[-_CONTEXT:])!r}",
                    "end the template or `prefill:` without a blank, and begin the text with it",
                )
            if len(pieces) > 1 and self._spec.token:
                return self._no_token(
                    f"{text!r} is several tokens, whose first may begin other words",
                    "a text that is one token",
                    " + ".join(map(repr, pieces)),
                    f"name the first, {pieces[0]!r}, or compare several texts with `tokens:`",
                )
            other = first.setdefault(whole[len(head)], text)
            if self._spec.tokens and self._spec.tokens[other] != self._spec.tokens[text]:
                return self._no_token(
                    f"{other!r} and {text!r} begin with the same token",
                    "texts that differ in their first token",
                    repr(pieces[0]),
                    "compare other texts, or let the judge write its verdict and read it with `pattern:`",
                )
        return [whole[len(head)] for whole in wholes]

    def _written(self, before: Sequence[int], token: int) -> str:
        """Return a token as the text that it adds; its own name if it adds none."""
        context = list(before[-_CONTEXT:])
        start, whole = self.tokenizer.decode(context), self.tokenizer.decode([*context, token])
        text = whole[len(start) :] if whole.startswith(start) else self.tokenizer.decode([token])
        return str(text or self.tokenizer.convert_ids_to_tokens(token))

    def _no_token(self, what: str, expected: str, got: str, remedy: str) -> Problem:
        where = f"{self._where}, {'token' if self._spec.token else 'tokens'}"
        return Problem(what, where=where, expected=expected, got=got[:_SHOWN], remedy=remedy)

    def _refuse_without_template(self, reference: str) -> None:
        needs = "template: chat" if self._spec.template == CHAT else "system:" if self._spec.system else ""
        if needs and not self.tokenizer.chat_template:
            raise fail(
                "the judge's tokenizer has no chat template",
                where=self._where,
                expected=f"one, since the reward has `{needs}`",
                got=reference,
                remedy="write the whole text as `template:`",
            )


def _refuse_missing(where: str, reference: str) -> None:
    names = ("config.json", "adapter_config.json")
    if looks_local(reference) and not any(Path(reference, name).is_file() for name in names):
        expected = "a folder with config.json and weights"
        raise fail(
            "no model there", where=where, expected=expected, got=reference, remedy="correct it, or name a Hub id"
        )
