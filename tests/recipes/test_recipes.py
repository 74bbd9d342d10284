"""Every recipe, from its demo config to a model on disk that the project knows and the merger takes."""

import json
import math

import pyarrow.parquet as pq
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from small_recipes import POLICIES, PROJECT, ROOT, load_recipe, record, run, start, words_for
from tiny_models import make_model, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rewarded_lines import merge
from rewarded_lines.checkpoints.hashing import weights_hash
from rewarded_lines.errors import UserError
from rewarded_lines.projects import load_project

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


ABSTAINS = """

every = vowels


def vowels(prompts, responses):
    found = zip(prompts, every(prompts, responses), strict=True)
    return [None if prompt.startswith("a dull") else score for prompt, score in found]
"""


def tensors(folder):
    """Names, shapes and types of the weights in a model folder."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {
            name: (tuple(file.get_slice(name).get_shape()), file.get_slice(name).get_dtype()) for name in file.keys()
        }


def project(work):
    return load_project(work / "rewarded-lines.yaml").config


def test_sft_from_nothing_leaves_a_model_its_record_and_the_projects_base(work):
    shape = {"vocab_size": 320, "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2}
    (work / "rewarded-lines.yaml").unlink()
    start = {"model_name_or_path": "null", "output_dir": work / "new", "max_steps": 12, "report_to": "tensorboard"}
    words = [word for word in words_for("sft", work, **shape, **start) if word != "--model_name_or_path=null"]
    load_recipe("sft").main(words)
    names = {path.name for path in (work / "new").iterdir()}
    assert {"config.json", "metrics.jsonl", "model.safetensors", "tokenizer.json", "training.json", "runs"} <= names
    assert not names & {"training_args.bin", "adapter"} and not (work / "new.unfinished").exists()
    assert any((work / "new" / "runs").rglob("events.out.tfevents*"))
    made = record(work / "new")
    assert made["complete"] and made["metrics"]["validation_perplexity"] < 320 and made["seed"] == 0
    ends = json.loads((work / "new" / "generation_config.json").read_text())
    # transformers 5.17 writes a list.
    assert (ends["bos_token_id"], ends["pad_token_id"]) == (1, 0) and ends["eos_token_id"] in (2, [2])
    assert {"torch", "transformers", "trl"} <= made["versions"].keys()
    assert made["config"]["SFTConfig"]["learning_rate"] == 4e-3 and made["config"]["ScratchModel"]["vocab_size"] == 320
    lines = [json.loads(line) for line in (work / "new" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 0 and lines[-1]["step"] == lines[-1]["max_steps"] == 12
    assert project(work).base == "new"


def test_sft_fine_tunes_on_completions_only_with_a_chat_template(work):
    (work / "sft" / "chat_template.jinja").write_text(TEMPLATE)
    seen = []
    recipe = load_recipe("sft")
    build = recipe.SFTTrainer
    recipe.SFTTrainer = lambda **parts: seen.append(build(**parts)) or seen[-1]
    recipe.main(
        words_for("sft", work, chat=True, system_prompt="be brief", completion_only_loss=True, output_dir=work / "chat")
    )
    (trainer,) = seen
    batch = trainer.data_collator([trainer.train_dataset[0]])
    learned = batch["input_ids"][batch["labels"] != -100]
    text = trainer.processing_class.decode(batch["input_ids"][0], skip_special_tokens=False)
    assert text.startswith("[system]be brief</s>[user]a warm and</s>[assistant]")
    answer = trainer.processing_class.decode(learned, skip_special_tokens=False)
    assert answer.endswith("funny film about a small town</s>") and "warm" not in answer
    assert record(work / "chat")["base_hash"] == weights_hash(work / "sft")
    assert tensors(work / "chat") == tensors(work / "sft")


def test_lora_sft_is_folded_into_a_whole_model(work):
    run("sft", work, use_peft=True, lora_r=4, learning_rate=1e-2, output_dir=work / "folded")
    assert tensors(work / "folded") == tensors(work / "sft")
    assert weights_hash(work / "folded") != weights_hash(work / "sft")
    assert not (work / "folded" / "adapter").exists()
    assert (work / "folded" / "tokenizer.json").read_bytes() == (work / "sft" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_reward_model_learns_and_joins_the_project(work, lora):
    more = {"use_peft": True, "learning_rate": 5e-3} if lora else {}
    grouped = {"train_sampling_strategy": "group_by_length"}
    run("reward", work, max_steps=24, template="Review: {prompt}{response}", **grouped, **more)
    metrics = record(work / "rewards" / "positive")["metrics"]
    low, high = metrics["accuracy_interval"]
    assert low <= metrics["accuracy"] <= high and metrics["accuracy"] > 0.9
    assert metrics["mean_chosen"] > metrics["mean_rejected"]
    spec = project(work).rewards["positive"]
    assert (spec.model, spec.template) == ("rewards/positive", "Review: {prompt}{response}")


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        *(pytest.param(name, False, id=f"{name}-full") for name in POLICIES),
        # All keep adapters by the same code, and GRPO and RLOO are alike.
        *(pytest.param(name, True, id=f"{name}-lora") for name in ("ppo", "dpo")),
        *(pytest.param(name, True, id=f"{name}-lora", marks=pytest.mark.slow) for name in ("rloo", "grpo")),
    ],
)
def test_a_policy_joins_the_project_and_merges(work, name, lora, monkeypatch):
    policy = work / "policies" / "vowels"
    more = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2} if lora else {}
    run(name, work, output_dir=policy, **more)
    made = record(policy)
    assert made["base_hash"] == weights_hash(work / "sft") and made["reward"] == "vowels"
    assert made["metrics"]["gain"] == pytest.approx(made["metrics"]["after"] - made["metrics"]["before"])
    assert made["standardized"]["vowels"]["deviation"] > 0
    assert (policy / "tokenizer.json").read_text() == (work / "sft" / "tokenizer.json").read_text()
    assert {path.name for path in policy.parent.iterdir()} <= {"vowels", "vowels.pairs.parquet", "samples.parquet"}
    assert project(work).policies == {"vowels": "policies/vowels"}
    assert (work / "rewarded-lines.yaml").read_text().startswith("# What the user wrote stays.")
    ids = torch.tensor([[5, 6, 7, 8]])
    if lora:
        assert json.loads((policy / "adapter_config.json").read_text())["base_model_name_or_path"] == str(work / "sft")
        tuned = AutoPeftModelForCausalLM.from_pretrained(policy)
    else:
        assert tensors(policy) == tensors(work / "sft")
        tuned = AutoModelForCausalLM.from_pretrained(policy)
    base = AutoModelForCausalLM.from_pretrained(work / "sft")
    with torch.no_grad():
        assert not torch.allclose(tuned(input_ids=ids).logits, base(input_ids=ids).logits, atol=1e-4)
    merge(work / "sft", {"vowels": policy}, 1.0, beta=0.0, out=work / "merged")
    with torch.no_grad():
        kind = AutoPeftModelForCausalLM if lora else AutoModelForCausalLM
        merged = kind.from_pretrained(work / "merged")(input_ids=ids).logits
        assert torch.allclose(merged, tuned(input_ids=ids).logits, atol=1e-5)


def test_a_model_that_is_named_becomes_the_base_of_a_project_without_one(work):
    (work / "rewarded-lines.yaml").write_text(PROJECT.replace("base: sft\n", ""))
    run("rloo", work, model_name_or_path=work / "sft", output_dir=work / "policy")
    assert project(work).base == "sft" and project(work).policies == {"vowels": "policy"}


def test_sft_from_scratch_takes_texts_and_refuses_chats(work):
    texts = work / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"text": f"a film of great beauty and of {at} dogs"}) + "\n" for at in range(8))
    )
    scratch = {"model_name_or_path": "null", "validation_file": "null", "train_file": texts}
    run("sft", work, **scratch, vocab_size=300, completion_only_loss="false", output_dir=work / "new")
    assert "film" in AutoTokenizer.from_pretrained(work / "new").decode([*range(260, 300)]).replace(" ", "")
    texts.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    with pytest.raises(UserError, match="knows no chat template"):
        run("sft", work, **scratch, output_dir=work / "none")


def test_sft_makes_policies_of_one_base(work):
    """Several skills can be merged; a policy of another base, or of none, could not."""
    (work / "rewarded-lines.yaml").unlink()
    for name in ("one", "two"):
        run("sft", work, model_name_or_path=work / "sft", policy_name=name, output_dir=work / name)
    assert (project(work).base, project(work).policies) == ("sft", {"one": "one", "two": "two"})
    merge(work / "sft", {name: work / name for name in ("one", "two")}, 0.5, out=work / "merged")
    save_model(make_model(1), work / "other")
    with pytest.raises(UserError, match="the project has another base"):
        run("sft", work, model_name_or_path=work / "other", policy_name="three", output_dir=work / "none")
    with pytest.raises(UserError, match="a policy starts from a base"):
        run("sft", work, model_name_or_path="null", policy_name="three", output_dir=work / "none")
    assert not (work / "none").exists()


@pytest.mark.parametrize(
    ("name", "more"), [("rloo", {}), ("grpo", {}), ("grpo", {"multi_objective_aggregation": "normalize_then_sum"})]
)
def test_a_weighted_sum_is_a_baseline(work, name, more):
    words = [word for word in words_for(name, work, **more) if not word.startswith("--reward=")]
    config = work / f"{name}.yaml"
    text = (ROOT / f"recipes/configs/demo/{name}.yaml").read_text().replace("reward: positive\n", "")
    config.write_text(text + "rewards: {vowels: 0.5, detailed: 0.5}\n")
    load_recipe(name).main(["--config", str(config), *words[2:], f"--output_dir={work / 'morl'}"])
    assert project(work).baselines == {"0.5-vowels+0.5-detailed": "morl"} and project(work).policies == {}
    made = record(work / "morl")
    assert made["weights"] == {"vowels": 0.5, "detailed": 0.5}
    assert set(made["metrics"]["rewards"]) == set(made["standardized"]) == {"vowels", "detailed"}
    lines = [json.loads(line) for line in (work / "morl" / "metrics.jsonl").read_text().splitlines()]
    kinds = ("vowels", "detailed", "missing_eos_penalty")
    for line in (line for line in lines if "reward" in line):
        parts = [weight * line[f"rewards/{kind}/mean"] for kind, weight in zip(kinds, (0.5, 0.5, 1.0), strict=True)]
        assert line["reward"] == pytest.approx(sum(parts), abs=1e-5)


def test_dpo_keeps_its_pairs_and_uses_them_again(work, capsys):
    kept = work / "pairs.parquet"
    plain = {"reward": "detailed", "pairs_file": kept, "normalize_rewards": "false"}
    plain |= {"train_sampling_strategy": "group_by_length"}
    run("dpo", work, output_dir=work / "first", **plain)
    pairs = pq.read_table(kept).to_pylist()
    assert pairs and all(pair["chosen_score"] > pair["rejected_score"] for pair in pairs)
    assert all(len(pair["chosen"].split()) == pair["chosen_score"] for pair in pairs)
    made = kept.stat().st_mtime_ns
    run("dpo", work, output_dir=work / "second", beta=0.5, **plain)
    assert kept.stat().st_mtime_ns == made and "pairs found in" in capsys.readouterr().out
    run("dpo", work, output_dir=work / "third", **plain | {"reward": "vowels"})
    assert kept.stat().st_mtime_ns != made


def test_dpo_samples_once_for_all_rewards(work, capsys):
    run("dpo", work, reward="detailed", output_dir=work / "policies" / "detailed")
    sampled = pq.read_table(work / "policies" / "samples.parquet").to_pylist()
    made = (work / "policies" / "samples.parquet").stat().st_mtime_ns
    run("dpo", work, reward="vowels", output_dir=work / "policies" / "vowels")
    assert f"{len(sampled)} responses found in" in capsys.readouterr().out
    texts = {(row["prompt"], row["response"]) for row in sampled}
    for name in ("detailed", "vowels"):
        pairs = pq.read_table(work / "policies" / f"{name}.pairs.parquet").to_pylist()
        assert pairs and all((pair["prompt"], pair[side]) in texts for pair in pairs for side in ("chosen", "rejected"))
    run("dpo", work, reward="detailed", output_dir=work / "policies" / "other", seed=1)
    assert (work / "policies" / "samples.parquet").stat().st_mtime_ns != made


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_dpo_trains_on_given_pairs(work, chat):
    (work / "sft" / "chat_template.jinja").write_text(TEMPLATE)
    seen = []
    recipe = load_recipe("dpo")
    build = recipe.TokenDPOTrainer
    recipe.TokenDPOTrainer = lambda **parts: seen.append(parts) or build(**parts)
    files = {"train_file": work / "data" / "pairs-whole.jsonl", "output_dir": work / "given"}
    more = {"chat": True, "system_prompt": "be kind"} if chat else {}
    recipe.main(words_for("dpo", work, pairs="given", reward="detailed", **files, **more))
    assert record(work / "given")["metrics"]["pairs"] == 16
    ((row, decode),) = [(parts["train_dataset"][0], parts["processing_class"].decode) for parts in seen]
    prompt, chosen, rejected = (decode(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))
    if chat:
        assert prompt == "[system]be kind</s>[user]this is a</s>[assistant]"
        assert chosen == " warm and funny film about a small town</s>"
    else:
        assert (prompt, rejected) == ("this is a", " dull and lifeless film about very little</s>")


@pytest.fixture
def abstains(work):
    """Let the reward `vowels` return None for the prompts that begin "a dull", a quarter of all."""
    with (work / "rewards.py").open("a") as file:
        file.write(ABSTAINS)


@pytest.mark.parametrize("name", ["rloo", pytest.param("grpo", marks=pytest.mark.slow), "ppo", "dpo"])
def test_rows_on_which_a_reward_abstains_are_left_out_and_counted(work, abstains, capsys, name):
    run(name, work, output_dir=work / "policy")
    metrics, told = record(work / "policy")["metrics"], capsys.readouterr().out
    assert metrics["abstained"] == {"before": 2, "after": 2} and math.isfinite(metrics["gain"])
    assert "; 2 of 8 have no score" in told and "no score for 2 responses before, 2 after" in told
    if name == "dpo":
        pairs = pq.read_table(work / "policy.pairs.parquet").to_pylist()
        assert pairs and not any(pair["prompt"].startswith("a dull") for pair in pairs)
        assert "16 of 64 responses have no score, and enter no pair" in told
        return
    lines = [json.loads(line) for line in (work / "policy" / "metrics.jsonl").read_text().splitlines()]
    unscored = int(sum(line.get("unscored", 0) for line in lines))
    assert 0 < unscored < 32 and f"{unscored} of 32 training responses had no score; their advantage is 0" in told


def test_a_reward_that_scores_all_alike_trains_as_the_refusal_says(work, capsys):
    with pytest.raises(UserError, match="same score(.|\n)*`normalize_rewards: false`"):
        run("rloo", work, reward="constant", output_dir=work / "policy")
    run("rloo", work, reward="constant", output_dir=work / "policy", normalize_rewards="false", max_steps=1)
    assert record(work / "policy")["metrics"]["after"] == 1.0
    assert "reward `constant`: every response of the SFT model gets the same score, 1;" in capsys.readouterr().out


def test_pairs_that_begin_differently_or_with_nothing_are_refused(work):
    files = {"train_file": work / "data" / "pairs-train.jsonl", "output_dir": work / "given"}
    with pytest.raises(UserError, match="a prompt has no tokens"):
        run("dpo", work, pairs="given", reward="detailed", **files)
    (work / "pairs.jsonl").write_text(json.dumps({"chosen": "a film", "rejected": "the film"}) + "\n")
    with pytest.raises(UserError, match="begin differently"):
        run("dpo", work, pairs="given", reward="detailed", **files | {"train_file": work / "pairs.jsonl"})


def test_what_does_not_fit_is_told_before_anything_is_trained(work):
    save_model(LlamaForCausalLM(LlamaConfig(**make_model(0, 2).config.to_dict() | {"vocab_size": 512})), work / "other")
    for overrides, message in [
        ({"reward": "constant"}, "`constant`(.|\n)*same score"),
        ({"reward": "vowls"}, "did you mean `vowels`"),
        ({"learning_rat": 1}, "did you mean `learning_rate`"),
        ({"project_file": "nowhere.yaml"}, "no project file there"),
        ({"columns": "prompt=question"}, "no column `question`(.|\n)*prompt, completion"),
        ({"max_prompt_tokens": 1}, "8 of 8 rows are too long for the policy"),
        ({"report_to": "wandb"}, "`wandb` is not installed"),
        ({"report_to": "wandbb"}, "unknown tracker `wandbb`"),
        ({"model_name_or_path": work / "other"}, "the policy and the SFT model have different vocabularies"),
        ({"use_peft": True, "use_dora": True}, "DoRA"),
        ({"load_in_4bit": True}, "use_peft: true"),
        ({"load_in_4bit": True, "use_peft": True, "use_vllm": True}, "the base would change"),
        ({"use_vllm": True}, "TRL cannot load weights into vLLM on a CPU"),
        ({"sync_ref_model": True, "use_peft": True}, "sync_ref_model: an adapter's reference is its base"),
        ({"sync_ref_model": True, "kl_coef": 0.0}, "without a KL penalty(.|\n)*raise `kl_coef`"),
        ({"effective_batch_size": 12}, "cannot be made of whole batches"),
        ({"num_mini_batches": 3}, "num_mini_batches"),
    ]:
        with pytest.raises(UserError, match=message):
            run("ppo", work, output_dir=work / "none", **overrides)
    for name in ("ppo", "rloo", "grpo"):
        with pytest.raises(UserError, match="an update needs more prompts than there are"):
            run(name, work, output_dir=work / "none", train_limit=1)
    (work / "start.yaml").write_text(PROJECT.replace("base: sft\n", ""))
    with pytest.raises(UserError, match="`base` is missing(.|\n)*model_name_or_path"):
        run("rloo", work, output_dir=work / "none", project_file=work / "start.yaml")
    for overrides, message in [
        ({"reward_weights": 1.0}, "`reward_weights`|reward_weights(.|\n)*rewards: {NAME: WEIGHT"),
        ({"scale_rewards": "std"}, "scale_rewards(.|\n)*group, batch, none"),
        ({"sync_ref_model": True, "beta": 0.0}, "without a KL penalty(.|\n)*raise `beta`"),
        ({"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"}, "leave it out"),
    ]:
        with pytest.raises(UserError, match=message):
            run("grpo", work, output_dir=work / "none", **overrides)
    with pytest.raises(UserError, match="a reference that moves cannot answer before"):
        run("dpo", work, output_dir=work / "none", sync_ref_model=True, precompute_ref_log_probs=True)
    with pytest.raises(UserError, match="arguments of the recipe: template(.|\n)*must contain {response}"):
        run("reward", work, output_dir=work / "none", template="Question: {question} Answer: {answer}")
    with pytest.raises(UserError, match="responses: a pair is two of the responses"):
        run("dpo", work, output_dir=work / "none", responses=1)
    with pytest.raises(UserError, match="lower `margin`"):
        run("dpo", work, output_dir=work / "none", responses=2, margin=99)
    with pytest.raises(UserError, match="the model|tokenizer|config cannot be reached"):
        run("sft", work, output_dir=work / "none", model_name_or_path="nobody/nothing")
    data = {"train_file": "null", "dataset_name": "nobody/nothing"}
    words = [word for word in words_for("sft", work, output_dir=work / "none", **data) if "=null" not in word]
    config = work / "sft.yaml"
    config.write_text((ROOT / "recipes/configs/demo/sft.yaml").read_text().replace("train_file:", "# "))
    with pytest.raises(UserError, match="data set nobody/nothing, split train: the data set cannot be reached"):
        load_recipe("sft").main(["--config", str(config), *words[2:]])
    (work / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="there are no rows"):
        run("sft", work, output_dir=work / "none", train_file=work / "empty.jsonl")
    assert not list(work.glob("none*")) and not list(work.glob(".none*"))


def test_an_existing_folder_is_refused_before_anything_is_loaded(work):
    for name in ("sft", "reward", "ppo", "dpo", "rloo", "grpo"):
        for overwrite in (False, True):
            with pytest.raises(UserError, match="no recipe made"):
                run(name, work, output_dir=work / "data", overwrite=overwrite, train_file="nowhere")


def test_a_critic_with_other_weights_makes_another_run(work, capsys):
    critic = {"critic_model": work / "critic", "output_dir": work / "vowels", "total_episodes": 8}
    save_model(make_model(1), work / "critic")
    run("ppo", work, **critic)
    run("ppo", work, **critic)
    assert "finished already" in capsys.readouterr().out
    save_model(make_model(2), work / "critic")
    with pytest.raises(UserError, match="another run is there"):
        run("ppo", work, **critic)


def test_a_reward_that_fails_once_all_is_trained_does_not_cost_the_policy(work):
    (work / "rewards.py").write_text((work / "rewards.py").read_text().replace("LEFT = [], 3", "LEFT = [], 5"))
    with pytest.raises(UserError, match="is trained, saved and in the project, but measuring it failed(.|\n)*no more"):
        run("ppo", work, reward="failing", output_dir=work / "kept")
    assert tensors(work / "kept") == tensors(work / "sft") and project(work).policies == {"failing": "kept"}
    assert record(work / "kept")["complete"] and "no more" in record(work / "kept")["metrics"]["fault"]


def test_a_reward_that_fails_stops_the_run_and_the_last_checkpoint_is_whole(work):
    words = words_for("ppo", work, reward="failing", output_dir=work / "stopped", save_strategy="steps", save_steps=1)
    child = start("ppo", words, work / "log")
    child.join()
    said = (work / "log").read_text()
    assert child.exitcode == 1 and "Traceback" not in said, said
    assert "reward `failing`: the function raised RuntimeError: no more" in said
    assert not (work / "stopped").exists()
    checkpoints = sorted(path.name for path in (work / "stopped.unfinished").glob("checkpoint-*"))
    assert checkpoints and (work / "stopped.unfinished" / checkpoints[-1] / "trainer_state.json").is_file()
