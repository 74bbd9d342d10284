"""Runs a classifier in transformers, in batches that do not change a text's score by a single bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rewarded_lines.data.lengths import positions_of
from rewarded_lines.errors import fail
from rewarded_lines.out_of_memory import FittingBatches, empty_cache, ran_out
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.classifier_backends import Ids, bytes_held
from rewarded_lines.rewards.reward_checkpoints import RewardCheckpoint
from rewarded_lines.rewards.reward_heads import load_model, names_of_output
from rewarded_lines.rewards.text_batches import Batch, TextBatches

# Absolute position embeddings: a model cannot read beyond the end of the table.
_POSITION_TABLES = ("wpe", "position_embeddings", "embed_positions")
# Token ids of the test text; most vocabularies begin with special tokens.
_FIRST, _LAST = 5, 12


class HuggingFaceClassifier:
    """A classifier in transformers.

    Attributes:
        classes: names of the classes, in the order of a text's logits.
        size: bytes of the weights.
        longest: the most tokens of a text, or None without a limit.
        pad: the token that ends no text, or None if any token may.
    """

    def __init__(
        self,
        where: str,
        spec: RewardSpec,
        stored: RewardCheckpoint,
        device: str,
        batches: TextBatches,
        example: Callable[[], list[int]],
    ) -> None:
        """Load the model; raise a `UserError` if it is missing or not a classifier.

        `batches` keep their shapes while it is not in memory; a model with own code can read the tokens of `example`.
        """
        import torch

        self._where = where
        self._batches, self._one_by_one = batches, FittingBatches(where, 1)
        loaded = load_model(where, stored, getattr(torch, spec.dtype), spec.trust_remote_code)
        self._model, self._read = loaded.model.to(device), loaded.read
        self._config = self._model.config.get_text_config()
        self.pad: int | None = loaded.pad
        self._counts_ends = bool(self._model.config.is_encoder_decoder)
        self.size = bytes_held(self._model)
        self._positions = positions_of(self._config)
        # Relative positions have no limit, and `max_tokens` may extend rotary ones.
        tables = (
            weight.shape[0]
            for name, weight in self._model.named_parameters()
            if f".{name}".split(".")[-2] in _POSITION_TABLES
        )
        self.longest = next((min(rows, self._positions or rows) for rows in tables), None)
        self._own_code = loaded.own_code
        self._has_types = int(getattr(self._config, "type_vocab_size", None) or 0) > 1
        self.classes = loaded.names
        try:
            text = example() if loaded.own_code else self._test_text()
            if loaded.own_code:
                self.classes = names_of_output(where, self._model, self._run(self._alone_in_batch(text)))
            self._alone = self._padding_leaks(text)
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError) as error:
            if ran_out(error):
                raise
            raise fail(
                "the model fails on a short text",
                where=where,
                got=f"{type(error).__name__}: {error}",
                remedy="try `dtype: float32`, or the template that the model was trained with, such as `chat`",
            ) from error

    def logits(self, ids: Ids, types: Ids | None = None) -> list[list[float]]:
        """Return the logits of each text; `types` are the token types of pairs of texts."""
        if not self._has_types:
            # Such a model fails on the second text's type.
            types = None
        if self._alone:

            def single(places: Sequence[int]) -> list[list[float]]:
                return [self._single(ids[at], None if types is None else types[at]) for at in places]

            return self._one_by_one.run(range(len(ids)), single)
        # BART needs equally many end tokens in every row.
        ends = self._ends(ids) if self._counts_ends else ()

        def together(batch: Batch) -> list[list[float]]:
            own = None if types is None else [types[at] for at in batch.members]
            rows = self._batch([ids[at] for at in batch.members], own, batch.rows, batch.width)
            return rows[: len(batch.members)]

        return self._batches.run([len(row) for row in ids], together, self._positions, ends)

    def _ends(self, ids: Ids) -> list[int]:
        """Return the number of end tokens in each text; such a model reads the last one."""
        ends = [list(row).count(self._config.eos_token_id) for row in ids]
        if 0 in ends:
            raise fail(
                "a text has no end token, at which an encoder-decoder reads its score",
                where=self._where,
                expected=f"token {self._config.eos_token_id} in each text",
                remedy="write the end token into the template, such as `{prompt}{response}</s>`",
            )
        return ends

    def move(self, device: str) -> None:
        """Move the weights to another device."""
        self._model.to(device)

    def close(self) -> None:
        """Free the memory."""
        import torch

        del self._model
        if torch.cuda.is_available():
            # A model from the Hub may hold cyclic references. Collecting them is slow.
            empty_cache()

    def _single(self, text: Sequence[int], types: Sequence[int] | None) -> list[float]:
        """Return the logits of a text without padding."""
        import torch

        inputs = self._alone_in_batch(text)
        if types is not None:
            inputs["token_type_ids"] = torch.tensor([list(types)])
        return self._forward(inputs)[0]

    def _alone_in_batch(self, text: Sequence[int]) -> dict[str, Any]:
        import torch

        ids = torch.tensor([list(text)])
        # Own code may find the last token by the mask.
        return {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if self._own_code else {})

    def _batch(self, texts: Ids, types: Ids | None, rows: int, width: int) -> list[list[float]]:
        """Return the logits of padded rows; the rows after the texts are fillers."""
        import torch

        # A filler of full width loses one token for the mask, but no end token, which BART counts.
        filler = texts[0] if len(texts[0]) < width else [texts[0][0], *texts[0][2:]]
        ids = torch.full((rows, width), self._padding(texts))
        mask, kinds = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, text in enumerate([*texts, *[filler] * (rows - len(texts))]):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        for row, kind in enumerate(types or ()):
            kinds[row, : len(kind)] = torch.tensor(kind)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if types is not None:
            inputs["token_type_ids"] = kinds
        return self._forward(inputs)

    def _forward(self, inputs: dict[str, Any]) -> list[list[float]]:
        found: list[list[float]] = self._read(self._run(inputs)).tolist()
        return found

    def _run(self, inputs: dict[str, Any]) -> Any:
        """Return the model's output."""
        import torch

        device = self._model.device
        with torch.inference_mode():
            return self._model(**{name: tensor.to(device) for name, tensor in inputs.items()})

    def _padding(self, texts: Ids) -> int:
        """Return the padding id: the config's, or else an id that ends no text.

        A decoder's head reads the last token that is not padding.
        """
        if self.pad is not None:
            return self.pad
        last = {text[-1] for text in texts}
        chosen = next(token for token in range(len(last) + 1) if token not in last)
        self._config.pad_token_id = self._model.config.pad_token_id = chosen
        return chosen

    def _test_text(self) -> list[int]:
        """Return the tokens of a text that any model of transformers can read."""
        words = min(self._model.get_input_embeddings().weight.shape[0], _LAST + 1)
        text = [token for token in range(_FIRST, words) if token != self.pad] or [0]
        return [*text, int(self._config.eos_token_id or 0)] if self._counts_ends else text

    def _padding_leaks(self, text: list[int]) -> bool:
        """Return whether padding changes a text's logits, as in a Fourier transform over all tokens."""
        import torch

        padded, single = self._batch([text], None, 2, len(text) + 4)[0], self._single(text, None)
        # In 16 bits, the shape of a batch alone changes more digits.
        tolerance = max(1e-4, 8 * torch.finfo(self._model.dtype).eps)
        return not torch.allclose(torch.tensor(padded), torch.tensor(single), rtol=tolerance, atol=tolerance)
