"""Which model a request gets, and what clients may know about the menu; opened when vLLM starts. No HTTP is here."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewarded_lines.errors import Problem, fail
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.recorded_choices import DEFAULT
from rewarded_lines.merger.spec import MergeSpec, simplex_grid
from rewarded_lines.projects import load_project
from rewarded_lines.serving.menus import menu_of_project
from rewarded_lines.serving.preference_names import Menu, PreferenceError
from rewarded_lines.serving.served_settings import ServedSettings
from rewarded_lines.serving.weights_gate import WeightsGate

# Policies of which /v1/models lists a lattice of λ; of more, it lists each alone.
_FEW = 3


@dataclass
class FrontDesk:
    """The menu of a server, and the rules of its mode.

    With adapters each request has its own merge, and the base's name is the base. Whole models are one merge for all
    requests, in `gate`; the name `default` is theirs.

    Attributes:
        menu: what can be asked for; its point `default` answers requests that name nothing.
        gate: of a server of whole models, else None.
        facts: more entries of GET /preferences: rewards, points, chat, admin.
    """

    menu: Menu
    gate: WeightsGate | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The base's name for clients."""
        return Path(self.menu.base).name

    @property
    def default(self) -> str:
        """The canonical name of the merge for requests that name none."""
        return self.gate.name if self.gate else self.menu.canonical(DEFAULT)

    def asked(self, body: Mapping[str, Any], bases: Collection[str]) -> str | None:
        """Return the canonical name of the merge that a request asks for, None for any other model.

        `bases` are the names under which the engine serves the model that it was started with.

        Raises:
            PreferenceError: the preference, the row or the name is not on the menu, or they contradict each other.
        """
        model, preference, row = (body.get(key) for key in ("model", "preference", "row"))
        plain = model in (None, "", DEFAULT, self.base) or model in bases
        if preference is not None:
            if not plain:
                raise _refused("a model and a preference", "preference", f"model `{DEFAULT}`", str(model)[:80])
            return self.menu.name_for(preference, row)
        if row is not None:
            raise _refused("a row without weights", "row", "`preference` beside it", str(row)[:80])
        if model in (None, "", DEFAULT):
            return self.default
        if not isinstance(model, str) or model in bases:
            return None
        try:
            return self.menu.canonical(model)
        except PreferenceError as error:
            # Perhaps the engine knows it.
            if error.status == 404 and "@" not in model:
                return None
            raise

    def check_loaded(self, name: str | None, model: Any) -> None:
        """Refuse a request for another merge than the one that a server of whole models holds; call it in `gate`."""
        assert self.gate is not None
        there = f"this server holds {self.gate.name}, which the model `{DEFAULT}` is"
        if name is None and model == self.base:
            raise PreferenceError(Problem("the base itself is not served", f"model `{model}`", there), 404)
        if name is not None and name != self.gate.name:
            remedy = "POST /preference changes the weights, for everybody"
            raise PreferenceError(Problem("other weights are loaded", f"model `{name}`", there, remedy=remedy), 409)

    def place(self, name: str) -> dict[str, float]:
        """Return the weights of a merge by policy, by reward where policies were trained for mixtures."""
        return place_of(self.menu, self.menu.spec(name))

    def preferences(self) -> dict[str, Any]:
        """Return the answer to GET /preferences."""
        name, menu = self.default, self.menu.as_dict()
        row = name.partition("@")[0] if "@" in name else menu["row"]
        mode = "whole" if self.gate else "adapters"
        current = {"row": row, "current": self.place(name), "model": name}
        return {**menu, "base": self.base, "mode": mode, **current, "points": [], "rewards": [], **self.facts}

    def cards(self, listed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the answer's data of GET /v1/models: what the engine lists, then the merges one can ask for."""
        cards = [dict(card) for card in listed]
        known, like = {card["id"] for card in cards}, {**cards[0], "parent": self.base}
        for name in dict.fromkeys([DEFAULT, self.default] if self.gate else [DEFAULT, *self._offered()]):
            if name not in known:
                spec = self.gate.name if self.gate else name
                cards.append({**like, "id": name, "root": self.menu.base, "preference": self.place(spec)})
        return cards

    def _offered(self) -> Iterator[str]:
        """Yield names that show what can be asked for."""
        yield from self.menu.points
        yield from (point["model"] for point in self.facts.get("points", ()) if point["row"] is not None)
        count = len(self.menu.names)
        alone = [tuple(float(one == other) for other in range(count)) for one in range(count)]
        for weights in simplex_grid(count, 5) if count <= _FEW else alone:
            yield self.menu.canonical(f"{self.menu.row}@{','.join(map(repr, weights))}")


def place_of(menu: Menu, spec: MergeSpec) -> dict[str, float]:
    """Return the weights of a merge by the names that the menu takes."""
    if menu.mixtures:
        return menu.mixtures.preference(spec.weights)
    return dict(zip(menu.names, spec.weights, strict=True))


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


def _refused(what: str, where: str, expected: str, got: str) -> PreferenceError:
    return PreferenceError(Problem(what, where, expected, got))
