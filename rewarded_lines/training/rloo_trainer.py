"""TRL's RLOOTrainer on the prompts and end tokens that measuring has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

from trl import RLOOConfig, RLOOTrainer

from rewarded_lines.data.prompts import Prompt, encode
from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.errors import fail


def packed(prompt: Prompt) -> str:
    """Return a prompt as a data set holds it: Arrow would give every turn of a chat the keys of all others."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt)


class ReadRLOOTrainer(RLOOTrainer):  # type: ignore[misc]
    """RLOOTrainer whose responses end where a `ResponseReader` says: what follows is neither rewarded nor trained on.

    TRL knows one end token, the tokenizer's. Chat models have several, in their generation config.
    """

    def __init__(self, *, args: RLOOConfig, reader: ResponseReader, chats: bool, **parts: Any) -> None:
        """Build TRL's trainer.

        Args:
            args: the configuration.
            reader: of the policy's responses.
            chats: whether the prompts are chats, packed by `packed`.
            **parts: everything else that RLOOTrainer takes.

        Raises:
            UserError: responses may end at a text, and truncated ones shall be masked: TRL would mask all of those.
        """
        if args.mask_truncated_completions and reader.stop:
            raise fail(
                "the trainer takes a response that ends at a stop text for a truncated one",
                where="mask_truncated_completions",
                remedy="set it to false, or leave `stop:` out of the project's `generation:`",
            )
        ends = sorted(reader.ends)
        name = "stop_token_ids" if args.use_vllm else "eos_token_id"
        args.generation_kwargs = {name: ends, **cast(dict[str, Any], args.generation_kwargs or {})}
        super().__init__(args=args, **parts)
        self._reader, self._chats = reader, chats
        self._tokenizer = _ManyEnds(self._tokenizer, reader.ends)

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        own: list[Prompt] = [json.loads(prompt) for prompt in prompts] if self._chats else list(prompts)
        return encode(self._reader.tokenizer, own), None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *rest: Any) -> list[list[int]]:
        completions = super()._generate_single_turn(prompt_ids, *rest)
        # TRL's own vLLM answers each prompt several times in a row.
        times = len(completions) // len(prompt_ids)
        heads = [ids for ids in prompt_ids for _ in range(times)]
        return [list(self._reader.cut(head, row)[0]) for head, row in zip(heads, completions, strict=True)]


class _ManyEnds:
    """A tokenizer whose end token equals each of several ids: TRL asks whether a response's last token is it."""

    def __init__(self, tokenizer: Any, ends: Sequence[int] | frozenset[int]) -> None:
        self._held = tokenizer
        self.eos_token_id = _AnyOf(tokenizer.eos_token_id, ends)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._held, name)


class _AnyOf(int):
    """A number that equals several."""

    _ends: frozenset[int]

    def __new__(cls, value: int | None, ends: Sequence[int] | frozenset[int]) -> _AnyOf:
        made = super().__new__(cls, min(ends) if value is None else value)
        made._ends = frozenset(ends)
        return made

    def __eq__(self, other: object) -> bool:
        return int(self) == other or other in self._ends

    __hash__ = int.__hash__
