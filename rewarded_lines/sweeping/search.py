"""The verb `search`: λ points added to a run where they raise a method's front most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rewarded_lines.config import SFT
from rewarded_lines.errors import did_you_mean, fail
from rewarded_lines.evaluation.evaluate import Evaluator
from rewarded_lines.evaluation.points import PointSpec
from rewarded_lines.evaluation.records import RUN_FILE, Point, Run, listed_points, load_run, read_header
from rewarded_lines.evaluation.run_folder import RunFolder, open_run
from rewarded_lines.evaluation.sweep_options import SweepOptions, takes_sweep_options
from rewarded_lines.evaluation.sweep_setup import Setup, open_setup
from rewarded_lines.fronts.hypervolume import hypervolume
from rewarded_lines.fronts.interpolation import mixed_hypervolume
from rewarded_lines.fronts.next_point import next_weights
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.projects import load_project
from rewarded_lines.references import located
from rewarded_lines.sweeping.sweep import finish_run, open_evaluator, sweep, write_run

POINTS, GAIN = 15, 0.001
_FIRST = 3


@dataclass(frozen=True)
class Found:
    """Where the search of one method ended.

    Attributes:
        method: its name.
        points: λ points that it has now.
        added: how many of them this search made.
        hypervolume: above the SFT model's scores, in the product of the rewards' units.
        mixed: the hypervolume of the line through the points, which answers of neighbouring policies in turn have; of
            two policies only.
        potential: the most that the next point might have added; 0 if nothing can be gained any more.
        reason: why the search ended: "points" or "gain".
    """

    method: str
    points: int
    added: int
    hypervolume: float
    mixed: float | None
    potential: float
    reason: str


@takes_sweep_options()
def search(
    run: Path | str,
    *,
    config: Path | str | None = None,
    methods: Sequence[str] = (),
    points: int = POINTS,
    gain: float = GAIN,
    engine: str | None = None,
    options: SweepOptions,
    progress: Progress = SILENT,
) -> tuple[Run, list[Found]]:
    """Add λ points to a run, one after the other where the front may gain most.

    The next λ lies midway between two evaluated neighbours; see `rewarded_lines.fronts.next_point`. The added points
    stay in the run, and a later `sweep` keeps them.

    Args:
        run: the run folder that `sweep` wrote; with `config` one that is not there yet begins with three λ.
        config: the project file; the one that the run was made from by default.
        methods: whose fronts; by default all that are merges.
        points: λ that each method has at most in the end.
        gain: end where no λ can raise the hypervolume by more than this share of it.
        engine: see `sweep`; the run's own by default.
        options: see `sweep`; `layers` are the run's own by default, and as many λ as there are `workers` are tried at
            once.
        progress: see `sweep`; the total is the most that there can be.

    Raises:
        UserError: the folder is no run, belongs to another configuration, or a method is none of its merges.
    """
    folder = Path(run)
    if not (folder / RUN_FILE).is_file():
        _begin(folder, config, methods, replace(options, engine=engine or options.engine), progress)
    header = read_header(folder)
    made_with = header["options"]
    options = replace(options, engine=engine or made_with["engine"], layers=options.layers or made_with["layers"])
    setup = open_setup(load_project(config or located(header["project"], folder)), options, progress)
    chosen = _chosen(setup, methods, folder)
    with (
        open_run(folder, setup, progress=progress) as held,
        open_evaluator(setup, folder, progress=progress) as make,
    ):
        listed = _listed(held)
        room = [max(0, points - sum(spec.method == name for spec in listed)) for name in chosen]
        held.expect(len({PointSpec(SFT), *listed}) + sum(room))
        found = [_search_one(held, make, name, points, gain) for name in chosen]
        finish_run(held, make, _listed(held), _added(held), held.before.get("tuned"))
    return load_run(folder), found


def _begin(
    folder: Path,
    config: Path | str | None,
    methods: Sequence[str],
    options: SweepOptions,
    progress: Progress,
) -> None:
    """Sweep three λ of each method, once it is certain that there is something to search."""
    if config is None:
        expected = "a run folder that `rewarded-lines sweep` wrote"
        raise fail("no run there", where=str(folder), expected=expected, remedy="name a project with --config")
    _chosen(open_setup(load_project(config), options, progress), methods, folder)
    sweep(config, points=_FIRST, out=folder, progress=progress, options=options)


def _chosen(setup: Setup, methods: Sequence[str], folder: Path) -> list[str]:
    merged = [name for name in setup.methods.specs if setup.methods.merged(name)]
    for name in methods:
        if name not in merged:
            remedy = did_you_mean(name, merged)
            raise fail(f"no merged method `{name}`", where=str(folder), expected=", ".join(merged), remedy=remedy)
    if len(setup.project.config.policies) < 2:
        raise fail("nothing to search", where=str(folder), expected="two policies or more, so that there is a λ")
    if not merged:
        raise fail("nothing to search", where=str(folder), expected="a method that merges along λ, such as lines")
    return list(dict.fromkeys(methods)) or merged


def _search_one(run: RunFolder, make: Evaluator, name: str, points: int, gain: float) -> Found:
    setup = run.setup
    (sft,) = run.fill(setup, [PointSpec(SFT)], make)
    start = [spec for spec in _listed(run) if spec.method == name]
    first = [] if start else setup.methods.grid(name, _FIRST)
    front = run.fill(setup, start or first, make)
    _remember(run, first)
    added, potential, reason = len(first), 0.0, "points"
    while True:
        room = points - len(front)
        # One even when the budget is spent, to say what it might have brought.
        proposals = _proposals(setup, front, sft, max(1, min(make.width, room)))
        volume = _volume(setup, front, sft)
        worth = [weights for weights, hoped in proposals if hoped > gain * volume]
        potential = max((hoped for _, hoped in proposals), default=0.0)
        if room <= 0 or not worth:
            reason = "points" if room <= 0 else "gain"
            break
        specs = [setup.methods.at(name, weights) for weights in worth]
        front += run.fill(setup, specs, make)
        added += len(specs)
        _remember(run, specs)
    return Found(name, len(front), added, _volume(setup, front, sft), _mixed(setup, front, sft), potential, reason)


def _proposals(setup: Setup, front: Sequence[Point], sft: Point, count: int) -> list[tuple[tuple[float, ...], float]]:
    """Return up to `count` weights to try, each with the hypervolume that it might add."""
    places = [point.spec.weights for point in front]
    means = [_means(setup, point) for point in front]
    found: list[tuple[tuple[float, ...], float]] = []
    while len(found) < count:
        proposal = next_weights(places, means, _means(setup, sft), [weights for weights, _ in found])
        if proposal is None:
            break
        found.append((proposal.weights, proposal.potential))
    return found


def _remember(run: RunFolder, specs: Sequence[PointSpec]) -> None:
    """Write down that the run has these points too."""
    listed = _listed(run)
    new = [spec for spec in specs if spec not in listed]
    if new:
        write_run(run, [*listed, *new], [*_added(run), *new], run.before.get("tuned"))
        run.before = read_header(run.folder)


def _listed(run: RunFolder) -> list[PointSpec]:
    """Return the run's points without those of a method that the project has changed meanwhile."""
    return [spec for spec, _ in listed_points(run.before) if run.setup.methods.declares(spec)]


def _added(run: RunFolder) -> list[PointSpec]:
    return [spec for spec in run.added() if run.setup.methods.declares(spec)]


def _volume(setup: Setup, front: Sequence[Point], sft: Point) -> float:
    return hypervolume([_means(setup, point) for point in front], _means(setup, sft))


def _mixed(setup: Setup, front: Sequence[Point], sft: Point) -> float | None:
    if len(setup.project.config.policies) != 2 or len(front) < 2:
        return None
    lams = [point.spec.weights[0] for point in front]
    return mixed_hypervolume(lams, [_means(setup, point) for point in front], _means(setup, sft))


def _means(setup: Setup, point: Point) -> list[float]:
    return [float(np.mean(point.scores[name])) for name in setup.objectives]
