"""Sums in machine code: the bits of numpy's loops, from memory and from files."""

import numpy as np
import pytest
from exact import BFLOAT16, FLOAT32
from llvmlite import binding
from safetensors.torch import load_file, save_file

from rewarded_lines import merge
from rewarded_lines.checkpoints import output_file
from rewarded_lines.errors import UserError
from rewarded_lines.kernels import block_stream, compiled_sums, kernels, numpy_kernels
from rewarded_lines.kernels.file_sums import FileSum

TYPES = {"bfloat16": np.uint16, "float32": np.float32}
PAIRS = [(one, other) for one in TYPES for other in TYPES]


def stored(generator, shape, name):
    """Return values of many sizes, with zeros of both signs and the smallest numbers."""
    values = (generator.standard_normal(shape) * 2.0 ** generator.integers(-140, 20, shape)).astype(np.float32)
    values[..., ::5], values[..., 1::7] = -0.0, 0.0
    return values if name == "float32" else (values.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize(("kind", "target"), PAIRS)
def test_the_bits_are_those_of_numpy(kind, target):
    generator = np.random.default_rng(0)
    for length in (1, 7, 8, 9, 1000):
        for policies in (1, 2, 3):
            values = stored(generator, (policies + 1, length), kind)
            weights = generator.standard_normal((3, policies))
            out, expected = (np.full((3, length + 1), 77, TYPES[target]) for _ in range(2))
            numpy_kernels.linear(values[0], values[1:], range(policies), weights, expected, np.zeros(3, np.int64))
            assert compiled_sums.linear(values[0], values[1:], weights, out)
            assert out.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("kind", "target"), PAIRS)
def test_what_is_not_finite_is_told(kind, target):
    format_ = BFLOAT16 if kind == "bfloat16" else FLOAT32
    for place in (0, 8, 16):
        for bits in (format_.infinity, format_.infinity + 1, format_.infinity - 1):
            values = np.zeros((3, 17), np.uint16 if kind == "bfloat16" else np.uint32)
            values[1, place] = bits
            weights, out = np.full((1, 2), 1.5), np.empty((1, 17), TYPES[target])
            values = values if kind == "bfloat16" else values.view(np.float32)
            assert not compiled_sums.linear(values[0], values[1:], weights, out)


def test_a_processor_is_asked_only_for_what_it_has(monkeypatch):
    """On ARM, LLVM would warn of a setting of x86 with each function."""
    asked, make = [], binding.Target.create_target_machine

    def noted(target, cpu, features, **how):
        asked.append(features)
        return make(target, cpu, features, **how)

    monkeypatch.setattr(binding.Target, "create_target_machine", noted)
    for wide in (False, True):
        monkeypatch.setattr(binding, "get_host_cpu_features", lambda has=wide: binding.FeatureMap(avx512f=has))
        compiled_sums.machine_code.__wrapped__(1, "float32", "float32")
    assert asked == ["-avx512f", "+avx512f,-prefer-256-bit"]


# ---- from files, straight into the outputs' memory


@pytest.fixture
def straight(tiny, monkeypatch):
    """Let small models count as large; note the runs that need no block in memory. Input hashes are known."""
    monkeypatch.setattr(output_file, "LARGE", 1)
    monkeypatch.setattr(output_file, "CHUNK", output_file._PAGE)
    monkeypatch.setattr(block_stream, "BLOCK", 1000)
    monkeypatch.setattr(block_stream, "_RUN", 3000)
    done, run = [], FileSum.run
    monkeypatch.setattr(FileSum, "run", lambda *given: done.append(run(*given)) or done[-1])
    merge("sft", ["first", "second"], out="hashed")
    assert not done
    return done


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_files_are_summed_and_copied_with_the_same_bits(tiny, straight, monkeypatch, dtype):
    lams = [(0.0, 1.0), (0.25, 0.75), (1.0, 0.0)]
    given = {"lam": lams, "alpha": 1.0, "beta": 0.5, "dtype": dtype}
    expected = [weights_of(result.out) for result in merge("sft", ["first", "second"], out="numpy", **given)]
    assert not straight
    monkeypatch.setattr(kernels, "ENOUGH", -1)
    found = [weights_of(result.out) for result in merge("sft", ["first", "second"], out="straight", **given)]
    assert found == expected and all(straight) and straight


def test_three_policies_are_summed_in_the_order_of_their_content(tiny, straight, monkeypatch):
    merge("sft", ["first", "second", "sft"], lam=[0.2, 0.3, 0.5], out="numpy")
    monkeypatch.setattr(kernels, "ENOUGH", -1)
    merge("sft", ["first", "second", "sft"], lam=[0.2, 0.3, 0.5], out="straight")
    merge("sft", ["sft", "second", "first"], lam=[0.5, 0.3, 0.2], out="turned")
    assert straight and weights_of(tiny / "numpy") == weights_of(tiny / "straight") == weights_of(tiny / "turned")


def test_a_value_that_is_not_finite_is_refused_as_ever(tiny, straight, monkeypatch):
    tensors = load_file(tiny / "first" / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, tiny / "first" / "model.safetensors", {"format": "pt"})
    merge("sft", ["first", "second"], out="hashed again", allow_nonfinite=True)
    monkeypatch.setattr(kernels, "ENOUGH", -1)
    with pytest.raises(UserError, match="1 values are not finite in policy `first`"):
        merge("sft", ["first", "second"], out="out")
    assert straight.count(False) == 1


def test_a_file_that_is_cut_short_meanwhile_is_refused(tiny, straight, monkeypatch):
    monkeypatch.setattr(kernels, "ENOUGH", -1)
    path = tiny / "second" / "model.safetensors"
    run = FileSum.run

    def cut(*given):
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        return run(*given)

    monkeypatch.setattr(FileSum, "run", cut)
    with pytest.raises(UserError, match="it changed while it was read"):
        merge("sft", ["first", "second"], out="out")
    assert not (tiny / "out").exists()
