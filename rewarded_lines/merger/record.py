"""`merge.json`: what a merged folder tells programs of how it was made, with the hash of every input file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rewarded_lines import __version__
from rewarded_lines.checkpoints.hashing import file_hash
from rewarded_lines.checkpoints.reader import read_json_object
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.kernels.thread_pool import share_out
from rewarded_lines.merger.lines_schedule import Outside
from rewarded_lines.merger.plan import Plan
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.references import looks_local

RECORD_FILE = "merge.json"


class RecordedInput(BaseModel):
    """Where a base or policy was, and the BLAKE3 hash of each of its files."""

    path: str
    files: dict[str, str]


class Record(BaseModel):
    """What of a `merge.json` decides the bits; the rest is for people."""

    model_config = ConfigDict(extra="ignore", strict=True)

    base: RecordedInput
    policies: dict[str, RecordedInput] = Field(min_length=1)
    weights: dict[str, float]
    alpha: float
    beta: float
    outside: Outside
    method: str
    options: dict[str, float | int | str]
    dtype: str
    max_shard_size: str
    layers: str | None
    # Records written before adapters could be merged do not have it.
    kind: str = Field("full", alias="as")

    @property
    def merge(self) -> MergeSpec:
        """The numbers, the weights in the order of the policies."""
        weights = tuple(self.weights[name] for name in self.policies)
        return MergeSpec(weights, self.alpha, self.beta, self.method, self.options, self.outside)

    def check_inputs(self, path: Path, plan: Plan) -> None:
        """Refuse inputs whose files are not, byte for byte, those of the record.

        Args:
            path: of the record, for messages.
            plan: the inputs.
        """
        problems = []
        base, policies = plan.input_files()
        rows = [("base", "--base …", base, self.base)]
        rows += [(f"policy `{name}`", f"--policy {name}=…", policies[name], self.policies[name]) for name in policies]
        for title, option, files, recorded in rows:
            then, now = recorded.files, _hashed(files)
            if wrong := sorted(file for file in now.keys() | then.keys() if now.get(file) != then.get(file)):
                what = f"{title} is not what it was: {', '.join(wrong[:3])}"
                remedy = f"find the files of that time, and name them: {option}"
                problems.append(Problem(what, str(files[0].parent), f"the hashes in {path}", remedy=remedy))
        if problems:
            raise UserError(problems)


def read_record(path: Path) -> Record:
    """Read a `merge.json`.

    Raises:
        UserError: there is none, or it does not have what decides the bits.
    """
    if not path.is_file():
        raise fail("no such file", where=str(path), expected=f"a {RECORD_FILE}, or the folder it lies in")
    try:
        record = Record.model_validate(read_json_object(path))
    except ValidationError as error:
        places = [(".".join(map(str, detail["loc"])), detail["msg"]) for detail in error.errors()[:5]]
        raise UserError(
            Problem(f"not what a {RECORD_FILE} has there: {said}", f"{path}: {place}") for place, said in places
        ) from error
    if set(record.weights) != set(record.policies):
        raise fail("weights and policies have different names", where=str(path))
    return record


def hash_inputs(plan: Plan) -> dict[str, Any]:
    """Return place and BLAKE3 hash of every input file, for the base and for each policy by name."""
    base, policies = plan.input_files()
    # `file_hash` remembers what it hashed: several files are hashed at a time here, and looked up below.
    share_out([*base, *(file for files in policies.values() for file in files)], lambda: _hash)
    return {
        "base": {"path": _place(plan.reference, plan.base.folder), "files": _hashed(base)},
        "policies": {
            name: {"path": _place(plan.references.get(name, ""), plan.policies[name].folder), "files": _hashed(files)}
            for name, files in policies.items()
        },
    }


def describe(plan: Plan, spec: MergeSpec, inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `merge.json`: enough to make the same bytes again.

    Args:
        plan: the inputs.
        spec: the numbers.
        inputs: what `hash_inputs` returned.
        settings: what else decides the bytes (dtype, shard size, --layers), and the command.
    """
    packages = ("numpy", "numba", "safetensors")
    return {
        **spec.as_dict(list(plan.policies)),
        "scales": plan.scales(spec),
        **settings,
        "notes": plan.notes,
        **inputs,
        "versions": {"rewarded-lines": __version__, **{package: version(package) for package in packages}},
    }


def title(reference: str, folder: Path) -> str:
    """Return what people call an input: its Hub id, or the name of its folder."""
    return folder.resolve().name if not reference or looks_local(reference) else reference


def _hash(file: Any) -> None:
    file_hash(file)


def _hashed(files: Iterable[Path]) -> dict[str, str]:
    return {file.name: file_hash(file) for file in files}


def _place(reference: str, folder: Path) -> str:
    """Return where an input is found again: its Hub id, or its folder."""
    return str(folder.resolve()) if not reference or looks_local(reference) else reference
