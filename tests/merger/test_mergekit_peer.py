"""mergekit 0.1.5 as an oracle that shares no code with ours: three results of each merge must agree.

They are the formula in numpy and float64, written here; mergekit in its own environment, in float64; and our `merge`,
which computes in float64 and writes float32. mergekit must match the formula to 1e-12, and ours must be the formula
rounded once.

The same merge in both tools, λ_i the weights and α, β those of LiNeS:

- Rewarded Soups are mergekit's `linear` over the policies. It sums the policies themselves and needs no base; ours
  adds residuals to the base, which is the same number and rounds better in 16 bits.
- LiNeS is its `task_arithmetic` with the gradient `weight: [λ_i·α, λ_i·(α+β)]`, or `lambda: [α, α+β]`. As in LiNeS,
  the gradient runs from the first block to the last, and tensors outside the blocks get its first value, α. A model of
  one block gets its last value, α+β, but α in ours.
- TIES is its `ties` with `normalize: true` (join mean) or `false` (join sum), and `lambda: [α, α+β]` for LiNeS: a
  gradient in `weight` would cancel in the mean.
- SLERP is its `slerp` of two checkpoints of residuals, to which the test adds the base. Given the policies themselves,
  it interpolates weights around the origin instead of around the base.

The definitions differ in some points, which these tests avoid:

- Its TIES trims tensor by tensor; ours trims the whole residual, as in the paper, unless `scope: tensor`.
- It keeps `int(density·n)` values of a tensor and at least one. An unstable sort decides between equal magnitudes at
  the border. Here no two magnitudes of a tensor are equal, and density·n is whole.
- It compares magnitudes in float32 on the CPU, for any `dtype`. Here residuals are float32 numbers.
- If weighted residuals cancel to zero it elects +, and it elects from float32 sums without `dtype: float64`. Here
  nothing cancels.
- Its SLERP is linear beyond |cos Ω| = 0.9995, also for opposite residuals; a residual of zeros counts as perpendicular
  to any other. Here |cos Ω| is well below that, or exactly 1. NuSLERP with a base is linear only for parallel
  residuals.
- Its DARE draws from torch's global generator in the order of its task graph, then restores the tensor's L1 norm
  (`rescale`); the paper divides by the density. No seed makes the two equal, so only the shares and sizes of the kept
  values are compared.
- Its DELLA draws likewise, and ranks tensors of three axes along the second; ours ranks along the last axis.
- Its SCE weighs policies alike if their mean squares add up to less than 1e-6, as they do for most residuals of RL. It
  selects ⌊select·n⌋ values whatever the sort of equal variances, and elects + where values cancel.

The last tests give the same YAML to both tools (`merge --from-mergekit`). mergekit computes in float64 (`dtype`), and
both write float32. The files must have the same bits, except for single values where base and residual cancel.
- mergekit's `dtype` is that of the arithmetic, and of the output without `out_dtype`. Without `dtype`,
  `task_arithmetic` and `ties` compute in the inputs' type, for example bfloat16; ours always computes in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mergekit_env import MergekitUnavailable, find_mergekit, run_mergekit
from safetensors.numpy import load_file, save_file
from tiny_models import make_model, save_model

from rewarded_lines import merge
from rewarded_lines.merger.mergekit import merge_like_mergekit

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]

BLOCKS = 4
# No sum of whole steps (see `residual`) with these weights is 0.
THREE = (0.37123, 0.12979, 0.49898)
TWO = (0.37123, 0.62877)
POLICIES = ("first", "second", "third")
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One merge: its arguments here and in mergekit."""

    name: str
    method: str
    merge_method: str
    weights: tuple[float, ...] = THREE
    policies: tuple[str, ...] = POLICIES
    alpha: float = 1.0
    beta: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    gradient: str = "lambda"


LINES = {"alpha": 0.7, "beta": 0.9}
MEAN = {"density": 0.5, "scope": "tensor", "join": "mean"}
SUM = MEAN | {"join": "sum"}
PAIR: dict[str, Any] = {"weights": TWO, "policies": POLICIES[:2]}
CASES = [
    Case("linear", "soup", "linear"),
    Case("lines", "soup", "task_arithmetic", **LINES, gradient="weight"),
    Case("lines-lambda", "soup", "task_arithmetic", **LINES),
    Case("reversed", "soup", "task_arithmetic", alpha=2.0, beta=-1.0, gradient="weight"),
    Case("task-arithmetic", "task-arithmetic", "task_arithmetic", **LINES, gradient="weight"),
    Case("ties-mean", "ties", "ties", options=MEAN),
    Case("ties-mean-lines", "ties", "ties", **LINES, options=MEAN),
    Case("ties-sum-lines", "ties", "ties", **LINES, options=SUM),
    Case("ties-pair", "ties", "ties", **PAIR, **LINES, options=MEAN),
    Case("slerp", "slerp", "slerp", **PAIR),
    Case("slerp-lines", "slerp", "slerp", **PAIR, **LINES),
    Case("slerp-parallel", "slerp", "slerp", weights=TWO, policies=("first", "doubled"), **LINES),
]


# ---- checkpoints whose residuals are exact ------------------------------------------------------------------


def residual(weight: np.ndarray, generator: np.random.Generator, like: np.ndarray | None = None) -> np.ndarray:
    """Return a residual of whole steps with distinct magnitudes; two of three values are those of `like`."""
    if like is None:
        steps = (1 + generator.permutation(weight.size)) * generator.choice([-1, 1], weight.size)
        return (steps * 2.0 ** (-5 - int(np.ceil(np.log2(weight.size))))).reshape(weight.shape)
    values = like.ravel().copy()
    places = generator.permutation(values.size)[: values.size // 3]
    values[places] = generator.permutation(values[places]) * generator.choice([-1, 1], places.size)
    return values.reshape(weight.shape)


def save_variant(folder: Path, base: Path, tensors: Tensors) -> None:
    """Save a checkpoint with base's companions and these tensors, in float32 and without any rounding."""
    folder.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    rounded = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    assert all(np.array_equal(rounded[name], tensors[name]) for name in tensors)
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Path:
    """`base` with an untied head, the policies, and a checkpoint of each residual."""
    folder = tmp_path_factory.mktemp("family")
    model = make_model(0, blocks=BLOCKS)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_((weight * 2**20).round() / 2**20)  # so that base + residual is exact in float32
    base = save_model(model, folder / "base")
    start = {name: tensor.astype(np.float64) for name, tensor in load_file(base / "model.safetensors").items()}
    assert "lm_head.weight" in start
    generator = np.random.default_rng(0)
    first = {name: residual(tensor, generator) for name, tensor in start.items()}
    residuals = {"first": first, "doubled": {name: 2 * tensor for name, tensor in first.items()}}
    for name in ("second", "third"):
        residuals[name] = {key: residual(tensor, generator, first[key]) for key, tensor in start.items()}
    for name, tensors in residuals.items():
        save_variant(folder / f"{name}-residual", base, tensors)
        save_variant(folder / name, base, {key: start[key] + tensors[key] for key in start})
    return folder


@pytest.fixture(scope="module")
def mergekit() -> Path:
    try:
        return find_mergekit()
    except MergekitUnavailable as error:
        pytest.skip(f"mergekit's environment cannot be made: {error}")


def load(folder: Path) -> Tensors:
    return {name: tensor.astype(np.float64) for name, tensor in load_file(folder / "model.safetensors").items()}


# ---- the formula ----------------------------------------------------------------------------------------------


def line(name: str, case: Case) -> float:
    """Return s(ℓ) = α + β·(ℓ−1)/(L−1), α outside the blocks."""
    parts = name.split(".")
    depth = int(parts[2]) / (BLOCKS - 1) if parts[1] == "layers" else 0.0
    return case.alpha + case.beta * depth


def soup(residuals: np.ndarray, weights: np.ndarray, case: Case) -> np.ndarray:
    return np.tensordot(weights, residuals, axes=1)


def ties(residuals: np.ndarray, weights: np.ndarray, case: Case) -> np.ndarray:
    kept = round(case.options["density"] * residuals[0].size)
    trimmed = np.zeros_like(residuals)
    for source, target in zip(residuals, trimmed, strict=True):
        places = np.argsort(-np.abs(source), axis=None)[:kept]
        target.flat[places] = source.flat[places]
    shares = weights.reshape(-1, *[1] * (residuals.ndim - 1))
    total = (shares * trimmed).sum(0)
    assert (np.abs(total) > 1e-9)[np.any(trimmed != 0, axis=0)].all(), "this sum has no clear sign"
    agreeing = (np.sign(trimmed) == np.sign(total)) & (trimmed != 0)
    joined = (shares * trimmed * agreeing).sum(0)
    if case.options["join"] == "sum":
        return joined
    divisor = (shares * agreeing).sum(0)
    return np.divide(joined, divisor, out=np.zeros_like(joined), where=divisor > 0)


def slerp(residuals: np.ndarray, weights: np.ndarray, case: Case) -> np.ndarray:
    first, second = residuals.reshape(2, -1)
    cosine = first @ second / (np.linalg.norm(first) * np.linalg.norm(second))
    if cosine > 1 - 1e-9:
        return soup(residuals, weights, case)
    assert abs(cosine) < 0.95
    angle = np.arccos(cosine)
    return soup(residuals, np.sin(weights * angle) / np.sin(angle), case)


FORMULAS = {"soup": soup, "task-arithmetic": soup, "ties": ties, "slerp": slerp}


def by_formula(family: Path, case: Case) -> Tensors:
    start = load(family / "base")
    residuals = [load(family / f"{name}-residual") for name in case.policies]
    rule = FORMULAS[case.method]
    return {
        name: base + line(name, case) * rule(np.stack([r[name] for r in residuals]), np.array(case.weights), case)
        for name, base in start.items()
    }


# ---- mergekit -------------------------------------------------------------------------------------------------


def by_mergekit(tool: Path, family: Path, case: Case, out: Path) -> Tensors:
    if case.merge_method == "slerp":
        run_mergekit(tool, slerp_config(family, case), out)
        start, rotated = load(family / "base"), load(out)
        return {name: base + line(name, case) * rotated[name] for name, base in start.items()}
    run_mergekit(tool, config(family, case), out)
    return load(out)


def config(family: Path, case: Case) -> dict[str, Any]:
    ends = [case.alpha, case.alpha + case.beta]
    weight = {
        name: [share * end for end in ends] if case.gradient == "weight" else share
        for name, share in zip(case.policies, case.weights, strict=True)
    }
    density = {"density": case.options["density"]} if case.merge_method == "ties" else {}
    models = [{"model": str(family / n), "parameters": {"weight": weight[n]} | density} for n in case.policies]
    said: dict[str, Any] = {"merge_method": case.merge_method, "models": models, "dtype": "float64"}
    if case.merge_method == "linear":
        return said
    parameters = {"lambda": ends} if case.gradient == "lambda" else {}
    if case.merge_method == "ties":
        parameters["normalize"] = case.options["join"] == "mean"
    return said | {"base_model": str(family / "base"), "parameters": parameters}


def slerp_config(family: Path, case: Case) -> dict[str, Any]:
    first, second = (str(family / f"{name}-residual") for name in case.policies)
    return {
        "merge_method": "slerp",
        "base_model": second,  # t = 0
        "models": [{"model": second}, {"model": first}],
        "parameters": {"t": case.weights[0]},
        "dtype": "float64",
    }


# ---- the three results ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_formula_mergekit_and_merge_agree(case, family, mergekit, tmp_path):
    expected = by_formula(family, case)
    theirs = by_mergekit(mergekit, family, case, tmp_path / "theirs")
    assert theirs.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(theirs[name], tensor, rtol=0, atol=1e-12, err_msg=f"mergekit, {name}")

    options = {"options": case.options} if case.options else {}
    policies = {name: family / name for name in case.policies}
    merge(
        family / "base",
        policies,
        case.weights,
        alpha=case.alpha,
        beta=case.beta,
        method=case.method,
        out=tmp_path / "ours",
        **options,
    )
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ours[name].dtype == np.float32
        error = np.abs(ours[name].astype(np.float64) - tensor)
        # One rounding is half a unit in the last place. Near ties need a little more, and so does the formula's own
        # float64 rounding if base and residual cancel.
        allowed = np.spacing(np.abs(ours[name])).astype(np.float64) * (0.5 + 2**-20) + 1e-15
        assert (error <= allowed).all(), f"{name}: {(error / allowed).max():.3g} roundings"


# ---- the same file for both ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A mergekit config of the policies, without paths and types."""

    merge_method: str
    models: dict[str, dict[str, Any]]
    parameters: dict[str, Any] = field(default_factory=dict)
    base: bool = True
    sliced: bool = False

    def config(self, family: Path) -> dict[str, Any]:
        models: list[dict[str, Any]] = [
            {"model": str(family / name), "parameters": given} for name, given in self.models.items()
        ]
        said: dict[str, Any] = {"merge_method": self.merge_method, "parameters": self.parameters}
        said |= {"dtype": "float64", "out_dtype": "float32"}
        said |= {"base_model": str(family / "base")} if self.base else {}
        if not self.sliced:
            return said | {"models": models}
        models += [{"model": str(family / "base")}]
        return said | {"slices": [{"sources": [{**model, "layer_range": [0, BLOCKS]} for model in models]}]}


# No sum of whole steps is 0, see TWO.
UNEVEN = {"first": {"weight": 1}, "second": {"weight": 1.69376}}
FILES = {
    "linear": File(
        "linear", {"first": {"weight": 1.0}, "second": {"weight": 0.3}, "third": {"weight": 0.5}}, base=False
    ),
    "linear-over-base": File("linear", {"base": {"weight": 0.3}, "first": {"weight": 0.7}}),
    "linear-gradient": File("linear", {"base": {"weight": [1, 0.4]}, "first": {"weight": [0, 0.6]}}),
    "linear-one-weight": File("linear", {"first": {}, "second": {}}, {"weight": 1}, base=False),
    "task-arithmetic": File("task_arithmetic", {"first": {"weight": 0.8}, "second": {"weight": -0.3}}),
    "task-arithmetic-lines": File(
        "task_arithmetic", {"first": {"weight": [0.28, 0.64]}, "second": {"weight": [0.42, 0.96]}}
    ),
    "task-arithmetic-lambda": File(
        "task_arithmetic", {"first": {"weight": 0.3}, "second": {"weight": 0.7}}, {"lambda": [0.5, 1.0, 1.5]}
    ),
    "task-arithmetic-mean": File(
        "task_arithmetic", {"first": {"weight": [3, 6]}, "second": {"weight": [7, 14]}}, {"normalize": True}
    ),
    "task-arithmetic-filter": File(
        "task_arithmetic",
        {"first": {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 0.5}]}, "second": {"weight": "5e-1"}},
    ),
    "task-arithmetic-slice": File(
        "task_arithmetic", {"first": {"weight": [0.3, 0.6]}, "second": {"weight": [0.7, 1.4]}}, sliced=True
    ),
    "ties": File("ties", UNEVEN, {"density": 0.5}),
    "ties-sum": File(
        "ties",
        {"first": {"weight": [1, 2]}, "second": {"weight": [1.69376, 3.38752]}},
        {"density": 0.5, "normalize": False, "int8_mask": True},
    ),
    "ties-lambda": File("ties", UNEVEN, {"lambda": [0.5, 1.5]}),
    "dare-linear-whole": File("dare_linear", {"first": {"weight": 0.3}, "second": {"weight": 0.7}}),
    "dare-ties-whole": File("dare_ties", UNEVEN, {"normalize": True}),
    "nuslerp": File("nuslerp", {"first": {"weight": 1}, "second": {"weight": 3}}),
    "breadcrumbs": File(
        "breadcrumbs", {"first": {"weight": [0.3, 0.6]}, "second": {"weight": [0.7, 1.4]}}, {"density": 0.5}
    ),
    "breadcrumbs-ties": File("breadcrumbs_ties", UNEVEN, {"density": 0.5, "gamma": 0.2, "normalize": True}),
    "ram": File("ram", {"first": {}, "second": {}, "third": {}}, {"epsilon": 0.01}),
    # It rounds 1 + r·min(q, α) to float32; here that is 1.25.
    "ram-plus": File("ramplus_tl", {"first": {}, "second": {}}, {"epsilon": 0.01, "r": 0.5, "alpha": 0.5}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_for_mergekit_gives_the_same_bits_here(name, family, mergekit, tmp_path):
    config = FILES[name].config(family)
    run_mergekit(mergekit, config, tmp_path / "theirs")
    merge_like_mergekit(tmp_path / "theirs.yaml", out=tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype == np.float32
        differ = ours[key].view(np.uint32) != tensor.view(np.uint32)
        # If base and residual cancel, both keep the rounding of float64, about 1e-18.
        assert (np.abs(ours[key] - tensor)[differ] < 1e-15).all(), key
        assert differ.sum() <= 1, key


def test_where_values_cancel_mergekit_elects_plus_and_ours_nothing(family, mergekit, tmp_path):
    file = File("ties", {"first": {"weight": 1}, "second": {"weight": 3}})
    run_mergekit(mergekit, file.config(family), tmp_path / "theirs")
    merge_like_mergekit(tmp_path / "theirs.yaml", out=tmp_path / "ours")
    theirs, ours, base = (load(folder) for folder in (tmp_path / "theirs", tmp_path / "ours", family / "base"))
    first, second = (load(family / f"{name}-residual") for name in ("first", "second"))
    found = 0
    for key in base:
        differ = theirs[key] != ours[key]
        assert np.array_equal(differ, (first[key] + 3 * second[key] == 0) & (first[key] != 0))
        assert np.array_equal(ours[key][differ], base[key][differ])
        assert (theirs[key] >= base[key])[differ].all()
        found += int(differ.sum())
    assert found


@pytest.mark.parametrize("rescale", [True, False])
def test_dare_keeps_as_many_values_and_enlarges_them_as_much(rescale, family, mergekit, tmp_path):
    file = File("dare_linear", {"first": {"weight": 0.8, "density": 0.25}}, {"rescale": rescale})
    run_mergekit(mergekit, file.config(family), tmp_path / "theirs")
    merge_like_mergekit(tmp_path / "theirs.yaml", out=tmp_path / "ours", seed=1)
    base, residuals = load(family / "base"), load(family / "first-residual")
    for folder in ("theirs", "ours"):
        merged = load(tmp_path / folder)
        moved = np.concatenate([((merged[key] - base[key]) / residuals[key]).ravel() for key in base])
        kept = np.abs(moved) > 1e-3
        # Three standard deviations of a share of about 10⁵ values; a tensor's L1 norm varies with its mask.
        assert abs(kept.mean() - 0.25) < 0.005, folder
        assert np.median(moved[kept]) == pytest.approx(3.2 if rescale else 0.8, rel=0.02), folder


def test_sce_is_the_same_but_for_equal_variances_and_cancelled_values(family, mergekit, tmp_path):
    file = File("sce", {name: {} for name in POLICIES}, {"select_topk": 0.5})
    run_mergekit(mergekit, file.config(family), tmp_path / "theirs")
    common = {"method": "sce", "options": {"select": 0.5}, "beta": 0}
    merge(family / "base", {name: family / name for name in POLICIES}, (1 / 3,) * 3, out=tmp_path / "ours", **common)
    theirs, ours, base = (load(folder) for folder in (tmp_path / "theirs", tmp_path / "ours", family / "base"))
    rows = [load(family / f"{name}-residual") for name in POLICIES]
    same = 0
    for key in base:
        stack = np.stack([row[key] for row in rows])
        spread = ((3 * stack - stack.sum(0)) ** 2).sum(0)
        chosen = int(0.5 * np.count_nonzero(spread))
        least = np.sort(spread, axis=None)[::-1][chosen - 1]
        excused = (spread == least) | (stack.sum(0) == 0)
        # One value more or less at the border changes the policies' shares of the squares, a little.
        tied = np.count_nonzero(spread >= least) > chosen
        allowed = 2e-3 * np.abs(ours[key] - base[key]) if tied else np.zeros_like(base[key])
        close = np.abs(theirs[key] - ours[key]) <= np.spacing(np.abs(ours[key]).astype(np.float32)) + allowed
        assert (close | excused).all(), key
        assert excused.mean() < 0.1 or excused.size < 100, key
        same += int((close & (ours[key] != base[key])).sum())
    assert same > 20_000


def test_della_keeps_as_many_values_of_every_rank(family, mergekit, tmp_path):
    options = {"density": 0.5, "window": 0.4, "join": "all"}
    file = File("della_linear", {"first": {"weight": 0.8, "density": 0.5, "epsilon": 0.2}}, {"rescale": False})
    run_mergekit(mergekit, file.config(family), tmp_path / "theirs")
    merge(
        family / "base",
        {"first": family / "first"},
        0.8,
        beta=0,
        method="della",
        options=options,
        extrapolate=True,
        out=tmp_path / "ours",
    )
    base, residuals = load(family / "base"), load(family / "first-residual")
    for folder in ("theirs", "ours"):
        merged, moved, chances = load(tmp_path / folder), [], []
        for key in (key for key in base if base[key].ndim == 2):
            ranks = np.abs(residuals[key]).argsort(axis=1).argsort(axis=1) / (residuals[key].shape[1] - 1)
            moved.append(((merged[key] - base[key]) / residuals[key]).ravel())
            chances.append((0.3 + 0.4 * ranks).ravel())
        factors, chance = np.concatenate(moved), np.concatenate(chances)
        for low in (0.3, 0.4, 0.5, 0.6):
            part = (chance >= low) & (chance < low + 0.1)
            kept = np.abs(factors[part]) > 1e-3
            assert abs(kept.mean() - chance[part].mean()) < 0.01, (folder, low)
            wanted = 0.8 / chance[part][kept] if folder == "ours" else 0.8
            assert np.median(np.abs(factors[part][kept] - wanted)) < 1e-3, (folder, low)
