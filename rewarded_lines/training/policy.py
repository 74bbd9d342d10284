"""What every policy's recipe begins and ends with: the SFT model, the reward, prompts, and what was gained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl import ModelConfig
from trl.data_utils import maybe_extract_prompt

from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.prompts import Prompt, with_turns
from rewarded_lines.data.rows import Layouts, Row, read_rows, rows_hash
from rewarded_lines.errors import fail
from rewarded_lines.learning.models import absolute, check_start, load_tokenizer, reference_hash
from rewarded_lines.projects import PROJECT_FILE, Project, load_project
from rewarded_lines.rewarding.rewards import WeightedReward, load_training_reward
from rewarded_lines.rewarding.sampling import Parts, Sampler, describe, gains, summary
from rewarded_lines.training.options import DataOptions, RewardOptions, RunOptions
from rewarded_lines.training.project import register
from rewarded_lines.training.run import TrainingRun, from_main, say


@dataclass
class PolicyTask:
    """A policy to be trained, before any of its models is loaded.

    Attributes:
        base: the SFT model, by its absolute path or Hub id.
        tokenizer: the base's.
        reward: what it is trained for.
        rows: to train on.
        prompts: to measure on.
        inputs: hashes of all of these.
    """

    base: str
    tokenizer: Any
    reward: WeightedReward
    rows: list[Row]
    prompts: list[Prompt]
    inputs: dict[str, Any]
    options: RunOptions
    rewards: RewardOptions
    before: Parts = field(default_factory=dict)

    def sampler(self, spec: GenerationSpec) -> Sampler:
        """Return what answers the validation prompts and scores the answers."""
        return Sampler(self.reward, self.tokenizer, spec)

    def measure_base(self, sampler: Sampler, model: Any) -> None:
        """Score the SFT model's responses, and standardize the reward on them if it is to be.

        Raises:
            UserError: a reward gives every response the same score.
        """
        self.before = from_main(lambda: sampler.measure(model, self.base, self.prompts))
        if self.rewards.normalize_rewards:
            self.reward.standardize(self.before)

    def measure_gain(self, sampler: Sampler, model: Any, folder: Path) -> dict[str, Any]:
        """Return what the policy gained over the SFT model, for each reward, and say it."""
        after = from_main(lambda: sampler.measure(model, str(folder), self.prompts))
        found = gains(self.before, after)
        say(describe(found))
        if len(found) == 1:
            return next(iter(found.values()))
        # The weighted sum is what such a policy was trained for.
        total = gains({"sum": self.reward.total(self.before)}, {"sum": self.reward.total(after)})["sum"]
        return {**total, "rewards": found}

    def facts(self, training: TrainingArguments) -> dict[str, Any]:
        """Return what the record says of how the policy came about."""
        return {
            "base": self.base,
            "base_hash": self.inputs["base"],
            "reward": self.reward.name,
            "weights": self.reward.weights,
            "standardized": {name: {"mean": m, "deviation": s} for name, (m, s) in self.reward.scales.items()},
            "seed": training.seed,
        }

    def add_to_project(self, run: TrainingRun) -> None:
        """Add the policy to the project; one that was trained for a sum is a baseline, not a policy to be merged."""
        section = "policies" if len(self.reward.weights) == 1 else "baselines"
        entries: Mapping[tuple[str, ...], Any] = {(section, self.rewards.name()): run.output}
        from_main(lambda: say(*register(self.options.project_file, entries)))

    def heading(self, algorithm: str, what: str) -> str:
        """Return what a recipe says when it starts."""
        scores = ", ".join(f"`{name}` {summary(values)}" for name, values in self.before.items())
        return f"{algorithm} of {self.base} for `{self.rewards.name()}`, {what}; the SFT model scores {scores}"


def load_task(
    options: RunOptions,
    data: DataOptions,
    rewards: RewardOptions,
    model_options: ModelConfig,
    training: TrainingArguments,
    layouts: Layouts = (("prompt",),),
) -> PolicyTask:
    """Read the project, rewards, tokenizer and data of a policy.

    Args:
        options: names the project.
        data: training and validation data.
        rewards: which rewards, with what weights.
        model_options: must not name another model than the project's base.
        training: says on which device rewards run.
        layouts: what the training rows may hold.

    Raises:
        UserError: with whatever is missing or does not fit.
    """
    weights = rewards.weights()
    project = _project(options, model_options)
    project.require("rewards")
    if project.config.base is None:
        raise fail(
            "`base` is missing",
            where=options.project_file,
            expected="the SFT model that policies start from",
            remedy="train it with recipes/sft.py, or name one with `model_name_or_path`",
        )
    if model_options.model_revision != "main":
        what = "a project's base has no revision, so the merger would take another model than this one"
        raise fail(what, where="model_revision", remedy="download that revision and name its folder as `base`")
    base = absolute(project.resolve(project.config.base))
    check_start(base, model_options, options.project_file)
    validation = data.validation()
    if validation is None:
        raise fail("no validation data", where="validation_file", expected="prompts to measure the policy on")
    rows = with_turns([_with_prompt(row) for row in read_rows(data.train(), layouts)], data.train())
    prompts = [row["prompt"] for row in with_turns(read_rows(validation, [("prompt",)]), validation)]
    reward = load_training_reward(project, weights, str(training.device))
    inputs = {
        "train": rows_hash(rows),
        "validation": rows_hash({"prompt": prompt} for prompt in prompts),
        "base": reference_hash(base),
        "reward": reward.fingerprint,
    }
    tokenizer = load_tokenizer(base)
    return PolicyTask(base, tokenizer, reward, rows, prompts, inputs, options, rewards)


def _project(options: RunOptions, model_options: ModelConfig) -> Project:
    """Return the project; a model that is named where the project has no base yet becomes its base."""
    path = options.project_file
    if not Path(path).is_file():
        raise fail(
            "no project file there",
            where=path,
            expected=f"a {PROJECT_FILE} that declares the rewards",
            remedy="copy a suite of eval/suites there, or name one with `project_file`",
        )
    project = load_project(path)
    if project.config.base is None and model_options.model_name_or_path:
        name = model_options.model_name_or_path
        value: Any = Path(name) if Path(name).is_dir() else name
        from_main(lambda: say(*register(path, {("base",): value})))
        project = load_project(path)
    return project


def _with_prompt(row: Row) -> Row:
    """Return a row with its prompt; of a pair without one that is what both sides begin with."""
    made: Row = maybe_extract_prompt(row)
    if "chosen" in made and not made["prompt"]:
        raise fail(
            "the two sides of a pair begin differently",
            where="train_file",
            expected="a prompt of its own, or one that both sides begin with",
            got=repr(made["chosen"])[:80],
        )
    return made


def prompts_of(rows: Sequence[Row]) -> list[Prompt]:
    """Return the prompts of rows."""
    return [row["prompt"] for row in rows]
