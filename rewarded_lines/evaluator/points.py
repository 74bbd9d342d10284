"""The points of a sweep: the merge that each method makes at each λ, and the hash that names a point's records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import blake3

from rewarded_lines.config import BASELINES, POLICIES, PRESETS, SFT, MethodSpec, SweepSpec
from rewarded_lines.engines.base import Model
from rewarded_lines.errors import Problem, UserError, did_you_mean, fail
from rewarded_lines.merger.merge_rules import soup
from rewarded_lines.merger.methods import METHODS, OptionValue
from rewarded_lines.merger.plan import Plan
from rewarded_lines.merger.spec import MergeSpec, simplex_grid
from rewarded_lines.projects import Project

Weights = tuple[float, ...]


@dataclass(frozen=True)
class PointSpec:
    """What a point of a sweep is.

    Attributes:
        method: the curve that it belongs to, by its name in the run; `sft` is the SFT model's own.
        merge: its numbers; without weights for a model that is not merged.
        checkpoint: the name of a policy (which has weights, too) or baseline that stands for itself.
        edit: whether a single policy is edited: the curve goes along α.
    """

    method: str
    merge: MergeSpec = MergeSpec((), 1.0, 0.0)
    checkpoint: str = ""
    edit: bool = False

    @property
    def weights(self) -> Weights:
        """Where the point stands on its curve: the weights of the policies, or α where a single policy is edited."""
        return (self.merge.alpha,) if self.edit else self.merge.weights

    @property
    def lam(self) -> float | None:
        """The first policy's weight, λ; None for a model that is not merged."""
        return self.weights[0] if self.weights else None

    def __str__(self) -> str:
        """Return the point's name in messages, e.g. `lines λ=0.30,0.70`."""
        if self.checkpoint:
            return f"{self.method} {self.checkpoint}"
        return f"{self.method} λ={','.join(f'{w:g}' for w in self.weights)}" if self.weights else self.method

    def as_dict(self) -> dict[str, Any]:
        """Return the point as JSON can hold it."""
        merge = self.merge
        return {
            "method": self.method,
            "weights": list(self.weights),
            "alpha": merge.alpha,
            "beta": merge.beta,
            "merge": merge.method,
            "options": dict(merge.options),
            "checkpoint": self.checkpoint,
            "edit": self.edit,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PointSpec:
        """Return the point that `as_dict` described."""
        edit, weights = content.get("edit", False), tuple(content["weights"])
        merge = MergeSpec(
            (1.0,) if edit else weights,
            content["alpha"],
            content["beta"],
            content["merge"],
            dict(content["options"]),
        )
        return cls(content["method"], merge, content.get("checkpoint", ""), edit)

    def model(self, checkpoints: Sequence[str]) -> Model:
        """Return who answers at this point.

        Args:
            checkpoints: the names of the engine's plan, policies first, then baselines.
        """
        if self.method == SFT:
            return None
        if self.checkpoint and not self.weights:
            index = list(checkpoints).index(self.checkpoint)
            return MergeSpec((0.0,) * index + (1.0,), 1.0, 0.0)
        return self.merge


class Methods:
    """The methods of a project; each gives its points at any weights."""

    def __init__(self, project: Project, plan: Plan) -> None:
        """Read the methods and check them against policies and baselines.

        Args:
            project: with its `sweep:` section.
            plan: policies, then baselines.

        Raises:
            UserError: unknown or impossible methods; all of them at once.
        """
        self._plan = plan
        self._policies = list(project.config.policies)
        self._checkpoints = {*project.config.policies, *project.config.baselines}
        self._where = project.where
        self.specs = self._named(project.config.sweep, list(project.config.baselines))
        problems: list[Problem] = []
        for name, spec in self.specs.items():
            try:
                self._check(name, spec, list(project.config.baselines))
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)

    def points(self, count: int) -> list[PointSpec]:
        """Return what a sweep evaluates, in order: the SFT model, then each method over its grid of weights.

        Args:
            count: λ on each edge of the simplex.
        """
        grids = {name: self.grid(name, count) for name in self.specs}
        return [PointSpec(SFT), *(point for grid in grids.values() for point in grid)]

    def grid(self, name: str, count: int) -> list[PointSpec]:
        """Return one method's points."""
        spec = self.specs[name]
        if spec is None:
            return [
                PointSpec(name, MergeSpec(tuple(float(one == policy) for one in self._policies), 1.0, 0.0), policy)
                for policy in self._policies
            ]
        if spec.checkpoints:
            return [PointSpec(name, checkpoint=checkpoint) for checkpoint in spec.checkpoints]
        return [self.at(name, weights) for weights in self._weights(spec, count)]

    def at(self, name: str, weights: Weights) -> PointSpec:
        """Return one method's point at some weights; a matched method's α is worked out for them."""
        spec = self.specs[name]
        assert spec is not None and not spec.checkpoints
        if spec.edit:
            return PointSpec(name, MergeSpec((1.0,), weights[0], round(1 - weights[0], 12)), edit=True)
        if spec.match is None:
            merge = MergeSpec(weights, spec.alpha, spec.beta, spec.merge, spec.options)
            return PointSpec(name, merge.complete(len(self._policies)))
        other = self.specs.get(spec.match) or PRESETS[spec.match]
        alpha = self._plan.matched_alpha(weights, MergeSpec(weights, other.alpha, other.beta))
        return PointSpec(name, MergeSpec(weights, alpha, 0.0))

    def declares(self, spec: PointSpec) -> bool:
        """Say whether a point is still what its method makes at its weights.

        True for a point whose method the project does not list; False if the project no longer names its model.
        """
        if spec.checkpoint and spec.checkpoint not in self._checkpoints:
            return False
        if spec.method not in self.specs:
            return True
        if not self.merged(spec.method):
            return spec in self.grid(spec.method, 2)
        return bool(spec.weights) and not spec.checkpoint and spec == self.at(spec.method, spec.weights)

    def merged(self, name: str) -> bool:
        """Say whether a method's points are merges over a grid of weights, so that more of them can be made."""
        spec = self.specs[name]
        return spec is not None and not spec.checkpoints and METHODS[spec.merge].weights != "none"

    def _named(self, sweep: SweepSpec, baselines: list[str]) -> dict[str, MethodSpec | None]:
        """Return the methods with presets filled in; baselines that no method names become one."""
        found = {name: spec if spec or name == POLICIES else self._preset(name) for name, spec in sweep.methods.items()}
        taken = {name for spec in found.values() if spec for name in spec.checkpoints}
        if left := [name for name in baselines if name not in taken]:
            found[BASELINES] = MethodSpec(checkpoints=tuple(left))
        return found

    def _preset(self, name: str) -> MethodSpec:
        if name in PRESETS:
            return PRESETS[name]
        if name in METHODS:
            return MethodSpec(merge=name, beta=0.0)
        known = [*PRESETS, POLICIES, *(method for method in METHODS if method not in PRESETS)]
        raise fail(
            f"unknown method `{name}`",
            where=self._where("sweep", "methods", name),
            expected=", ".join(known) + ", or a name with alpha, beta, merge ... of its own",
            remedy=did_you_mean(name, known),
        )

    def _check(self, name: str, spec: MethodSpec | None, baselines: list[str]) -> None:
        where = self._where("sweep", "methods", name)
        if spec is None:
            return
        if unknown := [one for one in spec.checkpoints if one not in baselines]:
            expected = "names of `baselines:`" + (f" ({', '.join(baselines)})" if baselines else ", which has none")
            raise fail("no such checkpoint", where=where, expected=expected, got=", ".join(unknown))
        if not spec.checkpoints:
            check_merge(where, spec.merge, spec.options, len(self._policies))
        if spec.match is not None:
            self._check_match(where, spec)
        if spec.edit and len(self._policies) != 1:
            got = ", ".join(self._policies)
            raise fail("`edit` is for a single policy", where=where, expected="a project with one policy", got=got)
        if spec.merge == "greedy":
            raise fail("a greedy soup scores candidates by itself", where=where, remedy="use `merge --method greedy`")

    def _check_match(self, where: str, spec: MethodSpec) -> None:
        other = self.specs.get(spec.match or "") or PRESETS.get(spec.match or "")
        if other is None or other.match is not None or other.checkpoints or other.edit:
            raise fail("`match:` names no method with a schedule", where=where, got=str(spec.match))
        # An unknown merge method is refused with the method that names it.
        if not all(_linear(one.merge) for one in (spec, other) if one.merge in METHODS):
            raise fail("norms are matched between linear methods", where=where, expected="merge: soup in both")

    def _weights(self, spec: MethodSpec, count: int) -> list[Weights]:
        kind, policies = METHODS[spec.merge].weights, len(self._policies)
        if kind == "none":
            return [(1 / policies,) * policies]
        if policies == 1 and (spec.edit or kind != "simplex"):
            return [(first,) for first, _ in simplex_grid(2, count)]
        return simplex_grid(policies, count)


def check_merge(where: str, merge: str, options: Mapping[str, OptionValue], policies: int) -> None:
    """Check a merge method.

    Raises:
        UserError: the method does not exist, or its options or the number of policies do not fit it.
    """
    try:
        MergeSpec((), method=merge, options=options).complete(policies)
    except UserError as error:
        raise UserError(
            replace(problem, where=f"{where}: {problem.where.lstrip('-')}") for problem in error.problems
        ) from error


def needs_whole_models(project: Project) -> bool:
    """Say whether a method is not linear in the policies' residuals, so that adapters must be folded into the base."""
    specs = [spec or PRESETS.get(name) or MethodSpec(merge=name) for name, spec in project.config.sweep.methods.items()]
    merges = [spec.merge for spec in specs if not spec.checkpoints]
    if project.config.sweep.tune:
        merges.append(project.config.sweep.tune.merge)
    return any(merge in METHODS and not _linear(merge) for merge in merges)


def point_key(shared: Mapping[str, Any], spec: PointSpec, hashes: Mapping[str, str]) -> str:
    """Return the name of a point's records: the BLAKE3 hash, 16 hex digits, of all that determines them.

    A method's name is no part of it: two methods that come to the same merge share its records.

    Args:
        shared: what all points of a run have in common.
        spec: the point.
        hashes: of the weights of policies and baselines, by name.
    """
    if spec.method == SFT:
        identity: list[Any] = [SFT]
    elif not spec.weights:
        identity = ["checkpoint", hashes[spec.checkpoint]]
    else:
        merge = spec.merge
        identity = ["merge", merge.method, dict(merge.options), merge.alpha, merge.beta, merge.weights]
    text = json.dumps({**shared, "point": identity}, sort_keys=True, ensure_ascii=False)
    return blake3.blake3(text.encode()).hexdigest(length=8)


def _linear(merge: str) -> bool:
    row = METHODS[merge]
    return row.rule is soup and not row.weigh
