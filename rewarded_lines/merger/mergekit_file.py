"""A mergekit YAML as it is written: its keys, its models, and where a parameter is looked up, not what it means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from rewarded_lines.config import Strict
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.merger.mergekit_gradients import Line, line_of
from rewarded_lines.projects import read_yaml, unknown_key

_DTYPES = ("float32", "bfloat16", "float16")
# What each key may say, and why nothing else.
_TOKENIZERS = "tokenizers are not merged here: all inputs must have the same one; give base, or nothing"
_ONLY: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "chat_template": ("a merge keeps the chat template of its base; change it in the merged folder afterwards", ()),
    "tokenizer_source": (_TOKENIZERS, ("base",)),
    "tokenizer": (_TOKENIZERS, ("base", {"source": "base"})),
    **dict.fromkeys(
        ("dtype", "out_dtype"),
        (f"not a type to write: give {', '.join(_DTYPES)}", (*_DTYPES, *(f"torch.{name}" for name in _DTYPES))),
    ),
}
Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Reference:
    """A model as mergekit names it: a folder or Hub id, and a LoRA adapter on it ("" for none)."""

    model: str
    lora: str = ""

    def __str__(self) -> str:
        """Return `model`, or `model+adapter`."""
        return f"{self.model}+{self.lora}" if self.lora else self.model


@dataclass(frozen=True)
class Input:
    """One of the models, with the parameters that stand beside it."""

    reference: Reference
    parameters: Parameters
    where: str


@dataclass(frozen=True)
class MergekitFile:
    """What a file says.

    Attributes:
        path: for messages.
        method: mergekit's name of it.
        base: `base_model`, if there is one.
        inputs: the models, in order.
        shared: parameters for all of them, those of the slice before those of the top level.
        dtype: of the output, "auto" if the file does not say.
        blocks: how many blocks its slice has, None where models are whole anyway.
    """

    path: str
    method: str
    base: Reference | None
    inputs: tuple[Input, ...]
    shared: tuple[Parameters, ...]
    dtype: str
    blocks: int | None

    def number(self, name: str, default: float | bool | None = None, of: Input | None = None) -> Any:
        """Return what the file says of a parameter, as mergekit looks it up: beside the model, then for all.

        Raises:
            UserError: the file has no such parameter and there is no default, or it depends on the tensor's name.
        """
        places = [(of.where, of.parameters)] if of else []
        for where, parameters in [*places, *((self.path, level) for level in self.shared)]:
            if name in parameters:
                return _unconditional(parameters[name], f"{where}: {name}")
        if default is None:
            where, expected = of.where if of else self.path, f"`{name}` in `parameters:`, as mergekit needs it"
            raise fail(f"no `{name}`", where=where, expected=expected)
        return default

    def line(self, name: str, default: float | None = None, of: Input | None = None) -> Line:
        """Return a parameter over depth.

        Raises:
            UserError: it is no number, or a list of numbers that does not lie on a straight line.
        """
        setting = self.number(name, default, of)
        line = line_of(setting)
        if line is None:
            raise fail(
                f"`{name}` is no straight line over depth",
                where=of.where if of else self.path,
                expected="a number, or a list such as [0.7, 1.6]: LiNeS goes from α straight to α + β",
                got=str(setting),
                remedy="take the first and last value only, or stay with mergekit for this merge",
            )
        return line

    def flag(self, name: str, default: bool) -> bool:
        """Return a switch.

        Raises:
            UserError: it is neither on nor off.
        """
        value = self.number(name, default)
        if not isinstance(value, bool | int):
            raise fail(f"`{name}` is no switch", where=self.path, expected="true or false", got=str(value))
        return bool(value)


def _reference(value: Any) -> Reference:
    """Return a model: `folder`, `organisation/name`, `model+adapter`, or the same with keys."""
    if isinstance(value, dict) and "model" in value and set(value) <= {"model", "lora"}:
        parts = [value[key] for key in ("model", "lora") if key in value]
        parts = [part["path"] if isinstance(part, dict) and set(part) == {"path"} else part for part in parts]
        value = "+".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else value
    if not isinstance(value, str) or not value or value.count("+") > 1 or "@" in value:
        what = "not a model that can be opened here: give a folder, a Hub id organisation/name, or MODEL+ADAPTER"
        revision = "; download a revision (MODEL@REVISION) first, and name its folder" if "@" in str(value) else ""
        raise ValueError(what + revision)
    model, _, lora = value.partition("+")
    return Reference(model, lora)


class _Level(Strict):
    parameters: dict[str, Any] = {}

    @field_validator("parameters", mode="before")
    @classmethod
    def _parameters(cls, value: Any) -> Any:
        return {} if value is None else value


class _Model(_Level):
    model: Annotated[Reference, BeforeValidator(_reference)]


class _Source(_Model):
    layer_range: tuple[int, int]


class _Slice(_Level):
    sources: list[_Source]

    @field_validator("sources")
    @classmethod
    def _whole(cls, sources: list[_Source]) -> list[_Source]:
        ranges = {source.layer_range for source in sources}
        if len(ranges) != 1 or any(first != 0 or last < 1 for first, last in ranges):
            raise ValueError(
                "the slice is not of whole models: give each source the same layer_range, [0, number of blocks]"
            )
        return sources


class _Content(_Level):
    base_model: Annotated[Reference | None, BeforeValidator(lambda value: _reference(value) if value else None)] = None
    merge_method: str
    models: list[_Model] | None = None
    slices: Annotated[list[_Slice] | None, Field(max_length=1)] = None
    modules: Any = None
    dtype: Any = None
    out_dtype: Any = None
    tokenizer_source: Any = None
    tokenizer: Any = None
    chat_template: Any = None


def read_file(path: Path) -> MergekitFile:
    """Read a mergekit YAML.

    Raises:
        UserError: with every key and value that is not mergekit's, or has no counterpart here.
    """
    content, name = read_yaml(path), str(path)
    problems = [
        Problem(what, f"{name}: {key}", got=str(content[key]))
        for key, (what, allowed) in _ONLY.items()
        if content.get(key) and _by_role(content[key], content) not in allowed
    ]
    given = [key for key in ("models", "slices", "modules") if content.get(key)]
    if given not in (["models"], ["slices"]):
        what = "`modules:` has no counterpart here" if "modules" in given else "no models, or two lists of them"
        expected = "either `models:`, or `slices:` with one slice of whole models"
        problems.append(Problem(what, name, expected=expected, got=", ".join(given) or "neither"))
    try:
        said = _Content.model_validate(content)
    except ValidationError as error:
        raise UserError([*problems, *(_problem(detail, name) for detail in error.errors())]) from error
    top, blocks, shared, where = said.models or [], None, [said.parameters], f"{name}: models"
    for part in said.slices or []:
        top, blocks, where = list(part.sources), part.sources[0].layer_range[1], f"{name}: slices: sources"
        shared.insert(0, part.parameters)
    references = [one.model for one in top]
    twice = dict.fromkeys(one for one in references if references.count(one) > 1)
    problems += [Problem("a model is named twice", where, got=str(one)) for one in twice]
    if said.base_model and said.base_model.lora:
        what = "the base has an adapter"
        problems.append(Problem(what, f"{name}: base_model", got=str(said.base_model), remedy="fold it"))
    if problems:
        raise UserError(problems)
    inputs = tuple(Input(one.model, one.parameters, f"{where}[{index}]") for index, one in enumerate(top))
    dtype = str(said.out_dtype or said.dtype or "auto").removeprefix("torch.")
    return MergekitFile(name, said.merge_method, said.base_model, inputs, tuple(shared), dtype, blocks)


def _by_role(value: Any, content: Parameters) -> Any:
    """Return a tokenizer's source with the name of the base said as `base`."""
    base = content.get("base_model")
    return "base" if base and value in (base, {"source": base}) else value


def _problem(detail: ErrorDetails, name: str) -> Problem:
    """Return a fault that pydantic found as a problem of the file."""
    *above, key = detail["loc"]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in above).lstrip(".")
    where = f"{name}: {place}" if place else name
    if detail["type"] == "extra_forbidden":
        level: dict[str, type[_Level]] = {"models": _Model, "sources": _Source, "slices": _Slice}
        owner = level[next(part for part in reversed(above) if isinstance(part, str))] if above else _Content
        return unknown_key(str(key), list(owner.model_fields), where)
    if detail["type"] == "missing":
        return Problem(f"no `{key}`", where, expected="a mergekit YAML")
    what = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "too_long":
        what = "not one slice of whole models: models put together from parts of others stay with mergekit"
    return Problem(what, f"{where}: {key}", got=str(detail["input"]))


def _unconditional(setting: Any, where: str) -> Any:
    """Return a setting that is the same for every tensor; mergekit's filters are taken when they make no difference.

    Raises:
        UserError: it depends on the tensor's name.
    """
    cases = setting if isinstance(setting, list) else [setting]
    if not any(isinstance(case, dict) for case in cases):
        return setting
    values = [case.get("value") for case in cases if isinstance(case, dict)]
    rest = any(isinstance(case, dict) and case.get("filter") in (None, "*") for case in cases)
    if len(values) == len(cases) and rest and all(value == values[0] for value in values):
        return values[0]
    raise fail(
        "a value that depends on the tensor's name has no counterpart here",
        where=where,
        expected="one value for all tensors, or a list over depth",
        got=str(setting),
        remedy="give self_attn, mlp and the rest the same value, or stay with mergekit for this merge",
    )
