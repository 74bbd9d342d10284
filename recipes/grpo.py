"""A policy for one reward or several, by GRPO: a group of responses to each prompt, compared with one another.

    accelerate launch recipes/grpo.py --config recipes/configs/demo/grpo.yaml --reward positive
    accelerate launch recipes/grpo.py --config recipes/configs/demo/grpo.yaml --reward null \\
        --rewards positive=0.5,detailed=0.5 --output_dir runs/demo/baselines/grpo
    accelerate launch recipes/grpo.py --config recipes/configs/demo/grpo.yaml --reward null \\
        --rewards positive=0.5,detailed=0.5 --multi_objective_aggregation normalize_then_sum \\
        --output_dir runs/demo/baselines/gdpo

Several rewards make the multi-objective baseline that merging is compared with. With `sum_then_normalize`, the default,
the weighted sum is compared within each group. With `normalize_then_sum` (GDPO) each reward is standardized within each
group before they are summed, so none drowns in another's spread. The penalty of a response that does not end,
`missing_eos_penalty`, is then one more reward with that weight.

Rewards are as in `recipes/ppo.py`, standardized on the SFT model's responses. GDPO standardizes each of them once more,
so this changes almost nothing there.
Sources: Shao et al. 2024, arXiv 2402.03300; for GDPO, Liu et al. 2026, arXiv 2601.05242.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# First, since it refuses versions that do not fit before these are imported.
from rewarded_lines.training.arguments import parse_recipe, run_recipe, trainer_settings

# isort: split
from transformers import set_seed
from trl import GRPOConfig, ModelConfig

from rewarded_lines.training.load_task import load_task
from rewarded_lines.training.online_trainer import ReadGRPOTrainer, check_prompts, check_standardization
from rewarded_lines.training.recipe_options import DataOptions, RewardOptions, RunOptions
from rewarded_lines.training.training_record import MetricsCallback
from rewarded_lines.training.training_run import say, training_run


@dataclass
class GRPORecipe:
    """What this recipe adds to TRL's `GRPOConfig`."""

    max_prompt_tokens: int = field(default=512, metadata={"help": "longest prompt; see too_long"})
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={"help": "subtracted from the reward of a response that does not end; see normalize_then_sum above"},
    )


def main(argv: Sequence[str]) -> None:
    """Train a policy and measure its gain; `argv` is `--config FILE` and overrides."""
    parts = (GRPORecipe, RunOptions, DataOptions, RewardOptions, ModelConfig, GRPOConfig)
    arguments = parse_recipe(parts, argv, __doc__ or "")
    recipe, options, data, rewards, model_options, training = arguments
    check_standardization(training, arguments.given)
    with training_run("grpo", arguments) as run:
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
        say(task.heading("GRPO", f"{len(task.rows)} prompts, {training.num_generations} responses each"))

        with trainer_settings():
            trainer = ReadGRPOTrainer(
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
