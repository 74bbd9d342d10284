"""Rules as machine code: the bits of numpy for every operator, and numpy itself where a rule does more."""

import numpy as np
import pytest

from rewarded_lines.checkpoints.dtypes import BF16, F64
from rewarded_lines.kernels import machine_code
from rewarded_lines.kernels.blocks import BLOCK
from rewarded_lines.kernels.rule_programs import RANKS, Notes, programs
from rewarded_lines.kernels.tensor_merge import TensorMerge
from rewarded_lines.kernels.thresholds_and_masks import RandomMask, RankedMask, uniform_numbers
from rewarded_lines.merger.merge_rules import dare_ties, ties

SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.1, 5e-324, 1e308, -3e-320, 2.5, -1e-9]
ONE, OTHER = np.repeat(SPECIAL, 10), np.tile(SPECIAL, 10)
RULES = {
    "sums": lambda a, b: a + b - 2 * a - (1 - b),
    "quotients": lambda a, b: a / b + 1 / a - b / 3,
    "zeros": lambda a, b: a * -0.0 + b * 0.0,
    "sizes": lambda a, b: abs(a - b) * np.float64(0.3),
    "comparisons": lambda a, b: a * (a > b) + b * (a >= 0.1) - a * (0.1 > b) + b * (b <= 1) - 2.0 * (a == b),
    "chosen": lambda a, b: (a > b) * a,
    "logic": lambda a, b: ((a > 0) & (b < 1) | (a == b)) * 1.0,
    "counts": lambda a, b: sum((each > 0) * 1.0 for each in (a, b)) * a**0,
    "a number more": lambda a, b: a * (b > 0.0) + (b > 0.0),
    "single": lambda a, b: a * (b.astype(np.float32) * 2.0**24),
}
NUMBERS = np.dtype(np.float64)


def compute(step, one, other, start=0):
    """Return what a step's rule makes of two residuals as machine code; None if a value is not finite."""
    out = np.empty(one.size)
    (program,) = programs([step], [NUMBERS, None, None])
    # Adding −0 changes no number.
    base = np.full(one.size, -0.0)
    return out if program.loop.run([base, one, other], program.parameters, [out], start) else None


@pytest.mark.parametrize("name", RULES)
def test_every_operator_has_numpys_bits(name):
    step = TensorMerge(F64, None, (0, 1), rule=lambda residuals, weights: RULES[name](*residuals))
    with np.errstate(all="ignore"):
        expected = np.asarray(RULES[name](ONE, OTHER), np.float64)
    finite = np.isfinite(expected)
    found = compute(step, ONE[finite], OTHER[finite])
    assert finite.sum() > 30 and found.tobytes() == expected[finite].tobytes()
    assert finite.all() == (compute(step, ONE, OTHER) is not None)


@pytest.mark.parametrize("count", [1, 7, 8, 100, 1003])
@pytest.mark.parametrize("density", [1e-9, 0.1, 0.5, 1.0])
def test_random_numbers_are_numpys(density, count):
    """At the start of a tensor, and around the end of a block: the code may begin at any multiple of eight."""
    mask = RandomMask(3, "a", b"\x01" * 32, density)
    step = TensorMerge(F64, None, (0, 1), rule=lambda residuals, _, *, kept: residuals[0] * kept[0], masks=[mask] * 2)
    numbers = [uniform_numbers(3, "a", b"\x01" * 32, start, BLOCK) for start in (0, BLOCK)]
    whole = np.concatenate(numbers) < np.float32(density * 2.0**24)
    for start in (0, 8, BLOCK - 104):
        found = compute(step, np.ones(count), np.ones(count), start)
        assert np.array_equal(found, whole[start : start + count] * 1.0), start


def test_factors_by_rank_are_numpys():
    mask = RankedMask(0, "a", b"\x01" * 32, 0.6, 0.3, 1000, 0)
    step = TensorMerge(F64, None, (0,), rule=lambda residuals, _, *, kept: residuals[0] * kept[0], masks=[mask])
    ranks, out = np.random.default_rng(0).permutation(1000).astype(np.uint32), np.empty(1000)
    (program,) = programs([step], [NUMBERS, None])
    assert program.ranked == [mask]
    assert program.loop.run([np.full(1000, -0.0), np.ones(1000), ranks], program.parameters, [out])
    numbers = uniform_numbers(0, "a", b"\x01" * 32, 0, 1000).astype(np.float64)
    chances = (0.6 - 0.15) + 0.3 * (ranks / 999)
    limits = np.ceil(chances.astype(np.float32) * 2.0**24)
    assert np.array_equal(out, np.where(numbers < limits, 1 / chances, 0.0)) and 500 < np.count_nonzero(out) < 700


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
        lambda a, b: a.astype(np.float16) + b,
    ],
)
def test_what_symbols_cannot_do_is_left_to_numpy(rule):
    step = TensorMerge(F64, None, (0, 1), rule=lambda residuals, weights: rule(*residuals))
    assert programs([step], [NUMBERS, None, None]) is None


def test_a_rule_may_look_at_its_weights():
    step = TensorMerge(F64, None, (0, 1), (2.0, 3.0), rule=lambda each, weights: each[weights[0] > 2] * max(weights))
    small = ONE[ONE < 9]
    assert np.array_equal(compute(step, small, small), small * 3.0)


def test_outputs_whose_operations_are_the_same_share_a_program(monkeypatch):
    """Numbers of an output are no part of the code: with 101 λ there is one translation."""
    translated = []
    translate = machine_code.translated
    monkeypatch.setattr(machine_code, "translated", lambda *what: translated.append(what) or translate(*what))
    options, masks = {"density": 0.4, "join": "mean"}, [RandomMask(0, "a", bytes([row]) * 32, 0.4) for row in (1, 2)]
    steps = [
        TensorMerge(BF16, None, (0, 1), (lam, 1 - lam), 1 + lam, dare_ties, parameters=options, masks=masks)
        for lam in (0.2, 0.4, 0.5)
    ]
    one = TensorMerge(BF16, None, (1,), (1.0,), 1.5, dare_ties, parameters=options, masks=masks[1:])
    copy = TensorMerge(BF16, 2)
    found = programs([steps[0], one, *steps[1:], copy], [BF16.storage] * 3)
    assert [program.outputs for program in found] == [[0, 2, 3], [1], [4]] and len(translated) == 3
    # Outputs do not disturb one another.
    rows = np.random.default_rng(0).normal(0, 1, (3, 1000)).astype(np.float32).view(np.uint32) >> 16
    sources = list(rows.astype(np.uint16))
    together = [np.empty(1000, np.uint16) for _ in steps]
    assert found[0].loop.run(sources, found[0].parameters, together)
    for step, expected in zip(steps, together, strict=True):
        (alone,), out = programs([step], [BF16.storage] * 3), np.empty(1000, np.uint16)
        assert alone.loop.run(sources, alone.parameters, [out]) and np.array_equal(out, expected)
    assert not np.array_equal(together[0], together[1])


def test_thresholds_are_no_part_of_the_code():
    code = set()
    for limit in (0.25, 0.5):
        step = TensorMerge(F64, None, (0,), (1.0,), rule=ties, parameters={"thresholds": [limit], "join": "sum"})
        (program,) = programs([step], [NUMBERS, None])
        code.add(program.loop.address)
    assert len(code) == 1


@pytest.mark.parametrize("width", [2, 3, 5, 8, 1000, 4097, 65_521])
def test_ranks_divided_by_a_constant_have_the_bits_of_a_division(width):
    notes = Notes()
    notes.symbol("result", 0, (notes.symbol("source", 0) / (width - 1)).place)
    loop = machine_code.translated(tuple(notes.places), (RANKS,), "float64")
    ranks, out = np.arange(width, dtype=np.uint32), np.empty(width)
    loop.run([ranks], np.array([width - 1.0]), [out])
    assert np.array_equal(out, ranks / (width - 1.0))
