"""Random masks: as dense as asked, other ones for every seed, tensor and policy, the same ones for ever."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rewarded_lines.streaming.masks import BLOCK, random_mask

DIGESTS = (b"\x01" * 32, b"\x02" * 32)


@pytest.mark.parametrize("density", [0.05, 0.1, 0.5, 0.9])
def test_density(density):
    kept = np.concatenate([random_mask(0, "a", DIGESTS[0], density, start, BLOCK) for start in (0, BLOCK, 2 * BLOCK)])
    error = np.sqrt(density * (1 - density) / kept.size)
    assert kept.dtype == bool and abs(kept.mean() - density) < 5 * error
    assert random_mask(0, "a", DIGESTS[0], 1.0, 0, 1000).all()


def test_masks_have_nothing_to_do_with_one_another():
    keys = itertools.product((0, 1), ("a", "b"), DIGESTS, (0, BLOCK))
    masks = [random_mask(seed, name, digest, 0.5, start, 10_000) for seed, name, digest, start in keys]
    # Seed and name are told apart from each other: "1" + "2:a" is not "12" + "a".
    masks += [random_mask(1, "2:a", DIGESTS[0], 0.5, 0, 10_000), random_mask(12, "a", DIGESTS[0], 0.5, 0, 10_000)]
    for one, two in itertools.combinations(masks, 2):
        assert abs((one == two).mean() - 0.5) < 0.03


def test_shorter_blocks_begin_alike_and_denser_masks_hold_the_others():
    whole = random_mask(7, "a", DIGESTS[0], 0.5, BLOCK, BLOCK)
    assert np.array_equal(random_mask(7, "a", DIGESTS[0], 0.5, BLOCK, 777), whole[:777])
    assert (random_mask(7, "a", DIGESTS[0], 0.6, BLOCK, BLOCK) >= whole).all()


def test_the_same_masks_as_ever():
    """A merge that is made again from its record must draw what it drew then."""
    places = np.flatnonzero(random_mask(0, "model.norm.weight", DIGESTS[0], 0.1, 0, 100))
    assert places.tolist() == [11, 12, 15, 19, 25, 28, 29, 35, 36, 46, 48, 67, 81]
