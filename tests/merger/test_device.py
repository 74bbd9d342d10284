"""The rules on a torch device: the bits of the CPU."""

from __future__ import annotations

import shutil
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
from exact import BFLOAT16, FLOAT16, FLOAT32
from hostile import SHAPES, load_codes, widest
from plain_checkpoints import SINGLE, read_plain, save_family
from progress_told import Told
from safetensors.numpy import save_file

from rewarded_lines import merge
from rewarded_lines.errors import UserError
from rewarded_lines.merger.merge_device import faster_device
from rewarded_lines.merger.model_plan import ModelPlan

METHODS = {
    "soup": {},
    "task-arithmetic": {},
    "uniform": {},
    "slerp": {},
    "ties": {"density": 0.5},
    "dare": {"density": 0.4},
    "dare-ties": {"density": 0.6, "join": "sum"},
    "consensus": {"tall": 0.41234, "agree": 2},
    "sum": {},
    "ram": {"changed": 0.004},
    "ram-plus": {"changed": 0.004, "boost": 0.41234, "cap": 3.0},
    "sce": {"select": 0.4},
    "della": {"density": 0.6, "window": 0.4},
    "breadcrumbs": {"density": 0.5, "outliers": 0.1, "join": "mean"},
}
TYPES = {
    "bfloat16": (BFLOAT16,) * 4,
    "float16": (FLOAT16,) * 4,
    "float32": (FLOAT32,) * 4,
    "mixed": (FLOAT32, BFLOAT16, FLOAT16, FLOAT32),
}
# Every method in every type. Blocks are decoded before a method gets them: quick are one type, and one method in all.
PAIRS = [
    pytest.param(method, types, marks=() if types == "mixed" or method == "ties" else pytest.mark.slow)
    for method in METHODS
    for types in TYPES
]
ODD = {2: (0.37123, 0.62877), 3: (0.37123, 0.12979, 0.49898)}


def compare(method, formats, families, out, place):
    """Merge on the CPU and, in `place`, on a device, with endpoints among the outputs; compare every bit."""
    family = families(formats[: 3 if method == "slerp" else 4])
    count = len(family.policies)
    lam = None if method == "uniform" else [ODD[count], (1.0,) + (0.0,) * (count - 1)]
    common = {"method": method, "options": METHODS[method], "alpha": 0.45123, "beta": 1.09771, "allow_nonfinite": True}
    here = merge(family.base, family.policies, lam, out=out / "cpu", **common)
    with place as device:
        there = merge(family.base, family.policies, lam, out=out / "device", device=device, **common)
    kind = widest(family.formats)
    for one, other in zip(here, there, strict=True):
        (mine, kinds), (others, same) = load_codes(one.out), load_codes(other.out)
        assert kinds == same and set(kinds.values()) == {kind.name}
        for name in SHAPES:
            assert np.array_equal(mine[name], others[name]), name


@contextmanager
def device_without_gpu():
    """Let plans compute in the device workspace, with the CPU as its device."""
    from rewarded_lines.kernels.gpu_blocks import DeviceWorkspace

    with pytest.MonkeyPatch.context() as patch:
        made = []

        def workspace(plan):
            made.append(DeviceWorkspace(plan.base, plan._sources, "cpu"))
            return made[-1]

        patch.setattr(ModelPlan, "workspace", workspace)
        yield "cpu"
        assert made


@pytest.mark.parametrize(("method", "types"), PAIRS)
def test_the_devices_path_without_a_gpu(method, types, families, tmp_path, short_blocks):
    compare(method, TYPES[types], families, tmp_path, device_without_gpu())


@pytest.mark.gpu
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu(method, types, families, tmp_path, short_blocks):
    compare(method, TYPES[types], families, tmp_path, nullcontext("cuda"))


def test_a_result_that_is_not_finite_is_refused_there_too(families, tmp_path, short_blocks):
    family = families((FLOAT32,) * 3)
    with device_without_gpu(), pytest.raises(UserError, match="values are not finite in the result"):
        merge(family.base, family.policies, (0.3, 0.7), dtype="float16", out=tmp_path / "out")


def test_infinities_that_all_inputs_share_are_kept_there_too(tmp_path):
    place = save_family(tmp_path / "place")
    for name in ("sft", "first", "second"):
        tensors = {key: np.array(values) for key, (_, values) in read_plain(place / name).items()}
        tensors["model.norm.weight"][:2] = np.inf, -np.inf
        save_file(tensors, place / name / SINGLE, {"format": "pt"})
    with device_without_gpu():
        merge(place / "sft", [place / "first", place / "second"], out=tmp_path / "out", allow_nonfinite=True)
    merged = read_plain(tmp_path / "out")
    assert merged["model.norm.weight"][1][:2].tolist() == [np.inf, -np.inf]
    assert all(np.isfinite(values.flat[2:]).all() for _, values in merged.values())


@pytest.mark.parametrize(("device", "expected"), [("graphics", "not a device"), ("cuda", "no GPU that torch can use")])
def test_devices_that_are_not_there(device, expected, cli, families, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    family = families((FLOAT32,) * 3)
    policies = [part for path in family.policies.values() for part in ("--policy", path)]
    answer = cli("merge", "--base", family.base, *policies, "--device", device, "--out", tmp_path / "out")
    assert answer.code == 1 and expected in answer.err and not (tmp_path / "out").exists()


def test_the_faster_device_is_told(families, tmp_path, short_blocks):
    family, told = families((FLOAT32,) * 3, gentle=True), Told()
    for method in ("soup", "ties"):
        merge(family.base, family.policies, method=method, device="auto", out=tmp_path / method, progress=told)
    assert told.facts == [
        "--device auto: cpu, its compiled loops are as fast as the files",
        "--device auto: cpu, about 0.0 s of arithmetic, less than the start of a GPU",
    ]


def test_the_device_that_is_faster():
    for seconds, free, device, said in [
        (0.0, 80 << 30, "cpu", "as fast as the files"),
        (3.0, 80 << 30, "cpu", "less than the start of a GPU"),
        (40.0, 80 << 30, "cuda", "about 40 s"),
        (40.0, 1 << 30, "cpu", "the GPU has only 1.1 of 3.2 GB free"),
        (40.0, 0, "cpu", "no GPU that torch can use"),
    ]:
        chosen, why = faster_device(seconds, free)
        assert chosen == device and said in why


@pytest.mark.parametrize("place", [nullcontext, device_without_gpu])
def test_equal_policies_have_one_mask(tiny, place):
    shutil.copytree("first", "again")
    with place():
        for method in ("dare", "della"):
            for policies, lam in ((["first", "again"], 0.25), (["first"], 1)):
                merge("sft", policies, lam, method=method, out=f"{method}-{len(policies)}")
            one, two = (read_plain(tiny / f"{method}-{count}") for count in (1, 2))
            assert all(np.allclose(one[name][1], values, atol=1e-7) for name, (_, values) in two.items())
