"""Whole models on a server: one merge for all requests, changed in place while the server runs.

A request is answered by one merge from its first token to its last. A change waits until those that run are answered;
new ones wait for the change.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

from rewarded_lines.engines.vllm_models import spec_message
from rewarded_lines.errors import Problem, UserError
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.serving.preference_names import PreferenceError

# Seconds that a change waits for running requests.
PATIENCE = 600.0
_WHERE = "the server's weights"


class Engine(Protocol):
    """What is used of vLLM's `AsyncLLM`."""

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...]) -> Sequence[Any]:
        """Call a method of `MergingWorker` on every worker."""

    async def pause_generation(self, *, mode: str) -> None:
        """Wait for running requests, and forget cached prefixes."""

    async def resume_generation(self) -> None:
        """Take new requests again."""


class WeightsGate:
    """The weights of a server, and the requests that use them.

    Attributes:
        name: the canonical name of the merge that answers.
        broken: why no merge is whole any more; "" if one is.
    """

    def __init__(self, engine: Engine, patience: float = PATIENCE) -> None:
        """Bind the engine; `start` gives it the first merge."""
        self.name, self.broken = "", ""
        self._engine, self._patience = engine, patience
        self._changed = asyncio.Condition()
        self._change = asyncio.Lock()
        self._closed, self._active = False, 0

    async def start(self, plan: Mapping[str, Any], level: str, name: str, spec: MergeSpec) -> None:
        """Open the plan of a `plan_message` in every worker, and load the first merge.

        Raises:
            UserError: the merge is refused, or a worker fails.
        """
        await self._engine.collective_rpc("open_plan", args=(dict(plan), level))
        if problems := await self._use(spec):
            raise UserError(problems)
        self.name = name

    @asynccontextmanager
    async def answering(self) -> AsyncIterator[str]:
        """Hold the weights for the block; yield the name of their merge.

        Raises:
            PreferenceError: the weights are broken.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: not self._closed)
            self._check()
            self._active += 1
        try:
            yield self.name
        finally:
            # At once: a second cancellation could interrupt the wait for the lock.
            self._active -= 1
            async with self._changed:
                self._changed.notify_all()

    async def change(self, name: str, spec: MergeSpec) -> float:
        """Replace the weights once no request uses them; return the seconds of the change itself.

        Raises:
            PreferenceError: requests do not end, or the merge fails. The old weights answer, unless `broken` is set.
        """
        async with self._change:
            self._check()
            if name == self.name:
                return 0.0
            try:
                await self._close()
                started = time.perf_counter()
                await self._swap(name, spec)
                return time.perf_counter() - started
            finally:
                async with self._changed:
                    self._closed = False
                    self._changed.notify_all()

    def _check(self) -> None:
        if self.broken:
            raise PreferenceError(Problem(self.broken, _WHERE, remedy="restart the server"), 503)

    async def _close(self) -> None:
        """Let no new request begin, and wait for those that run."""
        async with self._changed:
            self._closed = True
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._active == 0), self._patience)
            except TimeoutError:
                what = f"{self._active} requests still run after {self._patience:g} s; {self.name} goes on answering"
                raise PreferenceError(Problem(what, _WHERE, remedy="ask again later"), 503) from None

    async def _swap(self, name: str, spec: MergeSpec) -> None:
        try:
            # Requests that the server answers in the background end, too; cached prefixes are the old weights'.
            await self._engine.pause_generation(mode="wait")
            if problems := await self._use(spec):
                told = Problem(f"the change failed; {self.name} goes on answering", _WHERE, got=str(problems[0]))
                raise PreferenceError(told, 409)
            self.name = name
        except PreferenceError:
            raise
        except Exception as error:  # noqa: BLE001 - however a worker fails: nobody knows which weights it has now
            self.broken = f"{name} could not be loaded, and {self.name} not be kept: {error}"
            self._check()
        finally:
            # A dead engine cannot.
            with suppress(*(Exception,) if self.broken else ()):
                await self._engine.resume_generation()

    async def _use(self, spec: MergeSpec) -> list[Problem]:
        """Stream a merge into the workers; return why they refuse it: then they have kept the weights from before."""
        answers = await self._engine.collective_rpc("use_merge", args=(spec_message(spec),))
        return [Problem(**problem) for answer in answers for problem in answer.get("problems", ())]
