"""Every recipe, from its demo config to a model on disk, on a toy corpus with a model of two blocks."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from safetensors import safe_open

from rewarded_lines.checkpoints.hashing import weights_hash
from rewarded_lines.errors import UserError

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs" / "demo"
GOOD = ["a warm and funny film about a small town", "one of the best films of the year so far"]
BAD = ["a dull and lifeless film about very little", "one of the worst films of the year by far"]
PROJECT = {
    "base": "sft",
    "rewards": {
        "positive": {"model": "rewards/positive"},
        "detailed": {"function": "movie_rewards.py:detailed"},
        "constant": {"function": "constant.py:constant"},
    },
}
SMALL = {
    "vocab_size": 320,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
}


def load_recipe(name):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(name, folder, **overrides):
    """Run a recipe on its demo config with `overrides` and everything else in `folder`."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    moved = {
        key: value.replace("runs/demo", str(folder))
        for key, value in config.items()
        if isinstance(value, str) and value.startswith("runs/demo")
    }
    options = moved | {"disable_tqdm": True} | overrides
    words = [f"--{key}={str(value).lower() if value is True else value}" for key, value in options.items()]
    load_recipe(name).main(["--config", str(CONFIGS / f"{name}.yaml"), *words])


def write_rows(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tensors(folder):
    """Names, shapes and types of the weights in a model folder."""
    found = {}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():
            tensor = file.get_slice(name)
            found[name] = (tuple(tensor.get_shape()), tensor.get_dtype())
    return found


def record(folder):
    return json.loads((folder / "training.json").read_text())


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A project with an SFT model and a reward model, both made by their recipes."""
    folder = tmp_path_factory.mktemp("work")
    rows = [
        {"prompt": " ".join(text.split()[:3]), "completion": text[len(" ".join(text.split()[:3])) :]}
        for text in (GOOD + BAD) * 16
    ]
    pairs = [{"prompt": "", "chosen": good, "rejected": bad} for good in GOOD for bad in BAD] * 16
    for split in ("train", "validation"):
        write_rows(folder / "data" / f"{split}.jsonl", rows)
    for split in ("train", "test"):
        write_rows(folder / "data" / f"pairs-{split}.jsonl", pairs)
    (folder / "rewarded-lines.yaml").write_text(yaml.safe_dump(PROJECT))
    shutil.copy(ROOT / "eval" / "suites" / "movie_rewards.py", folder)
    (folder / "constant.py").write_text("def constant(prompts, responses):\n    return [1.0] * len(prompts)\n")
    run("sft", folder, **SMALL, num_train_epochs=12, per_device_train_batch_size=32)
    run("reward", folder, num_train_epochs=6)
    return folder


def test_sft_leaves_a_model_and_its_record(work):
    assert {"config.json", "metrics.jsonl", "model.safetensors", "tokenizer.json", "training.json"} <= {
        path.name for path in (work / "sft").iterdir()
    }
    assert not (work / "sft" / "training_args.bin").exists()
    metrics = record(work / "sft")["metrics"]
    assert metrics["validation_perplexity"] < 100
    lines = [json.loads(line) for line in (work / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 0 and lines[-1]["step"] == lines[-1]["max_steps"] == 24


def test_sft_fine_tunes_an_existing_model(work):
    run("sft", work, model=work / "sft", output_dir=work / "sft-again", max_steps=1)
    assert record(work / "sft-again")["base_hash"] == weights_hash(work / "sft")
    assert tensors(work / "sft-again") == tensors(work / "sft")


def test_the_reward_model_tells_good_from_bad(work):
    metrics = record(work / "rewards" / "positive")["metrics"]
    low, high = metrics["accuracy_interval"]
    assert low <= metrics["accuracy"] <= high and metrics["accuracy"] > 0.9
    assert metrics["mean_chosen"] > metrics["mean_rejected"]


@pytest.mark.parametrize("reward", ["positive", "detailed"])
def test_ppo_leaves_a_policy_with_the_base_models_tensors(work, reward):
    policy = work / "policies" / reward
    run(
        "ppo",
        work,
        reward=reward,
        output_dir=policy,
        total_episodes=32,
        validation_prompts=16,
        per_device_train_batch_size=16,
        local_rollout_forward_batch_size=16,
        response_length=8,
    )
    assert tensors(policy) == tensors(work / "sft")
    assert weights_hash(policy) != weights_hash(work / "sft")
    made = record(policy)
    assert made["base_hash"] == weights_hash(work / "sft") and made["reward"] == reward
    assert made["metrics"]["gain"] == pytest.approx(made["metrics"]["after"] - made["metrics"]["before"])
    assert (policy / "tokenizer.json").read_text() == (work / "sft" / "tokenizer.json").read_text()
    assert not list((work / "policies").glob(".*"))


def test_ppo_refuses_a_reward_that_teaches_nothing(work):
    with pytest.raises(UserError, match="`constant`: every response(.|\n)*same score"):
        run("ppo", work, reward="constant", output_dir=work / "policies" / "constant")
    with pytest.raises(UserError, match="did you mean `positive`"):
        run("ppo", work, reward="positve", output_dir=work / "policies" / "typo")
    assert not (work / "policies" / "constant").exists()


def test_dpo_keeps_its_pairs_and_leaves_a_policy(work):
    policy = work / "policies-dpo" / "detailed"
    run(
        "dpo",
        work,
        reward="detailed",
        output_dir=policy,
        train_prompts=16,
        responses=4,
        margin=0.1,
        validation_prompts=16,
        max_response_tokens=8,
        max_steps=2,
    )
    pairs = pq.read_table(policy / "pairs.parquet").to_pylist()
    assert pairs and all(pair["chosen_score"] > pair["rejected_score"] for pair in pairs)
    assert all(len(pair["chosen"].split()) == pair["chosen_score"] for pair in pairs)
    assert tensors(policy) == tensors(work / "sft")
    assert record(policy)["base_hash"] == weights_hash(work / "sft")


def test_dpo_says_when_no_responses_differ(work):
    with pytest.raises(UserError, match="lower `margin`"):
        run("dpo", work, reward="detailed", output_dir=work / "none", train_prompts=4, responses=2, margin=99)


def test_an_existing_output_is_refused_before_anything_is_loaded(work):
    for name in ("sft", "reward", "ppo", "dpo"):
        with pytest.raises(UserError, match="--overwrite true"):
            run(
                name,
                work,
                output_dir=work / "data",
                **{"project_file": "nowhere"} if name[1:] == "po" else {},
            )


def test_a_typo_in_a_config_is_refused_with_the_nearest_key(work):
    with pytest.raises(UserError, match="did you mean `learning_rate`"):
        run("ppo", work, learning_rat=1)
