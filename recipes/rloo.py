"""A policy for one reward without a critic: RLOO, several responses to each prompt, each compared with the others.

    accelerate launch recipes/rloo.py --config recipes/configs/demo/rloo.yaml --reward positive
    accelerate launch recipes/rloo.py --config recipes/configs/demo/rloo.yaml --reward detailed \\
        --output_dir runs/demo/policies-rloo/detailed
    accelerate launch recipes/rloo.py --config recipes/configs/demo/rloo.yaml --reward null \\
        --rewards positive=0.5,detailed=0.5 --output_dir runs/demo/baselines/morl-rloo

Rewards, standardization and outputs are as in `recipes/ppo.py`. It needs less memory: no critic, and with LoRA no
reference model. The KL penalty, `beta`, is part of the reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# First, since it refuses versions that do not fit before these are imported.
from rewarded_lines.training.arguments import parse_recipe, run_recipe, trainer_settings

# isort: split
from transformers import set_seed
from trl import ModelConfig, RLOOConfig

from rewarded_lines.training.load_task import load_task
from rewarded_lines.training.online_trainer import ReadRLOOTrainer, check_prompts
from rewarded_lines.training.recipe_options import DataOptions, RewardOptions, RunOptions
from rewarded_lines.training.training_record import MetricsCallback
from rewarded_lines.training.training_run import say, training_run


@dataclass
class RLOORecipe:
    """What this recipe adds to TRL's `RLOOConfig`."""

    max_prompt_tokens: int = field(default=512, metadata={"help": "longest prompt; see too_long"})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "subtracted from the reward of a response that does not end"}
    )


def main(argv: Sequence[str]) -> None:
    """Train a policy and measure its gain; `argv` is `--config FILE` and overrides."""
    parts = (RLOORecipe, RunOptions, DataOptions, RewardOptions, ModelConfig, RLOOConfig)
    arguments = parse_recipe(parts, argv, __doc__ or "")
    recipe, options, data, rewards, model_options, training = arguments
    with training_run("rloo", arguments) as run:
        set_seed(training.seed)
        task = load_task(options, data, rewards, model_options, training)
        if not run.begin(**task.inputs):
            task.add_to_project(run)
            return

        task.fit(recipe.max_prompt_tokens, training.max_completion_length)
        check_prompts(training, len(task.rows))
        policy = task.load_policy(model_options)
        spec = task.trainer_spec(training, training.max_completion_length)
        task.measure_base(spec, policy)
        say(task.heading("RLOO", f"{len(task.rows)} prompts, {training.num_generations} responses each"))

        with trainer_settings():
            trainer = ReadRLOOTrainer(
                model=policy,
                callbacks=[MetricsCallback(run.folder)],
                **task.trainer_parts(training, model_options, recipe.missing_eos_penalty),
            )
        trainer.train(resume_from_checkpoint=run.checkpoint)
        if trainer.unscored:
            say(f"{trainer.unscored} of {trainer.responses} training responses had no score; their advantage is 0")
        task.finish(trainer, run, spec)


if __name__ == "__main__":
    run_recipe(main)
