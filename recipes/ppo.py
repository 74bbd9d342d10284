"""A policy for one reward: PPO from the SFT model, held to it by a KL penalty.

    accelerate launch recipes/ppo.py --config recipes/configs/demo/ppo.yaml --reward positive
    accelerate launch recipes/ppo.py --config recipes/configs/demo/ppo.yaml --reward detailed \\
        --output_dir runs/demo/policies/detailed

The reward is one that the project file declares, a classifier or a function, the same that the sweep will
score by. It is standardized on the SFT model's responses, so one set of hyperparameters serves rewards of any
unit. TRL 1.12 is the last release with PPO; `recipes/dpo.py` trains a policy without it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from rewarded_lines.config import load_project
from rewarded_lines.errors import fail
from rewarded_lines.evaluation.rewards import load_rewards
from rewarded_lines.training.arguments import parse_recipe, run_recipe
from rewarded_lines.training.corpus import read_corpus
from rewarded_lines.training.output import check_output, save_tokenizer, training_output
from rewarded_lines.training.progress import MetricsCallback
from rewarded_lines.training.reward_module import RewardModule, StandardizedReward, pad_prompts
from rewarded_lines.training.sampling import paired_gain, sample_responses, summary

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


@dataclass
class PPORecipe:
    """What this recipe adds to TRL's `PPOConfig`."""

    project_file: str = field(metadata={"help": "the project file that names the base and declares the reward"})
    reward: str = field(metadata={"help": "name of the reward to train for"})
    train_file: str = field(metadata={"help": "JSONL with the prompts to train on"})
    validation_file: str = field(metadata={"help": "JSONL with the prompts to measure on, before and after"})
    validation_prompts: int = field(default=256, metadata={"help": "how many of those"})
    max_prompt_tokens: int = field(default=64, metadata={"help": "longer prompts are left out"})
    overwrite: bool = field(default=False, metadata={"help": "replace the output folder"})


def main(argv: Sequence[str]) -> None:
    """Train a policy for one reward and measure what it gained.

    Args:
        argv: `--config FILE` and overrides.
    """
    config_class, trainer_class = import_ppo()
    recipe, training = parse_recipe((PPORecipe, config_class), argv)
    check_output(training.output_dir, recipe.overwrite)
    project = load_project(recipe.project_file)
    project.require("base", "rewards")
    base = project.resolve(project.config.base)
    reward = load_rewards(project, [recipe.reward])[recipe.reward]
    set_seed(training.seed)

    tokenizer = AutoTokenizer.from_pretrained(base)
    check_padding(tokenizer, base)
    train_prompts = read_corpus(recipe.train_file, ["prompt"])["prompt"]
    queries, context_length = pad_prompts(list(train_prompts), tokenizer, recipe.max_prompt_tokens)
    validation = list(read_corpus(recipe.validation_file, ["prompt"], recipe.validation_prompts)["prompt"])

    policy = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    reference = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    critic = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype="float32")

    def measure() -> list[float]:
        responses = sample_responses(
            policy, tokenizer, validation, training.response_length, training.temperature, training.seed
        )
        return reward.score(validation, responses)

    before = measure()
    standardized = StandardizedReward(reward, before)
    print(f"PPO of {base} for `{recipe.reward}`, {len(queries)} prompts, SFT scores {summary(before)}")

    with training_output(training, "ppo", recipe.overwrite) as output:
        dataset = Dataset.from_dict({"input_ids": queries})
        trainer = trainer_class(
            args=training,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=RewardModule(standardized, tokenizer, context_length),
            value_model=critic,
            train_dataset=dataset,
            eval_dataset=dataset.select(range(1)),
            callbacks=[MetricsCallback(output.folder)],
        )
        trainer.train()
        if trainer.accelerator.is_main_process:
            # The policy by itself, without the critic that the trainer wrapped together with it.
            trainer.accelerator.unwrap_model(trainer.model).policy.save_pretrained(output.folder)
            save_tokenizer(tokenizer, output.folder)
            after = measure()
            print(
                f"`{recipe.reward}` on {len(validation)} validation prompts:",
                f"{summary(before)} -> {summary(after)}",
            )
            output.record(
                {"recipe": recipe, "training": training},
                paired_gain(before, after),
                base=base,
                reward=recipe.reward,
                standardized={"mean": standardized.mean, "deviation": standardized.deviation},
                seed=training.seed,
            )


def import_ppo() -> tuple[type, type]:
    """Return TRL's PPOConfig and PPOTrainer.

    Raises:
        UserError: the installed TRL has none.
    """
    try:
        from trl.experimental.ppo import PPOConfig, PPOTrainer
    except ImportError as error:
        raise fail(
            f"trl {version('trl')} has no PPO",
            expected="trl 1.12.0, the last release that carries it",
            remedy="pip install trl==1.12.0, or train with recipes/dpo.py",
        ) from error
    return PPOConfig, PPOTrainer


def check_padding(tokenizer: Any, base: str) -> None:
    """Refuse a tokenizer whose padding PPO would take for the end of a text: its masks are made from it."""
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise fail(
            "PPO needs a padding token that is not the end-of-sequence token",
            where=base,
            got=f"pad {tokenizer.pad_token!r}, eos {tokenizer.eos_token!r}",
            remedy="give the SFT model's tokenizer one, an unused entry of the vocabulary for example",
        )


if __name__ == "__main__":
    run_recipe(main)
