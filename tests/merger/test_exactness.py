"""Every method on difficult values, value by value: the exact result, rounded once.

Three exceptions allow the other neighbour or the other decision: the exact value is within 2⁻²⁰ units in the last
place of a rounding tie; terms cancel beyond float64; a method's decision is nearly a tie (a sign elected by a sum near
0). Each exception is counted: rare among values made to provoke it, absent among ordinary values.
"""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
from exact import BFLOAT16, FLOAT16, FLOAT32, FORMATS, WIDE_ENOUGH, decode, encode, encode_fraction
from exact_merge import Reference, Tally, compare, scale_of
from hostile import SHAPES, load_codes, widest

from rewarded_lines import merge
from rewarded_lines.kernels import kernels

pytestmark = [
    pytest.mark.skipif(not WIDE_ENOUGH, reason="long double is no wider than float64 here"),
    pytest.mark.usefixtures("short_blocks"),
]

# Every method with weights for as many policies, and the options to try.
PAIR, THREE = (0.3, 0.7), (0.2, 0.3, 0.5)
CASES = {
    "soup-1": ("soup", [(1.0,)], {}),
    "soup-2": ("soup", [PAIR, (0.5, 0.5)], {}),
    "soup-3": ("soup", [THREE, (0.25, 0.25, 0.5)], {}),
    "soup-5": ("soup", [(0.1, 0.2, 0.15, 0.35, 0.2)], {}),
    "wise-ft": ("wise-ft", [(0.37,), (0.5,)], {}),
    "task-arithmetic": ("task-arithmetic", [(0.9, -0.4, 0.8)], {}),
    "uniform": ("uniform", None, {}),
    "greedy": ("greedy", None, {}),
    "slerp": ("slerp", [PAIR, (0.5, 0.5)], {}),
    "ties-mean-model": ("ties", [THREE], {"density": 0.6, "join": "mean", "scope": "model"}),
    "ties-sum-model": ("ties", [THREE], {"density": 0.6, "join": "sum", "scope": "model"}),
    "ties-mean-tensor": ("ties", [PAIR], {"density": 0.29, "join": "mean", "scope": "tensor"}),
    "ties-sum-tensor": ("ties", [PAIR, (0.5, 0.5)], {"density": 0.29, "join": "sum", "scope": "tensor"}),
    "dare": ("dare", [THREE], {"density": 0.3, "seed": 0}),
    "dare-ties-mean": ("dare-ties", [THREE], {"density": 0.7, "seed": 1, "join": "mean"}),
    "dare-ties-sum": ("dare-ties", [PAIR], {"density": 0.7, "seed": 2, "join": "sum"}),
    "consensus": ("consensus", [THREE, (1.0, 0.0, 0.0)], {"tall": 0.4, "agree": 2}),
    "consensus-1": ("consensus", [PAIR], {"tall": 1.0, "agree": 1}),
    "sum": ("sum", [THREE], {}),
    "ram": ("ram", [THREE, (0.6, 0.0, 0.4)], {"changed": 0.004}),
    "ram-plus": ("ram-plus", [THREE], {"changed": 0.004, "boost": 0.7, "cap": 9.0, "scope": "model"}),
    "ram-plus-tensor": ("ram-plus", [PAIR], {"changed": 0.004, "boost": 0.7, "cap": 1.5, "scope": "tensor"}),
    "sce": ("sce", [THREE, (0.6, 0.0, 0.4)], {"select": 0.4}),
    "della-mean": ("della", [THREE], {"density": 0.6, "window": 0.4, "seed": 3, "join": "mean"}),
    "della-all": ("della", [PAIR], {"density": 0.3, "window": 0.0, "seed": 3, "join": "all"}),
    "breadcrumbs-all": ("breadcrumbs", [THREE], {"density": 0.5, "outliers": 0.1, "join": "all"}),
    "breadcrumbs-sum": ("breadcrumbs", [PAIR], {"density": 0.9, "outliers": 0.3, "join": "sum"}),
}
# Formats of base and policies, and the --dtype.
MIXED = (BFLOAT16, FLOAT32, BFLOAT16, FLOAT16, FLOAT32, BFLOAT16)
TYPES = {
    "bfloat16": ((BFLOAT16,) * 6, "auto"),
    "float16": ((FLOAT16,) * 6, "auto"),
    "float32": ((FLOAT32,) * 6, "auto"),
    "mixed": (MIXED, "auto"),
    "halves": ((FLOAT16, FLOAT16, BFLOAT16, FLOAT16, FLOAT16, FLOAT16), "auto"),
    "float32-to-bfloat16": ((FLOAT32,) * 6, "bfloat16"),
    "float32-to-float16": ((FLOAT32,) * 6, "float16"),
    "bfloat16-to-float32": ((BFLOAT16,) * 6, "float32"),
    "mixed-to-bfloat16": (MIXED, "bfloat16"),
}
# Blocks are decoded before a method gets them. So each run tries every method in one format, and every format with a
# method on single values and one on whole tensors; all pairs are slow.
IN_ALL_FORMATS = ("soup-3", "ties-sum-tensor")
# On ordinary values these are enough: the unkind ones hold each method to its formula.
ORDINARY = ("soup-3", "ties-sum-tensor", "slerp", "dare", "consensus", "sce")
SOUP, LINES = (1.0, 0.0), (0.3, 0.7)
# Weights with many bits, so that no sum of values with few bits is near a tie.
ODD = {
    1: (1.0,),
    2: (0.37123, 0.62877),
    3: (0.37123, 0.12979, 0.49898),
    5: (0.11213, 0.20479, 0.15151, 0.33333, 0.19824),
}


def run(family, case, dtype, out, lines=SOUP, outside="alpha", odd=False):
    """Merge a family by a case's method; return the tally of the outputs against the reference."""
    method, weights, options = CASES[case]
    if odd:
        weights = weights and [ODD[len(weights[0])]]
        options = {key: 0.41234 if key == "tall" else value for key, value in options.items()}
    results = merge(
        family.base,
        family.policies,
        weights,
        alpha=lines[0],
        beta=lines[1],
        method=method,
        options=options,
        outside=outside,
        dtype=dtype,
        out=out,
        allow_nonfinite=True,
        score=(lambda folder: 1.0) if method == "greedy" else None,
    )
    kind = widest(family.formats) if dtype == "auto" else FORMATS[dtype]
    reference, tally = Reference(family), Tally()
    for result in results:
        codes, kinds = load_codes(result.out)
        assert set(kinds.values()) == {kind.name} and codes.keys() == SHAPES.keys()
        for name in SHAPES:
            answer = reference.merge(name, method, result.spec.weights, scale_of(name, *lines, outside), options)
            tally.add(compare(f"{name} of {result.spec.weights}", codes[name], answer, kind))
    assert not tally.wrong, tally.wrong[:5]
    return tally


def pairs(types, quick):
    """Return all pairs of cases and formats, slow unless `quick(case, format)`."""
    return [
        pytest.param(case, one, marks=() if quick(case, one) else pytest.mark.slow) for case in CASES for one in types
    ]


def policies_of(case):
    return len(CASES[case][1][0]) if CASES[case][1] else 3


@pytest.mark.parametrize(
    ("case", "types"), pairs(TYPES, lambda case, types: case in IN_ALL_FORMATS or types == "bfloat16")
)
def test_unkind_values(case, types, families, tmp_path, monkeypatch):
    """By compiled loops in one format, and by numpy's in the others."""
    monkeypatch.setattr(kernels, "ENOUGH", -1 if types == "bfloat16" else 1 << 62)
    formats, dtype = TYPES[types]
    family, tally = families(formats[: policies_of(case) + 1]), Tally()
    for index, lines in enumerate([SOUP, LINES] if types == "bfloat16" else [LINES]):
        tally.add(run(family, case, dtype, tmp_path / str(index), lines))
    assert tally.near_tie <= 0.02 * tally.compared
    assert tally.cancelled <= 0.04 * tally.compared
    assert tally.undecided <= 0.02 * tally.compared


@pytest.mark.parametrize(
    ("case", "types"),
    pairs(
        ["bfloat16", "float16", "float32", "mixed-to-bfloat16"],
        lambda case, types: case in ORDINARY and types == "bfloat16",
    ),
)
def test_ordinary_values_have_no_exceptions(case, types, families, tmp_path):
    formats, dtype = TYPES[types]
    family = families(formats[: policies_of(case) + 1], gentle=True)
    # (0.45123, 1.09771) over a density of 0.7 is 1751/1500: so simple a fraction has results halfway between numbers.
    tally = run(family, case, dtype, tmp_path / "out", (0.4512337, 1.0977119), odd=True)
    assert (tally.near_tie, tally.cancelled, tally.undecided) == (0, 0, 0)


def test_outside_depth(families, tmp_path):
    for types in ("bfloat16", "float32"):
        family = families(TYPES[types][0][:3])
        run(family, "soup-2", "auto", tmp_path / types, (0.45, 1.1), outside="depth")


def test_the_reference_by_fractions(families, tmp_path):
    """Compute some values of a soup again, in exact fractions."""
    for kind in (BFLOAT16, FLOAT16, FLOAT32):
        family = families((kind,) * 4)
        reference = Reference(family)
        for name in ("model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
            scale = scale_of(name, *LINES)
            answer = reference.merge(name, "soup", THREE, scale, {})
            rows = [[Fraction(value) for value in row[:150].astype(np.float64)] for row in family.values(name)]
            for place, (base, *others) in enumerate(zip(*rows, strict=True)):
                pairs = zip(THREE, others, strict=True)
                exact = base + scale * sum(Fraction(weight) * (other - base) for weight, other in pairs)
                if exact:
                    # Between two values of the type, the last bit of float64 decides.
                    value = answer.values[place]
                    near = np.array([np.nextafter(value, -np.inf), value, np.nextafter(value, np.inf)])
                    assert encode_fraction(exact, kind) in encode(near, kind)


# ---- automatic α -----------------------------------------------------------------------------------------------


# One of each kind of method: a sum, one policy, whole tensors, masks, the whole model.
AUTOMATIC = ("soup-3", "wise-ft", "uniform", "slerp", "ties-sum-model", "ties-mean-tensor", "dare", "consensus")


def by_numpy(family, case, spec):
    """Return (‖Σ τ_i‖₁ / ‖τ_merged‖₁)/N from the exact merge with scale 1."""
    method, _, options = CASES[case]
    reference, together, joined = Reference(family), [], []
    for name in SHAPES:
        base, *others = family.values(name)
        together.append(np.abs(sum(other - base for other in others)).sum())
        joined.append(np.abs(reference.merge(name, method, spec.weights, Fraction(1), options).values - base).sum())
    return float(sum(together) / sum(joined) / (len(family.formats) - 1))


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in AUTOMATIC else pytest.mark.slow) for case in CASES if case != "greedy"],
)
def test_automatic_alpha(case, families, tmp_path):
    method, weights, options = CASES[case]
    family = families((FLOAT32,) * (policies_of(case) + 1), gentle=True)
    common = {"alpha": "auto", "method": method, "options": options}
    for result in merge(family.base, family.policies, weights, beta=0.5, out=tmp_path / "out", **common):
        assert result.spec.alpha == pytest.approx(by_numpy(family, case, result.spec), rel=1e-12)
        record = json.loads((result.out / "merge.json").read_text())
        assert record["alpha"] == result.spec.alpha
        # The same α as a number gives the same bits.
        again = {"alpha": result.spec.alpha, "method": method, "options": options, "beta": 0.5}
        lam = None if weights is None else result.spec.weights
        merge(family.base, family.policies, lam, out=tmp_path / "again", overwrite=True, **again)
        written = [(folder / "model.safetensors").read_bytes() for folder in (result.out, tmp_path / "again")]
        assert written[0] == written[1]


def test_automatic_alpha_is_printed(cli, families, tmp_path):
    family = families((FLOAT32,) * 3, gentle=True)
    names = [part for name, path in family.policies.items() for part in ("--policy", f"{name}={path}")]
    answer = cli(
        "merge", "--base", family.base, *names, "--alpha", "auto", "--method", "ties", "--out", tmp_path / "out"
    )
    alpha = json.loads((tmp_path / "out/merge.json").read_text())["alpha"]
    assert answer.code == 0 and "α (auto)" in answer.out and f"{alpha:.6g}" in answer.out


def test_automatic_alpha_of_nothing_is_refused(cli, families, tmp_path):
    family = families((FLOAT32,) * 3, gentle=True)
    args = ("--base", family.base, "--policy", family.base, "--alpha", "auto", "--out", tmp_path / "out")
    answer = cli("merge", *args)
    assert answer.code == 1 and "the merged residual is zero" in answer.err and not (tmp_path / "out").exists()


def test_codes_of_the_families_are_what_they_say(families):
    for kind in (BFLOAT16, FLOAT16, FLOAT32):
        family = families((kind,) * 3)
        for folder, codes in zip([family.base, *family.policies.values()], family.codes, strict=True):
            stored, _ = load_codes(folder)
            assert all(np.array_equal(stored[name], codes[name]) for name in SHAPES)
            assert all(np.isfinite(decode(codes[name], kind)).all() for name in SHAPES)
