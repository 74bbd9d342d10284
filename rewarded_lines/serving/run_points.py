"""The points of a run that a server answers by name or shows: those chosen, the default, the measured ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rewarded_lines.errors import fail
from rewarded_lines.evaluator.choose import choose
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.recorded_choices import CHOSEN, DEFAULT, recorded_choices
from rewarded_lines.evaluator.records import Run
from rewarded_lines.pareto.hypervolume import nondominated
from rewarded_lines.serving.front_desk import place_of
from rewarded_lines.serving.preference_names import Menu, PreferenceError
from rewarded_lines.serving.serve_options import ServeOptions

Named = dict[str, PointSpec]


def chosen_points(folder: Path, menu: Menu) -> tuple[Named, list[str]]:
    """Return the choices that the run remembers and the server can answer by, and notes on the others."""
    recorded = recorded_choices(folder)
    served = {name: point for name, point in recorded.items() if _is_served(point, menu) and not menu.takes(name)}
    left = {name: point for name, point in recorded.items() if name not in served}
    why = {
        name: "a policy or the base has this name"
        if menu.takes(name)
        else f"{point} is no merge that this server makes"
        for name, point in left.items()
    }
    notes = [f"`{name}` is not served: {reason}" for name, reason in why.items()]
    return served, notes


def default_point(run: Run | None, options: ServeOptions, menu: Menu, chosen: Mapping[str, PointSpec]) -> PointSpec:
    """Return the point for requests that name none: by --at-least, by --lam, the chosen one, or equal weights.

    Raises:
        UserError: no point meets the minima, or λ is none.
    """
    if options.at_least:
        if run is None:
            remedy = "name the folder that `sweep` wrote: rewarded-lines serve RUN --at-least …"
            raise fail("a minimum needs a run that measured it", where="--at-least", remedy=remedy)
        rows = [name for name, points in run.methods().items() if _is_served(points[0].spec, menu)]
        if not rows:
            raise fail("no point of the run can be served", where="--at-least", got=", ".join(run.methods()))
        wish: Any = {"at_least": options.at_least, "maximize": options.maximize, "methods": rows, "name": None}
        return choose(run.folder, **wish).point
    if options.lam is not None:
        name = f"{options.row or menu.row}@{options.lam}"
        return PointSpec(options.row or menu.row, menu.spec(name))
    if CHOSEN in chosen:
        return chosen[CHOSEN]
    return PointSpec(menu.row, menu.spec(menu.example()))


def measured_points(run: Run, menu: Menu, chosen: Mapping[str, PointSpec]) -> list[dict[str, Any]]:
    """Return the points that were measured and can be asked for, with their means, for GET /preferences.

    The base has no row and no weights.
    """
    shown = [point for point in run.points if _is_served(point.spec, menu) and not point.spec.checkpoint]
    if not shown:
        return []
    means = np.array([point.means(run.objectives) for point in shown])
    front = nondominated(means) if np.isfinite(means).all() else np.zeros(len(shown), bool)
    names = {point: name for name, point in reversed(list(chosen.items())) if name != DEFAULT}
    found = []
    for point, values, best in zip(shown, means.tolist(), front.tolist(), strict=True):
        model = _model(point.spec, menu, names.get(point.spec))
        if model is not None:
            told: dict[str, Any] = {"name": names.get(point.spec), "model": model, "row": point.spec.method}
            told["weights"] = place_of(menu, point.spec.merge)
            found.append({**told, "means": dict(zip(run.objectives, values, strict=True)), "on_front": best})
    own = dict(zip(run.objectives, map(float, run.sft.means(run.objectives)), strict=True))
    base = {"name": None, "model": Path(menu.base).name, "row": None, "weights": {}, "means": own, "on_front": False}
    return [base, *found]


def _is_served(point: PointSpec, menu: Menu) -> bool:
    """Return whether a point's merge has a weight for each policy, and a row of the menu or none of the sweep's."""
    return len(point.merge.weights) == len(menu.policies) and (bool(point.checkpoint) or point.method in menu.rows)


def _model(point: PointSpec, menu: Menu, name: str | None) -> str | None:
    """Return the name by which a request gets this very point; None if its λ or its row's schedule is another now."""
    weights = ",".join(map(repr, place_of(menu, point.merge).values()))
    matched = menu.rows[point.method].matched
    try:
        model = menu.canonical(f"{'soup' if matched else point.method}@{weights}")
    except PreferenceError:
        return name
    spec = menu.spec(model)
    if spec.weights != point.merge.weights:
        return name
    if matched:
        # The norms of all residuals made its schedule once: the run has these very policies.
        return f"{point.method}@{model.partition('@')[2]}"
    return model if spec == point.merge else None
