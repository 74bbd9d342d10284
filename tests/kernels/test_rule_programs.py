"""Rules as machine code: the bits of numpy for every operator, and numpy itself where a rule does more."""

import numpy as np
import pytest

from rewarded_lines.checkpoints.dtypes import F64
from rewarded_lines.kernels import kernels
from rewarded_lines.kernels.compiled_rules import merge_by_rules
from rewarded_lines.kernels.rule_programs import compiled_rules
from rewarded_lines.kernels.tensor_merge import TensorMerge
from rewarded_lines.merger.merge_rules import dare_ties

SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.1, 5e-324, 1e308, np.inf, -np.inf, np.nan]
ONE, OTHER = np.repeat(SPECIAL, 130), np.tile(SPECIAL, 130)
RULES = {
    "sums": lambda a, b: a + b - 2 * a - (1 - b),
    "quotients": lambda a, b: a / b + 1 / a - b / 3,
    "zeros": lambda a, b: a * -0.0 + b * 0.0,
    "sizes": lambda a, b: abs(a - b) * np.float64(0.3),
    "comparisons": lambda a, b: a * (a > b) + b * (a >= 0.1) - a * (0.1 > b) + b * (b <= 1) - 2.0 * (a == b),
    "logic": lambda a, b: ((a > 0) & (b < 1) | (a == b)) * 1.0,
    "counts": lambda a, b: sum((each > 0) * 1.0 for each in (a, b)) * a**0,
    "a number more": lambda a, b: a * (b > 0.0) + (b > 0.0),
}


class Factors:
    """Masks that are numbers."""

    dtype = np.dtype(np.float64)


def compute(step, masks=()):
    """Run a step's rule as machine code over the special values."""
    out, residuals = np.empty((1, ONE.size)), np.stack([ONE, OTHER])
    drawn = np.array(masks) if len(masks) else np.empty((0, ONE.size), bool)
    nothing, counts = np.full(ONE.size, -0.0), np.zeros(1, np.int64)
    merge_by_rules(nothing, residuals, *compiled_rules([step]), drawn, np.ones(1), out, counts, 0, True, False)
    assert counts[0] == np.count_nonzero(~np.isfinite(out))
    return out[0]


@pytest.mark.parametrize("name", RULES)
def test_every_operator_has_numpys_bits(name):
    step = TensorMerge(F64, None, (0, 1), rule=lambda residuals, weights: RULES[name](*residuals))
    with np.errstate(all="ignore"):
        expected = np.asarray(RULES[name](ONE, OTHER), np.float64)
    assert compute(step).tobytes() == np.where(np.isnan(expected), np.nan, expected).tobytes()


def test_masks_may_be_numbers():
    step = TensorMerge(
        F64, None, (0, 1), rule=lambda residuals, weights, *, kept: residuals[0] * kept[0], masks=[Factors()]
    )
    factors = np.linspace(-1, 1, ONE.size)
    with np.errstate(all="ignore"):
        expected = ONE * factors
    assert compute(step, [factors]).tobytes() == np.where(np.isnan(expected), np.nan, expected).tobytes()


@pytest.mark.parametrize(
    "rule",
    [
        lambda a, b: np.where(a > b, a, b),
        lambda a, b: a if a > b else b,
        lambda a, b: np.sqrt(abs(a)) + b,
        lambda a, b: (a > 0) + (b > 0),
        lambda a, b: a**2 + b,
        lambda a, b: a * (a != b),
        lambda a, b: a.clip(-1, 1),
    ],
)
def test_what_symbols_cannot_do_is_left_to_numpy(rule):
    step = TensorMerge(F64, None, (0, 1), rule=lambda residuals, weights: rule(*residuals))
    assert compiled_rules([step]) is None


def test_outputs_share_what_they_have_in_common(monkeypatch):
    programs = []
    monkeypatch.setattr(kernels, "machine_code", lambda operations: programs.append(operations) or 0)
    options, masks = {"density": 0.4, "join": "mean"}, [Factors(), Factors()]
    steps = [
        TensorMerge(F64, None, (0, 1), (lam, 1 - lam), rule=dare_ties, parameters=options, masks=masks)
        for lam in (0.2, 0.4)
    ]
    for chosen in (steps[:1], [steps[0], steps[0]], steps):
        compiled_rules(chosen)
    alone, twice, both = map(len, programs)
    assert twice == alone + 1 and alone < both < 2 * alone
