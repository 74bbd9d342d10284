"""The choice between numpy's loops and machine code: small work loads no compiler, and the bits are the same."""

import numpy as np
import pytest
from method_params import RL, methods
from safetensors.torch import load_file, save_file

from rewarded_lines import merge
from rewarded_lines.checkpoints.dtypes import FLOATS
from rewarded_lines.kernels import kernels, machine_code, machine_kernels, numpy_kernels
from rewarded_lines.kernels.file_merges import FileMerge
from rewarded_lines.merger.methods import METHODS


@pytest.fixture
def used(monkeypatch):
    """Note which loops run: "numpy" and "machine"."""
    names: dict[str, set[str]] = {"numpy": set(), "machine": set()}
    loops = ("linear", "residual", "finish", "cast", "count_nonfinite", "count_magnitudes")
    for kind, module, name in [
        *(("numpy", numpy_kernels, name) for name in loops),
        *(("machine", machine_code.Loop, name) for name in ("run", "measure")),
        ("machine", FileMerge, "run"),
    ]:
        loop = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            # Machine code leaves numpy the values that fill no vector.
            lambda *args, loop=loop, noted=names[kind], name=name: (
                getattr(args[0], "size", 8) < 8 or noted.add(name),
                loop(*args),
            )[1],
        )
    return names


@pytest.mark.parametrize("method", methods(name for name in METHODS if name not in ("greedy", "wise-ft")))
def test_a_merge_has_the_same_bits_by_either(tiny, used, monkeypatch, method):
    one = {"method": method, "dtype": "bfloat16", "beta": 0.3}
    written = {}
    for enough in (1 << 40, -1):
        monkeypatch.setattr(kernels, "ENOUGH", enough)
        merge("sft", ["first", "second"], out=f"out{enough}", **one)
        written[enough] = (tiny / f"out{enough}/model.safetensors").read_bytes()
        assert bool(used["numpy"]) == (enough > 0) and bool(used["machine"]) == (enough < 0)
        used["numpy"].clear()
    assert len(set(written.values())) == 1


def test_long_work_goes_to_the_compiled_loops(used, monkeypatch):
    monkeypatch.setattr(kernels, "ENOUGH", 250)
    monkeypatch.setattr(kernels, "_seen", 0)
    for _ in range(2):
        kernels.count_nonfinite(np.zeros(125))
    assert used == {"numpy": {"count_nonfinite"}, "machine": set()}
    used["numpy"].clear()
    kernels.count_nonfinite(np.zeros(1))
    assert used == {"numpy": set(), "machine": {"run"}}


# ---- NaN: its sign and its lower bits, which processors choose by the order of operands, are the same, too

QUIET = {"float64": 0x7FF8000000000000, "float32": 0x7FC00000, "float16": 0x7E00, "bfloat16": 0x7FC0}
MANTISSA = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}


def special(kind):
    """Return stored NaN of both signs with several payloads, quiet and signalling, both infinities and some numbers."""
    bits, mantissa = FLOATS[kind].itemsize * 8, MANTISSA[kind]
    infinity = QUIET[kind] & ~(1 << (mantissa - 1))
    magnitudes = [
        infinity | payload for payload in (1, 2, 1 << (mantissa - 1), 3 << (mantissa - 2), (1 << mantissa) - 1)
    ]
    codes = [code | sign << (bits - 1) for code in (*magnitudes, infinity, 0, 1, infinity // 2) for sign in (0, 1)]
    return np.array(codes, f"u{bits // 8}").view(FLOATS[kind].storage)


def pairs(kind):
    """Return every pair of them, as a base and two policies."""
    values = special(kind)
    first, second = np.repeat(values, values.size), np.tile(values, values.size)
    return first, np.stack([second, np.roll(second, 5)])


def results(loops, kind):
    """Run every loop that stores on these values; return the arrays by name, and casts by the name of their type."""
    (base, policies), wide = pairs(kind), special("float64")
    out = {name: np.zeros(base.size, type_.storage) for name, type_ in FLOATS.items()}
    out |= {"place_columns": np.zeros(base.size, FLOATS[kind].storage)}
    out |= {name: np.zeros(base.size) for name in ("residual", "product")}
    loops.residual(base, policies[0], out["residual"])
    for name in FLOATS:
        loops.cast(base, out[name])
    loops.place_columns(base, wide.size, -3.0, 0, wide.size, out["place_columns"])
    left = np.stack([wide, wide[::-1]], axis=1)
    loops.product(left, np.stack([wide, wide]), -1.0, 0, out["product"])
    return out


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_nan_is_stored_as_one_pattern_by_either(kind):
    by_numpy, by_machine = (results(loops, kind) for loops in (numpy_kernels, machine_kernels))
    for name, values in by_numpy.items():
        assert values.tobytes() == by_machine[name].tobytes(), name
        to = name if name in FLOATS else "float64" if name in ("residual", "product") else kind
        codes = values.view(f"u{values.itemsize}")
        infinity = QUIET[to] & ~(1 << (MANTISSA[to] - 1))
        nan = codes[(codes & ((1 << (values.itemsize * 8 - 1)) - 1)) > infinity]
        assert nan.size and set(nan.tolist()) == {QUIET[to]}, name


@pytest.mark.parametrize("method", methods(["soup", "ties", "dare", *RL]))
def test_a_merge_with_nan_has_the_same_bits_by_either(tiny, monkeypatch, method):
    name = "model.norm.weight"
    for folder, step in (("sft", 1), ("first", -1)):
        tensors = load_file(tiny / folder / "model.safetensors")
        values = special("float32")[::step]
        tensors[name].numpy()[: values.size] = values
        save_file(tensors, tiny / folder / "model.safetensors", {"format": "pt"})
    written = {}
    for enough in (1 << 40, -1):
        monkeypatch.setattr(kernels, "ENOUGH", enough)
        merge("sft", ["first", "second"], method=method, out=f"out{enough}", allow_nonfinite=True)
        written[enough] = (tiny / f"out{enough}/model.safetensors").read_bytes()
    assert len(set(written.values())) == 1
    merged = load_file(tiny / f"out{enough}/model.safetensors")[name].numpy().view(np.uint32)
    assert set(merged[(merged & 0x7FFFFFFF) > 0x7F800000].tolist()) == {QUIET["float32"]}
