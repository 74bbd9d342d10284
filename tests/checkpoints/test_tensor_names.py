"""Names that mean one tensor, against what transformers itself makes of them."""

import warnings

import pytest

from rewarded_lines.checkpoints.dtypes import BF16, F32
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.tensor_names import (
    names_in,
    never_loaded,
    of_towers,
    same_modules,
    under_names_of,
    without_compilers,
)

LAYER = "model.layers.0.self_attn.q_proj.weight"


def infos(shapes, dtype=F32):
    """Return tensors of these shapes, one after another in a file."""
    start, found = 0, {}
    for name, shape in shapes.items():
        found[name] = TensorInfo(name, dtype, tuple(shape), start=start)
        start += found[name].bytes
    return found


@pytest.mark.parametrize(
    ("theirs", "mine"),
    [
        (LAYER, f"_orig_mod.{LAYER}"),
        (LAYER, f"module.policy.{LAYER}"),
        (LAYER, "model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.weight"),
        (LAYER, "model.language_model.layers.0.self_attn.q_proj.weight"),
        (LAYER, "language_model.model.layers.0.self_attn.q_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight"),
        ("encoder.layer.0.output.dense.weight", "bert.encoder.layer.0.output.dense.weight"),
        ("visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv.weight"),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias", "model.vision_tower.encoder.layers.0.mlp.fc1.bias"),
        ("model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.router.weight"),
        ("bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
    ],
)
def test_two_names_of_one_tensor(theirs, mine):
    for base, other in ((theirs, mine), (mine, theirs)):
        (found,) = under_names_of(infos({base: (3, 2)}), infos({other: (3, 2)})).values()
        assert (found.name, found.shape) == (base, (3, 2))
        assert names_in([base], [other]) == {other: base}


def test_names_that_could_mean_two_tensors_stay():
    base = infos({"model.norm.weight": (3,), "language_model.norm.weight": (3,)})
    mine = infos({"module.norm.weight": (3,)})
    assert set(under_names_of(base, mine)) == {"module.norm.weight"}
    assert names_in(base, mine) == {}
    assert under_names_of(base, base) == base


def test_experts_one_by_one_and_all_in_one():
    apart = infos({f"model.layers.0.mlp.experts.{e}.{p}_proj.weight": (2, 3) for e in range(4) for p in ("gate", "up")})
    fused = infos({"other": (5,), "model.layers.0.mlp.experts.gate_up_proj": (4, 4, 3)})
    joined = under_names_of(fused, apart)["model.layers.0.mlp.experts.gate_up_proj"]
    assert [piece.name for piece in joined.pieces] == list(apart) and joined.shape == (4, 4, 3)
    cut = under_names_of(apart, fused)
    assert [cut[name].start for name in apart] == [5 * 4 + number * 24 for number in range(8)]
    assert {cut[name].shape for name in apart} == {(2, 3)}


@pytest.mark.parametrize(
    "shapes",
    [
        {"model.layers.0.mlp.experts.gate_up_proj": (4, 3, 4)},
        {"model.layers.0.mlp.experts.gate_up_proj": (5, 4, 3)},
        {"model.layers.0.mlp.experts.gate_up_proj": (4, 6, 3)},
        *({"model.layers.0.mlp.experts.gate_up_proj": shape} for shape in ((), (4,), (0, 4, 3), (2**40, 4, 0))),
    ],
)
def test_experts_of_other_shapes_stay(shapes):
    apart = infos({f"model.layers.0.mlp.experts.{e}.{p}_proj.weight": (2, 3) for e in range(4) for p in ("gate", "up")})
    assert under_names_of(infos(shapes), apart) == apart
    mixed = {**apart, LAYER: TensorInfo(LAYER, BF16, (2, 3))}
    assert LAYER in under_names_of(infos({"model.layers.0.mlp.experts.gate_up_proj": (4, 4, 3)}), mixed)


def test_what_transformers_never_loads():
    names = ["mtp.fc.weight", "model.mtp.layers.0.norm.weight", LAYER, "model.layers.3.eh_proj.weight"]
    names += ["model.layers.3.mlp.up_proj.weight", "model.layers.4.mlp.up_proj.weight", "lm_head.weight"]
    found = never_loaded(names, {"num_hidden_layers": 3})
    assert found == {*names[:2], "model.layers.3.eh_proj.weight", "model.layers.3.mlp.up_proj.weight"}
    more = never_loaded(names, {"text_config": {"num_hidden_layers": 3, "num_nextn_predict_layers": 2}})
    assert more == found | {"model.layers.4.mlp.up_proj.weight"}
    # The decoder of an encoder-decoder may have more blocks than the encoder.
    assert not never_loaded(["model.decoder.layers.5.fc1.weight"], {"num_hidden_layers": 3})
    shared = [f"model.language_model.layers.{block}.self_attn.k_proj.weight" for block in range(4)]
    assert never_loaded(shared, {"text_config": {"num_hidden_layers": 4, "num_kv_shared_layers": 2}}) == {*shared[2:]}


def test_towers():
    towers = ["model.visual.merger.weight", "vision_tower.x.weight", "model.multi_modal_projector.weight"]
    assert of_towers([*towers, LAYER, "lm_head.weight", "model.embed_tokens.weight"]) == {*towers}


def test_modules_of_two_adapters():
    first, second = ["model.layers.0.q_proj"], ["layers.0.q_proj", "layers.1.q_proj"]
    assert same_modules([first, second])[1] == {"layers.0.q_proj": first[0], "layers.1.q_proj": "layers.1.q_proj"}
    assert without_compilers("model._orig_mod.layers.0.module.x") == "model.layers.0.module.x"


# ---- against transformers -------------------------------------------------------------------------------------------

# Their conversions transpose, interleave or permute, or have words of their own: names of memory are refused.
REFUSED = {
    *("Cosmos3EdgeForConditionalGeneration", "Cosmos3OmniForConditionalGeneration", "PI0ForConditionalGeneration"),
    "Ernie4_5_VLMoeForConditionalGeneration",
    *("Kimi_K25ForConditionalGeneration", "NemotronH_Omni_Reasoning_V3", "Step3p7ForConditionalGeneration"),
    *("InklingForConditionalGeneration", "InklingForCausalLM"),
}
COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers", "depth")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def small(config, level=0):
    """Give a config, and those inside, two blocks and four experts."""
    for key, most in (*((key, 2) for key in COUNTS), *((key, 4) for key in EXPERTS)):
        if isinstance(getattr(config, key, None), int) and getattr(config, key) > most:
            setattr(config, key, most)
    for key, value in list(vars(config).items()):
        if key in ("layer_types", "mlp_layer_types", "layers_block_type") and isinstance(value, list):
            setattr(config, key, value[:2])
        elif hasattr(value, "to_dict") and level < 3:
            small(value, level + 1)
    return config


def classes():
    """Return every class of transformers that predicts tokens from text, or from text and images."""
    from transformers.models.auto import modeling_auto

    tables = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")
    return {name: kind for table in tables for kind, name in getattr(modeling_auto, table).items() if name.isascii()}


def tensors_of(name, kind):
    """Return the tensors of a class as it has them in memory and as it saves them, without values."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with torch.device("meta"):
        model = getattr(transformers, name)(small(CONFIG_MAPPING[kind]()))
    state = dict(model.state_dict())
    return state, revert_weight_conversion(model, state)


@pytest.mark.slow
def test_every_class_of_transformers():
    """Its names in memory and in a file are one tensor's, both ways, where its file has another name for it."""
    built, renamed, wrong = 0, 0, {}
    for name, kind in classes().items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                memory, file = tensors_of(name, kind)
        except Exception:  # noqa: BLE001 - a default config that cannot be built is no matter of names
            continue
        built += 1
        if set(memory) == set(file):
            continue
        renamed += 1
        mine, theirs = (infos({key: value.shape for key, value in state.items()}) for state in (memory, file))
        own = {id(value): key for key, value in memory.items()}
        places = {info.start: key for key, info in mine.items()}
        found = under_names_of(theirs, mine)
        held = {key: own[id(value)] for key, value in file.items() if id(value) in own}
        moved = [key for key, name in held.items() if key not in found or places[found[key].start] != name]
        if name in REFUSED:
            assert set(found) != set(theirs), name
        elif moved or set(found) != set(theirs) or set(under_names_of(mine, theirs)) != set(mine):
            wrong[name] = [*moved, *(key for key in found if key not in theirs)][:3]
    assert not wrong
    assert built >= 150 and renamed >= 50
