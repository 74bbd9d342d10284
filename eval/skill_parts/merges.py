"""Merges of several skills as weights of one model in memory, and what is right and wrong under each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rewarded_lines.engines.resident import Resident
from rewarded_lines.folders import atomic_file
from rewarded_lines.merger.open_inputs import plan_merge
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.pipelines.recipe_jobs import digest
from skill_parts.likelihoods import label_scores, text_losses
from skill_parts.texts import SKILLS

PLAIN = "plain"
"""Names the losses on plain texts among the skills' results."""
Results = Mapping[str, Sequence[float]]
"""By skill, 1 or 0 for each row: whether the right label is the most likely one. By `PLAIN`, the loss of each text."""


@dataclass(frozen=True)
class Family:
    """A way to join all skills, with the numbers that its authors name.

    Attributes:
        method: a key of `METHODS`.
        summed: whether each residual has weight 1; else 1/N.
        plain: the factor where no validation data are there: 0.4 for sums (Task Arithmetic), 1 for means (TIES).
        most: the largest β that is tried: 1, and 1.5 for TIES, as LiNeS' authors do.
    """

    method: str
    summed: bool
    plain: float
    most: float = 1.0

    def spec(self, count: int, alpha: float, beta: float = 0.0) -> MergeSpec:
        """Return the merge of `count` skills with a schedule."""
        weights = (1.0 if self.summed else 1 / count,) * count
        return MergeSpec(weights, alpha, beta, self.method).complete(count)


FAMILIES: Mapping[str, Family] = {
    "Average": Family("uniform", summed=False, plain=1.0),
    "Task Arithmetic": Family("task-arithmetic", summed=True, plain=0.4),
    "TIES": Family("ties", summed=False, plain=1.0, most=1.5),
    "Consensus": Family("consensus", summed=True, plain=0.4),
}


def alone(place: int, count: int, alpha: float = 1.0, beta: float = 0.0) -> MergeSpec:
    """Return the merge that is one of `count` fine-tuned models, with a schedule."""
    return MergeSpec(tuple(float(at == place) for at in range(count)), alpha, beta)


def scheduled(spec: MergeSpec, blocks: Sequence[float]) -> MergeSpec:
    """Return a merge with a scale for each block in place of α and β."""
    from rewarded_lines.merger.lines_schedule import Line

    return replace(spec, alpha=1.0, beta=1.0, lines=(Line(blocks=tuple(blocks)),))


class Merges:
    """Base and fine-tuned models in memory; results are kept in a folder, and not measured twice."""

    def __init__(self, base: Path, models: Mapping[str, Path], data: Path, scores: Path, dtype: str) -> None:
        """Open the inputs; the model itself is loaded when something is measured.

        Args:
            base: folder of the base.
            models: folder of each skill's model, by skill.
            data: folder of the texts.
            scores: keeps a Parquet file for each merge and split.
            dtype: of the model that is measured; merges are rounded to it.
        """
        self.names = list(models)
        self.plan = plan_merge(str(base), {name: str(path) for name, path in models.items()})
        self._base, self._data, self._scores, self._dtype = base, data, scores, dtype
        self._loaded: tuple[Any, Any, Resident] | None = None
        self._in_use: MergeSpec | None = None

    def measure(self, label: str, spec: MergeSpec, split: str, tasks: Sequence[str]) -> dict[str, list[float]]:
        """Return the results of some skills, or of `PLAIN`, under a merge; its file has `label` in its name."""
        key = digest([spec.as_dict(self.names), self._dtype])[:8]
        path = self._scores / split / f"{label}-{key}.parquet"
        known = read_results(path) if path.is_file() else {}
        if missing := [task for task in tasks if task not in known]:
            model, tokenizer = self._hold(spec)
            known |= {task: self._measure(model, tokenizer, task, split) for task in missing}
            write_results(path, known)
        return {task: known[task] for task in tasks}

    def _measure(self, model: Any, tokenizer: Any, task: str, split: str) -> list[float]:
        rows = read_rows(self._data / f"{task}-{split}.jsonl")
        if task == PLAIN:
            return [float(loss) for loss in text_losses(model, tokenizer, [row["text"] for row in rows])]
        answers = SKILLS[task].answers
        best = label_scores(model, tokenizer, [row["prompt"] for row in rows], answers).argmax(axis=1)
        return [float(answers[place] == row["completion"]) for place, row in zip(best, rows, strict=True)]

    def _hold(self, spec: MergeSpec) -> tuple[Any, Any]:
        """Put a merge's weights into the model."""
        if self._loaded is None:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self._base, trust_remote_code=False)
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            kind = getattr(torch, self._dtype)
            model = AutoModelForCausalLM.from_pretrained(self._base, dtype=kind, trust_remote_code=False).eval()
            self._loaded = model, tokenizer, Resident(self.plan, "host")
        model, tokenizer, inputs = self._loaded
        if spec != self._in_use:
            own = {name for name, _ in model.named_parameters()}
            given = dict(inputs.tensors(spec))
            assert own <= given.keys(), own - given.keys()
            model.load_state_dict(given, strict=False)
            self._in_use = spec
        return model, tokenizer


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_results(path: Path, results: Results) -> None:
    """Write results as a table of task, row and value."""
    flat = [(task, row, value) for task, values in results.items() for row, value in enumerate(values)]
    columns = list(zip(*flat, strict=True))
    table = pa.table(dict(zip(("task", "row", "value"), columns, strict=True)))
    with atomic_file(path) as partial:
        pq.write_table(table, partial)


def read_results(path: Path) -> dict[str, list[float]]:
    """Return results by task, in the order of the rows."""
    found: dict[str, list[float]] = {}
    for row in pq.read_table(path).to_pylist():
        found.setdefault(row["task"], []).append(row["value"])
    return found


def accuracies(results: Results) -> dict[str, float]:
    """Return the mean of each task's results."""
    return {task: float(np.mean(values)) for task, values in results.items()}
