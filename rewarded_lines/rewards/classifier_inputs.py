"""Tokens of prompts and responses for a classifier: of a text, a pair of texts, or a conversation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rewarded_lines.config_values import CHAT, TEXT
from rewarded_lines.data.chat_templates import check_template, render
from rewarded_lines.data.messages import as_turns, more_than_text
from rewarded_lines.data.prompts import Prompt, one_bos, prompt_text
from rewarded_lines.errors import fail

Template = str | tuple[str, str]
Tokens = list[int]
_TRIED = 64
# The token type of the second text of a pair.
_SECOND = 1


@dataclass(frozen=True)
class ClassifierReading:
    """Reads prompts and responses through a template; recipes, training, sweep and score all use it.

    The template "chat" renders the whole conversation with the tokenizer's chat template. A text template fills
    {prompt} and {response}; a chat's {prompt} joins all turns but the system's by blank lines. Two texts, or one
    text with the tokenizer's separator in it, make a pair for a cross-encoder, with token types if it has them. None
    reads a chat by the template "chat", as TRL's trainers do, and a text followed by its response. A text ends with
    the token `last`, where the model reads its score at that one.
    """

    tokenizer: Any
    template: Template | None
    where: str
    last: int | None = None

    def tokens(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> tuple[list[Tokens], list[Tokens] | None]:
        """Return the token ids of each prompt with its response, and token types of pairs."""
        if not prompts:
            return [], None
        if self.template is None:
            return self._by_kind(prompts, responses), None
        if self.template == CHAT:
            return self._ended(self._conversations(prompts, responses)), None
        texts = [text_of(prompt, self.where) for prompt in prompts]
        if isinstance(self.template, str):
            made = self._filled((self.template,), texts, responses)
            ids = [one_bos(self.tokenizer, row) for row in made["input_ids"]]
            return self._ended(ids), self._types_by_separator(self.template, ids, texts, responses)
        made = self._filled(self.template, texts, responses)
        return made["input_ids"], made.get("token_type_ids")

    def check(self, prompts: Sequence[Prompt]) -> str:
        """See `Reward.check`."""
        if self.template is None:
            if not (chats := [prompt for prompt in prompts if isinstance(prompt, list)]):
                return f"{self.where} reads {TEXT}; `template: chat` would make them turns of its chat template"
            replace(self, template=CHAT).check(chats)
            return f"{self.where} reads chats in its own chat template"
        if self.template != CHAT:
            return check_texts(prompts, self.where, "template: chat")
        check_template(self.tokenizer, [as_turns(prompt) for prompt in prompts], self.where)
        some = prompts[:_TRIED]
        self.tokens(some, [""] * len(some))
        return ""

    def is_new(self, pad: int | None) -> bool:
        """Return whether older versions gave other scores: they ignored token types and the config's `pad`."""
        own = self.tokenizer.pad_token_id
        own = self.tokenizer.eos_token_id if own is None else own
        one_text = isinstance(self.template, str) and self.template != CHAT
        return pad != own or (one_text and self.tokens(["a"], ["a"])[1] is not None)

    def _by_kind(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Tokens]:
        """Read chats by the chat template and texts as `TEXT`."""
        ids: list[Tokens] = [[]] * len(prompts)
        for kind, template in ((list, CHAT), (str, TEXT)):
            places = [at for at, prompt in enumerate(prompts) if isinstance(prompt, kind)]
            reading = replace(self, template=template)
            found, _ = reading.tokens([prompts[at] for at in places], [responses[at] for at in places])
            for at, row in zip(places, found, strict=True):
                ids[at] = row
        return ids

    def _conversations(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Tokens]:
        if not self.tokenizer.chat_template:
            raise fail(
                "the reward model's tokenizer has no chat template",
                where=self.where,
                expected="one, since the reward's template is `chat`",
                got=str(self.tokenizer.name_or_path),
                remedy="declare a text with {prompt} and {response} as its template",
            )
        chats = [
            [*as_turns(prompt), {"role": "assistant", "content": response}]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        made = render(self.tokenizer, chats, tokenize=True, return_dict=True)["input_ids"]
        return [one_bos(self.tokenizer, row) for row in made]

    def _ended(self, ids: list[Tokens]) -> list[Tokens]:
        return ids if self.last is None else [[*row, self.last] for row in ids]

    def _filled(self, parts: Sequence[str], prompts: Sequence[str], responses: Sequence[str]) -> Any:
        """Tokenize a text, or a pair of texts, filled with each prompt and response."""
        pairs = list(zip(prompts, responses, strict=True))
        return self.tokenizer(*([fill_template(part, *pair) for pair in pairs] for part in parts))

    def _types_by_separator(
        self, template: str, ids: list[Tokens], prompts: Sequence[str], responses: Sequence[str]
    ) -> list[Tokens] | None:
        """Return the token types of a template that separates a pair by the separator token."""
        separator = self.tokenizer.sep_token
        parts = template.split(separator) if separator else []
        if len(parts) != 2 or not all(parts):
            return None
        pairs = self._filled(parts, prompts, responses)
        types = pairs.get("token_type_ids")
        if types is None or not any(_SECOND in row for row in types):
            return None
        if [list(row) for row in pairs["input_ids"]] != ids:
            raise fail(
                "a text with a separator has other tokens than the pair of texts",
                where=f"{self.where}: template {template!r}",
                expected="the same tokens, so that token types are known",
                remedy=f"write the template as two texts: {[part.strip() for part in parts]}",
            )
        return [list(row) for row in types]


def check_texts(prompts: Sequence[Prompt], where: str, instead: str) -> str:
    """Return a sentence on what a text template leaves out of the prompts, or ""."""
    for prompt in prompts:
        text_of(prompt, where)
    chats = [[turn["role"] for turn in prompt] for prompt in prompts if isinstance(prompt, list)]
    lost = []
    if any("system" in roles for roles in chats):
        lost.append("without the system's turn")
    if any(len(roles) - roles.count("system") > 1 for roles in chats):
        lost.append("several turns joined by blank lines")
    if not lost:
        return ""
    return f"{where} reads chats as text, {' and '.join(lost)}; `{instead}` reads them whole"


def text_of(prompt: Prompt, where: str) -> str:
    """Return a prompt as text; refuse a chat with tool calls or the like."""
    if isinstance(prompt, list) and (key := more_than_text(prompt)):
        raise fail(
            f"a chat holds `{key}`, which plain text would lose",
            where=where,
            expected="a reward that reads conversations",
            remedy="declare `template: chat` for a reward model, `messages: true` for a function",
        )
    return prompt_text(prompt)


def fill_template(template: str, prompt: str, response: str) -> str:
    """Fill the template's placeholders, but none inside the prompt or response."""
    parts = {"{prompt}": prompt, "{response}": response}
    return re.sub(r"\{prompt\}|\{response\}", lambda found: parts[found[0]], template)
