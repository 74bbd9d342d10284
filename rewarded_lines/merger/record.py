"""`merge.json` in a merged folder: the numbers of the merge and the hash of every input file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from rewarded_lines import __version__
from rewarded_lines.checkpoints.hashing import file_hash
from rewarded_lines.checkpoints.reader import read_json_object
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.kernels.thread_pool import share_out
from rewarded_lines.merger.carried_files import carried_later, key_of
from rewarded_lines.merger.carried_settings import AUTO, BASE
from rewarded_lines.merger.lines_schedule import Outside
from rewarded_lines.merger.plan import Plan
from rewarded_lines.merger.schedule_forms import recorded_schedule
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.references import looks_local
from rewarded_lines.versions import installed

RECORD_FILE = "merge.json"


def _numbers(value: Any) -> Any:
    """Return α or β: one for all policies, or by name; None where every block has a coefficient."""
    given = value.values() if isinstance(value, dict) else (0 if value is None else value,)
    if any(isinstance(one, bool) or not isinstance(one, int | float) for one in given):
        raise ValueError("Input should be a number, or numbers by policy")
    return value


Numbers = Annotated[Any, PlainValidator(_numbers)]


class RecordedInput(BaseModel):
    """Where a base or policy was, and the BLAKE3 hash of each of its files."""

    path: str
    files: dict[str, str]


class Record(BaseModel):
    """The fields of a `merge.json` that decide the bits; the others are for people."""

    model_config = ConfigDict(extra="ignore", strict=True)

    base: RecordedInput
    policies: dict[str, RecordedInput] = Field(min_length=1)
    weights: dict[str, float]
    alpha: Numbers
    beta: Numbers
    # Records that are older than these two lack them.
    schedule: list[float] | dict[str, list[float]] | None = None
    modules: dict[str, float] = {}
    outside: Outside
    method: str
    options: dict[str, float | int | str]
    dtype: str
    max_shard_size: str
    layers: str | None
    # Records that are older than towers lack it.
    tower: str | None = None
    # Records that are older than merges of adapters lack it.
    kind: str = Field("full", alias="as")
    # Of an adapter that approximates the merge.
    rank: int | None = None
    # Likewise older than this choice: whole models got the base's files, adapters those of the first adapter.
    tokenizer: str | None = None
    config_from: str | None = None
    # Only where the project declares mixtures.
    mixtures: dict[str, dict[str, float]] | None = None
    # Those of the two that the user chose.
    chosen: dict[Literal["tokenizer", "config_from"], str] = {}
    tokenizer_files: RecordedInput | None = None

    @property
    def merge(self) -> MergeSpec:
        """The spec, with weights in the order of the policies."""
        weights = tuple(self.weights[name] for name in self.policies)
        schedule = recorded_schedule(vars(self), list(self.policies))
        return MergeSpec(weights, method=self.method, options=self.options, outside=self.outside, **schedule)

    def carried(self, moved: str = AUTO) -> tuple[str, str]:
        """Return the options `tokenizer` and `config_from` of the merge; `moved` is where the tokenizer is now.

        Raises:
            UserError: no folder beside base and policies gave the tokenizer.
        """
        if moved != AUTO and self.tokenizer_files is None:
            what = "the record takes its tokenizer from base or policies"
            raise fail(what, where="--tokenizer", got=moved, remedy="leave it out, or merge without --from")
        if self.tokenizer_files is None and self.tokenizer not in (None, "", BASE, *map(key_of, self.policies)):
            raise fail("no hash of this tokenizer's files", where=RECORD_FILE, got=str(self.tokenizer)[:100])
        default = BASE if self.kind == "full" else AUTO
        tokenizer = default if self.tokenizer is None else self.tokenizer
        if self.tokenizer_files is not None:
            tokenizer = self.tokenizer_files.path if moved == AUTO else moved
        return tokenizer, default if self.config_from is None else self.config_from

    def check_inputs(self, path: Path, plan: Plan) -> None:
        """Refuse inputs that differ in any byte from the record at `path`."""
        problems = []
        base, policies = plan.input_files()
        rows = [("base", "--base …", base, self.base)]
        rows += [(f"policy `{name}`", f"--policy {name}=…", policies[name], self.policies[name]) for name in policies]
        if self.tokenizer_files is not None:
            files = plan.carried.files_of(plan.carried.beside)
            rows.append(("the tokenizer", "--tokenizer …", files, self.tokenizer_files))
        for title, option, files, recorded in rows:
            then = recorded.files
            now = {name: digest for name, digest in _hashed(files).items() if name in then or not carried_later(name)}
            # Older records of adapters do not have the files beside the weights.
            named = now.keys() & then.keys() if self.tokenizer is None else now.keys() | then.keys()
            if wrong := sorted(file for file in named if now.get(file) != then.get(file)):
                what = f"{title} has changed since: {', '.join(wrong[:3])}"
                remedy = f"find the files of that time, and name them: {option}"
                problems.append(Problem(what, str(files[0].parent), f"the hashes in {path}", remedy=remedy))
        if problems:
            raise UserError(problems)


def read_record(path: Path) -> Record:
    """Read a `merge.json`; refuse one that lacks a field of `Record`."""
    if not path.is_file():
        raise fail("no such file", where=str(path), expected=f"a {RECORD_FILE}, or the folder it lies in")
    try:
        record = Record.model_validate(read_json_object(path))
    except ValidationError as error:
        places = [(".".join(map(str, detail["loc"])), detail["msg"]) for detail in error.errors()[:5]]
        raise UserError(
            Problem(f"no valid {RECORD_FILE}: {message}", f"{path}: {place}") for place, message in places
        ) from error
    if set(record.weights) != set(record.policies):
        raise fail("weights and policies have different names", where=str(path))
    if record.schedule is None and None in (record.alpha, record.beta):
        raise fail("neither α and β nor a schedule", where=str(path))
    return record


def read_origin(folder: Path) -> Record | None:
    """Return the record in a folder's merge.json, or None without a readable one."""
    try:
        record = read_record(folder / RECORD_FILE)
        # A schedule is read only now.
        return record if record.merge else None
    except UserError:
        return None


def hash_inputs(plan: Plan) -> dict[str, Any]:
    """Return path and BLAKE3 hash of every input file, for the base and for each policy by name."""
    base, policies = plan.input_files()
    # Threads fill the cache of `file_hash`; `_hashed` then reads from it.
    beside = plan.carried.beside
    files = plan.carried.files_of(beside) if beside else []
    share_out([*base, *chain(*policies.values()), *files], lambda: _hash)

    def recorded(reference: str, folder: Path, files: Iterable[Path]) -> dict[str, Any]:
        local = not reference or looks_local(reference)
        return {"path": str(folder.resolve()) if local else reference, "files": _hashed(files)}

    return {
        "base": recorded(plan.reference, plan.base.folder, base),
        "policies": {
            name: recorded(plan.references.get(name, ""), plan.policies[name].folder, files)
            for name, files in policies.items()
        },
        **({"tokenizer_files": recorded(beside, plan.carried.folders[beside], files)} if beside else {}),
    }


def describe(plan: Plan, spec: MergeSpec, inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `merge.json`, which is enough to make the same bytes again.

    `inputs` are from `hash_inputs`; `settings` are the other arguments that decide the bytes, and the command.
    """
    packages = ("numpy", "llvmlite", "safetensors")
    return {
        **spec.as_dict(list(plan.policies)),
        "scales": plan.scales(spec),
        **({"kept": vars(kept)} if (kept := plan.kept(spec)) else {}),
        **settings,
        "notes": plan.notes,
        **inputs,
        "versions": {"rewarded-lines": __version__, **versions(*packages)},
    }


@cache
def versions(*packages: str) -> dict[str, str]:
    """Return the versions of the installed packages among these. They are read once: a merge would feel it."""
    return {package: found for package in packages if (found := installed(package))}


def title(reference: str, folder: Path) -> str:
    """Return the name of an input for people: its Hub id, or the name of its folder."""
    return folder.resolve().name if not reference or looks_local(reference) else reference


def _hash(file: Any) -> None:
    file_hash(file)


def _hashed(files: Iterable[Path]) -> dict[str, str]:
    return {file.name: file_hash(file) for file in files}
