"""A recipe's run: absent, unfinished or complete; resumed only by the same run; foreign folders stay untouched."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import FullyShardedDataParallelPlugin
from tiny_models import make_tokenizer, snapshot
from transformers import AutoTokenizer, TrainingArguments

from rewarded_lines.errors import Problem, UserError
from rewarded_lines.folders import hold_folder
from rewarded_lines.training.arguments import Arguments
from rewarded_lines.training.load_models import save_tokenizer
from rewarded_lines.training.recipe_options import KeyValues, RunOptions
from rewarded_lines.training.training_record import differences, last_checkpoint, read_record
from rewarded_lines.training.training_run import from_main, say, training_run


@dataclass
class Recipe:
    margin: float = 0.5
    columns: KeyValues = field(default_factory=KeyValues)
    model_name_or_path: str | None = None
    policy_name: str | None = None
    sampling_engine: str = "auto"


INPUTS = {"train": "1", "base": "2"}
OWN = ("margin", "columns", "model_name_or_path", "policy_name", "sampling_engine")


def arguments(out, overwrite=False, project_file="p.yaml", **settings):
    own = {key: settings.pop(key) for key in OWN if key in settings}
    trainer = TrainingArguments(**{"output_dir": str(out), "report_to": "none", "use_cpu": True, **settings})
    made = Arguments((Recipe(**own), RunOptions(overwrite=overwrite, project_file=project_file), trainer))
    made.given = frozenset({"output_dir", "report_to", "use_cpu", *own, *settings, *(["overwrite"] * overwrite)})
    return made


def checkpoint(folder, step, state='{"global_step": 1}'):
    (folder / f"checkpoint-{step}").mkdir()
    if state is not None:
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(state)


def train(out, recipe="sft", inputs=INPUTS, **settings):
    """Run to the end; return whether there was work to do, and the checkpoint that it resumed from."""
    with training_run(recipe, arguments(out, **settings)) as run:
        begun = run.begin(**inputs)
        if begun:
            (run.folder / "model").write_text(json.dumps(inputs))
            run.saved(seed=3)
            run.finish(lambda: {"loss": 1.0})
    return begun, run.checkpoint


def stop(out, *steps, recipe="sft", inputs=INPUTS, **settings):
    """Run up to some checkpoints and fail."""
    with pytest.raises(ZeroDivisionError), training_run(recipe, arguments(out, **settings)) as run:
        run.begin(**inputs)
        for step in steps:
            checkpoint(run.folder, step)
        raise ZeroDivisionError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_works_beside_its_output_and_takes_its_name_at_the_end(tmp_path):
    out = tmp_path / "runs" / "sft"
    made = arguments(out, learning_rate=0.25)
    with training_run("sft", made) as run:
        assert run.begin(**INPUTS) and run.checkpoint is None
        assert made[2].output_dir == str(run.folder) == f"{out}.unfinished" and not out.exists()
        assert read_record(run.folder)["complete"] is False
        for name in ("model", "training_args.bin"):
            (run.folder / name).write_text("")
        checkpoint(run.folder, 5)
        run.saved(base="base", seed=3)
        run.finish(lambda: {"loss": 1.0})
    assert names(out.parent) == ["sft"] and names(out) == ["checkpoint-5", "model", "training.json"]
    assert made[2].output_dir == str(out)
    record = read_record(out)
    assert (record["recipe"], record["complete"], record["metrics"]) == ("sft", True, {"loss": 1.0})
    assert (record["base"], record["seed"], record["inputs"]) == ("base", 3, INPUTS)
    assert record["given"] == ["learning_rate", "output_dir", "report_to", "use_cpu"]
    assert record["config"]["TrainingArguments"]["output_dir"] == str(out)
    assert record["config"]["TrainingArguments"]["learning_rate"] == 0.25
    assert record["config"]["Recipe"]["margin"] == 0.5 and record["versions"]["torch"]


@pytest.mark.parametrize(
    ("cores", "processes", "threads", "share"), [(4, 1, 1, 4), (8, 2, 1, 4), (4, 4, 1, 0), (8, 1, 4, 0)]
)
def test_idle_cores_make_a_hint(tmp_path, monkeypatch, capsys, cores, processes, threads, share):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert train(tmp_path / "sft") == (True, None)
    said = capsys.readouterr().out
    assert ("1 thread" in said) == ("_per_process" in said) == bool(share)
    assert not share or f"{share} cores" in said and f"_per_process {share}" in said
    # There is no hint if the run is finished, or if the demo divides the cores.
    assert train(tmp_path / "sft") == (False, None)
    monkeypatch.setenv("REWARDED_LINES_PROGRESS", str(tmp_path / "progress.jsonl"))
    assert train(tmp_path / "other") == (True, None)
    assert "1 thread" not in capsys.readouterr().out


def test_a_finished_run_says_so_and_does_nothing(tmp_path, capsys):
    assert train(tmp_path / "sft") == (True, None)
    before = snapshot(tmp_path)
    assert train(tmp_path / "sft") == (False, None)
    said = capsys.readouterr().out
    assert f"{tmp_path / 'sft'} is finished already" in said and "--overwrite true" in said
    assert snapshot(tmp_path) == before and names(tmp_path) == ["sft"]


def test_a_stopped_run_goes_on_from_its_last_checkpoint(tmp_path, capsys):
    out = tmp_path / "sft"
    stop(out, 9, 10, margin=1.0)
    assert names(tmp_path) == ["sft.unfinished"]
    last = str(tmp_path / "sft.unfinished" / "checkpoint-10")
    assert train(out, margin=1.0) == (True, last) and f"going on from {last}" in capsys.readouterr().out
    assert names(tmp_path) == ["sft"] and "checkpoint-9" in names(out)


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"margin": 2.0}, "margin: 1.0, not 2.0"),
        ({"learning_rate": 0.5}, "learning_rate: 0.25, not 0.5"),
        ({"columns": KeyValues("prompt=post")}, "columns: {}, not {'prompt': 'post'}"),
        ({"recipe": "dpo"}, "recipe sft, not dpo"),
        ({"seed": 1, "margin": 2.0}, "margin: 1.0, not 2.0; seed: 42, not 1"),
        ({"inputs": {"train": "7", "base": "2"}}, "other train"),
        ({"inputs": {"train": "7", "base": "8", "more": "9"}}, "other train; other base; other more"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_another_run_is_refused_with_every_difference_and_left_alone(tmp_path, complete, settings, difference):
    usual = {"margin": 1.0, "learning_rate": 0.25}
    train(tmp_path / "sft", **usual) if complete else stop(tmp_path / "sft", 5, **usual)
    before = snapshot(tmp_path)
    with pytest.raises(UserError) as caught:
        train(tmp_path / "sft", **{**usual, **settings})
    (problem,) = caught.value.problems
    assert problem.got == difference and "--overwrite true" in problem.remedy
    assert problem.where == str(tmp_path / ("sft" if complete else "sft.unfinished"))
    assert snapshot(tmp_path) == before


def test_a_key_that_is_no_longer_given_is_a_difference(tmp_path):
    train(tmp_path / "sft", margin=1.0)
    with pytest.raises(UserError, match=r"margin: 1\.0, not 0\.5"):
        train(tmp_path / "sft")
    assert train(tmp_path / "other") == (True, None) and train(tmp_path / "other", margin=0.5) == (False, None)


def test_a_key_that_was_never_given_is_no_difference(tmp_path, monkeypatch):
    """Some defaults follow the machine, such as gradient accumulation, from the number of processes."""
    stop(tmp_path / "sft", 5)
    path = tmp_path / "sft.unfinished" / "training.json"
    record = json.loads(path.read_text())
    record["config"]["TrainingArguments"]["gradient_accumulation_steps"] = 8
    record["versions"]["torch"] = "0.1"
    path.write_text(json.dumps(record))
    assert train(tmp_path / "sft")[1].endswith("checkpoint-5")


FREE = {
    "project_file": "q.yaml",
    "policy_name": "mine",
    "sampling_engine": "hf",
    "model_name_or_path": "./base",
    "report_to": "tensorboard",
    "run_name": "again",
    "disable_tqdm": True,
    "logging_steps": 3,
    "logging_strategy": "epoch",
    "log_level": "error",
    "save_total_limit": 2,
    "save_steps": 9,
    "save_strategy": "epoch",
    "dataloader_num_workers": 1,
    "dataloader_pin_memory": False,
    "use_cpu": False,
}


@pytest.mark.parametrize("key", FREE)
def test_keys_that_change_no_result_may_change(tmp_path, key):
    if key == "report_to":
        pytest.importorskip("tensorboard")
    stop(tmp_path / "sft", 5)
    assert train(tmp_path / "sft", **{key: FREE[key]})[1].endswith("checkpoint-5")
    assert train(tmp_path / "sft") == (False, None)


def test_how_often_models_are_saved_matters_where_the_best_of_them_is_taken(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps"}
    stop(tmp_path / "sft", 5, save_steps=5, **best)
    with pytest.raises(UserError, match=r"another run is there\n  got: save_steps: 5, not 10"):
        train(tmp_path / "sft", save_steps=10, **best)


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT", None])
def test_a_trained_model_is_saved_whole_also_with_sharded_checkpoints(tmp_path, kind):
    """The alignment handbook's fsdp.yaml has sharded ones, and they are FSDP2's default."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)

    def save_model(folder):
        # As transformers' Trainer decides.
        if "FULL_STATE_DICT" in str(plugin.state_dict_type):
            Path(folder, "weights").write_text("")

    state = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    trainer = SimpleNamespace(is_fsdp_enabled=True, accelerator=state, save_model=save_model)
    with training_run("sft", arguments(tmp_path / "sft")) as run:
        run.begin(**INPUTS)
        run.save_model(trainer)
        assert (run.folder / "weights").is_file() and run.trained


def test_checkpoints_without_an_optimizer_are_not_resumed(tmp_path):
    """As in Open R1's OlympicCoder configs; the trainer would begin anew with the learning rate."""
    stop(tmp_path / "sft", 5, save_only_model=True)
    with pytest.raises(UserError, match="no optimizer to go on with(.|\n)*save_only_model: true"):
        train(tmp_path / "sft", save_only_model=True)
    assert (tmp_path / "sft.unfinished/checkpoint-5").is_dir()
    assert train(tmp_path / "sft", overwrite=True, save_only_model=True) == (True, None)


def test_the_batch_is_that_of_all_processes(tmp_path, monkeypatch):
    """A run that is resumed on fewer devices would have other updates; in smaller parts they stay the same."""
    stop(tmp_path / "sft", 5, per_device_train_batch_size=8)
    for processes, each in ((1, 4), (2, 8)):
        monkeypatch.setattr(TrainingArguments, "world_size", processes)
        with pytest.raises(UserError, match=r"8 examples an update, not (4|16) examples an update, in all processes"):
            train(tmp_path / "sft", per_device_train_batch_size=each)
    # Four in each of two processes.
    assert train(tmp_path / "sft", per_device_train_batch_size=4)[1].endswith("checkpoint-5")
    assert train(tmp_path / "sft", per_device_train_batch_size=2, gradient_accumulation_steps=2) == (False, None)


def test_a_run_may_be_moved(tmp_path):
    stop(tmp_path / "sft", 5)
    (tmp_path / "sft.unfinished").rename(tmp_path / "new.unfinished")
    assert train(tmp_path / "new")[1] == str(tmp_path / "new.unfinished/checkpoint-5")
    assert read_record(tmp_path / "new")["config"]["TrainingArguments"]["output_dir"] == str(tmp_path / "new")


def foreign_folder(path):
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")


def foreign_record(path):
    foreign_folder(path)
    (path / "training.json").write_text('{"complete": true}')


def foreign_file(path):
    path.write_text("years of work")


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("name", ["sft", "sft.unfinished"])
@pytest.mark.parametrize("make", [foreign_folder, foreign_record, foreign_file])
def test_folders_that_no_recipe_made_are_never_touched(tmp_path, make, name, overwrite):
    make(tmp_path / name)
    before = snapshot(tmp_path)
    with pytest.raises(UserError) as caught:
        train(tmp_path / "sft", overwrite=overwrite)
    (problem,) = caught.value.problems
    assert problem.what == "the folder holds something that no recipe made" and problem.where == str(tmp_path / name)
    assert "training.json" in problem.expected and "remove it yourself" in problem.remedy
    assert snapshot(tmp_path) == before and names(tmp_path) == [name]


def test_a_folder_that_appears_during_a_run_is_not_replaced_and_the_run_is_not_lost(tmp_path):
    with pytest.raises(UserError, match="meanwhile"), training_run("sft", arguments(tmp_path / "sft")) as run:
        run.begin(**INPUTS)
        (run.folder / "model").write_text("hours of work")
        foreign_folder(tmp_path / "sft")
        run.finish(dict)
    assert names(tmp_path / "sft") == ["thesis.tex"]
    assert (tmp_path / "sft.unfinished" / "model").read_text() == "hours of work"
    shutil.rmtree(tmp_path / "sft")
    assert train(tmp_path / "sft") == (False, None) and names(tmp_path) == ["sft"]
    assert (tmp_path / "sft" / "model").read_text() == "hours of work"


@pytest.mark.parametrize("name", ["sft", "sft.unfinished"])
def test_an_empty_folder_is_no_obstacle(tmp_path, name):
    (tmp_path / name).mkdir()
    assert train(tmp_path / "sft") == (True, None) and names(tmp_path) == ["sft"]


def test_overwriting_replaces_another_run_only_once_the_new_one_is_whole(tmp_path):
    out = tmp_path / "sft"
    train(out, inputs={"train": "old"})
    stop(out, overwrite=True)
    assert names(tmp_path) == ["sft"] and (out / "model").read_text() == '{"train": "old"}'
    with training_run("sft", arguments(out, overwrite=True, margin=3.0)) as run:
        assert run.begin(**INPUTS) and run.checkpoint is None
        assert (out / "model").read_text() == '{"train": "old"}'
        (run.folder / "other").write_text("")
        run.finish(dict)
    assert names(tmp_path) == ["sft"] and names(out) == ["other", "training.json"]
    assert read_record(out)["config"]["Recipe"]["margin"] == 3.0


def test_overwriting_makes_a_finished_run_again(tmp_path):
    train(tmp_path / "sft")
    assert train(tmp_path / "sft", overwrite=True) == (True, None)


@pytest.mark.parametrize("settings", [{}, {"margin": 2.0}, {"inputs": {"train": "7"}}, {"recipe": "dpo"}])
def test_overwriting_starts_an_unfinished_run_anew(tmp_path, settings):
    stop(tmp_path / "sft", 5)
    assert train(tmp_path / "sft", overwrite=True, **settings) == (True, None)
    assert names(tmp_path) == ["sft"] and "checkpoint-5" not in names(tmp_path / "sft")


def test_two_runs_into_one_output_are_refused_and_the_first_goes_on(tmp_path):
    with training_run("sft", arguments(tmp_path / "sft")) as run:
        run.begin(**INPUTS)
        checkpoint(run.folder, 5)
        for overwrite in (True, False):
            with pytest.raises(UserError, match=r"sft\.unfinished: another process is at work in this folder"):
                train(tmp_path / "sft", overwrite=overwrite)
        assert train(tmp_path / "other") == (True, None)
        run.finish(dict)
    assert names(tmp_path) == ["other", "sft"] and "checkpoint-5" in names(tmp_path / "sft")


HOLD = """
import sys, time
from pathlib import Path
from rewarded_lines.folders import hold_folder
with hold_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_hold_ends_with_its_process_however_that_ends(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "deep" / "out"], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process"), hold_folder(tmp_path / "deep" / "out"):
            pass
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    assert names(tmp_path / "deep") == [".out.lock"]
    with hold_folder(tmp_path / "deep" / "out"):
        pass
    assert names(tmp_path / "deep") == []


@pytest.mark.parametrize(
    "state", [None, "", '{"global_step": 5, "log_his', "\0\0"], ids=["none", "empty", "cut", "zeros"]
)
def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path, state):
    for step in (2, 10, 9):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 11, state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    shutil.rmtree(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")


def test_only_folders_that_are_called_so_are_checkpoints(tmp_path):
    for name in ("x", "5.tmp", "-3", "best"):
        checkpoint(tmp_path, name)
    (tmp_path / "checkpoint-7").write_text("")
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_a_run_that_fails_before_its_first_whole_checkpoint_leaves_nothing(tmp_path, error):
    with pytest.raises(error), training_run("sft", arguments(tmp_path / "new" / "sft")) as run:
        run.begin(**INPUTS)
        checkpoint(run.folder, 1, None)
        raise error
    assert names(tmp_path) == []


def test_a_run_that_fails_before_it_begins_keeps_what_an_earlier_one_left(tmp_path):
    stop(tmp_path / "sft", 5)
    (tmp_path / "sft.unfinished/checkpoint-5/trainer_state.json").unlink()
    before = snapshot(tmp_path)
    with pytest.raises(ZeroDivisionError), training_run("sft", arguments(tmp_path / "sft")):
        raise ZeroDivisionError
    assert snapshot(tmp_path) == before


def test_an_output_must_be_named():
    made = arguments("out")
    made.given = frozenset()
    for one in (made, arguments("")):
        with (
            pytest.raises(UserError, match=r"`output_dir` is missing\n  remedy: .*--output_dir"),
            training_run("sft", one),
        ):
            pass


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_an_output_must_be_a_new_name(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError):
        train(name)


def test_a_folder_may_be_named_with_a_slash(tmp_path):
    assert train(f"{tmp_path}/sft/") == (True, None) and train(tmp_path / "sft") == (False, None)


@pytest.mark.parametrize("text", [None, "", '{"recipe": "s', "[]", '{"complete": true}', "\xff"])
def test_only_a_recipes_record_is_one(tmp_path, text):
    if text is not None:
        (tmp_path / "training.json").write_bytes(text.encode("latin-1"))
    assert read_record(tmp_path) is None


def test_a_tokenizer_is_saved_as_it_was_before_training(tmp_path):
    tokenizer = make_tokenizer()
    save_tokenizer(tokenizer, tmp_path / "before")
    tokenizer(["a film", "dog"], padding=True, truncation=True, max_length=3)
    assert json.loads(tokenizer.backend_tokenizer.to_str())["truncation"]
    save_tokenizer(tokenizer, tmp_path / "after")
    assert (tmp_path / "after/tokenizer.json").read_bytes() == (tmp_path / "before/tokenizer.json").read_bytes()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "after")("a film of great beauty")["input_ids"]) > 3


def test_the_only_process_is_the_first_one(capsys):
    assert from_main(lambda: [Path("a")]) == [Path("a")]
    say("one", "two")
    assert capsys.readouterr().out == "one\ntwo\n"


def test_a_model_is_not_lost_to_a_fault_in_measuring_it(tmp_path):
    out, registered = tmp_path / "sft", []

    def measure():
        raise UserError(Problem("a text is too long", where="reward `r`"))

    with pytest.raises(UserError) as caught, training_run("sft", arguments(out)) as run:
        run.begin(**INPUTS)
        (run.folder / "model").write_text("trained")
        run.saved(seed=3)
        run.finish(measure, lambda: registered.append(run.output))
    (problem,) = caught.value.problems
    assert problem.what == "the model is trained, saved and in the project, but measuring it failed"
    assert (
        problem.where == str(out) and "a text is too long" in problem.got and "rewarded-lines score" in problem.remedy
    )
    assert (out / "model").read_text() == "trained" and registered == [out] and names(tmp_path) == ["sft"]
    record = read_record(out)
    assert record["complete"] and record["seed"] == 3 and "a text is too long" in record["metrics"]["fault"]
    # The same command does not train again.
    assert train(out) == (False, None)


@pytest.mark.parametrize("saved", [True, False])
def test_a_trained_model_outlives_an_end_before_it_is_measured(tmp_path, saved):
    out = tmp_path / "sft"
    with pytest.raises(KeyboardInterrupt), training_run("sft", arguments(out)) as run:
        run.begin(**INPUTS)
        (run.folder / "model").write_text("trained")
        run.saved() if saved else run.keep()
        raise KeyboardInterrupt
    assert (tmp_path / "sft.unfinished" / "model").read_text() == "trained"
    # A saved model is published; otherwise the run starts again in its folder.
    assert train(out) == (not saved, None)
    assert names(tmp_path) == ["sft"]
    assert (out / "model").read_text() == ("trained" if saved else json.dumps(INPUTS))


def test_another_declaration_of_a_reward_is_another_run_and_earlier_records_have_none():
    ours = {"recipe": "rloo", "given": [], "config": {}, "inputs": {"train": "a", "declarations": "b"}}
    assert differences({"recipe": "rloo", "inputs": {"train": "a"}}, ours) == []
    assert differences({**ours, "inputs": {"train": "a", "declarations": "c"}}, ours) == ["other declarations"]
