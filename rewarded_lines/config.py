"""What a project says: base, policies, rewards, prompts, generation, sweep. `projects.py` reads it from YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Strict(BaseModel):
    """Base of every config section: frozen, its numbers finite, and a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


CHAT = "chat"
"""The template of a reward model that reads conversations by its own chat template."""
TooLong = Literal["refuse", "leave_out", "truncate"]
# Settings that came later, each with its usual value: records made before are those of this value.
_LATER: dict[str, Any] = {
    "messages": False, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "stop_token_ids": [],
    "chat_template_kwargs": {}, "strip": None,
}  # fmt: skip
_FIRST_MAX_TOKENS = 512
_DECIDES_NO_SCORE = {"batch_size", "description", "device", "role", "unit", "workers"}


class RewardSpec(Strict):
    """One reward, declared once for recipes and evaluator: a model with a format, or a Python function.

    `format` says which logits make the score, as a signed sum of CLASS or CLASSxWEIGHT terms: "0" is the logit of
    class 0, "1-0" a difference of logits, "0x0.4" a weighted one. `template` is the text the model reads; a list of two
    is the pair of texts that a cross-encoder reads; "chat" is the whole conversation in the reward model's own chat
    template. `messages` gives a function the turns of a chat in place of their text. A reward of the role "audit" is
    reported and never trained on, chosen by, or part of a hypervolume. `max_tokens` is the longest text, by default all
    that the model can read. `backend` runs a model, `device` is its place (the command line's by default); `workers`
    are processes that a function is called in.
    """

    model: str | None = None
    format: str = "0"
    template: str | tuple[str, str] = "{prompt}{response}"
    function: str | None = None
    messages: bool = False
    role: Literal["objective", "audit"] = "objective"
    unit: str = ""
    description: str = ""
    batch_size: int = Field(64, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None
    backend: Literal["hf", "vllm"] = "hf"
    workers: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _one_source(self) -> RewardSpec:
        if (self.model is None) == (self.function is None):
            raise ValueError("declare either `model:` (a classifier) or `function:` (module:name or file.py:name)")
        if self.workers and self.function is None:
            raise ValueError("`workers:` is for functions; a model's batches are its own")
        if self.backend != "hf" and self.model is None:
            raise ValueError("`backend:` is for models")
        if self.messages and self.function is None:
            raise ValueError("`messages:` is for functions; a model reads a chat with `template: chat`")
        return self

    @field_validator("format")
    @classmethod
    def _format(cls, value: str) -> str:
        parse_format(value)
        return value

    @field_validator("template")
    @classmethod
    def _template(cls, value: str | tuple[str, str]) -> str | tuple[str, str]:
        if value != CHAT and "{response}" not in "".join(value):
            raise ValueError("the template must contain {response} (and usually {prompt}), or be `chat`")
        return value


class DataSpec(Strict):
    """Rows of data: a local file (JSONL, Parquet or CSV), or a split of a data set of the Hub.

    `columns` says where a role (prompt, completion, chosen, rejected, messages, text) is found under another name, dots
    leading into nested columns; `rows` names a Python function that makes a row (or several, or None) with the roles of
    each row of the data. With `chat`, texts are turns of a chat and `system` is the first turn of each. `too_long` says
    what becomes of a row that a model cannot read: it is refused, left out, or its prompt is cut from the beginning.
    """

    file: str | None = None
    dataset: str | None = None
    subset: str | None = None
    revision: str | None = None
    split: str = "train"
    columns: dict[str, str] = {}
    rows: str | None = None
    limit: int | None = Field(None, ge=1)
    chat: bool = False
    system: str | None = None
    too_long: TooLong = "refuse"

    @model_validator(mode="after")
    def _one_source(self) -> DataSpec:
        if (self.file is None) == (self.dataset is None):
            raise ValueError("name either `file:` or `dataset:`")
        if self.system is not None and not self.chat:
            raise ValueError("`system:` is a turn of a chat; set `chat: true` too")
        return self


class PromptSpec(DataSpec):
    """Where the prompts of the evaluation come from, and how many of them."""

    split: str = "test"


class GenerationSpec(Strict):
    """How every point of a sweep answers: `n` responses to each prompt, each with a seed of its own from `seed`.

    Temperature 0 is greedy. A response ends at one of the model's end tokens (those of its generation config, its
    tokenizer's, and `stop_token_ids`), before the first of the `stop` texts, or after `max_tokens`. Sampling applies
    `repetition_penalty`, the temperature, `min_p`, `top_k` (0: all tokens) and `top_p`, in this order, whatever the
    engine. `chat_template` is a Jinja file that takes the place of the tokenizer's own, `chat_template_kwargs` are
    variables that the template gets (`enable_thinking`, for one). `strip`, two markers with … between them, is what
    rewards, length and audits do not see of a response: "<think>…</think>".
    """

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    max_tokens: int = Field(64, ge=1)
    seed: int = Field(0, ge=0, lt=1_000_000)
    n: int = Field(1, ge=1)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    strip: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def _samples_differ(self) -> GenerationSpec:
        if self.n > 1 and self.temperature == 0:
            raise ValueError("n > 1 with temperature 0 gives the same response n times; set a temperature, or n: 1")
        if not all(self.stop):
            raise ValueError("a stop text is empty")
        return self

    @field_validator("chat_template_kwargs")
    @classmethod
    def _variables(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, one in value.items():
            if not name.isidentifier():
                raise ValueError(f"{name!r} is not the name of a template's variable")
            try:
                json.dumps(one, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: {one!r} is no text, number, list or mapping; quote it") from error
        return value

    @field_validator("strip")
    @classmethod
    def _markers(cls, value: str | None) -> str | None:
        if value is not None:
            parse_strip(value)
        return value


class MethodSpec(Strict):
    """One curve of a sweep: how residuals become one, and the LiNeS schedule that scales the result by depth.

    beta = 0 with alpha = 1 is the merge method as its paper has it. `match` names another method of the sweep: alpha
    is then chosen at every λ so that the scaled residual has that method's norm. `edit` is for a single policy: alpha
    goes from 0 to 1 over the grid and beta is 1 − alpha, so that early blocks go back to the base first. `checkpoints`
    makes the curve of models that are there already instead, by their names in `baselines:`.
    """

    alpha: float = 1.0
    beta: float = 1.0
    merge: str = "soup"
    options: dict[str, float | int | str] = {}
    match: str | None = None
    edit: bool = False
    checkpoints: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_kind(self) -> MethodSpec:
        given = self.model_fields_set
        if self.checkpoints and given != {"checkpoints"}:
            raise ValueError("`checkpoints:` are not merged; it takes no other key beside it")
        if self.match is not None and given & {"alpha", "beta"}:
            raise ValueError("`match:` sets alpha, and beta to 0; leave both out")
        if self.edit and given - {"edit"}:
            raise ValueError("`edit:` sets alpha and beta; it takes no other key beside it")
        return self


PRESETS: dict[str, MethodSpec] = {
    "soup": MethodSpec(beta=0.0),
    "lines": MethodSpec(),
    "uniform": MethodSpec(match="lines"),
    "reversed": MethodSpec(alpha=2.0, beta=-1.0),
    "edit": MethodSpec(edit=True),
}
"""Methods that a project may name without saying what they are."""
SFT, POLICIES, TUNED, BASELINES = "sft", "policies", "tuned", "baselines"
CONTROL = "control"
"""What control texts are called that have no name of their own."""
_SMALLEST_STEP = 1e-6
_RESERVED = {
    SFT: "the base model itself, always evaluated",
    TUNED: "the method that `tune:` adds",
    BASELINES: "what holds the baselines that no method names",
}


class TuneSpec(Strict):
    """The search for alpha and beta that `tuned` gets: `trials` of them, by hypervolume on validation prompts."""

    trials: int = Field(ge=1)
    prompts: PromptSpec
    points: int | None = Field(None, ge=2)
    alpha: tuple[float, float] = (0.0, 2.0)
    beta: tuple[float, float] = (-1.0, 2.0)
    merge: str = "soup"
    options: dict[str, float | int | str] = {}
    seed: int = Field(0, ge=0)

    @field_validator("alpha", "beta")
    @classmethod
    def _range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not value[0] <= value[1]:
            raise ValueError("the range is [lowest, highest]")
        return value


class SweepSpec(Strict):
    """What a sweep compares, at how many λ, and the bootstrap that makes its intervals.

    `methods` is a list of names (those of `PRESETS`, merge methods, `policies`) or a mapping from names to what they
    are, null for the names of that list. The grid has λ in steps of 1/(points − 1), or of `step`.
    """

    points: int = Field(11, ge=2)
    methods: dict[str, MethodSpec | None] = {"soup": None, "lines": None}
    tune: TuneSpec | None = None
    references: dict[str, dict[str, float]] = {}
    resamples: int = Field(1000, ge=100)

    @model_validator(mode="before")
    @classmethod
    def _forms(cls, content: Any) -> Any:
        """Take a list of methods for a mapping without details, and a step for the number of points that it makes."""
        if not isinstance(content, Mapping):
            return content
        content = dict(content)
        if isinstance(names := content.get("methods"), list):
            repeated = next((name for name in names if names.count(name) > 1), None)
            if repeated is not None:
                raise ValueError(f"the method {repeated!r} is named twice")
            content["methods"] = {str(name): None for name in names}
        if "step" in content:
            if "points" in content:
                raise ValueError("give either `points:` or `step:`")
            content["points"] = _points_of(content.pop("step"))
        return content

    @field_validator("methods")
    @classmethod
    def _names(cls, value: dict[str, MethodSpec | None]) -> dict[str, MethodSpec | None]:
        if not value:
            raise ValueError("name at least one method")
        for name in value:
            if name in _RESERVED:
                raise ValueError(f"`{name}` is {_RESERVED[name]}; give the method another name")
            if value[name] is not None and name == POLICIES:
                raise ValueError("`policies` stands for the single policies and takes no keys")
        return value


def _points_of(step: Any) -> int:
    """Return how many λ a step makes on each edge of the simplex."""
    count = round(1 / step) if isinstance(step, int | float) and _SMALLEST_STEP <= step <= 1 else 0
    if not count or abs(count * step - 1) > 1e-9:
        raise ValueError(f"a step of {step!r} does not divide 1; take 0.1, 0.2, 0.25 ...")
    return count + 1


class ProjectConfig(Strict):
    """A whole `rewarded-lines.yaml`; a suite is the same file before it has a base and policies.

    `baselines` are models to compare with, never merged; `control` are texts that have nothing to do with the task, or
    several sets of them by name: how much worse a policy predicts them is what it has forgotten.
    """

    version: int = 1
    title: str = ""
    base: str | None = None
    policies: dict[str, str] = {}
    baselines: dict[str, str] = {}
    rewards: dict[str, RewardSpec] = {}
    prompts: PromptSpec | None = None
    control: dict[str, DataSpec] = {}
    generation: GenerationSpec = GenerationSpec()
    sweep: SweepSpec = SweepSpec()

    @field_validator("control", mode="before")
    @classmethod
    def _one_set(cls, value: Any) -> Any:
        """Give the one set a name that has none."""
        if not isinstance(value, Mapping):
            return value or {}
        return {CONTROL: value} if is_one_set(value) else value


def is_one_set(control: Mapping[str, Any]) -> bool:
    """Say whether `control:` is one set without a name: it says a file or columns, or nothing that is a mapping."""
    plain = [key for key, one in control.items() if key == "columns" or not isinstance(one, Mapping)]
    return bool(control) and (any(key in DataSpec.model_fields for key in plain) or len(plain) == len(control))


def parse_strip(text: str) -> tuple[str, str]:
    """Return the two markers of `strip:`, for instance "<think>" and "</think>".

    Raises:
        ValueError: when `text` is not two markers with … (or ...) between them.
    """
    opening, dots, closing = text.replace("...", "…").partition("…")
    if not (dots and opening and closing):
        raise ValueError(f"{text!r} is not two markers with … between them, such as '<think>…</think>'")
    return opening, closing


def decides(spec: RewardSpec | GenerationSpec) -> dict[str, Any]:
    """Return what of a section decides responses or scores; settings that came later only where they are used."""
    content = spec.model_dump(mode="json", exclude=_DECIDES_NO_SCORE if isinstance(spec, RewardSpec) else None)
    if isinstance(spec, RewardSpec):
        # Texts of another length are refused or read whole, so the limit decides no score.
        content["max_tokens"] = spec.max_tokens or _FIRST_MAX_TOKENS
    return {key: value for key, value in content.items() if key not in _LATER or value != _LATER[key]}


def parse_format(text: str) -> tuple[tuple[int, float], ...]:
    """Return the terms (class, weight) of a reward format such as "0", "1-0" or "0x0.4".

    Raises:
        ValueError: when `text` is not a signed sum of CLASS or CLASSxWEIGHT.
    """
    term = r"(\d+)(?:x(\d+(?:\.\d+)?))?"
    if not re.fullmatch(rf"-?{term}(?:[+-]{term})*", text):
        raise ValueError(f"{text!r} is not a reward format such as '0', '1-0' or '0x0.4'")
    found = re.findall(rf"([+-]?){term}", text)
    return tuple((int(index), (-1.0 if sign == "-" else 1.0) * float(weight or 1)) for sign, index, weight in found)
