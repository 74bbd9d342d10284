"""A run folder on disk: `run.json` and one Parquet file for each evaluated point, all written atomically.

A row is one prompt: its response, the unrounded score of every reward, and the log-probabilities of the response
under the point and under the SFT model. The point itself (method, schedule, weights) stands in the file's metadata
and, for readers without it, in the columns `method` and `weights`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rewarded_lines.errors import fail

RUN_FILE = "run.json"
SFT = "sft"
_METADATA = b"rewarded_lines"


@dataclass(frozen=True)
class PointSpec:
    """What a point of the sweep is: a method's schedule and the policies' weights, or the SFT model (no weights)."""

    method: str
    alpha: float = 1.0
    beta: float = 0.0
    weights: tuple[float, ...] = ()

    @property
    def lam(self) -> float | None:
        """The first policy's weight, λ; None for the SFT model."""
        return self.weights[0] if self.weights else None

    def __str__(self) -> str:
        """Return the point's name in messages, e.g. `lines λ=0.30,0.70`."""
        return f"{self.method} λ={','.join(f'{w:.2f}' for w in self.weights)}" if self.weights else self.method


@dataclass(frozen=True)
class Point:
    """An evaluated point: every array has one entry for each prompt, in the order of the prompts.

    `kl` is the log-probability ratio of the response, log π(y|x) − log π_SFT(y|x) in nats, at temperature 1: the k1
    estimator of KL(π‖π_SFT), unbiased when responses were sampled at temperature 1 and top_p 1.
    """

    spec: PointSpec
    prompts: list[str]
    responses: list[str]
    seeds: np.ndarray
    tokens: np.ndarray
    ended: np.ndarray
    kl: np.ndarray
    scores: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def words(self) -> np.ndarray:
        """Length of each response in words (separated by white space)."""
        return np.array([len(response.split()) for response in self.responses], dtype=np.int64)


@dataclass(frozen=True)
class Run:
    """A run folder that has been read: its `run.json` and its points in the order of the sweep."""

    folder: Path
    header: Mapping[str, Any]
    points: list[Point]

    @property
    def rewards(self) -> dict[str, str]:
        """The rewards in the order declared, each with its unit ("" when none was declared)."""
        return {name: spec.get("unit", "") for name, spec in self.header["rewards"].items()}

    @property
    def sft(self) -> Point:
        """The SFT model's own point."""
        return next(point for point in self.points if point.spec.method == SFT)

    def methods(self) -> dict[str, list[Point]]:
        """Return the merged points by method, ordered by λ of the first policy."""
        names = dict.fromkeys(point.spec.method for point in self.points if point.spec.weights)
        return {
            name: sorted((p for p in self.points if p.spec.method == name), key=lambda p: p.spec.weights)
            for name in names
        }


def point_key(determinants: Mapping[str, Any]) -> str:
    """Return the name of a point: the BLAKE3 hash, 16 hex digits, of everything that determines its records."""
    text = json.dumps(determinants, sort_keys=True, ensure_ascii=False)
    return blake3.blake3(text.encode()).hexdigest(length=8)


def write_point(path: Path, point: Point) -> None:
    """Write one point's records; the file appears whole or not at all."""
    rows = len(point.prompts)
    columns: dict[str, Any] = {
        "method": pa.array([point.spec.method] * rows).dictionary_encode(),
        "weights": pa.array([list(point.spec.weights)] * rows, type=pa.list_(pa.float64())),
        "prompt_index": np.arange(rows),
        "seed": point.seeds,
        "prompt": point.prompts,
        "response": point.responses,
        "tokens": point.tokens,
        "ended": point.ended,
        "kl": point.kl,
        **{f"score.{name}": values for name, values in point.scores.items()},
    }
    table = pa.table(columns).replace_schema_metadata({_METADATA: json.dumps(asdict(point.spec))})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, partial)
    os.replace(partial, path)


def read_point(path: Path) -> Point:
    """Return the point in one file of a run.

    Raises:
        UserError: the file is not a whole Parquet file of ours.
    """
    try:
        table = pq.read_table(path)
        spec = json.loads(table.schema.metadata[_METADATA])
    except (pa.ArrowException, KeyError, TypeError, OSError) as error:
        raise fail(
            "not a point record", where=str(path), got=str(error), remedy="delete it; `sweep` makes it again"
        ) from error
    column = {name: table.column(name).to_numpy() for name in ("seed", "tokens", "ended", "kl")}
    return Point(
        spec=PointSpec(spec["method"], spec["alpha"], spec["beta"], tuple(spec["weights"])),
        prompts=table.column("prompt").to_pylist(),
        responses=table.column("response").to_pylist(),
        seeds=column["seed"],
        tokens=column["tokens"],
        ended=column["ended"],
        kl=column["kl"],
        scores={
            name.removeprefix("score."): table.column(name).to_numpy()
            for name in table.column_names
            if name.startswith("score.")
        },
    )


def write_header(folder: Path, header: Mapping[str, Any]) -> None:
    """Write `run.json`, atomically."""
    write_json(folder / RUN_FILE, header)


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that readers see the old file or the new one, never half of either."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def point_path(folder: Path, key: str) -> Path:
    """Return where the point named `key` is kept."""
    return folder / "points" / f"{key}.parquet"


def load_run(folder: Path | str) -> Run:
    """Read a finished or unfinished run; `run.json` lists the points that belong to it.

    Raises:
        UserError: the folder is not a run, or none of its points has been evaluated yet.
    """
    folder = Path(folder)
    try:
        header = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise fail(
            "not a run folder",
            where=str(folder),
            expected=f"a {RUN_FILE} written by `rewarded-lines sweep`",
            got=str(error),
        ) from error
    paths: Sequence[Path] = [point_path(folder, key) for key in header["points"]]
    points = [read_point(path) for path in paths if path.is_file()]
    if not any(point.spec.method == SFT for point in points) or len(points) < 2:
        raise fail(
            "the run has too few evaluated points",
            where=str(folder),
            expected="the SFT model's and at least one more",
            got=str(len(points)),
            remedy="run `rewarded-lines sweep` again; it goes on where it stopped",
        )
    return Run(folder, header, points)
