"""A policy for one reward from preference pairs: DPO, on the SFT model's own best and worst responses or given pairs.

    accelerate launch recipes/dpo.py --config recipes/configs/demo/dpo.yaml --reward positive
    accelerate launch recipes/dpo.py --config recipes/configs/demo/dpo.yaml --reward detailed \\
        --output_dir runs/demo/policies-dpo/detailed
    accelerate launch recipes/dpo.py --pairs given --train_file pairs.jsonl --validation_file prompts.jsonl \\
        --reward helpful --output_dir policies/helpful

With `pairs: sampled` the recipe samples several responses to every training prompt (by vLLM if installed) and scores
them by rewards of the project. The best and the worst make a pair if they differ enough. Responses are kept as Parquet
in `samples_file` for the policies of other rewards, pairs in `pairs_file` for later runs. With `pairs: given` the data
hold prompt, chosen and rejected in any published form; `rewarded-lines recipes` names the page about data. The policy
is added to the project.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

# First, since it refuses versions that do not fit before these are imported.
from rewarded_lines.training.arguments import parse_recipe, run_recipe, trainer_settings

# isort: split
from transformers import set_seed
from trl import DPOConfig, ModelConfig

from rewarded_lines.config import GenerationSpec, decides
from rewarded_lines.data.rows import Row, rows_hash
from rewarded_lines.errors import fail
from rewarded_lines.rewards.reward import columns_of
from rewarded_lines.training.gains import scored
from rewarded_lines.training.load_models import load_policy, lora_config
from rewarded_lines.training.load_task import load_task
from rewarded_lines.training.policy_task import PolicyTask
from rewarded_lines.training.preference_pairs import TokenDPOTrainer, best_and_worst, kept_rows, pair_tokens
from rewarded_lines.training.recipe_options import DataOptions, RewardOptions, RunOptions, SamplingOptions
from rewarded_lines.training.sampling import choose_engine, sample
from rewarded_lines.training.training_record import MetricsCallback
from rewarded_lines.training.training_run import from_main, say, training_run


@dataclass
class DPORecipe:
    """What this recipe adds to TRL's `DPOConfig`."""

    pairs: str = field(default="sampled", metadata={"help": "sampled or given", "choices": ["sampled", "given"]})
    pairs_file: str | None = field(
        default=None, metadata={"help": "file for sampled pairs; by default OUTPUT_DIR.pairs.parquet"}
    )
    samples_file: str | None = field(
        default=None,
        metadata={"help": "file for sampled responses; by default samples.parquet beside OUTPUT_DIR"},
    )
    responses: int = field(default=8, metadata={"help": "responses to every training prompt"})
    margin: float = field(
        default=0.5, metadata={"help": "least difference in a pair, in standard deviations of the reward"}
    )
    max_response_tokens: int = field(default=64, metadata={"help": "longest response"})
    temperature: float = field(default=1.0, metadata={"help": "sampling temperature"})


def main(argv: Sequence[str]) -> None:
    """Sample or read the pairs, train the policy, measure its gain; `argv` is `--config FILE` and overrides."""
    parts = (DPORecipe, RunOptions, DataOptions, RewardOptions, SamplingOptions, ModelConfig, DPOConfig)
    arguments = parse_recipe(parts, argv, __doc__ or "")
    recipe, options, data, rewards, sampling, model_options, training = arguments
    if recipe.pairs == "sampled" and recipe.responses < 2:
        raise fail("a pair is two of the responses to a prompt", where="responses", got=str(recipe.responses))
    with training_run("dpo", arguments) as run:
        set_seed(training.seed)
        engine = choose_engine(sampling.sampling_engine)
        task = load_task(options, data, rewards, model_options, training, pairs=recipe.pairs == "given")
        if not run.begin(**task.inputs):
            task.add_to_project(run)
            return

        task.fit(sampling.max_prompt_tokens, recipe.max_response_tokens, training.max_length)
        policy = task.load_policy(model_options)
        spec = task.spec(
            temperature=recipe.temperature,
            max_tokens=recipe.max_response_tokens,
            seed=training.seed,
        )
        task.measure_base(spec, policy)
        if recipe.pairs == "sampled":
            output = Path(run.output)
            samples = Path(recipe.samples_file or output.with_name("samples.parquet"))
            path = Path(recipe.pairs_file or f"{output}.pairs.parquet")
            pairs = from_main(lambda: sampled_pairs(path, samples, task, recipe, sampling, spec, engine, policy))
        else:
            pairs = task.rows
        say(task.heading("DPO", f"{len(pairs)} pairs"))

        lora = lora_config(model_options)
        # The lengths of the pairs are for `train_sampling_strategy: group_by_length`.
        training.remove_unused_columns = False
        with trainer_settings():
            trainer = TokenDPOTrainer(
                model=policy,
                ref_model=None if lora or training.precompute_ref_log_probs else load_policy(task.base, model_options),
                args=training,
                train_dataset=pair_tokens(task.tokenizer, pairs, task.reader.ends),
                processing_class=task.tokenizer,
                peft_config=lora,
                callbacks=[MetricsCallback(run.folder)],
            )
        metrics = trainer.train(resume_from_checkpoint=run.checkpoint).metrics
        task.finish(trainer, run, spec, **metrics, pairs=len(pairs))


def sampled_pairs(
    path: Path,
    samples: Path,
    task: PolicyTask,
    recipe: DPORecipe,
    sampling: SamplingOptions,
    spec: GenerationSpec,
    engine: str,
    policy: object,
) -> list[Row]:
    """Return the pairs in `path`; else make them from the responses in `samples`, which are sampled if absent."""
    prompts = task.train_prompts
    repeated = [prompt for prompt in prompts for _ in range(recipe.responses)]
    # The same for all rewards, so their policies share the responses.
    settings = {key: value for key, value in decides(spec).items() if key != "stop_token_ids"}
    sampled_from = {
        **{name: task.inputs[name] for name in ("train", "base", "generation") if name in task.inputs},
        **{"spec": settings, "engine": engine, "responses": recipe.responses},
        **{"longest": sampling.max_prompt_tokens, "ends": sorted(task.reader.ends)},
        **({} if len(task.rows) == task.counted else {"prompts": rows_hash({"prompt": one} for one in prompts)}),
    }

    def answer() -> list[Row]:
        say(f"sampling {len(repeated)} responses to {len(prompts)} prompts with {engine}; this may take minutes")
        responses = sample(engine, policy, task.base, task.tokenizer, spec, repeated)
        return [
            {
                **{"prompt": prompt, "response": one.text, "seen": one.judged},
                **{"end": task.reader.end_of(one), "tokens": one.tokens},
            }
            for prompt, one in zip(repeated, responses, strict=True)
        ]

    def make() -> list[Row]:
        rows, found = kept_rows(samples, sampled_from, answer)
        say(f"{len(rows)} responses {'found' if found else 'kept'} in {samples}")
        responses, seen, ends = ([row[name] for row in rows] for name in ("response", "seen", "end"))
        columns = [one for one in columns_of(task.rows) for _ in range(recipe.responses)]
        scores = task.reward.score(repeated, seen, columns)
        if without := len(scores) - len(scored(scores)):
            say(f"{without} of {len(scores)} responses have no score, and enter no pair")
        tokens = [row.get("tokens") for row in rows]
        return best_and_worst(repeated, responses, scores, recipe.responses, recipe.margin, ends, tokens)

    scored_by = {name: task.inputs[name] for name in ("reward", "declarations")}
    made_from = {**sampled_from, **scored_by, "scales": task.reward.scales, "margin": recipe.margin}
    pairs, found = kept_rows(path, made_from, make)
    say(f"{len(pairs)} pairs {'found' if found else 'kept'} in {path}")
    return pairs


if __name__ == "__main__":
    run_recipe(main)
