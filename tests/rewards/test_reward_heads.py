"""Reward models as they come: every form gives the value that its own library computes, or is refused with a remedy."""

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_model, make_tokenizer, save_model

from rewarded_lines.errors import UserError
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.load_rewards import load_reward

PROMPTS = ["the quick", "a film", "dog", ""]
RESPONSES = [" brown fox", " of great beauty and", "", " lazy"]
# The text ends with the end token, which these models pad with.
TEMPLATE = "{prompt}A:{response}</s>"


def tokens():
    tokenizer = make_tokenizer()
    return [
        torch.tensor([tokenizer(f"{prompt}A:{response}</s>")["input_ids"]])
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]


def scores(folder, **options):
    spec = RewardSpec(model=str(folder), template=TEMPLATE, batch_size=2, **options)
    return load_reward("r", spec, device="cpu").score(PROMPTS, RESPONSES)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def states(model):
    """Return the last hidden state of each text."""
    with torch.no_grad():
        return [model(ids, output_hidden_states=True).hidden_states[-1][0, -1] for ids in tokens()]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A language model, a head with bias, and two LoRA adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    root = tmp_path_factory.mktemp("forms")
    save_model(make_model(1, blocks=2), root / "base")
    edit(root / "base/config.json", pad_token_id=2)
    torch.manual_seed(0)
    head = {"v_head.summary.weight": torch.randn(1, 64), "v_head.summary.bias": torch.randn(1)}
    save_file(head, root / "head.safetensors", {"format": "pt"})
    for name, kind, options in (
        ("lora", AutoModelForSequenceClassification, {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}),
        ("language", AutoModelForCausalLM, {"task_type": "CAUSAL_LM"}),
    ):
        model = kind.from_pretrained(root / "base", **({"num_labels": 3} if name == "lora" else {}))
        tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **options))
        for weight in tuned.parameters():
            if weight.requires_grad:
                torch.nn.init.normal_(weight, std=0.2)
        tuned.save_pretrained(root / name)
        edit(root / name / "adapter_config.json", base_model_name_or_path="../base")
    return root


@pytest.fixture
def forms(source, tmp_path):
    """A copy of the source to write into."""
    shutil.copytree(source, tmp_path / "forms")
    return tmp_path / "forms"


def head_of(root):
    stored = load_file(root / "head.safetensors")
    return stored["v_head.summary.weight"][0], stored["v_head.summary.bias"][0]


def make_trl(root, prefix="", **options):
    """Save as TRL up to 1.12 does, and DeepSpeed with a prefix."""
    model = load_file(root / "base/model.safetensors")
    named = {f"{prefix}{name}": value for name, value in model.items()}
    save_file({**named, **load_file(root / "head.safetensors")}, root / "base/model.safetensors", {"format": "pt"})
    return root / "base"


def make_sharded(root):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(root / "base")
    state = {**model.state_dict(), **load_file(root / "head.safetensors")}
    model.save_pretrained(root / "shards", state_dict=state, max_shard_size="60KB")
    make_tokenizer().save_pretrained(root / "shards")
    assert (root / "shards/model.safetensors.index.json").is_file()
    return root / "shards"


def make_factory(root):
    shutil.copy(root / "head.safetensors", root / "base/value_head.safetensors")
    return root / "base"


@pytest.mark.parametrize(
    "make", [make_trl, lambda root: make_trl(root, "pretrained_model."), make_sharded, make_factory]
)
def test_value_heads_give_the_value_of_the_last_token(forms, make):
    from transformers import AutoModelForCausalLM

    weight, bias = head_of(forms)
    expected = [float(weight @ state + bias) for state in states(AutoModelForCausalLM.from_pretrained(forms / "base"))]
    assert scores(make(forms)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("prefix", ["value_head", "score", "mine"])
@pytest.mark.parametrize("normalized", [True, False])
def test_openrlhfs_heads_have_a_name_a_mean_and_a_deviation(forms, prefix, normalized):
    from transformers import AutoModelForCausalLM

    weight, _ = head_of(forms)
    raw = [float(weight @ state) for state in states(AutoModelForCausalLM.from_pretrained(forms / "base"))]
    file = forms / "base/model.safetensors"
    save_file({**load_file(file), f"{prefix}.weight": weight[None]}, file, {"format": "pt"})
    named = {} if prefix == "value_head" else {"value_head_prefix": prefix}
    edit(forms / "base/config.json", normalize_reward=normalized, mean=0.5, std=2.0, **named)
    expected = [(value - 0.5) / 2.0 for value in raw] if normalized else raw
    assert scores(forms / "base") == pytest.approx(expected, abs=1e-4)


def test_a_declared_head_with_a_bias_is_no_head_for_tokens(forms):
    from transformers import AutoModelForCausalLM

    weight, bias = head_of(forms)
    raw = [float(weight @ state + bias) for state in states(AutoModelForCausalLM.from_pretrained(forms / "base"))]
    file = forms / "base/model.safetensors"
    save_file({**load_file(file), "score.weight": weight[None], "score.bias": bias}, file, {"format": "pt"})
    edit(forms / "base/config.json", value_head_prefix="score")
    assert scores(forms / "base") == pytest.approx(raw, abs=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_safe_rlhfs_heads_read_the_last_token(forms, bias):
    from transformers import AutoModelForCausalLM

    weight, shift = head_of(forms)
    shift = shift if bias else torch.zeros(())
    hidden = states(AutoModelForCausalLM.from_pretrained(forms / "base"))
    expected = [-float(weight @ state + shift) for state in hidden]
    file = forms / "base/model.safetensors"
    stored = {name: value for name, value in load_file(file).items() if not name.startswith("lm_head")}
    head = {"score_head.weight": weight[None], **({"score_head.bias": shift[None]} if bias else {})}
    save_file({**stored, **head}, file, {"format": "pt"})
    edit(forms / "base/config.json", architectures=["LlamaForScore"], score_dim=1, bias=bias, do_normalize=False)
    assert scores(forms / "base", format="-0") == pytest.approx(expected, abs=1e-4)
    edit(forms / "base/config.json", do_normalize=True)
    with pytest.raises(UserError, match="use a copy with `do_normalize: false`"):
        scores(forms / "base")


def test_an_adapter_of_a_reward_model_scores_as_in_peft(forms, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(forms / "base", num_labels=3)
    # The base pads with the end token, so the head reads the token before it.
    model = PeftModel.from_pretrained(base, forms / "lora").eval()
    with torch.no_grad():
        expected = [model(input_ids=ids).logits[0] for ids in tokens()]
    assert scores(forms / "lora", format="2") == pytest.approx([float(row[2]) for row in expected], abs=1e-4)
    assert scores(forms / "lora", format="LABEL_1 - 0.5 x LABEL_0") == pytest.approx(
        [float(row[1] - 0.5 * row[0]) for row in expected], abs=1e-4
    )
    # Also relative to the working folder, as PEFT reads it.
    edit(forms / "lora/adapter_config.json", base_model_name_or_path="base")
    monkeypatch.chdir(forms)
    assert scores(forms / "lora", format="0") == pytest.approx([float(row[0]) for row in expected], abs=1e-4)


def test_a_language_models_adapter_with_a_value_head(forms):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    shutil.copy(forms / "head.safetensors", forms / "language/value_head.safetensors")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(forms / "base"), forms / "language").eval()
    weight, bias = head_of(forms)
    expected = [float(weight @ state + bias) for state in states(model)]
    assert scores(forms / "language") == pytest.approx(expected, abs=1e-4)


def test_what_decides_an_adapters_scores_is_in_its_fingerprint(forms):
    def fingerprint():
        return load_reward("r", RewardSpec(model=str(forms / "lora"), format="0"), device="cpu").fingerprint

    first = fingerprint()
    state = load_file(forms / "base/model.safetensors")
    state["model.norm.weight"] += 1
    save_file(state, forms / "base/model.safetensors", {"format": "pt"})
    assert fingerprint() != first


def run(remedy):
    """Run the command of a remedy, `python -c "…"`, in this process."""
    exec(shlex.split(remedy)[2], {})


def test_pickled_heads_are_refused_with_a_command_that_converts_them(forms):
    head = load_file(forms / "head.safetensors")
    # TRL leaves the head of an adapter in this file.
    torch.save(head, forms / "language/pytorch_model.bin")
    with pytest.raises(UserError, match="pickle can run code") as caught:
        scores(forms / "language")
    run(caught.value.problems[0].remedy)
    converted = scores(forms / "language")
    shutil.copy(forms / "head.safetensors", forms / "language/value_head.safetensors")
    assert converted == scores(forms / "language")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda forms: edit(forms / "lora/adapter_config.json", base_model_name_or_path="/no"), "base.*'/no'.*write"),
        (lambda forms: (forms / "lora/adapter_model.safetensors").unlink(), "adapter without weights"),
        (lambda forms: edit(forms / "lora/adapter_config.json", peft_type="IA3"), "IA3"),
        (lambda forms: shutil.copytree(forms / "language", forms / "lora", dirs_exist_ok=True), "not a classifier"),
        (lambda forms: shutil.copy(forms / "base/model.safetensors", forms / "lora"), "both an adapter and a whole"),
    ],
)  # fmt: skip
def test_adapters_that_cannot_score(forms, change, said):
    change(forms)
    with pytest.raises(UserError, match=f"(?s){said}"):
        scores(forms / "lora")


def test_a_head_that_does_not_fit_is_refused(forms):
    save_file({"v_head.summary.weight": torch.ones(1, 9)}, forms / "base/value_head.safetensors")
    with pytest.raises(UserError, match=r"(?s)head `v_head.summary` does not fit.*\(1, 64\).*\(1, 9\)"):
        scores(forms / "base")
    save_file({"other.0.weight": torch.ones(1, 64), **load_file(forms / "base/model.safetensors")},
              forms / "base/model.safetensors", {"format": "pt"})  # fmt: skip
    (forms / "base/value_head.safetensors").unlink()
    with pytest.raises(UserError, match=r"(?s)not a classifier.*it holds other\.0\.weight"):
        scores(forms / "base")


def test_vllm_refuses_other_forms_with_a_command_that_makes_a_whole_model(forms):
    pytest.importorskip("vllm")
    with pytest.raises(UserError, match="(?s)vLLM does not read.*a LoRA adapter") as caught:
        scores(forms / "lora", backend="vllm")
    remedy = caught.value.problems[0].remedy
    assert remedy.startswith("use `backend: hf`, or make it a whole model: python -c")
    run(remedy.partition("model: ")[2])
    assert scores(forms / "lora-whole", format="2") == pytest.approx(scores(forms / "lora", format="2"), abs=1e-4)
    with pytest.raises(UserError, match="(?s)vLLM does not read.*the head `v_head.summary`"):
        scores(make_trl(forms), backend="vllm")


@pytest.fixture
def armo(tmp_path, monkeypatch):
    """A folder in ArmoRM's form, which asks a person in vain."""
    from transformers import LlamaConfig, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on stdin"))
    names = {0: "helpsteer-helpfulness", 1: "code-style", 2: "beavertails-is_safe"}
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    config = LlamaConfig(**sizes, **heads, id2label=names, num_objectives=3, initializer_range=0.2)
    auto = "AutoModelForSequenceClassification"
    config.auto_map = {auto: "modeling_custom.LlamaForRewardModelWithGating"}
    folder = tmp_path / "armo"
    config.save_pretrained(folder)
    edit(folder / "config.json", architectures=["LlamaForRewardModelWithGating"])
    make_tokenizer().save_pretrained(folder)
    shutil.copy(Path(__file__).with_name("armo_code.py"), folder / "modeling_custom.py")
    body = make_armo_weights(config)
    save_file(body, folder / "model.safetensors", {"format": "pt"})
    return folder


def make_armo_weights(config):
    from transformers import LlamaModel

    torch.manual_seed(0)
    body = {f"model.{name}": value.contiguous() for name, value in LlamaModel(config).state_dict().items()}
    sizes = {"regression_layer.weight": (3, 32), "reward_transform_matrix": (3, 3)}
    sizes |= {"gating.weight": (3, 32), "gating.bias": (3,)}
    return {**body, **{name: torch.randn(size) for name, size in sizes.items()}}


def armo_by_hand(folder):
    """Return rewards and score of each text, by transformers' Llama and a few products."""
    from transformers import LlamaConfig, LlamaModel

    stored = load_file(folder / "model.safetensors")
    model = LlamaModel(LlamaConfig.from_pretrained(folder))
    model.load_state_dict({name[6:]: value for name, value in stored.items() if name.startswith("model.")})
    rows = []
    for ids in tokens():
        with torch.no_grad():
            states = model.eval()(ids).last_hidden_state[0]
        rewards = stored["regression_layer.weight"] @ states[-1]
        prompt = states[ids[0].tolist().index(35)]
        gate = (stored["gating.weight"] @ prompt + stored["gating.bias"]).softmax(-1)
        rows.append([*rewards.tolist(), float(gate @ (rewards @ stored["reward_transform_matrix"]))])
    return rows


def test_own_code_runs_by_the_users_word_alone(armo):
    with pytest.raises(UserError, match=r"(?s)not a classifier.*regression_layer.*set `trust_remote_code: true`"):
        scores(armo)
    rows = armo_by_hand(armo)
    forms = {"1": [row[1] for row in rows], "score": [row[3] for row in rows]}
    forms["beavertails-is_safe - 0.5 x code-style"] = [row[2] - 0.5 * row[1] for row in rows]
    for form, expected in forms.items():
        assert scores(armo, format=form, trust_remote_code=True) == pytest.approx(expected, abs=1e-4)
    # Some name their class for any model.
    edit(armo / "config.json", auto_map={"AutoModel": "modeling_custom.LlamaForRewardModelWithGating"})
    assert scores(armo, format="2", trust_remote_code=True) == pytest.approx([row[2] for row in rows], abs=1e-4)
    with pytest.raises(UserError, match="(?s)format 'code style'.*'code-style'.*did you mean `code-style`"):
        scores(armo, format="code style", trust_remote_code=True)


# In the form of Qwen's (WorldPM), which InternLM's and POLAR's have a token for.
REWARD_CODE = """\
import torch
from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast


class LlamaForRewardModel(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None):
        rows, ends = torch.arange(len(input_ids)), attention_mask.sum(-1) - 1
        assert (input_ids[rows, ends] == self.config.reward_token_id).all()
        states = self.model(input_ids, attention_mask=attention_mask)[0]
        return SequenceClassifierOutputWithPast(logits=self.score(states[rows, ends]))
"""


def test_own_code_with_a_head_of_several_layers_reads_its_own_last_token(armo):
    from transformers import LlamaConfig, LlamaModel

    (armo / "modeling_custom.py").write_text(REWARD_CODE)
    whole = {"auto_map": {"AutoModel": "modeling_custom.LlamaForRewardModel"}, "reward_token_id": 9}
    edit(armo / "config.json", architectures=["LlamaForRewardModel"], **whole)
    kept = {name: one for name, one in load_file(armo / "model.safetensors").items() if name.startswith("model.")}
    sizes = {"0.weight": (32, 32), "0.bias": (32,), "2.weight": (1, 32), "2.bias": (1,)}
    head = {f"score.{name}": torch.randn(size) for name, size in sizes.items()}
    save_file({**kept, **head}, armo / "model.safetensors", {"format": "pt"})
    model = LlamaModel(LlamaConfig.from_pretrained(armo)).eval()
    model.load_state_dict({name[6:]: value for name, value in kept.items()})
    expected = []
    for ids in tokens():
        with torch.no_grad():
            state = model(torch.cat([ids, torch.tensor([[9]])], 1)).last_hidden_state[0, -1]
        inner = (head["score.0.weight"] @ state + head["score.0.bias"]).relu()
        expected.append(float(head["score.2.weight"] @ inner + head["score.2.bias"]))
    assert scores(armo, trust_remote_code=True) == pytest.approx(expected, abs=1e-4)


def test_the_base_and_the_policies_never_run_own_code(armo):
    from trl import ModelConfig

    from rewarded_lines.engines.tokenizers import load_config
    from rewarded_lines.training.load_models import load_policy

    # A class that only the folder's code knows, which transformers would ask for.
    auto_map = {"AutoConfig": "other--modeling_custom.Config", "AutoModelForCausalLM": "other--modeling_custom.Model"}
    edit(armo / "config.json", model_type="armo", auto_map=auto_map)
    for load in (lambda: load_config(str(armo)), lambda: load_policy(str(armo), ModelConfig()), lambda: scores(armo)):
        with pytest.raises(UserError, match="custom code"):
            load()


def test_own_code_that_misses_its_words_in_the_template_is_refused(armo):
    spec = RewardSpec(model=str(armo), format="0", template="{prompt} {response}", trust_remote_code=True)
    with pytest.raises(UserError, match="(?s)fails on a short text.*pattern not found.*template that the model"):
        load_reward("r", spec, device="cpu")


def test_own_code_without_rewards_is_refused_and_its_text_is_in_the_fingerprint(armo):
    spec = RewardSpec(model=str(armo), format="0", template=TEMPLATE, trust_remote_code=True)
    first = load_reward("r", spec, device="cpu").fingerprint
    code = armo / "modeling_custom.py"
    text = code.read_text()
    code.write_text(
        text.replace("rewards=rewards, gating_output=gate, score=score, logits=score", "gating_output=gate")
    )
    with pytest.raises(UserError, match="(?s)returns no rewards of whole texts.*got: gating_output"):
        load_reward("r", spec, device="cpu")
    code.write_text(text + "# another\n")
    assert load_reward("r", spec, device="cpu").fingerprint != first


def test_a_tokenizer_in_another_folder(forms):
    whole = scores(forms / "lora", format="0")
    (forms / "words").mkdir()
    for file in (forms / "base").glob("*token*"):
        file.rename(forms / "words" / file.name)
    with pytest.raises(UserError, match="name another folder or Hub id as `tokenizer`"):
        scores(forms / "lora")
    assert scores(forms / "lora", format="0", tokenizer=str(forms / "words")) == whole


@pytest.mark.parametrize("architectures", [["LlamaForTokenClassification"], None])
def test_a_process_reward_model_is_no_classifier_of_texts(forms, architectures):
    from transformers import AutoModelForTokenClassification

    model = AutoModelForTokenClassification.from_pretrained(forms / "base", num_labels=2)
    model.save_pretrained(forms / "base")
    # Trainers that wrap a model save no architecture.
    edit(forms / "base/config.json", architectures=architectures)
    with pytest.raises(UserError, match="the head scores tokens or steps"):
        scores(forms / "base", format="1")


def test_the_stored_head_says_how_many_classes_there_are(forms):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(forms / "base", num_labels=5).eval()
    model.save_pretrained(forms / "base")
    config = json.loads((forms / "base/config.json").read_text())
    (forms / "base/config.json").write_text(json.dumps({k: v for k, v in config.items() if "label" not in k}))
    with torch.no_grad():
        expected = [float(model(ids).logits[0, 4]) for ids in tokens()]
    assert scores(forms / "base", format="4") == pytest.approx(expected, abs=1e-4)


def test_several_classes_need_a_format(forms):
    with pytest.raises(UserError, match="(?s)several classes.*LABEL_0.*write `format: .2.`"):
        scores(forms / "lora")
