"""Classifiers as transformers runs them, in batches that leave each score as it is."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from rewarded_lines.config import RewardSpec
from rewarded_lines.data.lengths import positions_of
from rewarded_lines.rewards.classifier_backends import cannot_load, no_classifier
from rewarded_lines.rewards.classifier_batches import make_batches

# Tables with an entry for each position: there is nothing beyond their end.
_POSITION_TABLES = ("wpe", "position_embeddings", "embed_positions")


# Tokens that a classifier is tried with: behind the special ones that most vocabularies begin with.
_FIRST, _TRIED = 5, 8


class HuggingFaceClassifier:
    """A classifier that transformers runs; see `Backend`."""

    def __init__(self, where: str, spec: RewardSpec, reference: str, device: str, tokenizer: Any) -> None:
        """Load it.

        Args:
            where: the reward, for messages.
            spec: its declaration.
            reference: a folder or a Hub id.
            device: of torch.
            tokenizer: unused; texts come as tokens.

        Raises:
            UserError: it cannot be loaded, or it is no classifier.
        """
        self._batch_size = spec.batch_size
        self._model = _load_model(where, spec, reference).to(device)
        self._config = self._model.config.get_text_config()
        self._pad: int | None = self._config.pad_token_id
        self._counts_ends = bool(self._model.config.is_encoder_decoder)
        self.classes = int(self._model.config.num_labels)
        held = [*self._model.parameters(), *self._model.buffers()]
        self.size = sum(tensor.numel() * tensor.element_size() for tensor in held)
        self._positions = positions_of(self._config)
        # Relative positions have no end, and rotary ones may be taken beyond it where `max_tokens` says so.
        self.longest = next(
            (
                min(weight.shape[0], self._positions or weight.shape[0])
                for name, weight in self._model.named_parameters()
                if name.split(".")[-2] in _POSITION_TABLES
            ),
            None,
        )
        self._kinds = int(getattr(self._config, "type_vocab_size", None) or 0)
        self._alone = self._padding_leaks()

    def logits(self, ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None) -> list[list[float]]:
        """Return the logits of each text; `classifier_batches` says why a batch does not change them."""
        if self._kinds < 2:
            # One kind of text only, or none: transformers itself fails on the second text's.
            types = None
        if self._alone:
            return [self._single(row, None if types is None else types[at]) for at, row in enumerate(ids)]
        found: list[list[float]] = [[]] * len(ids)
        for group in self._groups(ids):
            lengths = [len(ids[index]) for index in group]
            for batch in make_batches(lengths, self._batch_size, self._positions):
                members = [group[place] for place in batch.members]
                own = [types[index] for index in members] if types is not None else None
                rows = self._forward([ids[index] for index in members], own, batch.rows, batch.width)
                for index, row in zip(members, rows, strict=False):
                    found[index] = row
        return found

    def _single(self, text: Sequence[int], types: Sequence[int] | None) -> list[float]:
        """Return the logits of one text by itself, without padding."""
        import torch

        inputs = {"input_ids": torch.tensor([list(text)])}
        inputs |= {} if types is None else {"token_type_ids": torch.tensor([list(types)])}
        with torch.inference_mode():
            logits = self._model(**{name: value.to(self._model.device) for name, value in inputs.items()}).logits
        found: list[float] = logits[0].double().tolist()
        return found

    def _padding_leaks(self) -> bool:
        """Return whether padding changes a text's logits: models that mix tokens by a Fourier transform, say.

        Such a model reads every text by itself.
        """
        import torch

        words = min(self._model.get_input_embeddings().weight.shape[0], _TRIED + _FIRST)
        text = [token for token in range(_FIRST, words) if token != self._pad] or [0]
        if self._counts_ends:
            text.append(int(self._config.eos_token_id or 0))
        (padded, *_), single = self._forward([text], None, 2, len(text) + 4), self._single(text, None)
        # In 16 bits another batch alone changes more digits.
        tolerance = max(1e-4, 8 * torch.finfo(self._model.dtype).eps)
        return not torch.allclose(torch.tensor(padded), torch.tensor(single), rtol=tolerance, atol=tolerance)

    def _groups(self, ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return which texts may share a batch: BART and its kin want as many end tokens in every row."""
        groups: dict[int, list[int]] = {}
        for index, row in enumerate(ids):
            count = list(row).count(self._config.eos_token_id) if self._counts_ends else 0
            groups.setdefault(count, []).append(index)
        return list(groups.values())

    def close(self) -> None:
        """See `Backend.close`."""
        import torch

        del self._model
        if torch.cuda.is_available():
            # Memory is scarce there, and code from a Hub may make cycles of references; going through them all is slow.
            gc.collect()
            torch.cuda.empty_cache()

    def _forward(
        self, texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None, rows: int, width: int
    ) -> list[list[float]]:
        import torch

        pad = self._padding(texts)
        # A text that fills its row is cut by one token as a filler, so that something in the batch is masked. It stays
        # a text otherwise: some models count the end tokens of every row, and want them equal.
        filler = texts[0] if len(texts[0]) < width else [texts[0][0], *texts[0][2:]]
        ids = torch.full((rows, width), pad)
        mask, kinds = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, text in enumerate([*texts, *[filler] * (rows - len(texts))]):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        for row, kind in enumerate(types or ()):
            kinds[row, : len(kind)] = torch.tensor(kind)
        inputs = {"input_ids": ids, "attention_mask": mask} | ({} if types is None else {"token_type_ids": kinds})
        with torch.inference_mode():
            device = self._model.device
            logits = self._model(**{name: value.to(device) for name, value in inputs.items()}).logits
        found: list[list[float]] = logits.double().tolist()
        return found

    def _padding(self, texts: Sequence[Sequence[int]]) -> int:
        """Return the id to pad with: the model's own, or one that ends no text where the model has none.

        A decoder reads the last token that is not padding by its config. Texts come without the padding that it would
        pass over in a text by itself, so in any batch it reads what it reads there.
        """
        if self._pad is not None:
            return self._pad
        last = {text[-1] for text in texts}
        chosen = next(token for token in range(len(last) + 1) if token not in last)
        self._config.pad_token_id = self._model.config.pad_token_id = chosen
        return chosen


def _load_model(where: str, spec: RewardSpec, reference: str) -> Any:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            reference, dtype=getattr(torch, spec.dtype), output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise cannot_load(where, reference, error) from error
    if loading["missing_keys"]:
        # transformers would make the missing head up, and its scores would be noise.
        raise no_classifier(where, f"{reference} without {', '.join(sorted(loading['missing_keys']))}")
    return model.eval()
