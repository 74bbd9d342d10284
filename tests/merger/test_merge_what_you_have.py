"""What docs/merge-what-you-have.md promises of each command: the values, by transformers and PEFT in float64."""

from __future__ import annotations

import json
import shlex
import warnings

import pytest
import torch
from documents import pages
from safetensors.torch import load_file
from tiny_models import TEXT
from trainer_outputs import BASE, STATE, save_everything

from rewarded_lines import merge

BLOCKS = 4
COMMANDS = [line for page in pages() if page.name == "docs/merge-what-you-have.md" for line in page.lines]


@pytest.fixture(scope="module")
def had(tmp_path_factory):
    """Everything that the page speaks of."""
    folder = tmp_path_factory.mktemp("had")
    save_everything(folder)
    return folder


def tensors(folder, base):
    """Return the tensors of a policy as transformers or PEFT loads it, an adapter folded in, in float64."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = (folder / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(base if adapter else folder, dtype=torch.float64)
    if adapter:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).merge_and_unload()
    return model.state_dict()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[-1])
def test_the_values_are_those_of_the_equation(command, had, cli, monkeypatch):
    monkeypatch.chdir(had)
    words = shlex.split(command)[1:]
    answer = cli(*words)
    assert answer.code == 0, answer.err
    out = had / words[-1]
    given = [word.partition("=")[2] for word in words if word.startswith(("helpful=", "brief="))]
    base, merged, *policies = (tensors(had / folder, had / BASE) for folder in (BASE, out, *given))
    assert len(policies) == 2
    assert merged.keys() == base.keys()
    changed = 0
    for name, value in base.items():
        scale = 1 + (int(name.split(".")[2]) / (BLOCKS - 1) if ".layers." in name else 0)
        step = scale * sum(policy[name] - value for policy in policies) / 2
        # Base and policies are bfloat16, and so is the merge.
        assert torch.allclose(merged[name], value + step, rtol=2.0**-8, atol=1e-6), name
        changed += bool(step.any())
    assert changed >= 4 * BLOCKS
    record = json.loads((out / "merge.json").read_text())
    assert set(record["weights"].values()) == {0.5}


def test_a_whole_merge_has_the_names_and_the_config_of_the_base(had, cli, monkeypatch):
    monkeypatch.chdir(had)
    whole = [command for command in COMMANDS if not (had / command.split()[-1] / "adapter_config.json").exists()]
    assert len(whole) >= 6
    for command in whole:
        out = had / command.split()[-1]
        if not out.exists():
            assert cli(*shlex.split(command)[1:]).code == 0
        merged, base = load_file(out / "model.safetensors"), load_file(had / BASE / "model.safetensors")
        assert set(base) - set(merged) <= {"lm_head.weight"} and not set(merged) - set(base)
        theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (had / BASE, out))
        theirs["dtype"] = theirs.pop("torch_dtype")
        assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_trl_leaves_what_is_imitated_here(lora, had, tmp_path):
    """The other tests make folders in the form of a trainer's; TRL's own have the same files and tensors, and merge."""
    pytest.importorskip("trl", reason="TRL is not installed in this environment")
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    imitated, run = had / ("trl/helpful-lora" if lora else "trl/helpful"), tmp_path / "run"
    settings = {"max_steps": 1, "save_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "seed": 1}
    trainer = SFTTrainer(
        model=str(had / BASE),
        args=SFTConfig(output_dir=str(run), per_device_train_batch_size=2, learning_rate=1e-2, **settings),
        train_dataset=Dataset.from_dict({"text": TEXT * 2}),
        processing_class=AutoTokenizer.from_pretrained(had / BASE),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )
    trainer.train()
    trainer.save_model()
    assert files(run) - {"README.md"} == files(imitated) - {"README.md"}
    assert files(run / "checkpoint-1") >= files(imitated) | set(STATE) - {"README.md"}
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    shapes = [{name: value.shape for name, value in load_file(folder / weights).items()} for folder in (run, imitated)]
    assert shapes[0] == shapes[1]
    for trained in (run, run / "checkpoint-1"):
        out = tmp_path / f"merged-{trained.name}"
        merge(had / BASE, {"trained": trained, "other": imitated}, 0.5, out=out)
        base, merged, one, two = (tensors(folder, had / BASE) for folder in (had / BASE, out, trained, imitated))
        name = "model.layers.3.mlp.up_proj.weight"
        assert not torch.equal(one[name], base[name])
        step = one[name] + two[name] - 2 * base[name]
        assert torch.allclose(merged[name], base[name] + step, rtol=2.0**-8, atol=1e-6)


def files(folder):
    """Return the names of the files of a folder."""
    return {path.name for path in folder.iterdir() if path.is_file()}
