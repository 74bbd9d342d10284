"""Recipes' arguments: YAML first, then the command line, and no typo survives."""

from dataclasses import dataclass, field

import pytest

from rewarded_lines.errors import UserError
from rewarded_lines.training.arguments import parse_recipe, run_recipe


@dataclass
class Mine:
    train_file: str
    rate: float = 0.1
    names: list[str] = field(default_factory=list)
    model: str | None = "gpt2"
    overwrite: bool = False


@dataclass
class Trainer:
    output_dir: str | None = None
    packing: bool = True


def parse(tmp_path, text, *argv):
    (tmp_path / "recipe.yaml").write_text(text)
    return parse_recipe((Mine, Trainer), ["--config", str(tmp_path / "recipe.yaml"), *argv])


def test_the_command_line_overrides_the_file(tmp_path):
    mine, trainer = parse(
        tmp_path,
        "train_file: a.jsonl\nrate: 1e-3\nnames: [x, y]\nmodel: null\npacking: false\n",
        "--output_dir=out",
        "--train_file",
        "b.jsonl",
    )
    assert mine == Mine("b.jsonl", 0.001, ["x", "y"], None)
    assert trainer == Trainer("out", False)


def test_switches_take_values(tmp_path):
    mine, trainer = parse(tmp_path, "train_file: a\n", "--overwrite", "true", "--no_packing")
    assert mine.overwrite and not trainer.packing


def test_every_unknown_key_is_named_with_the_nearest_known_one(tmp_path):
    with pytest.raises(UserError) as caught:
        parse(tmp_path, "train_file: a\nouput_dir: b\nzzz: 1\n", "--pakcing", "true")
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert "recipe.yaml: unknown key `ouput_dir`" in text and "did you mean `output_dir`?" in text
    assert "command line: unknown key `pakcing`" in text and "did you mean `packing`?" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate: 1\n", "train_file"),
        ("train_file: a\nrate: fast\n", "invalid float value: 'fast'"),
        ("train_file: a\nrate: [1, 2]\n", "values that belong to no key"),
    ],
)
def test_missing_and_wrong_values_are_user_errors(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        parse(tmp_path, text)


def test_a_missing_config_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        parse_recipe((Mine, Trainer), ["--config", str(tmp_path / "none.yaml")])


def test_a_user_error_ends_the_program_with_its_text(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["recipe.py", "--nope"])
    with pytest.raises(SystemExit) as caught:
        run_recipe(lambda argv: parse_recipe((Mine, Trainer), argv))
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("command line: unknown key `nope`")
