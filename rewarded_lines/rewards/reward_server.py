"""A reward's server: asks it about pairs, and tells a pair that fails from a server that is not usable."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from rewarded_lines.engines.http_answers import HttpFailure
from rewarded_lines.engines.http_client import HttpClient
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.reward_settings import RewardSpec

# Until the server has answered once, these say that address or key is wrong. Later they may concern one pair.
WRONG = (401, 403, 404, 405, 407, 410, 501)
NO_KEY = (401, 403, 407)
# Answers that may concern one pair only, even if it is the first.
_PAIRS_FAULT = (200, 400, 413, 422)
# Answers to a request of a form that the server does not take.
_OTHER_FORM = (400, 422)
# Keys of a judge's request that some models do not take.
_SENT = ("max_tokens", "temperature", "seed", "logprobs", "chat_template_kwargs")
# So many requests that fail one after another, and none between them that does not, are the server's fault.
_HOPELESS = 20
# Seconds for the first question.
_CHECK = 10.0
_UNUSABLE = "the reward's server is not usable"
# Places of pairs in a call, and their requests' answers.
Places = Sequence[int]
Found = dict[int, Any]
Request = Callable[[Places], Any]
Read = Callable[[Any, Places], Sequence[Any]]


class RewardServer:
    """The server of one reward; it connects with the first request, and again after `free`."""

    def __init__(self, name: str, spec: RewardSpec, expected: str) -> None:
        """Find the key; `expected` says what the server answers, for messages.

        Raises:
            UserError: the variable of the key is not set.
        """
        assert spec.url is not None
        self.url, self._spec, self._expected = spec.url.rstrip("/"), spec, expected
        self.where = f"reward `{name}`, {self.url}"
        self._headers = self._key_header(spec)
        self._client: HttpClient | None = None
        # Whether it has given a score; how many requests failed since; and how the last one did.
        self._known, self._in_a_row = False, 0
        self._last: HttpFailure | None = None

    def check(self, method: str, path: str, content: Any = None, wrong: Sequence[int] = WRONG) -> None:
        """Ask for something that costs nothing: refuse an address where nobody answers, and the `wrong` statuses."""
        try:
            response = self._connected().ask(method, path, content, retries=2, within=_CHECK)
            if response.status in wrong or 300 <= response.status < 400:
                raise self._unusable(HttpFailure(self._connected().described(response), response.status))
        except HttpFailure as failure:
            if not failure.reached:
                self.free()
                raise self._unusable(failure) from failure
        except BaseException:
            self.free()
            raise

    def answers(self, path: str, groups: Iterator[Places], request: Request, read: Read) -> Iterator[Found]:
        """Yield the answers by place as they come, each a value or `Problem`.

        Args:
            path: of the requests, after the URL.
            groups: the places of each request; one is taken when its turn comes.
            request: makes the content of a request.
            read: returns one value for each place from the answer's JSON; a ValueError says that its form is wrong.

        Raises:
            UserError: the server is not usable: wrong address, key or form, or it only fails.
        """
        client, self._in_a_row = self._connected(), 0
        for some in client.stream(groups, partial(self._ask, client, path, request, read)):
            merged: Found = {}
            for one in some:
                merged |= {} if isinstance(one, HttpFailure) else one
            if merged:
                yield merged
            for one in some:
                self._watch(one)

    async def _ask(
        self, client: HttpClient, path: str, request: Request, read: Read, places: Places
    ) -> AsyncIterator[Found | HttpFailure]:
        """Yield the answers of a group, asked together, and one by one if the server fails on the whole."""
        try:
            content = await client.read("POST", path, request(places))
            found = dict(zip(places, _values(client, read, content, places), strict=True))
        except HttpFailure as error:
            failure = self._last = error
        else:
            yield found
            return
        status = failure.status
        if status is not None and not self._known and (status < 400 or status in WRONG):
            # No request will do better.
            yield failure
        elif len(places) == 1 or not failure.reached:
            ours = self._spec.judge and any(key in failure.words for key in _SENT)
            remedy = self._other_form if ours and status in _OTHER_FORM else ""
            yield dict.fromkeys(places, Problem(failure.words, self.where, remedy=remedy))
        else:
            for place in places:
                async for one in self._ask(client, path, request, read, [place]):
                    yield one

    def free(self) -> None:
        """End all connections."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _connected(self) -> HttpClient:
        if self._client is None:
            spec = self._spec
            secrets = {spec.key_env: os.environ.get(spec.key_env, "").strip()} if spec.key_env else {}
            self._client = HttpClient(self.url, spec.concurrency, spec.timeout, spec.retries, self._headers, secrets)
        return self._client

    def _key_header(self, spec: RewardSpec) -> dict[str, str]:
        if not spec.key_env:
            return {}
        key = os.environ.get(spec.key_env, "").strip()
        if not (key and key.isascii() and key.isprintable()):
            got = "characters that no header can hold" if key else "nothing"
            raise fail(
                f"the environment variable {spec.key_env} holds no key",
                where=self.where,
                got=got,
                remedy=f"export {spec.key_env}=…, or correct `key_env:`",
            )
        return {spec.key_header: f"Bearer {key}" if spec.key_header.lower() == "authorization" else key}

    def _watch(self, found: Found | HttpFailure) -> None:
        """Raise if the server is not usable."""
        if isinstance(found, HttpFailure):
            raise self._unusable(found)
        failed = [one for one in found.values() if isinstance(one, Problem)]
        if len(failed) < len(found):
            self._known, self._in_a_row = True, 0
            return
        same = self._last is not None and self._last.words == failed[0].what
        last = self._last if self._last and same else HttpFailure(failed[0].what, 200)
        if self._spec.missing == "leave_out" and last.status in _PAIRS_FAULT:
            # After a stop, a run may ask for nothing but what fails.
            return
        self._in_a_row += 1
        if self._in_a_row >= _HOPELESS:
            self._in_a_row = 0
            words = f"{last.words} ({_HOPELESS} requests in a row failed)"
            raise self._unusable(HttpFailure(words, last.status, last.reached))

    @property
    def _other_form(self) -> str:
        """What helps if the server takes other requests, or gives other answers."""
        if self._spec.judge:
            return (
                "change what is sent with `request:`, where null removes a key, as in "
                "`request: {max_tokens: null, max_completion_tokens: 64}` or `request: {top_logprobs: 5}`"
            )
        return (
            'it is sent {"prompts": […], "responses": […], "columns": {…}}; ask a server of another form, such as '
            "vLLM's /classify, in a Python function: `function: rewards.py:NAME`"
        )

    def _unusable(self, failure: HttpFailure) -> UserError:
        key, status = self._spec.key_env, failure.status or 500
        if not failure.reached:
            remedy = "start the server, or correct `url:`"
        elif status in NO_KEY:
            remedy = f"set {key} to a valid key" if key else "name the variable that holds the key: `key_env: NAME`"
        elif status in WRONG or 300 <= status < 400:
            remedy = f"correct `url:`{' or `judge:`' if self._spec.judge else ''}; requests are sent by POST"
        elif status in (200, *_OTHER_FORM):
            remedy = self._other_form
        else:
            remedy = "look into the server's log; scores that came are kept where there is a cache, so run again then"
        return fail(_UNUSABLE, where=self.where, expected=self._expected, got=failure.words, remedy=remedy)


def _values(client: HttpClient, read: Read, content: Any, places: Places) -> Sequence[Any]:
    try:
        values = read(content, places)
    except ValueError as error:
        raise HttpFailure(client.masked(str(error)), 200) from error
    return [replace(one, what=client.masked(one.what)) if isinstance(one, Problem) else one for one in values]
