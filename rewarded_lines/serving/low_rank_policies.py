"""`serve --rank K`: whole policies as LoRA adapters, made once and kept in a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import blake3

from rewarded_lines.checkpoints.adapters import names_adapter
from rewarded_lines.checkpoints.reader import read_json_object
from rewarded_lines.errors import UserError, fail
from rewarded_lines.folders import atomic_file
from rewarded_lines.merger.merge import merge
from rewarded_lines.merger.open_inputs import plan_as
from rewarded_lines.merger.record import RECORD_FILE, read_record
from rewarded_lines.progress import Progress
from rewarded_lines.projects import PROJECT_FILE, Project, load_project, with_places
from rewarded_lines.yaml_files import yaml_text

# Of the project, what a server reads.
_READ = ("base", "policies", "mixtures", "tokenizer", "config_from", "generation", "engine", "sweep")


def as_adapters(
    project: Project, rank: int, cache: Path, how: Mapping[str, Any], progress: Progress
) -> tuple[Project, list[str]]:
    """Return the project with each policy as the nearest adapter of a rank, and how much each holds of its policy.

    Args:
        project: with whole policies.
        rank: of each adapter; merges of N have rank N·K.
        cache: the folder that keeps the adapters; those of unchanged inputs are used again.
        how: layers, tower and other arguments of `merge`.
        progress: receives the steps.

    Raises:
        UserError: a policy is an adapter already, or cannot be approximated.
    """
    base = project.resolve(str(project.config.base))
    policies = {name: project.resolve(reference) for name, reference in project.config.policies.items()}
    if adapters := [name for name, reference in policies.items() if names_adapter(reference)]:
        what, remedy = f"`{adapters[0]}` is an adapter already", "leave --rank out: adapters are served as they are"
        raise fail(what, where="--rank", expected="whole models", got=", ".join(adapters), remedy=remedy)
    notes, made = [], {}
    # Projects in one folder may give one name to different policies.
    places = [os.path.realpath(one) if Path(one).exists() else one for one in (base, *policies.values())]
    own = blake3.blake3(json.dumps([places, how], sort_keys=True).encode()).hexdigest(length=4)
    for name, reference in policies.items():
        folder = cache / f"{name}-rank{rank}-{own}"
        if (held := _held(folder, base, {name: reference}, rank, how)) is None:
            progress.start(f"making the adapter of {name}")
            (result,) = merge(
                base,
                {name: reference},
                1.0,
                beta=0.0,
                as_="adapter",
                rank=rank,
                out=folder,
                overwrite=True,
                progress=progress,
                **how,
            )
            assert result.kept is not None
            held = result.kept.sentence()
        notes.append(f"{name}, rank {rank}: {held}")
        made[name] = str(folder.resolve())
    return _with_policies(project, made, cache / f"rank{rank}-{own}-{PROJECT_FILE}"), notes


def _held(folder: Path, base: str, policy: Mapping[str, str], rank: int, how: Mapping[str, Any]) -> str | None:
    """Return what an adapter in the cache holds, None if it is missing or its inputs are others now."""
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    try:
        record = read_record(path)
        plan = plan_as("adapter", base, policy, "soup", rank=rank, **how)
        record.check_inputs(path, plan)
        same = (record.rank, record.layers, record.tower) == (rank, how.get("layers"), how.get("tower"))
        notes = read_json_object(path)["kept"]
    except (UserError, KeyError):
        return None
    return f"the adapter in {folder} holds {notes['kept']:.2%} of the policy's residual" if same else None


def _with_policies(project: Project, policies: Mapping[str, str], path: Path) -> Project:
    """Write a project file with these policies, all paths absolute, and return it."""

    def moved(kind: str, name: str) -> str:
        found = project.resolve(name)
        return os.path.realpath(found) if Path(found).exists() else name

    content = project.config.model_dump(mode="json", exclude_defaults=True)
    kept = {key: with_places(value, moved, (key,)) for key, value in content.items() if key in _READ}
    kept |= {"policies": policies, **project.carried}
    kept["tokenizer"] = moved("model", kept["tokenizer"])
    with atomic_file(path) as partial:
        partial.write_text(yaml_text(dict(kept)), encoding="utf-8")
    return load_project(path)
