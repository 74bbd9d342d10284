"""The engines by name: which exist, whether one is installed, and how one is started."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.engine_settings import EngineSettings
from rewarded_lines.engines.base import Generator, Workload
from rewarded_lines.engines.vllm_arguments import check_names, check_work
from rewarded_lines.errors import fail
from rewarded_lines.extras import require
from rewarded_lines.merger.plan import Plan

ENGINES = ("vllm", "hf")


def is_url(engine: str) -> bool:
    """Return whether an engine is a server."""
    return engine.startswith(("http://", "https://"))


def check_engine(engine: str, option: str = "--engine") -> None:
    """Refuse an engine that is unknown or not installed as `require` wants it; `option` names it."""
    if is_url(engine):
        return
    if engine not in ENGINES:
        expected = f"{' or '.join(ENGINES)}, or the URL of a server"
        raise fail(f"unknown engine `{engine}`", where=option, expected=expected)
    if engine == "vllm":
        require("vllm", f"{option} vllm", otherwise=f"or use {option} hf")


def check_settings(settings: EngineSettings, plan: Plan | None = None) -> None:
    """Refuse settings that the installed vLLM does not have, or with which it cannot serve the merges of a plan."""
    check_names(settings)
    check_work(settings, plan)


def load_generator(engine: str, model: str, spec: GenerationSpec, prompts: Sequence[Prompt], **more: Any) -> Generator:
    """Start "vllm", "hf", or the engine at the URL of an OpenAI-compatible server; see `Workload` for the rest.

    Raises:
        UserError: no such engine, a plan that it does not support, or prompts that are too long.
    """
    check_engine(engine)
    work = Workload(model, spec, prompts, **more)
    if engine == "vllm":
        check_settings(work.settings, work.plan)
    kind = "" if work.plan is None else work.plan.kind
    if work.plan is not None and not work.plan.fits_base():
        raise fail(
            "the merged models do not fit into the base's: the head has weights of its own, or tokens were added",
            where=f"--engine {engine}",
            remedy="merge the points that you want into folders with `rewarded-lines merge`",
        )
    if is_url(engine):
        from rewarded_lines.engines.server_engine import RemoteGenerator

        if kind == "full":
            raise fail(
                "a server takes adapters, not the weights of whole models",
                where=engine,
                expected="LoRA adapters as policies",
                got="a merge of whole models",
                remedy="use --engine vllm or --engine hf",
            )
        return RemoteGenerator(engine, work)
    if engine == "hf":
        from rewarded_lines.engines.transformers_engine import HfGenerator

        assert kind != "adapter", "adapters are folded into their base for this engine"
        return HfGenerator(work)
    if kind == "adapter":
        from rewarded_lines.engines.vllm_adapters import VllmAdapterGenerator

        return VllmAdapterGenerator(work)
    from rewarded_lines.engines.vllm_models import VllmGenerator

    return VllmGenerator(work)
