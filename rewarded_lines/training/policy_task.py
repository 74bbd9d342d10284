"""What the recipes of policies share: SFT model, reward and data, the saved policy and its gain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel
from trl import ModelConfig

from rewarded_lines.checkpoints.hashing import weights_hash
from rewarded_lines.checkpoints.reader import resolve_folder
from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.lengths import Limit, fit, fit_prompts, positions_of
from rewarded_lines.data.prompts import Prompt, encode, encode_answers
from rewarded_lines.data.rows import Row
from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.engines.tokenizers import load_config, refuse_empty
from rewarded_lines.projects import load_project
from rewarded_lines.rewards.load_rewards import reward_limits
from rewarded_lines.rewards.reward import columns_of
from rewarded_lines.training.gains import check_scored, describe, paired_gain, summary
from rewarded_lines.training.generation_config import keep_generation_config, plain_generation
from rewarded_lines.training.load_models import (
    generation_dtype,
    load_policy,
    load_tokenizer,
    lora_config,
    reference_loading,
    save_tokenizer,
)
from rewarded_lines.training.online_trainer import packed
from rewarded_lines.training.recipe_options import DataOptions, RewardOptions, RunOptions, checked_values
from rewarded_lines.training.register_model import register
from rewarded_lines.training.sampling import Scores, sample
from rewarded_lines.training.training_reward import RewardFunctions, WeightedReward, tell_all_equal
from rewarded_lines.training.training_run import TrainingRun, from_main, say

# A `GenerationSpec` has so many.
_SEEDS = 1_000_000


@dataclass
class PolicyTask:
    """A policy to train, from `load_task`.

    Attributes:
        base: absolute path or Hub id of the SFT model.
        tokenizer: the base's, with the project's chat template.
        rows: training rows: prompts with their columns, or pairs.
        measured: validation prompts with their columns.
        inputs: hashes of all that the policy is made from.
        counted: number of training rows before `fit`.
        before: scores of the SFT model's responses to the validation prompts.
    """

    base: str
    tokenizer: Any
    reader: ResponseReader
    generation: GenerationSpec
    reward: WeightedReward
    rows: list[Row]
    measured: list[Row]
    inputs: dict[str, Any]
    options: RunOptions
    data: DataOptions
    rewards: RewardOptions
    counted: int
    before: Scores = field(default_factory=dict)
    _restore: Callable[[], None] = lambda: None
    _dtype: str = "float32"

    @property
    def chats(self) -> bool:
        """True if the prompts are chats."""
        return isinstance(self.rows[0]["prompt"], list)

    @property
    def train_prompts(self) -> list[Prompt]:
        """The prompts of the training rows."""
        return [row["prompt"] for row in self.rows]

    @property
    def prompts(self) -> list[Prompt]:
        """The validation prompts."""
        return [row["prompt"] for row in self.measured]

    def fit(self, max_prompt_tokens: int | None, response_tokens: int, max_length: int | None = None) -> None:
        """Refuse, leave out or shorten rows that are too long for the policy or a reward model.

        `max_length` limits a prompt with its answer in the training data.
        """
        pairs, too_long = "chosen" in self.rows[0], self.data.too_long
        room = positions_of(load_config(self.base))
        # Scoring a response of full length takes one position more than sampling it.
        taken = response_tokens + 1
        found = {
            "max_prompt_tokens": max_prompt_tokens,
            "its positions, less a response": room and room - taken,
            "max_length, less a response": None if pairs else max_length and max_length - taken,
        }
        limited = [(most, option) for option, most in found.items() if most is not None]
        most, option = min(limited, key=lambda one: one[0])
        limits = [Limit("the policy", most, option, self._prompt_lengths)]
        limits += reward_limits(self.reward.rewards, self.tokenizer, self.train_prompts, response_tokens)
        self.measured = fit_prompts(self.measured, limits, too_long, "validation prompts", say)
        if pairs:
            longest = min(limit for limit in (max_length, room, 1 << 30) if limit is not None)
            limits = [Limit("the policy", longest, "max_length, or its positions", self._pair_lengths)]
            self.rows = fit(self.rows, limits, too_long, "training pairs", say)
        else:
            self.rows = fit_prompts(self.rows, limits, too_long, "training prompts", say)

    def spec(self, **settings: Any) -> GenerationSpec:
        """Return the project's settings for sampling outside of the trainer, in the loaded policy's dtype.

        `settings` are on top.

        Raises:
            UserError: values out of range.
        """
        kept = ("stop", "chat_template", "chat_template_kwargs", "strip")
        project = {name: getattr(self.generation, name) for name in kept}
        # A trainer's seed may be a date.
        own: dict[str, Any] = {"seed": settings.pop("seed", 0) % _SEEDS, "dtype": self._dtype}
        own["stop_token_ids"] = tuple(sorted(self.reader.ends))
        with checked_values():
            return GenerationSpec(**{**project, **own, **settings})

    def trainer_spec(self, training: Any, longest: int) -> GenerationSpec:
        """Return the settings with which an online trainer samples, for measuring: at most `longest` tokens."""
        return self.spec(
            temperature=training.temperature,
            top_p=training.top_p,
            top_k=training.top_k or 0,
            min_p=training.min_p or 0.0,
            repetition_penalty=training.repetition_penalty,
            max_tokens=longest,
            seed=training.seed,
        )

    def trainer_parts(self, training: Any, model_options: ModelConfig, penalty: float | None) -> dict[str, Any]:
        """Return what an online trainer takes of the task, with `training`, which gets the weights of the rewards.

        `penalty` is what a response pays that does not end.
        """
        rewarded = RewardFunctions(self.reward, self.reader, self.rows, penalty)
        training.reward_weights = rewarded.weights
        # TRL loads the reference model itself, with these arguments.
        training.model_init_kwargs = reference_loading(model_options)
        # The tokenizer's template already contains the project's variables.
        training.chat_template_kwargs = None
        prompts = {"prompt": list(map(packed, self.train_prompts)), "row": range(len(self.rows))}
        return {
            "args": training,
            "reader": self.reader,
            "chats": self.chats,
            "reward_funcs": rewarded.functions,
            "train_dataset": Dataset.from_dict(prompts),
            "processing_class": self.tokenizer,
            "peft_config": lora_config(model_options),
        }

    def load_policy(self, model_options: ModelConfig) -> PreTrainedModel:
        """Return the SFT model to be trained, without sampling settings of its own."""
        model = load_policy(self.base, model_options)
        self._dtype = generation_dtype(model_options, model)
        pad = self.tokenizer.pad_token_id
        self._restore = plain_generation(model, self.reader.ends, self.tokenizer.eos_token_id if pad is None else pad)
        return model

    def finish(self, trainer: Any, run: TrainingRun, spec: GenerationSpec, **metrics: Any) -> None:
        """Save the trained policy, measure its gain over the SFT model, and add it to the project."""
        self._save(trainer, run)
        policy = trainer.accelerator.unwrap_model(trainer.model)
        run.finish(
            lambda: {**metrics, **self._gain(spec, policy, run.folder)},
            lambda: self.add_to_project(run),
        )

    def _save(self, trainer: Any, run: TrainingRun) -> None:
        """Save the policy with the base's own tokenizer and generation config."""
        self._restore()
        run.save_model(trainer)
        from_main(lambda: save_tokenizer(load_tokenizer(self.base), run.folder))
        from_main(lambda: keep_generation_config(self.base, run.folder))
        run.saved(
            base=self.base,
            base_hash=weights_hash(resolve_folder(self.base)),
            reward=self.reward.name,
            weights=self.reward.weights,
            standardized={name: {"mean": m, "deviation": s} for name, (m, s) in self.reward.scales.items()},
            seed=trainer.args.seed,
            prompts="chats" if self.chats else "texts",
            end_tokens=sorted(self.reader.ends),
        )

    def measure(self, spec: GenerationSpec, model: Any, folder: str) -> Scores:
        """Return the scores of a model's responses to the validation prompts."""
        responses = sample("hf", model, folder, self.tokenizer, spec, self.prompts)
        return self.reward.parts(self.prompts, [one.judged for one in responses], columns_of(self.measured))

    def measure_base(self, spec: GenerationSpec, model: Any) -> None:
        """Score the SFT model's responses; standardize the reward on them if that is set.

        Raises:
            UserError: a reward abstains on all but one, or gives all the same score and is to be standardized.
        """
        self.before = from_main(lambda: self.measure(spec, model, self.base))
        check_scored(self.before)
        if self.rewards.normalize_rewards:
            self.reward.standardize(self.before)
        else:
            say(*tell_all_equal(self.before))

    def _gain(self, spec: GenerationSpec, model: Any, folder: Path) -> dict[str, Any]:
        """Return and print the policy's gain over the SFT model, by reward and for the weighted sum."""
        after = from_main(lambda: self.measure(spec, model, str(folder)))
        found: dict[str, dict[str, Any]] = {
            name: paired_gain(scores, after[name], name) for name, scores in self.before.items()
        }
        say(describe(found))
        counts = (
            (self.reward.shortened, "prompts were shortened from the beginning to leave room for a response"),
            (self.reward.unread, "responses were too long for it, and got the lowest score so far"),
        )
        say(*(f"reward `{name}`: {n} {what}" for by_reward, what in counts for name, n in by_reward.items() if n))
        if len(found) == 1:
            return next(iter(found.values()))
        totals = paired_gain(self.reward.total(self.before), self.reward.total(after), self.reward.name)
        return {**totals, "rewards": found}

    def _prompt_lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        lengths = [len(ids) for ids in encode(self.tokenizer, prompts)]
        refuse_empty("prompts", prompts, lengths)
        return lengths

    def _pair_lengths(self, rows: Sequence[Row]) -> list[int]:
        prompts, longest = [row["prompt"] for row in rows], [0] * len(rows)
        for side in ("chosen", "rejected"):
            heads, tails = encode_answers(self.tokenizer, prompts, [row[side] for row in rows], self.reader.ends)
            longest = [max(most, len(h) + len(t)) for most, h, t in zip(longest, heads, tails, strict=True)]
            refuse_empty("training pairs", prompts, [len(head) for head in heads])
        return longest

    def add_to_project(self, run: TrainingRun) -> None:
        """Add the policy to the project.

        One that is trained for a weighted sum is a baseline, unless `mixtures:` or `policies:` names it.
        """
        name, known = self.rewards.name(), load_project(self.options.project_file).config
        merged = len(self.reward.weights) == 1 or name in {**known.mixtures, **known.policies}
        entries: Mapping[tuple[str, ...], Any] = {("policies" if merged else "baselines", name): run.output}
        from_main(lambda: say(*register(self.options.project_file, entries)))

    def heading(self, algorithm: str, what: str) -> str:
        """Return the line that a recipe prints before it trains."""
        scores = ", ".join(f"`{name}` {summary(values)}" for name, values in self.before.items())
        return f"{algorithm} of {self.base} for `{self.rewards.name()}`, {what}; the SFT model scores {scores}"
