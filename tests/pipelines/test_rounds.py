"""Rounds of training and merging: their models by a direct formula, killed runs, changed settings, refusals."""

import csv
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from command import COMMAND, ENVIRONMENT
from progress_told import Told
from safetensors.numpy import load_file, save_file
from tiny_adapters import changes, load_adapter, save_adapter

from rewarded_lines import rounds
from rewarded_lines.cli.rounds_command import rounds as typed_rounds
from rewarded_lines.errors import UserError
from rewarded_lines.merger.methods import METHODS
from rewarded_lines.pipelines import rounds as verb
from rewarded_lines.pipelines.recipe_jobs import RecipeJobs
from rewarded_lines.projects import load_project

# Blocks of the tiny model.
BLOCKS = 4
TRAIN = f"{sys.executable} train.py"
# Stands for a recipe that is killed: it says that it is at work, and needs a minute.
SLEEPS = """\
import pathlib, sys, time
from safetensors.numpy import load_file
pathlib.Path("at-work").write_text(sys.argv[sys.argv.index("--output_dir") + 1])
time.sleep(60)
"""


def weights(folder):
    return load_file(f"{folder}/model.safetensors")


class StandIn(RecipeJobs):
    """Trains in this process: adds noise by the seed to the base of the round's project."""

    trained: list = []
    adapters = False

    def run(self, commands, watch):
        for name, words in commands.items():
            given = {word[2:]: words[at + 1] for at, word in enumerate(words) if word.startswith("--")}
            with open(given["project_file"]) as file:
                project = yaml.safe_load(file)
            base = os.path.join(os.path.dirname(given["project_file"]), project["base"])
            progress = watch(name)
            progress.expect(5)
            progress.advance(5)
            self.trained.append(given)
            if self.adapters:
                save_adapter(Path(base).resolve(), Path(given["output_dir"]), seed=int(given["seed"]))
                continue
            shutil.copytree(base, given["output_dir"])
            draw = np.random.default_rng(int(given["seed"]))
            noisy = {
                key: value + draw.normal(0, 0.01, value.shape).astype("f4") for key, value in weights(base).items()
            }
            save_file(noisy, f"{given['output_dir']}/model.safetensors", {"format": "pt"})


@pytest.fixture
def project(tiny, monkeypatch):
    """The tiny project, with trainings that take no time; the list of them."""
    (tiny / "train.py").write_text(SLEEPS)
    monkeypatch.setattr(verb, "RecipeJobs", StandIn)
    monkeypatch.setattr(StandIn, "trained", [])
    return tiny


def merged_by_hand(start, policies, lam, alpha, beta):
    """θ + s(ℓ)·Σ λᵢ(θᵢ − θ) in float64."""
    base, tuned = weights(start), [weights(one) for one in policies]
    found = {}
    for name, value in base.items():
        depth = int(name.split(".")[2]) / (BLOCKS - 1) if ".layers." in name else 0.0
        residual = sum(w * (one[name].astype("f8") - value) for w, one in zip(lam, tuned, strict=True))
        found[name] = (value + (alpha + beta * depth) * residual).astype("f4")
    return found


@pytest.mark.parametrize(
    ("options", "lam", "alpha", "beta"),
    [((), (0.5, 0.5), 1.0, 1.0), (("--lam=0.3", "--beta=0.5", "--eta=0.25"), (0.3, 0.7), 0.25, 0.125)],
    ids=["as it is", "drawn back"],
)
def test_each_round_merges_where_it_starts(project, cli, options, lam, alpha, beta):
    answer = cli("rounds", "--train", TRAIN, "--rounds", 2, *options, "--json")
    assert answer.code == 0, answer.err
    found, start = json.loads(answer.out), "sft"
    for one in found:
        assert one["start"] == start and one["finished"] and one["seconds"] >= 0
        wanted, merged = merged_by_hand(start, one["policies"].values(), lam, alpha, beta), weights(one["merged"])
        assert merged.keys() == wanted.keys()
        assert all(np.allclose(merged[name], wanted[name], rtol=1e-6, atol=1e-8) for name in wanted)
        start = one["merged"]
    assert [(given["reward"], given["seed"]) for given in StandIn.trained] == [
        ("words", "0"), ("letters", "1"), ("words", "2"), ("letters", "3"),
    ]  # fmt: skip
    # The command that is shown for the merge makes it.
    shown = next(command for command in found[1]["commands"] if " merge " in command)
    assert cli(*shown.replace("round-2/merged", "again").split()[1:]).code == 0
    assert all(np.array_equal(value, merged[name]) for name, value in weights("rounds/again").items())


def test_adapters_are_folded_and_the_next_ones_are_new(project, monkeypatch):
    monkeypatch.setattr(StandIn, "adapters", True)
    first, second = rounds(TRAIN, rounds=2, beta=0.0)
    both = [changes(load_adapter("sft", folder)) for folder in first.policies.values()]
    wanted, folded = weights("sft"), weights(first.merged)
    for name, value in wanted.items():
        module = name.removesuffix(".weight")
        change = sum(0.5 * one[module].numpy() for one in both if module in one)
        assert np.allclose(folded[name], value + change, atol=1e-6)
    assert not os.path.exists(f"{second.merged}/adapter_config.json") and second.start == first.merged


def test_a_stopped_run_goes_on_and_more_rounds_are_added(project, monkeypatch):
    class Stopped(BaseException):
        pass

    def stop(name, progress):
        if name == "round 1 letters":
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(verb, "PolicyProgress", lambda whole, policies, name: stop(name, whole) or Told())
        rounds(TRAIN, rounds=1)
    assert [given["reward"] for given in StandIn.trained] == ["words"]
    (kept,) = [path.stat().st_mtime_ns for path in project.glob("rounds/round-1/policies/*/model.safetensors")]
    told = Told()
    (one,) = rounds(TRAIN, rounds=1, progress=told)
    assert [given["reward"] for given in StandIn.trained] == ["words", "letters"] and told.totals == [5]
    assert (project / "rounds/round-1/policies/words/model.safetensors").stat().st_mtime_ns == kept
    # Merged policies are not needed any more.
    shutil.rmtree("rounds/round-1/policies")
    planned = rounds(TRAIN, rounds=2, dry_run=True)
    assert [one.finished for one in planned] == [True, False] and planned[1].seconds == planned[0].seconds
    assert not os.path.exists("rounds/round-2")
    again = rounds(TRAIN, rounds=2)
    assert again[0] == one and again[1].finished and len(StandIn.trained) == 4


def test_a_killed_command_leaves_no_training_at_work(tiny):
    (tiny / "train.py").write_text(SLEEPS)
    child = subprocess.Popen([*COMMAND, "rounds", "--train", TRAIN], env=ENVIRONMENT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tiny / "at-work").exists():
        assert time.monotonic() < deadline and child.poll() is None, child.stderr.read()
        time.sleep(0.05)
    with pytest.raises(UserError, match="another process is at work"):
        rounds(TRAIN)
    child.send_signal(signal.SIGKILL)
    child.wait()
    (tiny / "train.py").write_text("import subprocess\nprint('no memory')\nraise subprocess.CalledProcessError(1, 'x')")
    with pytest.raises(UserError, match="rounds of other settings(.|\n)*files.train.py: "):
        rounds(TRAIN)
    with pytest.raises(UserError, match="round 1 words: the stage failed(.|\n)*no memory\n  remedy"):
        rounds(TRAIN, out="others")
    (tiny / "train.py").write_text("pass")
    with pytest.raises(UserError, match="ended without a model"):
        rounds(TRAIN, out="more")


def test_the_projects_of_rounds_keep_mixtures_that_name_their_policies(project):
    mixtures = {"one": {"words": 0.7, "letters": 0.3}, "two": {"words": 0.2, "letters": 0.8}}
    with open("rewarded-lines.yaml", "a") as file:
        file.write(f"mixtures: {mixtures}\n")
    for names, kept in (("one", "two"), mixtures), (("one", "three"), {}):
        rounds([f"{name}={TRAIN}" for name in names], rounds=1, out=names[1])
        assert load_project(f"{names[1]}/round-1/rewarded-lines.yaml").config.mixtures == kept


def test_the_projects_of_rounds_keep_keys_that_have_their_usual_value(project):
    with open("rewarded-lines.yaml", "a") as file:
        file.write("  methods: {soup: {alpha: 1}, lines: null}\n")
    rounds([f"{name}={TRAIN}" for name in ("one", "two")], rounds=1, out="out")
    methods = load_project("out/round-1/rewarded-lines.yaml").config.sweep.methods
    assert methods["lines"] is None and methods["soup"].model_fields_set == {"alpha"}


def test_a_changed_file_behind_an_option_is_refused(project):
    (project / "ppo.yaml").write_text("seed: 1")
    rounds(f"{TRAIN} --config=ppo.yaml", rounds=1)
    (project / "ppo.yaml").write_text("seed: 2")
    with pytest.raises(UserError, match="files.--config=ppo.yaml: "):
        rounds(f"{TRAIN} --config=ppo.yaml", rounds=2)


def test_changed_settings_are_refused(project):
    rounds(TRAIN, rounds=1)
    for change, said in (
        ({"beta": 0.0}, "merge.beta: 1.0 → 0.0"),
        ({"ema": 0.1}, "ema: none → 0.1"),
        ({"train": f"{TRAIN} --more"}, "train.words.2: none → --more"),
        ({"train": [f"letters={TRAIN}", f"words={TRAIN}"]}, "the order of the policies"),
    ):
        with pytest.raises(UserError, match=f"rounds of other settings(.|\n)*{said}"):
            rounds(**{"train": TRAIN, "rounds": 1, **change})
    (project / "rewards.py").write_text("# Others.\n")
    with pytest.raises(UserError, match="files.rewards.py: "):
        rounds(TRAIN, rounds=1, dry_run=True)
    assert len(StandIn.trained) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "greedy"), "which a round does not have"),
        (("--method", "wise-ft"), "takes 1 policy"),
        (("--lam", "0.2,0.3,0.5"), "3 weights for 2 policies"),
        (("--eta", "0"), "--eta: out of range"),
        (("--eta", "0.5", "--alpha", "auto"), "--alpha: η does not draw back"),
        (("--score", "none.jsonl"), "--score: no such file"),
        (("--train", "words=python none.py --seed 3"), "no such file(.|\n)*none.py"),
        (("--train", "words=nowhere train.py"), "no such program"),
        (("--train", f"ACCELERATE_LOG_LEVEL=info {TRAIN}"), "set ACCELERATE_LOG_LEVEL before `rewarded-lines rounds`"),
        (("--train", f"words={TRAIN} --output_dir=x"), "each round sets this itself"),
        (("--train", TRAIN), "not one command for each policy"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(project, cli, options, said):
    answer = cli("rounds", "--train", TRAIN, *options)
    assert answer.code == 1 and re.search(said, answer.err), answer.err
    assert not StandIn.trained and not os.path.exists("rounds")


def test_two_runs_of_one_reward_and_a_moving_reference(project):
    commands = [f"{name}={TRAIN} --reward words" for name in ("one", "two")]
    (one,) = rounds(commands, rounds=1, ema=0.1, training_seed=7, method="slerp", at_once=2)
    assert list(one.policies) == ["one", "two"] and [given["seed"] for given in StandIn.trained] == ["7", "8"]
    assert StandIn.trained[1].items() >= {
        "reward": "words", "policy_name": "two", "ref_model_mixup_alpha": "0.1", "sync_ref_model": "true",
    }.items()  # fmt: skip


def test_the_table_keeps_a_rewards_name_whole(tmp_path, monkeypatch):
    scores = {"lr=1,seed=0": {"value": 0.5, "low": 0.0, "high": 1.0}}
    monkeypatch.setattr(verb, "_scores", lambda plan, finished: {0: scores})
    verb._write_state(SimpleNamespace(out=tmp_path, settings={}), None)
    header, row = csv.reader((tmp_path / "rounds.csv").open())
    assert header == ["round", *(f"lr=1,seed=0{end}" for end in ("", "_low", "_high"))] and row == [
        "0",
        "0.5",
        "0.0",
        "1.0",
    ]


def test_the_verb_and_its_command_have_the_same_options():
    ours, typed = inspect.signature(rounds).parameters, inspect.signature(typed_rounds).parameters
    assert typed.keys() - ours.keys() == {
        "as_json",
        "quiet",
        *(name for row in METHODS.values() for name in row.options),
    }
    assert ours.keys() - typed.keys() == {"options", "progress"}
    assert {name: ours[name].default for name in ours.keys() & typed.keys()} == {
        name: default if not isinstance(default := typed[name].default, Path) else str(default)
        for name in ours.keys() & typed.keys()
    }


@pytest.fixture
def small_ppo(tmp_path, monkeypatch):
    """A project with a tiny SFT model as the working directory; returns the command that trains by the real recipe."""
    from small_recipes import CONFIGS, ROOT, SMALL, make_project

    monkeypatch.chdir(make_project(tmp_path))
    moved = (CONFIGS / "ppo.yaml").read_text().replace("runs/demo/", "").replace("output_dir: policies/positive\n", "")
    Path("ppo.yaml").write_text(moved)
    options = {key: value for key, value in SMALL["ppo"].items() if key != "reward"} | {"disable_tqdm": "true"}
    words = " ".join(f"--{key} {value}" for key, value in options.items())
    return f"vowels=accelerate launch --cpu {ROOT}/recipes/ppo.py --config ppo.yaml {words}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_recipe_goes_on_from_a_checkpoint_to_the_same_model(small_ppo):
    train = f"{small_ppo} --save_strategy steps --save_steps 1"
    command = [*COMMAND, "rounds", "--train", train, "--rounds", "1", "--ema", "0.2"]
    child = subprocess.Popen([*command, "--out", "killed"], env=ENVIRONMENT)
    while not Path("killed/round-1/policies/vowels.unfinished/checkpoint-8/trainer_state.json").exists():
        assert child.poll() is None
        time.sleep(0.01)
    child.kill()
    child.wait()
    for out in ("killed", "whole"):
        subprocess.run([*command, "--out", out], env=ENVIRONMENT, check=True)
    assert "going on from" in Path("killed/logs/round-1-vowels.log").read_text()
    first, second, start = (weights(one) for one in ("killed/round-1/merged", "whole/round-1/merged", "sft"))
    assert all(np.array_equal(first[key], second[key]) for key in first)
    assert any(not np.array_equal(first[key], start[key]) for key in first)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_adapters_of_the_real_recipe_are_measured_after_each_round(small_ppo, cli):
    options = ("--rounds", 2, "--score", "data/validation.jsonl", "--engine", "hf")
    answer = cli("rounds", "--train", f"{small_ppo} --use_peft true", *options)
    assert answer.code == 0 and "KL to SFT" in answer.out, answer.err
    lines = Path("rounds/rounds.csv").read_text().splitlines()
    assert len(lines) == 4 and lines[0].startswith("round,detailed,detailed_low,detailed_high,vowels,")
    assert Path("rounds/round-2/policies/vowels/adapter_config.json").is_file()
    project = load_project("rounds/round-2/rewarded-lines.yaml")
    assert project.config.base == "../round-1/merged" and project.config.policies == {"vowels": "policies/vowels"}
    assert cli("merge", "--config", "rounds/round-2/rewarded-lines.yaml", "--out", "adapter").code == 0
