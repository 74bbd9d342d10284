"""A stand-in for Ray: its actors live in this process, one call after another, and die when they are told to."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest


class ActorDied(Exception):
    """What is raised in the place of the answer of an actor that died."""


class Actor:
    """An actor of Ray's: `actor.method.remote(...)` returns the future answer of the method."""

    def __init__(self, made: Any) -> None:
        self.made, self.dead = made, False

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *args: Future(self, name, args))


class Future:
    """An answer, found when it is asked for."""

    def __init__(self, actor: Actor, name: str, args: Sequence[Any]) -> None:
        self.actor, self.name, self.args = actor, name, args


class StandInRay:
    """As much of Ray as the cluster uses; `dies` is asked before each call with the number of calls until then."""

    exceptions = SimpleNamespace(RayActorError=ActorDied)
    # What tells that a module is installed.
    __spec__ = SimpleNamespace(origin="a stand-in")

    def __init__(self, dies: Callable[[int], bool]) -> None:
        self.dies, self.calls, self.actors, self.running = dies, 0, [], False

    def init(self, **_: Any) -> None:
        self.running = True

    def shutdown(self) -> None:
        self.running = False

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 9.0}}]

    def remote(self, **_: Any) -> Callable[[type], SimpleNamespace]:
        return lambda kind: SimpleNamespace(remote=lambda *args: self._hire(kind(*args)))

    def put(self, value: Any) -> Any:
        return value

    def wait(self, futures: Sequence[Future]) -> tuple[list[Future], list[Future]]:
        return list(futures[:1]), list(futures[1:])

    def get(self, future: Future) -> Any:
        actor = future.actor
        actor.dead = actor.dead or self.dies(self.calls)
        self.calls += 1
        if actor.dead:
            raise ActorDied
        return getattr(actor.made, future.name)(*future.args)

    def kill(self, actor: Actor) -> None:
        actor.dead = True

    def _hire(self, made: Any) -> Actor:
        self.actors.append(Actor(made))
        return self.actors[-1]


@contextlib.contextmanager
def stand_in_ray(
    monkeypatch: pytest.MonkeyPatch, dies: Callable[[int], bool] = lambda _: False
) -> Iterator[StandInRay]:
    """Put a stand-in where `import ray` finds it; in the end no actor is left alive, and nothing connected."""
    ray = StandInRay(dies)
    monkeypatch.setitem(sys.modules, "ray", ray)
    yield ray
    assert ray.actors and all(actor.dead for actor in ray.actors) and not ray.running
