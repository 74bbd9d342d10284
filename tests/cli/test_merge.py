"""`rewarded-lines merge` through the command line."""

import json


def test_a_project_needs_only_lambda(cli, tiny):
    answer = cli("merge", "--lam", "0.5")
    assert answer.code == 0 and "merged/lam=0.50" in answer.out
    assert json.loads((tiny / "merged/lam=0.50/merge.json").read_text())["weights"] == {"first": 0.5, "second": 0.5}


def test_json_is_clean_on_stdout(cli, tiny):
    answer = cli("merge", "--lam", "0.25", "--lam", "0.75", "--beta", "0", "--out", "soups", "--json")
    assert [row["out"] for row in json.loads(answer.out)] == ["soups/lam=0.25", "soups/lam=0.75"]


def test_dry_run(cli, tiny):
    answer = cli("merge", "--dry-run")
    assert answer.code == 0 and "nothing written" in answer.out and not (tiny / "merged").exists()


def test_named_policies_and_extrapolation(cli, tiny):
    args = ("--base", "sft", "--policy", "a=first", "--policy", "b=second", "--lam", "1.5,-0.5", "--extrapolate")
    assert cli("merge", *args, "--out", "out").code == 0
    assert json.loads((tiny / "out/merge.json").read_text())["weights"] == {"a": 1.5, "b": -0.5}


def test_weights_are_equal_by_default_for_any_number_of_policies(cli, tiny):
    three = [word for name in ("a=first", "b=second", "c=first") for word in ("--policy", name)]
    assert cli("merge", "--base", "sft", *three, "--out", "out").code == 0
    assert json.loads((tiny / "out/merge.json").read_text())["weights"] == dict.fromkeys("abc", 1 / 3)
    said = cli("merge", "--base", "sft", *three, "--lam", "0.4", "--method", "task-arithmetic").err
    assert "1 weights for 3 policies" in said and "leave it out for equal weights" in said
