"""Power against simulation: fresh draws find a known effect as often as said; variances are those put in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rewarded_lines.pareto.bootstrap import Estimate, estimate_samples, resample_means, resample_runs
from rewarded_lines.pareto.hypervolume import hypervolumes
from rewarded_lines.pareto.power import (
    FACTOR,
    Variances,
    chi_square,
    least_difference,
    prompts_needed,
    runs_needed,
    variances,
)

FRONT = np.array([[0.2, 1.0], [0.7, 0.7], [1.0, 0.2]])
GAIN = 0.15
# Of what is drawn for each run, each prompt, and both.
SIZES = ((3,), (1, 60), (3, 60))


def fronts(prompts: int, seed: int) -> np.ndarray:
    """Return the scores of two methods of three points, the second better by `GAIN`: [6, prompts, 2]."""
    rng = np.random.default_rng(seed)
    means = np.concatenate([FRONT, FRONT + GAIN])
    shared = rng.normal(size=(1, prompts, 2))
    return np.asarray(means[:, None] + 0.6 * shared + 0.5 * rng.normal(size=(6, prompts, 2)))


def difference(scores: np.ndarray, resamples: int = 200) -> np.ndarray:
    """Return the difference in hypervolume above (0, 0), measured and resampled, [1 + resamples, 1]."""
    means = np.concatenate([scores.mean(axis=1)[None], resample_means(scores, resamples, seed=0)])
    volumes = [hypervolumes(means[:, rows], np.zeros((len(means), 2))) for rows in (slice(3), slice(3, 6))]
    return np.asarray(volumes[1] - volumes[0])[:, None]


def test_the_stated_prompts_find_a_hypervolume_difference_in_four_of_five_fresh_draws() -> None:
    true = float(difference(fronts(100_000, 1), 2)[0, 0])
    found = variances(difference(fronts(1000, 2), 1000), 1000)
    prompts, draws = prompts_needed(found, true), 250
    assert prompts is not None and 30 < prompts < 300
    hits = 0
    for seed in range(draws):
        interval = estimate_samples(difference(fronts(prompts, 100 + seed))[:, 0])
        hits += interval.low > 0
    # Three binomial standard errors, 0.076, and some for the pilot's own variance.
    assert hits / draws == pytest.approx(0.8, abs=0.09)


def test_the_error_of_a_hypervolume_falls_with_the_root_of_the_prompts() -> None:
    scores = fronts(1600, 3)

    def error(parts: int) -> float:
        pieces = np.split(scores, parts, axis=1)
        return float(np.mean([difference(one, 500)[1:].std(ddof=1) for one in pieces]))

    whole = error(1)
    assert [error(2) / whole, error(4) / whole] == pytest.approx([2**0.5, 2.0], rel=0.1)


def test_variances_of_several_runs_are_those_that_were_put_in() -> None:
    prompts, put_in = 60, (0.5, 2.0, 3.0)
    found, inside = [], 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        own, shared, rest = (np.sqrt(one) * rng.normal(size=size) for one, size in zip(put_in, SIZES, strict=True))
        scores = 1.0 + own[:, None] + shared + rest
        samples = resample_runs([one[None, :, None] for one in scores], 100, seed=0).means[..., 0, 0]
        one = variances(samples, prompts)
        assert one.seed is not None
        found.append((one.seed.value, one.prompt, one.residual))
        inside += one.seed.low <= put_in[0] <= one.seed.high
    assert np.mean(found, axis=0) == pytest.approx(put_in, rel=0.15)
    assert inside / 150 == pytest.approx(0.95, abs=0.05)


def test_needed_numbers_by_hand() -> None:
    found = Variances(runs=2, prompts=100, prompt=4.0, residual=2.0)
    size = FACTOR
    assert found.standard_error() == pytest.approx((4 / 100 + 2 / 200) ** 0.5)
    # Of this size, the variance of the mean may be 1.
    assert prompts_needed(found, size) == 5 and prompts_needed(found, 2 * -size) == 2
    one = Variances(1, 100, 4.0)
    assert (prompts_needed(one, size), runs_needed(one, size)) == (4, None)
    assert least_difference(0.5) == pytest.approx(0.5 * (1.959964 + 0.841621), abs=1e-6)


def test_prompts_and_runs_cannot_replace_each_other() -> None:
    found = Variances(2, 100, prompt=50.0, residual=20.0, seed=Estimate(1.5, 0.1, 300.0))
    size = FACTOR
    assert runs_needed(found, size) == 4 and prompts_needed(found, size) == 240
    assert runs_needed(found, 0.7 * size) is None and prompts_needed(found, 0.8 * size) is None
    assert replace(found, runs=4).standard_error() <= 1 < replace(found, runs=3).standard_error()
    assert replace(found, prompts=240).standard_error() <= 1 < replace(found, prompts=239).standard_error()


def test_quantiles_of_chi_square_are_those_of_tables() -> None:
    table = {(0.025, 1): 0.000982, (0.975, 1): 5.0239, (0.025, 2): 0.0506, (0.975, 3): 9.3484, (0.05, 10): 3.9403}
    assert {key: chi_square(*key) for key in table} == pytest.approx(table, rel=1e-3)


@pytest.mark.parametrize("wrong", [{"prompts": 1}, {"samples": np.zeros(5)}, {"samples": np.zeros((2, 1))}])
def test_what_has_no_variance_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError):
        variances(**{"samples": np.zeros((5, 1)), "prompts": 10} | wrong)


@pytest.mark.parametrize("size", [0.0, float("nan")])
def test_no_size_is_refused(size: float) -> None:
    with pytest.raises(ValueError):
        prompts_needed(Variances(1, 10, 1.0), size)
