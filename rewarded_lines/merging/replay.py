"""A merge made again from its `merge.json`: the same inputs, by their hashes, and so the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rewarded_lines.checkpoints.hashing import file_hash
from rewarded_lines.checkpoints.reader import read_json_object
from rewarded_lines.checkpoints.writer import parse_size
from rewarded_lines.errors import Problem, UserError
from rewarded_lines.merging.cards import Additions
from rewarded_lines.merging.merge import MergeResult, check_schedule, check_targets, expand, result_of
from rewarded_lines.merging.output import command_line, write_folders
from rewarded_lines.merging.provenance import RECORD_FILE
from rewarded_lines.planning.inputs import plan_as
from rewarded_lines.planning.plan import Plan
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.rules.lines import Outside
from rewarded_lines.rules.spec import MergeSpec


class _Input(BaseModel):
    path: str
    files: dict[str, str]


class _Record(BaseModel):
    """What of a `merge.json` decides the bits; what else it tells is for people."""

    model_config = ConfigDict(extra="ignore", strict=True)

    base: _Input
    policies: dict[str, _Input] = Field(min_length=1)
    weights: dict[str, float]
    alpha: float
    beta: float
    outside: Outside
    method: str
    options: dict[str, float | int | str]
    dtype: str
    max_shard_size: str
    layers: str | None
    # Records of the time before adapters say nothing of it.
    kind: str = Field("full", alias="as")

    @property
    def merge(self) -> MergeSpec:
        """The numbers, the weights in the order of the policies."""
        weights = tuple(self.weights[name] for name in self.policies)
        return MergeSpec(weights, self.alpha, self.beta, self.method, self.options, self.outside)


def replay(
    record: str | Path,
    *,
    base: str | None = None,
    policies: Mapping[str, str] | None = None,
    out: str | Path | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    additions: Additions | None = None,
    progress: Progress = SILENT,
) -> MergeResult:
    """Make the merge again that a `merge.json` tells of.

    Args:
        record: the file, or the merged folder it lies in.
        base: where the base is now, if it has moved.
        policies: where policies are now, by name, if they have moved.
        out: the output folder; by default the name of the record's folder and `-again`, beside it.
        device: where the arithmetic runs; only the processor promises the same bits.
        overwrite: replace an output that is there.
        allow_nonfinite: let NaN and infinite values pass.
        additions: what the model card shows beside what the merge knows.
        progress: see `merge`.

    Raises:
        UserError: the record is none, an input is not what it was, or any fault that `merge` refuses.
    """
    path = Path(record).expanduser()
    path = path / RECORD_FILE if path.is_dir() else path
    told = _read(path)
    if strange := [name for name in policies or {} if name not in told.policies]:
        raise UserError(
            Problem(
                f"the record has no policy `{strange[0]}`", "--policy", ", ".join(told.policies), ", ".join(strange)
            )
        )
    check_schedule(told.alpha, told.beta)
    moved = {name: expand(reference) for name, reference in (policies or {}).items()}
    named = {name: source.path for name, source in told.policies.items()} | moved
    folder = path.resolve().parent
    target = folder.with_name(f"{folder.name}-again") if out is None else Path(expand(out))
    origin = expand(base or told.base.path)
    check_targets([target], [origin, *named.values()], overwrite)
    size = parse_size(told.max_shard_size)
    spec = told.merge.complete(len(named))
    progress.start("opening inputs")
    plan = plan_as(told.kind, origin, named, told.method, dtype=told.dtype, device=device, layers=told.layers)
    progress.start("hashing inputs")
    _check_hashes(path, told, plan)
    addition = additions(plan) if additions else None
    plan.prepare([spec])
    settings = {"as": told.kind, "dtype": told.dtype, "max_shard_size": told.max_shard_size, "layers": told.layers}
    write_folders(
        plan,
        [spec],
        [target],
        {**settings, "command": command_line()},
        max_shard_size=size,
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
        addition=addition,
        progress=progress,
    )
    return result_of(plan, spec, target)


def _read(path: Path) -> _Record:
    if not path.is_file():
        raise UserError(Problem("no such file", str(path), expected=f"a {RECORD_FILE}, or the folder it lies in"))
    try:
        told = _Record.model_validate(read_json_object(path))
    except ValidationError as error:
        raise UserError(
            Problem(
                f"not what a {RECORD_FILE} has there: {detail['msg']}", f"{path}: {'.'.join(map(str, detail['loc']))}"
            )
            for detail in error.errors()[:5]
        ) from error
    if set(told.weights) != set(told.policies):
        raise UserError(Problem("weights and policies have different names", str(path)))
    return told


def _check_hashes(path: Path, told: _Record, plan: Plan) -> None:
    """Refuse inputs whose files are not, byte for byte, those of the record."""
    problems = []
    base, policies = plan.input_files()
    rows = [("base", "--base …", base, told.base)]
    rows += [(f"policy `{name}`", f"--policy {name}=…", policies[name], told.policies[name]) for name in policies]
    for title, option, files, recorded in rows:
        now = {file.name: file_hash(file) for file in files}
        wrong = sorted(file for file in now.keys() | recorded.files.keys() if now.get(file) != recorded.files.get(file))
        if wrong:
            what = f"{title} is not what it was: {', '.join(wrong[:3])}"
            remedy = f"find the files of that time, and name them: {option}"
            problems.append(Problem(what, str(files[0].parent), f"the hashes in {path}", remedy=remedy))
    if problems:
        raise UserError(problems)
