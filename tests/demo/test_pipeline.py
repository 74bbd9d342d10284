"""The whole pipeline in miniature, through the command line: a user's corpus, recipes, sweep, report, merge.

The quick test runs the recipes in this process. The slow one starts them as users do; each imports torch and TRL.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from small_recipes import load_recipe

from rewarded_lines.demo import pipeline
from rewarded_lines.demo.demo_settings import DemoSettings
from rewarded_lines.demo.parts import parts_of
from rewarded_lines.evaluator.records import load_run
from rewarded_lines.pipelines.recipe_jobs import RecipeJobs

ROOT = Path(__file__).parents[2]
# What makes each demo config small; everything else in it stays as it is.
SMALLER = {
    "sft": {"vocab_size": 300, "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "max_steps": 3},
    "reward": {"max_steps": 2},
    "ppo": {
        "total_episodes": 16,
        "effective_batch_size": 8,
        "per_device_train_batch_size": 8,
        "response_length": 8,
        "validation_limit": 8,
    },
    "dpo": {"max_steps": 2, "train_limit": 12, "validation_limit": 8},
}
COMMAND = [sys.executable, "-c", "from rewarded_lines.cli import main; main()", "demo"]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """A corpus of nonsense reviews, the demo's configs made small, and the suite with short responses."""
    folder = tmp_path_factory.mktemp("miniature")
    words = "good bad film plot long short dull bright actor scene music end start fine".split()
    draw = random.Random(0)
    reviews = [" ".join(draw.choices(words, k=draw.randint(6, 14))) for _ in range(48)]
    rows = [{"prompt": " ".join(r.split()[:3]), "completion": " " + " ".join(r.split()[3:])} for r in reviews]
    pairs = [{"prompt": "", "chosen": a, "rejected": b} for a, b in zip(reviews[::2], reviews[1::2], strict=True)]
    (folder / "corpus").mkdir()
    for split in ("train", "validation", "test"):
        write_rows(folder / f"corpus/{split}.jsonl", rows)
        write_rows(folder / f"corpus/pairs-{split}.jsonl", pairs)
    shutil.copytree(ROOT / "recipes/configs/demo", folder / "configs")
    for recipe, smaller in SMALLER.items():
        path = folder / f"configs/{recipe}.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **smaller}, sort_keys=False))
    suite = yaml.safe_load((ROOT / "eval/suites/movie_reviews.yaml").read_text())
    suite["generation"]["max_tokens"] = 8
    suite["prompts"]["limit"] = 8
    suite["sweep"]["points"] = 3
    # In addition: a reward without a policy, and functions in more files.
    suite["rewards"]["plain"] = {"function": "further/plain.py:plain", "role": "audit"}
    suite["control"]["rows"] = "further/rows.py:whole"
    (folder / "suite").mkdir()
    (folder / "suite/suite.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    shutil.copy(ROOT / "eval/suites/movie_rewards.py", folder / "suite")
    (folder / "suite/further").mkdir()
    (folder / "suite/further/plain.py").write_text("def plain(prompts, responses):\n    return [0.0] * len(prompts)\n")
    shutil.copy(ROOT / "eval/suites/movie_rewards.py", folder / "suite/further/rows.py")
    return folder


def arguments(miniature, out, *more):
    own = ("--configs", miniature / "configs", "--corpus", miniature / "corpus")
    return [*COMMAND, *map(str, own), "--suite", str(miniature / "suite/suite.yaml"), "--out", str(out), *more]


# A file that says that a stage is at work, and the parts that are finished then.
SIGNS = {
    "sft": ("logs/sft.jsonl", {"data"}),
    "reward": ("logs/reward.jsonl", {"data", "sft"}),
    "policies": ("logs/ppo-positive.jsonl", {"data", "sft", "reward"}),
    "sweep": ("sweep/points/*", {"data", "sft", "reward", "ppo positive", "ppo detailed"}),
}


class InThisProcess(RecipeJobs):
    """Runs the recipes in this process."""

    def prepare(self, commands):
        """Start nothing."""

    def run(self, commands, watch):
        """Run the recipes, one after the other."""
        for command in commands.values():
            script = next(at for at, word in enumerate(command) if word.endswith(".py"))
            load_recipe(Path(command[script]).stem).main(list(command[script + 1 :]))


def finished(out):
    """Return the finished parts in the run's `demo.json`."""
    return set(json.loads((out / "demo.json").read_text()))


def check_whole(out, engine):
    run = load_run(out / "sweep")
    assert len(run.points) == 13 and run.header["complete"] and run.header["options"]["engine"] == engine
    assert list(run.rewards) == ["positive", "detailed", "plain"] and run.objectives == ["positive", "detailed"]
    assert (out / "sweep/report/front.png").stat().st_size > 10_000
    assert json.loads((out / "merged/lam=0.50/merge.json").read_text())["weights"] == {
        "positive": 0.5,
        "detailed": 0.5,
    }
    for name in ("positive", "detailed"):
        training = json.loads((out / f"policies/{name}/training.json").read_text())
        assert training["reward"] == name and len(training["base_hash"]) == 64


@pytest.mark.slow
def test_ended_and_started_again_it_ends_whole(miniature, tmp_path, cli, monkeypatch):
    class Ended(BaseException):
        """Ends the process as a signal does."""

    class UntilTheSecondPolicy(InThisProcess):
        def run(self, commands, watch):
            super().run(dict(list(commands.items())[:1]), watch)
            if len(commands) > 1:
                raise Ended

    class Nothing(InThisProcess):
        def run(self, commands, watch):
            assert not commands

    out = tmp_path / "run"
    words = arguments(miniature, out, "--engine", "hf")[3:]
    monkeypatch.setattr(pipeline, "RecipeJobs", UntilTheSecondPolicy)
    with pytest.raises(Ended):
        cli(*words)
    assert finished(out) == SIGNS["policies"][1] and (out / "policies/positive/model.safetensors").is_file()
    kept = (out / "sft/model.safetensors").stat().st_mtime_ns

    monkeypatch.setattr(pipeline, "RecipeJobs", InThisProcess)
    answer = cli(*words)
    assert answer.code == 0 and answer.out.count("done by an earlier run") == 3 and "pipeline" in answer.out
    assert (out / "sft/model.safetensors").stat().st_mtime_ns == kept
    check_whole(out, "hf")
    monkeypatch.setattr(pipeline, "RecipeJobs", Nothing)
    again = cli(*words)
    assert again.code == 0 and again.out.count("done by an earlier run") == 7


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_anywhere_and_started_again_it_ends_whole(miniature, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
    out = tmp_path / "run"
    for sign, parts in SIGNS.values():
        child = subprocess.Popen(arguments(miniature, out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        wait_for(lambda sign=sign: any(out.glob(sign)), child)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert finished(out) == parts
        # The recipe dies with the killed pipeline, so no process writes into the folder.
        wait_for(lambda: not running(str(out)), None)
    kept = (out / "sft/model.safetensors").stat().st_mtime_ns

    done = subprocess.run(arguments(miniature, out), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done by an earlier run" in done.stdout and "pipeline" in done.stdout
    assert (out / "sft/model.safetensors").stat().st_mtime_ns == kept
    check_whole(out, "vllm")

    started = time.monotonic()
    again = subprocess.run(arguments(miniature, out), capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("done by an earlier run") == 7
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_a_failing_stage_shows_its_log_and_leaves_nothing(miniature, tmp_path):
    configs = tmp_path / "configs"
    shutil.copytree(miniature / "configs", configs)
    text = (configs / "sft.yaml").read_text().replace("vocab_size", "vocab_sise")
    (configs / "sft.yaml").write_text(text)
    out = tmp_path / "run"
    command = [*arguments(miniature, out), "--configs", str(configs)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "did you mean `vocab_size`?" in done.stderr and "sft.log" in done.stderr
    assert not (out / "sft").exists()


def test_two_at_once_are_kept_apart(miniature, tmp_path, cli):
    from rewarded_lines.folders import folder_lock

    out = tmp_path / "run"
    out.mkdir()
    with folder_lock(out):
        answer = cli(*arguments(miniature, out)[3:])
    assert answer.code == 1 and "another process is at work" in answer.err


def running(text):
    """Return the processes with `text` in their command line."""
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    return [line for line in lines if text.encode() in line]


def wait_for(condition, child, seconds=150):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        assert child is None or child.poll() is None, child.stdout.read()
        time.sleep(0.05)


def test_a_change_of_what_the_suite_extends_is_a_change_of_the_suite(tmp_path):
    suite, under = tmp_path / "suite.yaml", tmp_path / "under.yaml"
    suite.write_text("extends: under.yaml\n")

    def made_from(text):
        under.write_text(text)
        (part,) = parts_of("data", DemoSettings(out=tmp_path / "out", suite=suite), "")
        return part.made_from

    first = made_from("prompts: {file: test.jsonl, limit: 4}\n")
    assert made_from("# a remark\nprompts: {file: test.jsonl, limit: 4}\n") == first
    assert made_from("prompts: {file: test.jsonl, limit: 5}\n") != first
