"""The keys that recipes share, beside TRL's own: the project, the data, the rewards, and how the run is repeated.

TRL's names are kept where TRL has one (`dataset_name`, `dataset_train_split` …), and TRL's `ModelConfig` is used as it
is. Each class is a part of a recipe's YAML file and of its command line.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from rewarded_lines.config import DataSpec, TooLong
from rewarded_lines.errors import UserError, fail
from rewarded_lines.projects import PROJECT_FILE, problems_of


class KeyValues(dict[str, Any]):
    """`key=value,key=value` or a JSON object on the command line; a mapping in YAML."""

    def __init__(self, content: str | Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> None:
        """Read the text, or take the mapping.

        Raises:
            argparse.ArgumentTypeError: the text is neither.
        """
        super().__init__(_parse_pairs(content) if isinstance(content, str) else content)


class Columns(KeyValues):
    """Column of the data for each role, where the names differ: `prompt=post,completion=summary`."""


class Weights(KeyValues):
    """Weight of each reward: `helpful=0.5,brief=0.5`."""

    def __init__(self, content: str | Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> None:
        """Read the weights as numbers; see `KeyValues`."""
        super().__init__(content)
        try:
            self.update({name: float(value) for name, value in self.items()})
            if not all(map(math.isfinite, self.values())):
                raise ValueError("not finite")
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"weights are numbers, as in helpful=0.5,brief=0.5 ({error})") from error


@dataclass
class RunOptions:
    """Where a run belongs, and how it may be repeated."""

    project_file: str = field(
        default=PROJECT_FILE, metadata={"help": "project file that the run reads and adds its model to"}
    )
    effective_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "examples (episodes for PPO) of one optimizer update over all processes; gradient accumulation "
            "follows from it"
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "replace another run's output, or start anew"})


@dataclass
class DataOptions:
    """Training and validation data: local files, or a data set of the Hub."""

    train_file: str | None = field(default=None, metadata={"help": "JSONL, Parquet or CSV"})
    validation_file: str | None = field(default=None, metadata={"help": "JSONL, Parquet or CSV"})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id, instead of files"})
    dataset_config: str | None = field(default=None, metadata={"help": "subset of that data set"})
    dataset_revision: str | None = field(default=None, metadata={"help": "its branch, tag or commit"})
    dataset_train_split: str = field(default="train", metadata={"help": "its split to train on"})
    dataset_test_split: str = field(default="test", metadata={"help": "its split to validate on"})
    columns: Columns = field(default_factory=Columns, metadata={"help": "role=column, where a column has another name"})
    row_function: str | None = field(
        default=None,
        metadata={"help": "file.py:function that makes a row (or rows, or None) with the roles of a row of the data"},
    )
    train_limit: int | None = field(default=None, metadata={"help": "use the first rows only"})
    validation_limit: int | None = field(default=None, metadata={"help": "use the first rows only"})
    chat: bool = field(default=False, metadata={"help": "texts are turns of a chat; the tokenizer's template is used"})
    system_prompt: str | None = field(default=None, metadata={"help": "first turn of every chat"})
    too_long: TooLong = field(
        default="leave_out",
        metadata={
            "help": "rows that the model or a reward cannot read: refuse, leave_out, or truncate (the prompt, from its "
            "beginning; a response is never cut)",
            "choices": ["refuse", "leave_out", "truncate"],
        },
    )

    def train(self) -> DataSpec:
        """Return where the training rows are.

        Raises:
            UserError: neither a file nor a data set is named, or both are.
        """
        if (self.train_file is None) == (self.dataset_name is None):
            raise fail(
                "no training data" if self.train_file is None else "two sources of training data",
                where="arguments of the recipe",
                expected="either `train_file` or `dataset_name`",
            )
        return self._spec(self.train_file, self.dataset_train_split, self.train_limit)

    def validation(self) -> DataSpec | None:
        """Return where the validation rows are, if any are named."""
        if self.validation_file is None and self.dataset_name is None:
            return None
        return self._spec(self.validation_file, self.dataset_test_split, self.validation_limit)

    def _spec(self, file: str | None, split: str, limit: int | None) -> DataSpec:
        try:
            return DataSpec(
                file=file,
                dataset=None if file else self.dataset_name,
                subset=self.dataset_config,
                revision=self.dataset_revision,
                split=split,
                columns=dict(self.columns or {}),
                rows=self.row_function,
                limit=limit,
                chat=self.chat,
                system=self.system_prompt,
                too_long=self.too_long,
            )
        except ValidationError as error:
            raise UserError(problems_of(error, "arguments of the recipe")) from error


@dataclass
class RewardOptions:
    """What a policy is trained for: one reward of the project, or a weighted sum of several (multi-objective RL)."""

    reward: str | None = field(default=None, metadata={"help": "name of one reward of the project"})
    rewards: Weights = field(
        default_factory=Weights, metadata={"help": "weighted sum of several, helpful=0.5,brief=0.5 (MORL)"}
    )
    normalize_rewards: bool = field(
        default=True,
        metadata={"help": "each reward in standard deviations of its scores on the SFT model's responses"},
    )
    policy_name: str | None = field(
        default=None, metadata={"help": "name of the policy in the project; the reward's by default"}
    )

    def weights(self) -> dict[str, float]:
        """Return the weight of each reward.

        Raises:
            UserError: neither `reward` nor `rewards` is given, or both are, or every weight is 0.
        """
        if (self.reward is None) == (not self.rewards):
            raise fail(
                "no reward to train for" if self.reward is None else "`reward` and `rewards` are both given",
                where="arguments of the recipe",
                expected="`reward: NAME`, or `rewards: {NAME: WEIGHT, ...}`",
            )
        weights = {self.reward: 1.0} if self.reward is not None else dict(self.rewards or {})
        if not any(weights.values()):
            raise fail("every reward has weight 0", where="`rewards`")
        return weights

    def name(self) -> str:
        """Return what the policy is called: `policy_name`, or its reward, or its weights."""
        weights = self.weights()
        return self.policy_name or "+".join(
            name if len(weights) == 1 else f"{weight:g}-{name}" for name, weight in weights.items()
        )


@dataclass
class SamplingOptions:
    """How responses are sampled outside of the trainer: before and after training, and for preference pairs."""

    sampling_engine: str = field(
        default="auto", metadata={"help": "auto (vLLM when installed), vllm or hf", "choices": ["auto", "vllm", "hf"]}
    )
    max_prompt_tokens: int = field(default=512, metadata={"help": "longest prompt; see too_long"})


def _parse_pairs(text: str) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        try:
            content = json.loads(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"not a mapping: {error}") from error
        return dict(content)
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not all(separator and key.strip() for key, separator, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value,key=value")
    return {key.strip(): value.strip() for key, _, value in pairs}
