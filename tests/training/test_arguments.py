"""Recipes' arguments: YAML first, then the command line; unknown keys are refused."""

import dataclasses
import os
import re
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import yaml
from trl import DPOConfig, GRPOConfig, ModelConfig, RewardConfig, RLOOConfig, SFTConfig, TrlParser

from rewarded_lines.errors import UserError, fail
from rewarded_lines.training import arguments, refused_keys
from rewarded_lines.training.arguments import parse_recipe, run_recipe
from rewarded_lines.training.ppo_config import PPOConfig
from rewarded_lines.training.recipe_options import DataOptions, RewardOptions, RunOptions

TRAINERS = (SFTConfig, RewardConfig, DPOConfig, RLOOConfig, GRPOConfig, PPOConfig)


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


@dataclass
class Batches:
    effective_batch_size: int | None = None
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1


@dataclass
class Machine:
    bf16: bool = True
    fp16: bool = False
    use_cpu: bool = False
    dataloader_pin_memory: bool = True
    ddp_timeout: int = 1800
    report_to: list[str] = field(default_factory=list)


@dataclass
class Strict:
    rate: float = 1.0
    steps: int = 1

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError("the rate is negative")
        if self.steps > 9:
            raise TypeError("too many steps")


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
    ("text", "words", "given"),
    [
        ("rate: 1\n", ["--train_file", "a"], {"train_file", "rate"}),
        ("train_file: a\nmodel: null\nnames: [x, y]\n", [], {"train_file", "model", "names"}),
        ("train_file: a\n", ["--train_file=b", "--rate", "-1", "--names", "x", "y"], {"train_file", "rate", "names"}),
        (
            "train_file: a\n",
            ["--output-dir=b", "--no_packing", "--overwrite"],
            {"train_file", "output_dir", "packing", "overwrite"},
        ),
    ],
)
def test_keys_of_the_file_and_of_the_command_line_are_those_given(tmp_path, text, words, given):
    made = parse(tmp_path, text, *words)
    assert made.given == given and len(made) == 2


@pytest.mark.parametrize("words", [["--config=recipe.yaml"], ["--train_file", "b", "--config", "recipe.yaml"]])
def test_the_config_may_stand_anywhere(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("train_file: a\nrate: 3\n")
    (mine,) = parse_recipe((Mine,), words)
    assert (mine.train_file, mine.rate) == ("b" if len(words) > 1 else "a", 3.0)


@pytest.mark.parametrize(
    ("processes", "words", "steps"),
    [
        ("1", ["--effective_batch_size", "32"], 4),
        ("2", ["--effective_batch_size", "32"], 2),
        ("2", ["--effective-batch-size=32", "--per_device_train_batch_size=2"], 8),
        ("2", ["--effective_batch_size=16", "--gradient_accumulation_steps", "1"], 1),
        (None, ["--effective_batch_size", "8"], 1),
        ("2", ["--gradient_accumulation_steps", "3"], 3),
        ("2", [], 1),
    ],
)
def test_gradient_accumulation_follows_from_the_effective_batch(monkeypatch, processes, words, steps):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("WORLD_SIZE", processes)
    (batches,) = made = parse_recipe((Batches,), words)
    assert batches.gradient_accumulation_steps == steps
    assert ("gradient_accumulation_steps" in made.given) == any("accumulation" in word for word in words)
    if batches.effective_batch_size:
        assert batches.effective_batch_size == steps * batches.per_device_train_batch_size * int(processes or 1)


def test_processes_that_share_an_example_count_once(monkeypatch):
    """As TRL's context_parallel_2gpu.yaml and alst_ulysses_4gpu.yaml make accelerate set these variables."""
    for processes, kind, steps in (("2", "CP", 4), ("4", "SP", 2)):
        monkeypatch.setenv("WORLD_SIZE", processes)
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{kind}_SIZE", "2")
        assert parse_recipe((Batches,), ["--effective_batch_size=32"])[0].gradient_accumulation_steps == steps
        monkeypatch.delenv(f"PARALLELISM_CONFIG_{kind}_SIZE")


def test_the_command_line_overrides_the_effective_batch_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "recipe.yaml").write_text("effective_batch_size: 99\nper_device_train_batch_size: 4\n")
    (batches,) = parse_recipe((Batches,), ["--config", str(tmp_path / "recipe.yaml"), "--effective_batch_size", "24"])
    assert (batches.effective_batch_size, batches.gradient_accumulation_steps) == (24, 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--effective_batch_size=24"], "whole batches\n  expected: a multiple of 8 examples × 2 processes\n  got: 24"),
        (["--effective_batch_size=8"], "whole batches\n  expected: a multiple of 8 examples × 2 processes\n  got: 8"),
        (
            ["--effective_batch_size=32", "--gradient_accumulation_steps=4"],
            "contradict each other\n  expected: 8 × 4 × 2 = 64\n  got: 32",
        ),
        (["--effective_batch_size=0"], "effective_batch_size"),
        (["--effective_batch_size=16", "--per_device_train_batch_size=null"], "per_device_train_batch_size"),
        (["--effective_batch_size=-16"], "effective_batch_size"),
        (["--effective_batch_size=many"], "invalid int value: 'many'"),
    ],
)
def test_an_impossible_effective_batch_is_refused(monkeypatch, words, said):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError) as caught:
        parse_recipe((Batches,), words)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("gpu", "supported", "words", "expected"),
    [
        (False, False, [], Machine(bf16=False, use_cpu=True, dataloader_pin_memory=False)),
        (True, False, [], Machine(bf16=False)),
        (True, True, [], Machine()),
        (False, False, ["--bf16", "true", "--use_cpu=false"], Machine(dataloader_pin_memory=False)),
        (True, False, ["--fp16"], Machine(fp16=True)),
    ],
    ids=["no GPU", "an old GPU", "a GPU", "told otherwise", "told fp16"],
)
def test_keys_that_are_not_set_follow_the_machine(monkeypatch, gpu, supported, words, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: supported)
    expected.report_to = ["none"]
    # From the launch file. Its fp16 stays: without it, nothing would say that the training is in float32.
    for launched, left in (("bf16", "bf16" if expected.bf16 else "no"), ("fp16", "fp16")):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        made = parse_recipe((Machine,), [*words, "--report_to", "none"])
        assert made == (expected,) and not made.given & {"dataloader_pin_memory"}
        assert os.environ["ACCELERATE_MIXED_PRECISION"] == left


@pytest.mark.parametrize(("processes", "seconds"), [("1", 1800), ("2", 24 * 3600)])
def test_several_processes_wait_while_the_first_measures(monkeypatch, processes, seconds):
    monkeypatch.setenv("WORLD_SIZE", processes)
    (machine,) = parse_recipe((Machine,), ["--report_to", "none"])
    assert machine.ddp_timeout == seconds


def test_keys_of_the_file_do_not_follow_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "recipe.yaml").write_text("bf16: true\nuse_cpu: false\nreport_to: none\n")
    (machine,) = parse_recipe((Machine,), ["--config", str(tmp_path / "recipe.yaml")])
    assert machine == Machine(dataloader_pin_memory=False, report_to=["none"])


@pytest.mark.parametrize("installed", [True, False])
def test_metrics_go_to_tensorboard_where_it_is_installed(monkeypatch, installed):
    monkeypatch.setattr(arguments, "find_spec", lambda name: installed or None)
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard"])
    (machine,) = parse_recipe((Machine,), [])
    assert machine.report_to == (["tensorboard"] if installed else [])


def test_unknown_and_missing_trackers_are_refused_all_at_once(monkeypatch):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard"])
    for words in (["tensorboard"], ["none"], ["all"]):
        assert parse_recipe((Machine,), ["--report_to", *words])[0].report_to == words
    with pytest.raises(UserError) as caught:
        parse_recipe((Machine,), ["--report_to", "wandb", "tensorboard", "wnadb"])
    first, second = caught.value.problems
    assert (first.where, first.what) == (
        "report_to",
        "`wandb` is not installed",
    ) and "pip install wandb" in first.remedy
    assert second.what == "unknown tracker `wnadb`" and "wandb" in second.expected


def test_trls_own_configuration_is_made_without_a_gpu(tmp_path, monkeypatch):
    from trl import SFTConfig

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (config,) = parse_recipe((SFTConfig,), ["--output_dir", str(tmp_path)])
    assert SFTConfig.__dataclass_fields__["bf16"].default is not False and config.bf16 is False
    with pytest.raises(UserError, match=r"arguments of the recipe: .*fp16"):
        parse_recipe((SFTConfig,), ["--output_dir", str(tmp_path), "--bf16=true", "--fp16=true"])


def test_help_says_how_to_start_and_what_the_recipe_does(monkeypatch, capsys):
    from trl import ModelConfig, SFTConfig

    monkeypatch.setattr("sys.argv", ["/recipes/sft.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        parse_recipe((Mine, ModelConfig, SFTConfig), ["--help"], "It does this.\n\n    and that\n")
    said = capsys.readouterr().out
    assert caught.value.code == 0
    assert said.startswith(
        "usage: accelerate launch recipes/sft.py --config FILE.yaml [--KEY VALUE ...]\n\nIt does this."
    )
    assert "\n\n    and that\n" in said and "--learning_rate" in said and "--config FILE.yaml" in said


@pytest.mark.parametrize(
    ("words", "said"), [(["--rate", "-1"], "the rate is negative"), (["--steps", "10"], "too many steps")]
)
def test_an_error_of_a_configuration_is_a_user_error(words, said):
    with pytest.raises(UserError, match=f"arguments of the recipe: {said}"):
        parse_recipe((Strict,), words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate: 1\n", "train_file"),
        ("train_file: a\nrate: fast\n", "invalid float value: 'fast'"),
        ("train_file: a\nrate: [1, 2]\n", "this key takes one value"),
    ],
)
def test_missing_and_wrong_values_are_user_errors(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        parse(tmp_path, text)


def test_a_missing_config_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        parse_recipe((Mine, Trainer), ["--config", str(tmp_path / "none.yaml")])


@pytest.mark.parametrize("words", [["--config"], ["--config", "a", "b"], ["--config=a", "--config=b"]])
def test_a_config_is_one_file(words):
    with pytest.raises(UserError, match="--config names no file"):
        parse_recipe((Mine, Trainer), words)


def test_a_value_without_a_key_is_a_user_error():
    with pytest.raises(UserError, match=r"values that belong to no key\n  got: a"):
        parse_recipe((Mine, Trainer), ["a", "--train_file", "b"])


def test_a_value_may_begin_with_dashes():
    (mine,) = parse_recipe((Mine,), ["--train_file=--a", "--model=--b=c", "--names", "x", "y"])
    assert (mine.train_file, mine.model, mine.names) == ("--a", "--b=c", ["x", "y"])


def test_a_user_error_ends_the_program_with_its_text(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["recipe.py", "--nope"])
    with pytest.raises(SystemExit) as caught:
        run_recipe(lambda argv: parse_recipe((Mine, Trainer), argv))
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("command line: unknown key `nope`")


@pytest.mark.parametrize(
    ("rank", "processes", "waited", "said"),
    [
        ("0", "1", [], "here: it went wrong\n"),
        ("0", "2", [], "here: it went wrong\n"),
        ("1", "2", [5.0], "process 1: here: it went wrong\n"),
    ],
)
def test_the_first_process_prints_the_error_and_the_others_wait(monkeypatch, capsys, rank, processes, waited, said):
    sleeps, exits = [], []

    def leave(code):
        exits.append(code)
        raise SystemExit(code)

    def main(argv):
        raise fail("it went wrong", where="here")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr(arguments.time, "sleep", sleeps.append)
    monkeypatch.setattr(arguments.os, "_exit", leave)
    with pytest.raises(SystemExit) as caught:
        run_recipe(main)
    # With several processes the exit is immediate: an ordinary one would wait for the others.
    assert (caught.value.code, exits) == (1, [1] if processes == "2" else [])
    assert (sleeps, capsys.readouterr().err) == (waited, said)


def test_a_missing_library_is_one_message(monkeypatch, capsys):
    def main(argv):
        raise ImportError("please pip install liger-kernel")

    monkeypatch.setattr("sys.argv", ["recipe.py"])
    with pytest.raises(SystemExit):
        run_recipe(main)
    assert "please pip install liger-kernel" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "words", "where", "remedy"),
    [
        (DPOConfig, ["--push_to_hub", "true"], "push_to_hub", "rewarded-lines push FOLDER OWNER/NAME"),
        (DPOConfig, ["--eval_strategy", "steps", "--eval_steps", "1"], "eval_strategy", "leave it out"),
        (DPOConfig, ["--per_device_train_batch_size", "0"], "per_device_train_batch_size", "write 1 or more"),
        (GRPOConfig, ["--max_completion_length", "null"], "max_completion_length", "write 1 or more"),
        (SFTConfig, ["--eval_strategy", "epoch"], "eval_strategy", "name a `validation_file`"),
        (DPOConfig, ["--model_init_kwargs", '{"dtype": "bfloat16"}'], "model_init_kwargs", "write `dtype`"),
        (DPOConfig, ["--eval_on_start", "true"], "eval_on_start", "leave it out"),
        (SFTConfig, ["--dataset_text_field", "content"], "dataset_text_field", "`columns: {text: COLUMN}`"),
        (SFTConfig, ["--resume_from_checkpoint", "old/checkpoint-5"], "resume_from_checkpoint", "goes on from its own"),
    ],
)
def test_keys_that_a_recipe_cannot_follow_are_refused_at_once(tmp_path, kind, words, where, remedy):
    with pytest.raises(UserError) as caught:
        parse_recipe((DataOptions, kind), ["--output_dir", str(tmp_path), *words])
    (problem,) = caught.value.problems
    assert problem.where == where and remedy in problem.remedy


def test_no_is_a_choice_that_yaml_reads_as_false(tmp_path):
    (tmp_path / "c.yaml").write_text("output_dir: a\nsave_strategy: no\neval_strategy: no\n")
    _, training = parse_recipe((DataOptions, SFTConfig), ["--config", str(tmp_path / "c.yaml")])
    assert (training.save_strategy, training.eval_strategy) == ("no", "no")


def test_sft_evaluates_while_it_trains_where_there_are_rows(tmp_path):
    words = ["--output_dir", str(tmp_path), "--eval_strategy", "epoch", "--validation_file", "a.jsonl"]
    assert parse_recipe((DataOptions, SFTConfig), words)[1].eval_strategy == "epoch"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"report_to": ["tensorboard", "none"]}, {"report_to": ["tensorboard", "none"]}),
        ({"report_to": []}, {"report_to": []}),
        ({"report_to": ["none"]}, {"report_to": []}),
        ({"optim_target_modules": ["q", "k"]}, {"optim_target_modules": ["q", "k"]}),
        ({"optim_target_modules": "all-linear"}, {"optim_target_modules": "all-linear"}),
        ({"scale_rewards": False}, {"scale_rewards": "none"}),
        ({"scale_rewards": "batch"}, {"scale_rewards": "batch"}),
        ({"fsdp": False, "model_init_kwargs": None}, {"fsdp": False, "model_init_kwargs": None}),
    ],
)
def test_a_key_takes_every_form_that_its_trainer_takes(tmp_path, given, expected):
    """Lists and true or false where HfArgumentParser knows text; as TRL's own parser passes them on."""
    given = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, **given}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(given))
    (ours,) = parse_recipe((GRPOConfig,), ["--config", str(tmp_path / "c.yaml")])
    (theirs,) = TrlParser((GRPOConfig,)).parse_args_and_config(["--config", str(tmp_path / "c.yaml")])
    for key, value in expected.items():
        assert getattr(ours, key) == getattr(theirs, key) == value


@pytest.mark.parametrize(
    ("stage", "gather", "lora"), [(3, False, False), (3, True, False), (3, False, True), (2, False, False)]
)
def test_zero_3_must_gather_the_weights_that_it_saves(tmp_path, stage, gather, lora):
    config = {"zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": gather}}
    training = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    training.deepspeed_plugin = SimpleNamespace(zero_stage=stage, hf_ds_config=SimpleNamespace(config=config))
    parts = (ModelConfig(use_peft=lora), training)
    if (stage, gather, lora) == (3, False, False):
        with pytest.raises(UserError, match="save no weights(.|\n)*`zero3_save_16bit_model: true`"):
            refused_keys.check_trainer(parts, ())
    else:
        refused_keys.check_trainer(parts, ())


def test_a_home_folder_may_be_named_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("project_file: ~/p.yaml\nmodel_name_or_path: ~/sft\n")
    options, model = parse_recipe((RunOptions, ModelConfig), ["--config", str(tmp_path / "c.yaml")])
    assert (options.project_file, model.model_name_or_path) == (str(tmp_path / "p.yaml"), str(tmp_path / "sft"))


def test_words_for_no_limit_are_those_of_transformers(tmp_path):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    (made,) = parse_recipe((GRPOConfig,), [*words, "--top_k", "-1", "--max_grad_norm", "null"])
    assert (made.top_k, made.max_grad_norm) == (0, 0.0)


def test_several_values_of_a_key_that_takes_one_are_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("train_file: [a.jsonl, b.jsonl]\n")
    with pytest.raises(UserError, match="train_file: this key takes one value(.|\n)*a.jsonl, b.jsonl"):
        parse_recipe((DataOptions,), ["--config", str(tmp_path / "c.yaml")])


OWN = (DataOptions, RunOptions, RewardOptions, ModelConfig)
KEYS = {one: {field.name for kind in (*OWN, one) for field in dataclasses.fields(kind)} for one in TRAINERS}


@pytest.mark.parametrize("key", sorted({**refused_keys._REMEDIES, **refused_keys._NAMES}))
def test_a_key_of_another_tool_is_told_with_one_that_the_recipe_has(key):
    told = {one: refused_keys.unknown_recipe_key(key, known, "c.yaml").remedy for one, known in KEYS.items()}
    unknown = {one: remedy for one, remedy in told.items() if key not in KEYS[one]}
    assert unknown and not any("did you mean" in remedy for remedy in unknown.values())
    written = {one: set(re.findall(r"`([a-z_0-9]+)[`:]", remedy)) for one, remedy in unknown.items()}
    for one, names in written.items():
        assert names <= (KEYS[one] if key in refused_keys._NAMES else set().union(*KEYS.values()))


def test_a_key_that_is_only_a_little_like_another_is_not_taken_for_it():
    assert "--help" in refused_keys.unknown_recipe_key("vocab_files", KEYS[GRPOConfig], "c.yaml").remedy
    assert "`learning_rate`" in refused_keys.unknown_recipe_key("learnig_rate", KEYS[GRPOConfig], "c.yaml").remedy


def test_other_errors_are_not_caught(monkeypatch):
    def main(argv):
        raise ZeroDivisionError

    monkeypatch.setattr("sys.argv", ["recipe.py"])
    with pytest.raises(ZeroDivisionError):
        run_recipe(main)
