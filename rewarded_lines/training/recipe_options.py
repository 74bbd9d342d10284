"""The keys that recipes share beside TRL's own: the run, the data, the rewards, the sampling.

Each class is a part of a recipe's YAML file and command line. Where TRL has the same key, it has TRL's name.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from rewarded_lines.config import DataSpec, TooLong
from rewarded_lines.errors import UserError, fail
from rewarded_lines.projects import PROJECT_FILE, problems_of
from rewarded_lines.training.arguments import WHERE


@contextmanager
def checked_values() -> Iterator[None]:
    """Raise what pydantic says of a recipe's values as a `UserError`."""
    try:
        yield
    except ValidationError as error:
        raise UserError(problems_of(error, WHERE)) from error


class KeyValues(dict[str, Any]):
    """`key=value,key=value` or a JSON object on the command line; a mapping in YAML."""

    def __init__(self, content: Any = ()) -> None:
        """Parse a text, or copy a mapping."""
        super().__init__(_parse_pairs(content) if isinstance(content, str) else content)


class Weights(KeyValues):
    """Weight of each reward: `helpful=0.5,brief=0.5`. Names may have `=` in them; those with commas need JSON."""

    def __init__(self, content: Any = ()) -> None:
        """Parse the weights as finite numbers."""
        super().__init__(_parse_pairs(content, str.rpartition) if isinstance(content, str) else content)
        try:
            self.update({name: float(value) for name, value in self.items()})
            if not all(map(math.isfinite, self.values())):
                raise ValueError("not finite")
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"weights are numbers, as in helpful=0.5,brief=0.5 ({error})") from error


def _key(help: str, default: Any = None, **more: Any) -> Any:
    metadata = {"help": help, **more}
    return (
        field(default_factory=default, metadata=metadata)
        if callable(default)
        else field(default=default, metadata=metadata)
    )


@dataclass
class RunOptions:
    """The project of a run, its batch, and whether it may replace another one."""

    project_file: str = _key("project file that the run reads and adds its model to", PROJECT_FILE)
    effective_batch_size: int | None = _key(
        "examples (PPO: episodes) of an update over all processes; sets the gradient accumulation"
    )
    overwrite: bool = _key("replace another run's output, or start again", False)

    def __post_init__(self) -> None:
        """Refuse `null` for the project, which every recipe reads or writes."""
        if not self.project_file:
            raise fail(
                "a run needs a project file",
                where="project_file",
                expected="a path; the file need not exist for sft and reward",
                remedy=f"leave the key out for {PROJECT_FILE}, or name another file",
            )


@dataclass
class SftOptions(RunOptions):
    """What SFT's model is in the project."""

    policy_name: str | None = _key(
        "make the model a policy of this name, to be merged over `model_name_or_path`; by default it is the base"
    )


@dataclass
class DataOptions:
    """Training and validation data: local files, or a data set of the Hub."""

    train_file: str | None = _key("a file (JSON, CSV, Parquet, Arrow, also packed), a folder of files, or a pattern")
    validation_file: str | None = _key("likewise")
    dataset_name: str | None = _key("Hub id, instead of files")
    dataset_config: str | None = _key("subset of that data set")
    dataset_revision: str | None = _key("its branch, tag or commit")
    dataset_train_split: str = _key("its split to train on, also in a folder of files", "train")
    dataset_test_split: str | None = _key(
        "its split to validate on, also in a folder of files; null if a data set has none (SFT, reward models)", "test"
    )
    columns: KeyValues = _key("role=column, for roles whose column has another name", KeyValues)
    row_function: str | None = _key("file.py:function from a row of the data to rows with roles, or None")
    train_limit: int | None = _key("use only so many rows, the first ones")
    validation_limit: int | None = _key("use only so many rows, the first ones")
    chat: bool = _key("texts are turns of a chat, in the tokenizer's template", False)
    system_prompt: str | None = _key("first turn of every chat")
    too_long: TooLong = _key(
        "rows too long for the model or a reward: refuse, leave_out, or truncate (the prompt's beginning)",
        "leave_out",
    )

    def train(self) -> DataSpec:
        """Return the source of the training rows."""
        if (self.train_file is None) == (self.dataset_name is None):
            raise fail(
                "no training data" if self.train_file is None else "two sources of training data",
                where=WHERE,
                expected="either `train_file` or `dataset_name`",
            )
        return self._spec(self.train_file, self.dataset_train_split, self.train_limit)

    def validation(self) -> DataSpec | None:
        """Return the source of the validation rows, if one is named."""
        if self.validation_file is None and (self.dataset_name is None or self.dataset_test_split is None):
            return None
        return self._spec(self.validation_file, self.dataset_test_split or "test", self.validation_limit)

    def _spec(self, file: str | None, split: str, limit: int | None) -> DataSpec:
        with checked_values():
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


@dataclass
class RewardOptions:
    """The reward to train for: one of the project, or a weighted sum of several."""

    reward: str | None = _key("name of one reward of the project")
    rewards: Weights = _key("weighted sum of several, helpful=0.5,brief=0.5 (MORL)", Weights)
    normalize_rewards: bool = _key("standardize each reward on the SFT model's responses", True)
    policy_name: str | None = _key("name of the policy in the project; by default the reward's")

    def weights(self) -> dict[str, float]:
        """Return the weight of each reward."""
        if (self.reward is None) == (not self.rewards):
            raise fail(
                "no reward to train for" if self.reward is None else "`reward` and `rewards` are both given",
                where=WHERE,
                expected="`reward: NAME`, or `rewards: {NAME: WEIGHT, ...}`",
            )
        weights = {self.reward: 1.0} if self.reward is not None else dict(self.rewards or {})
        if not any(weights.values()):
            raise fail("every reward has weight 0", where="`rewards`")
        return weights

    def name(self) -> str:
        """Return the policy's name, by default made of its rewards and their weights."""
        weights = self.weights()
        return self.policy_name or "+".join(
            name if len(weights) == 1 else f"{weight:g}-{name}" for name, weight in weights.items()
        )


@dataclass
class SamplingOptions:
    """How responses for preference pairs are sampled."""

    sampling_engine: str = _key("auto (vLLM if installed), vllm or hf", "auto", choices=["auto", "vllm", "hf"])
    max_prompt_tokens: int = _key("longest prompt; see too_long", 512)


def _parse_pairs(text: str, parted: Callable[[str, str], tuple[str, str, str]] = str.partition) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"not a mapping: {error}") from error
    pairs = [parted(part, "=") for part in text.split(",") if part.strip()]
    if not all(separator and key.strip() for key, separator, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value,key=value")
    return {key.strip(): value.strip() for key, _, value in pairs}
