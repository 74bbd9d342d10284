"""The pages of this repository, taken apart: their commands, code, links, and a folder in which they can be run."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tiny_adapters import save_adapter
from tiny_models import PROMPTS, make_model, perturb, save_model
from trainer_outputs import save_everything

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`((?:make|rewarded-lines|accelerate launch|python) [^`]+)`")
# What only stands for something: RUN, NAME, FOLDER …, and what a shell would expand.
_PLACEHOLDER = re.compile(r"(^|[ /=])[A-Z]{2,}([ /=.]|$)|…|\.\.\.")


@dataclass(frozen=True)
class Page:
    """One Markdown file."""

    path: Path

    @property
    def name(self) -> str:
        """Its path in the repository."""
        return str(self.path.relative_to(ROOT))

    @cached_property
    def text(self) -> str:
        """All of it."""
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def blocks(self) -> list[tuple[str, str]]:
        """Language and content of every fenced block, in order."""
        return _BLOCK.findall(self.text)

    @cached_property
    def lines(self) -> list[str]:
        """The commands of its `bash` blocks; a backslash at the end of a line goes on in the next one."""
        shell = (code for language, code in self.blocks if language == "bash")
        found = (re.sub(r"(^|\s)#.*", "", line) for code in shell for line in code.replace("\\\n", " ").splitlines())
        return [line.strip() for line in found if line.strip()]

    @cached_property
    def commands(self) -> list[str]:
        """Those, and the commands inside its sentences."""
        prose = " ".join(_BLOCK.sub("", self.text).split())
        return [*self.lines, *(inline for inline in _INLINE.findall(prose) if not _PLACEHOLDER.search(inline))]

    def links(self) -> Iterator[tuple[Path, str]]:
        """Yield the file and the heading of every link and picture that stays here."""
        for target in re.findall(r"\]\(([^)]+)\)", _BLOCK.sub("", self.text)):
            if "://" not in target:
                file, _, heading = target.partition("#")
                yield (self.path.parent / file if file else self.path), heading

    def headings(self) -> set[str]:
        """Return the anchors that GitHub gives its headings."""
        titles = re.findall(r"^#+ (.*)$", _BLOCK.sub("", self.text), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def pages() -> list[Page]:
    """Return every page that tells how something is done."""
    found = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    found += [path for top in ("recipes", "eval") for path in (ROOT / top).rglob("README.md")]
    return [Page(path) for path in sorted([*found, ROOT / "tests" / "benchmarks" / "README.md"])]


def starting(word: str) -> list[str]:
    """Return the commands of all pages that begin with a word, each once."""
    return list(dict.fromkeys(line for page in pages() for line in page.commands if shlex.split(line)[0] == word))


PROJECT = """\
title: documents
base: my-sft
policies: {helpful: ppo-helpful, brief: ppo-brief}
rewards:
  positive: {function: "rewards.py:positive", unit: share}
  detailed: {function: "rewards.py:detailed", unit: words}
prompts: {file: test.jsonl}
generation: {max_tokens: 8}
sweep: {points: 3, methods: [soup, lines], resamples: 100}
"""
REWARDS = """\
def positive(prompts, responses):
    return [sum(map(str.isalpha, response)) / (1 + len(response)) for response in responses]


def detailed(prompts, responses):
    return [20.0 * len(response.split()) for response in responses]
"""
MERGEKIT = """\
merge_method: task_arithmetic
base_model: my-sft
models: [{model: ppo-helpful, parameters: {weight: [0.4, 0.8]}}, {model: ppo-brief, parameters: {weight: [0.6, 1.2]}}]
"""


def make_stage(folder: Path) -> None:
    """Fill a folder with what the pages speak of, tiny: models, adapters, a project, the runs beside it."""
    save_model(make_model(0), folder / "my-sft")
    for seed, name in enumerate(("ppo-helpful", "ppo-brief", "a", "b"), start=1):
        save_model(perturb(make_model(0), seed), folder / name)
    for seed, name in enumerate(("lora-a", "lora-b"), start=1):
        save_adapter(folder / "my-sft", folder / name, seed)
    save_everything(folder)
    rows = (json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS * 2)
    texts = {
        "test.jsonl": "".join(rows),
        "rewards.py": REWARDS,
        "rewarded-lines.yaml": PROJECT,
        "config.yaml": MERGEKIT,
        "score.py": "import sys\nprint(len(sys.argv[1]))\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "runs").mkdir()
    for run in ("demo", "demo-full"):
        os.symlink("..", folder / "runs" / run)
