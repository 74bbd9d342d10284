"""A policy's task: it scores the SFT model's responses and sets how responses are sampled."""

from types import SimpleNamespace

import pytest
from tiny_models import PROMPTS, make_model, make_tokenizer

from rewarded_lines.config import GenerationSpec
from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.errors import UserError
from rewarded_lines.projects import load_project
from rewarded_lines.rewards.reward import Reward
from rewarded_lines.training.policy_task import PolicyTask
from rewarded_lines.training.recipe_options import DataOptions, RewardOptions, RunOptions
from rewarded_lines.training.sampling import sample
from rewarded_lines.training.training_reward import WeightedReward

SPEC = GenerationSpec(temperature=0.9, top_p=0.95, max_tokens=8, seed=3)

ROWS = [{"prompt": prompt} for prompt in PROMPTS]


class Length(Reward):
    name, fingerprint = "length", ""

    def score(self, prompts, responses, columns=None):
        return [float(len(prompt) + 100 * len(response)) for prompt, response in zip(prompts, responses, strict=True)]


@pytest.fixture
def task():
    tokenizer = make_tokenizer()
    reader = ResponseReader(tokenizer, frozenset([tokenizer.eos_token_id]))
    reward = WeightedReward({"length": Length()}, {"length": 2.0})
    rows = [{"prompt": "dog"}]
    options = (RunOptions(), DataOptions(), RewardOptions(reward="length"))
    return PolicyTask("base", tokenizer, reader, SPEC, reward, rows, ROWS, {}, *options, len(rows))


def test_a_task_scores_its_models_responses_by_every_reward(task):
    model = make_model(0)
    made = sample("hf", model, "no such folder", task.tokenizer, SPEC, PROMPTS)
    expected = {"length": Length().score(PROMPTS, [response.text for response in made])}
    assert task.measure(SPEC, model, "no such folder") == expected
    task.measure_base(SPEC, model)
    assert task.before == expected and task.reward.scales["length"][1] > 0
    assert task.heading("PPO", "1 prompt").startswith(
        "PPO of base for `length`, 1 prompt; the SFT model scores `length`"
    )


@pytest.mark.parametrize(
    ("declared", "section"),
    [
        ("mixtures: {bone: {length: 0.7, words: 0.3}}", "policies"),
        ("mixtures: {other: {length: 0.7, words: 0.3}}", "baselines"),
        # As the project of a round names its policies before they are there.
        ("policies: {bone: model}", "policies"),
    ],
)
def test_a_policy_of_a_mixture_is_merged_if_the_project_declares_it(task, tmp_path, declared, section):
    file = tmp_path / "project.yaml"
    file.write_text(declared)
    task.options = RunOptions(project_file=str(file))
    task.rewards = RewardOptions(rewards={"length": 0.7, "words": 0.3}, policy_name="bone")
    task.reward = WeightedReward({"length": Length(), "words": Length()}, task.rewards.weights())
    task.add_to_project(SimpleNamespace(output=tmp_path / "model"))
    config = load_project(file).config
    assert {"policies": config.policies, "baselines": config.baselines}[section] == {"bone": "model"}
    assert len(config.policies) + len(config.baselines) == 1


def test_responses_are_sampled_with_the_projects_ends_and_the_recipes_settings(task):
    spec = task.spec(temperature=0.5, max_tokens=3)
    assert (spec.temperature, spec.max_tokens) == (0.5, 3)
    assert spec.stop_token_ids == (task.tokenizer.eos_token_id,)
    # A date as the seed of a training.
    assert task.spec(seed=20240613).seed == 240613 and task.spec(seed=7).seed == 7
    with pytest.raises(UserError, match="arguments of the recipe: top_p(.|\n)*greater than 0"):
        task.spec(top_p=0.0)
    assert task.train_prompts == ["dog"] and not task.chats
