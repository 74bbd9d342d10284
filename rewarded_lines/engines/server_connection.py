"""The connection to an OpenAI-compatible server such as vLLM's, and the errors it may give."""

from __future__ import annotations

import json
import os
from typing import Any

from rewarded_lines.engines.http_answers import HttpAnswer, HttpFailure
from rewarded_lines.engines.http_client import HttpClient
from rewarded_lines.errors import UserError, fail

_KEYS = ("REWARDED_LINES_API_KEY", "OPENAI_API_KEY")
# A request may wait behind many others.
_TIMEOUT, _RETRIES = 600.0, 3
_SHOWN = 300


class Server:
    """A connection that several threads may use; every failure is a `UserError`."""

    def __init__(self, url: str, connections: int) -> None:
        """Connect to `url` (with or without /v1 at its end) and read which model the server has.

        Raises:
            UserError: there is no server, or its answer is not that of a vLLM server.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        name = next((name for name in _KEYS if os.environ.get(name)), "")
        key = os.environ.get(name, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = HttpClient(self.url, connections, _TIMEOUT, _RETRIES, headers, {name: key})
        try:
            self.model, self.room = self._served()
        except BaseException:
            self.close()
            raise

    def complete(self, **request: Any) -> dict[str, Any]:
        """Return the one choice of a completion."""
        content = self.ask("POST", "/v1/completions", request)
        choices = content.get("choices") if isinstance(content, dict) else None
        if not (isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict)):
            raise self.strange("/v1/completions", content)
        return choices[0]

    def ask(self, method: str, path: str, content: Any = None) -> Any:
        """Return the server's answer, JSON or text."""
        response = self.response(method, path, content)
        if response.status != 200:
            key = f"set {_KEYS[0]} to the server's key"
            raise fail(
                "the server refuses a request",
                where=self.url + path,
                expected="status 200",
                got=self.described(response),
                remedy=key if response.status in (401, 403) else "look into the server's log",
            )
        try:
            return response.json()
        except json.JSONDecodeError:
            return response.text

    def response(self, method: str, path: str, content: Any = None) -> HttpAnswer:
        """Return the response of any status; retry if the connection fails or the server is busy."""
        try:
            return self._client.ask(method, path, content)
        except HttpFailure as error:
            raise fail(
                "the server cannot be reached",
                where=self.url,
                expected="an OpenAI-compatible server",
                got=f"{error.words} ({_RETRIES + 1} attempts)",
                remedy="start it (`vllm serve MODEL --enable-lora …`), or wait until it has loaded its model",
            ) from error

    def described(self, response: HttpAnswer) -> str:
        """Return status and message of a response, for an error."""
        return self._client.described(response)

    def strange(self, path: str, content: Any) -> UserError:
        """Return the error for an answer that is not that of a vLLM server."""
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
        """Return the base model's name, and the largest number of tokens of a sequence."""
        content = self.ask("GET", "/v1/models")
        try:
            own = next(card for card in content["data"] if not card.get("parent"))
            room = own.get("max_model_len")
            return str(own["id"]), room if isinstance(room, int) else None
        except (AttributeError, LookupError, StopIteration, TypeError) as error:
            raise self.strange("/v1/models", content) from error
