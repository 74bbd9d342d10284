"""What is measured of files by machine code: thresholds, overlaps and sums are numpy's, to the bit."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.kernels import between_bounds, compiled_files, kernels, measures, norms
from rewarded_lines.kernels import kth_largest as ranking
from rewarded_lines.kernels.blocks import PIECE
from rewarded_lines.kernels.norms import Facts
from rewarded_lines.merger.merge_rules import spread

# Whole pieces, and a part of one that fills no vector.
COUNT = 5 * PIECE + 1003


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32, torch.float64])
def models(tmp_path, request, monkeypatch):
    """A base and three policies; runs of machine code are short, and noted with whether they succeeded."""
    generator = np.random.default_rng(0)
    base = generator.normal(0, 1, COUNT)
    steps = generator.normal(0, 0.1, (3, COUNT)) * (generator.random((3, COUNT)) < [[1.0], [0.5], [0.02]])
    for name, values in zip(("base", "one", "two", "few"), (base, *(base + steps)), strict=True):
        save_file({"w": torch.from_numpy(values).to(request.param)}, tmp_path / f"{name}.safetensors")
    done, read = [], measures.Measure.files
    monkeypatch.setattr(measures.Measure, "files", lambda *given: done.append(read(*given)) or done[-1])
    for module in (measures, between_bounds, norms):
        monkeypatch.setattr(module, "RUN", 2 * PIECE)
    # Sums are of 128 values.
    monkeypatch.setattr(compiled_files, "PIECE", 1000)
    monkeypatch.setattr(ranking, "_FEW", 0)
    monkeypatch.setattr(ranking, "_THINNED", 16)
    return tmp_path, done


class Moved:
    """A policy that computes its residual, as adapters do."""

    tensors = {}

    def touches(self, name):
        return True

    def residual_into(self, name, start, out):
        out[:] = np.sin(np.arange(start, start + out.size)) * 0.1


def measured(folder, adapter=False):
    base, *policies = (TensorFiles([folder / f"{name}.safetensors"]) for name in ("base", "one", "two", "few"))
    if adapter:
        policies[1] = Moved()
    facts = Facts(base, policies, ["w"])
    rows = [0, 1, 2]
    return [
        facts.thresholds("w", rows, 0.2, "model"),
        facts.bands("w", rows, 0.3, 0.01),
        facts.boosts("w", rows, 0.05, 1.0, 9.0, "tensor"),
        *(facts.selection("w", rows, share, spread) for share in (0.01, 0.5)),
    ]


@pytest.mark.parametrize("tied", [0, 1 << 62])
def test_all_is_as_by_numpy(models, monkeypatch, tied):
    folder, done = models
    monkeypatch.setattr(between_bounds, "_TIED", tied)
    expected = measured(folder)
    assert not done
    monkeypatch.setattr(kernels, "ENOUGH", -1)
    assert measured(folder) == expected and done and all(done)


def test_what_an_adapter_adds_is_measured_by_blocks(models, monkeypatch):
    folder, done = models
    blocks, block = [], measures.Measure.block
    monkeypatch.setattr(measures.Measure, "block", lambda *given: blocks.append(block(*given)) or blocks[-1])
    expected = measured(folder, adapter=True)
    monkeypatch.setattr(kernels, "ENOUGH", -1)
    assert measured(folder, adapter=True) == expected and not any(done) and blocks and all(blocks)


def test_what_is_not_finite_is_left_to_numpy(models, monkeypatch):
    folder, done = models
    for name in ("base", "one"):
        values = torch.from_numpy(np.random.default_rng(1).normal(0, 1, COUNT)).to(torch.bfloat16)
        # Equal infinities have no residual.
        values[[3, -3]] = float("inf")
        values[PIECE] = float("nan") if name == "one" else 1.0
        save_file({"w": values}, folder / f"{name}.safetensors")
    with np.errstate(all="ignore"):
        expected = measured(folder)
        monkeypatch.setattr(kernels, "ENOUGH", -1)
        # A NaN differs from itself.
        assert repr(measured(folder)) == repr(expected) and not all(done)
