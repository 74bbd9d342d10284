"""What recipes and sweeps do with chats beyond the usual: stop texts, thinking, tools, template settings, lengths."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from chat_forms import make_chat, make_classifier
from small_recipes import load_recipe, prompts_of_generation, record
from transformers import AutoTokenizer

from rewarded_lines.errors import UserError

QUESTIONS = ("why is it good", "two words", "who is where", "one plus two")
PROJECT = 'base: base\nrewards:\n  r: {function: "rewards.py:r", messages: true}\nprompts: {file: valid.jsonl}\n'
REWARDS = """
import json
def r(prompts, completions):
    with open("seen.jsonl", "a") as file:
        for prompt, completion in zip(prompts, completions):
            file.write(json.dumps([prompt, completion]) + "\\n")
    return [float(len(completion[-1]["content"])) + at / 100 for at, completion in enumerate(completions)]
"""
OPTIONS = {
    "project_file": "p.yaml", "train_file": "train.jsonl", "validation_file": "valid.jsonl", "output_dir": "out",
    "report_to": "none", "disable_tqdm": "true", "gradient_checkpointing": "false", "save_strategy": "no",
    "logging_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 4,
}  # fmt: skip
POLICY = {"reward": "r"}
RLOO = POLICY | {"max_completion_length": 16, "num_generations": 2, "max_steps": 2}
PPO = POLICY | {"response_length": 16, "total_episodes": 8, "num_mini_batches": 1, "num_ppo_epochs": 1}
PPO |= {"local_rollout_forward_batch_size": 4, "num_sample_generations": 0}
DPO = POLICY | {"max_response_tokens": 16, "max_steps": 1, "responses": 2, "margin": 0.0, "sampling_engine": "hf"}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def calls(arguments):
    return turn("assistant", "", tool_calls=[{"function": {"name": "look", "arguments": arguments}}])


def ask(question):
    return {"prompt": [turn("user", question)]}


def write(name, *rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(name, **options):
    words = OPTIONS | options
    load_recipe(name).main([f"--{key}={value}" for key, value in words.items() if value is not None])


def seen():
    """Return the texts of responses that the reward was given."""
    return [json.loads(line)[1][0]["content"] for line in Path("seen.jsonl").read_text().splitlines()]


@pytest.fixture
def chats(tmp_path, monkeypatch):
    """A project of a chat model with prompts; a function makes it of another form, or with other settings."""
    monkeypatch.chdir(tmp_path)

    def make(form="phi", generation="", **more):
        make_chat(form, tmp_path / "base")
        Path("rewards.py").write_text(REWARDS)
        Path("p.yaml").write_text(PROJECT + (f"generation: {{{generation}}}\n" if generation else ""))
        for name in ("train", "valid"):
            write(f"{name}.jsonl", *({**ask(f"{one} {name[0]}"), **more} for one in QUESTIONS))
        return AutoTokenizer.from_pretrained("base")

    return make


# GRPO and RLOO sample and read by the same code.
@pytest.mark.parametrize(
    ("name", "options"),
    [("rloo", RLOO), pytest.param("grpo", RLOO, marks=pytest.mark.slow), ("ppo", PPO), ("dpo", DPO)],
)
def test_stop_texts_of_the_project_end_responses_in_training_as_in_a_sweep(chats, name, options, capsys):
    tokenizer = chats(generation='stop: ["e"], max_tokens: 16')
    run(name, **options)
    assert seen() and not any("e" in text for text in seen())
    assert record(Path("out"))["metrics"]["gain"] == pytest.approx(0, abs=1)
    if name in ("rloo", "grpo"):
        # Cut where the stop text is complete: shorter than without it, and told as such.
        lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
        assert max(line.get("completions/mean_length", 0) for line in lines) < 12
    assert len(tokenizer) > 400


def test_masking_truncated_responses_is_refused_where_texts_end_them(chats):
    chats(generation='stop: ["e"]')
    with pytest.raises(UserError, match="takes a response that ends at a stop text for a truncated one"):
        run("rloo", **RLOO, mask_truncated_completions="true")


@pytest.mark.parametrize("form", ["phi", "gemma3"])
def test_a_turns_end_is_an_end_in_trls_own_metrics(chats, form):
    """TRL would say that every response of these forms was cut short."""
    chats(form)
    run("rloo", **RLOO | {"max_completion_length": 40, "mask_truncated_completions": "true"})
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert min(line.get("completions/clipped_ratio", 1.0) for line in lines) < 0.5


@pytest.mark.parametrize(("name", "options"), [("rloo", RLOO), ("ppo", PPO), ("dpo", DPO)])
def test_rewards_do_not_see_what_is_stripped_and_policies_are_trained_on_it(chats, name, options):
    tokenizer = chats("qwen3", generation='strip: "<think>…</think>", max_tokens: 16')
    # A template that lets every answer begin within the markers, as models that always think have.
    template = Path("base/chat_template.jinja")
    template.write_text(template.read_text() + "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}")
    run(name, **options)
    assert set(seen()) == {""}, "no answer of this model ever comes to the end of its thinking"
    if name == "dpo":
        (pairs,) = Path().glob("*.pairs.parquet")
        assert all(json.loads(row["chosen"])[0]["content"] for row in pq.read_table(pairs).to_pylist())
    assert tokenizer.convert_tokens_to_ids("<think>") is not None


def test_a_sweep_keeps_the_raw_response_and_what_was_seen_of_it(chats, cli):
    chats("qwen3", generation='strip: " …e", max_tokens: 16, temperature: 1.0')
    make_chat("qwen3", Path("policy"), seed=1)
    with Path("p.yaml").open("a") as file:
        file.write("policies: {r: policy}\n")
    assert cli("score", "policy", "--config", "p.yaml", "--engine", "hf", "--out", "run").code == 0
    rows = [row for path in Path("run/points").iterdir() for row in pq.read_table(path).to_pylist()]
    assert any(row["seen"] != row["response"] for row in rows)
    assert sorted(row["seen"] for row in rows) == sorted(seen())
    assert cli("report", "run", "--format", "png").code == 0


@pytest.mark.parametrize("name", ["rloo", "dpo"])
def test_settings_of_the_template_belong_to_the_project(chats, name):
    tokenizer = chats("qwen3", generation="chat_template_kwargs: {enable_thinking: false}")
    recipe = load_recipe(name)
    trainer = {"rloo": "ReadRLOOTrainer", "dpo": "TokenDPOTrainer"}[name]
    build, ids = getattr(recipe, trainer), []

    def spy(**parts):
        made = build(**parts)
        ids.extend(
            made._tokenize_prompts(parts["train_dataset"]["prompt"])[0]
            if name == "rloo"
            else made.train_dataset["prompt_ids"]
        )
        return made

    setattr(recipe, trainer, spy)
    words = OPTIONS | (RLOO if name == "rloo" else DPO)
    recipe.main([f"--{key}={value}" for key, value in words.items()])
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "enable_thinking": False}
    wanted = [tokenizer.apply_chat_template(ask(f"{one} t")["prompt"], **options)["input_ids"] for one in QUESTIONS]
    assert {tuple(row) for row in ids} <= {tuple(row) for row in wanted} and ids
    assert tokenizer.decode(ids[0]).endswith("</think>\n\n")
    # The policy keeps the base's own template.
    assert Path("out/chat_template.jinja").read_text() == Path("base/chat_template.jinja").read_text()


def hh(question, answer=""):
    return f"\n\nHuman: {question}\n\nAssistant:{answer}"


def sides(make):
    return {"chosen": make("yes"), "rejected": make("no rain")}


# One row in each published form, and the conversation or the text that its prompt is.
ROWS = {
    "ultrafeedback": lambda q: {"prompt": q, **sides(lambda said: [turn("user", q), turn("assistant", said)])},
    "implicit": lambda q: sides(lambda said: [turn("system", "so"), turn("user", q), turn("assistant", said)]),
    "explicit": lambda q: {"prompt": [turn("user", q)], **sides(lambda said: [turn("assistant", said)])},
    "hh-rlhf": lambda q: sides(lambda said: hh(q, f" {said}")),
    "hh-rlhf as chats": lambda q: sides(lambda said: hh(q, f" {said}")),
    "bos": lambda q: {"prompt": f"<s>{q}", **sides(lambda said: f" {said}")},
}


@pytest.mark.parametrize(
    ("name", "options", "form"),
    # One function reads the rows of all recipes: one recipe for each form, and the others for a chat and a text.
    [
        *(("rloo", RLOO, form) for form in ROWS),
        *(("ppo", PPO, form) for form in ("implicit", "bos")),
        *(("dpo", DPO | {"pairs": "given"}, form) for form in ("implicit", "hh-rlhf")),
    ],
)
def test_training_and_measuring_see_the_same_prompts_token_for_token(chats, name, options, form):
    tokenizer = chats("phi")
    for file in ("train", "valid"):
        write(f"{file}.jsonl", *(ROWS[form](question) for question in QUESTIONS))
    recipe, trained = load_recipe(name), []
    if name == "dpo":
        build = recipe.TokenDPOTrainer
        recipe.TokenDPOTrainer = lambda **parts: trained.extend(parts["train_dataset"]["prompt_ids"]) or build(**parts)
    # Two steps of two prompts are an epoch of the four.
    words = OPTIONS | options | ({"chat": "true"} if "chats" in form else {})
    with prompts_of_generation() as generated:
        recipe.main([f"--{key}={value}" for key, value in words.items()])

    def wanted(question):
        if form in ("hh-rlhf", "bos"):
            text = hh(question) if form == "hh-rlhf" else question
            return tokenizer(text)["input_ids"]
        system = [turn("system", "so")] if form == "implicit" else []
        made = tokenizer.apply_chat_template(
            [*system, turn("user", question)], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return made["input_ids"]

    expected = {tuple(wanted(question)) for question in QUESTIONS}
    assert {tuple(row) for row in generated} == expected
    assert name != "dpo" or {tuple(row) for row in trained} == expected


@pytest.mark.parametrize("name", ["ppo", "rloo"])
def test_a_model_that_samples_anything_gains_nothing_by_not_moving(chats, name):
    """Of random weights padding is sampled too, which ends a response in PPO's training only."""
    import torch
    from transformers import AutoModelForCausalLM

    chats("phi")
    model = AutoModelForCausalLM.from_pretrained("base")
    torch.manual_seed(0)
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    model.save_pretrained("base")
    options = PPO | {"response_length": 64} if name == "ppo" else RLOO | {"max_completion_length": 64}
    run(name, **options)
    assert record(Path("out"))["metrics"]["gain_interval"] == [0, 0]


def test_sampled_answers_are_trained_on_with_the_end_that_they_had(chats):
    """Cut short, an answer has none; a model that ends by another token than its tokenizer's is not taught that one."""
    tokenizer = chats("gemma3")
    for name in ("train", "valid"):
        questions = (f"<start_of_turn>user\n{one} {name}<end_of_turn>\n<start_of_turn>model\n" for one in QUESTIONS)
        write(f"{name}.jsonl", *({"prompt": question} for question in questions))
    Path("p.yaml").write_text(Path("p.yaml").read_text().replace(", messages: true", ""))
    Path("rewards.py").write_text("def r(prompts, completions): return [float(len(one)) for one in completions]\n")
    recipe, made = load_recipe("dpo"), []
    build = recipe.TokenDPOTrainer
    recipe.TokenDPOTrainer = lambda **parts: made.append(parts["train_dataset"]) or build(**parts)
    words = OPTIONS | DPO | {"max_response_tokens": 6, "responses": 6}
    recipe.main([f"--{key}={value}" for key, value in words.items()])
    answers = [row[f"{side}_ids"] for row in made[0] for side in ("chosen", "rejected")]
    turns_end, eos = tokenizer.convert_tokens_to_ids(["<end_of_turn>", "<eos>"])
    assert not any(eos in ids for ids in answers)
    assert any(ids[-1] == turns_end for ids in answers) and any(turns_end not in ids for ids in answers)


def test_settings_of_the_template_for_training_alone_are_refused(chats):
    chats("qwen3")
    with pytest.raises(UserError, match="would reach training only(.|\n)*generation: {chat_template_kwargs"):
        run("rloo", **RLOO, chat_template_kwargs='{"enable_thinking": false}')
    assert not Path("seen.jsonl").exists() and not Path("out").exists()


def test_training_on_chats_and_measuring_on_texts_is_refused(chats):
    chats()
    write("valid.jsonl", *({"prompt": one} for one in QUESTIONS))
    with pytest.raises(UserError, match="different forms(.|\n)*chat: true"):
        run("rloo", **RLOO)
    run("rloo", **RLOO, chat="true")


def test_what_the_template_leaves_out_is_refused_before_anything_is_loaded(chats):
    chats("gemma3")
    write("train.jsonl", {"prompt": [turn("user", "why", name="ann")]})
    with pytest.raises(UserError, match="leaves out `name`"):
        run("rloo", **RLOO)
    write(
        "train.jsonl",
        {"messages": [turn("user", "why"), turn("assistant", "", tool_calls=[{"function": {"name": "f"}}])]},
    )
    with pytest.raises(UserError, match="leaves out `tool_calls`"):
        run("sft", model_name_or_path="base", max_steps=1, validation_file=None)
    assert not Path("out").exists() and not list(Path().glob("*.unfinished"))


def test_tool_calls_and_tools_are_trained_on_whole(chats):
    """Rows with other arguments each: Arrow would give all of them the keys of all others."""
    tokenizer = chats("llama3")
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    rows = [
        {
            "messages": [
                turn("user", "why"),
                turn("assistant", "", tool_calls=[{"function": {"name": "look", "arguments": given}}]),
            ]
        }
        for given in ({"place": "rome"}, {"night": True, "two": 2})
    ]
    rows = [{**rows[0], "tools": tools}, {**rows[1], "tools": json.dumps(tools)}]
    write("train.jsonl", *rows)
    recipe, trainers = load_recipe("sft"), []
    build = recipe.SFTTrainer
    recipe.SFTTrainer = lambda **parts: trainers.append(build(**parts)) or trainers[-1]
    words = OPTIONS | {"model_name_or_path": "base", "max_steps": 1, "validation_file": "train.jsonl"}
    recipe.main([f"--{key}={value}" for key, value in words.items()])
    got = trainers[0].train_dataset["input_ids"]
    wanted = [
        tokenizer.apply_chat_template(row["messages"], tools=tools, tokenize=True, return_dict=True)["input_ids"]
        for row in rows
    ]
    assert [list(row) for row in got] == wanted and "rome" in tokenizer.decode(got[0])
    assert "null" not in tokenizer.decode(got[0]) + tokenizer.decode(got[1])


def test_sft_on_chats_names_the_token_that_ends_a_turn(chats, capsys):
    """A base model whose generation config knows no turns, as of many that are fine-tuned to chat."""
    chats("phi")
    path = Path("base/generation_config.json")
    plain = json.loads(path.read_text())
    tokenizer = AutoTokenizer.from_pretrained("base")
    path.write_text(
        json.dumps({**plain, "eos_token_id": tokenizer.eos_token_id, "temperature": 0.5, "do_sample": True})
    )
    write("train.jsonl", {"messages": [turn("user", "why"), turn("assistant", "so")]})
    for lora in ({}, {"use_peft": "true", "lora_r": 2}):
        run("sft", model_name_or_path="base", max_steps=1, overwrite="true", validation_file=None, **lora)
        assert "the chat template ends turns with <|end|>" in capsys.readouterr().out
        kept = json.loads(Path("out/generation_config.json").read_text())
        assert set(kept["eos_token_id"]) == set(tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"]))
        assert kept["temperature"] == 0.5


@pytest.mark.parametrize("given", ["eos_token", "a template that opens answers with a special token"])
def test_sft_keeps_the_end_that_it_trains(chats, given):
    tokenizer = chats("phi")
    path = Path("base/generation_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": tokenizer.eos_token_id}))
    options = {"eos_token": "<|end|>"} if given == "eos_token" else {}
    if not options:
        template = Path("base/chat_template.jinja")
        template.write_text(
            template.read_text().replace(
                "'|>\\n' + turn", "'|>\\n' + ('</s>' if turn.role == 'assistant' else '') + turn"
            )
        )
        assert "</s>" in template.read_text()
    write("train.jsonl", {"messages": [turn("user", "why"), turn("assistant", "so")]})
    run("sft", model_name_or_path="base", max_steps=1, validation_file=None, **options)
    kept = json.loads(Path("out/generation_config.json").read_text())["eos_token_id"]
    assert set(kept) == set(tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"]))


def test_a_template_by_path_is_trained_with_and_kept(chats):
    tokenizer = chats("phi")
    Path("mine.jinja").write_text("{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}")
    write("train.jsonl", {"messages": [turn("user", "why"), turn("assistant", "so")]})
    recipe, trainers = load_recipe("sft"), []
    build = recipe.SFTTrainer
    recipe.SFTTrainer = lambda **parts: trainers.append(build(**parts)) or trainers[-1]
    words = OPTIONS | {"model_name_or_path": "base", "max_steps": 1, "chat_template_path": "mine.jinja"}
    recipe.main([f"--{key}={value}" for key, value in words.items() if key != "validation_file"])
    wanted = tokenizer("<|user|>why<|end|><|user|>so<|end|>", add_special_tokens=False)["input_ids"]
    assert [list(row) for row in trainers[0].train_dataset["input_ids"]] == [wanted]
    assert Path("out/chat_template.jinja").read_text() == Path("mine.jinja").read_text()


def test_a_stop_token_of_training_alone_is_refused(chats):
    tokenizer = chats("phi")
    more = tokenizer.convert_tokens_to_ids("</s>")
    with pytest.raises(UserError, match=f"generation: {{stop_token_ids: .{more}."):
        run("ppo", **PPO, stop_token_id=more)
    run("ppo", **PPO, stop_token_id=tokenizer.convert_tokens_to_ids("<|end|>"))


def test_other_settings_of_the_project_make_another_run(chats):
    chats("qwen3")
    run("rloo", **RLOO)
    text = Path("p.yaml").read_text()
    for settings in ("generation: {max_tokens: 9}\n", "generation: {chat_template_kwargs: {enable_thinking: false}}\n"):
        Path("p.yaml").write_text(text + settings)
        if "max_tokens" in settings:
            run("rloo", **RLOO)
            continue
        with pytest.raises(UserError, match="another run is there(.|\n)*other generation"):
            run("rloo", **RLOO)


@pytest.mark.parametrize(("too_long", "left"), [("leave_out", 4), ("truncate", 5), ("refuse", None)])
@pytest.mark.parametrize("name", ["rloo", "sweep"])
def test_prompts_that_a_reward_model_cannot_read_are_found_at_the_start(chats, cli, capsys, name, too_long, left):
    """By the reward model's own tokenizer and template, before anything is generated; training and sweep alike."""
    chats()
    make_classifier("mistral", Path("rm"))
    long = ask("why is it so " * 12 + "good")
    for file in ("train", "valid"):
        write(f"{file}.jsonl", *(ask(one) for one in QUESTIONS), long)
    reward = "rewards:\n  r: {model: rm, template: chat, max_tokens: 50}\n"
    prompts = f"prompts: {{file: valid.jsonl, too_long: {too_long}}}\ngeneration: {{max_tokens: 16}}\n"
    Path("p.yaml").write_text(f"base: base\npolicies: {{p: base}}\n{reward}{prompts}")
    if name == "rloo" and left is None:
        with pytest.raises(
            UserError, match="1 of 5 rows are too long for reward `r`(.|\n)*rows 4(.|\n)*too_long: leave_out"
        ):
            run("rloo", **RLOO, too_long=too_long)
        assert not Path("out").exists()
        return
    if name == "rloo":
        run("rloo", **RLOO, too_long=too_long)
        said = capsys.readouterr().out
    else:
        done = cli("score", "base", "--config", "p.yaml", "--engine", "hf", "--out", "run")
        said = done.err
        assert done.code == (left is None)
        if left is None:
            assert "1 of 5 rows are too long for reward `r`" in said and "rows 4" in said and not Path("run").exists()
            return
        rows = [row for path in Path("run/points").iterdir() for row in pq.read_table(path).to_pylist()]
        assert len(rows) == 2 * left and json.loads(Path("run/run.json").read_text())["prompts"]["count"] == left
    assert ("left out: 4" if too_long == "leave_out" else "shortened from the beginning") in said


def test_a_response_that_no_reward_could_read_is_refused_at_the_start(chats):
    chats()
    make_classifier("phi", Path("rm"))
    Path("p.yaml").write_text("base: base\nrewards:\n  r: {model: rm, template: chat, max_tokens: 20}\n")
    with pytest.raises(UserError, match="a response may be longer than the reward model can read"):
        run("rloo", **RLOO | {"max_completion_length": 19})


@pytest.mark.parametrize("name", ["reward", "dpo", "sft"])
def test_answers_are_never_cut(chats, name, capsys):
    """TRL leaves pairs out or cuts answers, and says nothing."""
    chats()
    pair = {**ask("why is it good"), "chosen": [turn("assistant", "so " * 40)], "rejected": [turn("assistant", "no")]}
    short = {**pair, "chosen": [turn("assistant", "so")]}
    write("train.jsonl", *[short] * 4, pair)
    if name == "sft":
        demonstrations = [{"messages": [*row["prompt"], *row["chosen"]]} for row in [short] * 4 + [pair]]
        write("train.jsonl", *demonstrations)
    write("valid.jsonl", *[short] * 4)
    options = {"max_steps": 1, "max_length": 40}
    options |= {"pairs": "given", "reward": "r", "max_response_tokens": 8} if name == "dpo" else {}
    options |= {"model_name_or_path": "base"} if name != "dpo" else {}
    if name == "sft":
        options["validation_file"] = "train.jsonl"
    run(name, **options)
    assert "1 of 5 rows are too long and left out: 4" in capsys.readouterr().out
    with pytest.raises(UserError, match="1 of 5 rows are too long"):
        run(name, **options, too_long="refuse", overwrite="true")


@pytest.mark.parametrize("trl_saves", ["pad = eos"])
def test_a_reward_model_trained_with_padding_that_is_the_end_is_read_as_transformers_reads_it(chats, trl_saves):
    """Phi's padding is its end of text, which its template writes behind a conversation."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from rewarded_lines.reward_settings import RewardSpec
    from rewarded_lines.rewards.load_rewards import load_reward

    tokenizer = chats("phi")
    pair = {**ask("why"), "chosen": [turn("assistant", "so")], "rejected": [turn("assistant", "no")]}
    write("train.jsonl", *[pair] * 4)
    run("reward", model_name_or_path="base", max_steps=2, learning_rate=1e-2, validation_file=None)
    model = AutoModelForSequenceClassification.from_pretrained("out").eval()
    assert model.config.pad_token_id == tokenizer.eos_token_id
    reward = load_reward("out", RewardSpec(model="out", template="chat"), Path())
    for response in ("so", "no", "rain and rain"):
        whole = [*pair["prompt"], turn("assistant", response)]
        ids = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=True, return_tensors="pt")["input_ids"]
        assert int(ids[0, -1]) == model.config.pad_token_id
        with torch.no_grad():
            wanted = float(model(input_ids=ids).logits[0, 0])
        assert reward.score([pair["prompt"]], [response]) == pytest.approx([wanted], abs=1e-5)
