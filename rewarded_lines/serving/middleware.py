"""The ASGI middleware that vLLM's server gets by `--middleware`: preferences in requests, their list, the page.

It stands before all else, so it asks for the key itself before it looks into a request. The page loads nothing from
elsewhere, so it works offline. It shows texts of models as text alone; the policy in its headers also refuses any other
script.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
from collections.abc import Mapping
from contextlib import AsyncExitStack
from importlib.resources import files
from typing import Any

from rewarded_lines.errors import Problem
from rewarded_lines.reports import page as report_page
from rewarded_lines.serving.front_desk import FrontDesk, open_desk
from rewarded_lines.serving.http_messages import (
    App,
    Message,
    Receive,
    Scope,
    Send,
    TooLong,
    bears,
    hashed,
    header,
    naming,
    path_of,
    read_body,
    refuse,
    respond,
    rewriting,
    with_body,
)
from rewarded_lines.serving.preference_names import PreferenceError
from rewarded_lines.serving.served_settings import MOST_BYTES, ServedSettings, settings_given

# Adapters come from the menu alone: these would open a path that a request names.
_CLOSED = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters")
# Requests without a model get the default here.
_GENERATE = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/invocations"),
    *("/inference/v1/generate", "/generative_scoring"),
)
_OWN_FIELDS = ("preference", "row")
# The colours are those of the report.
_PALETTE = "palette.css"
# Every path that is answered. A request's path is only looked up here, so it can open no other file.
_PAGE: Mapping[str, tuple[str, str]] = {
    "/": ("index.html", "text/html; charset=utf-8"),
    **{
        f"/page/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8")
        for name in ("chat", "stream", "weights", "preference", "front_chart", "page_parts")
    },
    **{f"/page/{name}": (name, "text/css; charset=utf-8") for name in ("chat.css", _PALETTE)},
}
_PAGE_POLICY = "; ".join(
    (
        "default-src 'none'",
        *("script-src 'self'", "style-src 'self'", "connect-src 'self'"),
        *("img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
    )
)
_PAGE_HEADERS: Mapping[str, str] = {"content-security-policy": _PAGE_POLICY, "referrer-policy": "no-referrer"}


class PreferenceMiddleware:
    """Lets requests say what they prefer, by the field `preference` or by the model's name."""

    def __init__(self, app: App, settings: ServedSettings | None = None, desk: FrontDesk | None = None) -> None:
        """Wrap a server's application; by default the settings are those of the environment.

        Without a desk, one is opened when the application starts.
        """
        self._app, self._desk = app, desk
        self._settings = settings or settings_given()
        self._most = self._settings.most_bytes if self._settings else MOST_BYTES
        self._admin = [self._settings.admin] if self._settings and self._settings.admin else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, self._starting(scope, send))
        if scope["type"] != "http" or self._desk is None:
            return await self._app(scope, receive, send)
        path, method = path_of(scope), scope["method"]
        if path.startswith(_CLOSED):
            return await refuse(send, 403, "adapters are not loaded from paths; ask for a preference by its name")
        if method in ("GET", "HEAD") and (file := page_file(path)):
            return await respond(send, 200, *file)
        if method == "POST" and path == "/preference":
            return await self._change(self._desk, scope, receive, send)
        reads = method in ("GET", "HEAD", "OPTIONS")
        if (not reads or path in ("/preferences", "/v1/models")) and not self._allowed(scope):
            return await refuse(send, 401, "the server wants its API key, as `Authorization: Bearer KEY`")
        if path == "/preferences":
            return await respond(send, 200, await asyncio.to_thread(self._desk.preferences))
        if path == "/v1/models" and method == "GET":
            return await self._list(self._desk, scope, receive, send)
        if reads:
            return await self._app(scope, receive, send)
        return await self._answer(self._desk, scope, receive, send)

    def _starting(self, scope: Scope, send: Send) -> Send:
        """Return a way to tell that the application starts, which opens the desk before that."""

        async def told(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete" and self._desk is None:
                try:
                    self._desk = await open_desk(self._settings, scope["app"].state)
                except Exception as error:  # noqa: BLE001 - vLLM tells a worker's failure by no class of its own
                    message = {"type": "lifespan.startup.failed", "message": str(error)}
                    # vLLM exits with 0 when its application does not start.
                    atexit.register(os._exit, 1)
            await send(message)
            if message["type"] == "lifespan.startup.complete" and self._settings and self._settings.ready:
                # vLLM puts its own words before all that Python prints.
                os.write(1, f"{self._settings.ready}\n".encode())

        return told

    def _allowed(self, scope: Scope) -> bool:
        """Return whether a request has the API key, if the server has one; by vLLM's own rule."""
        given = getattr(getattr(scope["app"].state, "args", None), "api_key", None) if "app" in scope else None
        keys = [key for key in given or [os.environ.get("VLLM_API_KEY")] if key]
        return not keys or bears(scope, map(hashed, keys))

    async def _list(self, desk: FrontDesk, scope: Scope, receive: Receive, send: Send) -> None:
        def more(content: dict[str, Any]) -> dict[str, Any]:
            return {**content, "data": desk.cards(content["data"])}

        await self._app(scope, receive, rewriting(send, more))

    async def _answer(self, desk: FrontDesk, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request with the name of its model in place of its preference."""
        try:
            body = await self._body(scope, receive)
            if body is None:
                return
            async with AsyncExitStack() as stack:
                if desk.gate:
                    await stack.enter_async_context(desk.gate.answering())
                content = _object_in(scope, body)
                if content is not None:
                    body, send = await self._addressed(desk, scope, content, body, send)
                await self._app(*with_body(scope, receive, body), send)
        except PreferenceError as error:
            await refuse(send, error.status, str(error), "preference")

    async def _addressed(
        self, desk: FrontDesk, scope: Scope, content: dict[str, Any], body: bytes, send: Send
    ) -> tuple[bytes, Send]:
        """Return a request's body with the name of its model, and a way to answer that says the name."""
        if content.keys().isdisjoint(("model", *_OWN_FIELDS)) and not path_of(scope).startswith(_GENERATE):
            return body, send
        # A row may have to measure its merge first.
        name = await asyncio.to_thread(desk.asked, content, _bases(scope))
        if desk.gate:
            desk.check_loaded(name, content.get("model"))
        if name is None:
            return body, send
        plain = {key: value for key, value in content.items() if key not in _OWN_FIELDS}
        address = _bases(scope)[0] if desk.gate else name
        return json.dumps({**plain, "model": address}).encode(), naming(send, name)

    async def _change(self, desk: FrontDesk, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer POST /preference."""
        if not desk.gate:
            return await refuse(send, 404, "each request has its own preference here: put `preference` into it")
        if not self._admin:
            return await refuse(send, 403, "the server was started without a key for this: pass --admin-key")
        if not bears(scope, self._admin):
            return await refuse(send, 401, "the weights change for everybody: the admin key is wanted as bearer token")
        try:
            body = await self._body(scope, receive)
            content = _object_in(scope, body or b"")
            asks = content and not content.keys().isdisjoint(("preference", "model"))
            name = await asyncio.to_thread(desk.asked, content, _bases(scope)) if content and asks else None
            if name is None:
                return await refuse(send, 400, 'expected JSON such as {"preference": {…}, "row": "lines"}')
            seconds = await desk.gate.change(name, desk.menu.spec(name))
        except PreferenceError as error:
            return await refuse(send, error.status, str(error), "preference")
        await respond(send, 200, {"model": name, "current": desk.place(name), "seconds": round(seconds, 3)})

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        try:
            return await read_body(scope, receive, self._most)
        except TooLong:
            what = f"the request is longer than {self._most} bytes"
            raise PreferenceError(Problem(what, remedy="the server's --max-body"), 413) from None


def page_file(path: str) -> tuple[bytes, str, Mapping[str, str]] | None:
    """Return the content, its type and headers of a file of the page; None if the path is not the page's.

    Args:
        path: the path of the request, such as `/` or `/page/chat.js`.
    """
    found = _PAGE.get(path)
    if found is None:
        return None
    name, kind = found
    folder = files(report_page) if name == _PALETTE else files(__package__).joinpath("page")
    return folder.joinpath(name).read_bytes(), kind, _PAGE_HEADERS


def _object_in(scope: Scope, body: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a request, None if it holds something else, on which the server decides."""
    if not header(scope, b"content-type").lower().startswith("application/json"):
        return None
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _bases(scope: Scope) -> list[str]:
    """Return the names under which the engine serves the model that it was started with."""
    models = getattr(scope["app"].state, "openai_serving_models", None) if "app" in scope else None
    return [path.name for path in getattr(models, "base_model_paths", ())] or ["default"]
