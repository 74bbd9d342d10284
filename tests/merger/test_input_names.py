"""Policies whose tensors have other names than the base's: merged as what transformers loads from both."""

from __future__ import annotations

import json
import shutil
import warnings

import blake3
import pytest
import torch
from renamed_models import ALPHA, BETA, MODELS, MTP, WEIGHTS, edit, edit_config, scale_of, without
from safetensors.torch import load_file
from tiny_models import perturb

from rewarded_lines import inspect, merge
from rewarded_lines.errors import UserError
from rewarded_lines.merger.merge import replay

HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def save_family(folder, model, change=None, kind=None):
    """Save a model as a base whose file `change` edits, and two policies, loaded from it as class `kind`.

    Returns the three models.
    """
    first = perturb(MODELS[model](), 9)
    first.save_pretrained(folder / "base")
    edit(folder / "base", change)
    kind = kind or type(first)
    models = [kind.from_pretrained(folder / "base")]
    for seed in (1, 2):
        models.append(perturb(kind.from_pretrained(folder / "base"), seed))
        models[-1].save_pretrained(folder / f"p{seed}")
    return models


def run(folder, **more):
    """Merge p1 and p2 over the base, and return the result."""
    policies = [folder / "p1", folder / "p2"]
    (result,) = merge(folder / "base", policies, WEIGHTS[0], alpha=ALPHA, beta=BETA, out=folder / "out", **more)
    return result


def check_values(folder, models, part=None):
    """Compare what transformers loads from the output with base + s·Σ λ·τ, tensor by tensor as transformers names them.

    `part`: the names of text models, where a base has more.
    """
    kind, states = type(models[0]), [model.state_dict() for model in models]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        loaded, report = kind.from_pretrained(folder / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    found = loaded.state_dict()
    assert set(found) == set(states[0])
    for name, base in states[0].items():
        scale = scale_of(name, models[0].config)
        residual = sum(w * (one[name].double() - base.double()) for w, one in zip(WEIGHTS, states[1:], strict=True))
        torch.testing.assert_close(found[name], (base.double() + scale * residual).float(), rtol=2e-7, atol=0)


def with_prefix(prefix):
    return lambda tensors: {prefix + name: value for name, value in tensors.items()}


def inside_blocks(module):
    """Put a module between every block and what it has."""

    def change(tensors):
        parts = {name: name.split(".") for name in tensors}
        return {
            ".".join([*part[:3], module, *part[3:]] if part[1] == "layers" else part): tensors[name]
            for name, part in parts.items()
        }

    return change


def memory(model):
    """Return a change into the names that a model has in memory, as trainers save them that shard the model."""
    return lambda _: {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return folder, save_family(folder, "llama")


@pytest.fixture
def models(saved, tmp_path):
    """Llamas in `tmp_path`: a base and two policies, as files, and as models."""
    folder, models = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return models


WRAPPERS = [
    "_orig_mod.",
    "module.",
    "policy.",
    "pretrained_model.",
    "base_model.",
    "actor.",
    "module._orig_mod.",
    "student.net.",
]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_before_every_name(wrapper, models, tmp_path):
    edit(tmp_path / "p1", with_prefix(wrapper))
    result = run(tmp_path)
    check_values(tmp_path, models)
    assert any(f"{wrapper}lm_head.weight is the base's lm_head.weight" in note for note in result.notes)
    assert set(load_file(tmp_path / "out/model.safetensors")) == set(load_file(tmp_path / "base/model.safetensors"))


@pytest.mark.parametrize("module", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_a_wrapper_around_every_block(module, models, tmp_path):
    for policy in ("p1", "p2"):
        edit(tmp_path / policy, inside_blocks(module))
    run(tmp_path)
    check_values(tmp_path, models)


@pytest.mark.parametrize(
    ("model", "prefix"), [("gpt2", "transformer."), ("bloom", "transformer."), ("bert-masked", "bert.")]
)
def test_the_prefix_of_a_base_model(model, prefix, tmp_path):
    """The Hub's gpt2 has none, and what transformers saves has one."""
    models = save_family(tmp_path, model, without(prefix))
    run(tmp_path)
    if model != "bert-masked":
        check_values(tmp_path, models)
    assert set(load_file(tmp_path / "out/model.safetensors")) == set(load_file(tmp_path / "base/model.safetensors"))


SLOW = [pytest.param(model, marks=pytest.mark.slow) for model in ("llava", "qwen3-vl", "mixtral")]


@pytest.mark.parametrize("model", ["gemma3-images", "qwen2-vl", "qwen3-moe", "phimoe", *SLOW])
@pytest.mark.parametrize("in_memory", ["base", "p1"])
def test_names_in_memory(model, in_memory, tmp_path):
    """Trainers that shard a model save its names in memory: other prefixes, and all experts in one tensor."""
    models = save_family(tmp_path, model)
    row = ("base", "p1").index(in_memory)
    edit(tmp_path / in_memory, memory(models[row]))
    tied = models[0].config.tie_word_embeddings
    run(tmp_path)
    check_values(tmp_path, models)
    kept = set(load_file(tmp_path / "base/model.safetensors")) - ({"lm_head.weight"} if tied else set())
    assert set(load_file(tmp_path / "out/model.safetensors")) == kept


@pytest.mark.parametrize("method", ["slerp", "ties", "dare-ties", "consensus"])
def test_other_methods_and_a_replay(method, tmp_path):
    """The same bits as with the base's own names, whatever the method reads of whole tensors."""
    models = save_family(tmp_path, "qwen3-moe")
    run(tmp_path, method=method)
    plain = (tmp_path / "out/model.safetensors").read_bytes()
    edit(tmp_path / "p1", memory(models[1]))
    edit(tmp_path / "p2", with_prefix("_orig_mod."))
    run(tmp_path, method=method, overwrite=True)
    assert (tmp_path / "out/model.safetensors").read_bytes() == plain
    replay(tmp_path / "out", out=tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == plain
    assert all(one.residual.norm > 0 for one in inspect(tmp_path / "p1", tmp_path / "base").tensors)


def exchanged(tensors):
    """Exchange the last two axes of fused experts, as in releases of Qwen3-VL."""
    return {name: value.transpose(1, 2) if ".experts." in name else value for name, value in tensors.items()}


@pytest.mark.parametrize("old", [["base"], ["p1"], ["base", "p2"]])
def test_experts_whose_axes_a_version_exchanged(old, tmp_path):
    models = save_family(tmp_path, "qwen3-vl-moe")
    for folder in old:
        edit(tmp_path / folder, exchanged)
    run(tmp_path)
    check_values(tmp_path, models)
    shapes = [
        {name: value.shape for name, value in load_file(tmp_path / folder / "model.safetensors").items()}
        for folder in ("base", "out")
    ]
    assert shapes[0] == shapes[1]
    record = json.loads((tmp_path / "out/merge.json").read_text())
    for name in ("p1", "p2"):
        digest = blake3.blake3((tmp_path / name / "model.safetensors").read_bytes()).hexdigest()
        assert record["policies"][name]["files"]["model.safetensors"] == digest


def test_a_text_model_over_a_base_that_sees(tmp_path):
    from transformers import AutoModelForCausalLM

    models = save_family(tmp_path, "qwen3.5", kind=AutoModelForCausalLM)
    result = run(tmp_path)
    check_values(tmp_path, models)
    base, out = load_file(tmp_path / "base/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    towers = [name for name in base if ".visual." in name]
    assert towers and set(base) == set(out) and all(torch.equal(base[name], out[name]) for name in towers)
    assert any("policy `p1` lacks them: it is a model of text only" in note for note in result.notes)
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "qwen3_5"


def test_a_text_model_beside_a_whole_one(tmp_path):
    """The tower of the policy that has one is merged; the other's residual is zero there."""
    from transformers import AutoModelForCausalLM

    save_family(tmp_path, "qwen3.5", kind=AutoModelForCausalLM)
    kind = type(MODELS["qwen3.5"]())
    base = kind.from_pretrained(tmp_path / "base")
    perturb(kind.from_pretrained(tmp_path / "base"), 5).save_pretrained(tmp_path / "p2")
    run(tmp_path)
    found, second = kind.from_pretrained(tmp_path / "out"), kind.from_pretrained(tmp_path / "p2")
    name = "model.visual.merger.norm.weight"
    start, moved = base.state_dict()[name].double(), second.state_dict()[name].double()
    expected = start + ALPHA * WEIGHTS[1] * (moved - start)
    torch.testing.assert_close(found.state_dict()[name], expected.float(), rtol=2e-7, atol=0)


def test_a_text_model_must_be_whole(tmp_path):
    from transformers import AutoModelForCausalLM

    save_family(tmp_path, "qwen3.5", kind=AutoModelForCausalLM)
    edit(tmp_path / "p1", lambda tensors: {name: tensors[name] for name in tensors if "layers.2" not in name})
    with pytest.raises(UserError, match="tensors of the base are missing"):
        run(tmp_path)


def with_mtp(tensors):
    generator = torch.Generator().manual_seed(3)
    return tensors | {name: torch.randn(shape, generator=generator) for name, shape in MTP.items()}


def with_block_after_the_last(tensors):
    last = {name: value for name, value in tensors.items() if ".layers.2." in name}
    more = {name.replace(".layers.2.", ".layers.3."): value.clone() for name, value in last.items()}
    return tensors | more | {"model.layers.3.eh_proj.weight": torch.ones(64, 128)}


@pytest.mark.parametrize(
    ("model", "change"),
    [("qwen3-next", with_mtp), ("qwen3.5", with_mtp), ("glm4-moe", with_block_after_the_last)],
)
def test_what_transformers_never_loads(model, change, tmp_path):
    """Kept from the base if the policies lack it, merged with α if all have it."""
    models = save_family(tmp_path, model, change)
    result = run(tmp_path)
    check_values(tmp_path, models)
    base, out = load_file(tmp_path / "base/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    unloaded = [name for name in base if name.startswith(("mtp.", "model.layers.3.eh_proj"))]
    assert unloaded and all(torch.equal(base[name], out[name]) for name in unloaded)
    assert any("transformers loads them in no model" in note for note in result.notes)
    for policy in ("p1", "p2"):
        edit(tmp_path / policy, lambda tensors: tensors | {name: base[name] + 1 for name in unloaded})
    run(tmp_path, overwrite=True)
    out = load_file(tmp_path / "out/model.safetensors")
    for name in unloaded:
        torch.testing.assert_close(out[name], base[name] + ALPHA)


def test_what_only_a_policy_has_and_transformers_never_loads(tmp_path):
    models = save_family(tmp_path, "qwen3-next")
    edit(tmp_path / "p1", with_mtp)
    assert any(note.startswith("left out: mtp.") for note in run(tmp_path).notes)
    check_values(tmp_path, models)


@pytest.mark.parametrize(
    ("base", "policy"),
    [
        ({}, {"architectures": None}),
        ({}, {"architectures": ["FSDPLlamaForCausalLM"]}),
        ({"architectures": ["LlamaModel"]}, {}),
        ({"architectures": ["LLaMAForCausalLM"]}, {}),
        ({"rope_theta": 10000.0, "rope_parameters": None, "rope_scaling": None}, {}),
        ({"torch_dtype": "float32", "dtype": None}, {}),
    ],
)
def test_a_config_that_is_spelled_otherwise(base, policy, models, tmp_path):
    edit_config(tmp_path / "base", **base)
    edit_config(tmp_path / "p1", **policy)
    run(tmp_path)
    check_values(tmp_path, models)


@pytest.mark.parametrize(
    ("base", "policy", "key"),
    [
        ({"rope_theta": 5e5, "rope_parameters": None}, {}, "rope rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, {}, "rope rope_type"),
        ({}, {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({}, {"rms_norm_eps": 1e-3}, "rms_norm_eps"),
        ({}, {"model_type": "mistral"}, "model_type"),
    ],
)
def test_a_config_that_means_something_else(base, policy, key, models, tmp_path):
    edit_config(tmp_path / "base", **base)
    edit_config(tmp_path / "p1", **policy)
    with pytest.raises(UserError, match=f"`{key}` differs"):
        run(tmp_path)


def test_the_value_model_of_ppo(models, tmp_path):
    """TRL's PPO trains policy and value model as parts of one module."""
    critic = {"value_model.score.weight": torch.ones(1, 64), "value_model.model.norm.weight": torch.ones(64)}
    edit(tmp_path / "p1", lambda tensors: with_prefix("policy.")(tensors) | critic)
    notes = run(tmp_path).notes
    check_values(tmp_path, models)
    assert any("value_model.score.weight, the value head of policy" in note for note in notes)


def test_a_config_that_leaves_out_defaults(tmp_path):
    """The Hub's Gemma 3 has neither vocabulary nor heads in its config."""
    save_family(tmp_path, "gemma3-images")
    run(tmp_path)
    one = load_file(tmp_path / "out/model.safetensors")
    path = tmp_path / "base/config.json"
    config = json.loads(path.read_text())
    for key in ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters"):
        config["text_config"].pop(key)
    path.write_text(json.dumps(config))
    # As a trainer saves it that does not know of the tie.
    edit(tmp_path / "p1", lambda tensors: tensors | {HEAD: tensors[EMBEDDING].clone()})
    run(tmp_path, overwrite=True)
    two = load_file(tmp_path / "out/model.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_an_index_that_lists_what_no_file_has(tmp_path):
    models = save_family(tmp_path, "llama-tied")
    shutil.rmtree(tmp_path / "base")
    models[0].save_pretrained(tmp_path / "base", max_shard_size="50kB")
    path = tmp_path / "base/model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = next(iter(index["weight_map"].values()))
    lost = {"lm_head.weight": file, "model.layers.0.self_attn.rotary_emb.inv_freq": file}
    path.write_text(json.dumps({**index, "weight_map": index["weight_map"] | lost}))
    result = run(tmp_path)
    check_values(tmp_path, models)
    assert any("the index of base lists tensors that no file has: lm_head.weight" in note for note in result.notes)
    path.write_text(
        json.dumps({**index, "weight_map": index["weight_map"] | {"model.layers.3.mlp.up_proj.weight": file}})
    )
    with pytest.raises(UserError, match="does not fit its files"):
        run(tmp_path, overwrite=True)
