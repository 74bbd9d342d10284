"""All checks, those that load libraries side by side; nothing is changed and no network asked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path

from rewarded_lines.diagnosing.findings import Finding
from rewarded_lines.diagnosing.imports import check_torch, check_transformers, check_vision, check_vllm
from rewarded_lines.diagnosing.machine import check_caches, check_disks, check_hub, check_processor, graphics_cards
from rewarded_lines.diagnosing.packages import check_core, check_extras, check_ppo, check_python
from rewarded_lines.progress import SILENT, Progress

Found = Finding | list[Finding] | None


def diagnose(
    config: Path | None = None,
    *,
    thorough: bool = False,
    progress: Progress = SILENT,
) -> list[Finding]:
    """Return what every check finds, in the order of `_checks`.

    Args:
        config: the project file; by default the one in the current folder, if there is one.
        thorough: have vLLM build an engine on a tiny random model, too.
        progress: is told of each check that is done.
    """
    checks = _checks(config, thorough)
    progress.expect(len(checks))
    progress.start("looking", counted=True)
    # Children wait for the disk as much as they compute.
    with ThreadPoolExecutor(max(2, len(os.sched_getaffinity(0)))) as pool:
        running: dict[Future[Found], str] = {pool.submit(_safely, name, check): name for name, check in checks.items()}
        try:
            for done in as_completed(running):
                progress.advance(1, running[done])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    found: list[Finding] = []
    for future in running:
        result = future.result()
        found += result if isinstance(result, list) else [result] if result else []
    return found


def _checks(config: Path | None, thorough: bool) -> dict[str, Callable[[], Found]]:
    root = config.parent if config else Path()
    return {
        "Python": check_python,
        "packages": check_core,
        "extras": check_extras,
        "PPO": check_ppo,
        "torch and GPU": _torch,
        "torchvision": check_vision,
        "transformers": check_transformers,
        "vLLM": lambda: check_vllm(thorough),
        "compiler": _compiler,
        "processor": check_processor,
        "disks": lambda: check_disks(root),
        "caches": check_caches,
        "Hub": check_hub,
        "project": lambda: _project(config),
    }


def _safely(name: str, check: Callable[[], Found]) -> Found:
    """Make a check that fails itself a finding: the others must be heard."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - what is broken here, and how, is what nobody knows before
        return Finding(name, "broken", f"could not be looked at: {type(error).__name__}: {error}")


def _project(config: Path | None) -> Finding | None:
    """Look at the project, if there is what it is read with; `check_core` tells what is missing."""
    try:
        from rewarded_lines.diagnosing.project import check_project_file
    except ImportError:
        return None
    return check_project_file(config)


def _torch() -> list[Finding]:
    return check_torch(graphics_cards())


def _compiler() -> Finding | None:
    """Look for a C compiler where one is needed: on a GPU Triton compiles its launchers, on a CPU nothing does."""
    if find_spec("triton") is None or find_spec("vllm") is None or not graphics_cards():
        return None
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if found:
        return Finding("C compiler", "ok", found)
    return Finding("C compiler", "broken", "none: Triton needs one on a GPU", "apt-get install gcc")
