"""Checkpoints that do not match exactly: tensors left out with a note, faults refused with a remedy."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from hostile import BLOCKS, CONFIG, save_tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import make_model, perturb, save_model, snapshot
from transformers import AutoModelForCausalLM

from rewarded_lines import merge
from rewarded_lines.errors import UserError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = {**CONFIG, "tie_word_embeddings": True}


def tensors(seed=0, step=0.0, head=None):
    """Return tensors like Llama's, `step` away from those of the seed; without `head` embeddings are shared."""
    first, second = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1 + int(1000 * step))

    def one(*shape):
        return torch.randn(shape, generator=first) + step * torch.randn(shape, generator=second)

    blocks = {f"model.layers.{block}.mlp.up_proj.weight": one(6, 4) for block in range(BLOCKS)}
    found = {EMBEDDING: one(40, 4), **blocks, "model.norm.weight": one(4)}
    return found if head is None else {**found, HEAD: found[EMBEDDING].clone() if head == "copy" else one(40, 4)}


def family(folder, base, first, second, config=CONFIG):
    """Save three sets of tensors, or take existing folders, as base and policies."""
    for name, content in (("base", base), ("first", first), ("second", second)):
        save_tensors(folder / name, content, config)
    return folder / "base", {"first": folder / "first", "second": folder / "second"}


def merged(folder, inputs, **more):
    (result,) = merge(*inputs, 0.3, alpha=0.5, out=folder / "out", **more)
    return load_file(folder / "out/model.safetensors"), result


def refused(folder, inputs, **more):
    """Return the message of a refused merge, which writes nothing."""
    before = snapshot(folder)
    with pytest.raises(UserError) as caught:
        merge(*inputs, 0.3, out=folder / "out", **more)
    assert {name: what for name, what in snapshot(folder).items() if not name.endswith(".lock")} == before
    return str(caught.value)


# ---- tied embeddings --------------------------------------------------------------------------------------------


def names_in(folder):
    with safe_open(folder / "model.safetensors", framework="np") as file:
        return list(file.keys())


def resave(folder, change):
    """Rewrite a checkpoint's tensors."""
    content = change(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})


def with_copy(content):
    return {**content, HEAD: content[EMBEDDING].clone()}


def head_only(content):
    return {HEAD if name == EMBEDDING else name: value for name, value in content.items()}


@pytest.mark.parametrize("copies", ["", "first", "base", "base first", "base first second"])
def test_tied_embeddings_stay_one_tensor(copies, tiny):
    """For any inputs with the second copy; lm_head is first in files, but the embeddings are kept."""
    for name in copies.split():
        resave(tiny / name.replace("base", "sft"), with_copy)
    (result,) = merge("sft", ["first", "second"], 0.3, alpha=0.5, out="out")
    assert EMBEDDING in names_in(tiny / "out") and HEAD not in names_in(tiny / "out")
    assert list(result.notes) == ([f"left out: {HEAD}, tied to {EMBEDDING}"] if copies else [])
    model, info = AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not any(info.values()), info
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plain = tiny.parent / "plain"
    save_model(make_model(0), plain / "sft")
    for seed, name in enumerate(("first", "second"), start=1):
        save_model(perturb(make_model(0), seed), plain / name)
    merge(plain / "sft", [plain / "first", plain / "second"], 0.3, alpha=0.5, out=plain / "out")
    expected, found = (load_file(folder / "out/model.safetensors") for folder in (plain, tiny))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_config_that_does_not_say_is_tied_as_transformers_has_it(tmp_path):
    config = {key: value for key, value in CONFIG.items() if key != "tie_word_embeddings"}
    inputs = family(tmp_path, *(tensors(0, step, "copy") for step in (0, 0.1, 0.2)), config)
    out, _ = merged(tmp_path, inputs, outside="depth")
    assert HEAD not in out and EMBEDDING in out


def test_an_untied_model_stays_untied(tmp_path):
    """Although head and embeddings are equal in the base, and in some of the others."""
    for index, heads in enumerate((("copy", "own", "own"), ("copy", "copy", "own"), ("copy", "copy", "copy"))):
        folder = tmp_path / str(index)
        inputs = family(folder, *(tensors(0, step, head) for step, head in zip((0, 0.1, 0.2), heads, strict=True)))
        out, result = merged(folder, inputs)
        assert {HEAD, EMBEDDING} <= out.keys() and not result.notes
        assert torch.equal(out[HEAD], out[EMBEDDING]) == (heads[2] == "copy")


def test_heads_that_differ_are_kept_whatever_the_config_says(tmp_path):
    inputs = family(tmp_path, *(tensors(0, step, "own") for step in (0, 0.1, 0.2)), TIED)
    out, _ = merged(tmp_path, inputs)
    assert {HEAD, EMBEDDING} <= out.keys()


@pytest.mark.parametrize("base", [None, "copy"])
def test_a_head_of_its_own_in_one_policy_unties_the_output(base, tmp_path):
    """PEFT saves such a model if it trained the head of a tied base and folded it in."""
    given = tensors(0, 0, base), tensors(0, 0.1, "own"), tensors(0, 0.2)
    out, result = merged(tmp_path, family(tmp_path, *given, TIED), beta=0)
    for name in (EMBEDDING, HEAD):
        start, first, second = (each.get(name, each[EMBEDDING]).double() for each in given)
        exact = start + 0.5 * (0.3 * (first - start) + 0.7 * (second - start))
        assert torch.equal(out[name], exact.float())
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert any("first changes them apart" in note for note in result.notes)


def test_a_head_that_an_untied_policy_lacks_is_refused(tmp_path):
    """Although the base's head equals its embeddings: without it, the model would have a random head."""
    inputs = family(tmp_path, tensors(0, 0, "copy"), tensors(0, 0.1, "copy"), tensors(0, 0.2))
    assert "1 tensors of the base are missing" in (said := refused(tmp_path, inputs)) and HEAD in said


def test_an_encoders_own_copy_of_shared_embeddings_is_left_out(tmp_path):
    """As in old T5 checkpoints; T5 shares its embeddings even if the head is not tied to them."""
    model = ARCHITECTURES["t5-gated"]()
    for name in ("base", "first"):
        model.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    resave(
        tmp_path / "base", lambda content: {**content, "encoder.embed_tokens.weight": content["shared.weight"].clone()}
    )
    (result,) = merge(tmp_path / "base", [tmp_path / "first"], out=tmp_path / "out")
    assert result.notes[0] == "left out: encoder.embed_tokens.weight, tied to shared.weight"


def test_the_text_config_speaks_for_a_model_that_sees(tmp_path):
    for name in ("base", "first"):
        ARCHITECTURES["gemma3-images"]().save_pretrained(tmp_path / name)
    embedding = next(name for name in names_in(tmp_path / "base") if name.endswith("embed_tokens.weight"))
    resave(tmp_path / "first", lambda content: {**content, "lm_head.weight": content[embedding].clone()})
    (result,) = merge(tmp_path / "base", [tmp_path / "first"], out=tmp_path / "out")
    assert f"left out: lm_head.weight, tied to {embedding}" in result.notes
    kind = type(ARCHITECTURES["gemma3-images"]())
    _, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())


# ---- left out with a note ---------------------------------------------------------------------------------------


def test_the_value_head_of_ppo(cli, tmp_path):
    heads = {"v_head.summary.weight": torch.ones(1, 4), "v_head.summary.bias": torch.ones(1)}
    base, policies = family(tmp_path, tensors(), {**tensors(0, 0.1), **heads}, tensors(0, 0.2), TIED)
    given = [part for name, path in policies.items() for part in ("--policy", f"{name}={path}")]
    answer = cli("merge", "--base", base, *given, "--out", tmp_path / "out")
    notes = [f"left out: {name}, the value head of policy `first`" for name in sorted(heads)]
    assert answer.code == 0
    assert json.loads((tmp_path / "out/merge.json").read_text())["notes"] == notes
    said = " ".join(answer.out.split())
    assert all(note in said for note in notes)
    assert load_file(tmp_path / "out/model.safetensors").keys() == tensors().keys()
    answer = cli("merge", "--base", base, *given, "--out", tmp_path / "again", "--json")
    assert json.loads(answer.out)[0]["notes"] == notes


CONSTANTS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0),
    "model.rotary_emb.inv_freq": torch.arange(4.0),
    "model.embeddings.position_ids": torch.arange(4)[None],
    "model.layers.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool).tril(),
    "model.layers.0.attn.masked_bias": torch.tensor(-1e4),
    "model.layers.0.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
}


@pytest.mark.parametrize("holder", ["base", "first"])
@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_that_only_one_input_holds(name, holder, tmp_path):
    plain = {"base": tensors(), "first": tensors(0, 0.1), "second": tensors(0, 0.2)}
    plain[holder] = {**plain[holder], name: CONSTANTS[name]}
    out, result = merged(tmp_path, family(tmp_path, *plain.values(), TIED))
    assert list(result.notes) == [f"left out: {name}, a constant that not all inputs hold"]
    assert out.keys() == tensors().keys()


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_that_all_hold_are_kept(name, tmp_path):
    held = [{**tensors(0, step), name: CONSTANTS[name]} for step in (0, 0.1, 0.2)]
    out, _ = merged(tmp_path, family(tmp_path, *held, TIED))
    assert torch.equal(out[name], CONSTANTS[name]) and out[name].dtype == CONSTANTS[name].dtype


def test_many_that_are_left_out_are_counted(tmp_path):
    many = {f"model.layers.{block}.self_attn.rotary_emb.inv_freq": torch.arange(4.0) for block in range(BLOCKS)}
    many["model.rotary_emb.inv_freq"] = torch.arange(4.0)
    _, result = merged(tmp_path, family(tmp_path, tensors(), {**tensors(0, 0.1), **many}, tensors(0, 0.2), TIED))
    assert len(result.notes) == 4 and result.notes[-1] == "left out: 2 more tensors likewise"


def test_tensors_outside_the_known_blocks_are_named(cli, tmp_path):
    odd = {"projector.weight": torch.ones(2, 2)}
    base, policies = family(tmp_path, *({**tensors(0, step), **odd} for step in (0, 0.1, 0.2)), TIED)
    given = [part for path in policies.values() for part in ("--policy", path)]
    answer = cli("merge", "--base", base, *given, "--out", tmp_path / "out")
    note = "outside the known blocks, so scaled by α: projector.weight"
    assert answer.code == 0 and note in " ".join(answer.out.split())
    assert json.loads((tmp_path / "out/merge.json").read_text())["notes"] == [note]


# ---- refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("holder", ["base", "first"])
def test_tensors_that_only_one_input_holds(holder, tmp_path):
    plain = {"base": tensors(), "first": tensors(0, 0.1), "second": tensors(0, 0.2)}
    plain[holder] = {**plain[holder], "model.layers.0.adapter.weight": torch.ones(2, 2)}
    said = refused(tmp_path, family(tmp_path, *plain.values(), TIED))
    assert "model.layers.0.adapter.weight" in said and "merge policies that were all trained from this base" in said


def test_a_value_head_in_the_base_is_no_value_head_to_drop(tmp_path):
    base = {**tensors(), "v_head.summary.weight": torch.ones(1, 4)}
    assert "v_head.summary.weight" in refused(tmp_path, family(tmp_path, base, tensors(0, 0.1), tensors(0, 0.2), TIED))


def test_added_vocabulary(tiny):
    model = make_model(0)
    model.resize_token_embeddings(308)
    save_model(model, tiny / "grown")
    said = refused(tiny, ("sft", ["grown", "second"]))
    assert "`vocab_size` differs from the base's" in said and "expected: 300" in said and "got: 308" in said
    assert f"{EMBEDDING}: shape (300, 64) in base, (308, 64) in grown" in said
    assert said.count("base.resize_token_embeddings(308)") == 2 and "trained from this base" not in said
    # What the remedy says, carried out. All inputs but the grown one have 300 tokens.
    for name in ("sft", "second"):
        smaller = AutoModelForCausalLM.from_pretrained(tiny / name)
        smaller.resize_token_embeddings(308)
        save_model(smaller, tiny / f"{name}-308")
    merge("sft-308", ["grown", "second-308"], 0.3, out="out")


def test_added_vocabulary_of_a_model_that_sees(tmp_path):
    model = ARCHITECTURES["gemma3-images"]()
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(308)
    model.save_pretrained(tmp_path / "grown")
    said = refused(tmp_path, (tmp_path / "base", {"grown": tmp_path / "grown", "again": tmp_path / "grown"}))
    assert said.count("base.resize_token_embeddings(308)") == 4


def test_tensors_that_zero_left_empty(tmp_path):
    inputs = family(tmp_path, tensors(), tensors(0, 0.1), tensors(0, 0.2), TIED)
    resave(tmp_path / "second", lambda content: {**content, EMBEDDING: torch.zeros(0)})
    assert "stage3_gather_16bit_weights_on_model_save" in refused(tmp_path, inputs)


def test_a_policy_that_changes_nothing(tmp_path):
    """Tools that forget an adapter save the base once more; verl puts the adapter beside it."""
    inputs = family(tmp_path, tensors(), tensors(), tensors(0, 0.2), TIED)
    (tmp_path / "first/lora_adapter").mkdir()
    (tmp_path / "first/lora_adapter/adapter_model.safetensors").write_text("x")
    _, result = merged(tmp_path, inputs)
    said = "policy `first` has the base's own values, so it changes nothing; an adapter lies in "
    assert list(result.notes) == [f"{said}{tmp_path / 'first/lora_adapter'}"]


BUFFERS = [
    (torch.arange(4), torch.arange(1, 5)),
    (torch.ones(4, dtype=torch.bool), torch.tensor([True, True, False, True])),
    (torch.arange(4), torch.arange(4, dtype=torch.int32)),
    (torch.arange(4), torch.arange(4.0)),
]


@pytest.mark.parametrize(("mine", "theirs"), BUFFERS)
def test_buffers_that_are_not_equal(mine, theirs, tmp_path):
    name = "model.embeddings.position_ids"
    held = [{**tensors(0, step), name: value} for step, value in ((0, mine), (0.1, mine), (0.2, theirs))]
    said = refused(tmp_path, family(tmp_path, *held, TIED))
    assert f"{name}: a buffer of type {str(mine.dtype).removeprefix('torch.')} that is not the same" in said
    assert "in base and second" in said and "equal values in all inputs" in said


def retyped(folder, kind, width):
    """Declare another type for a checkpoint's first matrix, with the right number of bytes."""
    path = folder / "model.safetensors"
    content = load_file(path)
    header, offset, body = {}, 0, b""
    for name, value in content.items():
        dtype, size = (kind, width) if name == "model.layers.1.mlp.up_proj.weight" else ("F32", 4)
        count = value.numel() * size
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [offset, offset + count]}
        body, offset = body + np.zeros(count, np.uint8).tobytes(), offset + count
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
@pytest.mark.parametrize("name", ["base", "second"])
def test_eight_bit_floats(kind, name, tmp_path):
    inputs = family(tmp_path, tensors(), tensors(0, 0.1), tensors(0, 0.2), TIED)
    retyped(tmp_path / name, kind, 1)
    said = refused(tmp_path, inputs)
    assert f"tensor model.layers.1.mlp.up_proj.weight is of type {kind}" in said and f"{name}/model.safetensors" in said
    assert "quantized values cannot be interpolated" in said


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8"])
@pytest.mark.parametrize("name", ["base", "second"])
def test_quantized_checkpoints(method, name, tmp_path):
    inputs = family(tmp_path, tensors(), tensors(0, 0.1), tensors(0, 0.2), TIED)
    config = {**TIED, "quantization_config": {"quant_method": method}}
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    said = refused(tmp_path, inputs)
    # Some tools leave the key in the config of a model that they have dequantized.
    assert "its weights are not" in said and "remove quantization_config" in said
    retyped(tmp_path / name, "F8_E4M3" if method == "fp8" else "U8", 1)
    said = refused(tmp_path, inputs)
    assert f"the model is quantized ({method})" in said and f"{name}/config.json" in said
    assert ("FineGrainedFP8Config(dequantize=True)" if method == "fp8" else "the unquantized checkpoints") in said


# ---- shards -----------------------------------------------------------------------------------------------------


def test_every_input_in_other_shards(tmp_path):
    whole = [tensors(0, step, "own") for step in (0, 0.1, 0.2)]
    for name, content, shards in zip(("base", "first", "second"), whole, (1, 2, 4), strict=True):
        save_tensors(tmp_path / "cut" / name, content, shards=shards)
    expected, _ = merged(tmp_path, family(tmp_path, *whole))
    cut = tmp_path / "cut"
    found, _ = merged(cut, (cut / "base", {"first": cut / "first", "second": cut / "second"}))
    assert all(torch.equal(found[name], value) for name, value in expected.items()) and found.keys() == expected.keys()
