"""A policy for one reward: PPO from the SFT model, with a KL penalty.

    accelerate launch recipes/ppo.py --config recipes/configs/demo/ppo.yaml --reward positive
    accelerate launch recipes/ppo.py --config recipes/configs/demo/ppo.yaml --reward detailed \\
        --output_dir runs/demo/policies/detailed
    accelerate launch recipes/ppo.py --config recipes/configs/demo/ppo.yaml --reward null \\
        --rewards positive=0.5,detailed=0.5 --output_dir runs/demo/baselines/morl
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/ppo.py \\
        --config recipes/configs/summary/ppo.yaml --reward faithful

The project file declares the rewards, classifiers or functions; the sweep scores by the same ones. A weighted sum of
several makes the multi-objective baseline. Each reward is standardized on the SFT model's responses, so one set of
hyperparameters serves rewards of any unit. A response ends at any end token of the base's generation config or
tokenizer, and at the project's `stop_token_ids`. The policy is added to the project.

The critic is a model of its own, from the SFT model or a reward model, or a value head on the policy
(`critic: shared`), which needs less memory. `recipes/rloo.py` and `recipes/grpo.py` train without a critic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# First, since it refuses versions that do not fit before these are imported.
from rewarded_lines.training.arguments import parse_recipe, run_recipe, trainer_settings

# isort: split
from transformers import set_seed
from trl import ModelConfig

from rewarded_lines.training.load_models import load_critic
from rewarded_lines.training.load_task import load_task
from rewarded_lines.training.online_trainer import check_prompts
from rewarded_lines.training.ppo_config import PPOConfig
from rewarded_lines.training.ppo_trainer import PPOTrainer
from rewarded_lines.training.recipe_options import DataOptions, RewardOptions, RunOptions
from rewarded_lines.training.training_record import MetricsCallback, reference_hash
from rewarded_lines.training.training_run import say, training_run


@dataclass
class PPORecipe:
    """What this recipe adds to `PPOConfig`."""

    max_prompt_tokens: int = field(default=512, metadata={"help": "longest prompt; see too_long"})


def main(argv: Sequence[str]) -> None:
    """Train a policy and measure its gain; `argv` is `--config FILE` and overrides."""
    parts = (PPORecipe, RunOptions, DataOptions, RewardOptions, ModelConfig, PPOConfig)
    arguments = parse_recipe(parts, argv, __doc__ or "")
    recipe, options, data, rewards, model_options, training = arguments
    with training_run("ppo", arguments) as run:
        set_seed(training.seed)
        task = load_task(options, data, rewards, model_options, training)
        critic_start = {"critic": reference_hash(training.critic_model)} if training.critic_model else {}
        if not run.begin(**task.inputs, **critic_start):
            task.add_to_project(run)
            return

        task.fit(recipe.max_prompt_tokens, training.response_length)
        check_prompts(training.settings(len(task.rows)), len(task.rows))
        policy, critic = task.load_policy(model_options), None
        if training.critic == "separate":
            critic = load_critic(task.base, model_options, training.critic_model)
        spec = task.trainer_spec(training, training.response_length)
        task.measure_base(spec, policy)
        say(task.heading("PPO", f"{len(task.rows)} prompts"))

        with trainer_settings():
            trainer = PPOTrainer(
                model=policy,
                critic=critic,
                callbacks=[MetricsCallback(run.folder)],
                **task.trainer_parts(training, model_options, training.missing_eos_penalty),
            )
        trainer.train(resume_from_checkpoint=run.checkpoint)
        if trainer.unscored:
            say(f"{trainer.unscored} of {trainer.responses} training responses had no score; their advantage is 0")
        task.finish(trainer, run, spec)


if __name__ == "__main__":
    run_recipe(main)
