"""Functions and classifiers are loaded as declared, and every fault of them is one message."""

import pytest
import torch

from rewarded_lines.config_values import parse_format
from rewarded_lines.errors import UserError
from rewarded_lines.processes import available_memory
from rewarded_lines.projects import load_project
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards import load_rewards as rewards_module
from rewarded_lines.rewards.classifier_backends import find_device
from rewarded_lines.rewards.classifier_inputs import fill_template
from rewarded_lines.rewards.load_rewards import load_reward, load_rewards

FILE = """\
def words(prompts, responses):
    return [len(response.split()) for response in responses]


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


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("rewards.py:wordz", "did you mean `words`"),
        ("absent.py:words", "no such file"),
        ("broken.py:words", "ModuleNotFoundError"),
        ("no.such.module:words", "ModuleNotFoundError"),
        ("words", "no ready function `words`"),
        (":words", "not a function reference"),
    ],
)
def test_functions_that_cannot_be_found(root, reference, said):
    with pytest.raises(UserError, match=said):
        function(root, reference)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("text", "not a finite number.*'high' for prompt 0"),
        ("only_in_batches", "batch of 3 prompts, though on none of them alone"),
    ],
)
def test_a_failing_function_names_the_prompt(root, name, said):
    import re

    with pytest.raises(UserError) as caught:
        function(root, f"rewards.py:{name}").score(["p", "q", "r"], ["fine", "", "bad"])
    assert re.search(said, str(caught.value), re.DOTALL)


@pytest.fixture
def classifier(classifiers):
    return classifiers["llama"]


def test_a_model_that_is_no_classifier_is_refused(tiny):
    with pytest.raises(UserError, match=r"(?s)not a classifier.*score\.weight"):
        load_reward("r", RewardSpec(model="sft"), tiny)


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


def test_a_freed_classifier_comes_back_by_itself(classifier):
    reward = load_reward("r", RewardSpec(model=str(classifier), format="0"), device="cpu")
    assert reward.loaded and reward.device == "cpu"
    # Token embeddings, two blocks, the last norm, two classes, and the rotary frequencies.
    assert reward.size == pytest.approx(4 * (300 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32 + 64), rel=0.01)
    scores = reward.score(["a film", "x"], [" of beauty", ""])
    reward.free()
    reward.free()
    assert not reward.loaded
    assert reward.score(["a film", "x"], [" of beauty", ""]) == scores and reward.loaded
    half = load_reward("r", RewardSpec(model=str(classifier), format="0", dtype="bfloat16"), device="cpu")
    assert half.size == pytest.approx(reward.size / 2, rel=0.01)


def test_a_classifier_that_changes_while_it_is_freed_is_refused(classifier, tmp_path):
    import shutil

    shutil.copytree(classifier, tmp_path / "model")
    reward = load_reward("r", RewardSpec(model="model", format="0"), tmp_path, "cpu")
    reward.free()
    (tmp_path / "model/config.json").write_text((tmp_path / "model/config.json").read_text() + " ")
    with pytest.raises(UserError, match="changed since it was first loaded"):
        reward.score(["p"], ["r"])


@pytest.mark.parametrize(
    ("device", "said"),
    [("gpu", "not a device"), ("cuda:99", "no such device here"), ("meta", "no scores"), ("cpu:x", "not a device")],
)
def test_devices_that_are_not_there(classifier, device, said):
    with pytest.raises(UserError, match=f"reward `r`: {said}"):
        load_reward("r", RewardSpec(model=str(classifier), format="0", device=device), device="cpu")
    with pytest.raises(UserError, match=f"reward `r`: {said}"):
        load_reward("r", RewardSpec(model=str(classifier), format="0"), device=device)


def test_the_declared_device_comes_before_the_command_lines(classifier):
    reward = load_reward("r", RewardSpec(model=str(classifier), format="0", device="cpu"), device="cuda:99")
    assert reward.device == "cpu"
    assert find_device("auto", "here") == ("cuda:0" if torch.cuda.is_available() else "cpu")
    assert available_memory("cpu") > 1 << 20


def test_a_gpu_has_one_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    found = [find_device(device, "here") for device in ("auto", "cuda", "cuda:0", "cuda:1", "cpu")]
    assert found == ["cuda:0", "cuda:0", "cuda:0", "cuda:1", "cpu"]


def test_all_rewards_are_loaded_and_give_room_to_the_next(tiny, classifier, monkeypatch):
    text = (tiny / "rewarded-lines.yaml").read_text()
    models = "".join(
        f"  {name}:\n    model: {classifier}\n    format: 0\n    role: audit\n" for name in ("one", "two", "three")
    )
    (tiny / "rewarded-lines.yaml").write_text(text.replace("prompts:\n", models + "prompts:\n", 1))
    rewards = load_rewards(load_project(), device="cpu")
    assert list(rewards) == ["words", "letters", "one", "two", "three"]
    assert all(reward.loaded for reward in rewards.values())
    monkeypatch.setattr(rewards_module, "available_memory", lambda device: 0)
    rewards = load_rewards(load_project(), device="cpu")
    assert not any(rewards[name].loaded for name in ("one", "two", "three"))
    assert rewards["one"].score(["a"], ["b"]) == rewards["three"].score(["a"], ["b"])
    assert list(load_rewards(load_project(), ["two"], "cpu")) == ["two"]
