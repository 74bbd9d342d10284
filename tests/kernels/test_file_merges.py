"""Machine code that reads files and fills the outputs' memory: the bits of numpy, for every method."""

import pytest
from llvmlite import binding
from method_params import methods
from safetensors.torch import load_file, save_file

from rewarded_lines import merge
from rewarded_lines.checkpoints import output_file
from rewarded_lines.errors import UserError
from rewarded_lines.kernels import block_stream, blocks, compiled_files, kernels, machine_code
from rewarded_lines.kernels.file_merges import FileMerge
from rewarded_lines.merger.methods import METHODS


def test_a_processor_is_asked_only_for_what_it_has(monkeypatch):
    """On ARM, LLVM would warn of a setting of x86 with each function."""
    asked, make = [], binding.Target.create_target_machine

    def noted(target, cpu, features, **how):
        asked.append(features)
        return make(target, cpu, features, **how)

    monkeypatch.setattr(binding.Target, "create_target_machine", noted)
    for wide in (False, True):
        monkeypatch.setattr(binding, "get_host_cpu_features", lambda has=wide: binding.FeatureMap(avx512f=has))
        machine_code._translated.__wrapped__((), ("float32",), "float32", True)
    assert asked == ["-avx512f", "+avx512f,-prefer-256-bit"]


@pytest.fixture
def straight(tiny, monkeypatch):
    """Let small models count as large; note the runs that need no block in memory. Input hashes are known."""
    monkeypatch.setattr(output_file, "LARGE", 1)
    monkeypatch.setattr(output_file, "CHUNK", output_file._PAGE)
    monkeypatch.setattr(block_stream, "BLOCK", 1000)
    monkeypatch.setattr(block_stream, "_RUN", 3)
    # Pieces of parts of runs of a tensor: their ends are seldom those of eight values.
    monkeypatch.setattr(compiled_files, "PIECE", 64)
    done, run = [], FileMerge.run
    monkeypatch.setattr(FileMerge, "run", lambda *given: done.append(run(*given)) or done[-1])
    merge("sft", ["first", "second"], out="hashed")
    assert not done
    return done


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


def assert_same_bits(straight, monkeypatch, method, dtype):
    """Several outputs, of which two may be copies; none needs a block in memory."""
    lams = [(0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (1.0, 0.0)]
    given = {"lam": lams, "method": method, "alpha": 1.0, "beta": 0.5, "dtype": dtype}
    with monkeypatch.context() as patch:
        # numpy draws random numbers by the block.
        patch.setattr(block_stream, "BLOCK", blocks.BLOCK)
        expected = [weights_of(result.out) for result in merge("sft", ["first", "second"], out="numpy", **given)]
    assert not straight
    monkeypatch.setattr(kernels, "ENOUGH", -1)
    found = [weights_of(result.out) for result in merge("sft", ["first", "second"], out="straight", **given)]
    assert found == expected and straight and all(straight)


@pytest.mark.parametrize("method", methods(name for name in METHODS if name not in ("greedy", "wise-ft", "uniform")))
def test_every_method_has_the_same_bits_from_files(tiny, straight, monkeypatch, method):
    assert_same_bits(straight, monkeypatch, method, "bfloat16")


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_every_type_has_the_same_bits_from_files(tiny, straight, monkeypatch, dtype):
    assert_same_bits(straight, monkeypatch, "dare", dtype)


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
    run = FileMerge.run

    def cut(*given):
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        return run(*given)

    monkeypatch.setattr(FileMerge, "run", cut)
    with pytest.raises(UserError, match="it changed while it was read"):
        merge("sft", ["first", "second"], out="out")
    assert not (tiny / "out").exists()
