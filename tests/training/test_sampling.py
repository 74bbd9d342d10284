"""Responses outside of the trainer: equal to the evaluator's, from an unchanged model."""

import sys
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from types import MethodType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import PROMPTS, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rewarded_lines import extras
from rewarded_lines.config import GenerationSpec
from rewarded_lines.engines.isolated_engine import generate_isolated
from rewarded_lines.engines.load_engine import load_generator
from rewarded_lines.errors import UserError
from rewarded_lines.training import sampling
from rewarded_lines.training.sampling import choose_engine, sample

SPEC = GenerationSpec(temperature=0.9, top_p=0.95, max_tokens=8, seed=3)
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:2]]
TEMPLATE = "{% for turn in messages %}<s>{{ turn.content }}</s>{% endfor %}"


@pytest.fixture
def model():
    return make_model(0)


def answers(model, prompts=PROMPTS, spec=SPEC, tokenizer=None):
    made = sample("hf", model, "no such folder", tokenizer or make_tokenizer(), spec, prompts)
    return [response.text for response in made]


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_loaded_model_answers_as_the_evaluators_engine_would(tiny, apart):
    """Texts and chats, from a model in training mode; the engine in this process, or in one of its own."""
    (tiny / "sft" / "chat_template.jinja").write_text(TEMPLATE)
    model, tokenizer = AutoModelForCausalLM.from_pretrained("sft").train(), AutoTokenizer.from_pretrained("sft")
    prompts = [*CHATS, *PROMPTS]
    spec = SPEC.model_copy(update={"max_tokens": 4})
    responses = answers(model, prompts, spec, tokenizer)
    if apart:
        expected = generate_isolated("hf", "sft", spec, prompts)
    else:
        engine = load_generator("hf", "sft", spec, prompts)
        (expected,) = engine.generate(prompts, spec)
        engine.close()
    assert responses == [one.text for one in expected]
    assert len(set(responses)) > 3 and responses[:2] != responses[2:4]


def test_a_process_of_its_own_that_fails_says_why():
    with pytest.raises(UserError) as caught:
        generate_isolated("vlm", "sft", SPEC, PROMPTS)
    (problem,) = caught.value.problems
    assert problem.what == "sampling responses failed with exit code 1" and problem.where == "sft, engine vlm"
    assert "unknown engine `vlm`" in problem.got


@pytest.mark.parametrize("training", [True, False])
def test_a_loaded_model_is_given_back_as_it_was(model, training):
    own = GenerationConfig(max_new_tokens=3, repetition_penalty=7.0, eos_token_id=5)
    model.generation_config = own
    model.train(training)
    model.model.layers[0].self_attn.attention_dropout = 0.5
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    first = answers(model)
    assert model.training is training and model.generation_config is own and own.repetition_penalty == 7.0
    assert all(torch.equal(weight.cpu(), before[name]) for name, weight in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert answers(model) == first and any(len(make_tokenizer()(text)["input_ids"]) > 3 for text in first)
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_trained_model_answers_in_its_own_precision(model):
    """With `bf16`, accelerate leaves autocast in the forward pass of the trained model."""
    before = sample("hf", model, "", make_tokenizer(), SPEC, PROMPTS)
    autocast = torch.autocast("cpu", torch.bfloat16)(model.forward.__func__)
    model._original_forward, model.forward = model.forward, MethodType(autocast, model)
    ids, wrapped = torch.tensor([[5, 6, 7]]), model.forward
    assert model(ids).logits.dtype == torch.bfloat16
    assert sample("hf", model, "", make_tokenizer(), SPEC, PROMPTS) == before and model.forward == wrapped


def test_an_adapter_counts_and_its_base_is_given_back_as_it_was(model):
    greedy, own = SPEC.model_copy(update={"temperature": 0.0}), model.generation_config
    plain = answers(model, spec=greedy)
    torch.manual_seed(0)
    adapted = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    responses = answers(adapted.train(), spec=greedy)
    assert adapted.training and model.generation_config is own and adapted.generation_config is own
    assert responses != plain and answers(adapted.merge_and_unload(), spec=greedy) == responses


def test_a_loaded_model_is_given_back_also_when_it_fails(model):
    own = model.generation_config
    model.train()
    model.model.forward = None
    with pytest.raises(TypeError):
        answers(model)
    assert model.training and model.generation_config is own


def test_an_answer_depends_on_its_place_and_seed_only(model):
    repeated = answers(model, [PROMPTS[0]] * 6)
    assert len(set(repeated)) > 1 and answers(model, [PROMPTS[0]] * 2) == repeated[:2]
    assert answers(model, [PROMPTS[0]] * 6, SPEC.model_copy(update={"seed": 4})) != repeated
    assert answers(model, []) == []


def test_a_tokenizer_without_padding_serves_as_well(model):
    """GPT-2's and Llama's own tokenizers have none."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    assert answers(model, tokenizer=tokenizer) == answers(model)
    assert tokenizer.pad_token is None


def test_a_prompt_that_does_not_fit_is_a_fault_for_a_loaded_model_too(model):
    with pytest.raises(UserError, match="do not fit the model"):
        answers(model, ["the " * 200])


def test_a_prompt_without_tokens_is_a_fault_for_a_loaded_model_too(model):
    with pytest.raises(UserError, match="a prompt has no tokens"):
        answers(model, ["dog", ""])


@pytest.mark.parametrize(("engine", "sharded"), [("vllm", False), ("hf", True), ("vllm", True)])
def test_vllm_and_models_in_pieces_get_a_process_of_their_own(monkeypatch, model, engine, sharded):
    asked = []
    monkeypatch.setattr(sampling, "is_sharded", lambda: sharded)
    monkeypatch.setattr(sampling, "generate_isolated", lambda *args: asked.append(args) or ["x"])
    assert sample(engine, model, "folder", make_tokenizer(), SPEC, PROMPTS[:1]) == ["x"]
    assert asked == [(engine, "folder", SPEC, PROMPTS[:1])]


class OnGpu:
    """A model that records its moves."""

    def __init__(self, **attributes):
        self.device, self.moves = torch.device("cuda"), []
        self.__dict__.update(attributes)

    def to(self, device):
        self.moves.append(str(device))


@pytest.mark.parametrize(("attributes", "moves"), [({}, ["cpu", "cuda"]), ({"is_loaded_in_4bit": True}, [])])
@pytest.mark.parametrize("fails", [True, False])
def test_a_model_leaves_the_gpu_to_the_other_process_and_comes_back(monkeypatch, attributes, moves, fails):
    model = OnGpu(**attributes)

    def generate(*_):
        assert model.moves == moves[:1]
        return 1 / 0 if fails else ["x"]

    monkeypatch.setattr(sampling, "generate_isolated", generate)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        assert sample("vllm", model, "folder", make_tokenizer(), SPEC, PROMPTS[:1]) == ["x"]
    assert model.moves == moves


def test_a_single_process_is_not_sharded():
    assert sampling.is_sharded() is False


@pytest.mark.parametrize(
    ("wanted", "installed", "engine"),
    [("auto", True, "vllm"), ("auto", False, "hf"), ("hf", True, "hf"), ("hf", False, "hf"), ("vllm", True, "vllm")],
)
def test_vllm_is_used_if_installed_unless_an_engine_is_named(monkeypatch, wanted, installed, engine):
    monkeypatch.setattr(extras, "find_spec", lambda name: ModuleSpec(name, None, origin="there") if installed else None)
    assert choose_engine(wanted) == engine


@pytest.mark.parametrize(("wanted", "said"), [("vllm", "vllm not installed"), ("vlm", "unknown engine `vlm`")])
def test_a_missing_engine_is_refused(monkeypatch, wanted, said):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=said):
        choose_engine(wanted)
