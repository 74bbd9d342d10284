"""A recipe that is ended in the middle and started again has the weights and metrics of one that was not."""

import json
import time

import pytest
from small_recipes import PROJECT, record, run, start, words_for

from rewarded_lines.checkpoints.hashing import weights_hash
from rewarded_lines.errors import UserError
from rewarded_lines.training.training_record import MetricsCallback, last_checkpoint

OUTPUT = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
# Steps of the optimizer in an update: two passes over two mini-batches.
STEPS = {"ppo": 4}
# Times, and TRL's count of tokens, which begins anew when a run is resumed.
ELSE = ("num_tokens", "seconds", "eps", "step_time")


class Ended(BaseException):
    """What a signal would do."""


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if "loss" in line or "objective/kl" in line]
    return [{key: value for key, value in line.items() if key not in ELSE} for line in kept]


def end_at(step, monkeypatch):
    log = MetricsCallback.on_log

    def on_log(self, args, state, control, logs=None, **more):
        if state.global_step == step:
            raise Ended
        log(self, args, state, control, logs=logs, **more)

    monkeypatch.setattr(MetricsCallback, "on_log", on_log)


@pytest.mark.parametrize(
    ("name", "lora"),
    # TRL's trainers save alike, offline and online; PPO's is ours, and has a test of its trainer with adapters.
    [
        *((name, False) for name in ("grpo", "ppo")),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("sft", "reward", "dpo", "rloo")),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("sft", "grpo", "ppo")),
    ],
)
def test_ended_and_started_again(work, name, lora, monkeypatch, capsys):
    more = OUTPUT | ({"use_peft": True, "lora_dropout": 0.1} if lora else {})
    run(name, work, output_dir=work / "whole", **more)
    with monkeypatch.context() as patch, pytest.raises(Ended):
        end_at(3 * STEPS.get(name, 1), patch)
        run(name, work, output_dir=work / "ended", **more)
    checkpoint = work / "ended.unfinished" / f"checkpoint-{2 * STEPS.get(name, 1)}"
    assert not (work / "ended").exists() and checkpoint.is_dir()

    with pytest.raises(UserError, match="another run is there(.|\n)*learning_rate(.|\n)*--overwrite true"):
        run(name, work, output_dir=work / "ended", **more, learning_rate=0.5)
    capsys.readouterr()
    run(name, work, output_dir=work / "ended", **more)
    assert "going on from" in capsys.readouterr().out
    assert weights_hash(work / "ended") == weights_hash(work / "whole")
    assert metrics(work / "ended") == metrics(work / "whole")
    first, second = (record(work / folder)["metrics"] for folder in ("whole", "ended"))
    assert first.get("gain") == second.get("gain") and first.get("accuracy") == second.get("accuracy")

    # As if it had been killed between its last two steps: the model is there, the project does not know it.
    (work / "rewarded-lines.yaml").write_text(PROJECT)
    run(name, work, output_dir=work / "ended", **more)
    assert "finished already" in capsys.readouterr().out
    assert ": ended\n" in (work / "rewarded-lines.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "more", "end", "kept"),
    [
        pytest.param(
            "grpo",
            {"num_iterations": 2, "max_steps": 6},
            4,
            2,
            id="checkpoints wait for a round's end",
            marks=pytest.mark.slow,
        ),
        # A round has two batches, and an update three: every second update ends a round.
        pytest.param(
            "grpo",
            {
                "per_device_train_batch_size": 4,
                "effective_batch_size": 12,
                "steps_per_generation": 2,
                "max_steps": 4,
            },
            4,
            2,
            id="rounds that end inside an update",
        ),
        pytest.param("rloo", {"train_limit": 4, "max_steps": 6}, 6, 5, id="in the third epoch"),
    ],
)
def test_rounds_and_epochs_of_online_trainers(work, monkeypatch, name, more, end, kept):
    more = OUTPUT | more
    run(name, work, output_dir=work / "whole", **more)
    with monkeypatch.context() as patch, pytest.raises(Ended):
        end_at(end, patch)
        run(name, work, output_dir=work / "ended", **more)
    assert last_checkpoint(work / "ended.unfinished").endswith(f"checkpoint-{kept}")
    run(name, work, output_dir=work / "ended", **more)
    assert weights_hash(work / "ended") == weights_hash(work / "whole")
    assert metrics(work / "ended") == metrics(work / "whole")


@pytest.mark.slow
def test_killed_and_started_again(work):
    more = OUTPUT | {"total_episodes": 64}
    run("ppo", work, output_dir=work / "whole", **more)
    words = words_for("ppo", work, output_dir=work / "ended", **more)
    child = start("ppo", words, work / "log")
    sign, deadline = work / "ended.unfinished" / "checkpoint-12" / "trainer_state.json", time.monotonic() + 120
    while not sign.is_file():
        assert child.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    child.kill()
    child.join()
    assert not (work / "ended").exists()
    run("ppo", work, output_dir=work / "ended", **more)
    assert weights_hash(work / "ended") == weights_hash(work / "whole")
    assert metrics(work / "ended") == metrics(work / "whole")
    assert not list(work.glob(".*")) and not (work / "ended.unfinished").exists()
