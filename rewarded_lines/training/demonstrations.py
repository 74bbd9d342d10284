"""Demonstrations for SFT, tokenized like the prompts and responses of the trained model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig

from rewarded_lines.config import GenerationSpec, TooLong
from rewarded_lines.data.chat_templates import check_template, for_template, render
from rewarded_lines.data.lengths import Limit, fit, positions_of
from rewarded_lines.data.messages import Messages, more_than_text
from rewarded_lines.data.prompts import encode_answers, one_bos
from rewarded_lines.data.rows import Row, Tell
from rewarded_lines.engines.tokenizers import (
    end_tokens,
    load_config,
    load_generation_config,
    read_template,
    set_template,
)
from rewarded_lines.errors import UserError, fail

_ANSWER = "yes"


class Demonstrations:
    """Turns rows into the data set of SFTTrainer.

    Attributes:
        tokenizer: the model's, with the project's chat template.
        own: the tokenizer to save with the trained model.
        ends: the ids that end a response of the trained model.
    """

    def __init__(self, tokenizer: Any, base: str | None, generation: GenerationSpec, training: SFTConfig) -> None:
        """Set up tokenizers and end tokens; `base` is None for a model from scratch."""
        self.tokenizer = copy.deepcopy(tokenizer)
        if training.eos_token is not None:
            self.tokenizer.eos_token = training.eos_token
        template = training.chat_template_path
        # A model's name: TRL copies that model's template and special tokens to the trained one.
        cloned = template is not None and not Path(template).is_file()
        if template is not None and not cloned:
            self.tokenizer.chat_template = read_template(template, "chat_template_path")
        self.own = self.tokenizer if cloned else copy.deepcopy(self.tokenizer)
        if cloned and (generation.chat_template or generation.chat_template_kwargs):
            raise fail(
                "the project's chat template is not the one of SFT",
                where="chat_template_path",
                expected="no chat template and no variables of one in the project",
                got=str(template),
                remedy="name a Jinja file with `chat_template_path`, or take them out of the project",
            )
        if not cloned:
            set_template(self.tokenizer, generation)
        self._cloned, self._by_trl = cloned, cloned or training.assistant_only_loss
        config = load_generation_config(base) if base else None
        self._base_ends = end_tokens(tokenizer, config)
        self.ends = end_tokens(self.tokenizer, config, generation.stop_token_ids)
        self._training = training
        # The tokenizer of a model from scratch knows the model's positions.
        self._positions = positions_of(load_config(base)) if base else tokenizer.model_max_length

    @property
    def added_ends(self) -> frozenset[int]:
        """End tokens that the base lacks: a new eos token, the end of a turn in a chat."""
        return (self.ends | {self.own.eos_token_id}) - self._base_ends - {None}

    def fit(self, rows: Sequence[Row], too_long: TooLong, where: str, tell: Tell) -> list[Row]:
        """Return the rows that the model can be trained on; see `rewarded_lines.data.lengths.fit`."""
        if (chats := [chat for row in rows if (chat := _whole_chat(row))]) and self.tokenizer.chat_template:
            check_template(self.tokenizer, chats, where)
            self._find_turn_end(tell)
        self._check_tools(rows, where)
        most = min((limit for limit in (self._training.max_length, self._positions) if limit), default=None)
        wrapped = self._training.packing and self._training.packing_strategy == "wrapped"
        if most is None or self._cloned:
            return list(rows)
        if wrapped or "text" in rows[0]:
            self._training.max_length = most
            over = 0 if wrapped else sum(length > most for length in self._lengths(rows))
            if over:
                tell(f"{where}: {over} of {len(rows)} texts are longer than {most} tokens and are cut there")
            return list(rows)
        limit = Limit("the model", most, "max_length, or its positions", self._lengths)
        return fit(rows, [limit], too_long, where, tell)

    def dataset(self, rows: Sequence[Row]) -> Dataset:
        """Return rows as token ids, with a mask of the completion's tokens.

        TRL tokenizes for `assistant_only_loss` and for another model's chat template.
        """
        training = self._training
        if self._by_trl:
            return Dataset.from_list([self._for_trl(row) for row in rows])
        if "completion" not in rows[0]:
            if training.completion_only_loss:
                raise fail(
                    "rows without a completion",
                    where="completion_only_loss",
                    expected="rows of prompt and completion",
                    remedy="set `completion_only_loss: false`, or `assistant_only_loss: true` for messages",
                )
            return Dataset.from_dict({"input_ids": self._ids(rows)})
        if training.completion_only_loss is None:
            training.completion_only_loss = True
        parts = list(zip(*self._parts(rows), strict=True))
        return Dataset.from_dict(
            {
                "input_ids": [head + tail for head, tail in parts],
                "completion_mask": [[0] * len(head) + [1] * len(tail) for head, tail in parts],
            }
        )

    def _for_trl(self, row: Row) -> Row:
        """Return a row whose chats are as the chat template reads them."""
        if self._cloned:
            return dict(row)
        chats = {key: row[key] for key in ("messages", "prompt", "completion") if isinstance(row.get(key), list)}
        return row | {key: for_template(self.tokenizer, chat) for key, chat in chats.items()}

    def _lengths(self, rows: Sequence[Row]) -> list[int]:
        return [len(ids) for ids in self._ids(rows)]

    def _ids(self, rows: Sequence[Row]) -> list[list[int]]:
        if "completion" in rows[0]:
            return [head + tail for head, tail in zip(*self._parts(rows), strict=True)]
        if "text" in rows[0]:
            end = self.tokenizer.eos_token or ""
            texts = [row["text"] if end and row["text"].endswith(end) else row["text"] + end for row in rows]
            return [one_bos(self.tokenizer, ids) for ids in self.tokenizer(texts)["input_ids"]]
        options = {"tokenize": True, "return_dict": True}
        made = [render(self.tokenizer, [row["messages"]], tools=row.get("tools") or None, **options) for row in rows]
        return [list(one["input_ids"][0]) for one in made]

    def _parts(self, rows: Sequence[Row]) -> tuple[list[list[int]], list[list[int]]]:
        prompts, completions = ([row[role] for row in rows] for role in ("prompt", "completion"))
        return encode_answers(self.tokenizer, prompts, completions, self.ends)

    def _check_tools(self, rows: Sequence[Row], where: str) -> None:
        """Refuse tools that would not reach the model."""
        for at, row in enumerate(rows):
            if not row.get("tools") and not (self._by_trl and more_than_text(_whole_chat(row) or [])):
                continue
            chat, place = row.get("messages"), f"{where}, row {at}"
            if chat is None or self._by_trl:
                raise fail(
                    "tools and tool calls need rows of messages that are trained on as a whole",
                    where=place,
                    remedy="name the column `messages`, and set `assistant_only_loss: false`",
                )
            shown, hidden = (render(self.tokenizer, [chat], tools=one, tokenize=False) for one in (row["tools"], None))
            if shown == hidden:
                raise fail("the chat template leaves out `tools`", where=place, got=str(row["tools"])[:120])

    def _find_turn_end(self, tell: Tell) -> None:
        """Add the special token that ends an assistant's turn in the chat template to `ends`."""
        prompt: Messages = [{"role": "user", "content": "a"}]
        try:
            _, (tail,) = encode_answers(self.tokenizer, [prompt], [[{"role": "assistant", "content": _ANSWER}]], ())
        except UserError:
            # The template renders the prompt differently before an answer; rows of messages allow that.
            return
        special = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        # Only tokens after the answer count: some templates begin an answer with special tokens.
        after = next((n for n in range(len(tail) + 1) if _ANSWER in self.tokenizer.decode(tail[:n])), len(tail))
        end = next((token for token in tail[after:] if token in special), None)
        if end is None:
            tell("the chat template writes no end token after an answer, so the model does not learn to end one")
        if end is None or end in self.ends:
            return
        self.ends |= {end}
        token = self.tokenizer.convert_ids_to_tokens(end)
        tell(f"the chat template ends turns with {token}, which becomes an end token of the model's generation config")


def _whole_chat(row: Row) -> Messages | None:
    if "messages" in row:
        chat: Messages = row["messages"]
        return chat
    if isinstance(row.get("prompt"), list):
        return [*row["prompt"], *row["completion"]]
    return None
