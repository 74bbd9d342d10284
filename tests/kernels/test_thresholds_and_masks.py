"""The k-th largest magnitude against a plain sort; random masks by density, independence and stability."""

import itertools
import math

import numpy as np
import pytest
from exact_merge import random_mask
from safetensors.numpy import save_file

from rewarded_lines.checkpoints.dtypes import F64, FLOATS
from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.kernels import between_bounds, numpy_kernels, row_ranks
from rewarded_lines.kernels import kth_largest as ranking
from rewarded_lines.kernels.blocks import BLOCK
from rewarded_lines.kernels.kth_largest import kth_largest, share_of_nonzero
from rewarded_lines.kernels.magnitudes import Magnitudes
from rewarded_lines.kernels.tensor_merge import TensorMerge
from rewarded_lines.kernels.thresholds_and_masks import overlap_ratios
from rewarded_lines.merger.merge_rules import spread

DIGESTS = (b"\x01" * 32, b"\x02" * 32)


@pytest.fixture(params=["normal", "many-equal", "wide"])
def sources(tmp_path, request):
    """A base of zeros and two policies, so that the residuals are the policies themselves."""
    generator = np.random.default_rng(1)
    drawn = {}
    for name in ("first", "second"):
        values = generator.standard_normal((3, 1000))
        if request.param == "many-equal":
            values = np.round(values)
        if request.param == "wide":
            values = values * 10.0 ** generator.uniform(-300, 300, values.shape)
        drawn[name] = values
        save_file({f"w{i}": row for i, row in enumerate(values)}, tmp_path / f"{name}.safetensors")
    save_file({f"w{i}": np.zeros(1000) for i in range(3)}, tmp_path / "base.safetensors")
    opened = [TensorFiles([tmp_path / f"{name}.safetensors"]) for name in ("base", "first", "second")]
    return opened[0], opened[1:], drawn


@pytest.mark.parametrize("held", [10**6, 500, 3, -1], ids=lambda held: f"held-{held}")
@pytest.mark.parametrize("threads", [1, 3])
def test_equals_a_sort_at_whatever_level_the_selection_stops(sources, monkeypatch, held, threads):
    for module in (ranking, between_bounds):
        monkeypatch.setattr(module, "HELD", held)
    monkeypatch.setattr(ranking, "_FEW", held)
    base, policies, drawn = sources
    for bounds in (ranking._bounds, lambda *_: ranking.Bounds(1.0, 1.5, 0.0)):
        # The second bounds hold few of the values.
        monkeypatch.setattr(ranking, "_bounds", bounds)
        for rank in (1, 2, 299, 1500, 2999, 3000):
            (found,) = kth_largest(base, policies, ["w0", "w1", "w2"], [rank], threads)
            expected = tuple(np.sort(np.abs(values).ravel())[-rank] for values in drawn.values())
            assert found == expected, rank


def test_overlaps_of_one_policy_and_of_none(sources):
    base, policies, drawn = sources
    assert overlap_ratios(base, policies, ["w0", "w1"], (), 0.5, 1) == {}
    assert overlap_ratios(base, policies, ["w0", "w1"], (1,), 0.5, 1) == {1: 0.0}
    first, second = (np.abs(values[:2]) > 0.5 for values in drawn.values())
    both = (first & second).sum()
    expected = {0: both / (first & ~second).sum(), 1: both / (second & ~first).sum()}
    assert overlap_ratios(base, policies, ["w0", "w1"], (0, 1), 0.5, 1) == expected


def test_one_pass_after_a_sample(sources, monkeypatch):
    """Most bounds hold the value, so that the radix selection is not needed."""
    monkeypatch.setattr(ranking, "_FEW", 0)
    monkeypatch.setattr(ranking, "_THINNED", 8)
    counted = []
    monkeypatch.setattr(Magnitudes, "count", lambda *given: counted.append(given))
    base, policies, drawn = sources
    ranks = (300, 1500, 2700)
    expected = [tuple(np.sort(np.abs(values).ravel())[-rank] for values in drawn.values()) for rank in ranks]
    assert kth_largest(base, policies, ["w0", "w1", "w2"], ranks, 1) == expected and not counted


def test_a_share_of_what_is_not_zero(sources, monkeypatch):
    """By ranking all, by a sample and one pass, and by the radix selection where the sample's bounds fail."""
    base, policies, drawn = sources
    step = TensorMerge(F64, None, (0, 1), rule=lambda residuals, _: spread(residuals))
    with np.errstate(over="ignore"):
        values = np.sort(spread([one.ravel() for one in drawn.values()]))[::-1]
    values, bounds = values[values != 0], ranking._bounds
    for few, known in ((10**6, bounds), (0, bounds), (0, lambda *_: ranking.Bounds(1.0, 1.5, 0.0))):
        monkeypatch.setattr(ranking, "_FEW", few)
        monkeypatch.setattr(ranking, "_bounds", known)
        for share in (1e-9, 0.1, 0.5, 1.0):
            rank = int(share * values.size)
            found = share_of_nonzero(base, policies, ["w0", "w1", "w2"], share, step)
            assert found == (values[rank - 1] if rank else math.inf), (few, share)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", FLOATS)
def test_values_between_two(kind, special):
    generator = np.random.default_rng(3)
    values = np.round(generator.normal(0, 40, (2, 1001))) / 16
    if special:
        values[:, :6] = [[np.inf, np.inf, -np.inf, np.nan, 0.0, -0.0], [np.inf, 1, np.inf, 1, -0.0, 0.0]]
    stored = np.empty((2, 1001), FLOATS[kind].storage)
    for out, wide in zip(stored, values, strict=True):
        numpy_kernels.cast(wide, out)
    # Each of two policies, the second of which is the first with another sign, has three of the bounds.
    bounds = [(0.0, 0.0), (0.0, 1.0), (1.0, 2.5), (2.5, 2.5), (1.0, np.inf), (np.inf, np.inf)]
    pairs = [(stored[0], stored[1]), (stored[1], stored[0])]
    found = np.zeros((6, 1001))
    counts, zeros = numpy_kernels.count_between(pairs, bounds, found)
    sizes = np.abs(np.where(values[0] == values[1], 0.0, values[1] - values[0]))
    for row, (low, high) in enumerate(bounds):
        inside = np.sort(sizes[(sizes > low) & (sizes < high)])
        above = np.isnan(sizes).sum() + (sizes > high).sum()
        ends = above, (sizes == high).sum(), (sizes == low).sum() * (low < high)
        assert counts[row] == (inside.size, *ends) and zeros == (sizes == 0).sum()
        assert np.array_equal(np.sort(found[row, : inside.size]), inside)


UNKIND = {
    "normal": lambda base, step: (base, base + step),
    "sparse": lambda base, step: (base, np.where(step > 2, base + step, base)),
    "ties": lambda base, step: (0 * base, np.round(step * 2)),
    "equal": lambda base, step: (base, base),
    "wide": lambda base, step: (0 * base, step * 10.0 ** (40 * base)),
    "special": lambda base, step: (
        np.where(base > 1, np.inf, base),
        np.select([step > 1.5, step > 1, step > 0], [np.nan, np.inf, -0.0], base),
    ),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", FLOATS)
def test_ranks_are_the_same_by_either(kind):
    generator = np.random.default_rng(5)
    for (name, values), width in itertools.product(UNKIND.items(), (1, 2, 31, 3001)):
        count = -(-3002 // width) * width
        pair = np.empty((2, count), FLOATS[kind].storage)
        for out, wide in zip(pair, values(*generator.standard_normal((2, count))), strict=True):
            numpy_kernels.cast(wide, out)
        ranks = np.zeros((2, 3000), np.uint32)
        for loops, out in zip((numpy_kernels, row_ranks), ranks, strict=True):
            loops.rank_rows(*pair, width, min(1, width - 1), out)
        assert np.array_equal(*ranks) and (width == 1 or ranks.any()), (name, width)


@pytest.mark.parametrize("density", [0.05, 0.1, 0.5, 0.9])
def test_density(density):
    kept = np.concatenate([random_mask(0, "a", DIGESTS[0], density, start, BLOCK) for start in (0, BLOCK, 2 * BLOCK)])
    error = np.sqrt(density * (1 - density) / kept.size)
    assert kept.dtype == bool and abs(kept.mean() - density) < 5 * error
    assert random_mask(0, "a", DIGESTS[0], 1.0, 0, 1000).all()


def test_masks_have_nothing_to_do_with_one_another():
    keys = itertools.product((0, 1), ("a", "b"), DIGESTS, (0, BLOCK))
    masks = [random_mask(seed, name, digest, 0.5, start, 10_000) for seed, name, digest, start in keys]
    # Seed and name are separated: "1" + "2:a" is not "12" + "a".
    masks += [random_mask(1, "2:a", DIGESTS[0], 0.5, 0, 10_000), random_mask(12, "a", DIGESTS[0], 0.5, 0, 10_000)]
    for one, two in itertools.combinations(masks, 2):
        assert abs((one == two).mean() - 0.5) < 0.03


def test_shorter_blocks_begin_alike_and_denser_masks_hold_the_others():
    whole = random_mask(7, "a", DIGESTS[0], 0.5, BLOCK, BLOCK)
    assert np.array_equal(random_mask(7, "a", DIGESTS[0], 0.5, BLOCK, 777), whole[:777])
    assert (random_mask(7, "a", DIGESTS[0], 0.6, BLOCK, BLOCK) >= whole).all()


def test_the_same_masks_as_ever():
    """A merge that is repeated from its record must draw the same masks."""
    places = np.flatnonzero(random_mask(0, "model.norm.weight", DIGESTS[0], 0.1, 0, 100))
    assert places.tolist() == [11, 12, 15, 19, 25, 28, 29, 35, 36, 46, 48, 67, 81]
