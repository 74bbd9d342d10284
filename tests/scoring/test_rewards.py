"""Rewards through their declaration: functions and classifiers, and every way in which they can fail."""

import math

import pytest
import torch
from tiny_models import make_tokenizer

from rewarded_lines.config import RewardSpec, parse_format
from rewarded_lines.errors import UserError
from rewarded_lines.scoring.rewards import fill_template, load_reward

FILE = """\
import math


def words(prompts, responses):
    return [len(response.split()) for response in responses]


def raises(prompts, responses):
    return [1 / len(response) for response in responses]


def nan(prompts, responses):
    return [math.nan if response == "bad" else 1.0 for response in responses]


def too_few(prompts, responses):
    return [1.0] * (len(responses) - 1)


def text(prompts, responses):
    return ["high" for _ in responses]


def only_in_batches(prompts, responses):
    if len(responses) > 1:
        raise ValueError("too many")
    return [1.0]
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "rewards.py").write_text(FILE)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    return tmp_path


def function(root, reference):
    return load_reward("mine", RewardSpec(function=reference), root)


def test_function_scores(root):
    assert function(root, "rewards.py:words").score(["a", "b"], ["one two", ""]) == [2.0, 0.0]
    assert function(root, "statistics:fmean") is not None


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("rewards.py:wordz", "did you mean `words`"),
        ("absent.py:words", "no such file"),
        ("broken.py:words", "ModuleNotFoundError"),
        ("no.such.module:words", "ModuleNotFoundError"),
        ("words", "not a function reference"),
    ],
)
def test_functions_that_cannot_be_found(root, reference, said):
    with pytest.raises(UserError, match=said):
        function(root, reference)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", "ZeroDivisionError.*prompt 1: 'q' → ''"),
        ("nan", "not a finite number.*nan for prompt 2: 'r' → 'bad'"),
        ("too_few", "wrong number of scores.*expected: 3.*got: 2.*prompt 2: 'r' → 'bad'"),
        ("text", "not a finite number.*'high' for prompt 0"),
        ("only_in_batches", "batch of 3 prompts, though on none of them alone"),
    ],
)
def test_a_failing_function_names_the_prompt(root, name, said):
    import re

    with pytest.raises(UserError) as caught:
        function(root, f"rewards.py:{name}").score(["p", "q", "r"], ["fine", "", "bad"])
    assert re.search(said, str(caught.value), re.DOTALL)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        num_labels=2,
    )
    folder = tmp_path_factory.mktemp("classifier") / "reward"
    LlamaForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_classifier_equals_the_model_itself(classifier):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(classifier)
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    prompts, responses = ["the quick", "a", "of great beauty"], [" brown fox", " film of little else", " and"]
    logits = []
    for prompt, response in zip(prompts, responses, strict=True):
        with torch.no_grad():
            logits.append(model(**tokenizer(f"Q: {prompt} A:{response}", return_tensors="pt")).logits[0].double())
    for form, expected in (
        ("0", [row[0] for row in logits]),
        ("1-0", [row[1] - row[0] for row in logits]),
        ("0x0.4", [0.4 * row[0] for row in logits]),
    ):
        spec = RewardSpec(model=str(classifier), format=form, template="Q: {prompt} A:{response}", batch_size=2)
        scores = load_reward("r", spec, device="cpu").score(prompts, responses)
        assert all(math.isclose(a, b, abs_tol=1e-5) for a, b in zip(scores, expected, strict=True))


def test_classifier_scores_the_empty_text(classifier):
    spec = RewardSpec(model=str(classifier), template="{response}")
    assert len(load_reward("r", spec, device="cpu").score([""], [""])) == 1


def test_a_model_that_is_no_classifier_is_refused(tiny):
    with pytest.raises(UserError, match=r"(?s)not a classifier.*score\.weight"):
        load_reward("r", RewardSpec(model="sft"), tiny)


def test_a_text_that_the_classifier_cannot_read_whole_is_refused(classifier):
    spec = RewardSpec(model=str(classifier), max_tokens=8)
    with pytest.raises(UserError, match="(?s)too long for the classifier.*prompt 1"):
        load_reward("r", spec, device="cpu").score(["a", "b"], [" film", " jumps over the lazy dog" * 4])


def test_a_damaged_classifier_is_refused(classifier, tmp_path):
    import shutil

    shutil.copytree(classifier, tmp_path / "cut")
    file = tmp_path / "cut/model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_reward("r", RewardSpec(model="cut"), tmp_path)


def test_classifiers_that_cannot_be_loaded(classifier, tmp_path):
    with pytest.raises(UserError, match="no model there"):
        load_reward("r", RewardSpec(model="absent"), tmp_path)
    with pytest.raises(UserError, match="class that the model does not have"):
        load_reward("r", RewardSpec(model=str(classifier), format="2-0"), tmp_path)


@pytest.mark.parametrize(
    ("text", "terms"),
    [("0", ((0, 1.0),)), ("1-0", ((1, 1.0), (0, -1.0))), ("0x0.4", ((0, 0.4),)), ("-2x3+1", ((2, -3.0), (1, 1.0)))],
)
def test_formats(text, terms):
    assert parse_format(text) == terms


@pytest.mark.parametrize("text", ["", "x", "0x", "1--0", "0.5"])
def test_formats_refused(text):
    with pytest.raises(ValueError, match="not a reward format"):
        parse_format(text)


@pytest.mark.parametrize(
    ("template", "prompt", "response", "text"),
    [
        ("{prompt}{response}", "a", "b", "ab"),
        ("Q: {prompt}\nA: {response}", " a ", "", "Q:  a \nA: "),
        ("{response} to {prompt}, {response}", "a", "b", "b to a, b"),
        ("{response}", "a", "b", "b"),
        ("{prompt}|{response}", "{response}", "{prompt}", "{response}|{prompt}"),
        ("{prompt}|{response}", "{prompt}{response}", "{", "{prompt}{response}|{"),
        ("{prompt}|{response}", "\\1 \\g<0> %s", "{0} {} $x", "\\1 \\g<0> %s|{0} {} $x"),
        ("{{prompt}} {other} {prompt!r} {response}", "a", "b", "{a} {other} {prompt!r} b"),
        ('{"q": "{prompt}", "a": "{response}"}', "a", "b", '{"q": "a", "a": "b"}'),
    ],
)
def test_only_the_templates_own_placeholders_are_filled(template, prompt, response, text):
    assert fill_template(template, prompt, response) == text


def test_a_classifier_reads_what_looks_like_a_placeholder_as_text(classifier):
    spec = RewardSpec(model=str(classifier), template="{prompt}:{response}")
    joined = RewardSpec(model=str(classifier), template="{response}")
    (score,) = load_reward("r", spec, device="cpu").score(["{response}"], ["{prompt}"])
    (same,) = load_reward("r", joined, device="cpu").score([""], ["{response}:{prompt}"])
    assert score == pytest.approx(same, abs=1e-6)
