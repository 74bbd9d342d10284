"""The server's side: from the name in a request to the adapter that vLLM loads."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import blake3
import torch

from rewarded_lines.checkpoints.dtypes import as_torch
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.engines.vllm_adapters import refuse_unserved
from rewarded_lines.engines.vllm_models import spec_message
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.merger.adapter_plan import AdapterPlan
from rewarded_lines.merger.adapter_settings import served_rank
from rewarded_lines.merger.open_inputs import plan_adapters
from rewarded_lines.projects import load_project
from rewarded_lines.serving.menus import menu_of_adapters, menu_of_project
from rewarded_lines.serving.merged_adapters import adapter_path
from rewarded_lines.serving.preference_names import STEP, Menu, PreferenceError
from rewarded_lines.serving.served_settings import PROJECT, SETTINGS

_log = logging.getLogger("vllm.rewarded_lines")
_REMEMBERED = 4096
TOGETHER = "preferences"
"""Stands for all preferences where vLLM counts requests by adapter."""
# The names in use, for `is_served`; vLLM's counters know no server.
_opened: list[ServedPolicies] = []


class ServedPolicies:
    """Policies that one server merges by request. It is at `app.state.openai_serving_models.served`.

    Nothing here grows with the number of preferences: an adapter's number in vLLM is the hash of its name, so it is
    the same in all processes of a server and needs no list. What vLLM has forgotten is simply made again.
    """

    def __init__(self, menu: Menu, rank: int, dtype: torch.dtype) -> None:
        """Open the policies of a menu.

        Args:
            menu: what requests may ask for.
            rank: vLLM's max_lora_rank.
            dtype: of adapters in vLLM.

        Raises:
            UserError: policies do not go together, or vLLM does not serve such adapters.
        """
        self.menu, self._rank, self._dtype = menu, rank, dtype
        plan = plan_adapters(menu.base, menu.policies, **menu.how)
        refuse_unserved(plan, "the server's policies", "merge with `--as full` and serve the result")
        self._plan = plan.without_repeats()
        # The folders of a Hub id that this process has found, so that workers open the same.
        folders = {name: str(policy.folder.resolve()) for name, policy in plan.policies.items()}
        self._source = {**menu.how, "base": str(plan.base.folder.resolve()), "policies": folders}
        self._largest = _largest_values(plan)
        self._one_at_a_time = threading.RLock()
        self._canonical = lru_cache(_REMEMBERED)(self._checked)
        self._request = lru_cache(_REMEMBERED)(self._made)

    async def ready(self, name: str) -> str:
        """Return the canonical name of a model that this server can answer with.

        Raises:
            PreferenceError: there is no such model; `status` is that of the answer.
        """
        # Rows with matched norms take time.
        return await asyncio.to_thread(self._canonical, name)

    def request(self, name: str) -> Any:
        """Return vLLM's request for the adapter of a model; None for the base. Errors as `ready`."""
        with self._one_at_a_time:
            return self._request(self._canonical(name))

    def serves(self, name: object) -> bool:
        """True if there is a model with this name."""
        try:
            return isinstance(name, str) and bool(self._canonical(name))
        except PreferenceError:
            return False

    def _checked(self, name: str) -> str:
        # Requests wait in threads, and plans keep what they have found.
        with self._one_at_a_time:
            canonical = self.menu.canonical(name)
            self._request(canonical)
        return canonical

    def _made(self, canonical: str) -> Any:
        from vllm.lora.request import LoRARequest

        spec = self.menu.spec(canonical)
        stacks = self._plan.output(spec).stacks
        parts = [((name, part.policy), part.factor) for name, stack in stacks.items() for part in stack.parts]
        if not parts:
            return None
        self._check(
            canonical, self._plan.rank(spec), max(max(abs(factor), 1.0) * self._largest[key] for key, factor in parts)
        )
        path = adapter_path(self._source, spec_message(spec))
        # vLLM wants numbers from 1 to 2⁶³ − 1; those of its own adapters begin at 1.
        digest = blake3.blake3(f"{canonical}\n{path}".encode()).digest(8)
        return LoRARequest(canonical, int.from_bytes(digest) >> 1 | 1 << 62, path)

    def _check(self, name: str, rank: int, largest: float) -> None:
        """Refuse what no slot can hold."""
        if rank > self._rank:
            raise PreferenceError(
                Problem(
                    "the merged adapter has the sum of its policies' ranks",
                    f"model `{name}`",
                    f"at most {self._rank}, the server's --max-lora-rank",
                    str(rank),
                    f"start the server with --max-lora-rank {served_rank(rank)}, or ask for fewer policies",
                )
            )
        if not largest <= torch.finfo(self._dtype).max:
            got = f"values beyond {str(self._dtype).removeprefix('torch.')}"
            raise PreferenceError(Problem("the merged adapter is too large", f"model `{name}`", "smaller weights", got))


def _largest_values(plan: AdapterPlan) -> dict[tuple[str, int], float]:
    """Return by module and policy the largest size of a value, of A or B."""

    def largest(index: int, info: TensorInfo) -> float:
        return float(as_torch(plan.adapters[index].read(info.name), info.dtype).abs().max())

    return {
        (name, index): max(largest(index, module.a), largest(index, module.b))
        for name, alike in plan.modules.items()
        for index, module in alike.items()
    }


class PreferenceRequests(dict):
    """vLLM's adapters by name: its own ones, and every preference on the menu, which is listed nowhere."""

    def __init__(self, own: Mapping[str, Any], served: ServedPolicies) -> None:
        """Take over vLLM's own."""
        super().__init__(own)
        self._served = served

    def __contains__(self, name: object) -> bool:
        """True for a preference, too."""
        return super().__contains__(name) or self._served.serves(name)

    def __missing__(self, name: str) -> Any:
        """Return a preference's adapter."""
        return self._served.request(name)


def is_served(name: str) -> bool:
    """True if a name that vLLM counts is a preference: their adapters have canonical names."""
    return any(one.serves(name) and one.menu.canonical(name) == name for one in _opened)


async def serve_policies(models: Any) -> None:
    """Let a server answer for preferences; `models` is vLLM's `OpenAIServingModels`.

    Policies are those of the project that the environment names, or else the server's adapters. If the latter do not
    go together the server starts all the same, since its owner may not want preferences; its log says why.

    Raises:
        UserError: the policies of a project cannot be served.
    """
    project = os.environ.get(PROJECT)
    try:
        await _open(models, project)
    except UserError as error:
        if project:
            raise
        _log.warning("No preferences are served: %s", error)


async def _open(models: Any, project: str | None) -> None:
    config = models.engine_client.vllm_config.lora_config
    if config is None and project:
        raise fail("adapters are switched off", where="vllm serve", remedy="add --enable-lora")
    menu = _menu(models, project) if config else None
    if config is None or menu is None:
        return
    served = ServedPolicies(menu, config.max_lora_rank, config.lora_dtype)
    await _try_out(models.engine_client, served)
    models.lora_requests, models.served = PreferenceRequests(models.lora_requests, served), served
    _opened.append(served)
    _log.info("Preferences over %s are served, such as model=%r", ", ".join(menu.policies), menu.example())


def _menu(models: Any, project: str | None) -> Menu | None:
    """Return the menu of a project, or else of the adapters on vLLM's command line; None without any."""
    base, given = models.model_config.model, {name: os.environ.get(place) or None for name, place in SETTINGS.items()}
    how: dict[str, Any] = {name: given[name] for name in ("layers", "tower")}
    try:
        step = float(given["step"] or STEP)
    except ValueError as error:
        raise fail("not a number", where=SETTINGS["step"], got=str(given["step"])) from error
    if project:
        menu = menu_of_project(load_project(project), step=step, **how)
        if menu.base != base and os.path.realpath(menu.base) != os.path.realpath(base):
            remedy = "serve the project's base"
            raise fail("another base", where=project, expected=menu.base, got=f"vllm serve {base}", remedy=remedy)
        return menu
    # Those of a modality are applied to requests that do not ask for them.
    others = models.engine_client.vllm_config.lora_config.default_mm_loras or {}
    policies = {one.name: one.path for one in models.static_lora_modules or () if one.name not in others}
    return menu_of_adapters(base, policies, step, **how) if policies else None


async def _try_out(engine: Any, served: ServedPolicies) -> None:
    """Load every policy alone, and all together, once: a fault must not stop the engine in the midst of requests."""
    policies = list(served.menu.policies)
    problems: list[Problem] = []
    for name in (served.menu.example("soup"), *policies):
        try:
            request = served.request(name)
        except PreferenceError as error:
            problems += error.problems
            continue
        try:
            await engine.add_lora(request)
            await engine.remove_lora(request.lora_int_id)
        except Exception as error:
            raise fail("vLLM does not take the merged adapters", where=f"model `{name}`", got=str(error)) from error
    if len(problems) > len(policies):
        raise UserError(problems)
    for problem in problems:
        _log.warning("%s", problem)
