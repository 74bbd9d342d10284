"""Menus of a project and of adapters: the rows that can be served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewarded_lines.checkpoints.adapters import names_adapter
from rewarded_lines.config import MethodSpec
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.project_methods import Methods
from rewarded_lines.merger.methods import METHODS, MOD
from rewarded_lines.merger.open_inputs import plan_adapters, plan_merge
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.projects import Project
from rewarded_lines.reports.texts import method_label
from rewarded_lines.serving.menu_rows import Row
from rewarded_lines.serving.preference_names import STEP, Menu


def menu_of_adapters(base: str, policies: Mapping[str, str], step: float = STEP, **how: Any) -> Menu:
    """Return the menu of LoRA adapters over a base: `soup`, `lines`, and the other weighted sums; see `Menu`."""
    return Menu(base, policies, linear_rows(len(policies)), step=step, how=how)


def menu_of_project(
    project: Project, points: Mapping[str, MergeSpec] | None = None, step: float = STEP, **how: Any
) -> Menu:
    """Return the menu of a project: the curves of its sweep that are merges, then those of `menu_of_adapters`.

    If all policies are adapters, curves that are no weighted sums are left out, since they make no adapters.

    Args:
        project: with base and policies.
        points: merges that have a name of their own.
        step: see `Menu`.
        how: layers and tower, as `sweep` takes them.

    Raises:
        UserError: policies that do not fit together, or methods that are impossible.
    """
    project.require("base", "policies")
    base, how = project.resolve(str(project.config.base)), {**how, **project.carried}
    policies = {name: project.resolve(reference) for name, reference in project.config.policies.items()}
    adapters = all(map(names_adapter, policies.values()))
    plan = plan_adapters(base, policies, **how) if adapters else plan_merge(base, policies, **how)
    methods, rows = Methods(project, plan), {}
    for name, spec in methods.specs.items():
        if spec is not None and methods.merged(name) and _served(spec, adapters):
            rows[name] = _row(methods, name, spec)
    return Menu(base, policies, {**linear_rows(len(policies)), **rows}, points, step, methods.mixtures, how)


def linear_rows(policies: int) -> dict[str, Row]:
    """Return the rows of weighted sums for a number of policies; their merges of adapters are adapters."""
    rows = {"soup": _plain("soup", 0.0, policies), "lines": _plain("soup", 1.0, policies)}
    for name, method in METHODS.items():
        if name not in rows and method.sums and method.weights != "none" and method.policies in (0, policies):
            rows[name] = _plain(name, 0.0, policies)
    return rows


def _plain(method: str, beta: float, policies: int) -> Row:
    def at(weights: tuple[float, ...]) -> MergeSpec:
        return MergeSpec(weights, 1.0, beta, method).complete(policies)

    return Row(at, method, _label(method, at((1 / policies,) * policies)))


def _served(spec: MethodSpec, adapters: bool) -> bool:
    return not spec.edit and spec.merge != MOD and (METHODS[spec.merge].sums or not adapters)


def _row(methods: Methods, name: str, spec: MethodSpec) -> Row:
    def at(weights: tuple[float, ...]) -> MergeSpec:
        return methods.at(name, weights).merge

    if spec.match is not None:
        # To match norms, all weights are read: not before a request asks for that.
        return Row(at, spec.merge, f"{name} (norm of {spec.match})", own=True, matched=True)
    middle = at(methods.weights(2)[0])
    return Row(at, middle.method, _label(name, middle), own=bool(middle.lines))


def _label(name: str, merge: MergeSpec) -> str:
    return method_label([PointSpec(name, merge)])
