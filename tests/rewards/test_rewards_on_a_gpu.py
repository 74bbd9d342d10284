"""A card whose memory really runs out: every text still gets its score."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.load_rewards import load_reward

pytestmark = pytest.mark.gpu

TEXTS = [" ".join(["a film", "of great beauty", "and of", "little else"][: 1 + index % 4]) for index in range(70)]


@contextmanager
def little_memory(device, monkeypatch):
    """Leave a card 40 MiB for activations; on a CPU, fail as a card does where a batch has more than 512 tokens."""
    if device == "cuda":
        torch.cuda.empty_cache()
        left = torch.cuda.memory_reserved() + (40 << 20)
        torch.cuda.set_per_process_memory_fraction(left / torch.cuda.mem_get_info()[1])
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    forward = torch.nn.Embedding.forward

    def limited(self, ids):
        if ids.numel() > 512:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, ids)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Embedding, "forward", limited)
        yield


def test_where_memory_runs_out_every_text_still_gets_its_score(device, large_classifier, monkeypatch, caplog):
    spec = RewardSpec(model=str(large_classifier), format="0", template="{response}")
    reward = load_reward("r", spec, device=device)
    pool = [f"{' '.join(TEXTS[:12])} {text}" for text in TEXTS] * 8
    prompts = [""] * len(pool)
    expected = reward.score(prompts, pool)
    reward.free()
    with little_memory(device, monkeypatch):
        assert reward.score(prompts, pool) == pytest.approx(expected, abs=1e-3)
    assert any("memory ran out" in one.getMessage() for one in caplog.records)
