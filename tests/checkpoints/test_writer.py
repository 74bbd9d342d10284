"""Streams of safetensors read back by the library itself."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rewarded_lines.checkpoints.dtypes import DTYPES, as_torch
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.reader import TensorFiles
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


KINDS = {kind.torch: kind for kind in DTYPES.values()}


def stored(tensor):
    kind = KINDS[str(tensor.dtype).removeprefix("torch.")]
    raw = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.zeros(0, dtype=torch.uint8)
    return kind, np.frombuffer(raw.numpy().tobytes(), kind.storage)


@pytest.mark.parametrize("shard", [10**9, 40])
def test_round_trip(tmp_path, shard):
    values = {name: stored(tensor) for name, tensor in TENSORS.items()}
    infos = [TensorInfo(name, values[name][0], tuple(t.shape)) for name, t in TENSORS.items()]
    with CheckpointWriter(tmp_path, infos, shard) as writer:
        # In any order, and in pieces.
        for name in reversed(writer.order):
            whole = values[name][1]
            writer.write(name, len(whole) // 2, whole[len(whole) // 2 :])
            writer.write(name, 0, whole[: len(whole) // 2])
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (shard == 10**9)
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert set(loaded) == set(TENSORS)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(files[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    ours = TensorFiles(files)
    for name, tensor in TENSORS.items():
        info = ours.tensors[name]
        assert torch.equal(as_torch(ours.read(name).reshape(info.shape), info.dtype), tensor), name


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("1000", 1000)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "five"])
def test_sizes_refused(text):
    with pytest.raises(UserError, match="not a size"):
        parse_size(text)
