"""How a classifier reads a prompt and a response: as one text, as a pair of texts, or as a conversation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rewarded_lines.config_values import CHAT
from rewarded_lines.data.messages import check_template, more_than_text, render
from rewarded_lines.data.prompts import Prompt, one_bos, prompt_text
from rewarded_lines.errors import fail

Template = str | tuple[str, str]
Tokens = list[int]
_TRIED = 64
# The token type of the second text of a pair.
_SECOND = 1


@dataclass(frozen=True)
class ClassifierReading:
    """Turns prompts and responses into a classifier's tokens, the same in training, recipes, sweep and score.

    A template "chat" is `tokenizer.apply_chat_template` over the whole conversation: system turn, the prompt's turns,
    the response as the assistant's. A text template has {prompt} and {response}; of a chat {prompt} is its turns but
    the system's, joined by blank lines. Two texts, or one with the tokenizer's separator between its placeholders, are
    a pair as cross-encoders read it, with token types where the tokenizer has them.

    Attributes:
        tokenizer: of the classifier.
        template: "chat", a text, or two texts.
        where: the reward, for messages to the user.
    """

    tokenizer: Any
    template: Template
    where: str

    def tokens(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> tuple[list[Tokens], list[Tokens] | None]:
        """Return the token ids of each prompt and response, and their token types where these say anything.

        Raises:
            UserError: the classifier's chat template does not take a conversation, or a chat holds what a reading of
                texts would lose.
        """
        if not prompts:
            return [], None
        if self.template == CHAT:
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
            return [one_bos(self.tokenizer, row) for row in self._rendered(chats)], None
        texts = [text_of(prompt, self.where) for prompt in prompts]
        if isinstance(self.template, str):
            pairs = zip(texts, responses, strict=True)
            whole = [fill_template(self.template, text, response) for text, response in pairs]
            ids = [one_bos(self.tokenizer, row) for row in self.tokenizer(whole)["input_ids"]]
            return ids, self._types_by_separator(ids, texts, responses)
        made = self._pairs(self.template, texts, responses)
        return made["input_ids"], made.get("token_type_ids")

    def check(self, prompts: Sequence[Prompt]) -> str:
        """Return what the classifier will not read of some prompts; see `Reward.check`."""
        if self.template == CHAT:
            check_template(self.tokenizer, [as_turns(prompt) for prompt in prompts], self.where)
            some = prompts[:_TRIED]
            self.tokens(some, [""] * len(some))
            return ""
        return check_texts(prompts, self.where, "template: chat")

    def is_new(self, pad: int | None) -> bool:
        """Return whether texts may be read at other tokens, or with other token types, than before pairs had types.

        Args:
            pad: the padding token of the classifier's config.
        """
        own = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        return pad != own or self._types_by_separator(*self._example()) is not None

    def _example(self) -> tuple[list[Tokens], list[str], list[str]]:
        """Return a prompt and a response, and their tokens as one text."""
        if not isinstance(self.template, str) or self.template == CHAT:
            return [[]], ["a"], ["a"]
        return [self.tokenizer(fill_template(self.template, "a", "a"))["input_ids"]], ["a"], ["a"]

    def _rendered(self, chats: Sequence[Any]) -> list[Tokens]:
        made = render(self.tokenizer, chats, tokenize=True, return_dict=True)["input_ids"]
        return [list(row) for row in made]

    def _pairs(self, template: tuple[str, str], prompts: Sequence[str], responses: Sequence[str]) -> Any:
        filled = [
            [fill_template(part, prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
            for part in template
        ]
        return self.tokenizer(*filled)

    def _types_by_separator(
        self, ids: list[Tokens], prompts: Sequence[str], responses: Sequence[str]
    ) -> list[Tokens] | None:
        """Return the token types of a pair that is written as one text with a separator in it.

        Raises:
            UserError: the text and the pair have other tokens, so nobody knows which token is whose.
        """
        if not isinstance(self.template, str):
            return None
        separator = self.tokenizer.sep_token
        parts = self.template.split(separator) if separator else []
        if len(parts) != 2 or not all(parts):
            return None
        pairs = self._pairs((parts[0], parts[1]), prompts, responses)
        types = pairs.get("token_type_ids")
        if types is None or not any(_SECOND in row for row in types):
            return None
        if [list(row) for row in pairs["input_ids"]] != ids:
            raise fail(
                "a text with a separator has other tokens than the pair of texts",
                where=f"{self.where}: template {self.template!r}",
                expected="the same tokens, so that token types are known",
                remedy=f"write the template as two texts: {[part.strip() for part in parts]}",
            )
        return [list(row) for row in types]


def as_turns(prompt: Prompt) -> list[dict[str, Any]]:
    """Return a prompt as turns of a chat: a text is the user's."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def check_texts(prompts: Sequence[Prompt], where: str, instead: str) -> str:
    """Return what a reading of texts leaves out of some prompts, as a sentence, or "".

    Raises:
        UserError: a chat holds more than its texts.
    """
    for prompt in prompts:
        text_of(prompt, where)
    chats = [prompt for prompt in prompts if isinstance(prompt, list)]
    lost = []
    if any(turn["role"] == "system" for chat in chats for turn in chat):
        lost.append("without the system's turn")
    if any(sum(turn["role"] != "system" for turn in chat) > 1 for chat in chats):
        lost.append("several turns joined by blank lines")
    return f"{where} reads chats as text, {' and '.join(lost)}; `{instead}` reads them whole" if lost else ""


def text_of(prompt: Prompt, where: str) -> str:
    """Return a prompt as a reward that reads texts gets it.

    Raises:
        UserError: it is a chat that says more than its texts, tool calls for instance.
    """
    if isinstance(prompt, list) and (key := more_than_text(prompt)):
        raise fail(
            f"a chat holds `{key}`, which a reading of texts would lose",
            where=where,
            expected="a reward that reads conversations",
            remedy="declare `template: chat` for a reward model, `messages: true` for a function",
        )
    return prompt_text(prompt)


def fill_template(template: str, prompt: str, response: str) -> str:
    """Return the text that a classifier reads; what looks like a placeholder in prompt or response is left alone."""
    parts = {"{prompt}": prompt, "{response}": response}
    return re.sub(r"\{prompt\}|\{response\}", lambda found: parts[found[0]], template)
