"""Adapters in memory: the bits that `merge --as adapter` writes, and the same refusals."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import save_adapter

from rewarded_lines import merge
from rewarded_lines.checkpoints.adapters import ADAPTER_FILE
from rewarded_lines.engines.adapter_folders import AdapterFolders
from rewarded_lines.engines.resident_adapters import ResidentAdapters
from rewarded_lines.engines.vllm_memory import beside_for_adapters
from rewarded_lines.errors import UserError
from rewarded_lines.merger.open_inputs import plan_adapters
from rewarded_lines.merger.spec import MergeSpec

# Soups, a policy that takes no rank, factors that are powers of two, the ends of plain soups.
SPECS = [
    MergeSpec((0.3, 0.7), 1.0, 0.5),
    MergeSpec((1.0, 0.0), 0.5, 1.0),
    MergeSpec((0.5, 0.5), 1.0, 0.0),
    MergeSpec((0.0, 1.0), 1.0, 0.0),
]
POLICIES = {"one": "one", "two": "two"}


@pytest.fixture
def save(tiny):
    def saved(*dtypes):
        save_adapter(tiny / "sft", tiny / "one", 1, dtype=dtypes[0], r=4, lora_alpha=8)
        patterns = {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"up_proj": 30}}
        targets = ["q_proj", "up_proj"]
        save_adapter(tiny / "sft", tiny / "two", 2, dtype=dtypes[-1], r=6, target_modules=targets, **patterns)
        return plan_adapters("sft", POLICIES)

    return saved


def same(found, expected):
    assert found.keys() == expected.keys() and found
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def check(plan, device):
    held, folders = ResidentAdapters(plan, device), AdapterFolders(plan)
    for spec, folder in zip(SPECS, folders.write(SPECS), strict=True):
        found = {name: tensor.cpu() for name, tensor in held.tensors(spec)}
        same(found, load_file(folder / ADAPTER_FILE))
    (result,) = merge("sft", POLICIES, (0.3, 0.7), alpha=1.0, beta=0.5, out="out")
    same({name: one.cpu() for name, one in held.tensors(SPECS[0])}, load_file(result.out / ADAPTER_FILE))
    # What waits is not what vLLM gets.
    for _, tensor in held.tensors(SPECS[3]):
        tensor.zero_()
    assert all(tensor.any() for _, tensor in held.tensors(SPECS[3]))


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtypes", [*[(kind,) for kind in FLOATS], FLOATS[:2]], ids=str)
def test_merged_adapters_have_the_bits_that_merge_writes(save, dtypes):
    check(save(*dtypes), "cpu")


@pytest.mark.gpu
def test_on_a_gpu(save):
    check(save(torch.bfloat16), "cuda")


def test_what_is_not_finite_is_refused_as_by_merge(save, tiny):
    plan = save(torch.float32)
    path = tiny / "two" / ADAPTER_FILE
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, path)
    plan = plan_adapters("sft", POLICIES)
    with pytest.raises(UserError, match="1 values are not finite in policy `two`") as found:
        ResidentAdapters(plan, "cpu")
    with pytest.raises(UserError) as written:
        AdapterFolders(plan).write(SPECS[:1])
    assert found.value.problems == written.value.problems
    plan = save(torch.float16)
    large = MergeSpec((9e9, 0.0), 1.0, 0.0)
    plan = plan_adapters("sft", POLICIES, dtype="float16")
    with pytest.raises(UserError, match="values are not finite in the result"):
        dict(ResidentAdapters(plan, "cpu").tensors(large))


def test_a_gpu_holds_adapters_if_a_tenth_of_it_has_room():
    for asked, inputs, beside in (("auto", 9, 9), ("gpu", 9, 9), ("auto", 11, 0), ("host", 1, 0), ("disk", 1, 0)):
        assert beside_for_adapters(asked, inputs, 100) == beside
    assert beside_for_adapters("gpu", 1, 0) == 0
