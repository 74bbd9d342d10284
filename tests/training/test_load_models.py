"""Models for training: LoRA and its refusals, critics, classifiers, QLoRA on a CPU, padding, the SFT model."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_adapters import save_adapter
from tiny_models import make_model, save_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
)
from transformers.utils import logging
from trl import ModelConfig
from trl.experimental.utils import get_reward

from rewarded_lines.checkpoints.hashing import weights_hash
from rewarded_lines.errors import UserError
from rewarded_lines.training.load_models import (
    absolute,
    check_quantization,
    check_start,
    fold_classifier,
    generation_dtype,
    load_classifier,
    load_critic,
    load_policy,
    load_tokenizer,
    lora_config,
    reference_loading,
    reward_lora,
)
from rewarded_lines.training.training_record import reference_hash

FULL, LORA = ModelConfig(), ModelConfig(use_peft=True)
LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
IDS = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    return save_model(make_model(0, blocks=2), tmp_path_factory.mktemp("models") / "sft")


def problem_of(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    (problem,) = caught.value.problems
    return problem


def trained(model):
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def adapted(model):
    """Return the last part of the name of every adapted layer."""
    layers = {name.split(".lora_")[0] for name in trained(model) if "lora_" in name}
    return sorted(name.rpartition(".")[2] for name in layers)


def test_lora_is_off_unless_asked_for(sft):
    model = load_policy(str(sft), FULL)
    assert lora_config(FULL) is None and trained(model) == set(dict(model.named_parameters()))


def test_every_process_loads_the_critic(sft, monkeypatch):
    """With TRL's fsdp2.yaml, transformers gives zeros to all processes but the first, until FSDP shares out weights."""
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("transformers.distributed.fsdp._is_torch_distributed_initialized", lambda: True)
    whole = dict(make_model(0, blocks=2).named_parameters())
    for load, zeros in ((load_classifier, True), (load_critic, False)):
        weights = dict(load(str(sft), LORA).named_parameters())
        same = [torch.equal(weights[name], one) for name, one in whole.items() if name in weights]
        assert same and all(same) != zeros
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


def test_a_whole_model_is_not_trained_in_float16(sft, tmp_path):
    """Pythia and Llama 2 are stored in it, and `dtype: auto` takes what is stored."""
    save_model(make_model(0, blocks=2).half(), tmp_path / "half")
    for load in (load_policy, load_classifier):
        for folder, dtype in ((sft, "float16"), (tmp_path / "half", "auto")):
            assert problem_of(load, str(folder), ModelConfig(dtype=dtype)).where == "dtype"
            assert load(str(folder), ModelConfig(dtype=dtype, use_peft=True)).dtype == torch.float16
        assert load(str(tmp_path / "half"), ModelConfig()).dtype == torch.float32


def test_lora_adapts_every_linear_layer_of_the_blocks(sft):
    model = load_policy(str(sft), LORA)
    config = lora_config(LORA)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (16, 32, 0.05, "CAUSAL_LM")
    names = adapted(get_peft_model(model, config))
    assert names == sorted(LINEAR * 2)


@pytest.mark.parametrize("text", ["q_proj,v_proj", "v_proj, q_proj", r".*\.[qv]_proj", "all", "all-linear"])
def test_the_modules_of_lora_may_be_a_text(sft, text):
    """Names with commas as LLaMA-Factory has them, a pattern as PEFT has it."""
    model = load_policy(str(sft), LORA)
    config = lora_config(ModelConfig(use_peft=True, lora_target_modules=[text]))
    assert set(adapted(get_peft_model(model, config))) == set(LINEAR if "all" in text else ["q_proj", "v_proj"])


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], ["q_proj"]])
def test_loras_settings_are_the_users(sft, modules):
    options = ModelConfig(use_peft=True, lora_r=4, lora_alpha=6, lora_dropout=0.0, lora_target_modules=modules)
    for task in ("CAUSAL_LM", "SEQ_CLS"):
        model = load_policy(str(sft), options)
        config = lora_config(options, task)
        assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (4, 6, 0.0, task)
    config.task_type = None
    assert set(adapted(get_peft_model(model, config))) == set(modules)


def test_a_classifiers_head_is_not_adapted_but_trained(sft, tmp_path):
    config = lora_config(LORA, task="SEQ_CLS")
    assert adapted(get_peft_model(load_classifier(str(sft), LORA), config)) == sorted(LINEAR * 2)
    save_model(GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2)), tmp_path / "gpt2")
    gpt2 = get_peft_model(load_classifier(str(tmp_path / "gpt2"), LORA), lora_config(LORA, task="SEQ_CLS"))
    assert adapted(gpt2) == ["c_attn", "c_fc", "c_proj", "c_proj"]


def test_both_layers_of_distilberts_head_are_trained_whole(tmp_path):
    config = DistilBertConfig(vocab_size=300, dim=16, hidden_dim=16, n_layers=1, n_heads=2)
    save_model(DistilBertForMaskedLM(config), tmp_path / "distilbert")
    model = load_classifier(str(tmp_path / "distilbert"), LORA)
    model = get_peft_model(model, reward_lora(LORA, model))
    assert adapted(model) == ["k_lin", "lin1", "lin2", "out_lin", "q_lin", "v_lin"]
    head = {name.partition(".modules_to_save.")[0] for name in trained(model) if "lora_" not in name}
    assert head == {"base_model.model.classifier", "base_model.model.pre_classifier"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_peft": True, "use_dora": True}, ["use_dora: DoRA"]),
        ({"load_in_4bit": True}, ["quantized weights cannot be trained"]),
        ({"load_in_8bit": True, "use_dora": True}, ["quantized weights", "use_dora: DoRA"]),
    ],
)
def test_quantized_weights_without_lora_and_dora_are_refused_all_at_once(settings, said):
    with pytest.raises(UserError) as caught:
        lora_config(ModelConfig(**settings))
    assert len(caught.value.problems) == len(said)
    assert all(str(problem).startswith(text) for problem, text in zip(caught.value.problems, said, strict=True))
    assert all("set `use_" in problem.remedy for problem in caught.value.problems)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_critic_with_lora_trains_adapters_and_head_only(sft, dtype):
    torch.manual_seed(0)
    critic = load_critic(str(sft), ModelConfig(use_peft=True, dtype=dtype))
    names = trained(critic)
    assert "score.weight" in names and all("lora_" in name for name in names - {"score.weight"})
    assert len(names) == 1 + 2 * 2 * len(LINEAR)
    before = {name: weight.detach().clone() for name, weight in critic.named_parameters()}
    assert {str(weight.dtype) for name, weight in before.items() if name in names} == {"torch.float32"}
    assert {str(weight.dtype) for name, weight in before.items() if name not in names} == {f"torch.{dtype}"}

    values, scores, _ = get_reward(critic, IDS, 0, 5)
    assert torch.isfinite(values).all() and values.shape == (2, 17, 1) and values.dtype == torch.float32
    optimizer = torch.optim.AdamW([weight for weight in critic.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = (get_reward(critic, IDS, 0, 5)[0].squeeze(-1) - 1).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, weight in critic.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == names


def test_a_critic_without_lora_is_trained_whole(sft):
    critic = load_critic(str(sft), FULL)
    assert trained(critic) == set(dict(critic.named_parameters()))
    assert torch.isfinite(get_reward(critic, IDS, 0, 5)[0]).all()


def test_a_classifier_has_the_models_body_and_a_new_head(sft):
    verbosity = logging.get_verbosity()
    model = load_classifier(str(sft), FULL)
    assert model.config.num_labels == 1 and model.score.weight.shape == (1, 64)
    own = {name: weight for name, weight in model.state_dict().items() if name.startswith("model.")}
    assert all(torch.equal(weight, own[name]) for name, weight in load_file(sft / "model.safetensors").items())
    assert logging.get_verbosity() == verbosity


def copied(sft, folder, lacking=None):
    shutil.copytree(sft, folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if name != lacking}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_checkpoint_that_lacks_more_than_the_head_is_refused(sft, tmp_path):
    lacking = "model.layers.1.mlp.up_proj.weight"
    verbosity = logging.get_verbosity()
    problem = problem_of(load_classifier, str(copied(sft, tmp_path / "lacking", lacking)), FULL)
    assert (problem.what, problem.got) == ("weights are missing from the model", lacking)
    assert problem.where == str(tmp_path / "lacking") and logging.get_verbosity() == verbosity


SMALL = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
ENCODERS = {
    BertForMaskedLM: BertConfig(**SMALL),
    RobertaForMaskedLM: RobertaConfig(**SMALL),
    DebertaV2ForMaskedLM: DebertaV2Config(**SMALL),
    DistilBertForMaskedLM: DistilBertConfig(vocab_size=300, dim=16, n_layers=1, n_heads=2, hidden_dim=16),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_reward_model_may_start_from_an_encoder(tmp_path, kind):
    save_model(kind(ENCODERS[kind]), tmp_path / "encoder")
    model = load_classifier(str(tmp_path / "encoder"), FULL)
    assert model.config.num_labels == 1 and type(model).__name__.endswith("ForSequenceClassification")


def quantized(bits, folder, load=load_policy, dtype="bfloat16"):
    """Return a quantized model; skip the test if bitsandbytes does not work here, after checking its message."""
    options = ModelConfig(use_peft=True, lora_dropout=0.0, dtype=dtype, **{f"load_in_{bits}bit": True})
    try:
        return load(str(folder), options), options
    except UserError as error:
        (problem,) = error.problems
        assert (problem.what, problem.where) == ("bitsandbytes cannot quantize on this machine", f"load_in_{bits}bit")
        pytest.skip(problem.got)


def linear(model):
    """Return the kind of each linear layer."""
    layers = {name.rpartition(".")[2]: one for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
    return {name: type(layer).__name__ for name, layer in layers.items()}


def step(model):
    """Return a training loss and its gradient by name."""
    model.train()
    model.zero_grad()
    ids = IDS.to(model.device)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_models_train_right_after_they_were_evaluated(sft, bits):
    """On some CPUs bitsandbytes packs 4-bit weights in evaluation mode into a layout without a gradient."""
    policy, options = quantized(bits, sft)
    kinds = {kind for name, kind in linear(policy).items() if name != "lm_head"}
    assert kinds == {"Linear4bit" if bits == 4 else "Linear8bitLt"}
    torch.manual_seed(0)
    model = get_peft_model(policy, lora_config(options))
    before, gradient = step(model)
    model.eval()
    with torch.no_grad():
        ids = IDS.to(model.device)
        between = model(input_ids=ids, labels=ids).loss.item()
    after, again = step(model)
    full = load_policy(str(sft), FULL)(input_ids=IDS, labels=IDS).loss.item()
    assert before == after == pytest.approx(between, rel=0.02) == pytest.approx(full, rel=0.2)
    assert len(gradient) == 2 * 2 * len(LINEAR) and sum(g.abs().sum() for g in gradient.values()) > 0
    assert gradient.keys() == again.keys() and all(torch.equal(gradient[name], again[name]) for name in gradient)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_critic_keeps_its_head_whole(sft, bits):
    critic, _ = quantized(bits, sft, load_critic)
    kinds = linear(critic)
    assert kinds["score"] == "Linear" and kinds["base_layer"] == ("Linear4bit" if bits == 4 else "Linear8bitLt")
    values = get_reward(critic, IDS.to(critic.device), 0, 5)[0]
    values.sum().backward()
    assert torch.isfinite(values).all() and critic.score.weight.grad.abs().sum() > 0


class Broken(torch.nn.Linear):
    """A quantized layer whose kernel returns NaN."""

    def __init__(self, *sizes, **_):
        super().__init__(*sizes)

    def forward(self, inputs):
        return torch.full((1, 64), torch.nan)


def no_kernel(*_, **__):
    raise RuntimeError("no kernel image is\navailable")


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (no_kernel, "RuntimeError: no kernel image is available"),
        (Broken, "RuntimeError: a quantized layer gives values"),
    ],
)
@pytest.mark.parametrize(("key", "name"), [("load_in_4bit", "Linear4bit"), ("load_in_8bit", "Linear8bitLt")])
def test_quantization_that_fails_is_one_message_with_what_bitsandbytes_says(monkeypatch, sft, key, name, layer, said):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bitsandbytes.nn, name, layer)
    options = ModelConfig(use_peft=True, **{key: True})
    for call in (lambda: check_quantization(options), lambda: load_policy(str(sft), options)):
        problem = problem_of(call)
        assert (problem.what, problem.where) == ("bitsandbytes cannot quantize on this machine", key)
        assert (
            problem.got.startswith(said) and "rewarded-lines[train]" in problem.remedy and f"`{key}`" in problem.remedy
        )


def test_a_critic_may_start_from_a_reward_model_of_the_same_tokens(sft, tmp_path):
    model = load_classifier(str(sft), FULL)
    model.save_pretrained(copied(sft, tmp_path / "reward"))
    critic = load_critic(str(sft), FULL, str(tmp_path / "reward"))
    assert torch.equal(critic.score.weight, model.score.weight)
    problem = problem_of(load_critic, str(sft), FULL, str(renamed(sft, tmp_path / "renamed")))
    assert problem.where == "critic_model" and "tokens for others" in problem.what


def test_bitsandbytes_is_needed_for_quantized_models_only(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    check_quantization(FULL)
    assert problem_of(check_quantization, ModelConfig(load_in_4bit=True)).got.startswith("ModuleNotFoundError: ")


def test_a_policy_may_start_from_the_base_by_whatever_name(sft, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(sft)
    monkeypatch.chdir(sft.parent)
    for name in (None, str(sft), "sft", "./sft", str(tmp_path / "link")):
        check_start(str(sft), ModelConfig(model_name_or_path=name), "rewarded-lines.yaml")


def renamed(sft, folder):
    """Copy the model with two words of its vocabulary exchanged."""
    text = (copied(sft, folder) / "tokenizer.json").read_text()
    content = json.loads(text)
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def larger(sft, folder):
    model = make_model(0, blocks=1)
    model.resize_token_embeddings(302)
    return save_model(model, folder)


@pytest.mark.parametrize(
    ("make", "what", "entries"),
    [
        (copied, "the policy would not start from the SFT model", 300),
        (renamed, "the policy and the SFT model have different vocabularies", 300),
        (larger, "the policy and the SFT model have different vocabularies", 302),
    ],
)
def test_a_policy_that_would_not_start_from_the_base_is_refused(sft, tmp_path, make, what, entries):
    other = str(make(sft, tmp_path / "other"))
    problem = problem_of(check_start, str(sft), ModelConfig(model_name_or_path=other), "p.yaml")
    assert (problem.what, problem.where) == (what, "model_name_or_path, and `base` of p.yaml")
    assert (problem.expected, problem.got) == (f"{sft} (300 entries)", f"{other} ({entries} entries)")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folded_classifier_gives_the_logits_that_the_adapter_gave(sft, tmp_path, dtype):
    base, folder = tmp_path / "base", tmp_path / "reward"
    save_model(make_model(0, blocks=2).to(dtype), base)
    torch.manual_seed(1)
    save_adapter(
        base,
        folder,
        2,
        AutoModelForSequenceClassification,
        task_type="SEQ_CLS",
        target_modules=LINEAR,
        modules_to_save=["score"],
    )
    # By default the classifier has two labels; a reward model has one.
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({n: w[:1] if "score" in n else w for n, w in weights.items()}, folder / "adapter_model.safetensors")
    kind = AutoModelForSequenceClassification
    tuned = PeftModel.from_pretrained(kind.from_pretrained(base, num_labels=1, dtype=torch.float32), folder).eval()
    fold_classifier(folder, str(base), 1)
    whole, loading = kind.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not list(folder.glob("adapter_*")) and whole.config.num_labels == 1
    assert whole.config.pad_token_id == 1
    with torch.no_grad():
        expected, plain = tuned(input_ids=IDS).logits, kind.from_pretrained(base, num_labels=1)(input_ids=IDS).logits
        assert torch.allclose(whole.eval()(input_ids=IDS).logits, expected, atol=1e-5)
    assert not torch.allclose(plain.float(), expected, atol=0.1)


@pytest.mark.parametrize(
    ("load", "what"),
    [
        (load_tokenizer, "tokenizer"),
        (lambda name: load_policy(name, FULL), "model"),
        (lambda name: load_classifier(name, FULL), "model"),
        (lambda name: load_critic(name, LORA), "model"),
    ],
    ids=["tokenizer", "policy", "classifier", "critic"],
)
def test_a_missing_model_is_one_message(tmp_path, load, what):
    (tmp_path / "file").write_text("")
    for name in (str(tmp_path / "none"), str(tmp_path / "file"), "none"):
        problem = problem_of(load, name)
        assert (problem.where, problem.what) == (name, f"no {what} there") and "Hub id" in problem.expected
    problem = problem_of(load, "organisation/name")
    assert (problem.where, problem.what) == ("organisation/name", f"the {what} cannot be reached")
    assert "HF_HUB_OFFLINE" in problem.remedy and "\n" not in problem.got
    (tmp_path / "empty").mkdir()
    problem = problem_of(load, str(tmp_path / "empty"))
    assert problem.what == f"the {what} cannot be loaded" and "network" not in problem.remedy


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_model_cut_short_is_one_message(sft, tmp_path, file):
    shutil.copytree(sft, tmp_path / "cut")
    content = (sft / file).read_bytes()
    (tmp_path / "cut" / file).write_bytes(content[: len(content) // 2])
    problem = problem_of(load_policy, str(tmp_path / "cut"), FULL)
    assert (problem.where, problem.what) == (str(tmp_path / "cut"), "the model cannot be loaded")


def test_a_policy_has_the_dtype_and_attention_of_its_options(sft):
    policy = load_policy(str(sft), ModelConfig(dtype="bfloat16", attn_implementation="eager"))
    assert policy.dtype == torch.bfloat16 and policy.config._attn_implementation == "eager"
    assert "none of these" in str(problem_of(load_policy, str(sft), ModelConfig(attn_implementation="none of these")))


def test_folders_are_named_by_their_absolute_path_and_hub_ids_as_they_are(sft, monkeypatch):
    monkeypatch.chdir(sft.parent)
    assert absolute("sft") == absolute("./sft") == str(sft.resolve()) and Path(absolute("sft")).is_absolute()
    assert absolute("organisation/name") == "organisation/name"
    for nothing in (None, ""):
        assert problem_of(absolute, nothing).what == "`model_name_or_path` is missing"


def test_a_model_is_known_by_its_weights_or_by_its_id(sft):
    assert (
        reference_hash(str(sft)) == weights_hash(sft) and reference_hash("a/b") == "a/b" and reference_hash(None) == ""
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"dtype": "bfloat16"}, {"revision": "main", "dtype": "bfloat16"}),
        ({"model_revision": "v2"}, {"revision": "v2", "dtype": "float32"}),
        ({"attn_implementation": "eager"}, {"revision": "main", "dtype": "float32", "attn_implementation": "eager"}),
    ],
)
def test_a_reference_model_is_loaded_as_the_policy_is(settings, expected):
    assert reference_loading(ModelConfig(**settings)) == expected


@pytest.mark.parametrize(
    ("wanted", "own", "expected"),
    [
        ("bfloat16", torch.float32, "bfloat16"),
        ("auto", torch.bfloat16, "bfloat16"),
        (None, torch.float16, "float16"),
        ("auto", torch.float64, "float32"),
    ],
)
def test_responses_are_sampled_in_the_policys_type(wanted, own, expected):
    model = make_model(0, blocks=1).to(own)
    assert generation_dtype(ModelConfig(dtype=wanted), model) == expected
