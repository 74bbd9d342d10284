"""The verdicts on every class of transformers, and the page that shows them.

python tests/every_class_table.py LlamaForCausalLM     # one class, whole models and LoRA
python tests/every_class_table.py                      # every class, into every_class.jsonl
python tests/every_class_table.py --table every_class.jsonl > docs/every-class.md
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from every_class import KINDS, Verdict, classes, try_class

LONGEST = 120
PAGE = Path(__file__).parents[1] / "docs" / "every-class.md"
_LONGEST_REASON = 110
HEAD = """\
# Every class of transformers

What comes out for each language and image-text class of transformers {version}. The class is built tiny, saved as base
and two policies, merged with LiNeS, and loaded again. The LoRA policies are PEFT's `all-linear`.

What the merge must be is computed in memory, in float64. The depth of a weight is its place in transformers' own lists
of modules, the change by LoRA is PEFT's own.

- *right*: every value of every tensor is the expected one.
- *layers*: the same with the `--layers` or the `--tower` that the refusal names.
- *refused*: nothing is written.
- *not built*: the class needs a library that is not installed here, or transformers or PEFT cannot save and load it.

The table is what `python tests/every_class_table.py` printed.
"""
_TITLES = {"whole": "whole models", "adapter": "LoRA as adapter", "full": "LoRA, folded"}
_OUTCOMES = ("right", "layers", "refused", "wrong", "not built")


def in_a_process(work: Callable[[], None]) -> bool:
    """Run some work in a fork of this process; return whether it ended by itself and in time."""
    child = os.fork()
    if child == 0:
        # Unhandled, so that they also end what waits for a lock; seconds of work count, not of a busy machine.
        signal.setitimer(signal.ITIMER_PROF, LONGEST)
        signal.alarm(10 * LONGEST)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def write(verdicts: list[Verdict], path: Path) -> None:
    """Print verdicts, and add them to a file."""
    with path.open("a") as file:
        for verdict in verdicts:
            file.write(json.dumps(asdict(verdict)) + "\n")
            sys.stdout.write(f"{verdict.name:45}{verdict.policies:9}{verdict.outcome:10}{verdict.why}\n")
    sys.stdout.flush()


def table(verdicts: Sequence[Verdict]) -> str:
    """Return the page: the sums, then a row for each class."""
    import transformers

    lines = [
        HEAD.format(version=transformers.__version__),
        f"| | classes | {' | '.join(_OUTCOMES)} |",
        "|:--" + "|--:" * 6 + "|",
    ]
    for group in ("text", "image"):
        for kind in KINDS:
            found = [one.outcome for one in verdicts if (one.group, one.policies) == (group, kind)]
            sums = " | ".join(str(found.count(outcome)) for outcome in _OUTCOMES)
            lines.append(f"| {group}, {_TITLES[kind]} | {len(found)} | {sums} |")
    for group, title in (("text", "Language models"), ("image", "Image-text models")):
        lines += ["", f"## {title}", "", f"| class | {' | '.join(_TITLES.values())} | why |", "|:--|:--|:--|:--|:--|"]
        names = sorted({one.name for one in verdicts if one.group == group}, key=str.lower)
        lines += [_row(name, {one.policies: one for one in verdicts if one.name == name}) for name in names]
    return "\n".join(lines) + "\n"


def _row(name: str, found: dict[str, Verdict]) -> str:
    outcomes = [found[kind].outcome if kind in found else "" for kind in KINDS]
    reasons = dict.fromkeys(_short(found[kind].why) for kind in KINDS if kind in found and found[kind].why)
    return f"| `{name}` | {' | '.join(outcomes)} | {'; '.join(reasons)} |"


def _short(why: str) -> str:
    """Return a reason without the folders of a run and without what was expected and got, fit for a table."""
    said = re.sub(r"\S*every-class-\S+", "…", why.split(" | ")[0])
    said = " ".join(said.replace("|", "/").split())
    return said if len(said) <= _LONGEST_REASON else f"{said[:_LONGEST_REASON]}…"


def read(path: Path) -> list[Verdict]:
    """Return the last verdict on each class and kind in a file."""
    rows = [Verdict(**json.loads(line)) for line in path.read_text().splitlines()]
    return list({(row.name, row.policies): row for row in rows}.values())


def main(arguments: list[str]) -> None:
    """Try the classes, each in a process, and write the verdicts to a file; or print the page of a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="classes; all by default")
    parser.add_argument("--verdicts", type=Path, default=Path("every_class.jsonl"), help="the file they are added to")
    parser.add_argument("--policies", nargs="*", default=KINDS, help=f"some of {', '.join(KINDS)}")
    parser.add_argument("--skip", nargs="*", default=(), help="classes to leave out")
    parser.add_argument("--table", type=Path, help="print the page of a file of verdicts, and try nothing")
    chosen = parser.parse_args(arguments)
    if chosen.table:
        sys.stdout.write(table(read(chosen.table)))
        return
    try_all([name for name in chosen.names or classes() if name not in chosen.skip], chosen.policies, chosen.verdicts)


def try_all(names: Sequence[str], kinds: Sequence[str], path: Path) -> None:
    """Try classes, each in a process, and add the verdicts to a file."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    known = classes()
    _warm_up()
    for name in names:
        if not in_a_process(lambda name=name: write(try_class(name, known[name], kinds), path)):
            write([Verdict(name, known[name], kind, "not built", f"not done in {LONGEST} s") for kind in kinds], path)


def _warm_up() -> None:
    """Import and compile what every class needs, once for all processes."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try_class("LlamaForCausalLM", "text")


if __name__ == "__main__":
    main(sys.argv[1:])
