"""A reward model from pairs: which of two texts is the better one.

    accelerate launch recipes/reward.py --config recipes/configs/demo/reward.yaml
    accelerate launch recipes/reward.py --config recipes/configs/demo/reward.yaml --learning_rate 1e-4

A classifier with one logit, started from the SFT model, learns to give the chosen text of each pair a higher
logit than the rejected one (Bradley-Terry). Its accuracy is measured on pairs it was not trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl import RewardConfig, RewardTrainer

from rewarded_lines.config import RewardSpec
from rewarded_lines.evaluation.rewards import load_reward
from rewarded_lines.training.arguments import parse_recipe, run_recipe
from rewarded_lines.training.corpus import PAIRS, read_corpus
from rewarded_lines.training.output import check_output, save_tokenizer, training_output
from rewarded_lines.training.progress import MetricsCallback


@dataclass
class RewardRecipe:
    """What this recipe adds to TRL's `RewardConfig`."""

    model: str = field(metadata={"help": "folder or Hub id to start from, usually the SFT model"})
    train_file: str = field(metadata={"help": "JSONL with prompt, chosen and rejected"})
    test_file: str = field(metadata={"help": "JSONL of held-out pairs, for the accuracy"})
    overwrite: bool = field(default=False, metadata={"help": "replace the output folder"})


def main(argv: Sequence[str]) -> None:
    """Train the reward model and measure it.

    Args:
        argv: `--config FILE` and overrides.
    """
    recipe, training = parse_recipe((RewardRecipe, RewardConfig), argv)
    check_output(training.output_dir, recipe.overwrite)
    set_seed(training.seed)

    pairs = read_corpus(recipe.train_file, PAIRS)
    held_out = read_corpus(recipe.test_file, PAIRS)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    model = AutoModelForSequenceClassification.from_pretrained(recipe.model, num_labels=1, dtype="float32")
    print(f"Reward model from {recipe.model}, {model.num_parameters():,} parameters, {len(pairs)} pairs")

    with training_output(training, "reward", recipe.overwrite) as output:
        trainer = RewardTrainer(
            model=model,
            args=training,
            train_dataset=tokenize(pairs, tokenizer),
            processing_class=tokenizer,
            callbacks=[MetricsCallback(output.folder)],
        )
        metrics = trainer.train().metrics
        trainer.save_model()
        if trainer.is_world_process_zero():
            save_tokenizer(tokenizer, output.folder)
            metrics |= accuracy(output.folder, held_out)
            low, high = metrics["accuracy_interval"]
            print(f"{metrics['accuracy']:.3f} [{low:.3f}, {high:.3f}] of {len(held_out)} pairs ranked right")
            configs = {"recipe": recipe, "training": training}
            output.record(configs, metrics, base=recipe.model, seed=training.seed)


def tokenize(pairs: Dataset, tokenizer: AutoTokenizer) -> Dataset:
    """Return the pairs as token ids, exactly as `ModelReward` will tokenize a response to be scored.

    TRL would put an end-of-sequence token after each text, which texts to be scored do not have.
    """
    columns = {}
    for side in ("chosen", "rejected"):
        texts = [prompt + text for prompt, text in zip(pairs["prompt"], pairs[side], strict=True)]
        columns[f"{side}_ids"] = tokenizer(texts)["input_ids"]
    return Dataset.from_dict(columns)


def accuracy(folder: Path, pairs: Dataset) -> dict[str, object]:
    """Return the share of pairs that the saved model ranks rightly, its 95% Wilson interval, and both means.

    The model is loaded and used as recipes and evaluator will use it.
    """
    reward = load_reward("reward", RewardSpec(model=str(folder.resolve())))
    chosen = reward.score(pairs["prompt"], pairs["chosen"])
    rejected = reward.score(pairs["prompt"], pairs["rejected"])
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
