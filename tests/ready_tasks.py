"""What the ready configs ask of the Hub, in tiny: random models under the same ids, and data sets of the same layout.

As a program, `ready_tasks.py COMMAND ...` runs commands one after another from the root of a checkout, with overrides
of size, and prints a JSON text for each: "" or the traceback. It must be told of the Hub by its environment.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import json
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

WORDS = "the dog barks at my neighbour every night and I do not know what to say to him about it".split()
# The real templates' special tokens, in the order of their ids.
LLAMA, GPT2 = ("<unk>", "<s>", "</s>"), ("<|endoftext|>",)
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Overrides of size; a value that a config does not have is not new to its recipe.
QUIET = {"report_to": "none", "disable_tqdm": "true", "effective_batch_size": 4, "per_device_train_batch_size": 4}
SMALL: Mapping[str, Mapping[str, object]] = {
    "sft": QUIET | {"max_steps": 2, "max_length": 1024, "train_limit": 8, "validation_limit": 4},
    "reward": QUIET | {"max_steps": 2, "train_limit": 8, "validation_limit": 4},
    "ppo": QUIET
    | {"total_episodes": 8, "num_mini_batches": 2, "local_rollout_forward_batch_size": 4, "response_length": 8}
    | {"train_limit": 8, "validation_limit": 8},
    "rloo": QUIET
    | {"max_steps": 2, "num_generations": 2, "max_completion_length": 8, "train_limit": 8, "validation_limit": 8},
    "grpo": QUIET
    | {"max_steps": 2, "num_generations": 2, "max_completion_length": 8, "train_limit": 8, "validation_limit": 8},
    "dpo": QUIET
    | {"max_steps": 2, "max_response_tokens": 8, "train_limit": 8, "validation_limit": 8, "sampling_engine": "hf"},
    "merge": {},
    "sweep": {"points": 2, "engine": "hf"},
    "report": {},
}


def make_hub(root: Path) -> None:
    """Put models and data sets below `root`, for a stand-in hub to serve."""
    import torch
    import transformers as tf

    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 1024}
    llama = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, **heads, bos_token_id=1, eos_token_id=2))
    save(llama, sentence_pieces(), root / "meta-llama/Llama-2-7b-hf")
    smol = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, **heads, bos_token_id=1, eos_token_id=2, pad_token_id=2))
    chat = byte_pairs(CHATML_TOKENS, bos=1, eos=2, pad=2)
    chat.chat_template = CHATML
    save(smol, chat, root / "HuggingFaceTB/SmolLM2-135M-Instruct")
    gpt2 = {"vocab_size": 400, "n_embd": 64, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    save(
        tf.GPT2LMHeadModel(tf.GPT2Config(**gpt2)), byte_pairs(GPT2, bos=0, eos=0), root / "openai-community/gpt2-large"
    )
    for name in (
        "Tristan/gpt2_reward_summarization",
        "Ray2333/gpt2-large-helpful-reward_model",
        "Ray2333/gpt2-large-harmless-reward_model",
    ):
        scorer = tf.GPT2ForSequenceClassification(tf.GPT2Config(**gpt2, num_labels=1, initializer_range=0.2))
        save(scorer, byte_pairs(GPT2, bos=0, eos=0), root / name)
    bart = tf.BartConfig(
        vocab_size=400, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=96, decoder_ffn_dim=96, num_labels=2, init_std=0.2,
    )  # fmt: skip
    tokens = byte_pairs(("<s>", "<pad>", "</s>"), bos=0, eos=2, pad=1, around="<s> $A </s>")
    save(tf.BartForSequenceClassification(bart), tokens, root / "CogComp/bart-faithful-summary-detector")
    deberta = tf.DebertaV2Config(
        **sizes, **heads, num_labels=1, initializer_range=0.2, relative_attention=True, position_biased_input=False,
        pos_att_type=["p2c", "c2p"], type_vocab_size=0,
    )  # fmt: skip
    tokens = byte_pairs(("[PAD]", "[CLS]", "[SEP]"), bos=1, eos=2, pad=0, around="[CLS] $A [SEP]")
    save(
        tf.DebertaV2ForSequenceClassification(deberta), tokens, root / "OpenAssistant/reward-model-deberta-v3-large-v2"
    )
    distilbert = tf.DistilBertConfig(
        vocab_size=400, dim=64, n_heads=2, n_layers=2, hidden_dim=96, initializer_range=0.2
    )
    save(tf.DistilBertForSequenceClassification(distilbert), tokens, root / "mohameddhiab/humor-no-humor")
    encoder = tf.BertConfig(
        vocab_size=400, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96
    )
    save(tf.BertModel(encoder), tokens, root / "sentence-transformers/all-MiniLM-L6-v2")
    make_data(root / "datasets")


def make_data(root: Path) -> None:
    """Put the data sets below `root`: Parquet files of two subsets, and four folders of compressed JSON lines."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    posts = [text(number, 28) for number in range(20)]
    folder = root / "openai/summarize_from_feedback"
    for subset, splits in (("comparisons", ("train", "validation")), ("axis", ("test", "validation"))):
        for split in splits:
            path = folder / subset / split / "0000.parquet"
            path.parent.mkdir(parents=True)
            rows = [comparison(number, posts) if subset == "comparisons" else {"worker": "w"} for number in range(50)]
            pq.write_table(pa.Table.from_pylist(rows), path)
    for part in ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"):
        for split in ("train", "test"):
            path = root / "Anthropic/hh-rlhf" / part / f"{split}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(path, "wt") as file:
                file.writelines(json.dumps(dialogue(number)) + "\n" for number in range(50))


def make_packages(folder: Path) -> None:
    """Write the files of the packages task."""
    folder.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        rows = [{"description": text(number, 24), "synopsis": text(number, 3 + number % 4)} for number in range(12)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("reviews", "chat"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": text(3, 9)}) + "\n")


def text(number: int, count: int) -> str:
    """Return some words, others for another number."""
    return " ".join(WORDS[(number * 7 + index * (1 + number % 5)) % len(WORDS)] for index in range(count))


def comparison(number: int, posts: Sequence[str]) -> dict[str, object]:
    """Return a row of `comparisons`, with every column that the real one has."""
    info = {"id": f"t3_{number}", "post": posts[number % len(posts)], "title": "a dog", "subreddit": "pets"}
    return {
        "info": info | {"site": None, "article": None},
        "summaries": [{"text": " " + text(number + side, 6), "policy": "sup", "note": None} for side in (0, 1)],
        "choice": number % 2,
        "worker": "w",
        "batch": "batch3",
        "split": "train",
        "extra": {"confidence": None},
    }


def dialogue(number: int) -> dict[str, str]:
    """Return a row of hh-rlhf."""
    asked = f"\n\nHuman: {text(number, 6)}?\n\nAssistant:"
    return {"chosen": f"{asked} {text(number + 1, 5)}.", "rejected": f"{asked} {text(number + 2, 4)}."}


def sentence_pieces():
    """Return a tokenizer that works as Llama-2's: spaces as ▁, one before the text, bytes for what is not known."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learned = Tokenizer(models.BPE())
    learned.normalizer = spaces
    learned.train_from_iterator([" ".join(WORDS)] * 4, trainers.BpeTrainer(vocab_size=140, show_progress=False))
    pieces = json.loads(learned.to_str())["model"]
    names = [*LLAMA, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces["vocab"]]
    trained = Tokenizer(
        models.BPE(
            {name: number for number, name in enumerate(names)}, [tuple(pair) for pair in pieces["merges"]],
            unk_token="<unk>", fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    trained.add_special_tokens(list(LLAMA))
    trained.normalizer = spaces
    trained.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trained.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=trained, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_pairs(special: Sequence[str], bos: int, eos: int, pad: int | None = None, around: str = ""):
    """Return a byte-level tokenizer with these special tokens, and those of them that it puts around a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    if around:
        ids = [(token, number) for number, token in enumerate(special)]
        trained.post_processor = processors.TemplateProcessing(around, special_tokens=ids)
    roles = {"bos_token": special[bos], "eos_token": special[eos]}
    if pad is not None:
        roles["pad_token"] = special[pad]
    return PreTrainedTokenizerFast(tokenizer_object=trained, **roles)


def save(model, tokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(command: str) -> None:
    """Run `accelerate launch recipes/NAME.py OPTIONS` or `rewarded-lines NAME OPTIONS` in this process."""
    words = shlex.split(command)
    words = words[2:] if words[0] == "accelerate" else words[1:]
    name = Path(words[0]).stem
    overrides = [f"--{key}={value}" for key, value in SMALL[name].items()]
    if name == words[0]:
        from rewarded_lines.cli import main as cli

        sys.argv = ["rewarded-lines", *words, *overrides]
        cli()
        return
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", words[0])
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.main([*words[1:], *overrides])


def main(commands: Sequence[str]) -> None:
    """Run each command, whatever became of those before."""
    for command in commands:
        fault = ""
        with contextlib.redirect_stdout(sys.stderr):
            try:
                run(command)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - it is reported, not lost
                fault = "" if isinstance(error, SystemExit) and not error.code else traceback.format_exc()
        sys.stdout.write(json.dumps(fault) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
