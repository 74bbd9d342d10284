"""One client for HTTP servers: many requests under way, each asked again where that can help, and never for ever.

A request is sent again if the connection fails, no answer comes in time, JSON arrives cut off, or the server is busy or
fails (408, 425, 429, 5xx). Between two attempts it waits twice as long as before, less a random part, or as long as the
server asks in `Retry-After`.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from rewarded_lines.engines.http_answers import LONGEST_TOLD, SHOWN, HttpAnswer, HttpFailure, backoff, told_wait
from rewarded_lines.errors import fail, without_secrets

Job = TypeVar("Job")
Found = TypeVar("Found")
Value = TypeVar("Value")
_BUSY = (408, 425, 429, 500, 502, 503, 504, 529)
_TOO_MANY = 429
# Seconds. A running server accepts a connection at once, even if its answer takes long.
_CONNECT = 10.0
_END = object()


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
        """Connect to nothing yet; the paths of requests, `at_once` under way at the same time, go after `url`.

        One attempt may take `timeout` seconds, from the connection to the last byte, and is followed by up to `retries`
        more. No message shows `secrets`, but the names that they stand under.

        Raises:
            UserError: `url` is not the URL of a server.
        """
        self.url, self._at_once, self._timeout, self._retries = url, at_once, timeout, retries
        self._secrets = {text: name for name, text in (secrets or {}).items() if text}
        self._headers = dict(headers or {})
        self._sessions: list[aiohttp.ClientSession] = []
        try:
            parts = self._parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
                raise ValueError(f"scheme {parts.scheme!r}, host {parts.hostname!r}")
        except ValueError as error:
            where, expected = without_secrets(url), "http://HOST:PORT"
            raise fail("not the URL of a server", where=where, expected=expected, got=str(error)) from error
        # The environment's proxy, but not the passwords in .netrc, which aiohttp would send, too.
        self._proxy = None if proxy_bypass(str(parts.hostname)) else getproxies().get(parts.scheme)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http", daemon=True)
        self._lock = threading.Lock()
        self._finish = weakref.finalize(self, _finish, self._loop, self._thread, self._sessions)
        # Requests that got an answer, from this server, of any kind but "too many requests".
        self._answered = 0

    def ask(
        self, method: str, path: str, content: Any = None, retries: int | None = None, within: float | None = None
    ) -> HttpAnswer:
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
        if not response.good:
            raise HttpFailure(self.described(response), response.status)
        return response.json()

    async def response(
        self, method: str, path: str, content: Any = None, as_json: bool = False, retries: int | None = None
    ) -> HttpAnswer:
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
                busy = response.status == _TOO_MANY
                self._answered += not busy
                wait = told_wait(response)
                if response.status not in _BUSY or tries >= most or (wait or 0) > LONGEST_TOLD:
                    return response
            await asyncio.sleep(backoff(tries) if wait is None else wait)
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

    def described(self, response: HttpAnswer) -> str:
        """Return status and message of a response, without secrets."""
        return self.masked(response.words)[:SHOWN]

    def masked(self, text: str) -> str:
        """Return a text with the names of secrets in their places."""
        for secret, name in self._secrets.items():
            text = text.replace(secret, f"${name}")
        return without_secrets(text)

    def close(self) -> None:
        """End all connections, and the thread; so does the end of this object or of Python."""
        self._finish()

    def _start(self, work: Coroutine[Any, Any, Value]) -> Future[Value]:
        with self._lock:
            if self._thread.ident is None:
                self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _once(self, method: str, path: str, content: Any, as_json: bool) -> HttpAnswer:
        # ASCII alone: a response may hold halves of surrogate pairs, which UTF-8 cannot.
        body = None if content is None else json.dumps(content, allow_nan=False).encode()
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            how: dict[str, Any] = {"headers": headers, "allow_redirects": False, "proxy": self._proxy}
            # What follows a question mark stays behind the path, such as Azure's `api-version`.
            url = self._parts._replace(path=self._parts.path + path).geturl()
            async with self._opened().request(method, url, data=body, **how) as got:
                text = (await got.read()).decode(errors="replace")
                response = HttpAnswer(got.status, {name.lower(): one for name, one in got.headers.items()}, text)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise HttpFailure(self._said(error), reached=False) from error
        except TimeoutError as error:
            raise HttpFailure(f"no answer in {self._timeout:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise HttpFailure(self._said(error)) from error
        if as_json and response.good:
            try:
                return response.with_told_status()
            except ValueError as error:
                raise HttpFailure(self.masked(f"an answer that is not JSON: {response.text[:SHOWN]!r}")) from error
        return response

    def _opened(self) -> aiohttp.ClientSession:
        """Return the session, made in its loop by the first request."""
        if not self._sessions:
            session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._at_once),
                timeout=aiohttp.ClientTimeout(self._timeout, sock_connect=min(_CONNECT, self._timeout)),
                headers=self._headers,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
            self._sessions.append(session)
        return self._sessions[0]

    def _said(self, error: Exception) -> str:
        return self.masked(f"{type(error).__name__}: {error}")[:SHOWN]


def _finish(loop: asyncio.AbstractEventLoop, thread: threading.Thread, sessions: list[aiohttp.ClientSession]) -> None:
    """Cancel what runs in a client's thread, close its connections, and end it."""

    async def end() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for session in sessions:
            await session.close()

    if thread.is_alive() and thread is not threading.current_thread():
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(end(), loop).result(1.0)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(1.0)
    if not loop.is_running():
        loop.close()


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
