"""PPO's equations against direct calculations in loops."""

import math

import pytest
import torch

from rewarded_lines.training.ppo_math import (
    adapted_coefficient,
    estimate_advantages,
    kl_estimate,
    mini_batches,
    token_rewards,
    value_losses,
    whiten,
)

LENGTHS = [4, 1, 3, 0]
GENERATOR = torch.Generator().manual_seed(0)
REWARDS, VALUES, OTHERS = (torch.randn(4, 4, generator=GENERATOR, dtype=torch.float64) for _ in range(3))
MASK = torch.arange(4) < torch.tensor(LENGTHS)[:, None]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl(estimator):
    found = kl_estimate(VALUES, OTHERS, estimator)
    for row in range(4):
        for step in range(4):
            p, q = float(VALUES[row, step]), float(OTHERS[row, step])
            wanted = p - q if estimator == "k1" else math.exp(q) / math.exp(p) - 1 - (q - p)
            assert float(found[row, step]) == pytest.approx(wanted, abs=1e-12)
    # Its mean over samples of p is the KL.
    p, q = torch.tensor([0.2, 0.3, 0.5]).double(), torch.tensor([0.5, 0.25, 0.25]).double()
    mean = (p * kl_estimate(p.log(), q.log(), estimator)).sum()
    assert float(mean) == pytest.approx(float((p * (p / q).log()).sum()))


def test_the_score_is_the_reward_of_the_last_token():
    scores = torch.tensor([10.0, 20.0, 30.0, 40.0], dtype=torch.float64)
    found = token_rewards(scores, OTHERS, MASK, 0.5)
    for row, length in enumerate(LENGTHS):
        for step in range(4):
            wanted = -0.5 * float(OTHERS[row, step]) if step < length else 0.0
            wanted += float(scores[row]) if step == length - 1 else 0.0
            assert float(found[row, step]) == pytest.approx(wanted)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.97, 0.0)])
def test_advantages(gamma, lam):
    found = estimate_advantages(REWARDS, VALUES, MASK, gamma, lam)
    for row, length in enumerate(LENGTHS):
        value = [*VALUES[row, :length].tolist(), 0.0]
        delta = [float(REWARDS[row, t]) + gamma * value[t + 1] - value[t] for t in range(length)]
        for t in range(4):
            # The sum that defines them, not the recursion.
            wanted = sum((gamma * lam) ** (later - t) * delta[later] for later in range(t, length))
            assert float(found[row, t]) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("shift", [True, False])
def test_whitening_looks_at_masked_tokens_only(shift):
    there = REWARDS[MASK]
    deviation = math.sqrt(float(there.var(correction=1)) + 1e-8)
    found = whiten(REWARDS, MASK, shift)
    wanted = (there - there.mean()) / deviation + (0 if shift else there.mean())
    assert torch.allclose(found[MASK], wanted, atol=1e-12) and not found[~MASK].any()
    # Two processes, each with half of the rows, have the statistics of the whole.
    sums = [MASK.sum(), REWARDS[MASK].sum(), (REWARDS[MASK] - there.mean()).square().sum()]
    half = whiten(REWARDS[:2], MASK[:2], shift, total=lambda part: sums.pop(0).to(part.dtype))
    assert torch.allclose(half, found[:2], atol=1e-12)


def test_the_critics_loss_is_clipped():
    returns = torch.randn(4, 4, generator=GENERATOR, dtype=torch.float64)
    found, clipped = value_losses(VALUES, OTHERS, returns, 0.3)
    for row in range(4):
        for step in range(4):
            value, before, wanted = (float(one[row, step]) for one in (VALUES, OTHERS, returns))
            limited = min(max(value, before - 0.3), before + 0.3)
            plain, other = (value - wanted) ** 2, (limited - wanted) ** 2
            assert float(found[row, step]) == pytest.approx(max(plain, other) / 2)
            assert bool(clipped[row, step]) == (other > plain)
    assert clipped.any() and not clipped.all()


@pytest.mark.parametrize(("kl", "factor"), [(12.0, 1 + 0.2 * 0.5), (6.6, 1 + 0.1 * 0.5), (0.0, 1 - 0.2 * 0.5)])
def test_the_coefficient_follows_the_kl(kl, factor):
    assert adapted_coefficient(0.1, kl, target=6.0, horizon=100, episodes=50) == pytest.approx(0.1 * factor)


def test_mini_batches_have_no_column_of_padding_and_lose_no_token():
    """Prompts are padded on the left, completions on the right."""
    sizes = [(1, 4), (3, 2), (2, 1), (1, 3)]
    rows = []
    for at, (prompt, completion) in enumerate(sizes):
        prompt_mask, mask = torch.arange(5) >= 5 - prompt, torch.arange(6) < completion
        ids = {"prompt_ids": (10 * at + torch.arange(5)) * prompt_mask, "completion_ids": 100 * (at + 1) * mask}
        rows.append({**ids, "prompt_mask": prompt_mask, "completion_mask": mask, "score": torch.tensor(at)})
    parts = [{name: torch.stack([row[name] for row in rows[at : at + 2]]) for name in rows[0]} for at in (0, 2)]
    made = mini_batches([part | {"count": torch.tensor(2)} for part in parts], 2)
    ((short, long),) = made
    for batch, places, longest, widest in ((short, (2, 1), 2, 3), (long, (3, 0), 4, 1)):
        assert batch["score"].tolist() == list(places)
        for name, length in (("prompt_ids", widest), ("completion_ids", longest)):
            mask = name.replace("ids", "mask")
            assert batch[name].shape == batch[mask].shape == (2, length)
            for place, ids, there in zip(places, batch[name], batch[mask], strict=True):
                assert ids[there].tolist() == rows[place][name][rows[place][mask]].tolist()
