"""A policy for one reward without a critic: DPO on the SFT model's own best and worst responses.

    accelerate launch recipes/dpo.py --config recipes/configs/demo/dpo.yaml --reward positive
    accelerate launch recipes/dpo.py --config recipes/configs/demo/dpo.yaml --reward detailed \\
        --output_dir runs/demo/policies-dpo/detailed

Several responses are sampled to every training prompt and scored by a reward of the project file; the best
and the worst make a pair where they differ enough. The pairs are kept as `pairs.parquet` beside the policy.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer

from rewarded_lines.config import load_project
from rewarded_lines.errors import fail
from rewarded_lines.evaluation.rewards import load_rewards
from rewarded_lines.training.arguments import parse_recipe, run_recipe
from rewarded_lines.training.corpus import read_corpus
from rewarded_lines.training.output import check_output, save_tokenizer, training_output
from rewarded_lines.training.progress import MetricsCallback
from rewarded_lines.training.sampling import paired_gain, sample_responses, summary


@dataclass
class DPORecipe:
    """What this recipe adds to TRL's `DPOConfig`."""

    project_file: str = field(metadata={"help": "the project file that names the base and declares the reward"})
    reward: str = field(metadata={"help": "name of the reward to train for"})
    train_file: str = field(metadata={"help": "JSONL with the prompts to train on"})
    validation_file: str = field(metadata={"help": "JSONL with the prompts to measure on, before and after"})
    train_prompts: int = field(default=1000, metadata={"help": "how many prompts get responses"})
    validation_prompts: int = field(default=256, metadata={"help": "how many prompts to measure on"})
    responses: int = field(default=8, metadata={"help": "responses to every training prompt"})
    margin: float = field(default=0.5, metadata={"help": "least gap of a pair, in standard deviations of the reward"})
    max_response_tokens: int = field(default=64, metadata={"help": "longest response"})
    temperature: float = field(default=1.0, metadata={"help": "of the sampling"})
    overwrite: bool = field(default=False, metadata={"help": "replace the output folder"})


def main(argv: Sequence[str]) -> None:
    """Make the pairs, train the policy, measure what it gained.

    Args:
        argv: `--config FILE` and overrides.
    """
    recipe, training = parse_recipe((DPORecipe, DPOConfig), argv)
    check_output(training.output_dir, recipe.overwrite)
    project = load_project(recipe.project_file)
    project.require("base", "rewards")
    base = project.resolve(project.config.base)
    reward = load_rewards(project, [recipe.reward])[recipe.reward]
    set_seed(training.seed)

    prompts = list(read_corpus(recipe.train_file, ["prompt"], recipe.train_prompts)["prompt"])
    validation = list(read_corpus(recipe.validation_file, ["prompt"], recipe.validation_prompts)["prompt"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    policy = AutoModelForCausalLM.from_pretrained(base, dtype="float32")

    def score_samples(wanted: list[str]) -> tuple[list[str], list[float]]:
        responses = sample_responses(
            policy, tokenizer, wanted, recipe.max_response_tokens, recipe.temperature, training.seed
        )
        return responses, reward.score(wanted, responses)

    _, before = score_samples(validation)
    repeated = [prompt for prompt in prompts for _ in range(recipe.responses)]
    pairs = best_and_worst(repeated, *score_samples(repeated), recipe.responses, recipe.margin)
    print(
        f"DPO of {base} for `{recipe.reward}`, {len(pairs)} pairs from {len(prompts)} prompts,",
        f"SFT scores {summary(before)}",
    )

    with training_output(training, "dpo", recipe.overwrite) as output:
        pairs.to_parquet(output.folder / "pairs.parquet")
        trainer = DPOTrainer(
            model=policy,
            args=training,
            train_dataset=pairs.select_columns(["prompt", "chosen", "rejected"]),
            processing_class=tokenizer,
            callbacks=[MetricsCallback(output.folder)],
        )
        metrics = trainer.train().metrics
        trainer.save_model()
        if trainer.is_world_process_zero():
            save_tokenizer(tokenizer, output.folder)
            _, after = score_samples(validation)
            print(
                f"`{recipe.reward}` on {len(validation)} validation prompts:",
                f"{summary(before)} -> {summary(after)}",
            )
            metrics |= paired_gain(before, after) | {"pairs": len(pairs)}
            configs = {"recipe": recipe, "training": training}
            output.record(configs, metrics, base=base, reward=recipe.reward, seed=training.seed)


def best_and_worst(
    prompts: Sequence[str], responses: Sequence[str], scores: Sequence[float], count: int, margin: float
) -> Dataset:
    """Return the best against the worst response of each prompt, with their scores.

    Args:
        prompts: each `count` times in a row.
        responses: one for each entry of `prompts`.
        scores: of the responses.
        count: responses of a prompt.
        margin: least gap, in standard deviations of all scores; prompts with less make no pair.

    Raises:
        UserError: no prompt makes a pair.
    """
    least = margin * statistics.pstdev(scores)
    rows = []
    for start in range(0, len(prompts), count):
        of_prompt = range(start, start + count)
        best, worst = max(of_prompt, key=scores.__getitem__), min(of_prompt, key=scores.__getitem__)
        if scores[best] - scores[worst] > least:
            rows.append(
                {
                    "prompt": prompts[start],
                    "chosen": responses[best],
                    "rejected": responses[worst],
                    "chosen_score": scores[best],
                    "rejected_score": scores[worst],
                }
            )
    if not rows:
        raise fail("no two responses to a prompt differ enough in reward", remedy="lower `margin`")
    return Dataset.from_list(rows)


if __name__ == "__main__":
    run_recipe(main)
