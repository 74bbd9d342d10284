"""Place of every tensor: each family's block lists, counts checked, sides as the model runs, the unknown refused."""

import functools
import json
import re

import pytest
from architectures import ARCHITECTURES, BASES, CAUSAL, ENCODERS, REWARDS
from hypothesis import given
from hypothesis import strategies as st

from rewarded_lines.checkpoints.families import BLOCK_LISTS
from rewarded_lines.checkpoints.tensor_depth import Depths, Place, find_depths
from rewarded_lines.errors import UserError

STACKS = {
    **dict.fromkeys(CAUSAL, {"model.layers": 3}),
    **dict.fromkeys(["gpt2", "gpt2-reward", "gpt2-tokens"], {"transformer.h": 3}),
    **dict.fromkeys(["falcon", "falcon-new", "falcon-reward"], {"transformer.h": 3}),
    **dict.fromkeys(["gpt-neox", "gpt-neox-reward"], {"gpt_neox.layers": 3}),
    **dict.fromkeys(["opt", "opt-projected", "opt-reward"], {"model.decoder.layers": 3}),
    **dict.fromkeys(["llama-base", "qwen2-base", "mixtral-base", "phi-base", "gpt-neox-base"], {"layers": 3}),
    **dict.fromkeys(["gpt2-base", "falcon-base"], {"h": 3}),
    "opt-base": {"decoder.layers": 3},
    "llama-reward": {"model.layers": 3},
    "llama-answers": {"transformer.layers": 3},
    **dict.fromkeys(["t5", "t5-gated", "t5-base", "mt5"], {"encoder.block": 3, "decoder.block": 2}),
    "t5-encoder": {"encoder.block": 3},
    "t5-reward": {"transformer.encoder.block": 3, "transformer.decoder.block": 2},
    "t5-tokens": {"transformer.encoder.block": 3},
    **dict.fromkeys(["bart", "bart-reward"], {"model.encoder.layers": 3, "model.decoder.layers": 2}),
    "bart-decoder": {"model.decoder.layers": 2},
    "bart-base": {"encoder.layers": 3, "decoder.layers": 2},
    **dict.fromkeys(["bert", "bert-masked"], {"bert.encoder.layer": 3}),
    "bert-base": {"encoder.layer": 3},
    **dict.fromkeys(["roberta", "roberta-masked"], {"roberta.encoder.layer": 3}),
    "electra": {"electra.encoder.layer": 3},
    "distilbert": {"distilbert.transformer.layer": 3},
    "vit": {"vit.encoder.layer": 2},
    "vit-base": {"encoder.layer": 2},
    **dict.fromkeys(["clip", "siglip"], {"text_model.encoder.layers": 3, "vision_model.encoder.layers": 2}),
    "clip-classifier": {"vision_model.encoder.layers": 2},
    "clip-text": {"encoder.layers": 3},
    "clip-text-projected": {"text_model.encoder.layers": 3},
    "clip-vision": {"encoder.layers": 2},
    "clip-vision-projected": {"vision_model.encoder.layers": 2},
    **dict.fromkeys(["llava", "gemma3-images"], {"vision_tower.encoder.layers": 2, "language_model.model.layers": 3}),
    "qwen2-vl": {"visual.blocks": 2, "model.layers": 3},
    "qwen3-vl": {"model.visual.blocks": 2, "model.language_model.layers": 3},
}
# Tensors of the models that the test of the order of execution does not run.
OUTSIDE = [
    ("t5", "shared.weight", "encoder.block", "before"),
    ("t5", "encoder.final_layer_norm.weight", "encoder.block", "after"),
    ("t5", "decoder.final_layer_norm.weight", "decoder.block", "after"),
    ("t5-reward", "classification_head.dense.weight", "transformer.decoder.block", "after"),
    ("t5-tokens", "classifier.weight", "transformer.encoder.block", "after"),
    ("bart", "model.shared.weight", "model.encoder.layers", "before"),
    ("bart", "model.decoder.embed_positions.weight", "model.decoder.layers", "before"),
    ("bart", "final_logits_bias", "model.decoder.layers", "after"),
    ("vit", "vit.embeddings.cls_token", "vit.encoder.layer", "before"),
    ("vit", "vit.layernorm.weight", "vit.encoder.layer", "after"),
    ("vit-base", "pooler.dense.weight", "encoder.layer", "after"),
    ("clip", "vision_model.pre_layrnorm.weight", "vision_model.encoder.layers", "before"),
    ("clip", "vision_model.embeddings.class_embedding", "vision_model.encoder.layers", "before"),
    ("clip", "text_projection.weight", "text_model.encoder.layers", "after"),
    ("clip", "visual_projection.weight", "vision_model.encoder.layers", "after"),
    ("clip", "logit_scale", "vision_model.encoder.layers", "after"),
    ("clip-text", "final_layer_norm.weight", "encoder.layers", "after"),
    ("clip-vision", "post_layernorm.weight", "encoder.layers", "after"),
    ("llava", "multi_modal_projector.linear_1.weight", "vision_tower.encoder.layers", "after"),
    ("llava", "language_model.model.embed_tokens.weight", "language_model.model.layers", "before"),
    ("llava", "language_model.lm_head.weight", "language_model.model.layers", "after"),
    ("qwen2-vl", "visual.merger.mlp.2.weight", "visual.blocks", "after"),
    ("qwen2-vl", "visual.patch_embed.proj.weight", "visual.blocks", "before"),
    ("qwen3-vl", "lm_head.weight", "model.language_model.layers", "after"),
]


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Tensor names and config of an architecture, as transformers' own class writes them; each is written once."""
    from safetensors import safe_open

    @functools.cache
    def save(name):
        folder = tmp_path_factory.mktemp(name)
        ARCHITECTURES[name]().save_pretrained(folder)
        with safe_open(folder / "model.safetensors", framework="np") as file:
            names = list(file.keys())
        return names, json.loads((folder / "config.json").read_text())

    return save


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_of_every_architecture_has_its_place(name, saved):
    names, config = saved(name)
    depths = find_depths(names, config)
    assert list(depths.stacks.items()) == list(STACKS[name].items())
    assert list(depths.place) == names
    for tensor, place in depths.place.items():
        inside = [(s, re.match(rf"{re.escape(s)}\.([0-9]+)\.", tensor)) for s in STACKS[name]]
        for stack, match in [(stack, match) for stack, match in inside if match]:
            assert place == Place(stack, int(match[1]), STACKS[name][stack], "in"), tensor
        if not any(match for _, match in inside):
            assert (place.block, place.blocks) == (None, STACKS[name][place.stack])
            assert place.side in ("before", "after"), tensor
    for stack, count in STACKS[name].items():
        found = {place.block for place in depths.place.values() if place.stack == stack and place.side == "in"}
        assert found == set(range(count))


@pytest.mark.parametrize("name", [*CAUSAL, *BASES, *REWARDS, *ENCODERS])
def test_sides_are_the_order_in_which_the_model_runs(name, saved):
    import torch

    model = ARCHITECTURES[name]()
    depths = find_depths(*saved(name))
    order = []
    for module_name, module in model.named_modules():
        module.register_forward_hook(lambda *_, module_name=module_name: order.append(module_name))
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 2]]))
    first = order.index(next(iter(depths.stacks)) + ".0")
    for tensor, place in depths.place.items():
        if place.side != "in":
            # GPT-NeoX's head has another name in files than in memory.
            module = tensor.rpartition(".")[0].replace("embed_out", "lm_head")
            assert place.side == ("before" if order.index(module) < first else "after"), tensor


@pytest.mark.parametrize(("name", "tensor", "stack", "side"), OUTSIDE)
def test_sides_of_the_other_architectures(name, tensor, stack, side, saved):
    assert find_depths(*saved(name)).place[tensor] == Place(stack, None, STACKS[name][stack], side)


@pytest.mark.parametrize(
    ("names", "config", "stacks"),
    [
        (
            [
                "lm_head.weight",
                "shared.weight",
                "encoder.embed_tokens.weight",
                "encoder.block.0.w",
                "decoder.block.0.w",
            ],
            {"num_layers": 1, "num_decoder_layers": None},
            {"encoder.block": 1, "decoder.block": 1},
        ),
        (
            [
                *("vision_tower.vision_model.encoder.layers.0.w", "vision_tower.vision_model.pre_layrnorm.bias"),
                *("multi_modal_projector.linear_1.bias", "language_model.model.layers.0.w"),
            ],
            {"text_config": {"model_type": "llama"}, "vision_config": {"num_hidden_layers": 1}},
            {"vision_tower.vision_model.encoder.layers": 1, "language_model.model.layers": 1},
        ),
        (
            ["model.vision_tower.vision_model.encoder.layers.0.w", "model.language_model.layers.0.w", "lm_head.weight"],
            {"text_config": {"num_hidden_layers": 1}, "vision_config": {"num_hidden_layers": 1}},
            {"model.vision_tower.vision_model.encoder.layers": 1, "model.language_model.layers": 1},
        ),
        (
            ["visual.blocks.0.w", "model.layers.0.w", "model.layers.1.w"],
            {"num_hidden_layers": 2, "vision_config": {"depth": 1}},
            {"visual.blocks": 1, "model.layers": 2},
        ),
    ],
    ids=["t5", "llava", "gemma3-images", "qwen2-vl"],
)
def test_names_and_configs_of_older_checkpoints(names, config, stacks):
    depths = find_depths(names, config)
    assert depths.stacks == stacks
    assert all(place.side != "unknown" for place in depths.place.values())


def test_expert_numbers_are_not_block_numbers():
    names = [f"model.layers.{block}.mlp.experts.7.w1.weight" for block in range(4)] + ["lm_head.weight"]
    depths = find_depths(names, {"num_hidden_layers": 4})
    assert depths.stacks == {"model.layers": 4}
    assert [depths.place[name].block for name in names] == [0, 1, 2, 3, None]


def test_no_path_stands_twice_in_the_table():
    paths = [blocks.path for blocks in BLOCK_LISTS]
    assert len(set(paths)) == len(paths)


def test_a_head_without_embeddings_is_the_tied_embedding():
    names = ["model.layers.0.w", "lm_head.weight"]
    assert find_depths(names, {}).place["lm_head.weight"].side == "before"
    assert find_depths([*names, "model.embed_tokens.weight"], {}).place["lm_head.weight"].side == "after"


def test_outside_the_blocks_no_side_is_guessed():
    names = ["encoder.block.0.w", "decoder.block.0.w", "decoder.normal.weight", "lm_header.weight", ""]
    place = find_depths(names, {}).place
    assert place["decoder.normal.weight"] == Place("decoder.block", None, 1, "unknown")
    assert place["lm_header.weight"] == place[""] == Place("encoder.block", None, 1, "unknown")


def test_count_must_agree_with_the_config():
    names = ["model.layers.0.w", "model.layers.1.w"]
    for count in (1, 3, 10**12):
        with pytest.raises(UserError, match=f"config declares {count} blocks"):
            find_depths(names, {"num_hidden_layers": count})
    with pytest.raises(UserError, match="blocks are missing"):
        find_depths(["model.layers.0.w", "model.layers.2.w"], {})
    with pytest.raises(UserError, match="encoder.block: .*(?s:.)*decoder.block: "):
        find_depths(["encoder.block.0.w", "decoder.block.0.w"], {"num_layers": 2, "num_decoder_layers": 3})


@pytest.mark.parametrize("count", [True, False, 0, -2, "2", 2.0, [2], {}, float("nan")])
def test_a_count_that_is_none_is_refused(count):
    with pytest.raises(UserError, match="not a positive whole number"):
        find_depths(["model.layers.0.w", "model.layers.1.w"], {"num_hidden_layers": count})


@pytest.mark.parametrize("index", ["9" * 20, "1" * 5000, "٣", "norm", "", "-1", "1e3"])
def test_an_index_that_is_not_a_number_is_refused(index):
    for pattern in (None, r"model\.layers\.([^.]*)\."):
        with pytest.raises(UserError, match="number of the block") as caught:
            find_depths(["model.layers.0.w", f"model.layers.{index}.w"], {}, pattern)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("further", [1, 2])
def test_modules_that_only_predict_further_tokens_come_after_the_blocks(further):
    """DeepSeek-V3 and GLM-4.5 number them after the last block."""
    names = [f"model.layers.{block}.mlp.up_proj.weight" for block in range(4 + further)] + ["lm_head.weight"]
    config = {"num_hidden_layers": 4, "num_nextn_predict_layers": further}
    depths = find_depths(names, config)
    assert depths.stacks == {"model.layers": 4}
    assert [depths.place[name].block for name in names] == [0, 1, 2, 3, *[None] * further, None]
    assert {depths.place[name].side for name in names[4:-1]} == {"after"}
    # Policies without them are as deep.
    assert find_depths(names[:4], config).place[names[3]] == Place("model.layers", 3, 4, "in")
    with pytest.raises(UserError, match="config declares 4 blocks"):
        find_depths(names[:3], config)


def test_a_number_in_the_config_is_that_of_the_list_with_its_words():
    config = {
        **{"num_hidden_layers": 3, "decoder_layers": 2, "vision_layers": 4, "audio_config": {"encoder_layers": 6}},
        **{"vision_config": {"num_hidden_layers": 4, "num_global_layers": 1}, "max_window_layers": 9},
        "thinker_config": {"text_config": {"layer_types": ["full"] * 7}},
    }
    counts = {"layers": 3, "model.decoder.layers": 2, "eye.visual.blocks": 4, "vision.global_trunk.layers": 1}
    counts |= {"sound_tower.layers": 6, "thinker.model.layers": 7}
    names = [f"{path}.{index}.fc.weight" for path, count in counts.items() for index in range(count)]
    assert dict(find_depths(names, config).stacks) == counts
    for path, count in counts.items():
        if count > 1:
            with pytest.raises(UserError, match=f"{re.escape(path)}: "):
                find_depths([name for name in names if not name.startswith(f"{path}.{count - 1}.")], config)


def test_modules_with_numbers_that_are_no_blocks():
    names = [f"model.layers.{block}.mlp.experts.{expert}.up.weight" for block in range(3) for expert in range(4)]
    beside = [f"{path}.{index}.{end}" for index in range(3) for path, end in (
        ("model.feature_extractor.conv_layers", "conv.weight"), ("model.visual.deepstack_merger_list", "norm.weight"),
        ("lm_heads", "weight"), ("connector.layers", "weight"), ("codec.quantizer.layers", "codebook.embed"),
    )]  # fmt: skip
    steps = [
        "codec.encoder.layers.0.conv.weight",
        "codec.encoder.layers.1.block.1.conv.weight",
        "mtp.layers.0.fc.weight",
    ]
    depths = find_depths([*names, *beside, *steps, "codec.encoder.layers.3.down.weight"], {"num_hidden_layers": 3})
    assert depths.stacks == {"model.layers": 3}
    assert all(depths.place[name].block is None for name in [*beside, *steps])


def test_unknown_layout_and_the_way_out():
    names = ["embed.weight", "decoder.blocks.0.w", "decoder.blocks.1.w"]
    pattern = r"decoder\.blocks\.(\d+)\."
    with pytest.raises(UserError, match="layout is not known(?s:.)*decoder.blocks.0.w(?s:.)*--layers"):
        find_depths(names, {"model_type": "odd"})
    depths = find_depths(names, {}, pattern)
    assert depths.stacks == {"decoder.blocks": 2}
    assert depths.place["decoder.blocks.1.w"] == Place("decoder.blocks", 1, 2, "in")
    assert depths.place["embed.weight"] == Place("decoder.blocks", None, 2, "unknown")
    with pytest.raises(UserError, match="config declares 3 blocks"):
        find_depths(names, {"n_layer": 3}, pattern)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"other\.(\d+)", "matches no tensor"),
        (r"decoder", "has no group"),
        ("", "has no group"),
        ("((", "not a regular expression"),
        (f"(a){{{10**30}}}", "not a regular expression"),
        ("(" * 5000 + ")" * 5000, "not a regular expression"),
        (r"(\d+)?", "matches no tensor"),
    ],
)
def test_bad_patterns(pattern, message):
    with pytest.raises(UserError, match=message):
        find_depths(["decoder.blocks.0.w"], {}, pattern)


def test_numbers_behind_underscores_are_not_flat_in_silence():
    names = [f"model.layers.{index}.mlp.w" for index in range(3)]
    tower = [f"model.visual.layers.{kind}_{index}.weight" for kind in ("linear", "norm") for index in range(4)]
    config = {"num_hidden_layers": 3, "vision_config": {"n_layers": 4}}
    with pytest.raises(UserError, match="may be blocks or not") as refused:
        find_depths([*names, *tower], config)
    assert refused.value.problems[0].remedy == "pass --tower model.visual.layers=flat"
    depths = find_depths([*names, *tower], config, None, "model.visual.layers=flat")
    assert {depths.place[name].side for name in tower} == {"flat"} and depths.stacks == {"model.layers": 3}
    # Two layers of a projector are no list of four blocks.
    assert find_depths([*names, *tower[:2]], config).stacks == {"model.layers": 3}


ODD = st.text(max_size=8) | st.sampled_from(["0", "1", "07", "٣", "9" * 30, "norm", "weight", "\n", "\ud800"])
NAMES = st.builds(
    lambda path, parts: ".".join([path, *parts]),
    st.sampled_from([blocks.path for blocks in BLOCK_LISTS]) | ODD,
    st.lists(ODD, max_size=4),
)
VALUES = st.none() | st.booleans() | st.integers(-2, 3) | st.just(10**12) | st.text(max_size=3) | st.floats()
KEYS = st.sampled_from(["num_hidden_layers", "num_layers", "depth", "decoder_layers", "text_config", "model_type"])


@given(st.lists(NAMES, max_size=6), st.dictionaries(KEYS, VALUES | st.dictionaries(KEYS, VALUES, max_size=2)))
def test_whatever_a_file_holds_the_answer_is_places_or_an_error_for_the_user(names, config):
    try:
        depths = find_depths(names, config)
    except UserError as error:
        assert len(str(error)) < 10_000
    else:
        assert isinstance(depths, Depths) and set(depths.place) == set(names)
        assert all(0 <= place.block < place.blocks for place in depths.place.values() if place.block is not None)
