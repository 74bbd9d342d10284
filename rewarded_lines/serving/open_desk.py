"""The front desk of a running vLLM, opened in its process when the server starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rewarded_lines.errors import fail
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.recorded_choices import DEFAULT
from rewarded_lines.projects import load_project
from rewarded_lines.serving.front_desk import FrontDesk
from rewarded_lines.serving.menus import menu_of_project
from rewarded_lines.serving.served_settings import ServedSettings
from rewarded_lines.serving.weights_gate import WeightsGate


async def open_desk(settings: ServedSettings | None, state: Any) -> FrontDesk:
    """Return the desk of a server; one of whole models gets its first merge.

    Args:
        settings: those of `rewarded-lines serve`; None where vLLM was started by other means.
        state: of vLLM's application.

    Raises:
        UserError: there is no menu, or the first merge cannot be loaded.
    """
    given = settings or ServedSettings()
    points = {name: PointSpec.from_dict(dict(point)).merge for name, point in given.points.items()}
    facts = {"rewards": given.rewards, "points": given.measured, "chat": given.chat, **given.sampling}
    facts["admin"] = bool(given.admin)
    if given.whole:
        menu = menu_of_project(load_project(Path(given.project)), points, given.step, **given.how)
        gate = WeightsGate(state.engine_client)
        await gate.start(**given.whole, name=menu.canonical(DEFAULT), spec=menu.spec(DEFAULT))
        return FrontDesk(menu, gate, facts)
    # The plugin's menu: its names must be those of the middleware.
    served = getattr(state.openai_serving_models, "served", None)
    if served is None:
        what = "vLLM serves no preferences: its plugin `rewarded_lines` was not loaded, or there are no adapters"
        remedy = "install this package into vLLM's environment, and name the plugin if VLLM_PLUGINS is set"
        raise fail(what, where="vllm serve --middleware", remedy=remedy)
    menu = served.menu
    menu.add({DEFAULT: menu.spec(menu.example()), **points})
    return FrontDesk(menu, None, facts)
