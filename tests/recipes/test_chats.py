"""Chat models of five published forms through SFT, reward model, RLOO, PPO, DPO, sweep and score, in miniature.

Every stage's prompts are kept as tokens and compared with transformers' own `apply_chat_template`; with learning rate 0
nothing may be gained.
"""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from chat_forms import FORMS, ends, make_chat, turn_end
from small_recipes import load_recipe, prompts_of_generation, record
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rewarded_lines.projects import load_project
from rewarded_lines.rewards.load_rewards import load_reward

QUESTIONS = (
    "why is the sky blue",
    "tell two words about rain",
    "who was good",
    "write a short poem",
    "what is one plus two",
)
SYSTEM = "answer with short words"
PROJECT = """\
base: {base}
rewards:
  long: {{function: "rewards.py:long", messages: true, unit: letters}}
prompts: {{file: valid.jsonl}}
generation: {{max_tokens: 12, temperature: 1.0{more}}}
sweep: {{points: 2, methods: [lines, policies]}}
"""
REWARDS = """
import json
def long(prompts, completions):
    with open("seen.jsonl", "a") as file:
        for prompt, completion in zip(prompts, completions):
            file.write(json.dumps([prompt, completion]) + "\\n")
    return [float(len(completion[-1]["content"])) for completion in completions]
"""
TINY = "--report_to none --disable_tqdm true --gradient_checkpointing false --save_strategy no --logging_steps 1"
RATE = {"learning_rate": 0.0, "per_device_train_batch_size": 4, "seed": 0}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def chat(question):
    """A conversation of several turns, with a system's: what every stage has to read whole."""
    return [turn("system", SYSTEM), turn("user", "is it sunny"), turn("assistant", "yes"), turn("user", question)]


def pair(question):
    """A row in the form of UltraFeedback: the prompt as a text, and whole chats that begin with it."""
    sides = {"chosen": "yes and no", "rejected": "maybe not"}
    return {"prompt": question, **{side: [*chat(question), turn("assistant", said)] for side, said in sides.items()}}


class Stages:
    """A project folder in which recipes run in this process, and what each gave its model as prompts."""

    def __init__(self, folder: Path, form: str) -> None:
        self.folder, self.form = folder, form
        make_chat(form, folder / "base")
        rows = {"train": QUESTIONS, "valid": [f"{question} and why" for question in QUESTIONS]}
        for name, questions in rows.items():
            data = "".join(json.dumps(pair(question)) + "\n" for question in questions)
            (folder / f"{name}.jsonl").write_text(data)
        messages = "".join(json.dumps({"messages": pair(one)["chosen"]}) + "\n" for one in QUESTIONS)
        (folder / "sft.jsonl").write_text(messages)
        (folder / "rewards.py").write_text(REWARDS)
        more = ", chat_template_kwargs: {enable_thinking: false}" if form == "qwen3" else ""
        (folder / "p.yaml").write_text(PROJECT.format(base="base", more=more))
        self.settings = {"enable_thinking": False} if form == "qwen3" else {}

    def run(self, name: str, *, train: str = "train.jsonl", **options: object) -> list[list[int]]:
        """Run a recipe; return the prompts that its models went on from."""
        data = {"train_file": train, "validation_file": train if name == "sft" else "valid.jsonl"}
        words = {**data, "project_file": "p.yaml", **RATE, **options}
        with prompts_of_generation() as prompts:
            load_recipe(name).main([*TINY.split(), *(f"--{key}={value}" for key, value in words.items())])
        return prompts

    def wanted(self, tokenizer, rows: str) -> set[tuple[int, ...]]:
        """Return transformers' own tokens of the prompts in a file."""
        lines = (self.folder / rows).read_text().splitlines()
        chats = [json.loads(line)["chosen"][:-1] for line in lines]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, **self.settings}
        return {tuple(tokenizer.apply_chat_template(one, **options)["input_ids"]) for one in chats}


# Each form takes seconds. Quick is the one with settings of its template; `test_chat_rules` runs the others in part.
@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=() if form == "qwen3" else pytest.mark.slow) for form in FORMS]
)
def test_every_stage_reads_a_chat_as_the_model_does_and_ends_where_it_does(form, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    stages = Stages(tmp_path, form)
    tokenizer = AutoTokenizer.from_pretrained("base")
    train, valid = (stages.wanted(tokenizer, f"{name}.jsonl") for name in ("train", "valid"))

    # SFT, and a reward model that reads conversations.
    stages.run("sft", train="sft.jsonl", model_name_or_path="base", output_dir="sft", max_steps=1)
    assert load_project("p.yaml").config.base == "sft"
    kept = json.loads(Path("sft/generation_config.json").read_text())
    assert kept == json.loads(Path("base/generation_config.json").read_text())
    stages.run("reward", model_name_or_path="sft", output_dir="rm", max_steps=1, learning_rate=1e-2)
    assert load_project("p.yaml").config.rewards["rm"].template == "chat"
    reads_conversations_as_transformers_does(tokenizer)

    # Three policies that do not move: prompts of training and measuring, responses, gain, what they leave behind.
    sizes = {"reward": "long", "max_prompt_tokens": 300}
    rloo = {"max_completion_length": 12, "num_generations": 2, "max_steps": 2}
    ppo = {"response_length": 12, "total_episodes": 8, "num_mini_batches": 1, "num_ppo_epochs": 1}
    ppo |= {"local_rollout_forward_batch_size": 4, "num_sample_generations": 0, "missing_eos_penalty": 1.0}
    dpo = {"pairs": "given", "max_response_tokens": 12, "max_steps": 1}
    for name, options in (("rloo", rloo), ("ppo", ppo), ("dpo", dpo)):
        Path("seen.jsonl").unlink(missing_ok=True)
        prompts = {tuple(row) for row in stages.run(name, output_dir=name, **sizes, **options)}
        assert prompts <= train | valid and valid <= prompts, name
        assert name == "dpo" or prompts & train, name
        seen = [json.loads(line) for line in Path("seen.jsonl").read_text().splitlines()]
        assert {len(prompt) for prompt, _ in seen} == {4} and {prompt[0]["content"] for prompt, _ in seen} == {SYSTEM}
        texts = [completion[0]["content"] for _, completion in seen]
        assert not any(token in text for text in texts for token in (*ends(form), "<think>", "|>"))
        metrics = record(Path(name))["metrics"]
        assert metrics["gain"] == 0 and metrics["gain_interval"] == [0, 0], name
        assert json.loads(Path(name, "generation_config.json").read_text()) == kept
        stops_as_its_base(name, sorted(valid)[0])

    # The sweep and a score: the same prompts once more, the same ends.
    Path("p.yaml").write_text(
        Path("p.yaml").read_text().replace("policies:", "policies:\n  a: rloo\n  b: ppo\nold:", 1)
    )
    text = Path("p.yaml").read_text()
    Path("p.yaml").write_text(text[: text.index("old:")])
    with prompts_of_generation() as prompts:
        assert cli("sweep", "--config", "p.yaml", "--engine", "hf", "--out", "run").code == 0
        assert cli("score", "dpo", "--config", "p.yaml", "--engine", "hf", "--out", "one").code == 0
    assert {tuple(row) for row in prompts} == valid
    for path in (*Path("run/points").iterdir(), *Path("one/points").iterdir()):
        table = pq.read_table(path).to_pylist()
        assert len(table) == len(QUESTIONS) and any(row["ended"] for row in table)
        assert all(row["score.long"] == len(row["response"]) for row in table)


def reads_conversations_as_transformers_does(tokenizer):
    """The reward model gives what one forward pass over `apply_chat_template` gives."""
    model = AutoModelForSequenceClassification.from_pretrained("rm").eval()
    reward = load_reward("rm", load_project("p.yaml").config.rewards["rm"], Path())
    prompts, responses = [chat(question) for question in QUESTIONS], ["yes", "no", "", "rain and rain and rain", "one"]
    scores = reward.score(prompts, responses)
    for prompt, response, score in zip(prompts, responses, scores, strict=True):
        whole = [*prompt, turn("assistant", response)]
        ids = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert score == pytest.approx(float(model(input_ids=ids).logits[0, 0]), abs=1e-5)
    reward.free()


def stops_as_its_base(policy, prompt):
    """transformers' own generation, with the folder's generation config, gives what it gives from the SFT model."""
    texts = []
    for folder in (policy, "sft"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        torch.manual_seed(0)
        texts.append(model.generate(torch.tensor([prompt] * 4), do_sample=True, max_new_tokens=24).tolist())
    assert texts[0] == texts[1]


def test_the_forms_end_turns_by_other_tokens_than_the_tokenizers_eos():
    """What made these five forms worth a test."""
    assert {turn_end(form) for form in FORMS} == {"<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "</s>"}
