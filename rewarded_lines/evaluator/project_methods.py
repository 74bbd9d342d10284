"""The methods of a project's sweep: what each merges at any weights, checked against project, policies and engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from rewarded_lines.config import BASELINES, POLICIES, PRESETS, SFT, MethodSpec, SweepSpec
from rewarded_lines.errors import Problem, UserError, did_you_mean, fail
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.weight_designs import LATTICE, Design, Weights
from rewarded_lines.merger.method_row import OptionValue
from rewarded_lines.merger.methods import METHODS, MOD
from rewarded_lines.merger.plan import Plan
from rewarded_lines.merger.preferences import check_trained, read_mixtures
from rewarded_lines.merger.schedule_forms import FORMS, read_schedule
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.projects import Project


class Methods:
    """The methods of a project; each gives its points at any weights."""

    def __init__(self, project: Project, plan: Plan) -> None:
        """Check the methods in `sweep:`; one UserError names all that are unknown or impossible."""
        self._plan, self._where = plan, project.where
        self._policies = list(project.config.policies)
        self._baselines = list(project.config.baselines)
        sweep, where = project.config.sweep, project.where("sweep", "design")
        self.design = Design.of(sweep.design, len(self._policies), where)
        shares, at = project.config.mixtures, project.where("mixtures")
        self.mixtures = read_mixtures(shares, self._policies, at, project.config.rewards) if shares else None
        check_trained(shares, {name: plan.policies[name].folder for name in self._policies}, at)
        self.specs = self._named(sweep)
        self._schedules: dict[str, dict[str, Any]] = {}
        self._root = project.root
        problems: list[Problem] = []
        for name, spec in self.specs.items():
            try:
                if spec is not None:
                    _check_name(self._where("sweep", "methods", name), name, spec)
                    self._check(self._where("sweep", "methods", name), spec)
                    self._schedules[name] = self._schedule(self._where("sweep", "methods", name), spec)
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)

    def points(self, count: int) -> list[PointSpec]:
        """Return the SFT model, then each method's points at the design's λ for `count`."""
        return [PointSpec(SFT), *(point for name in self.specs for point in self.grid(name, count))]

    def weights(self, count: int) -> list[Weights]:
        """Return the λ of the design: its points, or if the project has mixtures those of its points as preferences."""
        return [self.weights_at(place) for place in self.design.weights(count)]

    def weights_at(self, place: Weights) -> Weights:
        """Return the λ of a place on the simplex: of a preference, if the project has mixtures."""
        return self.mixtures.weights(place) if self.mixtures else place

    def place(self, weights: Weights) -> Weights:
        """Return where some λ lie on the simplex; the reverse of `weights_at`."""
        return tuple(self.mixtures.preference(weights).values()) if self.mixtures else weights

    def grid(self, name: str, count: int) -> list[PointSpec]:
        """Return one method's points."""
        spec = self.specs[name]
        if spec is None:
            alone = np.eye(len(self._policies)).tolist()
            return [
                PointSpec(name, MergeSpec(tuple(weights), 1.0, 0.0), policy)
                for policy, weights in zip(self._policies, alone, strict=True)
            ]
        if spec.checkpoints:
            return [PointSpec(name, checkpoint=checkpoint) for checkpoint in spec.checkpoints]
        return [self.at(name, weights) for weights in self._weights(spec, count)]

    def at(self, name: str, weights: Weights) -> PointSpec:
        """Return one method's point at some weights; for a matched method, with the matched α."""
        spec = self.specs[name]
        assert spec is not None and not spec.checkpoints
        if spec.edit:
            return PointSpec(name, MergeSpec((1.0,), weights[0], round(1 - weights[0], 12)), edit=True)
        if spec.merge == MOD:
            return PointSpec(name, MergeSpec(weights, 1.0, 0.0, MOD))
        if spec.match is None:
            merge = MergeSpec(weights, method=spec.merge, options=spec.options, **self._schedules[name])
            return PointSpec(name, merge.complete(len(self._policies)))
        other = self._schedules.get(spec.match) or self._schedule("", PRESETS[spec.match])
        own: Any = {} if _linear(spec.merge) else {"method": spec.merge, "options": spec.options}
        like = MergeSpec(weights, **own, **other).complete(len(self._policies))
        alpha = self._plan.matched_alpha(weights, like)
        return PointSpec(name, replace(like, alpha=alpha, beta=0.0, lines=(), modules=()))

    def declares(self, spec: PointSpec) -> bool:
        """True if the project still defines this point this way.

        Also true for methods that it does not list; false for a checkpoint that it no longer names.
        """
        if spec.checkpoint and spec.checkpoint not in self._policies + self._baselines:
            return False
        if spec.method not in self.specs:
            return True
        if not self.merged(spec.method):
            return spec in self.grid(spec.method, 2)
        return bool(spec.weights) and not spec.checkpoint and spec == self.at(spec.method, spec.weights)

    def merged(self, name: str) -> bool:
        """True if a method's points are merges over a grid of weights, so that a search can add points."""
        spec = self.specs[name]
        return spec is not None and not spec.checkpoints and _kind(spec.merge) != "none"

    def _named(self, sweep: SweepSpec) -> dict[str, MethodSpec | None]:
        """Return the methods with presets filled in; baselines that no method names become one."""
        found = {name: spec if spec or name == POLICIES else self._preset(name) for name, spec in sweep.methods.items()}
        taken = {name for spec in found.values() if spec for name in spec.checkpoints}
        if left := [name for name in self._baselines if name not in taken]:
            found[BASELINES] = MethodSpec(checkpoints=tuple(left))
        return found

    def _preset(self, name: str) -> MethodSpec:
        if name in PRESETS:
            return PRESETS[name]
        if name == MOD:
            return MethodSpec(merge=MOD)
        if name in METHODS:
            return MethodSpec(merge=name, beta=0.0)
        known = [*PRESETS, POLICIES, MOD, *(method for method in METHODS if method not in PRESETS)]
        raise fail(
            f"unknown method `{name}`",
            where=self._where("sweep", "methods", name),
            expected=", ".join(known) + ", or a name with alpha, beta, merge ... of its own",
            remedy=did_you_mean(name, known),
        )

    def _check(self, where: str, spec: MethodSpec) -> None:
        if unknown := [one for one in spec.checkpoints if one not in self._baselines]:
            known = f" ({', '.join(self._baselines)})" if self._baselines else ", which has none"
            expected = f"names of `baselines:`{known}"
            raise fail("no such checkpoint", where=where, expected=expected, got=", ".join(unknown))
        if spec.merge == MOD and (more := sorted(spec.model_fields_set - {"merge"})):
            remedy = "leave them out; policies are mixed as they are"
            raise fail("`merge: mod` takes no other key beside it", where=where, got=", ".join(more), remedy=remedy)
        if not spec.checkpoints and spec.merge != MOD:
            check_merge(where, spec.merge, spec.options, len(self._policies))
        if spec.match is not None:
            self._check_match(where, spec)
        if spec.edit and len(self._policies) != 1:
            got = ", ".join(self._policies)
            raise fail("`edit` is for a single policy", where=where, expected="a project with one policy", got=got)
        if spec.merge == "greedy":
            raise fail("a greedy soup scores candidates by itself", where=where, remedy="use `merge --method greedy`")

    def _schedule(self, where: str, spec: MethodSpec) -> dict[str, Any]:
        """Return lines and modules of a method; refuse a schedule that does not fit policies, model or method."""
        given = {form: getattr(spec, form) for form in FORMS if form in spec.model_fields_set}
        with _named_as(where):
            found = read_schedule(self._policies, **given, root=self._root)
            self._plan.check_schedule(MergeSpec((), method=spec.merge, **found))
        return found

    def _check_match(self, where: str, spec: MethodSpec) -> None:
        other = self.specs.get(spec.match or "") or PRESETS.get(spec.match or "")
        if other is None or other.match is not None or other.checkpoints or other.edit:
            raise fail("`match:` names no method with a schedule", where=where, got=str(spec.match))
        # The method that names an unknown merge method is refused elsewhere.
        if not all(_linear(one.merge) for one in (spec, other) if one.merge in (*METHODS, MOD)):
            same = (spec.merge, spec.options) == (other.merge, other.options) and spec.merge != MOD
            if not same or METHODS[spec.merge].weights == "none":
                expected = "soup in both, or one method with the same options in both"
                raise fail("the norms of these two cannot be matched", where=where, expected=f"merge: {expected}")

    def _weights(self, spec: MethodSpec, count: int) -> list[Weights]:
        kind, policies = _kind(spec.merge), len(self._policies)
        if kind == "none":
            return [(1 / policies,) * policies]
        if policies == 1 and (spec.edit or kind != "simplex"):
            return [(first,) for first, _ in Design(LATTICE, 2).weights(count)]
        return self.weights(count)


def _check_name(where: str, name: str, spec: MethodSpec) -> None:
    """Refuse a definition that is silently not what its name says: keys that are left out are those of LiNeS."""
    given = spec.model_fields_set
    if name in PRESETS:
        wrong, remedy = not given and spec != PRESETS[name], f"write `{name}:` with nothing behind it, or `alpha: 1`"
    else:
        wrong = name in (*METHODS, MOD) and not given & {"merge", "edit", "checkpoints"}
        remedy = f"add `merge: {name}`, or `merge: soup`" if given else f"write `{name}:` with nothing behind it"
    if wrong:
        what = f"the keys define LiNeS, not `{name}`"
        raise fail(what, where=where, got=", ".join(sorted(given)) or "{}", remedy=remedy)


def check_merge(where: str, merge: str, options: Mapping[str, OptionValue], policies: int) -> None:
    """Raise a UserError at `where` if the method, its options or the number of policies do not fit."""
    with _named_as(where):
        MergeSpec((), method=merge, options=options).complete(policies)


@contextmanager
def _named_as(where: str) -> Iterator[None]:
    """Let the problems of a `UserError` name keys of a section in place of options."""
    try:
        yield
    except UserError as error:
        raise UserError(
            replace(problem, where=f"{where}: {problem.where.lstrip('-')}") for problem in error.problems
        ) from error


def check_decoding(project: Project, engine: str) -> int:
    """Return how many models the engine needs at once: all policies for `mod`, else 1; refuse an engine without it."""
    methods = project.config.sweep.methods.items()
    if not (names := [name for name, spec in methods if (spec.merge if spec else name) == MOD]):
        return 1
    if engine != "hf":
        raise fail(
            "only transformers mixes policies while they decode",
            where=project.where("sweep", "methods", names[0]),
            expected="--engine hf",
            got=f"--engine {engine}",
            remedy="use --engine hf, or leave the method out and sweep it alone into another --out",
        )
    return len(project.config.policies)


def needs_whole_models(project: Project) -> bool:
    """True if a method is not linear in the residuals, so that adapters must be folded into the base."""
    specs = [spec or PRESETS.get(name) or MethodSpec(merge=name) for name, spec in project.config.sweep.methods.items()]
    merges = [spec.merge for spec in specs if not spec.checkpoints]
    if project.config.sweep.tune:
        merges.append(project.config.sweep.tune.merge)
    return any(merge in METHODS and not METHODS[merge].sums for merge in merges)


def _linear(merge: str) -> bool:
    return merge != MOD and METHODS[merge].sums and not METHODS[merge].relative


def _kind(merge: str) -> str:
    return "simplex" if merge == MOD else METHODS[merge].weights
