"""The verb `search`: adds λ points to a run where they raise a method's front most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rewarded_lines.config import SFT
from rewarded_lines.errors import did_you_mean, fail
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.records import RUN_FILE, Run, read_header
from rewarded_lines.evaluator.run_folder import RunFolder, open_run, stored_run
from rewarded_lines.evaluator.shape_options import ShapeOptions, takes_shape_options
from rewarded_lines.evaluator.shape_search import FoundShape, find_shape, plan_shape
from rewarded_lines.evaluator.sweep import check_design, sweep
from rewarded_lines.evaluator.sweep_options import SweepOptions, takes_sweep_options
from rewarded_lines.evaluator.sweep_setup import Setup, open_setup
from rewarded_lines.evaluator.weight_designs import Weights
from rewarded_lines.pareto.approximate_hypervolume import careful
from rewarded_lines.pareto.interpolation import mixed_hypervolume
from rewarded_lines.pareto.next_point import Proposal, next_weights
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.projects import load_project
from rewarded_lines.references import located
from rewarded_lines.trace import traced

POINTS, GAIN = 15, 0.001
WORST = "worst"
# Up to so many rewards, a front that is nowhere above SFT is not worth a search.
_FEW = 3


@dataclass(frozen=True)
class Found:
    """The result of the search of one method.

    Attributes:
        points: λ of the method now.
        added: λ that this search added.
        hypervolume: above the SFT model's scores, in the product of the rewards' units.
        error: its relative standard error, where many points and rewards make it an approximation; 0 if it is exact.
        mixed: the hypervolume of the line through the points, see `mixed_hypervolume`; only for
            two policies.
        potential: the most that the next point could add; 0 if nothing more can be gained.
        reason: why the search ended: "points" or "gain".
        above: "sft", or "worst" where no λ of more than three rewards may be above SFT on each of them: then volumes
            are above the worst of SFT and the single policies on each reward.
    """

    method: str
    points: int
    added: int
    hypervolume: float
    error: float
    mixed: float | None
    potential: float
    reason: str
    above: str = SFT


@takes_sweep_options()
@takes_shape_options()
@traced
def search(
    run: Path | str,
    *,
    config: Path | str | None = None,
    methods: Sequence[str] = (),
    points: int = POINTS,
    gain: float = GAIN,
    engine: str | None = None,
    shapes: ShapeOptions,
    options: SweepOptions,
    progress: Progress = SILENT,
) -> tuple[Run, list[Found] | FoundShape]:
    """Add λ points to a run, one after the other where the front may gain most; or, with `shape`, search a shape.

    The next λ lies midway between two evaluated neighbours; see `rewarded_lines.pareto.next_point`.
    The added points stay in the run, and a later `sweep` keeps them.

    Args:
        run: the run folder that `sweep` wrote; with `config`, a new one begins with three λ on each edge of the
            simplex, or from four policies on with its vertices and centre.
        config: the project file; by default the run's own.
        methods: whose fronts; by default all that are merges.
        points: the most λ that each method has in the end.
        gain: end when no λ can raise the hypervolume by more than this share of it.
        engine: see `sweep`; by default the run's own.
        shapes: with `shape`, the shape over depth is searched that has the largest hypervolume on validation prompts;
            see `find_shape`. `methods`, `points` and `gain` are for λ.
        options: see `sweep`; `layers`, `tower` and `engine_args` are by default the run's own, and as many λ are
            tried at once as there are `workers`.
        progress: see `sweep`; the total is an upper limit.

    Returns:
        The run, and what was found for each method; with `shape` the compared points, and the shape.

    Raises:
        UserError: the folder is not a run, belongs to another configuration, or a method is
            not one of its merges.
    """
    folder = Path(run)
    if shapes.shape and (tuple(methods), points, gain) != ((), POINTS, GAIN):
        expected = "none of --method, --points and --gain, which are for λ"
        raise fail("a shape is searched for sums of residuals", where="--shape", expected=expected)
    if not (folder / RUN_FILE).is_file():
        begun = replace(options, engine=engine or options.engine)
        _begin(folder, config, methods, points, shapes, begun, progress)
    setup = _opened(folder, config, engine, options, progress)
    if shapes.shape:
        return find_shape(folder, setup, shapes, progress)
    chosen = _chosen(setup, methods, folder)
    with open_run(folder, setup, progress=progress) as held:
        check_design(held)
        there = {name: sum(spec.method == name for spec in held.listed) for name in chosen}
        _check_room(setup, [name for name in chosen if not there[name]], points)
        held.expect(len({PointSpec(SFT), *held.listed}) + sum(max(0, points - one) for one in there.values()))
        found = [_search_one(held, name, points, gain) for name in chosen]
        held.finish(held.listed, held.added, held.before.get("tuned"))
    return stored_run(folder), found


def _opened(
    folder: Path, config: Path | str | None, engine: str | None, options: SweepOptions, progress: Progress
) -> Setup:
    """Return the setup of a run, with the options that it was made with where none are given."""
    header = read_header(folder)
    made_with = header["options"]
    options = replace(options, engine=engine or made_with["engine"], layers=options.layers or made_with["layers"])
    options = replace(options, tower=options.tower or made_with.get("tower"))
    if options.engine == "vllm":
        options = replace(options, engine_args={**made_with.get("engine_args", {}), **options.arguments})
    return open_setup(load_project(config or located(header["project"], folder)), options, progress)


def _begin(
    folder: Path,
    config: Path | str | None,
    methods: Sequence[str],
    points: int,
    shapes: ShapeOptions,
    options: SweepOptions,
    progress: Progress,
) -> None:
    """Sweep the first λ of each method, after the check that there is something to search."""
    if config is None:
        expected = "a run folder that `rewarded-lines sweep` wrote"
        raise fail("no run there", where=str(folder), expected=expected, remedy="name a project with --config")
    setup = open_setup(load_project(config), options, progress)
    if shapes.shape:
        plan_shape(setup, shapes)
    else:
        _check_room(setup, _chosen(setup, methods, folder), points)
    sweep(config, points=setup.methods.design.first, out=folder, progress=progress, options=options)


def _check_room(setup: Setup, new: Sequence[str], points: int) -> None:
    """Refuse a budget that is smaller than the λ with which `new` methods begin."""
    first = len(setup.methods.design.weights(setup.methods.design.first))
    if new and points < first:
        policies = len(setup.project.config.policies)
        raise fail(
            "fewer λ than a search begins with",
            where=f"--points {points}",
            expected=f"{first} or more for {policies} policies",
            remedy=f"allow more, such as --points {2 * first}",
        )


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


def _search_one(run: RunFolder, name: str, points: int, gain: float) -> Found:
    setup, rewards = run.setup, run.setup.objectives
    (sft,) = run.fill(setup, [PointSpec(SFT)])
    start = [spec for spec in run.listed if spec.method == name]
    first = [] if start else setup.methods.grid(name, setup.methods.design.first)
    places, means = _measured(run, start or first)
    run.add(first)
    added = len(first)
    while True:
        room, above = points - len(places), SFT
        reference = sft.means(rewards)
        # One proposal even when the budget is spent, to report its potential.
        width = max(1, min(run.evaluator.width, room))
        proposals, (volume, error) = _proposals(places, means, reference, width), careful(means, reference)
        if not proposals and not volume and len(rewards) > _FEW:
            above, reference = WORST, _worst(places, [*means, reference])
            proposals, (volume, error) = _proposals(places, means, reference, width), careful(means, reference)
        potential = max((proposal.potential for proposal in proposals), default=0.0)
        worth = [proposal.weights for proposal in proposals if proposal.potential > gain * volume]
        if room <= 0 or not worth:
            break
        specs = [setup.methods.at(name, setup.methods.weights_at(place)) for place in worth]
        more = _measured(run, specs)
        places, means = places + more[0], means + more[1]
        added += len(specs)
        run.add(specs)
    mixed = None
    if len(setup.project.config.policies) == 2 and len(places) > 1:
        mixed = mixed_hypervolume([place[0] for place in places], means, reference)
    reason = "points" if room <= 0 else "gain"
    return Found(name, len(places), added, volume, error, mixed, potential, reason, above)


def _measured(run: RunFolder, specs: Sequence[PointSpec]) -> tuple[list[Weights], list[list[float]]]:
    """Return where points lie on the simplex, and their mean scores; missing ones are made first."""
    setup, places, means = run.setup, [], []
    for point in run.fill(setup, specs):
        places.append(setup.methods.place(point.spec.weights))
        means.append(point.means(setup.objectives))
    return places, means


def _proposals(
    places: Sequence[Weights], means: Sequence[Sequence[float]], reference: Sequence[float], width: int
) -> list[Proposal]:
    """Return up to `width` λ that are worth evaluating, the most promising first."""
    found: list[Proposal] = []
    while len(found) < width:
        proposal = next_weights(places, means, reference, [one.weights for one in found])
        if proposal is None:
            break
        found.append(proposal)
    return found


def _worst(places: Sequence[Weights], means: Sequence[Sequence[float]]) -> list[float]:
    """Return the worst mean on each reward of SFT, the last of `means`, and the single policies, or of all without."""
    single = [mean for place, mean in zip(places, means, strict=False) if max(place) == 1]
    return [min(column) for column in zip(*(single or means), means[-1], strict=True)]
