"""Points drawn back to a KL: values by hand, and the lot itself, played out prompt by prompt."""

from __future__ import annotations

import numpy as np
import pytest

from rewarded_lines.pareto.equal_kl import drawn_back

SFT = [1.0, 10.0]
MEANS = [[3.0, 18.0], [2.0, 12.0], [1.5, 11.0]]


def test_by_hand() -> None:
    # A quarter of the way, as it is, and one whose KL noise has made negative.
    found = drawn_back(MEANS, [8.0, 2.0, -0.1], SFT, 2.0)
    assert found.tolist() == [[1.5, 12.0], [2.0, 12.0], [1.5, 11.0]]


def test_the_mean_of_the_lot_is_what_is_said() -> None:
    rng = np.random.default_rng(0)
    prompts, kl = 200_000, 8.0
    policy, start = rng.normal(3.0, 1.0, prompts), rng.normal(1.0, 1.0, prompts)
    answered = rng.random(prompts) < 2.0 / kl
    (found,) = drawn_back([[3.0]], [kl], [1.0], 2.0)
    assert np.where(answered, policy, start).mean() == pytest.approx(found[0], abs=0.01)
    assert np.where(answered, kl, 0.0).mean() == pytest.approx(2.0, abs=0.02)


def test_each_sample_and_run_for_itself() -> None:
    rng = np.random.default_rng(1)
    means, kl, sft = rng.normal(size=(5, 3, 4, 2)), rng.uniform(0, 9, size=(5, 3, 4)), rng.normal(size=(5, 3, 2))
    found = drawn_back(means, kl, sft, 4.0)
    for at in np.ndindex(5, 3):
        assert (found[at] == drawn_back(means[at], kl[at], sft[at], 4.0)).all()


@pytest.mark.parametrize(
    ("kl", "sft", "most"), [([1.0], SFT, 1.0), ([1.0] * 3, [1.0], 1.0), ([1.0] * 3, SFT, 0.0), ([1.0] * 3, SFT, np.nan)]
)
def test_what_does_not_fit_is_refused(kl: list[float], sft: list[float], most: float) -> None:
    with pytest.raises(ValueError):
        drawn_back(MEANS, kl, sft, most)
