"""What the tasks safety, helpsteer and chat ask of the Hub, in tiny: the same forms of models and rows."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import torch
from ready_tasks import CHATML_TOKENS, byte_pairs, save, sentence_pieces, text
from safetensors.torch import load_file, save_file
from tiny_judges import QWEN3_GUARD, byte_level, chained_model

SIZES = {"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048}
# As Qwen3 and SmolLM3 do: without thinking, the answer begins with an empty thought.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# "A:" is what ArmoRM's code looks for.
ARMO = "{% for m in messages %}{{ 'A:' if m.role == 'assistant' else 'Q:' }}{{ m.content }}{% endfor %}"


def make_hub(root: Path) -> None:
    """Put models and data sets below `root`, for a stand-in hub to serve."""
    import transformers as tf

    torch.manual_seed(0)
    alpaca = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, **HEADS, bos_token_id=1, eos_token_id=2))
    save(alpaca, sentence_pieces(), root / "PKU-Alignment/alpaca-7b-reproduced")
    for name in ("reward", "cost"):
        _save_beaver(root / f"PKU-Alignment/beaver-7b-v1.0-{name}")
    chat = byte_pairs(CHATML_TOKENS, bos=0, eos=2, pad=0)
    chat.chat_template = CHATML
    qwen = tf.Qwen3Config(**SIZES, **HEADS, head_dim=32, eos_token_id=2, pad_token_id=0, initializer_range=0.2)
    save(tf.Qwen3ForCausalLM(qwen), chat, root / "Qwen/Qwen3-0.6B")
    smol = tf.SmolLM3Config(**SIZES, **HEADS, eos_token_id=2, pad_token_id=0, bos_token_id=None)
    save(tf.SmolLM3ForCausalLM(smol), chat, root / "HuggingFaceTB/SmolLM3-3B")
    qwen.num_labels = 1
    save(tf.Qwen3ForSequenceClassification(qwen), chat, root / "Skywork/Skywork-Reward-V2-Qwen3-0.6B")
    words = byte_level(["</think>\n\n", "Safety: Safe"])
    words.chat_template = QWEN3_GUARD
    guard = chained_model(words, {"</think>\n\n": "Safety: Safe"})
    save(guard, words, root / "Qwen/Qwen3Guard-Gen-0.6B")
    save_armo(root / "RLHFlow/ArmoRM-Llama3-8B-v0.1", 19)
    make_data(root / "datasets")


def save_armo(folder: Path, objectives: int) -> None:
    """Save a model with code of its own, in ArmoRM's form."""
    import transformers as tf
    from tiny_models import make_tokenizer

    tokens = make_tokenizer()
    tokens.chat_template = ARMO
    config = tf.LlamaConfig(**{**SIZES, "vocab_size": 300}, **HEADS, pad_token_id=0, num_objectives=objectives)
    config.auto_map = {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"}
    body = {f"model.{name}": value for name, value in tf.LlamaModel(config).state_dict().items()}
    shapes = {"regression_layer.weight": (objectives, 64), "reward_transform_matrix": (objectives, objectives)}
    shapes |= {"gating.weight": (objectives, 64), "gating.bias": (objectives,)}
    config.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    written["architectures"] = ["LlamaForRewardModelWithGating"]
    (folder / "config.json").write_text(json.dumps(written))
    tokens.save_pretrained(folder)
    stored = {**body, **{name: torch.randn(shape) for name, shape in shapes.items()}}
    save_file({name: value.contiguous() for name, value in stored.items()}, folder / "model.safetensors")
    shutil.copy(Path(__file__).parent / "rewards" / "armo_code.py", folder / "modeling_custom.py")


def _save_beaver(folder: Path) -> None:
    """Save a model of Safe RLHF: a Llama without a language head, and `score_head`."""
    import transformers as tf

    config = tf.LlamaConfig(**SIZES, **HEADS, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2)
    save(tf.LlamaModel(config), sentence_pieces(), folder)
    file = folder / "model.safetensors"
    body = {f"model.{name}": value for name, value in load_file(file).items()}
    save_file({**body, "score_head.weight": torch.randn(1, 64)}, file, {"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    more = {"architectures": ["LlamaForScore"], "score_dim": 1, "bias": False, "do_normalize": False}
    (folder / "config.json").write_text(json.dumps({**written, **more}))


def make_data(root: Path) -> None:
    """Put the data sets below `root`, with the splits that their cards name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    safe = root / "PKU-Alignment/PKU-SafeRLHF-10K"
    safe.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([question(number % 40) for number in range(8520)]), safe / "train.parquet")
    feedback = root / "HuggingFaceH4/ultrafeedback_binarized"
    (feedback / "data").mkdir(parents=True)
    for split, count in (("train_prefs", 60200), ("test_prefs", 20)):
        rows = [answered(number % 40) for number in range(count)]
        pq.write_table(pa.Table.from_pylist(rows), feedback / "data" / f"{split}-00000-of-00001.parquet")
    _card(feedback, {"default": {split: f"data/{split}-*" for split in ("train_prefs", "test_prefs")}})
    steer = root / "nvidia/HelpSteer3"
    (steer / "preference").mkdir(parents=True)
    for split, count in (("train", 400), ("validation", 20)):
        with gzip.open(steer / "preference" / f"{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(steered(number)) + "\n" for number in range(count))
    _card(steer, {"preference": {split: f"preference/{split}.jsonl.gz" for split in ("train", "validation")}})


def question(number: int) -> dict[str, object]:
    """Return a row of PKU-SafeRLHF-10K."""
    return {
        "prompt": text(number, 6) + "?",
        "response_0": text(number + 1, 5) + ".",
        "response_1": text(number + 2, 4) + ".",
        "is_response_0_safe": bool(number % 3),
        "is_response_1_safe": True,
        "better_response_id": number % 2,
        "safer_response_id": 1,
    }


def answered(number: int) -> dict[str, object]:
    """Return a row of ultrafeedback_binarized."""
    asked = {"content": text(number, 6) + "?", "role": "user"}
    chats = [[asked, {"content": text(number + side, 5), "role": "assistant"}] for side in (1, 2)]
    return {
        "prompt": asked["content"],
        "prompt_id": str(number),
        "chosen": chats[0],
        "rejected": chats[1],
        "messages": chats[0],
        "score_chosen": 8.0,
        "score_rejected": 6.5,
    }


def steered(number: int) -> dict[str, object]:
    """Return a row of HelpSteer3's preferences."""
    return {
        "domain": ("general", "code")[number % 2],
        "language": "english",
        "context": [{"role": "user", "content": text(number, 6) + "?"}],
        "response1": text(number + 1, 5),
        "response2": text(number + 2, 5),
        "overall_preference": number % 7 - 3,
        "individual_preference": [{"score": number % 7 - 3, "reasoning": "", "feedback1": "", "feedback2": ""}],
    }


def _card(folder: Path, configs: dict[str, dict[str, str]]) -> None:
    lines = ["---", "configs:"]
    for name, splits in configs.items():
        lines += [f"  - config_name: {name}", "    data_files:"]
        lines += [f"      - split: {split}\n        path: {path}" for split, path in splits.items()]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
