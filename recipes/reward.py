"""A reward model from preference pairs.

    accelerate launch recipes/reward.py --config recipes/configs/demo/reward.yaml
    accelerate launch recipes/reward.py --config recipes/configs/demo/reward.yaml --learning_rate 1e-4
    accelerate launch recipes/reward.py --model_name_or_path sft --train_file pairs.jsonl --use_peft \\
        --output_dir rewards/helpful

A classifier with one logit, started from the SFT model, learns to give the chosen text of each pair a higher
logit than the rejected one (Bradley-Terry). The data hold prompt, chosen and rejected in any published form;
`rewarded-lines recipes` names the page about data. By default the model reads chats in the tokenizer's chat template,
texts as `{prompt}{response}`; `template` changes that. Its accuracy is measured on the validation pairs. It is added to
the project's rewards as `reward_name`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# First, since it refuses versions that do not fit before these are imported.
from rewarded_lines.training.arguments import parse_recipe, run_recipe, trainer_settings

# isort: split
from datasets import Dataset
from transformers import set_seed
from trl import ModelConfig, RewardConfig, RewardTrainer

from rewarded_lines.config import GenerationSpec
from rewarded_lines.config_values import CHAT, TEXT
from rewarded_lines.data.chat_templates import check_template
from rewarded_lines.data.dataset_formats import last_answers, read_pairs
from rewarded_lines.data.lengths import Limit, fit, positions_of
from rewarded_lines.data.messages import more_than_text
from rewarded_lines.data.rows import Row, rows_hash
from rewarded_lines.engines.tokenizers import load_config, read_template
from rewarded_lines.errors import fail
from rewarded_lines.pareto.bootstrap import wilson
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.classifier_inputs import ClassifierReading
from rewarded_lines.rewards.load_rewards import load_reward
from rewarded_lines.training.generation_config import generation_of
from rewarded_lines.training.load_models import (
    absolute,
    fold_classifier,
    load_classifier,
    load_tokenizer,
    reward_lora,
    save_tokenizer,
)
from rewarded_lines.training.recipe_options import DataOptions, RunOptions, checked_values
from rewarded_lines.training.register_model import register
from rewarded_lines.training.training_record import MetricsCallback, reference_hash
from rewarded_lines.training.training_run import from_main, say, training_run

SIDES = ("chosen", "rejected")


@dataclass
class RewardRecipe:
    """What this recipe adds to TRL's `RewardConfig`."""

    template: str | None = field(
        default=None,
        metadata={
            "help": "text for the reward model: chat (the whole conversation in its chat template), or a text with "
            "{prompt} and {response}; by default chat for chats and {prompt}{response} for texts"
        },
    )
    reward_name: str | None = field(default=None, metadata={"help": "its name in the project; by default the folder's"})


def main(argv: Sequence[str]) -> None:
    """Train the reward model and measure it; `argv` is `--config FILE` and overrides."""
    arguments = parse_recipe((RewardRecipe, RunOptions, DataOptions, ModelConfig, RewardConfig), argv, __doc__ or "")
    recipe, options, data, model_options, training = arguments
    with training_run("reward", arguments) as run:
        set_seed(training.seed)
        base = absolute(model_options.model_name_or_path, model_options.model_revision)
        tokenizer = load_tokenizer(base, model_options.model_revision)
        set_own_template(tokenizer, training, generation_of(options.project_file))
        pairs = read_pairs(data.train(), tell=say)
        held_out = read_pairs(data.validation() or data.train(), tell=say)
        template = recipe.template or (CHAT if isinstance(pairs[0]["prompt"], list) else TEXT)
        reading = ClassifierReading(tokenizer, template, "the reward model")
        check(reading, [*pairs, *held_out], data)
        inputs = {"train": rows_hash(pairs), "validation": rows_hash(held_out), "base": reference_hash(base)}
        room = positions_of(load_config(base))
        longest = min((most for most in (training.max_length, room) if most), default=1 << 30)
        limit = Limit("the reward model", longest, "max_length, or its positions", lambda rows: lengths(reading, rows))
        place = ("rewards", recipe.reward_name or run.output.name)
        entries = {(*place, "model"): run.output, (*place, "template"): template}
        if not run.begin(**inputs):
            from_main(lambda: say(*register(options.project_file, entries)))
            return

        pairs = fit(pairs, [limit], data.too_long, "training pairs", say)
        held_out = fit(held_out, [limit], data.too_long, "validation pairs", say)
        model = load_classifier(base, model_options)
        lora = reward_lora(model_options, model)
        say(f"Reward model from {base}, {model.num_parameters():,} parameters, {len(pairs)} pairs")

        own = copy.deepcopy(tokenizer)
        columns = {f"{side}_ids": tokens(reading, pairs, side) for side in SIDES} | {"length": lengths(reading, pairs)}
        # The lengths of the pairs are for `train_sampling_strategy: group_by_length`.
        training.remove_unused_columns = False
        with trainer_settings():
            trainer = RewardTrainer(
                model=model,
                args=training,
                train_dataset=Dataset.from_dict(columns),
                processing_class=tokenizer,
                peft_config=lora,
                callbacks=[MetricsCallback(run.folder)],
            )
        metrics = trainer.train(resume_from_checkpoint=run.checkpoint).metrics
        run.save_model(trainer)
        from_main(lambda: save_tokenizer(own, run.folder))
        if lora:
            from_main(lambda: fold_classifier(run.folder, base, trainer.model.config.pad_token_id))
        run.saved(base=base, base_hash=inputs["base"], seed=training.seed)
        spec = RewardSpec(model=str(run.folder.resolve()), template=template, unit="logit")
        run.finish(
            lambda: {**metrics, **from_main(lambda: accuracy(spec, held_out))},
            lambda: from_main(lambda: say(*register(options.project_file, entries))),
        )


def set_own_template(tokenizer: Any, training: RewardConfig, generation: GenerationSpec) -> None:
    """Give the reward model's tokenizer the template of `chat_template_path`, or the project's."""
    own, path = training.chat_template_path, training.chat_template_path or generation.chat_template
    if training.eos_token is not None:
        raise fail("`eos_token` has no effect: texts to be scored get no end token", where="eos_token")
    if path is not None:
        tokenizer.chat_template = read_template(path, "chat_template_path" if own else "generation.chat_template")


def check(reading: ClassifierReading, pairs: list[Row], data: DataOptions) -> None:
    """Refuse pairs that the reward model would not read whole, and a template that leaves the response out."""
    with checked_values():
        RewardSpec(model="model", template=reading.template)
    if reading.template == CHAT:
        whole = [[*row["prompt"], *row[side]] for row in pairs for side in SIDES if isinstance(row["prompt"], list)]
        check_template(reading.tokenizer, whole, "training and validation pairs")
    elif data.system_prompt is not None:
        what, expected = "a text template does not read the system turn", "template chat, which reads all turns"
        got, remedy = f"{reading.template!r} with `system_prompt`", "leave `template` out, or `system_prompt`"
        raise fail(what, where="template", expected=expected, got=got, remedy=remedy)
    for row in pairs:
        if key := next((key for side in SIDES if (key := more_than_text(row[side]))), ""):
            what = f"an answer holds `{key}`, and rewards score texts"
            raise fail(what, where="pairs", got=str(row)[:200], remedy="leave such rows out with a row function")
    if note := reading.check([row["prompt"] for row in pairs]):
        say(note)


def tokens(reading: ClassifierReading, pairs: list[Row], side: str) -> list[list[int]]:
    """Return one side of the pairs as token ids, the same as when a response is scored.

    TRL would add an end-of-sequence token to each text, which scored texts do not have.
    """
    ids, types = reading.tokens(*last_answers(pairs, side))
    if types is not None:
        what = "a pair of texts with token types cannot be trained on here"
        raise fail(what, where="template", got=str(reading.template), remedy="take a template without the separator")
    return ids


def lengths(reading: ClassifierReading, pairs: list[Row]) -> list[int]:
    """Return the number of tokens of the longer side of each pair."""
    both = (map(len, tokens(reading, pairs, side)) for side in SIDES)
    return [max(one) for one in zip(*both, strict=True)]


def accuracy(spec: RewardSpec, pairs: list[Row]) -> dict[str, object]:
    """Return the saved model's accuracy on pairs, its 95% Wilson interval, and both mean scores.

    The model is loaded as recipes and evaluator load it.
    """
    reward = load_reward("reward", spec, Path())
    chosen, rejected = (reward.score(*last_answers(pairs, side)) for side in SIDES)
    right = sum(good > bad for good, bad in zip(chosen, rejected, strict=True))
    interval = low, high = wilson(right, len(pairs))
    say(f"{right / len(pairs):.3f} [{low:.3f}, {high:.3f}] of {len(pairs)} pairs ranked right")
    return {
        "accuracy": right / len(pairs),
        "accuracy_interval": interval,
        "mean_chosen": sum(chosen) / len(chosen),
        "mean_rejected": sum(rejected) / len(rejected),
    }


if __name__ == "__main__":
    run_recipe(main)
