"""A stand-in for vLLM's application, with the names that the middleware uses: it tells which request reached it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from rewarded_lines.evaluator.recorded_choices import DEFAULT
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.serving.front_desk import FrontDesk
from rewarded_lines.serving.menus import menu_of_adapters
from rewarded_lines.serving.middleware import PreferenceMiddleware
from rewarded_lines.serving.served_settings import ServedSettings
from rewarded_lines.serving.weights_gate import WeightsGate


class Engine:
    """Holds a merge, as vLLM's workers do; `reasons` are what the next changes fail with, `log` what was called."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.weights: dict[str, Any] = {}
        self.reasons: list[str] = []
        self.dead = False

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...]) -> list[Any]:
        self.log.append(method)
        reason = self.reasons.pop(0) if self.reasons and method == "use_merge" else ""
        if reason == "dead":
            self.dead = True
            raise RuntimeError("the worker is gone")
        if method == "use_merge" and not reason:
            self.weights = args[0]["weights"]
        return [{"problems": [{"what": reason}]} if reason else {}]

    async def pause_generation(self, *, mode: str) -> None:
        self.log.append(f"pause {mode}")

    async def resume_generation(self) -> None:
        self.log.append("resume")
        if self.dead:
            raise RuntimeError("the engine is gone")


class StandIn:
    """The server: `client` speaks to the middleware, `seen` are the bodies that reached vLLM."""

    def __init__(self, whole: bool = False, key: str = "", **settings: Any) -> None:
        self.seen: list[Any] = []
        self.hold: asyncio.Event | None = None
        self.engine = Engine()
        menu = menu_of_adapters("models/sft", {"kind": "a", "brief": "b"})
        menu.add(
            {
                "chosen": menu.spec("lines@0.4"),
                DEFAULT: menu.spec("soup@0.3"),
                "off": MergeSpec((1 / 3, 2 / 3)),
            }
        )
        self.gate = WeightsGate(self.engine, patience=0.2) if whole else None
        self.desk = FrontDesk(menu, self.gate, {"chat": True})
        paths = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/audio", "/v1/load_lora_adapter")
        paths += ("/inference/v1/generate",)
        routes = [Route(path, self._answer, methods=["POST"]) for path in paths]
        routes += [Route("/v1/models", self._models), Route("/health", lambda request: JSONResponse({}))]
        app = Starlette(routes=routes)
        app.state.args = SimpleNamespace(api_key=[key] if key else None)
        names = ["default" if whole else "sft"]
        app.state.openai_serving_models = SimpleNamespace(
            base_model_paths=[SimpleNamespace(name=name) for name in names]
        )
        app.add_middleware(PreferenceMiddleware, settings=ServedSettings(**settings), desk=self.desk)
        transport = httpx.ASGITransport(app)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://server")

    async def start(self) -> None:
        """Give a server of whole models its first merge."""
        if self.gate:
            await self.gate.start({}, "disk", self.desk.menu.canonical(DEFAULT), self.desk.menu.spec(DEFAULT))

    async def _answer(self, request: Any) -> Any:
        json = request.headers["content-type"].startswith("application/json")
        self.seen.append(await request.json() if json else await request.body())
        if self.hold:
            await self.hold.wait()
        return StreamingResponse(iter([b"data: 1\n\n", b"data: 2\n\n"]), media_type="text/event-stream")

    async def _models(self, request: Any) -> Any:
        card = {"id": self.client and "default" if self.gate else "sft", "object": "model", "created": 1}
        return JSONResponse({"object": "list", "data": [card]})
