"""Both kinds of plans: `outputs` match the written files, and `input_files` are those that decide them."""

import pytest
from safetensors.torch import load_file
from tiny_adapters import save_adapter

from rewarded_lines.merger.open_inputs import plan_as
from rewarded_lines.merger.plan import Plan
from rewarded_lines.merger.spec import MergeSpec

SPEC = MergeSpec((0.3, 0.7), 0.5, 1.0)


@pytest.fixture(params=["full", "adapter"])
def plan(tiny, request) -> Plan:
    for seed, name in enumerate(("plain", "saved")):
        save_adapter(tiny / "sft", tiny / name, seed, **({"modules_to_save": ["norm"]} if name == "saved" else {}))
    return plan_as(request.param, "sft", {"plain": "plain", "saved": "saved"}, "soup")


def test_what_a_plan_announces_is_what_it_writes(plan, tmp_path):
    plan.prepare([SPEC])
    (tmp_path / "out").mkdir()
    plan.write([SPEC], [tmp_path / "out"], 10**9).refuse()
    (file,) = (tmp_path / "out").glob("*.safetensors")
    written = {name: (str(one.dtype), tuple(one.shape)) for name, one in load_file(file).items()}
    assert written == {info.name: (f"torch.{info.dtype.torch}", info.shape) for info in plan.outputs(SPEC)}
    settings = {"full": "config.json", "adapter": "adapter_config.json"}[plan.kind]
    assert (tmp_path / "out" / settings).is_file()
    ranks = [one.shape[0] for name, one in load_file(file).items() if "lora_A" in name]
    assert plan.rank(SPEC) == (max(ranks) if ranks else None)


def test_the_bases_weights_are_input_only_where_they_are_read(plan, tiny):
    base, policies = plan.input_files()
    assert plan.reads_base and {"config.json", "model.safetensors"} <= {file.name for file in base}
    # An adapter gets no tokenizer from its base.
    assert ("tokenizer.json" in {file.name for file in base}) == (plan.kind == "full")
    assert {file.name for file in policies["saved"]} == {"adapter_model.safetensors", "adapter_config.json"}
    alone = plan_as(plan.kind, "sft", {"plain": "plain"}, "soup")
    names = {file.name for file in alone.input_files()[0]}
    assert names == {"config.json"} if plan.kind == "adapter" else "model.safetensors" in names
    assert alone.reads_base == (plan.kind == "full")


def test_the_scale_of_a_tensor_is_that_of_its_block(plan):
    scales = plan.scales(SPEC)["model.layers"]
    assert scales == pytest.approx([0.5, 5 / 6, 7 / 6, 1.5])
    for block, scale in enumerate(scales):
        assert plan.scale(f"model.layers.{block}.self_attn.q_proj.weight", SPEC) == scale
