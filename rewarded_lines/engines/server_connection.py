"""The connection to an OpenAI-compatible server such as vLLM's, and the errors it may give."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import httpx2

from rewarded_lines.errors import UserError, fail

_KEYS = ("REWARDED_LINES_API_KEY", "OPENAI_API_KEY")
_ATTEMPTS = 4
_BUSY = (429, 502, 503, 504)
# A request may wait behind many others, but a running server accepts a connection at once.
_TIMEOUT = httpx2.Timeout(600.0, connect=10.0)
_SHOWN = 300


class Server:
    """A connection that several threads may use; every failure is a `UserError`."""

    def __init__(self, url: str, connections: int) -> None:
        """Connect to `url` (with or without /v1 at its end) and ask which model it serves.

        Raises:
            UserError: there is no server, or it does not answer as vLLM's does.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        key = next((os.environ[name] for name in _KEYS if os.environ.get(name)), "")
        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self._client = httpx2.Client(base_url=self.url, headers=headers, timeout=_TIMEOUT, limits=limits)
        except (httpx2.InvalidURL, ValueError) as error:
            raise fail("not the URL of a server", where=url, expected="http://HOST:PORT", got=str(error)) from error
        try:
            self.model, self.room = self._served()
        except BaseException:
            self.close()
            raise

    def complete(self, **request: Any) -> dict[str, Any]:
        """Return the one choice of a completion.

        Raises:
            UserError: the server refuses, or cannot be reached.
        """
        content = self.ask("POST", "/v1/completions", request)
        choices = content.get("choices") if isinstance(content, dict) else None
        if not (isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict)):
            raise self.strange("/v1/completions", content)
        return choices[0]

    def ask(self, method: str, path: str, content: Any = None) -> Any:
        """Return the server's answer, JSON or text.

        Raises:
            UserError: it refuses, or cannot be reached after several attempts.
        """
        response = self.response(method, path, content)
        if response.status_code != httpx2.codes.OK:
            raise self.refused(path, response)
        try:
            return response.json()
        except json.JSONDecodeError:
            return response.text

    def response(self, method: str, path: str, content: Any = None) -> httpx2.Response:
        """Return the server's response, whatever its status; retry if the connection fails or the server is busy.

        Raises:
            UserError: it cannot be reached.
        """
        for attempt in range(_ATTEMPTS):
            last = attempt == _ATTEMPTS - 1
            try:
                response = self._client.request(method, path, json=content)
            except httpx2.TransportError as error:
                if last:
                    raise self._unreachable(error) from error
            else:
                if last or response.status_code not in _BUSY:
                    return response
            time.sleep(0.25 * 2**attempt)
        raise AssertionError

    def refused(self, path: str, response: httpx2.Response, **parts: str) -> UserError:
        """Return the error for a request that the server refuses."""
        said = {401: f"set {_KEYS[0]} to the server's key", 403: f"set {_KEYS[0]} to the server's key"}
        remedy = said.get(response.status_code, "look into the server's log")
        defaults = {"expected": "status 200", "got": describe(response), "remedy": remedy}
        return fail("the server refuses a request", where=self.url + path, **{**defaults, **parts})

    def strange(self, path: str, content: Any) -> UserError:
        """Return the error for an answer that vLLM's server would not give."""
        return fail(
            "the server does not answer as vLLM's does",
            where=self.url + path,
            expected="vLLM's OpenAI-compatible server, as of `vllm serve`",
            got=str(content)[:_SHOWN],
            remedy="name the URL of such a server, without a path",
        )

    def close(self) -> None:
        """End all connections."""
        self._client.close()

    def _served(self) -> tuple[str, int | None]:
        """Return the name of the base model (not of an adapter), and the largest number of tokens of a sequence."""
        content = self.ask("GET", "/v1/models")
        cards = content.get("data") if isinstance(content, dict) else None
        cards = [card for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []
        own = [card for card in cards if isinstance(card.get("id"), str) and not card.get("parent")]
        if not own:
            raise self.strange("/v1/models", content)
        room = own[0].get("max_model_len")
        return own[0]["id"], room if isinstance(room, int) else None

    def _unreachable(self, error: Exception) -> UserError:
        return fail(
            "the server cannot be reached",
            where=self.url,
            expected="an OpenAI-compatible server",
            got=f"{type(error).__name__}: {error} ({_ATTEMPTS} attempts)",
            remedy="start it (`vllm serve MODEL --enable-lora …`), or wait until it has loaded its model",
        )


def describe(response: httpx2.Response) -> str:
    """Return status and message of a response."""
    try:
        content = response.json()
        error = content.get("error", content)
        message = str(error.get("message", error) if isinstance(error, dict) else error)
    except (json.JSONDecodeError, AttributeError):
        message = response.text
    return f"status {response.status_code}: {message[:_SHOWN]}"
