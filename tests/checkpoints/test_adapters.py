"""Reading PEFT folders: scalings as PEFT computes them, every tensor accounted for, and what is refused."""

import json
import time

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from tiny_adapters import edit_settings, factors, load_adapter, save_adapter, settings_of
from transformers import AutoModelForCausalLM

from rewarded_lines import merge
from rewarded_lines.checkpoints.adapter_config import match_patterns
from rewarded_lines.checkpoints.adapters import Adapter, is_adapter
from rewarded_lines.errors import UserError

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def plain(tiny):
    return save_adapter(tiny / "sft", tiny / "plain", 1, target_modules=["q_proj", "up_proj"])


def rewrite(folder, change):
    values = factors(folder)
    change(values)
    save_file(values, folder / "adapter_model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_scalings_are_those_of_peft(tiny, rslora):
    patterns = {
        "rank_pattern": {"v_proj": 3, r"^model\.layers\.[01]\.mlp\.up_proj": 5, "layers.2.mlp.up_proj": 2},
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 3.5, r".*layers\.\d+\.self_attn\.(q|v)_proj": 9},
    }
    targets = ["q_proj", "v_proj", "up_proj", "embed_tokens"]
    folder = save_adapter(tiny / "sft", tiny / "a", 1, use_rslora=rslora, target_modules=targets, **patterns)
    adapter = Adapter(folder)
    theirs = {
        name.removeprefix("base_model.model."): layer
        for name, layer in load_adapter(tiny / "sft", folder).named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert set(adapter.modules) == set(theirs) and len(theirs) == 13
    for name, module in adapter.modules.items():
        layer = theirs[name]
        assert (module.rank, module.scaling) == (layer.r["default"], layer.scaling["default"]), name
        assert module.shape == tuple(layer.get_base_layer().weight.shape)
    assert set(adapter.copies) == {"model.embed_tokens.weight"} and not adapter.saved


def test_a_pattern_matches_whole_ends_of_names(tmp_path):
    names = ["model.layers.0.q_proj", "model.layers.10.q_proj", "model.xq_proj", "q_proj"]
    assert match_patterns({"q_proj": 2}, names, 8, tmp_path) == dict(zip(names, (2, 2, 8, 2), strict=True))
    assert match_patterns({"0.q_proj": 2}, names, 8, tmp_path) == dict(zip(names, (2, 8, 8, 8), strict=True))
    assert match_patterns({"^q_proj": 2, "q_proj": 3}, names, 8, tmp_path)["q_proj"] == 2


def test_every_tensor_is_accounted_for(plain):
    rewrite(plain, lambda values: values.update({"base_model.model.model.norm.weight": torch.ones(64)}))
    with pytest.raises(UserError, match="1 tensors that are not known"):
        Adapter(plain)
    edit_settings(plain, modules_to_save=["norm"])
    assert set(Adapter(plain).saved) == {"model.norm.weight"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda values: values.pop(f"{Q}.lora_A.weight"), "A or B is missing"),
        (lambda values: values.update({f"{Q}.lora_A.weight": torch.ones(3, 64)}), "B·A does not exist"),
        (lambda values: values.update({f"{Q}.lora_A.weight": torch.ones(4)}), "only matrices(?s:.)*merge_and_unload"),
        (lambda values: values.update({f"{Q}.lora_A.weight": torch.ones(4, 64, dtype=torch.int32)}), "floating-point"),
        (lambda values: values.update({f"{Q}.lora_embedding_A": torch.ones(4, 64)}), "two of them"),
        (lambda values: values.update({f"{Q}.lora_A.default.weight": torch.ones(4, 64)}), "not known here"),
        (lambda values: values.update({f"{Q}.lora_A.weight": torch.ones(0)}), "ZeRO-3 leaves tensors empty"),
        (lambda values: values.update({f"{Q}.lora_B.bias": torch.ones(64)}), "lora_bias"),
        (lambda values: values.update({f"{Q}.lora_magnitude_vector": torch.ones(64)}), "DoRA"),
        (lambda values: values.update({"q_proj.lora_A.weight": torch.ones(4, 64)}), "not known here"),
        (lambda values: values.clear(), "no LoRA tensors"),
    ],
)
def test_tensors_that_are_refused(plain, change, said):
    rewrite(plain, change)
    with pytest.raises(UserError, match=said):
        Adapter(plain)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "LOHA"}, "type 'LOHA'"),
        ({"peft_type": ["LORA"]}, "an adapter of type"),
        ({"peft_type": None}, "no adapter of PEFT(?s:.)*mlx_lm.fuse"),
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "repeats the base's blocks"),
        ({"target_parameters": "experts.down_proj"}, "not a value of `target_parameters`"),
        ({"trainable_token_indices": [-1]}, "not a value of `trainable_token_indices`"),
        ({"init_lora_weights": "pissa_niter_4"}, "PiSSA"),
        ({"init_lora_weights": "olora"}, "OLoRA"),
        ({"init_lora_weights": 1}, "PiSSA"),
        ({"a_new_setting": {"x": 1}}, "`a_new_setting` is not known"),
        ({"r": 0}, "not a value of `r`"),
        ({"lora_alpha": 0}, "lora_alpha is 0(?s:.)*what the training had"),
        ({"r": "8"}, "not a value of `r`"),
        ({"r": True}, "not a value of `r`"),
        ({"r": 5}, "rank 4, adapter_config.json says 5"),
        ({"lora_alpha": float("nan")}, "not a value of `lora_alpha`"),
        ({"lora_alpha": 10**400}, "not a value of `lora_alpha`"),
        ({"rank_pattern": []}, "not a value of `rank_pattern`"),
        ({"rank_pattern": {"q_proj": 1.5}}, "not a value of `rank_pattern: q_proj`"),
        ({"alpha_pattern": {"(q_proj": 1}}, "not a regular expression"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "too involved"),
        ({"alpha_pattern": {".*.*.*.*a": 1}}, "too involved"),
        ({"alpha_pattern": {"q" * 3000: 1}}, "too long"),
        ({"modules_to_save": "lm_head"}, "not a value of `modules_to_save`"),
        ({"modules_to_save": [""]}, "not a value of `modules_to_save`"),
        ({"bias": "some"}, "not a value of `bias`"),
        ({"use_rslora": "yes"}, "not a value of `use_rslora`"),
        ({"base_model_name_or_path": 3}, "not a value of `base_model_name_or_path`"),
    ],
)
def test_settings_that_are_refused(plain, settings, said):
    edit_settings(plain, **settings)
    with pytest.raises(UserError, match=said):
        Adapter(plain)


def test_all_that_is_wrong_with_the_settings_is_told_at_once(plain):
    edit_settings(plain, use_dora=True, r="x", bias="some", init_lora_weights="loftq")
    with pytest.raises(UserError) as caught:
        Adapter(plain)
    assert len(caught.value.problems) == 4


def test_a_pattern_can_not_stop_the_clock(plain):
    nasty = {f".*{'.' * index}.*.*x": 1 for index in range(40)}
    edit_settings(plain, alpha_pattern=nasty)
    began = time.monotonic()
    Adapter(plain)
    assert time.monotonic() - began < 5


def test_a_start_that_leaves_the_base_alone_is_fine(plain):
    for start in (True, False, "gaussian", "eva", "orthogonal", "mica", None):
        Adapter(edit_settings(plain, init_lora_weights=start))


def test_prompts_are_never_merged(plain):
    with pytest.raises(UserError, match="type 'PREFIX_TUNING'") as caught:
        Adapter(edit_settings(plain, peft_type="PREFIX_TUNING"))
    assert "merge_and_unload" not in str(caught.value)


def test_a_model_that_was_wrapped_twice(plain):
    names, values = set(Adapter(plain).modules), factors(plain)
    doubled = {f"base_model.model.{name}": value for name, value in values.items()}
    save_file(doubled, plain / "adapter_model.safetensors", {"format": "pt"})
    assert set(Adapter(plain).modules) == names


def test_a_folder_with_both_is_ambiguous(tiny, plain):
    assert is_adapter(plain) and not is_adapter(tiny / "sft")
    (plain / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="both an adapter and a whole model"):
        is_adapter(plain)


def test_shards_that_transformers_writes(tiny):
    """`save_pretrained` of transformers, not of PEFT: the index has the name of a whole model's."""
    model = AutoModelForCausalLM.from_pretrained("sft")
    model.add_adapter(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained("one")
    model.save_pretrained("many", max_shard_size="20KB")
    assert len(list((tiny / "many").glob("adapter_model-*"))) > 2
    for name in ("one", "many"):
        merge("sft", [name], 0.5, method="wise-ft", out=f"{name}-merged")
    merged = [(tiny / f"{name}-merged/adapter_model.safetensors").read_bytes() for name in ("one", "many")]
    assert merged[0] == merged[1]
    (tiny / "many/adapter_model-00002-of-00004.safetensors").unlink()
    with pytest.raises(UserError, match="shards of the adapter are missing"):
        Adapter(tiny / "many")


def test_added_tokens_in_a_file_of_their_own(plain):
    """Earlier versions of vLLM read them beside an adapter."""
    save_file({"input_embeddings": torch.ones(2, 64)}, plain / "new_embeddings.safetensors")
    with pytest.raises(UserError, match="rows for added tokens"):
        Adapter(plain)


def test_pickled_adapters_are_never_opened(plain):
    (plain / "adapter_model.safetensors").rename(plain / "adapter_model.bin")
    with pytest.raises(UserError, match="never opened") as caught:
        Adapter(plain)
    assert "AutoPeftModelForCausalLM" in str(caught.value)
    (plain / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match="no adapter weights there"):
        Adapter(plain)


def test_settings_that_are_no_object(plain):
    for text in ("", "[]", "{", '{"r": 1, "r": 2}', "\x00", json.dumps(settings_of(plain))[:-5]):
        (plain / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match="damaged"):
            Adapter(plain)
