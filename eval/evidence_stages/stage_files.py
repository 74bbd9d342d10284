"""Stage files: commands of the project's own tools, with what they read and what they write.

A stage of a file has these keys:

- `about`: a sentence;
- `run`: commands, one after another, or side by side with `together: true`;
- `each_seed: true`: the stage exists once for each training seed, as NAME-seed0, NAME-seed1 and so on;
- `after`: stages that must be finished first; a stage of one seed needs that of its own seed;
- `write`: YAML files that are written first, by path, such as projects of a sweep;
- `output`: the file or folder that the commands make last; `starts_anew`: what is removed if an input has changed, by
  default the output;
- `inputs`: files and folders of the checkout that count, beside those that the commands name;
- `minutes`: about how long it takes on two quiet cores;
- `records`: where the numbers of a run folder, or a file, are copied to, by the name below the results.

In commands and paths, {out} is the folder of the work, {results} that of the records, {repo} the checkout, {seed} the
seed, {first} the first of all and {seeds} all, with commas. In a stage for all seeds, a word with {seed} stands once
for each.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from rewarded_lines.checkpoints.hashing import file_hash
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.pipelines.recipe_jobs import digest
from rewarded_lines.pipelines.round_plan import COMMAND, program
from rewarded_lines.yaml_files import read_yaml

REPO = Path(__file__).resolve().parents[2]
# The first words that a command may have, and what is run for them.
PROGRAMS: Mapping[str, Sequence[str]] = {
    "rewarded-lines": COMMAND,
    "python": (sys.executable,),
    "pip": (sys.executable, "-m", "pip"),
    "accelerate": (program("accelerate"),),
    "bash": ("bash",),
}
_CODE = (".py", ".yaml")


class StageSpec(BaseModel):
    """A stage as its file has it; see above."""

    model_config = ConfigDict(extra="forbid")

    about: str
    run: list[str]
    output: str
    minutes: float
    each_seed: bool = False
    together: bool = False
    after: list[str] = []
    write: dict[str, dict[str, Any]] = {}
    inputs: list[str] = []
    starts_anew: list[str] | None = None
    records: dict[str, str] = {}


class StageFile(BaseModel):
    """A file of stages; models that are `small` share the cores, and need no network."""

    model_config = ConfigDict(extra="forbid")

    title: str
    small: bool = False
    stages: dict[str, StageSpec]


@dataclass(frozen=True)
class Stage:
    """A stage of one seed, or of all: words to run, paths, and a hash of all that decides its output.

    `missing` are files that it reads and the checkout lacks.
    """

    name: str
    about: str
    commands: tuple[tuple[str, ...], ...]
    output: Path
    minutes: float
    together: bool
    small: bool
    after: tuple[str, ...]
    write: Mapping[Path, Mapping[str, Any]]
    starts_anew: tuple[Path, ...]
    records: Mapping[str, Path]
    made_from: str
    missing: tuple[str, ...] = ()

    @property
    def words(self) -> list[tuple[str, ...]]:
        """The commands with the programs that are run for their first words."""
        return [(*PROGRAMS[first], *rest) for first, *rest in self.commands]


@dataclass(frozen=True)
class Places:
    """The folder of the work, that of the records, and the training seeds."""

    out: Path
    results: Path
    seeds: tuple[int, ...]

    def fill(self, text: str, seed: int | None = None) -> str:
        """Return a text with its places; `{seed}` stays without a seed."""
        places = {"out": self.out, "results": self.results, "repo": REPO, "first": self.seeds[0]}
        places |= {"seeds": ",".join(map(str, self.seeds))}
        for name, place in {**places, **({} if seed is None else {"seed": seed})}.items():
            text = text.replace(f"{{{name}}}", str(place))
        return text

    def words(self, command: str, seed: int | None = None) -> tuple[str, ...]:
        """Return the words of a command; without a seed, a word with `{seed}` once for each."""
        found = list[str]()
        for word in shlex.split(command):
            several = seed is None and "{seed}" in word
            found += [self.fill(word, one) for one in self.seeds] if several else [self.fill(word, seed)]
        return tuple(found)


def read_stages(files: Sequence[Path], places: Places) -> list[Stage]:
    """Return the stages of some files in their order.

    Raises:
        UserError: a file is not as it should be, or a stage needs one that does not come before it.
    """
    found: dict[str, Stage] = {}
    for path in files:
        try:
            content = StageFile.model_validate(read_yaml(path))
        except ValidationError as error:
            told = [(".".join(map(str, one["loc"])), one["msg"]) for one in error.errors()]
            raise UserError([Problem(what, where=f"{path}: {where}") for where, what in told]) from error
        for name, spec in content.stages.items():
            for seed in places.seeds if spec.each_seed else (None,):
                stage = _stage(name, spec, seed, content.small, places, found, path)
                found[stage.name] = stage
    return list(found.values())


def _stage(
    name: str, spec: StageSpec, seed: int | None, small: bool, places: Places, found: Mapping[str, Stage], file: Path
) -> Stage:
    own = name if seed is None else f"{name}-seed{seed}"
    if own in found:
        raise fail("two stages of one name", where=str(file), got=own)
    after, commands = _needed(own, spec.after, seed, found, file), [places.words(one, seed) for one in spec.run]
    if unknown := [words[0] for words in commands if words[0] not in PROGRAMS]:
        raise fail("unknown program", where=f"{file}: {own}", expected=", ".join(PROGRAMS), got=unknown[0])

    def path(text: str) -> Path:
        return Path(places.fill(text, seed))

    def filled(content: Any) -> Any:
        if isinstance(content, Mapping):
            return {filled(key): filled(value) for key, value in content.items()}
        if isinstance(content, list):
            return [filled(one) for one in content]
        return places.fill(content, seed) if isinstance(content, str) else content

    # Not the places: the work may be moved.
    said = str([spec.run, spec.write])
    of_all = [places.seeds if "{seeds}" in said or (seed is None and "{seed}" in said) else (), "{first}" in said]
    wanted = [spec.run, spec.write, seed, of_all[0], places.seeds[0] if of_all[1] else None]
    named = [*spec.inputs, *_named_files(commands, places)]
    read = [file_hash(one) for one in _inputs(named)]
    return Stage(
        name=own,
        about=spec.about,
        commands=tuple(commands),
        output=path(spec.output),
        minutes=spec.minutes,
        together=spec.together,
        small=small,
        after=after,
        write={path(where): filled(content) for where, content in spec.write.items()},
        starts_anew=tuple(map(path, [spec.output] if spec.starts_anew is None else spec.starts_anew)),
        records={places.fill(target, seed): path(source) for target, source in spec.records.items()},
        made_from=digest([wanted, read, [found[one].made_from for one in after]]),
        missing=tuple(one for one in named if not (REPO / one).exists()),
    )


def _needed(
    own: str, after: Sequence[str], seed: int | None, found: Mapping[str, Stage], file: Path
) -> tuple[str, ...]:
    """Return the names of the stages that a stage needs: of its own seed, else of all."""
    needed = list[str]()
    for name in after:
        of_seeds = [one for one in found if one.startswith(f"{name}-seed")]
        same = [one for one in of_seeds if one == f"{name}-seed{seed}"]
        known = [name] if name in found else same if seed is not None else of_seeds
        if not known:
            raise fail("it needs a stage that is not before it", where=f"{file}: {own}", got=name)
        needed += known
    return tuple(needed)


def _named_files(commands: Sequence[Sequence[str]], places: Places) -> list[str]:
    """Return the scripts and configs of the checkout that commands name, and commands inside them."""
    found = list[str]()
    for command in commands:
        for word in command[1:] if command[0] != "bash" else ():
            # A word with spaces is a command of its own, such as that of `--train`.
            found += word.split()
    written = (str(places.out), "/")
    return [word for word in dict.fromkeys(found) if word.endswith(_CODE) and not word.startswith(written)]


def _inputs(names: Sequence[str]) -> list[Path]:
    """Return the existing files of the checkout that are meant: of folders, the code and the configs."""
    found = list[Path]()
    for place in (REPO / name for name in names):
        found += sorted(one for one in place.rglob("*") if one.suffix in _CODE) if place.is_dir() else [place]
    return [path for path in dict.fromkeys(found) if path.is_file()]


def seeds_of(text: str) -> tuple[int, ...]:
    """Return the seeds that an option names, such as `0,1,2`; a UserError for what is no list of them."""
    found = tuple(int(one) for one in text.split(",") if one.strip().isdecimal())
    if not found or len(set(found)) < len(text.split(",")):
        raise fail("not a list of seeds", where="--seeds", expected="whole numbers, such as 0,1,2", got=text)
    return found
