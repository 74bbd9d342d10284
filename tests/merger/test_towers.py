"""Lists of blocks that no table knows: each has its own depth, is refused, or is what the user says."""

import json
import re

import pytest
import torch
from architectures import BERT, LLAMA, OPT, TOKENS, VISION
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import perturb

from rewarded_lines import inspect, merge
from rewarded_lines.errors import UserError
from rewarded_lines.merger.merge import replay

ALPHA, BETA, WEIGHT = 0.3, 0.9, 0.25
EYE = {**VISION, "num_hidden_layers": 4}
MAMBA = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "num_heads": 4, "head_dim": 16}
QUERIES = {**BERT, "num_hidden_layers": 2, "encoder_hidden_size": 64}
# Class, config class, settings, and the lists of blocks that transformers' modules show, with their lengths.
MODELS = {
    "mpt": (
        "MptForCausalLM",
        "MptConfig",
        {**TOKENS, "d_model": 32, "n_heads": 2, "n_layers": 3},
        {"transformer.blocks": 3},
    ),
    "mamba2": ("Mamba2ForCausalLM", "Mamba2Config", {**MAMBA, "n_groups": 2}, {"backbone.layers": 3}),
    "biogpt": ("BioGptForCausalLM", "BioGptConfig", BERT, {"biogpt.layers": 3}),
    "rembert": ("RemBertForCausalLM", "RemBertConfig", {**BERT, "is_decoder": True}, {"rembert.encoder.layer": 3}),
    "xlm": (
        "XLMWithLMHeadModel",
        "XLMConfig",
        {**TOKENS, "emb_dim": 32, "n_layers": 3, "n_heads": 2, "n_words": 300},
        {f"transformer.{part}": 3 for part in ("attentions", "layer_norm1", "ffns", "layer_norm2")},
    ),
    "blip-2": (
        "Blip2ForConditionalGeneration",
        "Blip2Config",
        {"vision_config": EYE, "qformer_config": QUERIES, "text_config": {**OPT, "model_type": "opt"}},
        {"qformer.encoder.layer": 2, "vision_model.encoder.layers": 4, "language_model.model.decoder.layers": 3},
    ),
    "mllama": (
        "MllamaForConditionalGeneration",
        "MllamaConfig",
        {
            "text_config": {**LLAMA, "cross_attention_layers": [1]},
            "vision_config": {
                **{**EYE, "attention_heads": 2, "num_global_layers": 2, "vision_output_dim": 320},
                **{
                    "intermediate_layers_indices": [0, 1, 2, 3],
                    "supported_aspect_ratios": [[1, 1]],
                    "max_num_tiles": 1,
                },
            },
        },
        {
            **{"vision_model.global_transformer.layers": 2, "vision_model.transformer.layers": 4},
            "language_model.model.layers": 3,
        },
    ),
    "mistral-3": (
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "text_config": {**LLAMA, "model_type": "mistral"},
            "vision_config": {**EYE, "model_type": "pixtral", "head_dim": 32},
            "image_token_index": 299,
        },
        {"vision_tower.transformer.layers": 4, "language_model.model.layers": 3},
    ),
}


def make(name):
    import transformers

    model, config, settings, _ = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**settings))


def save_models(name, folder):
    """Save a base and two policies."""
    make(name).save_pretrained(folder / "base")
    for seed, policy in enumerate(("first", "second"), start=1):
        perturb(make(name), seed).save_pretrained(folder / policy)


def scale_of(tensor, lists):
    """Return the LiNeS scale by the list that a tensor is in."""
    for path, blocks in lists.items():
        if match := re.match(rf"{re.escape(path)}\.([0-9]+)\.", tensor):
            return ALPHA + (BETA * int(match[1]) / (blocks - 1) if blocks > 1 else 0)
    return ALPHA


def check_values(folder, out, scale):
    """Compare a merge with base + scale·(λ·τ₁ + (1 − λ)·τ₂) in float64."""
    base, first, second, merged = (
        load_file(folder / name / "model.safetensors") for name in ("base", "first", "second", out)
    )
    assert merged.keys() == base.keys()
    for tensor, value in base.items():
        if not value.is_floating_point():
            continue
        steps = [policy[tensor].double() - value.double() for policy in (first, second)]
        exact = value.double() + scale(tensor) * (WEIGHT * steps[0] + (1 - WEIGHT) * steps[1])
        assert torch.allclose(merged[tensor].double(), exact, rtol=2.0**-23, atol=1e-30), tensor


def merged(folder, out, **how):
    (result,) = merge(
        folder / "base", [folder / "first", folder / "second"], WEIGHT, alpha=ALPHA, beta=BETA, out=folder / out, **how
    )
    return result


@pytest.mark.parametrize("name", MODELS)
def test_every_list_has_its_own_depth(name, tmp_path):
    save_models(name, tmp_path)
    lists = MODELS[name][3]
    assert {path: len(scales) for path, scales in merged(tmp_path, "out").scales.items()} == lists
    check_values(tmp_path, "out", lambda tensor: scale_of(tensor, lists))


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A BLIP-2 with two policies."""
    folder = tmp_path_factory.mktemp("seeing")
    save_models("blip-2", folder)
    return folder


@pytest.mark.parametrize(
    ("tower", "flat", "kept"),
    [
        ("vision=flat", ("vision_model.",), ()),
        ("vision=base", (), ("vision_model.",)),
        ("vision_model.encoder=flat,qformer=base", ("vision_model.encoder.",), ("qformer.",)),
        (["text=base", "vision=depth"], (), ("language_model.",)),
    ],
)
def test_a_tower_is_what_the_user_says(tower, flat, kept, seeing, tmp_path):
    lists = MODELS["blip-2"][3]

    def scale(tensor):
        if tensor.startswith(kept):
            return 0
        return ALPHA if tensor.startswith(flat) else scale_of(tensor, lists)

    out = tmp_path / "out"
    result = merged(seeing, out, tower=tower)
    check_values(seeing, out, scale)
    assert set(result.scales) == {path for path in lists if not path.startswith(flat + kept)}
    base = load_file(seeing / "base/model.safetensors")
    assert all(
        torch.equal(value, base[name])
        for name, value in load_file(out / "model.safetensors").items()
        if scale(name) == 0
    )
    said = {"scaled by α": flat, "kept from the base": kept}
    assert all(any(note.startswith(what) for note in result.notes) for what, names in said.items() if names)
    # The same again, from the record and from the command in the model card.
    record = json.loads((out / "merge.json").read_text())
    joined = tower if isinstance(tower, str) else ",".join(tower)
    assert record["tower"] == joined and f"--tower {joined}" in (out / "README.md").read_text()
    again = replay(out, out=tmp_path / "again").out
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    found = inspect(out, alpha=ALPHA, beta=BETA, tower=joined)
    assert all(one.scale == pytest.approx(scale(one.name)) for one in found.tensors)


def test_towers_on_the_command_line(cli, seeing, tmp_path):
    words = [
        "merge",
        "--base",
        seeing / "base",
        "--policy",
        seeing / "first",
        "--alpha",
        "0.5",
        "--out",
        tmp_path / "out",
    ]
    done = cli(*words, "--tower", "vision=flat", "--tower", "qformer=base")
    assert (
        done.code == 0 and json.loads((tmp_path / "out/merge.json").read_text())["tower"] == "vision=flat,qformer=base"
    )
    shown = cli("inspect", tmp_path / "out", "--tower", "qformer=base")
    assert shown.code == 0 and "in towers kept from the base: qformer" in shown.out


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        ("audio=flat", "no list of blocks lies there(?s:.)*vision_model.encoder.layers"),
        ("vision=away", "not a rule for a tower"),
        ("vision", "not a rule for a tower"),
        ("vision=flat,qformer=base,text=flat", "no list of blocks is left"),
    ],
)
def test_towers_that_are_not_there(tower, message, seeing):
    with pytest.raises(UserError, match=message):
        inspect(seeing / "base", tower=tower)


TEXT = {f"model.layers.{block}.{part}.weight": (4, 4) for block in range(3) for part in ("attn.q", "mlp.up")}
CONFIG = {"model_type": "new", "num_hidden_layers": 3}
UNKNOWN = {
    "a list of another name": (
        "model.stages",
        {f"model.stages.{i}.{part}.weight": (4, 4) for i in range(5) for part in "ab"},
    ),
    "a second list of layers": ("model.late.layers", {f"model.late.layers.{i}.fc.weight": (4, 4) for i in range(2)}),
    "stages": ("eye.blocks", {f"eye.blocks.{i}.{j}.conv.weight": (4, 4) for i in range(4) for j in range(2)}),
    "bare layers": ("model.neck.layers", {f"model.neck.layers.{i}.weight": (4, 4) for i in range(4)}),
}


def write(folder, shapes, seed, config=CONFIG):
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    step = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator) + 0.01 * seed * torch.randn(shape, generator=step)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(folder, shapes, seed):
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in shapes.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q", "up"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def change(folder, name):
    """Return B·A of a matrix in an adapter; the scaling is 1."""
    tensors = load_file(folder / "adapter_model.safetensors")
    module = f"base_model.model.{name.removesuffix('.weight')}"
    return tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double()


def remedies(refused):
    """Return the arguments that the message names, each as keyword arguments of `merge`."""
    text = str(refused.value)
    layers, tower = re.search(r"--layers '([^']+)'", text), re.search(r"--tower (\S+)", text)
    return {"depth": {"layers": layers[1]}, "flat": {"tower": tower[1]}}


@pytest.mark.parametrize("kind", UNKNOWN)
@pytest.mark.parametrize("policies", ["models", "adapters"])
def test_a_list_that_may_be_one_of_blocks_is_refused_with_remedies_that_work(kind, policies, tmp_path):
    path, more = UNKNOWN[kind]
    shapes = TEXT | more
    blocks = 1 + max(int(re.match(rf"{re.escape(path)}\.(\d+)", name)[1]) for name in more)
    write(tmp_path / "base", shapes, 0)
    for seed, name in enumerate(("first", "second"), start=1):
        (write if policies == "models" else write_adapter)(tmp_path / name, shapes, seed)
    with pytest.raises(UserError, match=f"{re.escape(path)}: a list of numbered modules that may be blocks") as refused:
        merged(tmp_path, "out")
    for said, how in remedies(refused).items():
        merged(tmp_path, said, **how)
        lists = {"model.layers": 3} | ({path: blocks} if said == "depth" else {})
        if policies == "models":
            check_values(tmp_path, said, lambda tensor, lists=lists: scale_of(tensor, lists))
            continue
        for name in shapes:
            exact = WEIGHT * change(tmp_path / "first", name) + (1 - WEIGHT) * change(tmp_path / "second", name)
            assert torch.allclose(change(tmp_path / said, name), scale_of(name, lists) * exact, atol=1e-5), name


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("name", ["mpt", "biogpt", "blip-2"])
def test_adapters_have_the_depth_of_their_base(name, weights, tmp_path):
    """Also over a base without weights, and where an adapter changes only some blocks."""
    model = make(name)
    model.save_pretrained(tmp_path / "base")
    lists = MODELS[name][3]
    targets = "|".join(rf"{re.escape(path)}\.[1-9]\d*" for path in lists)
    for seed, policy in enumerate(("first", "second"), start=1):
        torch.manual_seed(seed)
        targeted = [part for part, module in make(name).named_modules() if isinstance(module, torch.nn.Linear)]
        targeted = [part for part in targeted if re.match(targets, part)]
        lora = LoraConfig(r=2, lora_alpha=2, target_modules=targeted, init_lora_weights=False)
        get_peft_model(make(name), lora).save_pretrained(tmp_path / policy)
    if not weights:
        (tmp_path / "base/model.safetensors").unlink()
    merged(tmp_path, "out")
    assert targeted
    for module in targeted:
        exact = WEIGHT * change(tmp_path / "first", module) + (1 - WEIGHT) * change(tmp_path / "second", module)
        exact *= scale_of(f"{module}.weight", lists)
        assert torch.allclose(change(tmp_path / "out", module), exact, atol=1e-5 * float(exact.abs().max())), module
        # Every block is told from its neighbours, so a wrong number of blocks would show.
        assert scale_of(f"{module}.weight", lists) != ALPHA or 1 in lists.values()


def test_adapters_that_do_not_show_the_number_of_blocks_need_the_base(tmp_path):
    shapes = {f"model.late.layers.{i}.fc.weight": (4, 4) for i in range(6)}
    config = {**CONFIG, "late_config": {"num_layers": 6, "depth": 2}}
    write(tmp_path / "base", TEXT | shapes, 0, config)
    for seed, policy in enumerate(("first", "second"), start=1):
        write_adapter(tmp_path / policy, {name: shape for name, shape in shapes.items() if ".5." not in name}, seed)
    files = tmp_path / "base/model.safetensors"
    files.rename(tmp_path / "away")
    with pytest.raises(
        UserError, match="late.layers: the adapters alone do not show how many blocks(?s:.)*pass --base"
    ):
        merged(tmp_path, "out")
    (tmp_path / "away").rename(files)
    merged(tmp_path, "out")
    name = "model.late.layers.4.fc.weight"
    exact = WEIGHT * change(tmp_path / "first", name) + (1 - WEIGHT) * change(tmp_path / "second", name)
    assert torch.allclose(change(tmp_path / "out", name), (ALPHA + BETA * 4 / 5) * exact, atol=1e-5)


def test_adapters_note_what_has_no_depth(tmp_path):
    shapes = TEXT | {"model.connector.up.weight": (4, 4)}
    write(tmp_path / "base", shapes, 0)
    for seed, policy in enumerate(("first", "second"), start=1):
        write_adapter(tmp_path / policy, shapes, seed)
    assert merged(tmp_path, "out").notes == ("outside the known blocks, so scaled by α: model.connector.up.weight",)
