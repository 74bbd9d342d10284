"""Classifiers as transformers runs them, in batches that leave each score as it is."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from rewarded_lines.config import RewardSpec
from rewarded_lines.scoring.backends import cannot_load, no_classifier
from rewarded_lines.scoring.batches import make_batches


class HuggingFaceClassifier:
    """A classifier that transformers runs; see `Backend`."""

    def __init__(self, where: str, spec: RewardSpec, reference: str, device: str, tokenizer: Any) -> None:
        """Load it.

        Args:
            where: the reward, for messages.
            spec: its declaration.
            reference: a folder or a Hub id.
            device: of torch.
            tokenizer: whose padding token it shall take for its own.

        Raises:
            UserError: it cannot be loaded, or it is no classifier.
        """
        self._batch_size = spec.batch_size
        self._model = _load_model(where, spec, reference).to(device)
        # The classifier reads the last position before the padding, so both must mean one token by it.
        self._pad = self._model.config.pad_token_id = tokenizer.pad_token_id
        self.classes = int(self._model.config.num_labels)
        held = [*self._model.parameters(), *self._model.buffers()]
        self.size = sum(tensor.numel() * tensor.element_size() for tensor in held)
        # Relative positions have no end, rotary ones may be taken beyond it: not refused, only not padded beyond.
        self.longest: int | None = None
        self._positions = getattr(self._model.config, "max_position_embeddings", None)

    def logits(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the logits of each text; see `rewarded_lines.scoring.batches` for what makes them its own."""
        found: list[list[float]] = [[]] * len(ids)
        for batch in make_batches([len(row) for row in ids], self._batch_size, self._positions):
            rows = self._forward([ids[index] for index in batch.members], batch.rows, batch.width)
            for index, row in zip(batch.members, rows, strict=False):
                found[index] = row
        return found

    def close(self) -> None:
        """See `Backend.close`."""
        import torch

        del self._model
        if torch.cuda.is_available():
            # Memory is scarce there, and code from a Hub may make cycles of references; going through them all is slow.
            gc.collect()
            torch.cuda.empty_cache()

    def _forward(self, texts: Sequence[Sequence[int]], rows: int, width: int) -> list[list[float]]:
        import torch

        # A text that fills its row is cut by one token as a filler, so that something in the batch is masked. It stays
        # a text otherwise: some models count the end tokens of every row, and want them equal.
        filler = texts[0] if len(texts[0]) < width else [texts[0][0], *texts[0][2:]]
        ids = torch.full((rows, width), self._pad)
        mask = torch.zeros_like(ids)
        for row, text in enumerate([*texts, *[filler] * (rows - len(texts))]):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        with torch.inference_mode():
            device = self._model.device
            logits = self._model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        found: list[list[float]] = logits.double().tolist()
        return found


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
