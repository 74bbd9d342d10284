"""What `serve` decides and checks before vLLM starts: mode, policies, points, memory, command."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.adapters import names_adapter
from rewarded_lines.engine_settings import EngineSettings
from rewarded_lines.engines.memory_levels import place_for
from rewarded_lines.engines.vllm_arguments import check_device, check_work
from rewarded_lines.engines.vllm_models import plan_message
from rewarded_lines.errors import fail
from rewarded_lines.evaluator.recorded_choices import DEFAULT
from rewarded_lines.evaluator.records import Run, load_run
from rewarded_lines.evaluator.sweep_options import SweepOptions
from rewarded_lines.evaluator.sweep_setup import engine_settings
from rewarded_lines.merger.model_plan import ModelPlan
from rewarded_lines.merger.open_inputs import plan_adapters, plan_merge
from rewarded_lines.merger.plan import Plan
from rewarded_lines.progress import Progress
from rewarded_lines.projects import PROJECT_FILE, Project, load_project
from rewarded_lines.references import located
from rewarded_lines.serving.http_messages import hashed
from rewarded_lines.serving.low_rank_policies import as_adapters
from rewarded_lines.serving.menus import menu_of_project
from rewarded_lines.serving.preference_names import Menu
from rewarded_lines.serving.run_points import chosen_points, default_point, measured_points
from rewarded_lines.serving.serve_options import LOCAL, ServeOptions
from rewarded_lines.serving.served_settings import PROJECT, SETTINGS, ServedSettings
from rewarded_lines.serving.server_checks import check_arguments, check_memory, check_plugin, check_run, free_port
from rewarded_lines.serving.vllm_command import environment, server_command, server_options

WHERE = "rewarded-lines serve"


@dataclass(frozen=True)
class ServerPlan:
    """A server that has been checked and can start.

    Attributes:
        command: starts vLLM.
        url: where it will answer.
        default: the canonical name of the merge for requests that name none.
        admin_key: for POST /preference; None on a server of adapters.
        told: what the user should know.
        environment: of that process.
    """

    command: Sequence[str]
    url: str
    default: str
    admin_key: str | None = None
    told: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def ready(self, kind: str, made: str | None) -> str:
        """Return what to print once the server answers: as "text", as "json", or nothing; `made`: a new admin key."""
        if kind == "json":
            return json.dumps({"url": self.url, "default": self.default, "admin_key": made})
        admin = f"\n  admin key for POST /preference: {made}" if made else ""
        return f"Serving on {self.url} (page), {self.url}/v1; default: {self.default}{admin}" if kind else ""


def plan_server(
    run: Path | str | None, config: Path | str | None, options: ServeOptions, progress: Progress, announce: str = ""
) -> ServerPlan:
    """Check everything, and return how the server starts; see `serve`. `announce`: "text" or "json" once it answers."""
    progress.start("reading the project")
    read = None if run is None else load_run(run)
    project = _project(config, read)
    settings = _settings(project, options)
    port = free_port(options.host, options.port)
    progress.start("opening checkpoints")
    how: dict[str, Any] = {"layers": options.layers, "tower": options.tower}
    plan = _open(project, how)
    told: list[str] = []
    if read is not None:
        progress.start("comparing the run with its policies")
        check_run(read.header, read.folder, plan)
    if options.rank is not None:
        cache = Path(options.cache) if options.cache else project.root / "served"
        project, told = as_adapters(project, options.rank, cache, how, progress)
        plan = _open(project, how)
    check_work(settings, plan)
    place = place_for(plan, settings) if isinstance(plan, ModelPlan) else None
    beside = place.beside if place else 0
    check_memory(plan, project.generation.dtype, settings, beside)
    served = {**server_options(project, plan, settings, beside), "host": options.host, "port": port}
    facts, default, notes = _facts(read, options, menu_of_project(project, step=options.step, **how))
    admin = (options.admin_key or secrets.token_urlsafe(24)) if place else None
    found = ServerPlan(
        command=server_command(plan.reference, served),
        url=_url(options.host, port, settings),
        default=default,
        admin_key=admin,
        told=[*told, *notes, *_warnings(options, place.why if place else "")],
    )
    given = ServedSettings(
        project=os.path.realpath(project.path),
        step=options.step,
        how=how,
        whole={"plan": plan_message(plan), "level": place.level} if place else {},
        chat=_has_template(project, plan),
        sampling={key: getattr(project.generation, key) for key in ("temperature", "max_tokens")},
        admin=hashed(admin) if admin else "",
        most_bytes=options.most_bytes,
        # A key that the user gave stays out of logs.
        ready=found.ready(announce, None if options.admin_key else admin),
        **facts,
    )
    # Empty ones, too: those of the user's shell are for plain vLLM.
    menu = {"step": str(options.step), **how} if place is None else {}
    own = {name: menu.get(key) or "" for key, name in SETTINGS.items()}
    own |= {**given.variable(), PROJECT: given.project if menu else "", "VLLM_API_KEY": options.api_key}
    return replace(found, environment=environment(settings, own))


def _project(config: Path | str | None, run: Run | None) -> Project:
    """Return the project that is named, or that of the run, or the one in this folder."""
    if config is None and run is not None:
        config = located(run.header["project"], run.folder)
    project = load_project(PROJECT_FILE if config is None else config)
    project.require("base", "policies")
    return project


def _settings(project: Project, options: ServeOptions) -> EngineSettings:
    """Return the engine's settings, checked against the installed vLLM and this machine."""
    given = SweepOptions(engine_args=options.engine_args, tensor_parallel=options.tensor_parallel)
    settings = engine_settings(project, given)
    check_arguments(settings)
    check_device(settings)
    check_plugin()
    return settings


def _open(project: Project, how: Mapping[str, Any]) -> Plan:
    """Return the merges of adapters if all policies are adapters, else of whole models."""
    base = project.resolve(str(project.config.base))
    policies = {name: project.resolve(reference) for name, reference in project.config.policies.items()}
    if all(map(names_adapter, policies.values())):
        return plan_adapters(base, policies, **how, **project.carried)
    plan = plan_merge(base, policies, dtype=project.generation.dtype, **how, **project.carried)
    if not plan.fits_base():
        what = "the merged models do not fit into the base's: the head has weights of its own, or tokens were added"
        raise fail(what, where=WHERE, remedy="merge the λ that you want with `rewarded-lines merge`, and serve that")
    return plan


def _facts(run: Run | None, options: ServeOptions, menu: Menu) -> tuple[dict[str, Any], str, list[str]]:
    """Return what a run adds to the settings, the name of the default, and notes."""
    chosen, notes = chosen_points(run.folder, menu) if run else ({}, [])
    point = default_point(run, options, menu, chosen)
    menu.add({name: one.merge for name, one in {**chosen, DEFAULT: point}.items()})
    facts = {
        "points": {name: one.as_dict() for name, one in {**chosen, DEFAULT: point}.items()},
        "rewards": [{"name": name, "unit": run.rewards[name]} for name in run.objectives] if run else [],
        "measured": measured_points(run, menu, chosen) if run else [],
    }
    if run and options.rank is not None:
        notes.append("the run's scores are those of the whole policies, not of their adapters")
    return facts, menu.canonical(DEFAULT), notes


def _warnings(options: ServeOptions, why: str) -> list[str]:
    found = [f"resident: {why}"] if why else []
    if options.host not in (LOCAL, "localhost", "::1") and not (options.api_key or os.environ.get("VLLM_API_KEY")):
        found.append(f"everybody who reaches {options.host} may use the server: pass --api-key")
    return found


def _has_template(project: Project, plan: Plan) -> bool:
    """Return whether chats can be turned into text: by the project's template, or by the tokenizer's."""
    from rewarded_lines.engines.tokenizers import load_tokenizer

    return bool(getattr(load_tokenizer(str(plan.text_folder), project.generation), "chat_template", None))


def _url(host: str, port: int, settings: EngineSettings) -> str:
    scheme = "https" if settings.args.get("ssl_certfile") else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
