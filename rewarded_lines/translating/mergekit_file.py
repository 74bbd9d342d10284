"""A mergekit YAML as it is written: its keys, its models, where a parameter is looked up. What it means is not here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewarded_lines.errors import Problem, UserError
from rewarded_lines.projects import read_yaml, unknown_key
from rewarded_lines.translating.gradients import Line, line_of

_TOP = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)
_DTYPES = {name: name for name in ("float32", "bfloat16", "float16")}
_DTYPES |= {f"torch.{name}": name for name in _DTYPES}
_ANY = (None, "*")
Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Reference:
    """A model as mergekit names it: a folder or Hub id, and a LoRA adapter on it ("" for none)."""

    model: str
    lora: str = ""


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
            UserError: it must be there and is not, or depends on the tensor's name.
        """
        places = [] if of is None else [(of.where, of.parameters)]
        for where, parameters in [*places, *((self.path, level) for level in self.shared)]:
            if name in parameters:
                return _unconditional(parameters[name], f"{where}: {name}")
        if default is None:
            where = of.where if of else self.path
            raise UserError(Problem(f"no `{name}`", where, expected=f"`{name}` in `parameters:`, as mergekit needs it"))
        return default

    def line(self, name: str, default: float | None = None, of: Input | None = None) -> Line:
        """Return a parameter over depth.

        Raises:
            UserError: it is no number, or a list of numbers that does not lie on a straight line.
        """
        setting = self.number(name, default, of)
        line = line_of(setting)
        if line is None:
            raise UserError(
                Problem(
                    f"`{name}` is no straight line over depth",
                    of.where if of else self.path,
                    expected="a number, or a list such as [0.7, 1.6]: LiNeS goes from α straight to α + β",
                    got=str(setting),
                    remedy="take the first and last value only, or stay with mergekit for this merge",
                )
            )
        return line

    def flag(self, name: str, default: bool) -> bool:
        """Return a switch.

        Raises:
            UserError: it is neither on nor off.
        """
        value = self.number(name, default)
        if not isinstance(value, bool | int):
            raise UserError(Problem(f"`{name}` is no switch", self.path, expected="true or false", got=str(value)))
        return bool(value)


def read_file(path: Path) -> MergekitFile:
    """Read a mergekit YAML.

    Raises:
        UserError: with every key and value that is not mergekit's, or has no counterpart here.
    """
    content, name = read_yaml(path), str(path)
    problems = [unknown_key(str(key), [*_TOP, "modules"], name) for key in content if key not in (*_TOP, "modules")]
    problems += _refused(content, name)
    inputs: tuple[Input, ...] = ()
    shared = [_mapping(content.get("parameters"), f"{name}: parameters", problems)]
    blocks = None
    if "slices" in content:
        inputs, blocks, level = _slice(content["slices"], name, problems)
        shared.insert(0, level)
    elif "models" in content:
        inputs = _inputs(content["models"], ("model", "parameters"), f"{name}: models", problems)
    base = _reference(content["base_model"], f"{name}: base_model", problems) if content.get("base_model") else None
    references = [one.reference for one in inputs]
    problems += [
        Problem("a model is named twice", f"{name}: models", got=_shown(one))
        for one in dict.fromkeys(one for one in references if references.count(one) > 1)
    ]
    if base and base.lora:
        problems.append(Problem("the base has an adapter", f"{name}: base_model", got=_shown(base), remedy="fold it"))
    problems += _tokenizer_problems(content, name)
    if problems:
        raise UserError(problems)
    return MergekitFile(name, str(content["merge_method"]), base, inputs, tuple(shared), _dtype(content, name), blocks)


def _refused(content: Parameters, name: str) -> list[Problem]:
    """Return what is wrong with the choice of keys."""
    problems = []
    if "merge_method" not in content:
        problems.append(Problem("no `merge_method`", name, expected="a mergekit YAML"))
    given = [key for key in ("models", "slices", "modules") if content.get(key)]
    if given != ["models"] and given != ["slices"]:
        what = "`modules:` has no counterpart here" if "modules" in given else "no models, or two lists of them"
        expected = "either `models:`, or `slices:` with one slice of whole models"
        problems.append(Problem(what, name, expected=expected, got=", ".join(given) or "neither"))
    if content.get("chat_template"):
        problems.append(
            Problem(
                "a merge keeps the chat template of its base",
                f"{name}: chat_template",
                got=str(content["chat_template"]),
                remedy="leave it out, and put another template into the merged folder afterwards",
            )
        )
    return problems


def _slice(slices: Any, name: str, problems: list[Problem]) -> tuple[tuple[Input, ...], int | None, Parameters]:
    """Return the models of the one slice, its number of blocks, and what it says for all of them."""
    where = f"{name}: slices"
    if not isinstance(slices, list) or len(slices) != 1 or not isinstance(slices[0], dict):
        got = f"{len(slices)} slices" if isinstance(slices, list) else str(slices)
        remedy = "models put together from parts of others stay with mergekit"
        problems.append(Problem("not one slice of whole models", where, expected="one slice", got=got, remedy=remedy))
        return (), None, {}
    known = ("sources", "parameters")
    problems += [unknown_key(str(key), list(known), where) for key in slices[0] if key not in known]
    sources = slices[0].get("sources")
    inputs = _inputs(sources, ("model", "layer_range", "parameters"), f"{where}: sources", problems)
    ranges = [source.get("layer_range") for source in sources or [] if isinstance(source, dict)]
    whole = [item for item in ranges if isinstance(item, list) and len(item) == 2 and item[0] == 0 and item[1]]
    if not ranges or len(whole) != len(ranges) or any(item != whole[0] for item in whole):
        expected = "the same layer_range: [0, number of blocks] for each"
        problems.append(Problem("the slice is not of whole models", where, expected=expected, got=str(ranges)))
        return inputs, None, {}
    level = _mapping(slices[0].get("parameters"), f"{where}: parameters", problems)
    return inputs, whole[0][1], level


def _inputs(entries: Any, known: Sequence[str], where: str, problems: list[Problem]) -> tuple[Input, ...]:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "model" in entry for entry in entries):
        problems.append(Problem("not a list of models", where, expected="`- model: …` for each", got=str(entries)))
        return ()
    found = []
    for index, entry in enumerate(entries):
        here = f"{where}[{index}]"
        problems += [unknown_key(str(key), list(known), here) for key in entry if key not in known]
        if reference := _reference(entry["model"], here, problems):
            found.append(Input(reference, _mapping(entry.get("parameters"), f"{here}: parameters", problems), here))
    return tuple(found)


def _reference(value: Any, where: str, problems: list[Problem]) -> Reference | None:
    """Return a model: `folder`, `organisation/name`, `model+adapter`, or the same with keys."""
    if isinstance(value, dict) and set(value) <= {"model", "lora"} and "model" in value:
        parts = [
            part.get("path") if isinstance(part, dict) and set(part) == {"path"} else part for part in value.values()
        ]
        value = "+".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else value
    if not isinstance(value, str) or not value or value.count("+") > 1 or "@" in value:
        problems.append(
            Problem(
                "not a model that can be opened here",
                where,
                expected="a folder, a Hub id organisation/name, or MODEL+ADAPTER",
                got=str(value),
                remedy="download a revision (MODEL@REVISION) first, and name its folder" if "@" in str(value) else "",
            )
        )
        return None
    model, _, lora = value.partition("+")
    return Reference(model, lora)


def _mapping(value: Any, where: str, problems: list[Problem]) -> Parameters:
    if value is None:
        return {}
    if not isinstance(value, dict):
        problems.append(Problem("not a mapping", where, expected="name: value lines", got=str(value)))
        return {}
    return value


def _tokenizer_problems(content: Parameters, name: str) -> list[Problem]:
    """Inputs must have one tokenizer here, and the base's is what the merge gets."""
    tokenizer = content.get("tokenizer")
    said = {"tokenizer_source": content.get("tokenizer_source")}
    if tokenizer is not None:
        extra = isinstance(tokenizer, dict) and set(tokenizer) != {"source"}
        said["tokenizer"] = tokenizer if extra or not isinstance(tokenizer, dict) else tokenizer["source"]
    return [
        Problem(
            "tokenizers are not merged here: all inputs must have the same one",
            f"{name}: {key}",
            expected="base, or nothing",
            got=str(value),
        )
        for key, value in said.items()
        if value not in (None, "base", content.get("base_model"))
    ]


def _dtype(content: Parameters, name: str) -> str:
    """Return the type of the output: `out_dtype`, or `dtype`, in which mergekit computes as well."""
    value = content.get("out_dtype") or content.get("dtype")
    if value is None:
        return "auto"
    if value not in _DTYPES:
        key = "out_dtype" if content.get("out_dtype") else "dtype"
        raise UserError(Problem("not a type to write", f"{name}: {key}", "float32, bfloat16 or float16", str(value)))
    return _DTYPES[value]


def _unconditional(setting: Any, where: str) -> Any:
    """Return a setting that is the same for every tensor; mergekit's filters are taken when they make no difference.

    Raises:
        UserError: it depends on the tensor's name.
    """
    cases = setting if isinstance(setting, list) else [setting]
    if not any(isinstance(case, dict) for case in cases):
        return setting
    values = [case.get("value") for case in cases if isinstance(case, dict)]
    rest = any(isinstance(case, dict) and case.get("filter") in _ANY for case in cases)
    if len(values) == len(cases) and rest and all(value == values[0] for value in values):
        return values[0]
    raise UserError(
        Problem(
            "a value that depends on the tensor's name has no counterpart here",
            where,
            expected="one value for all tensors, or a list over depth",
            got=str(setting),
            remedy="give self_attn, mlp and the rest the same value, or stay with mergekit for this merge",
        )
    )


def _shown(reference: Reference) -> str:
    return "+".join(filter(None, (reference.model, reference.lora)))
