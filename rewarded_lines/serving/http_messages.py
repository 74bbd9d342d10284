"""HTTP at the level of ASGI: a request's body up to a limit, answers, keys, and streams that pass through."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any
from urllib.parse import quote

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MODEL_HEADER = b"x-rewarded-lines-model"
_TYPES = {400: "BadRequestError", 401: "AuthenticationError", 403: "PermissionDeniedError", 404: "NotFoundError"}


class TooLong(Exception):  # noqa: N818 - no error of this program
    """The body of a request is longer than the limit."""


def header(scope: Scope, name: bytes) -> str:
    """Return the first header of a name, "" without one."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name), "")


def path_of(scope: Scope) -> str:
    """Return the path below the prefix at which the server is mounted."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def hashed(key: str) -> str:
    """Return what is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def bears(scope: Scope, hashes: Iterable[str]) -> bool:
    """Return whether a request has one of these keys as its bearer token."""
    scheme, _, key = header(scope, b"authorization").partition(" ")
    given = hashed(key) if scheme.lower() == "bearer" else ""
    # All are compared: the time tells nothing.
    return any([hmac.compare_digest(given, one) for one in hashes])


async def read_body(scope: Scope, receive: Receive, most: int) -> bytes | None:
    """Return a request's body, or None if the client left.

    Raises:
        TooLong: it has more than `most` bytes.
    """
    told = header(scope, b"content-length")
    if told.isdecimal() and int(told) > most:
        raise TooLong
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise TooLong
        if not message.get("more_body", False):
            return b"".join(parts)


def with_body(scope: Scope, receive: Receive, body: bytes) -> tuple[Scope, Receive]:
    """Return the scope and the source of a request with this body."""
    kept = [(key, value) for key, value in scope["headers"] if key not in (b"content-length", b"transfer-encoding")]
    left = [body]

    async def again() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return {**scope, "headers": [*kept, (b"content-length", str(len(body)).encode())]}, again


def naming(send: Send, name: str) -> Send:
    """Return a way to send an answer that says which model gave it."""
    value = quote(name, safe="@=,;:+ ()").encode()

    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (MODEL_HEADER, value)]
        await send(message)

    return named


def rewriting(send: Send, change: Callable[[Any], Any]) -> Send:
    """Return a way to send an answer whose JSON `change` replaces; other answers than status 200 stay."""
    started: list[Message] = []
    parts: list[bytes] = []

    async def changed(message: Message) -> None:
        if message["type"] == "http.response.start":
            started.append(message)
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                status, body = started[0]["status"], b"".join(parts)
                # Rows with matched norms take time.
                content = await asyncio.to_thread(change, json.loads(body)) if status == 200 else body
                # Such as those by which pages of other origins may read the answer.
                headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in started[0]["headers"]}
                more = {key: value for key, value in headers.items() if not key.startswith("content-")}
                await respond(send, status, content, more=more)

    return changed


async def respond(
    send: Send, status: int, content: Any, kind: str = "application/json", more: Mapping[str, str] | None = None
) -> None:
    """Send an answer: bytes as they are, other content as JSON; `more` are headers in lower case."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    headers += [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]
    headers += [(name.encode(), value.encode()) for name, value in (more or {}).items()]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def refuse(send: Send, status: int, message: str, parameter: str | None = None) -> None:
    """Send an error as OpenAI's clients expect it."""
    kind = _TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    error = {"message": message, "type": kind, "param": parameter, "code": status}
    await respond(send, status, {"error": error})
