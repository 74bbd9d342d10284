"""The same bits at the endpoints of every method, and for any order of policies, threads, shards and other outputs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from exact import BFLOAT16, FLOAT16, FLOAT32, decode, encode
from hostile import SHAPES, Family, load_codes, save_codes
from method_params import RL, methods

from rewarded_lines import merge
from rewarded_lines.kernels import thread_pool as pool

pytestmark = pytest.mark.usefixtures("short_blocks")

MIXED = (BFLOAT16, FLOAT32, BFLOAT16, FLOAT16, FLOAT32)
# Every method, with options under which a single policy keeps all its values.
WHOLE = {
    "soup": {},
    "task-arithmetic": {},
    "slerp": {},
    "ties": {"density": 1.0, "join": "mean"},
    "dare": {"density": 1.0},
    "dare-ties": {"density": 1.0, "join": "sum"},
    "consensus": {"agree": 0},
    "sum": {},
    "ram": {},
    "ram-plus": {},
    "sce": {"select": 1.0},
    "della": {"density": 1.0},
    "breadcrumbs": {"density": 1.0, "join": "mean"},
}
# Every method, with options under which its rule changes values.
BUSY = {
    "soup": {},
    "task-arithmetic": {},
    "uniform": {},
    "greedy": {},
    "slerp": {},
    "ties": {"density": 0.5, "scope": "model", "join": "mean"},
    "dare": {"density": 0.4, "seed": 3},
    "dare-ties": {"density": 0.6, "seed": 3, "join": "mean"},
    "consensus": {"tall": 0.4, "agree": 2},
    "sum": {},
    "ram": {"changed": 0.004},
    "ram-plus": {"changed": 0.004, "boost": 0.7, "cap": 3.0},
    "sce": {"select": 0.4},
    "della": {"density": 0.6, "window": 0.4, "seed": 3},
    "breadcrumbs": {"density": 0.5, "outliers": 0.1, "join": "mean"},
}
ENDS = [(1.0, 0.0), (0.0, 1.0)]
WEIGHTS = {2: (0.3, 0.7), 3: (0.2, 0.3, 0.5), 4: (0.1, 0.4, 0.2, 0.3)}


def written(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def same(folder, codes):
    """True if a checkpoint has these bit patterns."""
    found, _ = load_codes(folder)
    return all(np.array_equal(found[name], codes[name]) for name in SHAPES)


def widened(codes, source, target):
    return {name: encode(decode(value.ravel(), source), target).reshape(value.shape) for name, value in codes.items()}


def busy(family, method, out, weights=None, policies=None, **more):
    """Merge by a method of `BUSY`; return the bytes if they are in one file."""
    policies = policies or family.policies
    lam = None if method in ("uniform", "greedy") else weights or WEIGHTS[len(policies)]
    score = (lambda folder: 1.0) if method == "greedy" else None
    common = {"method": method, "options": BUSY[method], "alpha": 0.3, "beta": 0.9, "score": score, **more}
    (result,) = merge(family.base, policies, lam, out=out, overwrite=True, **common)
    return b"" if "max_shard_size" in more else written(result.out)


# ---- ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [BFLOAT16, pytest.param(FLOAT16, marks=pytest.mark.slow), FLOAT32],
    ids=lambda kind: kind.name,
)
@pytest.mark.parametrize("method", methods(WHOLE))
def test_alone_with_weight_one_a_policy_comes_out_bit_for_bit(method, kind, families, tmp_path):
    family = families((kind,) * 3)
    given = {"method": method, "options": WHOLE[method], "beta": 0}
    first, second = merge(family.base, family.policies, ENDS, out=tmp_path, **given)
    assert same(first.out, family.codes[1]) and same(second.out, family.codes[2])


@pytest.mark.parametrize("method", methods(method for method in WHOLE if method != "slerp"))
def test_the_same_among_three(method, families, tmp_path):
    family = families((FLOAT32,) * 4)
    given = {"method": method, "options": WHOLE[method], "beta": 0}
    (result,) = merge(family.base, family.policies, (0.0, 1.0, 0.0), out=tmp_path / "out", **given)
    assert same(result.out, family.codes[2])


@pytest.mark.parametrize(
    ("method", "lam", "options"),
    [
        ("soup", None, {}),
        ("wise-ft", 1.0, {}),
        ("uniform", None, {}),
        ("greedy", None, {}),
        ("consensus", None, {"agree": 1}),
    ],
)
def test_a_policy_on_its_own(method, lam, options, families, tmp_path):
    family = families((BFLOAT16,) * 2)
    given = {"method": method, "options": options, "score": (lambda folder: 0.0) if method == "greedy" else None}
    (result,) = merge(family.base, family.policies, lam, beta=0, out=tmp_path / "out", **given)
    assert same(result.out, family.codes[1])


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.3, 0.35, 0.7, 0.9])
def test_the_last_block_of_single_task_lines_is_the_policys(alpha, families, tmp_path):
    """With β = 1 − α the scale of the last block is exactly 1."""
    family = families((FLOAT32,) * 2)
    (result,) = merge(family.base, family.policies, 1.0, alpha=alpha, beta=1 - alpha, out=tmp_path / "out")
    found, _ = load_codes(result.out)
    name = "model.layers.3.mlp.up_proj.weight"
    assert np.array_equal(found[name], family.codes[1][name])
    if alpha == 0:
        assert np.array_equal(found["lm_head.weight"], family.codes[0]["lm_head.weight"])


@pytest.mark.parametrize("method", methods([*WHOLE, "wise-ft"]))
def test_no_weight_or_no_scale_gives_the_base_bit_for_bit(method, families, tmp_path):
    family = families((FLOAT32,) * (2 if method == "wise-ft" else 3))
    nothing = (0.0,) * len(family.policies)
    given = {"method": method, "options": WHOLE.get(method, {}), "extrapolate": True}
    (result,) = merge(family.base, family.policies, nothing, out=tmp_path / "weight", **given)
    assert same(result.out, family.codes[0])
    (result,) = merge(family.base, family.policies, alpha=0, beta=0, out=tmp_path / "scale", **given)
    assert same(result.out, family.codes[0])


def test_ends_of_mixed_types_and_casts(families, tmp_path):
    family = families((BFLOAT16, FLOAT32, BFLOAT16))
    first, second = merge(family.base, family.policies, ENDS, beta=0, out=tmp_path / "wide")
    assert same(first.out, family.codes[1]) and same(second.out, widened(family.codes[2], BFLOAT16, FLOAT32))
    first, second = merge(family.base, family.policies, ENDS, beta=0, dtype="bfloat16", out=tmp_path / "narrow")
    assert same(first.out, widened(family.codes[1], FLOAT32, BFLOAT16)) and same(second.out, family.codes[2])


# ---- order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("method", methods(BUSY))
def test_policies_may_change_places(method, count, families, tmp_path):
    if method == "slerp" and count != 2:
        return
    family = families(MIXED[: count + 1])
    names, paths, weights = list(family.policies), list(family.policies.values()), WEIGHTS[count]
    expected = busy(family, method, tmp_path / "out")
    orders = list(itertools.permutations(range(count)))
    for order in orders[1 :: max(1, len(orders) // 5)]:
        turned = tuple(weights[i] for i in order)
        along = {names[i]: paths[i] for i in order}
        assert busy(family, method, tmp_path / "out", turned, along) == expected, order
    renamed = {name: paths[i] for name, i in zip(names, order, strict=True)}
    assert busy(family, method, tmp_path / "out", turned, renamed) == expected


@pytest.mark.parametrize("method", methods(method for method in BUSY if method != "slerp"))
def test_twins_with_different_weights_may_change_places(method, families, tmp_path):
    """Two policies from the same file differ only in their weights."""
    family = families((FLOAT32,) * 3)
    first, second = family.policies.values()
    expected = busy(family, method, tmp_path / "out", (0.2, 0.3, 0.5), {"a": first, "b": first, "c": second})
    for weights, order in (((0.3, 0.2, 0.5), "112"), ((0.5, 0.3, 0.2), "211"), ((0.2, 0.5, 0.3), "121")):
        policies = {name: first if which == "1" else second for name, which in zip("abc", order, strict=True)}
        assert busy(family, method, tmp_path / "out", weights, policies) == expected, order


def test_alpha_is_chosen_alike_in_any_order(families, tmp_path):
    family = families((FLOAT32,) * 4)
    turned = dict(reversed(family.policies.items()))
    for method in ("soup", "ties", "dare", "consensus"):
        given = {"alpha": "auto", "method": method, "options": BUSY[method], "out": tmp_path / "out", "dry_run": True}
        (first,) = merge(family.base, family.policies, (0.2, 0.3, 0.5), **given)
        (second,) = merge(family.base, turned, (0.5, 0.3, 0.2), **given)
        assert first.spec.alpha == second.spec.alpha


# ---- threads, shards, company -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", methods(BUSY))
def test_threads_do_not_matter(method, families, tmp_path, monkeypatch):
    family = families(MIXED[: 3 if method == "slerp" else 4])
    found = []
    for cores in (1, 2, 4, 2):
        monkeypatch.setattr(pool, "cores", lambda cores=cores: cores)
        found.append(busy(family, method, tmp_path / "out", alpha="auto"))
    assert len(set(found)) == 1


@pytest.fixture(scope="module")
def sharded(families, tmp_path_factory):
    """The mixed family, with each checkpoint in a different number of files."""
    family, folder = families(MIXED[:4]), tmp_path_factory.mktemp("sharded")
    for row, (codes, kind) in enumerate(zip(family.codes, family.formats, strict=True)):
        name = f"p{row}" if row else "base"
        save_codes(folder / name, codes, kind, base=folder / "base" if row else None, shards=(3, 1, 2, 5)[row])
    return Family(folder, family.formats, family.codes)


@pytest.mark.parametrize("method", methods(BUSY))
def test_shards_do_not_matter(method, families, sharded, tmp_path):
    whole = families(MIXED[:4])
    if method == "slerp":
        whole, cut = (Family(f.folder, f.formats[:3], f.codes[:3]) for f in (whole, sharded))
    else:
        cut = sharded
    busy(whole, method, tmp_path / "whole")
    busy(cut, method, tmp_path / "cut", max_shard_size="3KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 3
    assert same(tmp_path / "cut", load_codes(tmp_path / "whole")[0])


@pytest.mark.parametrize("method", methods(method for method in BUSY if method not in ("uniform", "greedy")))
def test_company_does_not_matter(method, families, tmp_path):
    """Several λ at once, with the endpoints among them, and each λ alone."""
    family = families((FLOAT32,) * 3)
    several = [(1.0, 0.0), (0.3, 0.7), (0.5, 0.5), (0.0, 1.0)]
    common = {"method": method, "options": BUSY[method], "alpha": 0.3, "beta": 0.9}
    for result in merge(family.base, family.policies, several, out=tmp_path / "many", **common):
        assert written(result.out) == busy(family, method, tmp_path / "one", result.spec.weights)


@pytest.mark.parametrize("method", RL)
def test_the_methods_for_rl_depend_on_nothing_else(method, families, sharded, tmp_path, monkeypatch):
    """Order, threads, shards and other outputs at once, and both ends."""
    family, weights = families(MIXED[:4]), (0.2, 0.3, 0.5)
    busy(family, method, tmp_path / "whole", weights)
    monkeypatch.setattr(pool, "cores", lambda: 3)
    turned = {name: sharded.policies[name] for name in ("p3", "p1", "p2")}
    common = {"method": method, "options": BUSY[method], "alpha": 0.3, "beta": 0.9}
    several = [(0.5, 0.2, 0.3), (0.6, 0.4, 0.0), (0.0, 0.0, 1.0)]
    first, *_ = merge(sharded.base, turned, several, out=tmp_path / "several", **common)
    assert same(first.out, load_codes(tmp_path / "whole")[0])
    whole = {"method": method, "options": WHOLE[method], "beta": 0}
    family = families((BFLOAT16,) * 3)
    one, other = merge(family.base, family.policies, ENDS, out=tmp_path / "ends", **whole)
    assert same(one.out, family.codes[1]) and same(other.out, family.codes[2])
