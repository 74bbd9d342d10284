"""What every policy's recipe begins and ends with: the SFT model, the reward, prompts, and what was gained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments
from trl import ModelConfig

from rewarded_lines.config import DataSpec, GenerationSpec
from rewarded_lines.data.dataset_formats import read_pairs, read_prompts
from rewarded_lines.data.lengths import Limit, fit, positions_of, shorten_prompt
from rewarded_lines.data.messages import check_template
from rewarded_lines.data.prompts import Prompt, encode, encode_answers
from rewarded_lines.data.rows import Row, Tell, rows_hash
from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.engines.tokenizers import (
    end_tokens,
    load_config,
    load_generation_config,
    refuse_empty,
    set_template,
)
from rewarded_lines.errors import fail
from rewarded_lines.projects import PROJECT_FILE, Project, load_project
from rewarded_lines.rewards.load_rewards import reward_limits
from rewarded_lines.training.generation_ends import keep_generation_config, plain_generation
from rewarded_lines.training.load_models import (
    absolute,
    check_start,
    load_policy,
    load_tokenizer,
    reference_hash,
)
from rewarded_lines.training.policy_gain import Parts, Sampler, describe, gains, summary
from rewarded_lines.training.project_entry import generation_inputs, register
from rewarded_lines.training.recipe_options import DataOptions, RewardOptions, RunOptions
from rewarded_lines.training.training_reward import WeightedReward, load_training_reward
from rewarded_lines.training.training_run import TrainingRun, from_main, save_tokenizer, say

_SIDES = ("chosen", "rejected")
_OF_THE_PROJECT = {
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "max_tokens", "eos_token_id",
    "stop_token_ids", "stop", "stop_strings",
}  # fmt: skip


@dataclass
class PolicyTask:
    """A policy to be trained, before any of its models is loaded.

    Attributes:
        base: the SFT model, by its absolute path or Hub id.
        tokenizer: the base's, with the project's chat template.
        reader: of its responses: where they end, what rewards see of them.
        generation: the project's settings.
        reward: what it is trained for.
        rows: to train on, prompts or pairs.
        prompts: to measure on.
        inputs: hashes of all of these.
        counted: rows that were read, those that are too long included.
    """

    base: str
    tokenizer: Any
    reader: ResponseReader
    generation: GenerationSpec
    reward: WeightedReward
    rows: list[Row]
    prompts: list[Prompt]
    inputs: dict[str, Any]
    options: RunOptions
    data: DataOptions
    rewards: RewardOptions
    counted: int = 0
    before: Parts = field(default_factory=dict)
    _restore: Callable[[], None] = lambda: None

    @property
    def chats(self) -> bool:
        """Whether the prompts are chats."""
        return isinstance(self.rows[0]["prompt"], list)

    def fit(self, max_prompt_tokens: int | None, response_tokens: int, max_length: int | None = None) -> None:
        """Leave out, shorten or refuse rows that the policy or a reward model cannot read, in training and measuring.

        Args:
            max_prompt_tokens: the longest prompt.
            response_tokens: the longest response.
            max_length: the longest pair, prompt and answer; that is longer in training data would be cut.

        Raises:
            UserError: rows are too long and shall be refused, or none are left; or a prompt has no tokens.
        """
        room = positions_of(load_config(self.base))
        # One position more: to learn how likely the last token is takes one step beyond it.
        spare = None if room is None else room - response_tokens - 1
        whole = None if max_length is None else max_length - response_tokens - 1
        found = {"max_prompt_tokens": max_prompt_tokens, "its positions, less a response": spare}
        if "chosen" not in self.rows[0]:
            found["max_length, less a response"] = whole
        option, most = min(
            ((name, limit) for name, limit in found.items() if limit is not None), key=lambda one: one[1]
        )
        limits = [Limit("the policy", most, option, self._prompt_lengths)]
        prompts = [row["prompt"] for row in self.rows]
        limits += reward_limits(self.reward.rewards, self.tokenizer, prompts, response_tokens)
        too_long = self.data.too_long
        self.prompts = fit(self.prompts, limits, too_long, "validation prompts", shorten_prompt, say)
        if "chosen" in self.rows[0]:
            longest = min(limit for limit in (max_length, room, 1 << 30) if limit is not None)
            limits = [Limit("the policy", longest, "max_length, or its positions", self._pair_lengths)]
            self.rows = fit(self.rows, limits, too_long, "training pairs", shorten_pair, say)
            return
        kept = fit(prompts, limits, too_long, "training prompts", shorten_prompt, say)
        self.rows = [{"prompt": prompt} for prompt in kept]

    def spec(self, **settings: Any) -> GenerationSpec:
        """Return how responses are sampled outside of the trainer: the project's template and ends, a recipe's rest.

        Args:
            **settings: temperature, max_tokens, seed, dtype and what else the recipe decides.
        """
        kept = ("stop", "chat_template", "chat_template_kwargs", "strip")
        project = {name: getattr(self.generation, name) for name in kept}
        return GenerationSpec(**{**project, "stop_token_ids": tuple(sorted(self.reader.ends)), **settings})

    def load_policy(self, model_options: ModelConfig) -> PreTrainedModel:
        """Return the SFT model, to be trained; it generates with no settings but those it is told."""
        model = load_policy(self.base, model_options)
        pad = self.tokenizer.pad_token_id
        self._restore = plain_generation(model, self.reader.ends, self.tokenizer.eos_token_id if pad is None else pad)
        return model

    def save(self, save_model: Callable[[str], Any], run: TrainingRun, training: TrainingArguments) -> None:
        """Save the trained policy with the base's own tokenizer and generation config.

        Args:
            save_model: the trainer's, called with the folder in every process.
            run: that it belongs to.
            training: the trainer's configuration.
        """
        run.keep()
        self._restore()
        save_model(str(run.folder))

        def beside() -> None:
            save_tokenizer(load_tokenizer(self.base), run.folder)
            keep_generation_config(self.base, run.folder)

        from_main(beside)
        run.saved(**self.facts(training))

    def sampler(self, spec: GenerationSpec) -> Sampler:
        """Return what answers the validation prompts and scores the answers."""
        return Sampler(self.reward, self.tokenizer, spec)

    def measure_base(self, sampler: Sampler, model: Any) -> None:
        """Score the SFT model's responses, and standardize the reward on them if it is to be.

        Raises:
            UserError: a reward gives every response the same score.
        """
        self.before = from_main(lambda: sampler.measure(model, self.base, self.prompts))
        if self.rewards.normalize_rewards:
            self.reward.standardize(self.before)

    def measure_gain(self, sampler: Sampler, model: Any, folder: Path) -> dict[str, Any]:
        """Return what the policy gained over the SFT model, for each reward, and say it."""
        after = from_main(lambda: sampler.measure(model, str(folder), self.prompts))
        found = gains(self.before, after)
        say(describe(found))
        for name, count in self.reward.shortened.items():
            if count:
                say(f"reward `{name}`: {count} prompts were shortened from the beginning to leave room for a response")
        for name, count in self.reward.unread.items():
            if count:
                say(f"reward `{name}`: {count} responses were longer than it reads, and got the lowest score so far")
        if len(found) == 1:
            return next(iter(found.values()))
        # The weighted sum is what such a policy was trained for.
        total = gains({"sum": self.reward.total(self.before)}, {"sum": self.reward.total(after)})["sum"]
        return {**total, "rewards": found}

    def _prompt_lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        lengths = [len(ids) for ids in encode(self.tokenizer, prompts)]
        refuse_empty("prompts", prompts, lengths)
        return lengths

    def _pair_lengths(self, rows: Sequence[Row]) -> list[int]:
        prompts, longest = [row["prompt"] for row in rows], [0] * len(rows)
        for side in _SIDES:
            heads, tails = encode_answers(self.tokenizer, prompts, [row[side] for row in rows], self.reader.ends)
            longest = [max(most, len(h) + len(t)) for most, h, t in zip(longest, heads, tails, strict=True)]
            refuse_empty("training pairs", prompts, [len(head) for head in heads])
        return longest

    def facts(self, training: TrainingArguments) -> dict[str, Any]:
        """Return what the record says of how the policy came about."""
        return {
            "base": self.base,
            "base_hash": self.inputs["base"],
            "reward": self.reward.name,
            "weights": self.reward.weights,
            "standardized": {name: {"mean": m, "deviation": s} for name, (m, s) in self.reward.scales.items()},
            "seed": training.seed,
            "prompts": "chats" if self.chats else "texts",
            "end_tokens": sorted(self.reader.ends),
        }

    def add_to_project(self, run: TrainingRun) -> None:
        """Add the policy to the project; one that was trained for a sum is a baseline, not a policy to be merged."""
        section = "policies" if len(self.reward.weights) == 1 else "baselines"
        entries: Mapping[tuple[str, ...], Any] = {(section, self.rewards.name()): run.output}
        from_main(lambda: say(*register(self.options.project_file, entries)))

    def heading(self, algorithm: str, what: str) -> str:
        """Return what a recipe says when it starts."""
        scores = ", ".join(f"`{name}` {summary(values)}" for name, values in self.before.items())
        return f"{algorithm} of {self.base} for `{self.rewards.name()}`, {what}; the SFT model scores {scores}"


def load_task(
    options: RunOptions,
    data: DataOptions,
    rewards: RewardOptions,
    model_options: ModelConfig,
    training: TrainingArguments,
    pairs: bool = False,
) -> PolicyTask:
    """Read the project, rewards, tokenizer and data of a policy.

    Args:
        options: names the project.
        data: training and validation data.
        rewards: which rewards, with what weights.
        model_options: must not name another model than the project's base.
        training: says on which device rewards run.
        pairs: the training rows are pairs.

    Raises:
        UserError: with whatever is missing or does not fit.
    """
    weights = rewards.weights()
    project = _project(options, model_options)
    project.require("rewards")
    if project.config.base is None:
        raise fail(
            "`base` is missing",
            where=options.project_file,
            expected="the SFT model that policies start from",
            remedy="train it with recipes/sft.py, or name one with `model_name_or_path`",
        )
    if model_options.model_revision != "main":
        what = "a project's base has no revision, so the merger would take another model than this one"
        raise fail(what, where="model_revision", remedy="download that revision and name its folder as `base`")
    base = absolute(project.resolve(project.config.base))
    check_start(base, model_options, options.project_file)
    _check_options(training, project)
    validation = data.validation()
    if validation is None:
        raise fail("no validation data", where="validation_file", expected="prompts to measure the policy on")
    read = read_pairs if pairs else _prompt_rows
    rows = read(data.train(), tell=say)
    prompts = read_prompts(validation, tell=say)
    _check_one_kind(rows[0]["prompt"], prompts[0], validation.file or str(validation.dataset))
    reward = load_training_reward(project, weights, str(training.device))
    inputs = {
        "train": rows_hash(rows),
        "validation": rows_hash({"prompt": prompt} for prompt in prompts),
        "base": reference_hash(base),
        "reward": reward.fingerprint,
        **generation_inputs(project.generation),
    }
    tokenizer = load_tokenizer(base)
    set_template(tokenizer, project.generation)
    reader = _reader(base, tokenizer, project)
    _check_stop_token(training, reader)
    task = PolicyTask(
        base, tokenizer, reader, project.generation, reward, rows, prompts, inputs, options,
        data, rewards, len(rows),
    )  # fmt: skip
    _check_readable(task)
    return task


def _prompt_rows(spec: DataSpec, tell: Tell) -> list[Row]:
    return [{"prompt": prompt} for prompt in read_prompts(spec, tell=tell)]


def shorten_pair(row: Row, fits: Callable[[Row], bool]) -> Row | None:
    """Return a pair with the longest end of its prompt that lets it fit; see `shorten_prompt`."""
    prompt = shorten_prompt(row["prompt"], lambda prompt: fits({**row, "prompt": prompt}))
    return None if prompt is None else {**row, "prompt": prompt}


def _check_options(training: Any, project: Project) -> None:
    """Refuse template variables and ends of responses that would reach training only.

    Raises:
        UserError: the recipe has some that the project does not declare.
    """
    for name in set(getattr(training, "generation_kwargs", None) or {}) & _OF_THE_PROJECT:
        raise fail(
            f"`{name}` would reach training only",
            where="generation_kwargs",
            expected="settings that the trainer has no key for",
            remedy="set the trainer's own key of that name, or for what ends a response the project's `generation:`",
        )
    given = getattr(training, "chat_template_kwargs", None)
    if given and dict(given) != dict(project.config.generation.chat_template_kwargs):
        raise fail(
            "the variables of the chat template would reach training only",
            where="chat_template_kwargs",
            expected=f"those of the project: {project.config.generation.chat_template_kwargs or 'none'}",
            got=str(dict(given)),
            remedy=f"declare them in {project.path}, for training, measuring and sweeps alike: "
            f"`generation: {{chat_template_kwargs: {dict(given)}}}`",
        )


def _check_stop_token(training: Any, reader: ResponseReader) -> None:
    more = getattr(training, "stop_token_id", None)
    if more is not None and more not in reader.ends:
        raise fail(
            "a token that would end responses in training only",
            where="stop_token_id",
            got=str(more),
            remedy=f"declare it in the project: `generation: {{stop_token_ids: [{more}]}}`",
        )


def _reader(base: str, tokenizer: Any, project: Project) -> ResponseReader:
    reader = ResponseReader.of(tokenizer, end_tokens(tokenizer, load_generation_config(base)), project.generation)
    if not reader.ends:
        raise fail(
            "nothing says where a response ends",
            where=base,
            expected="an end token in its generation config or its tokenizer",
            remedy="declare one in the project: `generation: {stop_token_ids: [ID]}`",
        )
    return reader


def _check_one_kind(trained: Prompt, measured: Prompt, where: str) -> None:
    if isinstance(trained, list) != isinstance(measured, list):
        kinds = ["chats" if isinstance(one, list) else "texts" for one in (trained, measured)]
        raise fail(
            "training rows and validation prompts have different forms: the policy would be measured on others",
            where=where,
            expected=f"{kinds[0]}, as in training",
            got=kinds[1],
            remedy="set `chat: true`, which makes turns of texts, or name validation rows of the same form",
        )


def _check_readable(task: PolicyTask) -> None:
    """Refuse chats that the policy's template or a reward leaves something out of; say what a reward does not read."""
    asked = [*(row["prompt"] for row in task.rows), *task.prompts]
    if task.chats:
        whole = [row["prompt"] + row[side] for row in task.rows for side in ("chosen", "rejected") if side in row]
        check_template(task.tokenizer, [*whole, *asked], "training and validation rows")
    for reward in task.reward.rewards.values():
        if note := reward.check(asked):
            say(note)


def _project(options: RunOptions, model_options: ModelConfig) -> Project:
    """Return the project; a model that is named where the project has no base yet becomes its base."""
    path = options.project_file
    if not Path(path).is_file():
        raise fail(
            "no project file there",
            where=path,
            expected=f"a {PROJECT_FILE} that declares the rewards",
            remedy="copy a suite of eval/suites there, or name one with `project_file`",
        )
    project = load_project(path)
    if project.config.base is None and model_options.model_name_or_path:
        name = model_options.model_name_or_path
        value: Any = Path(name) if Path(name).is_dir() else name
        from_main(lambda: say(*register(path, {("base",): value})))
        project = load_project(path)
    return project


def prompts_of(rows: Sequence[Row]) -> list[Prompt]:
    """Return the prompts of rows."""
    return [row["prompt"] for row in rows]
