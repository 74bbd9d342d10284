"""How small a difference between two methods can be found, and with how many prompts and training runs.

The difference of run s on prompt j is Δ + a_s + b_j + e_sj. The runs share their prompts, so more runs do not make b
smaller. A mean over S runs and n prompts has the variance σ²_a/S + σ²_b/n + σ²_e/(S·n). Hypervolumes follow it as far
as they are linear in the mean scores.

Functions raise ValueError for fewer than two prompts, or a size of 0.

Sources: Cohen, "Statistical Power Analysis for the Behavioral Sciences", 1988, chapter 2; Searle, Casella and
McCulloch, "Variance Components", 1992, chapter 4 (estimates from mean squares, not below 0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from rewarded_lines.pareto.bootstrap import LEVEL, Estimate

POWER = 0.8
FACTOR = NormalDist().inv_cdf((1 + LEVEL) / 2) + NormalDist().inv_cdf(POWER)
"""z_((1+level)/2) + z_power: a two-sided test at 1 − level finds a difference of so many standard errors."""


@dataclass(frozen=True)
class Variances:
    """The variances of a paired difference, in its unit squared.

    Attributes:
        runs: S, the training runs that were measured.
        prompts: n, the prompts that were measured.
        prompt: σ²_b, of a prompt in all runs alike; with one run σ²_b + σ²_e, which one run cannot tell apart.
        residual: σ²_e, of a prompt in one run; 0 with one run.
        seed: σ²_a, between runs, with the interval that so few runs leave; None with one run.
    """

    runs: int
    prompts: int
    prompt: float
    residual: float = 0.0
    seed: Estimate | None = None

    def standard_error(self, seed: float | None = None) -> float:
        """Return √(σ²_a/S + σ²_b/n + σ²_e/(S·n)); `seed` replaces σ²_a."""
        own = (self.seed.value if self.seed else 0.0) if seed is None else seed
        return math.sqrt(own / self.runs + self.prompt / self.prompts + self.residual / (self.runs * self.prompts))


def variances(samples: ArrayLike, prompts: int) -> Variances:
    """Return the variances of a difference from its values in resamples of the prompts.

    With D_bs the difference of run s in resample b, and prompts drawn for all runs alike: mean_s Var_b(D_bs) estimates
    (σ²_b + σ²_e)/n · (n − 1)/n, the mean covariance of two runs σ²_b/n · (n − 1)/n. The variance of the measured D_0s
    between runs is σ²_a + σ²_e/n. Estimates below 0 are 0.

    The interval of σ²_a holds for normal a: (S − 1)·s²/χ² of S − 1 degrees of freedom. With two runs its ends differ by
    a factor of 5000.

    Args:
        samples: D, [1 + resamples, runs], row 0 measured.
        prompts: n.
    """
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 2 or len(values) < 3:
        raise ValueError(f"expected [1 + resamples, runs] with two resamples or more, got shape {values.shape}")
    if prompts < 2:
        raise ValueError(f"{prompts} prompts; a variance needs 2 or more")
    runs = values.shape[1]
    # A bootstrap's variance of a mean is (n − 1)/n times the unbiased one.
    spread = np.atleast_2d(np.cov(values[1:], rowvar=False)) * (prompts**2 / (prompts - 1))
    both = float(np.trace(spread)) / runs
    if runs == 1:
        return Variances(runs, prompts, both)
    shared = min(both, max(0.0, float(spread.sum() - np.trace(spread)) / (runs * (runs - 1))))
    residual = both - shared
    between = float(values[0].var(ddof=1))
    ends = [between * (runs - 1) / chi_square((1 + sign * LEVEL) / 2, runs - 1) for sign in (1, -1)]
    seed = Estimate(*(max(0.0, value - residual / prompts) for value in (between, *ends)))
    return Variances(runs, prompts, shared, residual, seed)


def least_difference(standard_error: float) -> float:
    """Return the smallest difference that is found with 80% power: `FACTOR` · standard error."""
    return FACTOR * standard_error


def prompts_needed(found: Variances, size: float) -> int | None:
    """Return how many prompts find a difference of `size` with as many runs as before.

    n = (σ²_b + σ²_e/S) / ((size/`FACTOR`)² − σ²_a/S), rounded up; None where no number makes up for the runs.
    """
    room = _allowed(size) - (found.seed.value if found.seed else 0.0) / found.runs
    return None if room <= 0 else max(2, math.ceil((found.prompt + found.residual / found.runs) / room - 1e-9))


def runs_needed(found: Variances, size: float) -> int | None:
    """Return how many training runs find a difference of `size` with the same prompts.

    S = (σ²_a + σ²_e/n) / ((size/`FACTOR`)² − σ²_b/n), rounded up; None where no number makes up for the prompts,
    or where one run shows nothing of σ²_a.
    """
    room = _allowed(size) - found.prompt / found.prompts
    if found.seed is None or room <= 0:
        return None
    return max(1, math.ceil((found.seed.value + found.residual / found.prompts) / room - 1e-9))


def _allowed(size: float) -> float:
    """Return the variance of the mean at which a difference of `size` is found."""
    if not (math.isfinite(size) and size):
        raise ValueError(f"a difference of {size}; expected a number other than 0")
    return float((size / FACTOR) ** 2)


def chi_square(share: float, degrees: int) -> float:
    """Return the quantile of χ² with whole degrees of freedom, by bisection."""
    low, high = 0.0, 1.0
    while _chi_square_below(high, degrees) < share:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _chi_square_below(middle, degrees) < share else (low, middle)
    return high


def _chi_square_below(value: float, degrees: int) -> float:
    """Return P(χ² ≤ value): 1 − e^(−x) Σ x^k/k! with x = value/2 for even degrees, in halves for odd ones."""
    half, odd = value / 2, degrees % 2
    start = math.erf(math.sqrt(half)) if odd else 1 - math.exp(-half)
    steps = (k + odd / 2 for k in range(1 - odd, (degrees - odd) // 2))
    return start - math.exp(-half) * math.fsum(math.pow(half, step) / math.gamma(step + 1) for step in steps)
