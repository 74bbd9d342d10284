"""mergekit's methods that exist here too: their weights, gradients and switches become λ, α, β and options.

As in mergekit 0.1.5. A setting without an exact counterpart is refused. If the two tools differ only for special
values, a note reports it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.merger.lines_schedule import Line as ScheduleLine
from rewarded_lines.merger.mergekit_file import MergekitFile, Reference
from rewarded_lines.merger.mergekit_gradients import Line, Product, factor, multiply, normalized, total
from rewarded_lines.merger.method_row import OptionValue
from rewarded_lines.merger.spec import TOLERANCE, MergeSpec, on_simplex

_BORDER = "all values as large as the smallest kept one are kept; mergekit keeps some of them, by the order of its sort"
_CANCEL = "where weighted values cancel to 0 the merged value is 0; mergekit elects + there"
_MASKS = "--seed draws which values are dropped; mergekit draws its own"
_NORM = ", and restores each tensor's L1 norm where the rest is divided by the density here, as in DARE's paper"
_ANGLE = "residuals with a cosine above 0.9995, or of zero, are joined linearly; in mergekit only parallel ones are"
_ROWS = (
    "with a tokenizer's source mergekit cuts off the rows of embeddings that no token has, and starts tokens that the "
    "base lacks from a mean; here all rows are merged as they are"
)
_RATIO = "in the same ratio at every depth"
_ONE = Line(1.0, 1.0)
Options = dict[str, OptionValue]


@dataclass(frozen=True)
class Translation:
    """The arguments of `merge` that make the merge of a file.

    Attributes:
        full: policies are adapters to fold, since mergekit writes whole models.
        blocks: the number of blocks that the models must have, None for any.
        notes: on differences between the two tools.
        tokenizer: whose tokenizer files the output gets.
    """

    base: str
    policies: Mapping[str, str]
    merge: MergeSpec
    dtype: str = "auto"
    full: bool = False
    blocks: int | None = None
    notes: tuple[str, ...] = ()
    tokenizer: str = "auto"

    def command(self, out: str = "merged") -> str:
        """Return the command line that makes the same merge."""
        kind = "full" if self.full else "auto"
        how = {"dtype": self.dtype, "as_": kind, "tokenizer": self.tokenizer}
        return self.merge.command(self.base, self.policies, out, **how)


def _linear(file: MergekitFile) -> Translation:
    """Σ wᵢθᵢ / Σ wᵢ is base + Σ λᵢ(θᵢ − base) for any base, as λ sums to 1: the SFT model, or one of the models."""
    weights = [file.line("weight", of=one) for one in file.inputs]
    whole = total(weights)
    if file.flag("normalize", True):
        shares = normalized(weights)
    else:
        shares = weights if max(abs(whole.first - 1), abs(whole.last - 1)) <= TOLERANCE else None
    if shares is None:
        raise _no_schedule(file, weights, "that sum to 1 at every depth")
    common = {one.model.path for one in file.inputs if one.model.lora}
    first = common.pop() if len(common) == 1 else file.inputs[0].model.path
    origin = file.base.path if file.base else first
    kept = [index for index, one in enumerate(file.inputs) if one.model.lora or one.model.path != origin]
    if not kept:
        raise file.fault("one model: there is nothing to merge", expected="two models or more")
    lines = [shares[index] for index in kept]
    file = replace(file, base=Reference(origin), inputs=[file.inputs[index] for index in kept])
    note = f"mergekit sums the models themselves; over {origin} as the base it is the same number"
    product = factor(lines)
    return _apart(file, lines, [note]) if product is None else _soup(file, product, [note])


def _task_arithmetic(file: MergekitFile) -> Translation:
    lines = _coefficients(file)
    if lines and factor(lines) is None:
        scaled = [scaled for line in lines if (scaled := multiply(line, file.line("lambda", 1.0)))]
        if len(scaled) == len(lines):
            return _apart(file, scaled, [])
    return _soup(file, _scaled(file, _sum_of_residuals(file)), [])


def _ties(file: MergekitFile, random: bool = False) -> Translation:
    (product, join), density = _joined(file, True, mean=not random), _density(file)
    if random and density < 1:
        options: Options = {"density": density, "join": join, "seed": 0}
        product, note = _random(file, product, density)
        return _translation(file, product, "dare-ties", options, [note, _CANCEL])
    _check_rescale(file, random, density)
    options = {"density": density, "scope": "tensor", "join": join}
    return _translation(file, product, "ties", options, [_BORDER, _CANCEL] if density < 1 else [_CANCEL])


def _dare_linear(file: MergekitFile) -> Translation:
    density = _density(file)
    if density == 1:
        return _task_arithmetic(file)
    product, note = _random(file, _scaled(file, _summing(_sum_of_residuals(file))), density)
    return _translation(file, product, "dare", {"density": density, "seed": 0}, [note])


def _breadcrumbs(file: MergekitFile, elect: bool = False) -> Translation:
    (product, join), density = _joined(file, elect), _density(file)
    _check_rescale(file, False, density)
    options: Options = {"density": density, "outliers": _same(file, "gamma", 0.01), "join": join}
    notes = [*([_BORDER + ", and at least one"] if density < 1 else []), *([_CANCEL] if elect else [])]
    return _translation(file, product, "breadcrumbs", options, notes)


def _ram(file: MergekitFile, plus: bool = False) -> Translation:
    """RAM has no weights in mergekit: λ is equal, so that every ρ is 1."""
    count = len(file.policies)
    if count == 1:
        raise file.fault("mergekit drops small values of a single model; here it is kept whole", expected="two models")
    options: Options = {"changed": _same(file, "epsilon", 1e-5)}
    if plus:
        boost, cap = (_same(file, name, value) for name, value in (("r", 0.1), ("alpha", 0.2)))
        options |= {"boost": boost, "cap": cap, "scope": "tensor"}
    method, notes = ("ram-plus", ["mergekit rounds 1 + r·min(q, α) to float32"]) if plus else ("ram", [])
    return _translation(file, Product((1 / count,) * count, _ONE), method, options, notes)


def _nuslerp(file: MergekitFile) -> Translation:
    """With a base it rotates one residual into the other, as `slerp` does here; without one, whole weights."""
    problems = [
        Problem(f"`{name}` has no counterpart here", file.path, expected=f"{name}: {str(value).lower()}, the default")
        for name, value in (("nuslerp_flatten", True), ("nuslerp_row_wise", False))
        if file.flag(name, value) != value
    ]
    if (count := len(file.policies)) != 2:
        problems.append(Problem("nuslerp takes two models beside its base", file.path, got=str(count)))
    if problems:
        raise UserError(problems)
    return _translation(file, Product(_proportional(file).weights, _ONE), "slerp", {}, [_ANGLE])


@dataclass(frozen=True)
class MergekitMethod:
    """One method of mergekit: its translation, and its parameters: for all, for each model, and without effect."""

    translate: Callable[[MergekitFile], Translation]
    shared: tuple[str, ...]
    beside: tuple[str, ...] = ("weight",)
    idle: tuple[str, ...] = ()


_OVER_BASE = ("normalize", "lambda")
_SPARSE = ((*_OVER_BASE, "rescale"), ("weight", "density"), ("int8_mask",))
_BANDS = (_SPARSE[0], ("weight", "density", "gamma"), _SPARSE[2])
MERGEKIT_METHODS: Mapping[str, MergekitMethod] = {
    "linear": MergekitMethod(_linear, ("normalize",), idle=("density", "int8_mask")),
    "task_arithmetic": MergekitMethod(_task_arithmetic, _OVER_BASE, idle=("density", "int8_mask", "rescale")),
    "ties": MergekitMethod(_ties, *_SPARSE),
    "dare_linear": MergekitMethod(_dare_linear, *_SPARSE),
    "dare_ties": MergekitMethod(partial(_ties, random=True), *_SPARSE),
    "breadcrumbs": MergekitMethod(_breadcrumbs, *_BANDS),
    "breadcrumbs_ties": MergekitMethod(partial(_breadcrumbs, elect=True), *_BANDS),
    "ram": MergekitMethod(_ram, ("epsilon",), ()),
    "ramplus_tl": MergekitMethod(partial(_ram, plus=True), ("epsilon", "r", "alpha"), ()),
    "nuslerp": MergekitMethod(_nuslerp, ("nuslerp_flatten", "nuslerp_row_wise")),
}


def _joined(file: MergekitFile, elect: bool, mean: bool = False) -> tuple[Product, str]:
    """Return λ with the schedule, and how values are joined; `mean` is the default of `normalize`."""
    if not elect:
        return _scaled(file, _summing(_sum_of_residuals(file))), "all"
    product, mean = _proportional(file), file.flag("normalize", mean)
    return _scaled(file, Product(product.weights, _ONE if mean else product.schedule)), "mean" if mean else "sum"


def _coefficients(file: MergekitFile) -> Sequence[Line] | None:
    """Return cᵢ of Σ cᵢτᵢ, which is Σ wᵢτᵢ or Σ wᵢτᵢ / Σ wᵢ; None if these are no lines."""
    weights = [file.line("weight", of=one) for one in file.policies]
    return normalized(weights) if file.flag("normalize", False) else weights


def _sum_of_residuals(file: MergekitFile) -> Product:
    """Return λ and the one schedule of `_coefficients`."""
    lines = _coefficients(file)
    product = factor(lines) if lines else None
    if product is None:
        raise _no_schedule(file, [file.line("weight", of=one) for one in file.policies])
    return product


def _proportional(file: MergekitFile) -> Product:
    """Return weights ≥ 0 as λ on the simplex and their sum over depth, which is above 0."""
    weights = [file.line("weight", of=one) for one in file.policies]
    whole = total(weights)
    product = factor(weights)
    if product is None or min(min(w.first, w.last) for w in weights) < 0 or min(whole.first, whole.last) <= 0:
        raise _no_schedule(file, weights, f"above 0, {_RATIO}")
    return _summing(product)


def _summing(product: Product) -> Product:
    """Return the same coefficients with λ that sum to 1, unless their sum is 0."""
    whole = math.fsum(product.weights)
    if abs(whole) <= TOLERANCE or abs(whole - 1) <= TOLERANCE:
        return product
    return Product(tuple(weight / whole for weight in product.weights), product.schedule.times(whole))


def _scaled(file: MergekitFile, product: Product) -> Product:
    """Return λ with the schedule times mergekit's `lambda`."""
    schedule = multiply(product.schedule, file.line("lambda", 1.0))
    if schedule is None:
        what = "weights and `lambda` both change with depth, so their product is no straight line"
        raise file.fault(what, "parameters: lambda", expected="a gradient in one of them")
    return Product(product.weights, schedule)


def _density(file: MergekitFile) -> float:
    """Return the one density of all policies."""
    return _same(file, "density", 1.0, 1.0)


def _same(file: MergekitFile, name: str, default: float, most: float = math.inf) -> float:
    """Return a parameter that must be one number ≥ 0 for all policies; one with a largest value is above 0."""
    lines = [file.line(name, default, of=one) for one in file.policies]
    inside = lines[0].first >= 0 if most == math.inf else 0 < lines[0].first <= most
    if any(line != lines[0] for line in lines) or not lines[0].constant or not inside:
        what = f"every policy has the same `{name}` here, at every depth"
        expected = "one number ≥ 0" if most == math.inf else f"one number above 0, at most {most:g}"
        raise file.fault(what, name, expected=expected, got=", ".join(map(str, lines)))
    return lines[0].first


def _check_rescale(file: MergekitFile, default: bool, density: float) -> None:
    if file.flag("rescale", default) and density < 1:
        raise file.fault("`rescale` has no counterpart here", expected="rescale: false, its default in mergekit")


def _random(file: MergekitFile, product: Product, density: float) -> tuple[Product, str]:
    """Return the product, shrunk if the file does not rescale, and a note."""
    if file.flag("rescale", True):
        return product, _MASKS + _NORM
    return Product(product.weights, product.schedule.times(density)), _MASKS


def _soup(file: MergekitFile, product: Product, notes: list[str]) -> Translation:
    """Return Σ λᵢτᵢ by the method that takes such weights here."""
    method = "soup"
    if not on_simplex(product.weights):
        alone = len(file.policies) == 1 and 0 <= product.weights[0] <= 1
        method = "wise-ft" if alone else "task-arithmetic"
    return _translation(file, product, method, {}, notes)


def _apart(file: MergekitFile, lines: Sequence[Line], notes: list[str]) -> Translation:
    """Return Σ cᵢ(t)·τᵢ whose ratios change with depth: λ is 1, and each policy has a schedule of its own."""
    found = _translation(file, Product((1.0,) * len(lines), _ONE), "task-arithmetic", {}, notes)
    own = tuple(ScheduleLine(line.first, line.beta) for line in lines)
    return replace(found, merge=replace(found.merge, lines=own))


def _translation(
    file: MergekitFile, product: Product, method: str, options: Options, notes: Sequence[str]
) -> Translation:
    base, models = file.base.path if file.base else "", [one.model for one in file.policies]
    if wrong := [one for one in models if one.lora and one.path != base]:
        what, expected = "an adapter on another model than the base", f"{base}+{wrong[0].lora}"
        remedy = "fold it into its own model first: merge --as full"
        raise fail(what, where=file.path, expected=expected, got=str(wrong[0]), remedy=remedy)
    policies = _named([one.lora or one.path for one in models])
    # Inputs of one vocabulary are their own union; others are refused when the merge is made.
    owners = {base: "base", "union": "auto", "": "auto"} | {place: name for name, place in policies.items()}
    tokenizer = owners.get(file.tokenizer, file.tokenizer)
    notes = [*notes, *([_ROWS] if file.tokenizer else [])]
    spec = MergeSpec(product.weights, product.schedule.first, product.schedule.beta, method, options)
    full = all(one.lora for one in models)
    return Translation(base, policies, spec, file.dtype, full, file.blocks, tuple(notes), tokenizer)


def _named(places: Sequence[str]) -> dict[str, str]:
    """Return policies by the names of their folders, with numbers for equal names."""
    names = [Path(place).name for place in places]
    return {
        name if names.count(name) == 1 else f"{name}-{index}": place
        for index, (name, place) in enumerate(zip(names, places, strict=True), start=1)
    }


def _no_schedule(file: MergekitFile, weights: Sequence[Line], wanted: str = _RATIO) -> UserError:
    what, got = "the weights are no λ with a LiNeS schedule", ", ".join(map(str, weights))
    remedy = "give every model the same gradient, such as [0.4, 0.8] and [0.6, 1.2]"
    return file.fault(what, "weight", expected=f"weights {wanted}", got=got, remedy=remedy)
