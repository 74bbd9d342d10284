"""The content of a mergekit YAML: its keys, its models, and the lookup of parameters. Their meaning is elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from rewarded_lines.checkpoints.missing_weights import fold
from rewarded_lines.config_values import Strict
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.merger.mergekit_gradients import Line, line_of
from rewarded_lines.projects import unknown_key
from rewarded_lines.yaml_files import read_yaml

_DTYPES = ("float32", "bfloat16", "float16")
Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Reference:
    """A model in mergekit's terms: a folder or Hub id, and a LoRA adapter on it ("" for none)."""

    path: str
    lora: str = ""

    def __str__(self) -> str:
        """Return `path`, or `path+adapter`."""
        return f"{self.path}+{self.lora}" if self.lora else self.path


def _reference(value: Any) -> Reference:
    """Return a model from `folder`, `organisation/name`, `model+adapter`, or the same with keys."""
    if isinstance(value, dict) and "model" in value and set(value) <= {"model", "lora"}:
        parts = [value[key] for key in ("model", "lora") if key in value]
        parts = [part["path"] if isinstance(part, dict) and set(part) == {"path"} else part for part in parts]
        value = "+".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else value
    if not isinstance(value, str) or not value or value.count("+") > 1 or "@" in value:
        what = "not a model that can be opened here: give a folder, a Hub id organisation/name, or MODEL+ADAPTER"
        revision = "; download a revision (MODEL@REVISION) first, and name its folder" if "@" in str(value) else ""
        raise ValueError(what + revision)
    path, _, lora = value.partition("+")
    return Reference(path, lora)


def _dtype(value: Any) -> str:
    name = str(value or "").removeprefix("torch.")
    if name and name not in _DTYPES:
        raise ValueError(f"not a type to write: give {', '.join(_DTYPES)}")
    return name


def _arithmetic(value: Any, info: ValidationInfo) -> str:
    """Return the type in which mergekit computes, and which it writes without `out_dtype`, declared before it."""
    return str(value or "") if info.data.get("out_dtype") else _dtype(value)


class _Level(Strict):
    parameters: Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)] = {}


class Model(_Level):
    """A model with its own parameters."""

    model: Annotated[Reference, BeforeValidator(_reference)]


class _Source(Model):
    layer_range: tuple[int, int]


class _Slice(_Level):
    sources: list[_Source]

    @field_validator("sources")
    @classmethod
    def _whole(cls, sources: list[_Source]) -> list[_Source]:
        ranges = {source.layer_range for source in sources}
        if len(ranges) != 1 or any(first != 0 or last < 1 for first, last in ranges):
            what = "the slice is not of whole models: give each source the same layer_range, [0, number of blocks]"
            raise ValueError(what)
        return sources


class _Module(_Level):
    models: list[Model] | None = None
    slices: Annotated[list[_Slice] | None, Field(max_length=1)] = None


class _Content(_Module):
    base_model: Annotated[Reference | None, BeforeValidator(lambda value: _reference(value) if value else None)] = None
    merge_method: str
    modules: dict[Literal["default"], _Module] | None = None
    out_dtype: Annotated[str, BeforeValidator(_dtype)] = ""
    dtype: Annotated[str, BeforeValidator(_arithmetic)] = ""
    tokenizer_source: str | None = None
    tokenizer: str | None = None
    chat_template: Any = None

    @field_validator("tokenizer_source", "tokenizer", mode="before")
    @classmethod
    def _source(cls, value: Any) -> str | None:
        """Return "base", "union" or a model."""
        source = value["source"] if isinstance(value, dict) and set(value) == {"source"} else value
        if isinstance(source, dict) and "model" not in source:
            raise ValueError("tokens are not chosen one by one here: give the tokenizer's `source:` alone")
        return None if not source else _reference(source).path

    @field_validator("chat_template")
    @classmethod
    def _none(cls, value: Any) -> Any:
        if value not in (None, "", "auto"):
            raise ValueError("a merge takes the chat template of base or policies: leave it out, and pass --tokenizer")
        return value


TOP_KEYS = frozenset(_Content.model_fields)


@dataclass(frozen=True)
class MergekitFile:
    """The content of a file.

    Attributes:
        shared: parameters for all models: the slice's, then the module's, then the top level's.
        blocks: the number of blocks in its slice, None without a slice.
        tokenizer: whose the file names: "base", "union" or a model; "" for none.
    """

    path: str
    method: str
    base: Reference | None
    inputs: Sequence[Model]
    shared: Sequence[Parameters]
    dtype: str
    blocks: int | None
    tokenizer: str = ""

    @cached_property
    def policies(self) -> list[Model]:
        """The models with a residual: mergekit leaves out the base among them."""
        found = [one for one in self.inputs if one.model != self.base]
        if not found:
            raise self.fault("no model beside the base", expected="one policy or more")
        return found

    def fault(self, what: str, key: str = "", **parts: str) -> UserError:
        """Return an error about a key of this file."""
        return fail(what, where=f"{self.path}: {key}" if key else self.path, **parts)

    def number(self, name: str, default: float | bool | None = None, of: Model | None = None) -> Any:
        """Return a parameter by mergekit's lookup: the model's own, then the shared ones, then `default`."""
        place = f"{of.model}: " if of else ""
        for level in [*([of.parameters] if of else []), *self.shared]:
            if name in level:
                return self._unconditional(level[name], place + name)
        if default is None:
            raise self.fault(f"no `{name}`", place + name, expected="a number in `parameters:`, as mergekit needs it")
        return default

    def line(self, name: str, default: float | None = None, of: Model | None = None) -> Line:
        """Return a parameter over depth; refuse a list that is not on a straight line."""
        setting = self.number(name, default, of)
        line = line_of(setting)
        if line is None:
            what, key = f"`{name}` is no straight line over depth", f"{of.model}: {name}" if of else name
            expected, remedy = "a number, or a list such as [0.7, 1.6]", "take the first and last value only"
            raise self.fault(what, key, expected=expected, got=str(setting), remedy=remedy)
        return line

    def flag(self, name: str, default: bool) -> bool:
        """Return a switch."""
        value = self.number(name, default)
        # mergekit's own cards write 1.0 for true.
        if value not in (0, 1):
            raise self.fault(f"`{name}` is no switch", name, expected="true or false", got=str(value))
        return bool(value)

    def _unconditional(self, setting: Any, key: str) -> Any:
        """Return a setting; refuse mergekit's filters, unless all of them give the same value."""
        cases = setting if isinstance(setting, list) else [setting]
        if not any(isinstance(case, dict) for case in cases):
            return setting
        values = [case.get("value") for case in cases if isinstance(case, dict)]
        rest = any(isinstance(case, dict) and case.get("filter") in (None, "*") for case in cases)
        if len(values) == len(cases) and rest and all(value == values[0] for value in values):
            return values[0]
        what = "a value that depends on the tensor's name has no counterpart here"
        expected, remedy = "one value for all tensors, or a list over depth", "give all tensors the same value"
        raise self.fault(what, key, expected=expected, got=str(setting), remedy=remedy)


def read_file(path: Path) -> MergekitFile:
    """Read a mergekit YAML; refuse every key and value that is not mergekit's, or has no counterpart here."""
    content, name = read_yaml(path), str(path)
    problems = []
    try:
        found = _Content.model_validate(content)
    except ValidationError as error:
        raise UserError(_problem(detail, name) for detail in error.errors()) from error
    # Cards that mergekit writes have the one module of a usual model.
    parts = [found, *(found.modules or {}).values()]
    if sum(bool(one.models) + bool(one.slices) for one in parts) != 1:
        what = "no models, or two lists of them"
        problems.append(Problem(what, name, "either `models:`, or `slices:` with one slice of whole models"))
    top, blocks = [one for each in parts for one in each.models or []], None
    shared = [one.parameters for one in reversed(parts)]
    for part in [part for one in parts for part in one.slices or []]:
        top, blocks = list(part.sources), part.sources[0].layer_range[1]
        shared.insert(0, part.parameters)
    references = [one.model for one in top]
    twice = dict.fromkeys(one for one in references if references.count(one) > 1)
    problems += [Problem("a model is named twice", name, got=str(one)) for one in twice]
    if found.base_model and found.base_model.lora:
        what = "the base has an adapter"
        remedy = fold(Path(found.base_model.lora))
        problems.append(Problem(what, f"{name}: base_model", got=str(found.base_model), remedy=remedy))
    if problems:
        raise UserError(problems)
    dtype = found.out_dtype or found.dtype or "auto"
    tokenizer = found.tokenizer_source or found.tokenizer or ""
    return MergekitFile(name, found.merge_method, found.base_model, top, shared, dtype, blocks, tokenizer)


def _problem(detail: ErrorDetails, name: str) -> Problem:
    """Return pydantic's error as a problem of the file."""
    *above, key = detail["loc"]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in above).lstrip(".")
    where = f"{name}: {place}" if place else name
    if detail["type"] == "extra_forbidden":
        level: dict[str, type[_Level]] = {"models": Model, "sources": _Source, "slices": _Slice, "default": _Module}
        owner = level[next(part for part in reversed(above) if isinstance(part, str))] if above else _Content
        return unknown_key(str(key), list(owner.model_fields), where)
    if detail["type"] == "missing":
        return Problem(f"no `{key}`", where, expected="a mergekit YAML")
    what = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "too_long":
        what = "not one slice of whole models: models put together from parts of others stay with mergekit"
    return Problem(what, f"{where}: {key}", got=str(detail["input"]))
