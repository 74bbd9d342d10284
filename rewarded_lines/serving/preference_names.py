"""The names of models that a request may ask for: a preference, or a point of a run.

    ROW@WEIGHTS[;KEY=VALUE ...]      lines@0.35   soup@helpful=0.7,brief=0.3   lines@0.2,0.8;alpha=1;beta=0.5
    POINT                            chosen

A row is a curve of a sweep: a method with its schedule. Names are matched against what the menu has; nothing in them is
opened, imported or run.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from rewarded_lines.errors import Problem, UserError, did_you_mean, listed
from rewarded_lines.merger.lines_schedule import brief_number
from rewarded_lines.merger.method_row import OptionValue
from rewarded_lines.merger.methods import METHODS
from rewarded_lines.merger.preferences import Mixtures
from rewarded_lines.merger.spec import MergeSpec, parse_weights
from rewarded_lines.serving.menu_rows import Row, identity, option_value

LONGEST_NAME = 512
STEP = 0.01
_REMEMBERED = 4096
_SCALES = ("alpha", "beta")
# Larger scales make no useful model, and could overflow.
_LARGEST = 10.0


class PreferenceError(UserError):
    """A request asks for what is not on the menu; `status` is that of the HTTP answer, 404 for an unknown name."""

    def __init__(self, problem: Problem | Sequence[Problem], status: int = 400) -> None:
        """Keep the problem and the status."""
        super().__init__(problem)
        self.status = status


class Menu:
    """All that requests may ask for. λ is rounded to multiples of `step`, so the number of models is bounded."""

    def __init__(
        self,
        base: str,
        policies: Mapping[str, str],
        rows: Mapping[str, Row],
        points: Mapping[str, MergeSpec] | None = None,
        step: float = STEP,
        mixtures: Mixtures | None = None,
        how: Mapping[str, Any] | None = None,
    ) -> None:
        """Check the step.

        Args:
            base: folder or Hub id.
            policies: likewise, by name, in the order of the weights.
            rows: by name.
            points: merges that have a name of their own, such as `chosen`.
            step: of λ, α and β; a whole number of steps makes 1.
            mixtures: if the policies were trained for mixtures, weights in names are those of rewards.
            how: other arguments of `plan_adapters` or `plan_merge`, to open base and policies.

        Raises:
            UserError: 1 is no multiple of the step.
        """
        self.steps = round(1 / step) if math.isfinite(step) and 1e-6 <= step <= 1 else 0
        if not self.steps or abs(self.steps * step - 1) > 1e-6:
            raise UserError(Problem("not a step", "step", "0.1, 0.05, 0.01 or another part of 1", str(step)))
        self.base, self.policies, self.rows = base, dict(policies), dict(rows)
        self.step, self.mixtures, self.how = step, mixtures, dict(how or {})
        # A policy's name is that policy alone.
        corners = [tuple(float(one == other) for one in self.policies) for other in self.policies]
        self._named = {name: MergeSpec(corner, 1.0, 0.0) for name, corner in zip(self.policies, corners, strict=True)}
        self.points: dict[str, MergeSpec] = {}
        # For requests that name none.
        self.row = "lines" if "lines" in self.rows else next(iter(self.rows), "")
        self.names = mixtures.rewards if mixtures else tuple(self.policies)
        # Requests wait in threads, and rows with matched norms keep what they have read.
        self._one_at_a_time = threading.RLock()
        self._find = lru_cache(_REMEMBERED)(self._found)
        self.add(points or {})

    def add(self, points: Mapping[str, MergeSpec]) -> None:
        """Give more merges a name of their own.

        Raises:
            UserError: a policy or the base has such a name already.
        """
        if taken := [name for name in points if self.takes(name)]:
            what, got = "two models of one name", f"a policy or the base, and a point: {', '.join(taken)}"
            raise UserError(
                Problem(what, "the names of a server", got=got, remedy="give the policy or the base another name")
            )
        self.points |= points
        self._named |= points

    def takes(self, name: str) -> bool:
        """True if a policy or the base has this name."""
        return name in (*self.policies, Path(self.base).name)

    def spec(self, name: str) -> MergeSpec:
        """Return the merge that a name asks for.

        Raises:
            PreferenceError: there is no such row, policy, point or key, or λ lies outside the simplex.
        """
        return self._find(name)[1]

    def canonical(self, name: str) -> str:
        """Return the one spelling of a model: equal merges of one place have one name. Errors as `spec`."""
        return self._find(name)[0]

    def name_for(self, preference: Any, row: str | None = None) -> str:
        """Return the canonical name for weights by policy (by reward with mixtures); names left out have weight 0.

        Raises:
            PreferenceError: `preference` is not such a mapping, or as `spec`.
        """
        if not isinstance(preference, Mapping):
            raise self._refusal("preference", "not a preference", f"weights by name: {', '.join(self.names)}")
        known = {str(name): value for name, value in preference.items()}
        self._check_names("preference", known)
        if wrong := [one for one in known.values() if isinstance(one, bool) or not isinstance(one, int | float)]:
            raise self._refusal("preference", "not a weight", "numbers", str(wrong[0]))
        weights = ",".join(repr(known.get(name, 0)) for name in self.names)
        if row is not None and not isinstance(row, str):
            raise self._refusal("row", "not a row", ", ".join(self.rows), str(row))
        return self.canonical(f"{self.row if row is None else row}@{weights}")

    def example(self, row: str = "") -> str:
        """Return a name that one can ask for."""
        share = self.steps // len(self.names) / self.steps
        rest = round(1 - share * (len(self.names) - 1), 12)
        shares = [rest, *[share] * (len(self.names) - 1)]
        # Names with the signs of a weight could not be read.
        plain = any(sign in name for name in self.names for sign in ",;=")
        weights = (f"{one:g}" if plain else f"{name}={one:g}" for name, one in zip(self.names, shares, strict=True))
        return f"{row or self.row}@{','.join(weights)}"

    def as_dict(self) -> dict[str, Any]:
        """Return the menu for JSON."""
        return {
            "base": self.base,
            "policies": list(self.policies),
            "weights": list(self.names),
            "step": self.step,
            "rows": [{"name": name, "label": row.label or name} for name, row in self.rows.items()],
            "row": self.row,
            "points": list(self.points),
        }

    def _found(self, name: str) -> tuple[str, MergeSpec]:
        """Return the canonical name and the merge."""
        where = f"model `{name[:80]}`"
        if len(name) > LONGEST_NAME:
            raise self._refusal(where, "the name is too long", f"at most {LONGEST_NAME} characters", str(len(name)))
        if name in self._named:
            spec = self._named[name]
            return next(self._spellings(spec, self._place_of(spec)), name), spec
        row, at, rest = name.partition("@")
        if not at or row not in self.rows:
            raise self._unknown(where, row if at else name)
        weights, *keys = rest.split(";")
        place = self._place(where, weights, row)
        spec = self._changed(where, row, self._at(row, place), keys)
        return next(self._spellings(spec, place, row)), spec

    def _at(self, row: str, place: tuple[float, ...]) -> MergeSpec:
        try:
            with self._one_at_a_time:
                return self.rows[row].at(self.mixtures.weights(place) if self.mixtures else place)
        except UserError as error:
            raise PreferenceError(error.problems) from error

    def _place(self, where: str, text: str, row: str) -> tuple[float, ...]:
        """Return the weights in a name, rounded to the step."""
        given = [part.rpartition("=")[0].strip() for part in text.split(",") if "=" in part]
        self._check_names(where, given)
        kind = METHODS[self.rows[row].method].weights
        try:
            weights = parse_weights(text, self.names, kind == "free", kind == "simplex")
        except UserError as error:
            found = [replace(problem, where=where, remedy=f"ask for {self.example(row)}") for problem in error.problems]
            raise PreferenceError(found) from error
        return self._rounded(where, weights, kind == "simplex")

    def _rounded(self, where: str, weights: Sequence[float], total: bool) -> tuple[float, ...]:
        if any(abs(weight) > _LARGEST for weight in weights):
            raise self._refusal(where, "a weight is too large", f"at most {_LARGEST:g}")
        counts = [round(weight * self.steps) for weight in weights]
        if total:
            # What rounding leaves over goes to the largest.
            counts[counts.index(max(counts))] += self.steps - sum(counts)
        return tuple(count / self.steps for count in counts)

    def _changed(self, where: str, row: str, spec: MergeSpec, keys: Sequence[str]) -> MergeSpec:
        """Return a merge with the values that a name gives behind the weights."""
        given: dict[str, str] = {}
        known = (*(() if self.rows[row].own else _SCALES), *METHODS[spec.method].options)
        for text in keys:
            key, equals, value = (part.strip() for part in text.partition("="))
            if not equals or key in given or key not in known:
                expected = f"each of {', '.join(known)} at most once, as key=value" if known else "no keys"
                raise self._refusal(where, f"the row `{row}` takes no such key", expected, text)
            given[key] = value
        scales: dict[str, Any] = {key: self._scale(where, key, given[key]) for key in _SCALES if key in given}
        options = {key: option_value(spec, key, value) for key, value in given.items() if key not in _SCALES}
        try:
            return replace(spec, **scales, options={**spec.options, **options}).complete(len(self.policies))
        except UserError as error:
            found = [replace(problem, where=f"{where}: {problem.where.strip('-')}") for problem in error.problems]
            raise PreferenceError(found) from error

    def _scale(self, where: str, key: str, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not abs(value) <= _LARGEST:
            raise self._refusal(where, f"not a value of {key}", f"a number from -{_LARGEST:g} to {_LARGEST:g}", text)
        return self._on_step(value)

    def _on_step(self, value: float) -> float:
        return round(value * self.steps) / self.steps + 0.0

    def _spellings(self, spec: MergeSpec, place: tuple[float, ...] | None, asked: str = "") -> Iterator[str]:
        """Yield the names of a merge, the best first: without keys, then with them, in the order of the rows."""
        if place is None:
            return
        # A schedule of a row's own may need the norms of all residuals.
        fitting = [name for name, row in self.rows.items() if row.takes(place) and (name == asked or not row.own)]
        rows = {name: self._at(name, place) for name in fitting}
        yield from (self._text(name, place) for name, plain in rows.items() if identity(plain) == identity(spec))
        for name, plain in rows.items():
            keys = {key: getattr(spec, key) for key in _SCALES if getattr(spec, key) != getattr(plain, key)}
            if keys and (self.rows[name].own or any(value != self._on_step(value) for value in keys.values())):
                # A point of a run: as a name with these values it would be rounded.
                continue
            changed = replace(plain, **keys, options=spec.options if plain.method == spec.method else plain.options)
            if identity(changed) == identity(spec):
                keys |= {key: value for key, value in changed.options.items() if value != plain.options.get(key)}
                yield self._text(name, place, keys)

    def _place_of(self, spec: MergeSpec) -> tuple[float, ...] | None:
        """Return the place of a point, if it is a multiple of the step."""
        place = tuple(self.mixtures.preference(spec.weights).values()) if self.mixtures else spec.weights
        near = tuple(map(self._on_step, place))
        return near if len(place) == len(self.names) and near == place else None

    def _text(self, row: str, place: Sequence[float], keys: Mapping[str, OptionValue] | None = None) -> str:
        one_number = len(place) == 2 and round(1 - place[0], 12) == place[1]
        weights = ",".join(map(brief_number, place[:1] if one_number else place))
        changes = [
            f"{key}={value if isinstance(value, str) else brief_number(value)}" for key, value in (keys or {}).items()
        ]
        return ";".join([f"{row}@{weights}", *changes])

    def _check_names(self, where: str, given: Sequence[str] | Mapping[str, Any]) -> None:
        if unknown := [name for name in given if name not in self.names]:
            name, kind = unknown[0][:80], "reward" if self.mixtures else "policy"
            remedy = did_you_mean(name, self.names)
            raise PreferenceError(Problem(f"no {kind} `{name}`", where, ", ".join(self.names), remedy=remedy), 404)

    def _unknown(self, where: str, word: str) -> PreferenceError:
        rows = listed([f"{name}@WEIGHTS" for name in self.rows], 12)
        expected = f"{rows}, such as {self.example()}; {listed(list(self._named), 12)}"
        remedy = did_you_mean(word[:80], [*self.rows, *self._named])
        return PreferenceError(Problem("no such model", where, expected, remedy=remedy), 404)

    def _refusal(self, where: str, what: str, expected: str, got: str = "") -> PreferenceError:
        return PreferenceError(Problem(what, where, expected, got[:80]))
