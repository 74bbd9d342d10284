"""Supervised fine-tuning: the model that every policy starts from.

    accelerate launch recipes/sft.py --config recipes/configs/demo/sft.yaml
    accelerate launch recipes/sft.py --config recipes/configs/demo/sft.yaml --seed 1 --output_dir runs/sft-1

With `model` (a folder or a Hub id) that model is fine-tuned on prompts and completions; without it a
tokenizer and a small Llama are made from nothing on the corpus.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from rewarded_lines.training.arguments import parse_recipe, run_recipe
from rewarded_lines.training.corpus import COMPLETIONS, read_corpus
from rewarded_lines.training.optimizer import MuonAdamW
from rewarded_lines.training.output import check_output, save_tokenizer, training_output
from rewarded_lines.training.progress import MetricsCallback
from rewarded_lines.training.scratch import ScratchModel, make_llama, train_tokenizer


@dataclass
class SFTRecipe:
    """What this recipe adds to TRL's `SFTConfig`; `completion_only_loss` there chooses what is learned."""

    train_file: str = field(metadata={"help": "JSONL with prompt and completion"})
    validation_file: str | None = field(default=None, metadata={"help": "JSONL to report the loss on"})
    model: str | None = field(default=None, metadata={"help": "folder or Hub id; without it, from scratch"})
    overwrite: bool = field(default=False, metadata={"help": "replace the output folder"})


def main(argv: Sequence[str]) -> None:
    """Train the SFT model.

    Args:
        argv: `--config FILE` and overrides.
    """
    recipe, scratch, training = parse_recipe((SFTRecipe, ScratchModel, SFTConfig), argv)
    check_output(training.output_dir, recipe.overwrite)
    set_seed(training.seed)

    corpus = read_corpus(recipe.train_file, COMPLETIONS)
    validation = read_corpus(recipe.validation_file, COMPLETIONS) if recipe.validation_file else None

    if recipe.model:
        tokenizer = AutoTokenizer.from_pretrained(recipe.model)
        model = AutoModelForCausalLM.from_pretrained(recipe.model, dtype="auto")
        optimizer = None
    else:
        texts = [row["prompt"] + row["completion"] for row in corpus]
        tokenizer = train_tokenizer(texts, scratch)
        model = make_llama(tokenizer, scratch)
        optimizer = MuonAdamW(model, training.learning_rate, training.weight_decay)
    print(f"SFT of {recipe.model or 'a new Llama'}, {model.num_parameters():,} parameters, {len(corpus)} texts")

    with training_output(training, "sft", recipe.overwrite) as output:
        trainer = SFTTrainer(
            model=model,
            args=training,
            train_dataset=corpus,
            eval_dataset=validation,
            processing_class=tokenizer,
            optimizers=(optimizer, None),
            callbacks=[MetricsCallback(output.folder)],
        )
        metrics = trainer.train().metrics
        if validation is not None:
            metrics |= trainer.evaluate()
            metrics["validation_perplexity"] = math.exp(metrics["eval_loss"])
            print(f"validation perplexity {metrics['validation_perplexity']:.1f}")
        trainer.save_model()
        if trainer.is_world_process_zero():
            save_tokenizer(tokenizer, output.folder)
            configs = {"recipe": recipe, "scratch": scratch, "training": training}
            output.record(configs, metrics, base=recipe.model, seed=training.seed)


if __name__ == "__main__":
    run_recipe(main)
