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
tokenizer, and at the project's `stop_token_ids`. The policy is added to the project. TRL 1.12 is the last release with
PPO; `recipes/rloo.py` trains a policy without a critic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# First, since it refuses versions that do not fit before these are imported.
from rewarded_lines.training.arguments import parse_recipe, run_recipe, trainer_settings

# isort: split
from datasets import Dataset
from peft import get_peft_model
from transformers import set_seed
from trl import ModelConfig

from rewarded_lines.data.prompts import encode
from rewarded_lines.training.generation_config import usable_padding
from rewarded_lines.training.load_models import generation_dtype, load_critic, load_policy, lora_config
from rewarded_lines.training.load_task import load_task
from rewarded_lines.training.recipe_options import DataOptions, RewardOptions, RunOptions
from rewarded_lines.training.reward_module import RewardModule, refuse_unscored
from rewarded_lines.training.training_record import MetricsCallback
from rewarded_lines.training.training_run import say, training_run


@dataclass
class PPORecipe:
    """What this recipe adds to TRL's `PPOConfig`."""

    max_prompt_tokens: int = field(default=512, metadata={"help": "longest prompt; see too_long"})
    target_kl: float | None = field(
        default=None, metadata={"help": "adapt `kl_coef` until the KL to the SFT model, in nats, is this"}
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "pace of that adaptation, in episodes"})


def main(argv: Sequence[str]) -> None:
    """Train a policy and measure its gain; `argv` is `--config FILE` and overrides."""
    from rewarded_lines.training.ppo_trainer import AdaptiveKL, PPOConfig, ResumablePPOTrainer

    parts = (PPORecipe, RunOptions, DataOptions, RewardOptions, ModelConfig, PPOConfig)
    arguments = parse_recipe(parts, argv, __doc__ or "")
    recipe, options, data, rewards, model_options, training = arguments
    with training_run("ppo", arguments) as run:
        set_seed(training.seed)
        task = load_task(options, data, rewards, model_options, training)
        if not run.begin(**task.inputs):
            task.add_to_project(run)
            return

        task.fit(recipe.max_prompt_tokens, training.response_length)
        reader, penalty = task.reader, training.missing_eos_penalty
        # TRL knows one end token. Here the reader knows them all, and the reward module applies the penalty.
        training.stop_token = training.stop_token_id = training.missing_eos_penalty = None
        tokenizer, prompts = task.tokenizer, task.train_prompts
        usable_padding(tokenizer, task.base, reader.ends, encode(tokenizer, prompts))
        policy, critic = task.load_policy(model_options), load_critic(task.base, model_options)
        dtype = generation_dtype(model_options, policy)
        spec = task.spec(
            temperature=training.temperature, max_tokens=training.response_length, seed=training.seed, dtype=dtype
        )
        task.measure_base(spec, policy)
        refuse_unscored(task.reward, task.reward.total(task.before), task.prompts)
        say(task.heading("PPO", f"{len(prompts)} prompts"))

        lora = lora_config(model_options)
        module = RewardModule(task.reward, reader, task.rows, penalty)
        dataset = Dataset.from_dict({"input_ids": module.padded(tokenizer.pad_token_id)})
        adaptive = [AdaptiveKL(recipe.target_kl, recipe.kl_horizon)] if recipe.target_kl else []
        with trainer_settings():
            trainer = ResumablePPOTrainer(
                args=training,
                reader=reader,
                processing_class=tokenizer,
                model=get_peft_model(policy, lora) if lora else policy,
                ref_model=None if lora else load_policy(task.base, model_options),
                reward_model=module,
                value_model=critic,
                train_dataset=dataset,
                eval_dataset=dataset.select(range(1)),
                callbacks=[*adaptive, MetricsCallback(run.folder)],
            )
        trainer.train(resume_from_checkpoint=run.checkpoint)
        task.save(trainer.save_model, run, training)
        run.finish(
            lambda: task.measure_gain(spec, trainer.policy_model, run.folder),
            lambda: task.add_to_project(run),
        )


if __name__ == "__main__":
    run_recipe(main)
