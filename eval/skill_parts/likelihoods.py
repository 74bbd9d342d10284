"""How likely a causal language model finds labels after prompts, and plain texts: exact, in few forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rewarded_lines.data.prompts import encode_answers, one_bos

# Tokens of a batch with its padding.
BATCH_TOKENS = 4096
Tokens = list[int]


def label_scores(model: Any, tokenizer: Any, prompts: Sequence[str], labels: Sequence[str]) -> NDArray[np.float64]:
    """Return log π(label | prompt) in nats, without an end token: [prompts, labels].

    A prompt passes once; what labels have after their first token goes on from its keys and values.
    """
    ends: list[list[Tokens]] = []
    for label in labels:
        heads, ended = encode_answers(tokenizer, prompts, [label] * len(prompts), ())
        ends.append([_open(tokenizer, tail) for tail in ended])
    tails = list(zip(*ends, strict=True))

    def work(places: Sequence[int]) -> list[list[float]]:
        return _label_batch(model, tokenizer, [heads[place] for place in places], [tails[place] for place in places])

    return np.array(_over_batches(heads, work)).reshape(len(prompts), len(labels))


def _label_batch(
    model: Any, tokenizer: Any, heads: Sequence[Tokens], tails: Sequence[Sequence[Tokens]]
) -> list[list[float]]:
    """Return log π of the tails of each head."""
    count, longest = len(tails[0]), max(len(tail) for row in tails for tail in row)
    # [rows, labels, tokens]
    wanted = torch.tensor([[tail + [0] * (longest - len(tail)) for tail in row] for row in tails])
    counted = torch.tensor([[[1.0] * len(tail) + [0.0] * (longest - len(tail)) for tail in row] for row in tails])
    padded, positions = _padded(model, tokenizer, heads)
    with torch.inference_mode():
        said = model(**padded, position_ids=positions, logits_to_keep=1, use_cache=longest > 1)
        table = said.logits.float()[:, -1].log_softmax(-1)
        total = table.gather(-1, wanted[:, :, 0].to(table.device)).double()
        if longest > 1:
            said.past_key_values.batch_repeat_interleave(count)
            rest = wanted.reshape(-1, longest).to(table.device)
            mask = padded["attention_mask"].repeat_interleave(count, 0)
            logits = model(
                input_ids=rest[:, :-1],
                attention_mask=torch.cat([mask, torch.ones_like(rest[:, :-1])], dim=1),
                position_ids=mask.sum(1, keepdim=True) + torch.arange(longest - 1, device=mask.device),
                past_key_values=said.past_key_values,
            ).logits.float()
            picked = logits.log_softmax(-1).gather(-1, rest[:, 1:, None])[..., 0].reshape(-1, count, longest - 1)
            total += (picked * counted[:, :, 1:].to(picked.device)).double().sum(-1)
    found: list[list[float]] = total.tolist()
    return found


def tail_scores(model: Any, tokenizer: Any, heads: Sequence[Tokens], tails: Sequence[Tokens]) -> NDArray[np.float64]:
    """Return log π(tail | head) in nats for each pair of token lists."""
    wholes = [[*head, *tail] for head, tail in zip(heads, tails, strict=True)]

    def work(places: Sequence[int]) -> list[float]:
        ends = [tails[place] for place in places]
        kept = max(map(len, ends))
        # The last position predicts what would follow.
        logits = _logits(model, tokenizer, [wholes[place] for place in places], kept + 1)[:, :-1]
        targets = torch.tensor([[0] * (kept - len(tail)) + tail for tail in ends], device=logits.device)
        counted = torch.tensor([[0.0] * (kept - len(tail)) + [1.0] * len(tail) for tail in ends], device=logits.device)
        picked = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        return [float(value) for value in (picked * counted).double().sum(1)]

    return np.array(_over_batches(wholes, work))


def text_losses(model: Any, tokenizer: Any, texts: Sequence[str]) -> NDArray[np.float64]:
    """Return the mean of −log π over the tokens of each text but its first, in nats."""
    rows = [one_bos(tokenizer, ids) for ids in tokenizer(list(texts))["input_ids"]]
    heads, tails = [row[:1] for row in rows], [row[1:] for row in rows]
    return -tail_scores(model, tokenizer, heads, tails) / np.array([len(tail) for tail in tails])


def _open(tokenizer: Any, tail: Tokens) -> Tokens:
    """Return a label's tokens without the end token of training."""
    return tail[:-1] if tail[-1:] == [tokenizer.eos_token_id] else tail


def _logits(model: Any, tokenizer: Any, rows: Sequence[Tokens], kept: int) -> torch.Tensor:
    """Return the logits of the last `kept` positions of each row in float32."""
    padded, positions = _padded(model, tokenizer, rows)
    with torch.inference_mode():
        logits: torch.Tensor = model(**padded, position_ids=positions, logits_to_keep=kept).logits
    return logits.float()


def _padded(model: Any, tokenizer: Any, rows: Sequence[Tokens]) -> tuple[Any, torch.Tensor]:
    """Return rows padded on the left, and their positions."""
    padded = tokenizer.pad({"input_ids": list(rows)}, padding_side="left", return_tensors="pt").to(model.device)
    return padded, (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def _over_batches(rows: Sequence[Tokens], work: Callable[[Sequence[int]], list[Any]]) -> list[Any]:
    """Return what `work` says of the rows at given places, in the order of the rows."""
    found: list[Any] = [None] * len(rows)
    for places in _batches([len(row) for row in rows]):
        for place, value in zip(places, work(places), strict=True):
            found[place] = value
    return found


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield places of rows of similar length; the longest row of a batch decides its size."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda at: lengths[at]):
        if batch and lengths[place] * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
