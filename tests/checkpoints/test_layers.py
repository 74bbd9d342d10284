"""Depth of every tensor: anchored patterns, counts checked, unknown layouts refused with help."""

import pytest

from rewarded_lines.checkpoints.layers import find_depths
from rewarded_lines.errors import UserError


def test_expert_numbers_are_not_block_numbers():
    names = [f"model.layers.{block}.mlp.experts.7.w1.weight" for block in range(4)] + ["lm_head.weight"]
    depths = find_depths(names, {"num_hidden_layers": 4})
    assert depths.blocks == 4
    assert depths.block == {**{name: block for block, name in enumerate(names[:4])}, "lm_head.weight": None}


@pytest.mark.parametrize(
    ("prefix", "key"),
    [("transformer.h", "n_layer"), ("gpt_neox.layers", "num_hidden_layers"), ("model.decoder.layers", "num_layers")],
)
def test_families(prefix, key):
    names = [f"{prefix}.{block}.attn.weight" for block in range(2)] + ["wte.weight"]
    assert find_depths(names, {key: 2}).blocks == 2


def test_count_must_agree_with_the_config():
    with pytest.raises(UserError, match="config declares 3 blocks"):
        find_depths(["model.layers.0.w", "model.layers.1.w"], {"num_hidden_layers": 3})


def test_unknown_layout_and_the_way_out():
    names = ["decoder.blocks.0.w", "decoder.blocks.1.w"]
    with pytest.raises(UserError, match="--layers"):
        find_depths(names, {"model_type": "odd"})
    assert find_depths(names, {}, r"decoder\.blocks\.(\d+)\.").blocks == 2
    for pattern in (r"other\.(\d+)", r"decoder", r"(("):
        with pytest.raises(UserError):
            find_depths(names, {}, pattern)
