"""Control texts for the packages: `python recipes/configs/smollm2/controls.py SFT FOLDER`, after recipes/sft.py.

FOLDER gets chat.jsonl, small talk in the model's own template with the SFT model's greedy answers, and reviews.jsonl,
critics' sentences on films from the demo's corpus. A policy that finds these texts less likely than the SFT model does
has forgotten something.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rewarded_lines.config import GenerationSpec
from rewarded_lines.demo.movie_reviews import corpus_path, read_reviews
from rewarded_lines.engines.base import Workload
from rewarded_lines.engines.transformers_engine import HfGenerator

REVIEWS = 40
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Name three planets.",
    "What does a baker do all day?",
    "Tell me something about elephants.",
    "What is two plus three?",
    "Write a sentence about the sea.",
    "How can I sleep better?",
    "What is the opposite of cold?",
    "Who wrote Hamlet?",
    "Give me a good name for a cat.",
    "What should I pack for a day in the mountains?",
    "Explain what a rainbow is.",
    "How many days has a week?",
    "What is bread made of?",
    "Say hello to my grandmother.",
    "Why do leaves fall in autumn?",
    "What can I cook with potatoes and cheese?",
    "How does a bicycle stay upright?",
)


def chats(sft: str) -> list[str]:
    """Return one conversation for each question, with the model's answer, as text in its template."""
    from transformers import AutoTokenizer

    turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
    spec = GenerationSpec(temperature=0, max_tokens=64)
    generator = HfGenerator(Workload(sft, spec, turns))
    try:
        answers = [response.text for response in generator.generate(turns, spec)[0]]
    finally:
        generator.close()
    tokenizer = AutoTokenizer.from_pretrained(sft, trust_remote_code=False)
    return [
        tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": answer}], tokenize=False)
        for asked, answer in zip(turns, answers, strict=True)
    ]


def reviews() -> list[str]:
    """Return the first reviews in the order of the corpus."""
    return [review.text for review in read_reviews(corpus_path())[:REVIEWS]]


def write(path: Path, texts: Sequence[str]) -> None:
    """Write texts as JSONL."""
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sft", help="folder of the SFT model")
    parser.add_argument("folder", type=Path, help="folder for the two files")
    arguments = parser.parse_args()
    write(arguments.folder / "chat.jsonl", chats(arguments.sft))
    write(arguments.folder / "reviews.jsonl", reviews())
