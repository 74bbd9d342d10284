"""The keys that recipes share: columns and weights in every form, sources of data, names of policies."""

import argparse
from dataclasses import asdict

import pytest

from rewarded_lines.config import DataSpec
from rewarded_lines.errors import UserError
from rewarded_lines.training.arguments import parse_recipe
from rewarded_lines.training.recipe_options import (
    DataOptions,
    KeyValues,
    RewardOptions,
    RunOptions,
    SamplingOptions,
    Weights,
)


@pytest.mark.parametrize(
    "content",
    [
        "prompt=post, completion = best.text ,",
        '{"prompt": "post", "completion": "best.text"}',
        {"prompt": "post", "completion": "best.text"},
        [("prompt", "post"), ("completion", "best.text")],
    ],
)
def test_columns_come_as_pairs_as_json_or_as_a_mapping(content):
    assert KeyValues(content) == {"prompt": "post", "completion": "best.text"}


def test_only_the_first_sign_of_equality_counts():
    assert KeyValues("prompt=a=b") == {"prompt": "a=b"} and KeyValues("") == KeyValues() == {}


@pytest.mark.parametrize("text", ["prompt", "a=b,c", "=b", '{"a": ', '{"a"}'])
def test_texts_of_another_form_are_refused(text):
    for kind in (KeyValues, Weights):
        with pytest.raises(argparse.ArgumentTypeError, match="not of the form key=value|not a mapping"):
            kind(text)


@pytest.mark.parametrize(
    "content", ["a=0.5,b=-1,c=1e-3", '{"a": 0.5, "b": -1, "c": "1e-3"}', {"a": 0.5, "b": -1, "c": 1e-3}]
)
def test_weights_are_numbers(content):
    weights = Weights(content)
    assert weights == {"a": 0.5, "b": -1.0, "c": 0.001} and {type(value) for value in weights.values()} == {float}
    assert Weights("lr=1e-5=0.5,b=1") == {"lr=1e-5": 0.5, "b": 1.0}


@pytest.mark.parametrize("content", ["a=high", "a=", '{"a": [1]}', '{"a": null}', {"a": "x"}, "a=nan", "a=inf"])
def test_weights_that_are_no_numbers_are_refused(content):
    with pytest.raises(argparse.ArgumentTypeError, match="helpful=0.5,brief=0.5"):
        Weights(content)


def test_a_record_of_options_has_plain_values():
    assert asdict(DataOptions(columns=KeyValues("a=b")))["columns"] == {"a": "b"}
    assert asdict(RewardOptions(rewards=Weights("a=1")))["rewards"] == {"a": 1.0}


def test_training_and_validation_data_are_files_or_splits_of_a_data_set():
    shared = {"columns": {"prompt": "post"}, "rows": "rows.py:made", "chat": True, "system": "Be brief."}
    shared["too_long"] = "leave_out"
    options = {
        "columns": KeyValues("prompt=post"),
        "row_function": "rows.py:made",
        "chat": True,
        "system_prompt": "Be brief.",
    }
    files = DataOptions(train_file="a.csv", validation_file="b.csv", train_limit=5, validation_limit=2, **options)
    assert files.train() == DataSpec(file="a.csv", limit=5, **shared)
    assert files.validation() == DataSpec(file="b.csv", split="test", limit=2, **shared)
    hub = DataOptions(dataset_name="a/b", dataset_config="c", dataset_revision="d", dataset_test_split="e", **options)
    place = {"dataset": "a/b", "subset": "c", "revision": "d", **shared}
    assert hub.train() == DataSpec(split="train", **place) and hub.validation() == DataSpec(split="e", **place)


def test_validation_data_may_be_missing_or_a_file_beside_a_data_set():
    assert DataOptions(train_file="a.csv").validation() is None
    mixed = DataOptions(dataset_name="a/b", validation_file="b.csv")
    assert (mixed.train().dataset, mixed.validation().file, mixed.validation().dataset) == ("a/b", "b.csv", None)
    # As tatsu-lab/alpaca, which has the split `train` alone.
    assert DataOptions(dataset_name="a/b", dataset_test_split=None).validation() is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "no training data"),
        ({"validation_file": "b.csv"}, "no training data"),
        ({"train_file": "a.csv", "dataset_name": "a/b"}, "two sources of training data"),
        ({"train_file": "a.csv", "train_limit": 0}, "limit"),
        ({"train_file": "a.csv", "columns": KeyValues({"prompt": 5})}, "columns"),
        ({"train_file": "a.csv", "system_prompt": "Be brief."}, "chat"),
    ],
)
def test_training_data_that_make_no_sense_are_a_users_mistake(options, said):
    with pytest.raises(UserError, match=said):
        DataOptions(**options).train()


@pytest.mark.parametrize(
    ("options", "weights", "name"),
    [
        ({"reward": "brief"}, {"brief": 1.0}, "brief"),
        ({"rewards": Weights("brief=1")}, {"brief": 1.0}, "brief"),
        ({"rewards": Weights("brief=0.25,kind=2")}, {"brief": 0.25, "kind": 2.0}, "0.25-brief+2-kind"),
        ({"rewards": Weights("brief=1"), "policy_name": "mine"}, {"brief": 1.0}, "mine"),
        ({"reward": "brief", "rewards": None}, {"brief": 1.0}, "brief"),
    ],
)
def test_a_policy_is_called_by_what_it_is_trained_for(options, weights, name):
    chosen = RewardOptions(**options)
    assert (chosen.weights(), chosen.name()) == (weights, name)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "no reward to train for"),
        ({"reward": "a", "rewards": Weights("b=1")}, "both given"),
        ({"rewards": Weights("a=0,b=0.0")}, "every reward has weight 0"),
    ],
)
def test_a_policy_needs_one_reward_or_one_sum(options, said):
    with pytest.raises(UserError, match=said) as caught:
        RewardOptions(**options).weights()
    assert "`rewards`" in str(caught.value) or "`rewards: {NAME: WEIGHT" in str(caught.value)


PARTS = (RunOptions, DataOptions, RewardOptions, SamplingOptions)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("columns: {prompt: post}\nrewards: {a: 0.5, b: 1}\n", []),
        ("", ["--columns", "prompt=post", "--rewards", "a=0.5,b=1"]),
        (
            "columns: {text: t}\nreward: c\nrewards: {c: 3}\n",
            ["--columns=prompt=post", '--rewards={"a": 0.5, "b": 1}', "--reward", "null"],
        ),
    ],
    ids=["file", "command line", "both"],
)
def test_columns_and_weights_are_read_from_the_file_and_the_command_line(tmp_path, text, words):
    (tmp_path / "recipe.yaml").write_text("train_file: a.csv\n" + text)
    _, data, rewards, _ = parse_recipe(PARTS, ["--config", str(tmp_path / "recipe.yaml"), *words])
    assert data.train().columns == {"prompt": "post"} and rewards.weights() == {"a": 0.5, "b": 1.0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rewards: {a: high}\n", "argument --rewards: weights are numbers"),
        ("rewards: [a, b]\n", "argument --rewards: 'a' is not of the form key=value"),
        ("columns: prompt\n", "argument --columns: 'prompt' is not of the form key=value"),
        ("sampling_engine: vlm\n", "invalid choice: 'vlm'"),
    ],
)
def test_values_of_another_kind_are_named_with_their_key(tmp_path, text, said):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        parse_recipe(PARTS, ["--config", str(tmp_path / "recipe.yaml")])


def test_nothing_in_the_file_is_nothing(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "train_file: a.csv\ncolumns: null\nrewards: null\nreward: a\neffective_batch_size: null\n"
    )
    run, data, rewards, _ = parse_recipe(PARTS, ["--config", str(tmp_path / "recipe.yaml")])
    assert data.train().columns == {} and rewards.weights() == {"a": 1.0} and run.effective_batch_size is None


@pytest.mark.parametrize("words", [["--columns=prompt=null"], ["--columns", "prompt=null"]])
def test_a_column_may_be_called_null(words):
    _, data, *_ = parse_recipe(PARTS, ["--train_file", "a.csv", *words])
    assert data.train().columns == {"prompt": "null"}


def test_a_run_without_a_project_is_refused():
    with pytest.raises(UserError, match="needs a project file(.|\n)*leave the key out for rewarded-lines.yaml"):
        parse_recipe((RunOptions,), ["--project_file", "null"], "")
