"""Damaged adapters are refused with one message, or merged to the exact sum of their residuals.

The tests compute an adapter's residual anew, from the tensors that the `safetensors` library reads and the JSON.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from attempts import attempts, try_all
from plain_checkpoints import read_plain, save_family
from safetensors.numpy import save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Mutated inputs by kind and output: how many times by default.
TRIED = {(CONFIG, "adapter"): 30, (CONFIG, "full"): 25, (WEIGHTS, "adapter"): 30, (WEIGHTS, "full"): 25}
# So many times more are tried every night.
MORE = 240
NAMES = ("one", "two")
BLOCKS, PREFIX = 2, "base_model.model."
SETTINGS = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "sft",
    "r": 2,
    "lora_alpha": 6,
    "rank_pattern": {"layers.1.mlp.up_proj": 1},
    "alpha_pattern": {"layers.0.mlp.up_proj": 5},
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "modules_to_save": None,
    "init_lora_weights": True,
    "target_modules": ["up_proj"],
    "lora_dropout": 0.0,
    "inference_mode": True,
}
LAM, ALPHA, BETA = 0.25, 0.5, 1.0
ARGS = (
    *("merge", "--base", "sft", "--policy", "one", "--policy", "two", "--out", "out", "--json"),
    *("--lam", LAM, "--alpha", ALPHA, "--beta", BETA),
)
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A base and two adapters in the working directory."""
    place = save_family(tmp_path / "place", names=("sft",))
    random = np.random.default_rng(1)
    for name in NAMES:
        (place / name).mkdir()
        factors = {}
        for block, rank in enumerate((2, 1)):
            module = f"{PREFIX}model.layers.{block}.mlp.up_proj"
            factors[f"{module}.lora_A.weight"] = random.standard_normal((rank, 4), np.float32)
            factors[f"{module}.lora_B.weight"] = random.standard_normal((4, rank), np.float32)
        save_file(factors, place / name / WEIGHTS, {"format": "pt"})
        (place / name / CONFIG).write_text(json.dumps(SETTINGS))
    monkeypatch.chdir(place)
    return place


def changes(folder: Path) -> dict[str, np.ndarray]:
    """Return what an adapter adds to each matrix; a name after "=" has the tensor that replaces it."""
    config = json.loads((folder / CONFIG).read_text())
    tensors = read_plain(folder, WEIGHTS)
    found = {}
    for name, (_, values) in tensors.items():
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        if ".lora_" not in name:
            found[f"={name.removeprefix(PREFIX)}"] = values.astype(float)
        elif ".lora_embedding_A" in name:
            raise AssertionError("the base has no embeddings that were adapted")
        elif ".lora_A." in name:
            # A null is PEFT's default, a 0 is not.
            alpha = 8 if config.get("lora_alpha") is None else config["lora_alpha"]
            for pattern, value in (config.get("alpha_pattern") or {}).items():
                if re.match(rf"(.*\.)?({pattern})$", module):
                    alpha = value
                    break
            rank = values.shape[0]
            b = tensors[name.replace(".lora_A.", ".lora_B.")][1]
            scaling = alpha / (np.sqrt(rank) if config.get("use_rslora") else rank)
            found[f"{module}.weight"] = scaling * (b.astype(float) @ values.astype(float))
    return found


def scale(name: str) -> float:
    """Return the LiNeS scale of a tensor in a model of two blocks."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return ALPHA + BETA * (int(match[1]) / (BLOCKS - 1) if match else 0)


def expected(place: Path) -> dict[str, np.ndarray]:
    """Return the residual of every tensor that an adapter changes."""
    base, residuals = read_plain(place / "sft"), {}
    for name, weight in zip(NAMES, (LAM, 1 - LAM), strict=True):
        for tensor, change in changes(place / name).items():
            plain = tensor.removeprefix("=")
            added = change - base[plain][1] if tensor != plain else change
            residuals[plain] = residuals.get(plain, 0) + weight * scale(plain) * added
    return residuals


def check(place: Path, printed: str, dry: bool) -> None:
    """Compare a merged adapter, or a base with folded adapters, with the sum."""
    residuals, base = expected(place), read_plain(place / "sft")
    if dry:
        return
    if (place / "out" / CONFIG).is_file():
        merged = {
            name.removeprefix("="): change - base[name[1:]][1] if name.startswith("=") else change
            for name, change in changes(place / "out").items()
        }
        assert all(np.allclose(values, 0) for name, values in merged.items() if name not in residuals)
        merged = {name: merged.get(name, np.zeros_like(values)) for name, values in residuals.items()}
    else:
        merged = {name: values.astype(float) - base[name][1] for name, (_, values) in read_plain(place / "out").items()}
        assert all(np.array_equal(merged[name], 0 * merged[name]) for name in base.keys() - residuals.keys())
    for name, values in residuals.items():
        room = 1e-5 * (np.abs(base[name][1]).max() + np.abs(values).max(initial=0))
        assert np.allclose(merged[name], values, rtol=0, atol=room), name


@pytest.mark.parametrize(("file", "kind"), TRIED)
def test_refused_or_right(quick, place, file, kind):
    count = TRIED[file, kind]
    tried, merged = try_all(quick, (*ARGS, "--as", kind), check, attempts(place, NAMES, file, count, f"default {kind}"))
    assert tried == count and 0 < merged < count * 0.9


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("file", "kind"), TRIED)
def test_refused_or_right_many_times(quick, place, file, kind):
    count = TRIED[file, kind] * MORE
    try_all(quick, (*ARGS, "--as", kind), check, attempts(place, NAMES, file, count, f"slow {kind}"))
