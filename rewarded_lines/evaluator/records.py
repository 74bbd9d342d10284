"""A run folder on disk: `run.json` and one Parquet file for each evaluated point, written atomically.

A row is one response: its prompt, every reward's unrounded score (null where it has none), the
log-probability ratio to the SFT model. The metadata holds the point, its sums over the control
texts, how often a reward failed, and a checksum of the whole. `run.json` lists the points and their methods.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rewarded_lines.checkpoints.headers import parse_json
from rewarded_lines.config import SFT
from rewarded_lines.data.words import words_in
from rewarded_lines.errors import UserError, fail
from rewarded_lines.evaluator.missing_scores import Missing, count_missing, prompt_means
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.folders import atomic_file
from rewarded_lines.merger.preferences import Mixtures, read_mixtures
from rewarded_lines.pareto.bootstrap import present_mean

RUN_FILE = "run.json"
FORMAT = 2
"""Raise it whenever a record's meaning changes, so that old points are made again."""
_METADATA = b"rewarded_lines"
_SCORE = "score."
# Column → attribute of `Point`.
_ARRAYS = {"prompt_index": "prompt_index", "seed": "seeds", "tokens": "tokens", "ended": "ended", "kl": "kl"}


@dataclass(frozen=True)
class Point:
    """An evaluated point; arrays have one entry per response, those to one prompt adjacent.

    Attributes:
        kl: log π(y|x) − log π_SFT(y|x) of the response, in nats, at temperature 1: the k1
            estimator of KL(π‖π_SFT), unbiased if sampled at temperature 1 and top_p 1.
        control: each control text's negative log-likelihood in nats and its number of
            predicted tokens, [texts, 2].
        scores: by reward, float64, NaN for a response without a score; see `missing_scores`.
        failed: by reward, how many of its missing scores the reward failed on; it abstained from the others.
        seen: the part of each response that rewards see, if the project strips responses.
    """

    spec: PointSpec
    prompts: list[str]
    responses: list[str]
    prompt_index: np.ndarray
    seeds: np.ndarray
    tokens: np.ndarray
    ended: np.ndarray
    kl: np.ndarray
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    control: np.ndarray | None = None
    seen: list[str] | None = None
    failed: dict[str, int] = field(default_factory=dict)

    @property
    def missing(self) -> dict[str, Missing]:
        """The rewards that have no score for some responses, with the counts."""
        return count_missing(self.scores, self.failed)

    @property
    def judged(self) -> list[str]:
        """The part of each response that rewards, length and audits see."""
        return self.responses if self.seen is None else self.seen

    @property
    def words(self) -> np.ndarray:
        """Words in each response; see `words_in`."""
        return np.array([len(words_in(response)) for response in self.judged], dtype=np.int64)

    def means(self, rewards: Sequence[str]) -> list[float]:
        """Return the mean score of each of these rewards, with missing scores over the prompts that have one."""
        prompts, missing = len(np.unique(self.prompt_index)), self.missing
        values = (
            prompt_means(self.scores[name], prompts) if name in missing else self.scores[name] for name in rewards
        )
        return [float(present_mean(one, axis=0)) for one in values]


@dataclass(frozen=True)
class Run:
    """A run folder in memory: its `run.json` and its points in the order of the sweep."""

    folder: Path
    header: Mapping[str, Any]
    points: Sequence[Point]

    @property
    def rewards(self) -> dict[str, str]:
        """Each reward's unit, or "", in the order declared."""
        return {name: spec.get("unit", "") for name, spec in self.header["rewards"].items()}

    @property
    def objectives(self) -> list[str]:
        """The rewards that policies are judged by: all but audits."""
        rewards = self.header["rewards"]
        return [name for name, spec in rewards.items() if spec.get("role", "objective") != "audit"]

    @property
    def sft(self) -> Point:
        """The SFT model's own point."""
        return next(point for point in self.points if point.spec.method == SFT)

    @cached_property
    def missing(self) -> dict[str, Missing]:
        """The rewards that have no score for some responses of the points, with the counts over all points."""
        return total_missing(self.points)

    def methods(self) -> dict[str, list[Point]]:
        """Return the points by method, ordered by weights, without the SFT model's."""
        found: dict[str, list[Point]] = {}
        for point in self.points:
            if point.spec.method != SFT:
                found.setdefault(point.spec.method, []).append(point)
        return {name: sorted(points, key=lambda point: point.spec.weights) for name, points in found.items()}


def mixtures_of(run: Run) -> Mixtures | None:
    """Return what the policies of a run were trained for, if its project says so."""
    shares = run.header.get("mixtures")
    return read_mixtures(shares, run.header["policies"], f"{run.folder / RUN_FILE}: mixtures") if shares else None


def total_missing(points: Sequence[Point]) -> dict[str, Missing]:
    """Return the rewards that have no score for some responses, with the counts over these points."""
    responses, found = 0, dict[str, tuple[int, int]]()
    for point in points:
        responses += len(point.responses)
        for name, one in point.missing.items():
            abstained, failed = found.get(name, (0, 0))
            found[name] = abstained + one.abstained, failed + one.failed
    return {name: Missing(responses, *counts) for name, counts in found.items()}


def write_point(path: Path, point: Point) -> None:
    """Write one point's records; the file appears whole or not at all."""
    rows = len(point.prompts)
    columns: dict[str, Any] = {
        "merge": pa.array([point.spec.merge.method] * rows).dictionary_encode(),
        # Schedules of other forms are in the metadata's point.
        "alpha": np.full(rows, np.nan if point.spec.merge.lines else point.spec.merge.alpha),
        "beta": np.full(rows, np.nan if point.spec.merge.lines else point.spec.merge.beta),
        "weights": pa.array([list(point.spec.merge.weights)] * rows, type=pa.list_(pa.float64())),
        "prompt_index": point.prompt_index,
        "seed": point.seeds,
        "prompt": point.prompts,
        "response": point.responses,
        **({} if point.seen is None else {"seen": point.seen}),
        "tokens": point.tokens,
        "ended": point.ended,
        "kl": point.kl,
        **{f"{_SCORE}{name}": pa.array(values, from_pandas=True) for name, values in point.scores.items()},
    }
    table = pa.table(columns)
    content = {
        "point": {**point.spec.as_dict(), "method": ""},
        "control": None if point.control is None else point.control.tolist(),
        **({"failed": point.failed} if point.failed else {}),
    }
    metadata = {**content, "checksum": _checksum(table, content)}
    with atomic_file(path) as partial:
        pq.write_table(table.replace_schema_metadata({_METADATA: json.dumps(metadata)}), partial)


def read_point(path: Path) -> Point:
    """Return the point in one file, without a method's name, since several methods may share it.

    Raises:
        UserError: the file is damaged or is not one of ours.
    """
    try:
        table = pq.read_table(path)
        content = json.loads(table.schema.metadata[_METADATA])
        if content.pop("checksum") != _checksum(table, content):
            raise ValueError("its checksum does not fit")
        if any(pc.any(pc.is_nan(table.column(name))).as_py() for name in table.column_names if name.startswith(_SCORE)):
            raise ValueError("a score is NaN; one that is missing is null")
        spec = PointSpec.from_dict(content["point"])
    except (pa.ArrowException, KeyError, TypeError, ValueError, OSError) as error:
        remedy = "run the sweep again, which makes it again"
        raise fail("not a whole point record", where=str(path), got=str(error), remedy=remedy) from error
    control, columns = content["control"], table.column_names
    scores = [name for name in columns if name.startswith(_SCORE)]
    return Point(
        spec=spec,
        prompts=table.column("prompt").to_pylist(),
        responses=table.column("response").to_pylist(),
        **{field: table.column(name).to_numpy() for name, field in _ARRAYS.items()},
        scores={name.removeprefix(_SCORE): table.column(name).to_numpy() for name in scores},
        control=None if control is None else np.array(control, dtype=np.float64).reshape(-1, 2),
        seen=table.column("seen").to_pylist() if "seen" in columns else None,
        failed=content.get("failed", {}),
    )


def whole_point(path: Path) -> Point | None:
    """Return the point in a file, or None if there is none; a damaged file is removed."""
    if not path.is_file():
        return None
    try:
        return read_point(path)
    except UserError:
        path.unlink()
        return None


def _checksum(table: pa.Table, content: Mapping[str, Any]) -> str:
    """Return the BLAKE3 hash of a file's content, independent of how Parquet encodes it."""
    digest = blake3.blake3(json.dumps(content, sort_keys=True).encode())
    for name in table.column_names:
        digest.update(json.dumps([name, table.column(name).to_pylist()]).encode())
    return str(digest.hexdigest())


def point_path(folder: Path, key: str) -> Path:
    """Return the path of a point's records."""
    return folder / "points" / f"{key}.parquet"


def draft_path(folder: Path, key: str) -> Path:
    """Return the path of a point's responses until they have scores."""
    return folder / "drafts" / f"{key}.parquet"


def listed_points(header: Mapping[str, Any]) -> list[tuple[PointSpec, str]]:
    """Return the points in `run.json` with their keys; a UserError for entries that are no points."""
    try:
        entries = [dict(entry) for entry in header["points"]]
        keys = [str(entry.pop("key")) for entry in entries]
        return list(zip(map(PointSpec.from_dict, entries), keys, strict=True))
    except (KeyError, TypeError, ValueError) as error:
        remedy = "run the sweep again, into another --out or with --overwrite"
        raise fail("its points cannot be read", where=RUN_FILE, got=repr(error)[:200], remedy=remedy) from error


def read_header(folder: Path) -> dict[str, Any]:
    """Return a run's `run.json`; a UserError if there is none, or one of another format."""
    path = folder / RUN_FILE
    try:
        header = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        expected = f"a {RUN_FILE} written by `rewarded-lines sweep`"
        # A demo's folder, or a project's: its run is in there.
        inside = folder / "sweep"
        remedy = f"name {inside}" if (inside / RUN_FILE).is_file() else ""
        raise fail("not a run folder", where=str(folder), expected=expected, got=str(error), remedy=remedy) from error
    found = header.get("format", 1) if isinstance(header, dict) else "?"
    if found != FORMAT:
        raise fail(
            "a run of another version",
            where=str(path),
            expected=f"format {FORMAT}",
            got=f"format {found}",
            remedy="run the sweep again, into another --out or with --overwrite",
        )
    return header


def load_run(folder: Path | str) -> Run:
    """Read a run, finished or not, with the points that its `run.json` lists.

    Raises:
        UserError: the folder is not a run, a record is damaged, or fewer than two points exist.
    """
    folder = Path(folder)
    header = read_header(folder)
    read: dict[str, Point] = {}
    points = []
    for spec, key in listed_points(header):
        path = point_path(folder, key)
        # Methods may share a file.
        if key not in read and path.is_file():
            point = read_point(path)
            # All points answer the same prompts: one list for all.
            same = next(iter(read.values()), point).prompts
            read[key] = replace(point, prompts=same) if point.prompts == same else point
        if key in read:
            points.append(replace(read[key], spec=spec))
    if not any(point.spec.method == SFT for point in points) or len(points) < 2:
        raise fail(
            "the run has too few evaluated points",
            where=str(folder),
            expected="the SFT model's and at least one more",
            got=str(len(points)),
            remedy="run `rewarded-lines sweep` again; it goes on where it stopped",
        )
    return Run(folder, header, points)
