"""Every declaration on the page "Your rewards" loads and scores, on tiny models in the place of those that it names."""

from __future__ import annotations

import json
import re
import socket
import threading
from pathlib import Path

import pytest
import torch
import yaml
from documents import ROOT, Page
from ready_chats import CHATML, save_armo
from ready_tasks import CHATML_TOKENS, byte_pairs, save
from stand_in_rewards import ChatServer
from tiny_judges import CHAT, QWEN3_GUARD, byte_level, chained_model, random_model, save_judge
from tiny_models import make_tokenizer

from rewarded_lines.config import decides
from rewarded_lines.projects import load_project
from rewarded_lines.rewards.load_rewards import load_rewards
from rewarded_lines.rewards.reward import check_columns

PAGE = Page(ROOT / "docs" / "your-rewards.md")
BLOCKS = [code for language, code in PAGE.blocks if language == "yaml"]
SERVER, FUNCTIONS = (next(code for _, code in PAGE.blocks if word in code) for word in ("serve_forever", "def exact"))
PROMPTS, RESPONSES = ["the quick fox", "a dog"], ["brown fox [1]", "the lazy dog over there 42"]
COLUMNS = [
    {"answer": "fox", "reference": "a fox", "tests": "pass"},
    {"answer": "42", "reference": "no dog", "tests": "fail"},
]
SIZES = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.3}


def head(folder, **settings):
    """Save a classifier."""
    import transformers as tf

    config = tf.LlamaConfig(**SIZES, **HEADS, **settings)
    save(tf.LlamaForSequenceClassification(config), make_tokenizer(), folder)


def adapter(folder, base):
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    tuned = get_peft_model(model, LoraConfig(r=2, task_type=TaskType.SEQ_CLS, target_modules=["q_proj"]))
    save(tuned, make_tokenizer(), folder)


def value_head(folder):
    from safetensors.torch import save_file

    save(random_model(make_tokenizer()), make_tokenizer(), folder)
    body = {"v_head.summary.weight": torch.randn(1, 64), "v_head.summary.bias": torch.randn(1)}
    save_file(body, folder / "value_head.safetensors")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A project's folder with a model for every name on the page."""
    import transformers as tf

    root = tmp_path_factory.mktemp("rewards")
    torch.manual_seed(0)
    head(
        root / "models/heads", id2label={0: "helpfulness", 1: "verbosity"}, label2id={"helpfulness": 0, "verbosity": 1}
    )
    head(root / "models/base", num_labels=1)
    adapter(root / "models/adapter", str(root / "models/base"))
    value_head(root / "models/value-head")
    bert = tf.BertConfig(**SIZES, num_attention_heads=2, num_labels=1, initializer_range=0.3)
    save(tf.BertForSequenceClassification(bert), make_tokenizer(), root / "models/cross-encoder")
    save_armo(root / "RLHFlow/ArmoRM-Llama3-8B-v0.1", 19)
    chat = byte_pairs(CHATML_TOKENS, bos=0, eos=2, pad=0)
    chat.chat_template = CHATML
    qwen = tf.Qwen3Config(**{**SIZES, "vocab_size": 400}, **HEADS, head_dim=32, num_labels=1)
    save(tf.Qwen3ForSequenceClassification(qwen), chat, root / "Skywork/Skywork-Reward-V2-Qwen3-0.6B")
    words = byte_level(["yes", "no", "Score: ", "9", "[[A]]", "<|assistant|>", "</think>\n\n", "Safety: Safe"])
    save_judge(root / "Qwen/Qwen3-0.6B", chained_model(words, {"<|assistant|>": "yes"}), words, CHAT)
    save_judge(root / "models/judge", chained_model(words, {"<|assistant|>": "Score: ", "Score: ": "9"}), words, CHAT)
    save_judge(root / "models/judge-of-pairs", chained_model(words, {"<|assistant|>": "[[A]]"}), words, CHAT)
    guard = chained_model(words, {"</think>\n\n": "Safety: Safe"})
    save_judge(root / "Qwen/Qwen3Guard-Gen-0.6B", guard, words, QWEN3_GUARD)
    (root / "rewards.py").write_text(FUNCTIONS)
    (root / "answer.schema.json").write_text(json.dumps({"type": "number"}))
    return root


@pytest.fixture(scope="module")
def places():
    """What stands in for the addresses on the page: its own server, and one for chat completions."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = SERVER.replace("8000", str(port))
    threading.Thread(target=exec, args=(code, {"__name__": "server"}), daemon=True).start()
    api = ChatServer()
    yield {"127.0.0.1:8000": f"127.0.0.1:{port}", "https://api.openai.com/v1": f"http://127.0.0.1:{api.port}/v1"}
    api.stop()


EXACT = {
    "polite": [[1.0, 1.0]],
    "graded": [[9.0, 9.0], [3.0, 3.0]],
    "safe": [[1.0, 1.0]],
    "wins": [[0.5, 0.5]],
    "tests_pass": [[13.0, 26.0]],
    "exact": [[1.0, 1.0]],
    "reply": [[13.0, 26.0]],
    "right": [[0.0, 1.0]],
    "valid": [[0.0, 0.0]],
    "cites": [[1.0, 0.0]],
    "fresh": [[0.0, 0.0]],
    "brief": [[-27.0, -24.0]],
}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.findall(r"^  (\w+):", block, re.MULTILINE)[0])
def test_a_declaration_on_the_page_scores(block, models, places, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    monkeypatch.chdir(models)
    for name, place in places.items():
        block = block.replace(name, place)
    path = Path(models, "project.yaml")
    path.write_text(block)
    project = load_project(path)
    assert list(project.config.rewards) == list(yaml.safe_load(block)["rewards"])
    rewards = load_rewards(project, device="cpu")
    rows = [{"prompt": prompt, "columns": row} for prompt, row in zip(PROMPTS, COLUMNS, strict=True)]
    check_columns(rewards.values(), {"rows": rows})
    for name, reward in rewards.items():
        scores = reward.score(PROMPTS, RESPONSES, COLUMNS)
        if name in EXACT:
            assert scores in [pytest.approx(wanted, abs=1e-3) for wanted in EXACT[name]]
        else:
            assert len({float(one) for one in scores}) == 2, f"{name} gives all one score: {scores}"
        assert decides(project.config.rewards[name])
        reward.free()


def test_the_page_has_every_source_and_every_ready_function():
    from rewarded_lines.rewards.ready_functions import READY

    declared = [spec for block in BLOCKS for spec in yaml.safe_load(block)["rewards"].values()]
    assert {key for spec in declared for key in ("model", "judge", "url", "function") if key in spec} == {
        "model", "judge", "url", "function",
    }  # fmt: skip
    assert {spec.get("function") for spec in declared} >= set(READY)
    assert len(BLOCKS) >= 13
