"""The choice between numpy's loops and the compiled ones: small work loads no compiler, and the bits are the same."""

import numpy as np
import pytest

from rewarded_lines import merge
from rewarded_lines.kernels import compiled_kernels, kernels, numpy_kernels
from rewarded_lines.merger.methods import METHODS


@pytest.fixture
def used(monkeypatch):
    """Note which loops run, by module."""
    names: dict[str, set[str]] = {"numpy_kernels": set(), "compiled_kernels": set()}
    for module in (numpy_kernels, compiled_kernels):
        for name in ("linear", "restore", "residual", "finish", "cast", "count_nonfinite", "count_magnitudes"):
            loop, noted = getattr(module, name), names[module.__name__.rpartition(".")[2]]
            monkeypatch.setattr(
                module, name, lambda *args, loop=loop, noted=noted, name=name: noted.add(name) or loop(*args)
            )
    return names


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("greedy", "wise-ft")])
def test_a_merge_has_the_same_bits_by_either(tiny, used, monkeypatch, method):
    one = {"method": method, "dtype": "bfloat16", "beta": 0.3}
    written = {}
    for enough in (1 << 40, -1):
        monkeypatch.setattr(kernels, "ENOUGH", enough)
        merge("sft", ["first", "second"], out=f"out{enough}", **one)
        written[enough] = (tiny / f"out{enough}/model.safetensors").read_bytes()
    assert len(set(written.values())) == 1
    assert used["numpy_kernels"] and used["numpy_kernels"] == used["compiled_kernels"]


def test_long_work_goes_to_the_compiled_loops(used, monkeypatch):
    monkeypatch.setattr(kernels, "ENOUGH", 250)
    monkeypatch.setattr(kernels, "_seen", 0)
    for _ in range(2):
        kernels.count_nonfinite(np.zeros(125))
    assert not used["compiled_kernels"]
    kernels.count_nonfinite(np.zeros(1))
    assert used["compiled_kernels"] == {"count_nonfinite"}
