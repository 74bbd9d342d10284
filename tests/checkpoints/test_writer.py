"""Streams of safetensors read back by the library itself."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rewarded_lines.checkpoints.reader import TensorInfo
from rewarded_lines.checkpoints.writer import CheckpointWriter, parse_size
from rewarded_lines.errors import UserError

TENSORS = {
    "mask": torch.tensor([True, False, True]),
    "half": torch.arange(5).half(),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(1.5),
    "wide": torch.randn(7, 2, dtype=torch.float64),
    "brain": torch.randn(3, 3).bfloat16(),
}


@pytest.mark.parametrize("shard", [10**9, 40])
def test_round_trip(tmp_path, shard):
    infos = [TensorInfo(name, t.dtype, tuple(t.shape), Path()) for name, t in TENSORS.items()]
    writer = CheckpointWriter(tmp_path, infos, shard)
    for name in writer.order:
        writer.write(name, TENSORS[name])
    writer.close()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (shard == 10**9)
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert set(loaded) == set(TENSORS)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(files[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("1000", 1000)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "five"])
def test_sizes_refused(text):
    with pytest.raises(UserError, match="not a size"):
        parse_size(text)
