"""The mathematics of PPO on tensors of shape (responses, tokens); nothing here knows a model or a trainer.

Source: Schulman et al., Proximal Policy Optimization Algorithms, 2017 (arXiv 1707.06347); for language models, Ziegler
et al., Fine-Tuning Language Models from Human Preferences, 2019 (arXiv 1909.08593), section 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def kl_estimate(logprobs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Return an estimate of the KL to the reference for each sampled token, in nats.

        k1 = log p − log q,    k3 = q/p − 1 − log(q/p)

    Both have the KL as their mean over samples of p. k3 varies less and is never negative.
    (Schulman, Approximating KL Divergence, 2020, joschu.net/blog/kl-approx.html.)
    """
    log_ratio = reference - logprobs
    return -log_ratio if estimator == "k1" else log_ratio.exp() - 1 - log_ratio


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Return each token's reward: −kl_coef·KL, and the response's score on its last token.

    Args:
        scores: of the responses, shape (responses,).
        kl: of the tokens.
        mask: true for the tokens of a response, which begin at the first column.
        kl_coef: weight of the KL penalty.
    """
    places = torch.arange(mask.shape[1], device=mask.device)
    is_last = places == (mask.sum(1, keepdim=True) - 1)
    return -kl_coef * kl * mask + scores[:, None] * is_last


def estimate_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Return generalized advantage estimates; 0 outside of the responses.

        δ_t = r_t + γ·V_(t+1) − V_t,    A_t = δ_t + γλ·A_(t+1),    V = A = 0 after the last token

    (Schulman et al., High-Dimensional Continuous Control Using Generalized Advantage Estimation, arXiv 1506.02438.)
    """
    rewards, values = rewards * mask, values * mask
    following, later = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    columns = []
    for step in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, step] + gamma * following - values[:, step]
        later = (delta + gamma * lam * later) * mask[:, step]
        following = values[:, step]
        columns.append(later)
    return torch.stack(columns[::-1], dim=1)


def whiten(
    values: Tensor, mask: Tensor, shift_mean: bool = True, total: Callable[[Tensor], Tensor] = lambda part: part
) -> Tensor:
    """Return values with variance 1 over the masked tokens, and with mean 0 if `shift_mean`; 0 elsewhere.

    `total` sums a number over all processes, so that all share one mean and one variance.
    """
    count = total(mask.sum().to(values.dtype)).clamp(min=1)
    mean = total((values * mask).sum()) / count
    centred = (values - mean) * mask
    variance = total(centred.square().sum()) / (count - 1).clamp(min=1)
    scaled = centred * torch.rsqrt(variance + 1e-8)
    return scaled if shift_mean else (scaled + mean) * mask


def value_losses(values: Tensor, before: Tensor, returns: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """Return the critic's clipped loss of each token, and where clipping decided it.

    L = ½·max[(V − R)², (clip(V, V_before − c, V_before + c) − R)²]
    """
    clipped = torch.clamp(values, before - cliprange, before + cliprange)
    plain, limited = (values - returns).square(), (clipped - returns).square()
    return 0.5 * torch.maximum(plain, limited), limited > plain


def adapted_coefficient(kl_coef: float, kl: float, target: float, horizon: int, episodes: int) -> float:
    """Return the KL coefficient that leads the KL of a response to a target, in nats.

        e = clip((KL − target)/target, −0.2, 0.2),   β ← β·(1 + e·episodes/horizon)

    (Ziegler et al., section 2.2.)
    """
    error = min(max((kl - target) / target, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


def mini_batches(parts: list[Batch], size: int) -> list[list[Batch]]:
    """Return mini-batches of `size` parts, each part with responses of similar length and no needless padding.

    The loss of a mini-batch is a mean over its tokens, so it does not matter which part a response is in.
    """
    made = []
    for start in range(0, len(parts), size):
        names = [name for name, value in parts[start].items() if value.dim()]
        joined = {name: torch.cat([part[name] for part in parts[start : start + size]]) for name in names}
        order = joined["completion_mask"].sum(1).argsort(stable=True)
        made.append([_trimmed({name: value[rows] for name, value in joined.items()}) for rows in order.chunk(size)])
    return made


def _trimmed(batch: Batch) -> Batch:
    """Return a batch without the columns that are padding in every row."""
    width = batch["completion_mask"].shape[1]
    longest = max(1, int(batch["completion_mask"].sum(1).max()))
    skipped = int(batch["prompt_mask"].any(0).int().argmax())
    trimmed = {name: value[:, :longest] if value.shape[1:2] == (width,) else value for name, value in batch.items()}
    return trimmed | {name: batch[name][:, skipped:] for name in ("prompt_ids", "prompt_mask")}
