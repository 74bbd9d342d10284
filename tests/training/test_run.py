"""What a training run leaves: all of it or nothing, with the record of how it was made."""

import json
from dataclasses import dataclass

import pytest
import torch
from rewarded_lines.training.output import training_output
from safetensors.torch import save_file

from rewarded_lines.checkpoints.hashing import file_hash, weights_hash
from rewarded_lines.errors import UserError


@dataclass
class Training:
    output_dir: str | None
    learning_rate: float = 0.1


def test_the_record_names_the_base_by_its_weights(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    save_file({"w": torch.arange(4.0)}, base / "model.safetensors")
    training = Training(str(tmp_path / "policy"))
    with training_output(training, "ppo", overwrite=False) as output:
        assert training.output_dir == str(output.folder) and not (tmp_path / "policy").exists()
        output.record({"training": training}, {"after": 2.0}, base=str(base), reward="brief", seed=3)
    record = json.loads((tmp_path / "policy" / "training.json").read_text())
    assert record["base_hash"] == weights_hash(base)
    assert (record["recipe"], record["reward"], record["seed"]) == ("ppo", "brief", 3)
    assert record["metrics"] == {"after": 2.0} and record["config"]["training"]["learning_rate"] == 0.1
    assert record["config"]["training"]["output_dir"] == training.output_dir == str(tmp_path / "policy")


def test_a_run_that_fails_leaves_nothing(tmp_path):
    training = Training(str(tmp_path / "policy"))
    with pytest.raises(RuntimeError), training_output(training, "sft", overwrite=False) as output:
        (output.folder / "half").write_text("")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_kept_unless_told_otherwise(tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "old").write_text("")
    training = Training(str(tmp_path / "policy"))
    with (
        pytest.raises(UserError, match="--overwrite true"),
        training_output(training, "sft", overwrite=False),
    ):
        pass
    with training_output(training, "sft", overwrite=True) as output:
        (output.folder / "new").write_text("")
    assert [path.name for path in (tmp_path / "policy").iterdir()] == ["new"]


def test_an_output_must_be_named():
    with (
        pytest.raises(UserError, match="--output_dir"),
        training_output(Training(None), "sft", overwrite=False),
    ):
        pass


def test_the_hash_of_weights_depends_on_names_and_content_only(tmp_path):
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        save_file({"w": torch.ones(2) * (folder == "c")}, tmp_path / folder / "model.safetensors")
    (tmp_path / "b" / "config.json").write_text("{}")
    assert weights_hash(tmp_path / "a") == weights_hash(tmp_path / "b") != weights_hash(tmp_path / "c")
    assert len(file_hash(tmp_path / "b" / "config.json")) == 64
    with pytest.raises(UserError, match="no weights"):
        weights_hash(tmp_path)
