"""`inspect` against numpy, on checkpoints written by hand: every number is computed in a second way."""

import json
import math

import numpy as np
import pytest
import torch
from progress_told import Told
from safetensors.torch import save_file

from rewarded_lines import inspect, merge
from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.errors import UserError
from rewarded_lines.kernels.blocks import BLOCK
from rewarded_lines.merger.spec import MergeSpec

SHAPES = {
    "lm_head.weight": (30, 8),
    "model.embed_tokens.weight": (30, 8),
    "model.layers.0.mlp.up_proj.weight": (700, 800),
    "model.layers.1.mlp.up_proj.weight": (16, 8),
    "model.layers.1.norm.weight": (8,),
    "model.layers.2.mlp.up_proj.weight": (16, 8),
    "model.norm.weight": (8,),
}
CONFIG = {"model_type": "llama", "num_hidden_layers": 3}


def values(seed, dtype=torch.float32, size=1.0):
    rng = np.random.default_rng(seed)
    return {name: torch.from_numpy(rng.normal(0, size, shape)).to(dtype) for name, shape in SHAPES.items()}


def write(folder, tensors, config=CONFIG):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def pair(tmp_path):
    """A base and a policy near it; the first block and a few more values are equal."""
    base = values(0)
    policy = {name: tensor + 0.1 * values(1)[name] for name, tensor in base.items()}
    policy["model.layers.2.mlp.up_proj.weight"] = base["model.layers.2.mlp.up_proj.weight"].clone()
    policy["model.norm.weight"][:3] = base["model.norm.weight"][:3]
    return write(tmp_path / "base", base), write(tmp_path / "policy", policy), base, policy


def norm(*arrays):
    return math.sqrt(sum(float((array.double().numpy() ** 2).sum()) for array in arrays))


def test_every_tensor_against_numpy(pair):
    base_folder, policy_folder, base, policy = pair
    found = inspect(policy_folder, base_folder, alpha=0.5, beta=1.0)
    scales = {None: 0.5, 0: 0.5, 1: 1.0, 2: 1.5}
    assert sorted(one.name for one in found.tensors) == sorted(SHAPES)
    for one in found.tensors:
        difference = policy[one.name].double() - base[one.name].double()
        assert (one.shape, one.dtype, one.parameters) == (SHAPES[one.name], "float32", difference.numel())
        assert one.scale == scales[one.block]
        assert one.residual.norm == pytest.approx(norm(difference), rel=1e-14)
        assert one.residual.base_norm == pytest.approx(norm(base[one.name]), rel=1e-14)
        assert one.residual.scaled_norm == pytest.approx(scales[one.block] * norm(difference), rel=1e-14)
        assert (one.residual.changed, one.residual.values) == (int((difference != 0).sum()), difference.numel())


def test_levels_in_the_order_of_depth(pair):
    base_folder, policy_folder, base, policy = pair
    found = inspect(policy_folder, base_folder)
    before, first, second, third, after = found.levels
    assert [level.block for level in found.levels] == [None, 0, 1, 2, None]
    assert [level.scale for level in found.levels] == [1, 1, 1.5, 2, 1]
    assert before.modules == ("model.embed_tokens",) and set(after.modules) == {"lm_head", "model.norm"}
    names = ["model.layers.1.mlp.up_proj.weight", "model.layers.1.norm.weight"]
    assert (second.tensors, second.parameters, second.bytes) == (2, 16 * 8 + 8, 4 * (16 * 8 + 8))
    assert second.residual.norm == pytest.approx(norm(*(policy[n].double() - base[n].double() for n in names)))
    assert second.residual.base_norm == pytest.approx(norm(*(base[n] for n in names)))
    assert (third.residual.norm, third.residual.relative, third.residual.share_changed) == (0, 0, 0)
    assert after.residual.share_changed == (240 + 5) / 248


def test_the_total_is_that_of_all_tensors(pair):
    base_folder, policy_folder, base, policy = pair
    total = inspect(policy_folder, base_folder, alpha=2, beta=-2).total
    scales = dict(zip(SHAPES, (2, 2, 2, 1, 1, 0, 2), strict=True))
    differences = {name: policy[name].double() - base[name].double() for name in SHAPES}
    assert (total.tensors, total.parameters) == (7, sum(tensor.numel() for tensor in base.values()))
    assert total.residual.norm == pytest.approx(norm(*differences.values()), rel=1e-14)
    assert total.residual.relative == pytest.approx(norm(*differences.values()) / norm(*base.values()))
    assert total.residual.scaled_norm == pytest.approx(norm(*(scales[n] * differences[n] for n in SHAPES)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_are_widened_exactly(tmp_path, dtype):
    base, policy = values(0), {name: (tensor * 1.01).to(dtype) for name, tensor in values(0).items()}
    found = inspect(write(tmp_path / "policy", policy), write(tmp_path / "base", base))
    expected = norm(*(policy[name].double() - base[name].double() for name in SHAPES))
    assert found.total.residual.norm == pytest.approx(expected, rel=1e-14)
    assert found.total.dtypes == (str(dtype).removeprefix("torch."),)


def test_without_a_base_no_value_is_read(pair, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("values were read")

    monkeypatch.setattr(TensorFiles, "read_into", refuse)
    found = inspect(pair[1])
    assert found.base is None and found.total.residual is None and found.stacks == {"model.layers": 3}
    assert all(level.residual is None for level in found.levels)


def test_outside_the_blocks_by_depth(pair):
    found = inspect(pair[1], outside="depth", alpha=0.5, beta=0.25)
    assert [level.scale for level in found.levels] == [0.5, 0.5, 0.625, 0.75, 0.75]


def test_progress_tells_every_byte_once(pair):
    told = Told()
    inspect(pair[1], pair[0], progress=told)
    size = 4 * sum(math.prod(shape) for shape in SHAPES.values())
    assert sum(count for count, _ in told.finished) == size and told.totals == [size]
    assert told.steps == {"opening checkpoints": False, "reading blocks": True}
    # 560,000 values of a tensor take three blocks.
    assert len(told.finished) == sum(-(-math.prod(shape) // BLOCK) for shape in SHAPES.values()) > len(SHAPES)


def test_buffers_count_but_have_no_residual(tmp_path):
    extra = {"model.layers.0.position_ids": torch.arange(8)}
    folders = [write(tmp_path / name, values(0) | extra) for name in ("base", "policy")]
    found = inspect(folders[1], folders[0])
    buffer = next(one for one in found.tensors if one.dtype == "int64")
    assert buffer.residual is None and buffer.parameters == 8
    assert found.levels[1].dtypes == ("float32", "int64") and found.levels[1].residual.values == 560_000


def test_values_that_are_not_finite_are_counted_and_told(tmp_path):
    base, policy = values(0), values(0)
    base["model.norm.weight"][2] = math.nan
    policy["model.layers.1.norm.weight"][:2] = math.inf
    found = inspect(write(tmp_path / "policy", policy), write(tmp_path / "base", base))
    assert {one.name: one.residual.nonfinite for one in found.tensors if one.residual.nonfinite} == {
        "model.norm.weight": 1,
        "model.layers.1.norm.weight": 2,
    }
    assert [note for note in found.notes if "2 values of model.layers.1.norm.weight" in note]
    assert math.isfinite(found.levels[1].residual.norm)


@pytest.mark.filterwarnings("ignore:overflow")
def test_norms_too_large_for_a_float_are_infinite(tmp_path):
    base = values(0, torch.float64)
    policy = {name: torch.full_like(tensor, 1e200) for name, tensor in base.items()}
    for name in SHAPES:
        base[name].fill_(1e199)
    assert inspect(write(tmp_path / "policy", policy), write(tmp_path / "base", base)).total.residual.norm == math.inf


def test_a_base_of_zeros_has_no_relative_norm(tmp_path):
    base, policy = values(0), values(0)
    for tensor in (base["model.norm.weight"], base["lm_head.weight"], policy["lm_head.weight"]):
        tensor.zero_()
    found = inspect(write(tmp_path / "policy", policy), write(tmp_path / "base", base))
    residuals = {one.name: one.residual for one in found.tensors}
    assert residuals["model.norm.weight"].norm > 0 and residuals["model.norm.weight"].relative == math.inf
    assert residuals["lm_head.weight"].relative == 0


def test_a_merged_folder_says_what_made_it(tiny):
    merge("sft", ["first", "second"], 0.25, alpha=0.5, beta=0.75, method="ties", options={"density": 0.5}, out="merged")
    origin = inspect("merged").origin
    options = {"density": 0.5, "scope": "model", "join": "mean"}
    assert list(origin.policies) == ["first", "second"]
    assert origin.merge == MergeSpec((0.25, 0.75), 0.5, 0.75, "ties", options)
    assert inspect("first").origin is None


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"method": "soup", "weights": 3, "alpha": 1, "beta": 1}'])
def test_a_strange_merge_json_is_passed_over(tiny, content):
    (tiny / "first/merge.json").write_text(content)
    assert inspect("first").origin is None


def test_the_merge_is_the_base_and_its_scaled_residual(tiny):
    found = inspect("first", "sft", alpha=0.5, beta=1.5)
    merge("sft", ["first"], 1, alpha=0.5, beta=1.5, out="edited")
    edited = inspect("edited", "sft")
    for before, after in zip(found.levels, edited.levels, strict=True):
        assert after.residual.norm == pytest.approx(before.residual.scaled_norm, rel=1e-5)


def test_all_faults_of_a_wrong_base_are_told_together(tmp_path):
    other = values(1) | {"model.norm.weight": torch.ones(9)}
    del other["model.embed_tokens.weight"]
    base, policy = write(tmp_path / "base", other), write(tmp_path / "policy", values(0))
    with pytest.raises(UserError) as refused:
        inspect(policy, base)
    text = str(refused.value)
    assert "1 tensors are not in the base" in text and "(9,) in base, (8,) in policy" in text


def test_both_folders_are_named_when_neither_is_there(tmp_path):
    with pytest.raises(UserError) as refused:
        inspect(tmp_path / "one", tmp_path / "two")
    assert len(refused.value.problems) == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"alpha": math.nan, "beta": math.inf}, "--beta: not a finite number"),
        ({"alpha": "auto"}, "--alpha: not a finite number"),
        ({"outside": "beside"}, "--outside: unknown value"),
        ({"layers": r"blocks\.(\d+)"}, "matches no tensor"),
    ],
)
def test_options_are_checked(pair, options, expected):
    with pytest.raises(UserError, match=expected):
        inspect(pair[1], **options)


def test_a_pattern_names_the_blocks_of_an_unknown_layout(tmp_path):
    tensors = {f"net.stages.{index}.weight": torch.ones(4) for index in range(12)}
    folder = write(tmp_path / "odd", tensors | {"top.weight": torch.ones(2)}, {"model_type": "odd"})
    with pytest.raises(UserError, match="layout is not known"):
        inspect(folder)
    found = inspect(folder, layers=r"net\.stages\.(\d+)\.")
    # By number, not by name: 2 comes before 10.
    assert [level.block for level in found.levels] == [*range(12), None]
    assert found.levels[-1].side == "unknown" and found.levels[-1].modules == ("top",)


@pytest.fixture
def adapter(pair):
    """A LoRA adapter of rank 2 on the base: low rank in blocks 0 and 1, a norm saved whole."""
    folder = pair[0].parent / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["up_proj"], "modules_to_save": ["norm"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(pair[0])}))
    rng = np.random.default_rng(5)
    tensors = {"base_model.model.model.layers.1.norm.weight": pair[2]["model.layers.1.norm.weight"] + 0.5}
    for block, (rows, columns) in enumerate([(700, 800), (16, 8)]):
        module = f"base_model.model.model.layers.{block}.mlp.up_proj"
        tensors[f"{module}.lora_A.weight"] = torch.from_numpy(rng.normal(0, 0.1, (2, columns))).float()
        tensors[f"{module}.lora_B.weight"] = torch.from_numpy(rng.normal(0, 0.1, (rows, 2))).float()
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder, tensors


def test_an_adapter_over_its_base(pair, adapter):
    folder, tensors = adapter
    found = inspect(folder, pair[0], alpha=0.5)
    residuals = {one.name: one.residual for one in found.tensors}
    assert sorted(residuals) == sorted(SHAPES)
    for block in (0, 1):
        module = f"base_model.model.model.layers.{block}.mlp.up_proj"
        a, b = (tensors[f"{module}.lora_{factor}.weight"].double() for factor in "AB")
        residual = residuals[f"model.layers.{block}.mlp.up_proj.weight"]
        assert residual.norm == pytest.approx(norm(3.0 * (b @ a)), rel=1e-12)
        assert residual.scaled_norm == pytest.approx((0.5, 1.0)[block] * residual.norm)
    assert residuals["model.layers.1.norm.weight"].norm == pytest.approx(0.5 * math.sqrt(8), rel=1e-6)
    assert residuals["lm_head.weight"].norm == residuals["lm_head.weight"].changed == 0
    assert residuals["lm_head.weight"].base_norm == pytest.approx(norm(pair[2]["lm_head.weight"]))
    assert "an adapter: 2 matrices of low rank, 1 tensors whole; the rest is the base's" in found.notes


def test_an_adapter_without_its_base_is_refused_with_its_name(pair, adapter):
    with pytest.raises(UserError, match=f"pass --base {pair[0]}"):
        inspect(adapter[0])


def test_an_adapter_that_does_not_fit_its_base_is_refused(pair, adapter, tmp_path):
    tensors = dict(adapter[1])
    tensors["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = torch.ones(2, 8)
    tensors["base_model.model.model.layers.7.mlp.up_proj.lora_B.weight"] = torch.ones(16, 2)
    save_file(tensors, adapter[0] / "adapter_model.safetensors")
    with pytest.raises(UserError, match="model.layers.7.mlp.up_proj is not in the base"):
        inspect(adapter[0], pair[0])
