"""Mistakes of users: one clear message, exit code 1, nothing written, no input touched."""

import errno
import os
import shutil
import subprocess
import sys

import pytest
from command import COMMAND, ENVIRONMENT
from tiny_models import make_model, save_model, snapshot


@pytest.fixture
def refused(cli, tiny):
    """Run a command that must be refused; return its message."""

    def run(*args):
        before = snapshot(tiny)
        answer = cli(*args)
        after = snapshot(tiny)
        assert answer.code == 1, answer
        assert answer.out == ""
        assert "Traceback" not in answer.err
        assert {name: content for name, content in after.items() if not name.endswith(".lock")} == before
        return answer.err

    return run


def merge_args(*more, first="first", second="second"):
    return ("merge", "--base", "sft", "--policy", first, "--policy", second, "--out", "out", *more)


def test_a_folder_that_does_not_exist(refused):
    said = refused(*merge_args(first="nowhere", second="./not/there"))
    assert "nowhere: no such folder" in said and "not/there: no such folder" in said


def test_a_path_that_is_mistyped_is_not_asked_of_the_hub(refused, tiny):
    (tiny / "policies").mkdir()
    assert "policies/typo: no such folder" in refused(*merge_args(first="policies/typo"))


def test_an_empty_folder(refused, tiny):
    (tiny / "empty").mkdir()
    said = refused(*merge_args(first="empty"))
    assert "empty: no weights there" in said and "an empty folder" in said


def test_lambda_outside_the_simplex(refused):
    said = refused(*merge_args("--lam", "1.5"))
    assert "--lam 1.5: a weight lies outside 0 to 1" in said and "--extrapolate" in said


def test_three_lambdas_for_two_policies(refused):
    assert "3 weights for 2 policies" in refused(*merge_args("--lam", "0.2,0.3,0.5"))


def test_policies_from_different_bases(refused, tiny):
    save_model(make_model(7), tiny / "stranger")
    said = refused(*merge_args(second="stranger"))
    assert "policy `stranger`" in said and "nothing to do with the base" in said


@pytest.mark.parametrize("damage", [lambda raw: raw[:-100], lambda raw: raw[:60], lambda raw: b""])
def test_a_truncated_file(refused, tiny, damage):
    file = tiny / "second/model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    said = refused(*merge_args())
    assert "second/model.safetensors: the file is damaged or cut short" in said


@pytest.mark.parametrize("byte", [0, 3, 7, 8, 40])
def test_a_flipped_bit_in_the_header(refused, tiny, byte):
    file = tiny / "second/model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[byte] ^= 0x40
    file.write_bytes(raw)
    assert "damaged" in refused(*merge_args()) or "tensors" in refused(*merge_args())


def test_a_flipped_bit_in_a_tensors_name(refused, tiny):
    file = tiny / "second/model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"model.norm.weight", b"model.norm.weighu"))
    said = refused(*merge_args())
    assert "tensors of the base are missing" in said and "model.norm.weighu" in said


def test_pickled_weights(refused, tiny):
    shutil.copytree(tiny / "first", tiny / "pickled")
    (tiny / "pickled/model.safetensors").rename(tiny / "pickled/pytorch_model.bin")
    said = refused(*merge_args(first="pickled"))
    assert "pickled weights are never opened" in said and "save_pretrained" in said


def test_an_output_folder_that_exists(refused, tiny):
    (tiny / "out").mkdir()
    (tiny / "out/mine.txt").write_text("keep")
    assert "out: the output folder exists" in refused(*merge_args())


@pytest.mark.parametrize(
    ("line", "key", "alike"),
    [
        ("  max_tokens: 12", "max_tokenz", "max_tokens"),
        ("    unit: words", "units", "unit"),
        ("  points: 3", "point", "points"),
        ("title: tiny", "titel", "title"),
    ],
)
@pytest.mark.parametrize("command", ["merge", "sweep"])
def test_an_unknown_key_names_the_nearest(refused, tiny, command, line, key, alike):
    path = tiny / "rewarded-lines.yaml"
    path.write_text(path.read_text().replace(line, line.replace(alike, key)))
    said = refused(command)
    assert f"unknown key `{key}`" in said and f"did you mean `{alike}`?" in said


def test_a_project_file_that_is_not_there(refused):
    assert "nowhere.yaml: no such file" in refused("sweep", "--config", "nowhere.yaml")


@pytest.mark.parametrize(
    ("source", "said_too"),
    [
        ("def other(prompts, responses):\n    return [0.0] * len(prompts)\n", ["no function `words`", "other"]),
        ("import absent_module\n", ["ModuleNotFoundError"]),
    ],
)
def test_a_reward_function_that_does_not_exist(refused, tiny, source, said_too):
    (tiny / "rewards.py").write_text(source)
    said = refused("sweep", "--engine", "hf")
    assert all(part in said for part in ["reward `words`", *said_too])


LETTERS = "\n\ndef letters(prompts, responses):\n    return [0.0] * len(prompts)\n"


@pytest.mark.parametrize(
    ("body", "said_too"),
    [
        ("    return [len(r) / (p != 'a film') for p, r in zip(prompts, responses)]", "prompt 1: 'a film'"),
        ("    return [float('nan') if p == 'dog' else 1.0 for p in prompts]", "prompt 3: 'dog'"),
        ("    return [1.0] * 4", "one for each prompt"),
    ],
)
def test_a_reward_function_that_fails_names_the_prompt(cli, tiny, body, said_too):
    (tiny / "rewards.py").write_text(f"def words(prompts, responses):\n{body}\n{LETTERS}")
    answer = cli("sweep", "--engine", "hf")
    assert answer.code == 1 and "Traceback" not in answer.err
    assert "reward `words`" in answer.err and said_too in answer.err
    assert not (tiny / "sweep/points").exists()


def test_vllm_not_installed(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    said = refused("sweep")
    assert "--engine vllm: vllm not installed" in said and "--engine hf" in said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--method", "tyes"), "unknown value `tyes`"),
        (("--dtype", "float8"), "unknown value `float8`"),
        (("--device", "gpu"), "not a device"),
        (("--device", "meta"), "not a device for merges"),
        (("--device", "cuda:7"), "no GPU that torch can use"),
        (("--alpha", "nan"), "--alpha: not a finite number"),
        (("--max-shard-size", "much"), "not a size"),
        (("--layers", "(("), "not a regular expression"),
        (("--policy", "first"), "two policies share a name"),
        (("--lam", "0.5", "--lam", "0.50"), "the same λ twice"),
    ],
)
def test_options_out_of_range(refused, args, said):
    assert said in refused(*merge_args(*args))


def test_an_input_spelt_with_a_tilde_is_still_an_input(refused, tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny))
    args = ("merge", "--base=~/sft", "--policy", "a=~/first", "--policy", "second", "--overwrite")
    assert "in, on or around an input" in refused(*args, "--out", tiny / "sft")
    assert "in, on or around an input" in refused(*args, "--out=~/first")


def test_an_output_below_a_file_is_the_systems_complaint_in_one_line(refused, tiny):
    said = refused(*merge_args()[:-1], "test.jsonl/out")
    assert "test.jsonl" in said and said.count("\n") == 1


def test_a_policy_that_only_the_working_directory_has_is_not_the_projects(cli, tiny):
    (tiny / "policies").mkdir()
    (tiny / "first").rename(tiny / "policies/first")
    (tiny / "elsewhere").mkdir()
    text = (tiny / "rewarded-lines.yaml").read_text().replace("first: first", "first: policies/first")
    (tiny / "elsewhere/rewarded-lines.yaml").write_text(text)
    answer = cli("merge", "--config", "elsewhere/rewarded-lines.yaml")
    assert answer.code == 1 and "elsewhere/policies/first: no such folder" in answer.err


def test_a_prompt_without_tokens(cli, tiny):
    (tiny / "test.jsonl").write_text('{"prompt": "a film"}\n{"prompt": ""}\n')
    answer = cli("sweep", "--engine", "hf")
    assert answer.code == 1 and "prompt 1: a prompt has no tokens" in answer.err


def test_report_of_something_else(refused):
    assert "sft: not a run folder" in refused("report", "sft")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--algo", "a2c"), "unknown value `a2c`"),
        (("--until", "never"), "unknown value `never`"),
        (("--out", "sft"), "holds something else"),
        (("--engine", "vlm"), "unknown engine"),
        (("--suite", "nowhere.yaml"), "no such file"),
        (("--corpus", "sft"), "sft/pairs-train.jsonl"),
        (("--suite", "rewarded-lines.yaml", "--out", "."), "input lies in its output"),
        (("--suite", "../own.yaml", "--out", "."), "rewarded-lines.yaml: the demo's input lies in its output"),
        (("--suite", "../far/own.yaml"), "not beside the suite, with which it is copied"),
    ],
)
def test_demo_settings(refused, tiny, args, said):
    (tiny.parent / "far").mkdir()
    text = (tiny / "rewarded-lines.yaml").read_text()
    (tiny.parent / "far/own.yaml").write_text(text.replace("rewards.py:", f"../{tiny.name}/rewards.py:"))
    (tiny.parent / "own.yaml").write_text(f"extends: {tiny.name}/rewarded-lines.yaml\n")
    assert said in refused("demo", *args)


def test_a_full_disk_is_told_with_where_to_look(cli, monkeypatch):
    def full(content):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr("rewarded_lines.cli.recipes_command.show_json", full)
    answer = cli("recipes", "--json")
    assert answer.code == 1 and "quota exceeded" in answer.err and "remedy: rewarded-lines doctor" in answer.err


def test_a_name_is_printed_as_it_is(cli):
    """rich would make a flame of `:fire:`."""
    assert "nowhere/a:fire:b.yaml" in cli("merge", "--config", "nowhere/a:fire:b.yaml").err


def test_closed_streams_lead_nowhere(tiny):
    """`nohup … >&-`: the command had no stdout, and the first file that it opened was in its place."""
    closed = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *COMMAND, "merge", "--lam", "0.5"]
    assert subprocess.run(closed, env=ENVIRONMENT, cwd=tiny).returncode == 0
    assert (tiny / "merged" / "lam=0.50" / "model.safetensors").is_file()


def test_a_project_file_with_another_ending_is_named(refused, tiny):
    (tiny / "rewarded-lines.yaml").rename(tiny / "rewarded-lines.yml")
    assert "did you mean `rewarded-lines.yml`?" in refused("merge", "--lam", "0.5")
