"""The settings of a project: base, policies, rewards, prompts, generation, sweep; `projects.py` reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from rewarded_lines.config_values import (
    Strict,
    check_range,
    check_scales,
    check_variables,
    checked,
    parse_memory,
    parse_strip,
    points_of,
)
from rewarded_lines.engine_settings import EngineSettings
from rewarded_lines.reward_settings import RewardSpec

TooLong = Literal["refuse", "leave_out", "truncate"]
# Later settings, with the values that earlier records had.
_LATER: dict[str, Any] = {
    "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "stop_token_ids": [],
    "chat_template_kwargs": {}, "strip": None,
}  # fmt: skip


class DataSpec(Strict):
    """Rows of data: local files, or a split of a data set of the Hub.

    `file` is a file (JSON, JSON lines, CSV, TSV, Parquet, Arrow; texts also packed), a pattern such as
    `data/*.jsonl.gz`, or a folder of files. `split` chooses among the files of a folder that has splits.
    `columns` maps a role (prompt, completion, chosen, rejected, messages, text) to the column of another name; dots
    lead into nested columns. `rows` names a Python function that maps each row to a row with these roles, to several or
    to None. With `chat`, texts are turns of a chat that starts with `system`. `too_long` rows are refused, left
    out, or lose the beginning of their prompt.
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
    """The rows with the prompts of the evaluation."""

    split: str = "test"


class GenerationSpec(Strict):
    """How every point of a sweep responds: `n` responses to each prompt, each with its own seed derived from `seed`.

    Temperature 0 is greedy. A response ends at an end token (of the model's generation config, of its tokenizer, or in
    `stop_token_ids`), before the first of the `stop` texts, or after `max_tokens`. Every engine applies
    `repetition_penalty`, the temperature, `min_p`, `top_k` (0: all tokens) and `top_p`, in this order. The Jinja file
    `chat_template` replaces the tokenizer's own; `chat_template_kwargs` are its variables (such as `enable_thinking`).
    `strip`, for example "<think>…</think>", hides a part of a response from rewards, length and audits.
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
    chat_template_kwargs: Annotated[dict[str, Any], checked(check_variables)] = {}
    strip: Annotated[str, checked(parse_strip)] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def _samples_differ(self) -> GenerationSpec:
        if self.n > 1 and self.temperature == 0:
            raise ValueError("n > 1 with temperature 0 gives the same response n times; set a temperature, or n: 1")
        if not all(self.stop):
            raise ValueError("a stop text is empty")
        if any(re.search(r"\\[nt]", text) for text in self.stop):
            raise ValueError(
                'a stop text has a backslash and a letter; in double quotes YAML makes a line end of "\\n"'
            )
        return self


class MethodSpec(Strict):
    """One curve of a sweep: the method that joins residuals, and the LiNeS schedule that scales the result by depth.

    alpha = 1, beta = 0 is the method as in its paper. `schedule` has a coefficient for each block in place of alpha
    and beta, as a list or a file's name. In linear methods the three may be mappings from policies to such values.
    `modules` has factors by kind of module. `match` names another method of the sweep: at every λ, alpha gives the
    scaled residual that method's norm. `edit` is for a single policy: alpha goes from 0 to 1 over the grid and beta is
    1 − alpha, so that early blocks return to the base first. A curve of `checkpoints` merges nothing: they are names in
    `baselines:`.
    """

    alpha: Annotated[Any, checked(check_scales)] = 1.0
    beta: Annotated[Any, checked(check_scales)] = 1.0
    schedule: Annotated[Any, checked(check_scales)] = None
    modules: dict[str, float] = {}
    merge: str = "soup"
    options: dict[str, float | int | str] = {}
    match: str | None = None
    edit: bool = False
    checkpoints: tuple[str, ...] = ()

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        # A key that has its default's value still says that the row is no preset.
        return self.model_dump(mode=info.mode, exclude_unset=True) if info.exclude_defaults else write(self)

    @model_validator(mode="after")
    def _one_kind(self) -> MethodSpec:
        given = self.model_fields_set
        if self.checkpoints and given != {"checkpoints"}:
            raise ValueError("`checkpoints:` are not merged; they take no other key beside them")
        if self.match is not None and given & {"alpha", "beta", "schedule", "modules"}:
            raise ValueError("`match:` sets alpha, and beta to 0; leave both out, and `schedule:` and `modules:`")
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
"""Methods that a project may name without defining them."""
SFT, POLICIES, TUNED, BASELINES = "sft", "policies", "tuned", "baselines"
# The name of control texts without a name.
CONTROL = "control"
_RESERVED = {
    SFT: "the base model, which is always evaluated",
    TUNED: "the method that `tune:` adds",
    BASELINES: "the list of the baselines that no method names",
}


class TuneSpec(Strict):
    """The search for the alpha and beta of `tuned`: the best of `trials` by hypervolume on validation prompts."""

    trials: int = Field(ge=1)
    prompts: PromptSpec
    points: int | None = Field(None, ge=2)
    alpha: Annotated[tuple[float, float], checked(check_range)] = (0.0, 2.0)
    beta: Annotated[tuple[float, float], checked(check_range)] = (-1.0, 2.0)
    merge: str = "soup"
    options: dict[str, float | int | str] = {}
    seed: int = Field(0, ge=0)


def _check_methods(value: dict[str, MethodSpec | None]) -> None:
    if not value:
        raise ValueError("name at least one method")
    for name in value:
        if name in _RESERVED:
            raise ValueError(f"`{name}` is {_RESERVED[name]}; give the method another name")
    if value.get(POLICIES) is not None:
        raise ValueError(f"`{POLICIES}` stands for the single policies and takes no keys")


class SweepSpec(Strict):
    """The methods that a sweep compares, its grid of λ, and the bootstrap of its intervals.

    `methods` is a list of names (of `PRESETS`, merge methods, `policies`) or a mapping from names to their definitions,
    null for such a name. `design` says what `points` counts. A "lattice", the default up to three policies, has λ in
    steps of 1/(points − 1), or of `step`, by default of 0.1. A "spread" has as many λ in all: every single policy, the
    centre, the middles of the edges, then a Sobol sequence; by default as many as reach all middles.
    """

    points: int | None = Field(None, ge=2)
    design: Literal["lattice", "spread"] | None = None
    methods: Annotated[dict[str, MethodSpec | None], checked(_check_methods)] = {"soup": None, "lines": None}
    tune: TuneSpec | None = None
    references: dict[str, dict[str, float]] = {}
    resamples: int = Field(1000, ge=100)

    @model_validator(mode="before")
    @classmethod
    def _forms(cls, content: Any) -> Any:
        """Convert a list of methods into a mapping, and a step into a number of points."""
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
            if content.get("design") == "spread":
                raise ValueError("a step is of a lattice; give `points:` to `design: spread`, or leave `design:` out")
            content |= {"points": points_of(content.pop("step")), "design": "lattice"}
        return content


def is_one_set(control: Mapping[str, Any]) -> bool:
    """True if `control:` is one set without a name: it has a key of a set, or no value is a mapping."""
    plain = [key for key, one in control.items() if key == "columns" or not isinstance(one, Mapping)]
    return bool(control) and (any(key in DataSpec.model_fields for key in plain) or len(plain) == len(control))


def _named_sets(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value or {}
    return {CONTROL: value} if is_one_set(value) else value


class ProjectConfig(Strict):
    """A whole `rewarded-lines.yaml`; a suite is such a file without base and policies.

    `tokenizer` and `config_from` say whose tokenizer, chat template and end tokens merges get, as for `merge`.
    `mixtures` has for each policy the share of each reward that it was trained for, so that users can ask by reward.
    `baselines` are models to compare with, never merged. `control` are texts unrelated to the task, one set or several
    by name: forgetting is how much worse a policy predicts them. `engine` says how vLLM starts,
    `reward_memory` what reward models may take of a GPU together, such as 24GiB or 30%.
    """

    version: int = 1
    title: str = ""
    base: str | None = None
    policies: dict[str, str] = {}
    mixtures: dict[str, dict[str, float]] = {}
    tokenizer: str = "auto"
    config_from: str = "auto"
    baselines: dict[str, str] = {}
    rewards: dict[str, RewardSpec] = {}
    prompts: PromptSpec | None = None
    control: Annotated[dict[str, DataSpec], BeforeValidator(_named_sets)] = {}
    generation: GenerationSpec = GenerationSpec()
    engine: EngineSettings = EngineSettings()
    reward_memory: Annotated[str, checked(parse_memory)] | None = None
    sweep: SweepSpec = SweepSpec()

    @property
    def objectives(self) -> list[str]:
        """The rewards that make the front: all but audits."""
        return [name for name, spec in self.rewards.items() if spec.role != "audit"]


def decides(spec: RewardSpec | GenerationSpec) -> dict[str, Any]:
    """Return the settings that decide responses or scores; later settings only where they are used."""
    if isinstance(spec, RewardSpec):
        return spec.decides()
    content = spec.model_dump(mode="json")
    return {key: value for key, value in content.items() if key not in _LATER or value != _LATER[key]}
