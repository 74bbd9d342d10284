"""The k-th largest magnitude against a plain sort, whatever the level at which the radix selection stops."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.measuring import ranking
from rewarded_lines.measuring.ranking import kth_largest


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
def test_equals_a_sort(sources, monkeypatch, held, threads):
    monkeypatch.setattr(ranking, "_HELD", held)
    base, policies, drawn = sources
    for rank in (1, 2, 299, 1500, 2999, 3000):
        found = kth_largest(base, policies, ["w0", "w1", "w2"], rank, threads)
        expected = tuple(np.sort(np.abs(values).ravel())[-rank] for values in drawn.values())
        assert found == expected, rank
