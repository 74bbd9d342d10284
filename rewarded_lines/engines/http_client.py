"""One client for HTTP servers: many requests under way, each asked again where that can help, and never for ever.

A request is sent again if the connection fails, no answer comes in time, JSON arrives cut off, or the server is busy or
fails (408, 425, 429, 5xx). Between two attempts it waits twice as long as before, less a random part, or as long as the
server asks in `Retry-After`.
"""

from __future__ import annotations

import asyncio
import json
import queue
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx2

from rewarded_lines.errors import fail, without_secrets

Job, Found, Value = TypeVar("Job"), TypeVar("Found"), TypeVar("Value")
_BUSY = (408, 425, 429, 500, 502, 503, 504, 529)
_TOO_MANY = 429
# Seconds. A running server accepts a connection at once, even if its answer takes long.
_CONNECT = 10.0
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
# A server that asks for a longer wait is not waited for.
_LONGEST_TOLD = 120.0
_SHOWN = 300
_END = object()
# Its own, since training seeds the global one.
_random = random.Random()


class HttpFailure(Exception):
    """A request without a usable answer, after all its attempts.

    Attributes:
        words: what happened: the status and the server's own words, without secrets.
        status: of the server's last answer; None without an answer.
        reached: False if nothing listens at the address.
    """

    def __init__(self, words: str, status: int | None = None, reached: bool = True) -> None:
        """Keep what happened."""
        super().__init__(words)
        self.words, self.status, self.reached = words, status, reached


class HttpClient:
    """A connection to one server that several threads may use; its requests run in a thread of its own."""

    def __init__(
        self,
        url: str,
        at_once: int,
        timeout: float = 600.0,
        retries: int = 3,
        headers: Mapping[str, str] | None = None,
        secrets: Mapping[str, str] | None = None,
    ) -> None:
        """Connect to nothing yet.

        Args:
            url: where the paths of requests begin.
            at_once: requests under way at the same time.
            timeout: seconds for one attempt, from the connection to the last byte.
            retries: further attempts after the first.
            headers: of each request.
            secrets: texts that no message may show, by the name that it shows instead.

        Raises:
            UserError: `url` is not the URL of a server.
        """
        self.url, self._at_once, self._timeout, self._retries = url, at_once, timeout, retries
        self._secrets = {text: name for name, text in (secrets or {}).items() if text}
        limits = httpx2.Limits(max_connections=at_once, max_keepalive_connections=at_once)
        try:
            address = httpx2.URL(url)
            if address.scheme not in ("http", "https") or not address.host:
                raise ValueError(f"scheme {address.scheme!r}, host {address.host!r}")
            self._client = httpx2.AsyncClient(
                headers=headers, timeout=httpx2.Timeout(None, connect=min(_CONNECT, timeout)), limits=limits
            )
        except (httpx2.InvalidURL, ValueError) as error:
            where, expected = without_secrets(url), "http://HOST:PORT"
            raise fail("not the URL of a server", where=where, expected=expected, got=str(error)) from error
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http", daemon=True)
        self._lock = threading.Lock()
        # Requests that got an answer, from this server, of any kind but "too many requests".
        self._answered = 0

    def ask(
        self, method: str, path: str, content: Any = None, retries: int | None = None, within: float | None = None
    ) -> httpx2.Response:
        """Return the response of any status; wait for it in this thread, `within` so many seconds in all.

        Raises:
            HttpFailure: no attempt got a response.
        """
        future = self._start(self.response(method, path, content, retries=retries))
        try:
            return future.result(within)
        except TimeoutError as error:
            raise HttpFailure(f"no answer in {within:g} s") from error
        finally:
            future.cancel()

    async def read(self, method: str, path: str, content: Any = None) -> Any:
        """Return the JSON of a successful answer.

        Raises:
            HttpFailure: there is none.
        """
        response = await self.response(method, path, content, as_json=True)
        if not response.is_success:
            raise HttpFailure(self.described(response), response.status_code)
        return response.json()

    async def response(
        self, method: str, path: str, content: Any = None, as_json: bool = False, retries: int | None = None
    ) -> httpx2.Response:
        """Return the response of any status; `as_json` repeats a success that is not JSON, such as one cut off."""
        tries, most = 0, self._retries if retries is None else retries
        while True:
            before, wait = self._answered, None
            try:
                response = await self._once(method, path, content, as_json)
            except HttpFailure:
                if tries >= most:
                    raise
                busy = False
            else:
                busy = response.status_code == _TOO_MANY
                self._answered += not busy
                wait = _told(response)
                if response.status_code not in _BUSY or tries >= most or (wait or 0) > _LONGEST_TOLD:
                    return response
            await asyncio.sleep(_backoff(tries) if wait is None else wait)
            # While a server with a limit answers other requests, this one waits for its turn.
            tries += not (busy and self._answered > before)

    def stream(self, jobs: Iterable[Job], work: Callable[[Job], AsyncIterator[Found]]) -> Iterator[list[Found]]:
        """Yield what `work` finds for the jobs, as it comes; at most `at_once` jobs have begun and not ended.

        A job is taken from `jobs` when its turn comes. If the caller stops, the requests under way are cancelled.
        """
        todo, done = iter(jobs), queue.SimpleQueue[Any]()

        async def worker() -> None:
            for job in todo:
                async for found in work(job):
                    done.put(found)

        async def everything() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self._at_once):
                        group.create_task(worker())
            finally:
                done.put(_END)

        future = self._start(everything())
        try:
            some: list[Any] = []
            while _END not in some:
                some = _all_there(done)
                if found := [one for one in some if one is not _END]:
                    yield found
            _result(future)
        finally:
            future.cancel()

    def described(self, response: httpx2.Response) -> str:
        """Return status and message of a response, without secrets."""
        try:
            content = response.json()
            error = content.get("error", content)
            message = str(error.get("message", error) if isinstance(error, dict) else error)
        except (ValueError, AttributeError):
            message = response.text
        moved = f" (moved to {response.headers['location']})" if "location" in response.headers else ""
        return self.masked(f"status {response.status_code}: {message[:_SHOWN]}{moved}")

    def masked(self, text: str) -> str:
        """Return a text with the names of secrets in their places."""
        for secret, name in self._secrets.items():
            text = text.replace(secret, f"${name}")
        return without_secrets(text)

    def close(self) -> None:
        """End all connections, and the thread."""
        with self._lock:
            if self._thread.ident is not None and not self._loop.is_closed():
                with suppress(TimeoutError):
                    asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(1.0)
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
            self._loop.close()

    def _start(self, work: Coroutine[Any, Any, Value]) -> Future[Value]:
        with self._lock:
            if self._thread.ident is None:
                self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()

    async def _once(self, method: str, path: str, content: Any, as_json: bool) -> httpx2.Response:
        # ASCII alone: a response may hold halves of surrogate pairs, which UTF-8 cannot.
        body = None if content is None else json.dumps(content, allow_nan=False).encode()
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._client.request(method, self.url + path, content=body, headers=headers)
        except (TimeoutError, httpx2.ReadTimeout) as error:
            raise HttpFailure(f"no answer in {self._timeout:g} s") from error
        except httpx2.RequestError as error:
            reached = not isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout))
            raise HttpFailure(self.masked(f"{type(error).__name__}: {error}"), reached=reached) from error
        if as_json and response.is_success:
            try:
                response.json()
            except ValueError as error:
                raise HttpFailure(self.masked(f"an answer that is not JSON: {response.text[:_SHOWN]!r}")) from error
        return response


def _backoff(tries: int) -> float:
    """Return the seconds to wait after an attempt; random, so that not all requests come back together."""
    return min(_LONGEST_WAIT, _FIRST_WAIT * 2**tries) * _random.uniform(0.5, 1.0)


def _told(response: httpx2.Response) -> float | None:
    """Return the seconds that a server asks to wait, from a number or a date; None if it does not say."""
    said = response.headers.get("retry-after", "")
    with suppress(ValueError):
        return max(0.0, float(said))
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    return None


def _all_there(done: queue.SimpleQueue[Any]) -> list[Any]:
    """Return all that has arrived, at least one thing."""
    some = [done.get()]
    with suppress(queue.Empty):
        while True:
            some.append(done.get_nowait())
    return some


def _result(future: Future[None]) -> None:
    """Raise the error of the work, if it failed."""
    try:
        future.result()
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from group
