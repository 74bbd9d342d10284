"""NaN and infinity, in an input or only in the result: refused with tensor and count, unless allowed."""

import json
from pathlib import Path

import numpy as np
import pytest
from plain_checkpoints import SINGLE, check_formula, read_plain, save_family
from safetensors.numpy import save_file

ARGS = ("merge", "--base", "sft", "--policy", "first", "--policy", "second", "--out", "out")
NAMES = ["first", "second", "sft"]
# Of one dimension, so that values far from the base's are not taken for another base.
TENSOR = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A base and two policies in the working directory."""
    monkeypatch.chdir(save_family(tmp_path / "place"))
    return tmp_path / "place"


def poison(folder, *values, tensor=TENSOR):
    """Write values into a tensor of a checkpoint."""
    tensors = {name: np.array(array) for name, (_, array) in read_plain(folder).items()}
    tensors[tensor].flat[: len(values)] = values
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def refusal(answer):
    assert answer.code == 1 and answer.out == "" and "Traceback" not in answer.err
    assert sorted(path.name for path in Path().iterdir()) == NAMES
    return answer.err


METHODS = (
    *((), ("--beta", 0), ("--method", "ties"), ("--method", "dare"), ("--method", "slerp"), ("--method", "uniform")),
    *(("--method", "consensus"), ("--method", "dare-ties"), ("--method", "task-arithmetic")),
)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_in_an_input(cli, place, name, method):
    poison(place / name, np.nan, np.inf, -np.inf)
    said = refusal(cli(*ARGS, *method))
    where = "base" if name == "sft" else f"policy `{name}`"
    assert f"{TENSOR}: 3 values are not finite in {where}" in said and "--allow-nonfinite" in said
    assert said.count("not finite") == 1


@pytest.mark.parametrize(
    "how",
    [("--lam", 0), ("--lam", 0, "--beta", 0), ("--alpha", 0, "--beta", 0), ("--alpha", 0, "--beta", 0.0, "--lam", 1)],
    ids=str,
)
def test_in_a_policy_without_weight(cli, place, how):
    """The value is not in the result, but its input is faulty."""
    poison(place / "first", np.nan)
    assert f"{TENSOR}: 1 values are not finite in policy `first`" in refusal(cli(*ARGS, *how))


def test_in_every_input_and_in_many_tensors(cli, place):
    for name in NAMES:
        for tensor in read_plain(place / name):
            poison(place / name, np.nan, tensor=tensor)
    said = refusal(cli(*ARGS))
    assert said.count("1 values are not finite in") == 5 and "more tensors are not finite" in said


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_in_the_result_alone(cli, place, kind):
    """Each input fits its type, their extrapolation does not."""
    for name in NAMES:
        tensors = {key: values.astype(kind) for key, (_, values) in read_plain(place / name).items()}
        if name == "first":
            tensors[TENSOR].flat[:2] = np.finfo(kind).max * kind(0.9)
        (place / name / SINGLE).unlink()
        save_file(tensors, place / name / SINGLE)
    said = refusal(cli(*ARGS, "--lam", 1, "--alpha", 1, "--beta", 1))
    assert f"{TENSOR}: 2 values are not finite in the result" in said and "cannot hold them" in said


def test_cast_to_a_narrower_type(cli, place):
    poison(place / "first", 1e6)
    said = refusal(cli(*ARGS, "--dtype", "float16", "--lam", 1, "--beta", 0))
    assert f"{TENSOR}: 1 values are not finite in the result" in said and "--dtype float32" in said


def test_infinities_that_meet(cli, place):
    """Inf − Inf is NaN."""
    for name in NAMES:
        poison(place / name, np.inf)
    said = refusal(cli(*ARGS))
    assert all(f"1 values are not finite in {where}" in said for where in ("base", "policy `first`", "policy `second`"))


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("method", [*METHODS, ("--alpha", "auto")], ids=str)
def test_infinities_that_all_inputs_share_are_kept(cli, place, method):
    """Gemma 4 has bounds that are infinite; every other value is as if they were not."""
    for name in NAMES:
        poison(place / name, 0, 0)
    assert cli(*ARGS[:-1], "plain", *method).code == 0
    for name in NAMES:
        poison(place / name, np.inf, -np.inf)
    assert cli(*ARGS, "--allow-nonfinite", *method).code == 0
    poison(place / "plain", np.inf, -np.inf)
    plain, merged = read_plain(place / "plain"), read_plain(place / "out")
    # The random masks of DARE are drawn from a digest of the values.
    compared = [tensor for tensor in plain if tensor != TENSOR or "dare" not in str(method)]
    assert all(np.array_equal(plain[tensor][1], merged[tensor][1]) for tensor in compared)
    assert merged[TENSOR][1].flat[0] == np.inf and merged[TENSOR][1].flat[1] == -np.inf


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_let_pass_where_they_are_meant(cli, place):
    poison(place / "first", np.nan, np.inf)
    assert cli(*ARGS, "--allow-nonfinite", "--alpha", 1, "--beta", 0).code == 0
    merged = read_plain(place / "out")[TENSOR][1]
    assert np.isnan(merged[0]) and merged[1] == np.inf and np.isfinite(merged[2:]).all()
    # All other values are unchanged.
    poison(place / "first", 0, 0)
    poison(place / "out", *cleaned(place))
    check_formula(place / "out", place / "sft", [place / "first", place / "second"], [0.5, 0.5], 1, 0)


def cleaned(place):
    """Return the two values of a merge without NaN or infinity."""
    base, second = (read_plain(place / name)[TENSOR][1][:2].astype(float) for name in ("sft", "second"))
    return base + 0.5 * (0 - base) + 0.5 * (second - base)


def test_several_outputs_all_or_none(cli, place):
    """The merge is finite at λ = 0.1 and not at 0.9: neither is written."""
    for name in NAMES:
        tensors = {key: values.astype(np.float16) for key, (_, values) in read_plain(place / name).items()}
        if name == "first":
            tensors[TENSOR].flat[0] = 60_000
        save_file(tensors, place / name / SINGLE)
    two = ("--alpha", 1, "--beta", 1, "--lam", 0.1, "--lam", 0.9)
    assert f"{TENSOR}: 1 values are not finite in the result" in refusal(cli(*ARGS, *two))
    assert cli(*ARGS, *two, "--allow-nonfinite", "--json").code == 0
    record = json.loads((place / "out/lam=0.90/merge.json").read_text())
    assert record["weights"] == {"first": 0.9, "second": pytest.approx(0.1)}
