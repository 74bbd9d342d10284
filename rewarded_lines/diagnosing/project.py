"""The project file: does it parse, and is all there that it names."""

from __future__ import annotations

from pathlib import Path

from rewarded_lines.config import CONTROL, DataSpec
from rewarded_lines.diagnosing.findings import Finding
from rewarded_lines.errors import UserError
from rewarded_lines.projects import PROJECT_FILE, Project, load_project
from rewarded_lines.references import local_path, looks_local


def check_project_file(config: Path | None) -> Finding | None:
    """Say whether a project can be opened; None where there is none to look at.

    Args:
        config: the file; the one in the current folder by default.
    """
    path = config or Path(PROJECT_FILE)
    if config is None and not path.is_file():
        return None
    try:
        project = load_project(path)
    except UserError as error:
        return Finding("project", "broken", str(error), "correct it there")
    missing = [f"{place}: {what}" for place, what in _paths(project) if not what.exists()]
    if missing:
        found = f"{path} names what is not there\n" + "\n".join(missing)
        return Finding("project", "broken", found, f"correct {path}; its paths begin in its own folder")
    spec = project.config
    return Finding("project", "ok", f"{path}: {len(spec.policies)} policies, {len(spec.rewards)} rewards")


def _paths(project: Project) -> list[tuple[str, Path]]:
    """Return every place on this disk that a project names, with the key that does."""
    spec, root = project.config, project.root
    models = {"base": spec.base or ""}
    models |= {f"policies.{name}": path for name, path in spec.policies.items()}
    models |= {f"baselines.{name}": path for name, path in spec.baselines.items()}
    models |= {f"rewards.{name}": reward.model for name, reward in spec.rewards.items() if reward.model}
    found = [(key, Path(project.resolve(path))) for key, path in models.items() if path and looks_local(path, root)]
    for name, reward in spec.rewards.items():
        source = (reward.function or "").rpartition(":")[0]
        if source.endswith(".py"):
            found.append((f"rewards.{name}", local_path(source, root)))
    rows: dict[str, DataSpec | None] = {"prompts": spec.prompts}
    rows |= {CONTROL if name == CONTROL else f"{CONTROL}.{name}": data for name, data in spec.control.items()}
    if spec.sweep.tune:
        rows["sweep.tune.prompts"] = spec.sweep.tune.prompts
    found += [(key, local_path(data.file, root)) for key, data in rows.items() if data and data.file]
    if spec.generation.chat_template:
        found.append(("generation.chat_template", local_path(spec.generation.chat_template, root)))
    return found
