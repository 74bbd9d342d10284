"""Supervised fine-tuning: trains the model that every policy starts from.

    accelerate launch recipes/sft.py --config recipes/configs/demo/sft.yaml
    accelerate launch recipes/sft.py --config recipes/configs/demo/sft.yaml --seed 1 --output_dir runs/sft-1
    accelerate launch recipes/sft.py --model_name_or_path Qwen/Qwen2.5-0.5B --train_file train.jsonl --use_peft \\
        --output_dir sft
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml recipes/sft.py \\
        --config recipes/configs/summary/sft.yaml

The data hold prompt and completion (the loss is on the completion), messages (`assistant_only_loss` as in TRL), or
text. The token that ends a chat's turns becomes an end token in the model's generation config. Without
`model_name_or_path`, a tokenizer and a small Llama are trained from scratch. At the end an adapter (LoRA, QLoRA) is
folded into the base. The model becomes the project's `base`; with `--policy_name NAME` one of its policies instead, and
the model that it started from is the base. So several skills, each learned by SFT, can be merged.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# First, since it refuses versions that do not fit before these are imported.
from rewarded_lines.training.arguments import parse_recipe, run_recipe, trainer_settings

# isort: split
from transformers import set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer

from rewarded_lines import merge
from rewarded_lines.data.dataset_formats import read_demonstrations
from rewarded_lines.data.rows import Row, rows_hash
from rewarded_lines.errors import fail
from rewarded_lines.projects import load_project
from rewarded_lines.training.demonstrations import Demonstrations
from rewarded_lines.training.generation_config import (
    generation_inputs,
    generation_of,
    keep_generation_config,
    plain_generation,
)
from rewarded_lines.training.load_models import (
    absolute,
    load_policy,
    load_tokenizer,
    lora_config,
    save_tokenizer,
)
from rewarded_lines.training.recipe_options import DataOptions, SftOptions
from rewarded_lines.training.register_model import register
from rewarded_lines.training.scratch_model import MuonAdamW, ScratchModel, WholeHeadTrainer, make_llama, train_tokenizer
from rewarded_lines.training.training_record import MetricsCallback, reference_hash
from rewarded_lines.training.training_run import TrainingRun, from_main, say, training_run


def main(argv: Sequence[str]) -> None:
    """Train the SFT model; `argv` is `--config FILE` and overrides."""
    arguments = parse_recipe((SftOptions, DataOptions, ScratchModel, ModelConfig, SFTConfig), argv, __doc__ or "")
    options, data, scratch, model_options, training = arguments
    with training_run("sft", arguments) as run:
        set_seed(training.seed)
        start, revision = model_options.model_name_or_path, model_options.model_revision
        base = absolute(start, revision) if start else None
        check_policy(options, base)
        corpus = read_demonstrations(data.train(), tell=say)
        held_out = data.validation()
        validation = read_demonstrations(held_out, tell=say) if held_out else []
        generation = generation_of(options.project_file)
        inputs = {"train": rows_hash(corpus), "validation": rows_hash(validation), "base": reference_hash(base)}
        inputs |= generation_inputs(generation)
        if base:
            tokenizer = load_tokenizer(base, revision)
        else:
            tokenizer = train_tokenizer(map(whole_text, corpus), scratch)
        rows = Demonstrations(tokenizer, base, generation, training)
        if not run.begin(**inputs):
            add_to_project(options, base, run)
            return

        corpus = rows.fit(corpus, data.too_long, "training rows", say)
        validation = rows.fit(validation, data.too_long, "validation rows", say) if validation else []
        if base:
            model = load_policy(base, model_options)
            lora, optimizer = lora_config(model_options), None
        else:
            model = make_llama(tokenizer, scratch)
            lora, optimizer = None, MuonAdamW(model, training.learning_rate, training.weight_decay)
        say(f"SFT of {base or 'a new Llama'}, {model.num_parameters():,} parameters, {len(corpus)} texts")

        restore = plain_generation(model, rows.ends, tokenizer.pad_token_id) if base else None
        with trainer_settings():
            trainer = (SFTTrainer if base else WholeHeadTrainer)(
                model=model,
                args=training,
                train_dataset=rows.dataset(corpus),
                eval_dataset=rows.dataset(validation) if validation else None,
                processing_class=rows.tokenizer,
                peft_config=lora,
                optimizers=(optimizer, None),
                callbacks=[MetricsCallback(run.folder)],
            )
        metrics = trainer.train(resume_from_checkpoint=run.checkpoint).metrics
        if restore:
            restore()
        run.save_model(trainer, "adapter" if lora else "")
        if lora:
            from_main(lambda: fold(str(base), run.folder))
        if base:
            from_main(lambda: keep_generation_config(base, run.folder, rows.added_ends))
        from_main(lambda: save_tokenizer(rows.own, run.folder))
        run.saved(base=base, base_hash=inputs["base"], seed=training.seed)
        run.finish(
            lambda: {**metrics, **(perplexity(trainer) if validation else {})},
            lambda: add_to_project(options, base, run),
        )


def whole_text(row: Row) -> str:
    """Return the text of a row, from which a tokenizer can be made."""
    if isinstance(row.get("messages", row.get("prompt")), list):
        remedy = "name a model to fine-tune with `model_name_or_path`"
        raise fail("a model from scratch knows no chat template", where="train_file", got="a chat", remedy=remedy)
    return str(row["text"] if "text" in row else row["prompt"] + row["completion"])


def perplexity(trainer: SFTTrainer) -> dict[str, float]:
    """Return the loss on the validation rows and its perplexity."""
    metrics = trainer.evaluate()
    metrics["validation_perplexity"] = math.exp(metrics["eval_loss"])
    say(f"validation perplexity {metrics['validation_perplexity']:.1f}")
    return metrics


def check_policy(options: SftOptions, base: str | None) -> None:
    """Refuse a policy that the project could not merge: one without a base, or of another base."""
    if options.policy_name is None:
        return
    where = "policy_name"
    if base is None:
        raise fail("a policy starts from a base", where=where, remedy="name the base with `model_name_or_path`")
    path = Path(options.project_file)
    known = load_project(path) if path.exists() else None
    if known and known.config.base and (own := absolute(known.resolve(known.config.base))) != base:
        remedy = "start from the project's base, or name another `project_file`"
        raise fail("the project has another base", where=where, expected=own, got=base, remedy=remedy)


def add_to_project(options: SftOptions, base: str | None, run: TrainingRun) -> None:
    """Make the model the project's base, or a policy of the model that it started from."""
    entries: dict[tuple[str, ...], Any] = {("base",): run.output}
    if options.policy_name:
        start = Path(str(base)) if Path(str(base)).is_dir() else base
        entries = {("base",): start, ("policies", options.policy_name): run.output}
    from_main(lambda: say(*register(options.project_file, entries)))


def fold(base: str, folder: Path) -> None:
    """Fold the adapter in `folder/adapter` into the base, and move the whole model into `folder`."""
    say("folding the adapter into the base")
    merge(base, {"sft": folder / "adapter"}, 1.0, alpha=1.0, beta=0.0, as_="full", out=folder / "folded")
    for path in sorted((folder / "folded").iterdir()):
        path.replace(folder / path.name)
    (folder / "folded").rmdir()
    shutil.rmtree(folder / "adapter")


if __name__ == "__main__":
    run_recipe(main)
