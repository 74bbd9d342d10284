"""A merge repeated from its record, through the command line."""

import json
import shutil

import pytest

from rewarded_lines.merger.merge import replay


def again(cli, *more):
    return cli("merge", "--from", "out/merge.json", "--out", "again", *more)


@pytest.fixture
def merged(cli, tiny):
    """The tiny project with a merge in `out` that sets every field of a record."""
    settings = ["--method", "dare-ties", "--density", "0.5", "--seed", "3", "--alpha", "auto", "--outside", "depth"]
    answer = cli("merge", "--lam", "0.3", *settings, "--max-shard-size", "150KB", "--out", "out")
    assert answer.code == 0, answer.err
    return tiny


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("model*")}


def test_the_same_bits(cli, merged):
    assert again(cli).code == 0
    assert weights(merged / "again") == weights(merged / "out")
    first, second = (json.loads((merged / name / "merge.json").read_text()) for name in ("out", "again"))
    assert {**first, "command": 0} == {**second, "command": 0}
    # And again from the repeated merge.
    assert cli("merge", "--from", "again", "--out", "third").code == 0
    assert weights(merged / "third") == weights(merged / "out")


def test_inputs_that_changed_are_refused(cli, merged):
    file = merged / "second/model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    answer = again(cli)
    assert answer.code == 1 and "policy `second` has changed since: model.safetensors" in answer.err
    assert not (merged / "again").exists()


def test_a_config_or_tokenizer_that_changed_is_refused(cli, merged):
    for name in ("config.json", "tokenizer.json"):
        path = merged / "sft" / name
        text = path.read_text()
        path.write_text(text + " ")
        assert f"base has changed since: {name}" in again(cli).err
        path.write_text(text)
    assert again(cli).code == 0


def test_without_a_name_it_stands_beside_the_record(cli, merged):
    assert cli("merge", "--from", "out").code == 0
    assert weights(merged / "out-again") == weights(merged / "out")


def test_a_tilde_does_not_hide_an_input(cli, merged, monkeypatch):
    monkeypatch.setenv("HOME", str(merged))
    answer = cli("merge", "--from", "out", "--policy", "first=~/first", "--out", "~/first", "--overwrite")
    assert answer.code == 1 and "in, on or around an input" in answer.err


def test_inputs_that_moved_are_named(cli, merged):
    shutil.move(merged / "first", merged / "elsewhere")
    assert "first: no such folder" in again(cli).err
    assert again(cli, "--policy", "first=elsewhere").code == 0
    assert weights(merged / "again") == weights(merged / "out")
    assert "has changed since" in again(cli, "--policy", "first=second", "--overwrite").err


@pytest.mark.parametrize("option", [("--lam", "0.4"), ("--beta", "1"), ("--dtype", "auto"), ("--dry-run",)])
def test_what_would_say_otherwise_is_refused(cli, merged, option):
    answer = again(cli, *option)
    assert answer.code == 1 and f"{option[0]}: --from names a file that decides this" in answer.err


@pytest.mark.parametrize("argument", [{"alpha": 0.5}, {"dtype": "float32"}, {"dry_run": True}])
def test_python_refuses_what_would_say_otherwise(merged, argument):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(argument))}'"):
        replay("out", out="again", **argument)
    assert not (merged / "again").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.pop("alpha"), "merge.json: alpha: no valid merge.json"),
        (lambda r: r.update(alpha="1"), "merge.json: alpha: no valid"),
        (lambda r: r.update(alpha=None), "neither α and β nor a schedule"),
        (lambda r: r.update(outside="inside"), "merge.json: outside"),
        (lambda r: r.update(weights={"first": 1.0}), "weights and policies have different names"),
        (lambda r: r.update(method="tie"), "did you mean `ties`"),
        (lambda r: r["options"].update(density=2), "--density: out of range"),
        (lambda r: r.update(max_shard_size="much"), "not a size"),
        (lambda r: r["base"].update(path="nowhere"), "nowhere: no such folder"),
    ],
)
def test_a_record_that_is_none(cli, merged, change, said):
    record = json.loads((merged / "out/merge.json").read_text())
    change(record)
    (merged / "out/merge.json").write_text(json.dumps(record))
    answer = again(cli)
    assert answer.code == 1 and said in answer.err and "Traceback" not in answer.err
    assert not (merged / "again").exists()


def test_no_record(cli, tiny):
    assert "nowhere: no such file" in cli("merge", "--from", "nowhere").err
    assert "sft/merge.json: no such file" in cli("merge", "--from", "sft").err
