"""Folders without weights that can be read: what the error says, and that what it says works."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as distributed
from safetensors.torch import load_file
from tiny_adapters import save_adapter
from transformers import LlamaForSequenceClassification

from rewarded_lines import merge
from rewarded_lines.errors import UserError


def refused(folder, *files):
    for file in files:
        Path(folder, file).parent.mkdir(parents=True, exist_ok=True)
        Path(folder, file).write_text("x")
    with pytest.raises(UserError) as caught:
        merge("sft", [folder], 1, out="out")
    return str(caught.value)


def test_folders_within(tiny):
    for step in (90, 500, 1000, 1500):
        Path(f"run/checkpoint-{step}").mkdir(parents=True)
        Path(f"run/checkpoint-{step}/model.safetensors").write_text("x")
    said = refused("run", "training_args.bin")
    assert "give the folder with the weights: run/checkpoint-500 or run/checkpoint-1000 or run/checkpoint-1500" in said


def test_a_folder_of_the_hubs_cache(tiny):
    save_adapter(tiny / "sft", tiny / "one", 1)
    Path("models--org--sft/snapshots").mkdir(parents=True)
    Path("sft").rename("models--org--sft/snapshots/0a1b")
    for policy in ("one", "first"):
        with pytest.raises(UserError, match="give the folder with the weights: models--org--sft/snapshots/0a1b"):
            merge("models--org--sft", [policy], 1, out="out")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["model-00001-of-00002.safetensors"], "copy model.safetensors.index.json there"),
        (["zero_to_fp32.py", "global_step9/zero_pp_rank_0.pt"], "some/zero_to_fp32.py some some-joined --safe_ser"),
        (["model-Q4_K_M.gguf"], "GGUF is for inference"),
        (["onnx/model.onnx"], "ONNX is for inference"),
        (["openvino_model.xml", "openvino_model.bin"], "OpenVINO is for inference"),
        (["pytorch_model.bin", "training_args.bin"], "got: pytorch_model.bin\n(?s:.)*from_pretrained"),
        (["model_world_size_2_rank_0.pt"], "convert it with the tool that wrote it"),
        (["training_args.bin", "optimizer.pt", "rng_state_0.pth", "scheduler.pt"], "no weights there"),
    ],
)
def test_what_lies_there_instead(tiny, files, said):
    found = refused("some", *files)
    assert pytest.raises(UserError, merge, "sft", ["some"], 1, out="out").match(said), found


def test_a_file_for_inference(tiny):
    Path("model-Q4_K_M.gguf").write_text("x")
    with pytest.raises(UserError, match=r"is a file\n(?s:.)*GGUF is for inference"):
        merge("sft", ["model-Q4_K_M.gguf"], 1, out="out")


def test_pickled_weights_are_converted_by_their_own_class(tiny):
    """A reward model loaded as a causal one would lose its head without a word."""
    model = LlamaForSequenceClassification.from_pretrained("sft", num_labels=1)
    model.config.architectures = ["LlamaForSequenceClassification"]
    for name in ("base", "one"):
        model.config.save_pretrained(name)
        torch.save(model.state_dict(), f"{name}/pytorch_model.bin")
        said = refused(name)
        (command,) = shlex.split(said.partition("convert it by python -c ")[2].partition("; and copy")[0])
        exec(compile(command, "remedy", "exec"), {})  # noqa: S102
    merge("base-safetensors", ["one-safetensors"], 1, out="merged", beta=0)
    assert load_file("merged/model.safetensors")["score.weight"].equal(model.score.weight)
    (tiny / "lora").mkdir()
    Path("lora/adapter_config.json").write_text('{"peft_type": "LORA", "task_type": "SEQ_CLS"}')
    assert "AutoPeftModelForSequenceClassification" in refused("lora", "adapter_model.bin")


@pytest.mark.slow
def test_shards_of_fsdp_are_joined_as_the_error_says(tiny):
    Path("sharded").mkdir()
    state = load_file("first/model.safetensors")
    distributed.save({"model": state}, checkpoint_id="sharded/pytorch_model_fsdp_0", no_dist=True)
    said = refused("sharded", "training_args.bin")
    command = said.partition("accelerate merge-weights ")[2].partition(";")[0].split()
    subprocess.run([Path(sys.executable).parent / "accelerate", "merge-weights", *command], check=True)
    Path(command[1], "config.json").write_bytes(Path("first/config.json").read_bytes())
    merge("sft", [command[1]], 1, out="out")
    merge("sft", ["first"], 1, out="same")
    found, same = (load_file(f"{name}/model.safetensors") for name in ("out", "same"))
    assert all(found[name].equal(value) for name, value in same.items())
