"""The records in this folder as numbers: what `pages.py` and `decision_figures.py` look up.

A record is a folder that `rewarded-lines report` wrote. Without its `summary.json` the numbers are those of `table.md`.
"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import NormalDist
from typing import Any

from rewarded_lines.config import SFT
from rewarded_lines.pareto.bootstrap import LEVEL, Estimate
from rewarded_lines.pareto.power import Variances, least_difference, prompts_needed

HERE = Path(__file__).parent
# Standard errors from the middle of a normal interval to its end.
_HALF = NormalDist().inv_cdf((1 + LEVEL) / 2)
_ROW = re.compile(r"^\| ([^|]+) \| ([^|]+) \| .*?(-?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\] \|", re.MULTILINE)


class MissingRecord(LookupError):
    """A record, or a part of one, that is not there."""


@dataclass(frozen=True)
class Point:
    """A row of `points.csv`: a measure is a key, such as `point["kl"]`."""

    row: dict[str, str]
    where: str

    def __getitem__(self, measure: str) -> Estimate:
        """Return a measure with its interval."""
        try:
            return Estimate(*(float(self.row[f"{measure}{end}"]) for end in ("", ".low", ".high")))
        except KeyError as error:
            raise MissingRecord(f"{measure} of {self.where}") from error

    def number(self, column: str) -> float:
        """Return a number without an interval, such as "ended" or "alpha"."""
        return float(self.row[column])

    @property
    def alpha(self) -> float:
        """α, which is the one factor of a method without β."""
        return self.number("alpha")

    @property
    def distinct2(self) -> float:
        """How varied the responses are."""
        return self.number("distinct2")

    @property
    def lam(self) -> float:
        """The first policy's weight."""
        return next(float(self.row[key]) for key in self.row if key.startswith("weight."))


@dataclass(frozen=True)
class Record:
    """One folder."""

    name: str
    folder: Path

    @cached_property
    def points(self) -> list[Point]:
        """All points, SFT first."""
        with (self.folder / "points.csv").open(encoding="utf-8", newline="") as file:
            return [Point(row, f"{self.name}/points.csv") for row in csv.DictReader(file)]

    @cached_property
    def summary(self) -> dict[str, Any]:
        """`summary.json`, or {}."""
        path = self.folder / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @cached_property
    def run(self) -> dict[str, Any]:
        """`run.json`, or {}."""
        path = self.folder / "run.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @cached_property
    def methods(self) -> list[str]:
        """The methods in their order, without SFT."""
        return list(dict.fromkeys(point.row["method"] for point in self.points if point.row["method"] != SFT))

    @cached_property
    def _numbers(self) -> dict[tuple[str, str], Estimate]:
        """Hypervolumes by (method, reference), differences by ("method − other", reference)."""
        if self.summary:
            found = {(one["method"], one["reference"]): Estimate(**one["hypervolume"]) for one in self._rows}
            for one in self.summary["differences"]:
                found[f"{one['method']} − {one['other']}", one["reference"]] = Estimate(**one["difference"])
            return found
        heads = r"^## (?:Hyper|Difference)[^\n]*\n(.*?)(?=^## |\Z)"
        sections = re.findall(heads, self._table, re.MULTILINE | re.DOTALL)
        rows = (row.groups() for section in sections for row in _ROW.finditer(section))
        return {(what, above): Estimate(*map(float, ends)) for what, above, *ends in rows}

    @property
    def _rows(self) -> list[dict[str, Any]]:
        return self.summary["hypervolumes"]

    def hv(self, method: str, above: str = SFT) -> Estimate:
        """Return a method's hypervolume."""
        return self._find(method, above)

    def diff(self, method: str, other: str, above: str = SFT) -> Estimate:
        """Return the paired difference of two hypervolumes."""
        if (f"{method} − {other}", above) in self._numbers:
            return self._find(f"{method} − {other}", above)
        found = self._find(f"{other} − {method}", above)
        return Estimate(-found.value, -found.high, -found.low)

    def place(self, reference: str) -> str:
        """Return the coordinates of a declared reference."""
        at = self.run.get("sweep", {}).get("references", {}).get(reference)
        if at is None:
            raise MissingRecord(f"reference {reference} of {self.name}")
        return f"({', '.join(f'{value:g}' for value in at.values())})".replace("-", "−")

    def least(self, method: str, other: str, above: str = SFT) -> float:
        """Return the smallest difference that the run had found with 80% power, from the width of the interval."""
        for one in self.summary.get("power", []):
            if {one["method"], one["other"]} == {method, other} and one["at"] == above:
                return one["least"]["value"]
        found = self.diff(method, other, above)
        return least_difference((found.high - found.low) / (2 * _HALF))

    def prompts_needed(self, method: str, other: str, above: str = SFT) -> int:
        """Return how many prompts find the difference that was seen with 80% power, the runs being as they are."""
        prompts, least = self.prompts, self.least(method, other, above)
        found = Variances(1, prompts, prompts * (least / least_difference(1.0)) ** 2)
        needed = prompts_needed(found, self.diff(method, other, above).value)
        assert needed is not None
        return needed

    @property
    def prompts(self) -> int:
        """How many prompts every point answers."""
        told = re.search(r"bootstrap over (?:\d+ training runs and )?(\d+) prompts", self._table)
        if told is None:
            raise MissingRecord(f"number of prompts in {self.name}")
        return int(told.group(1))

    @property
    def unit(self) -> str:
        """The unit of hypervolumes."""
        return re.findall(r"^## Hypervolume \[(.*)\]$", self._table, re.MULTILINE)[0]

    @cached_property
    def _table(self) -> str:
        return (self.folder / "table.md").read_text(encoding="utf-8")

    def share(self, method: str, other: str, base: str, above: str = SFT) -> float:
        """Return which share of a method's gain over `base` another one has."""
        return self.diff(other, base, above).value / self.diff(method, base, above).value

    def _find(self, what: str, above: str) -> Estimate:
        if (what, above) not in self._numbers:
            raise MissingRecord(f"{what} above {above} in {self.name}")
        return self._numbers[what, above]

    def of(self, method: str) -> list[Point]:
        """Return the points of a method."""
        found = [point for point in self.points if point.row["method"] == method]
        if not found:
            raise MissingRecord(f"{method} in {self.name}")
        return found

    def point(self, method: str, lam: float | str = 0.0, column: str = "") -> Point:
        """Return the point of a method at λ, of a checkpoint by its name, or by the number in another column."""
        if isinstance(lam, str):
            near = [point for point in self.of(method) if point.row["checkpoint"] == lam]
        elif method == SFT:
            near = self.of(method)
        else:
            near = [p for p in self.of(method) if abs((p.number(column) if column else p.lam) - lam) < 1e-6]
        if not near:
            raise MissingRecord(f"{method} at {lam} in {self.name}")
        return near[0]

    def at(self, method: str, measure: str, **reward: float) -> float:
        """Return a measure where a reward has a value, linear between the two nearest λ, e.g. `faithful=65`."""
        ((name, wanted),) = reward.items()
        one, two = self.beside(method, **reward)
        share = (wanted - one[name].value) / (two[name].value - one[name].value)
        return (1 - share) * one[measure].value + share * two[measure].value

    def beside(self, method: str, **reward: float) -> tuple[Point, Point]:
        """Return the two neighbouring points between which a reward has a value, e.g. `faithful=65`."""
        ((name, wanted),) = reward.items()
        points = self.of(method)
        for one, two in zip(points, points[1:], strict=False):
            low, high = sorted((one[name].value, two[name].value))
            if low <= wanted <= high:
                return one, two
        raise MissingRecord(f"{method} with {name} = {wanted} in {self.name}")

    def given_back(self, method: str, number: float, measure: str, column: str = "") -> float:
        """Return which share of a policy's loss a point gives back, 1 − (its ratio − 1)/(the policy's − 1)."""
        whole = self.point("edit", 1.0, "alpha")[measure].value - 1
        return 1 - (self.point(method, number, column)[measure].value - 1) / whole

    def most(self, method: str, measure: str) -> float:
        """Return the largest mean of a measure among the points of a method."""
        return max(point[measure].value for point in self.of(method))

    def fewest(self, method: str, measure: str) -> float:
        """Return the smallest mean of a measure among the points of a method."""
        return min(point[measure].value for point in self.of(method))

    @property
    def tuned(self) -> dict[str, Any]:
        """What was found by tuning."""
        if not self.run.get("tuned"):
            raise MissingRecord(f"tuning in {self.name}")
        return self.run["tuned"]

    def trial(self, alpha: float, beta: float) -> float:
        """Return the hypervolume of a trial of the tuning on its own prompts."""
        found = [one for one in self.tuned["trials"] if (one["alpha"], one["beta"]) == (alpha, beta)]
        if not found:
            raise MissingRecord(f"trial α = {alpha}, β = {beta} in {self.name}")
        return found[0]["hypervolume"]

    @property
    def triples(self) -> list[tuple[str, str, str, str]]:
        """The rules that stand alone, with LiNeS and at its norm: label and the names of the three methods."""
        found = [("soup", "soup", "lines", "uniform")]
        found += [(name, name, f"{name}-lines", f"{name}-uniform") for name in self.methods]
        return [one for one in found if set(one[1:]) <= set(self.methods)]

    def gain(self, policy: str) -> Estimate:
        """Return what a policy gained over SFT in its own reward, on the test prompts."""
        for one in self.summary.get("policy_gains", []):
            if one["policy"] == policy:
                return Estimate(**one["rewards"][policy])
        raise MissingRecord(f"gain of {policy} in {self.name}")

    def declared(self, method: str) -> dict[str, Any]:
        """Return how the project declares a method."""
        found = self.run.get("sweep", {}).get("methods", {})
        if method not in found:
            raise MissingRecord(f"method {method} in {self.name}/run.json")
        return found[method]

    def found(self, name: str) -> Record:
        """Return the test results of a search over depth, such as "trials.json", as a record without points."""
        path = self.folder / name
        if not path.is_file():
            raise MissingRecord(f"{self.name}/{name}")
        content = json.loads(path.read_text(encoding="utf-8"))["found"]
        rows = [{key: row[key] for key in ("method", "reference", "hypervolume")} for row in content["volumes"]]
        return self._part(name, content | {"hypervolumes": rows})

    def within(self, nats: float) -> Record:
        """Return the hypervolumes at equal KL as a record without points; its methods are families."""
        for one in self.summary.get("kl_budgets", []):
            if one["max_kl"] == nats:
                return self._part(f"KL ≤ {nats:g}", one)
        raise MissingRecord(f"KL of at most {nats:g} in {self.name}/summary.json")

    def _part(self, name: str, summary: dict[str, Any]) -> Record:
        one = Record(f"{self.name}/{name}", self.folder)
        one.__dict__["summary"] = summary
        return one


@cache
def record(name: str, root: Path = HERE) -> Record:
    """Return the record of a folder, such as "packages/dpo-seed0"."""
    folder = root / name
    if not (folder / "points.csv").is_file():
        raise MissingRecord(f"record {name}")
    return Record(name, folder)


def records(start: str, root: Path = HERE) -> list[Record]:
    """Return the records whose name begins so, such as "movie_reviews/methods-seed", in order."""
    found = sorted(path.parent for path in root.rglob("points.csv"))
    names = [str(folder.relative_to(root)) for folder in found]
    return [record(name, root) for name in names if name.startswith(start)]


def every_method(root: Path = HERE) -> Record:
    """Return the record of every method with and without LiNeS: the average over seeds, or else the first seed."""
    found = records("movie_reviews/methods-", root)
    if not found:
        raise MissingRecord("record movie_reviews/methods-…")
    return next((one for one in found if "methods-seed" not in one.name), found[0])
