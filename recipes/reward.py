"""A reward model from pairs: which of two texts is the better one.

    accelerate launch recipes/reward.py --config recipes/configs/demo/reward.yaml
    accelerate launch recipes/reward.py --config recipes/configs/demo/reward.yaml --learning_rate 1e-4
    accelerate launch recipes/reward.py --model_name_or_path sft --train_file pairs.jsonl --use_peft \\
        --output_dir rewards/helpful

A classifier with one logit, started from the SFT model, learns to give the chosen text of each pair a higher
logit than the rejected one (Bradley-Terry). The data hold prompt, chosen and rejected, or chats that begin alike. Its
accuracy is measured on pairs it was not trained on. It becomes a reward of the project, under `reward_name`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import set_seed
from trl import ModelConfig, RewardConfig, RewardTrainer
from trl.data_utils import extract_prompt

from rewarded_lines.config import RewardSpec
from rewarded_lines.data.prompts import prompt_text
from rewarded_lines.data.rows import Row, read_rows, rows_hash
from rewarded_lines.learning.models import (
    absolute,
    fold_classifier,
    load_classifier,
    load_tokenizer,
    lora_config,
    reference_hash,
)
from rewarded_lines.scoring.rewards import fill_template, load_reward
from rewarded_lines.training.arguments import parse_recipe, run_recipe, trainer_settings
from rewarded_lines.training.options import DataOptions, RunOptions
from rewarded_lines.training.progress import MetricsCallback
from rewarded_lines.training.project import register
from rewarded_lines.training.run import from_main, save_tokenizer, say, training_run

LAYOUTS = [("prompt", "chosen", "rejected"), ("chosen", "rejected")]


@dataclass
class RewardRecipe:
    """What this recipe adds to TRL's `RewardConfig`."""

    template: str = field(default="{prompt}{response}", metadata={"help": "the text that the reward model reads"})
    reward_name: str | None = field(default=None, metadata={"help": "its name in the project; the folder's by default"})


def main(argv: Sequence[str]) -> None:
    """Train the reward model and measure it.

    Args:
        argv: `--config FILE` and overrides.
    """
    arguments = parse_recipe((RewardRecipe, RunOptions, DataOptions, ModelConfig, RewardConfig), argv, __doc__ or "")
    recipe, options, data, model_options, training = arguments
    with training_run("reward", arguments) as run:
        set_seed(training.seed)
        base = absolute(model_options.model_name_or_path, model_options.model_revision)
        pairs = as_texts(read_rows(data.train(), LAYOUTS))
        held_out = as_texts(read_rows(data.validation() or data.train(), LAYOUTS))
        inputs = {"train": rows_hash(pairs), "validation": rows_hash(held_out), "base": reference_hash(base)}
        place = ("rewards", recipe.reward_name or run.output.name)
        entries = {(*place, "model"): run.output, (*place, "template"): recipe.template}
        if not run.begin(**inputs):
            from_main(lambda: say(*register(options.project_file, entries)))
            return

        tokenizer = load_tokenizer(base, model_options.model_revision)
        model = load_classifier(base, model_options)
        lora = lora_config(model_options, model, task="SEQ_CLS")
        if lora:
            lora.modules_to_save = ["score"]
        say(f"Reward model from {base}, {model.num_parameters():,} parameters, {len(pairs)} pairs")

        with trainer_settings():
            trainer = RewardTrainer(
                model=model,
                args=training,
                train_dataset=tokenize(pairs, tokenizer, recipe.template),
                processing_class=tokenizer,
                peft_config=lora,
                callbacks=[MetricsCallback(run.folder)],
            )
        metrics = trainer.train(resume_from_checkpoint=run.checkpoint).metrics
        trainer.save_model(str(run.folder))
        from_main(lambda: save_tokenizer(tokenizer, run.folder))
        if lora:
            from_main(lambda: fold_classifier(run.folder, base))
        spec = RewardSpec(model=str(run.folder.resolve()), template=recipe.template, unit="logit")
        metrics |= from_main(lambda: accuracy(spec, held_out))
        low, high = metrics["accuracy_interval"]
        say(f"{metrics['accuracy']:.3f} [{low:.3f}, {high:.3f}] of {len(held_out)} pairs ranked right")
        run.finish(metrics, base=base, base_hash=inputs["base"], seed=training.seed)
        from_main(lambda: say(*register(options.project_file, entries)))


def as_texts(rows: list[Row]) -> list[Row]:
    """Return pairs with their prompt and both answers as texts; chats without a prompt share their beginning."""
    explicit = [row if "prompt" in row else extract_prompt(row) for row in rows]
    return [{role: prompt_text(row[role]) for role in ("prompt", "chosen", "rejected")} for row in explicit]


def tokenize(pairs: list[Row], tokenizer: object, template: str) -> Dataset:
    """Return the pairs as token ids, exactly as `ModelReward` will tokenize a response to be scored.

    TRL would put an end-of-sequence token after each text, which texts to be scored do not have.
    """
    columns = {}
    for side in ("chosen", "rejected"):
        texts = [fill_template(template, row["prompt"], row[side]) for row in pairs]
        columns[f"{side}_ids"] = tokenizer(texts)["input_ids"]
    return Dataset.from_dict(columns)


def accuracy(spec: RewardSpec, pairs: list[Row]) -> dict[str, object]:
    """Return the share of pairs that the saved model ranks rightly, its 95% Wilson interval, and both means.

    The model is loaded and used as recipes and evaluator will use it.
    """
    reward = load_reward("reward", spec, Path())
    prompts = [row["prompt"] for row in pairs]
    chosen, rejected = (reward.score(prompts, [row[side] for row in pairs]) for side in ("chosen", "rejected"))
    right = sum(good > bad for good, bad in zip(chosen, rejected, strict=True))
    return {
        "accuracy": right / len(pairs),
        "accuracy_interval": wilson(right, len(pairs)),
        "mean_chosen": sum(chosen) / len(chosen),
        "mean_rejected": sum(rejected) / len(rejected),
    }


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion, 95% by default."""
    share, weight = successes / trials, z * z / trials
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / trials + weight / (4 * trials)) / (1 + weight)
    return centre - half, centre + half


if __name__ == "__main__":
    run_recipe(main)
