"""Points shared out over Ray workers, each with an engine and rewards of its own; this process is the only writer."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from rewarded_lines.data.prompts import Prompt
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.evaluation.bench import Bench, Keys
from rewarded_lines.evaluation.points import PointSpec
from rewarded_lines.evaluation.records import Point
from rewarded_lines.evaluation.sweep_options import SweepOptions
from rewarded_lines.evaluation.sweep_setup import Setup, open_setup
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.projects import Project

LOCAL = "local"
# A point that has ended so many workers would end the next one too.
_MOST_DEATHS = 3
_CONNECT_SECONDS = 10


class Worker:
    """What runs in a Ray actor: a bench, opened when the first point comes."""

    def __init__(self, project: Project, options: SweepOptions, also: Sequence[Prompt]) -> None:
        """Remember the project; its paths must be there on every machine of the cluster."""
        self._project, self._options, self._also = project, options, list(also)
        self._setup: Setup | None = None
        self._bench: Bench | None = None
        self._scratch = tempfile.TemporaryDirectory()

    def evaluate(
        self, spec: PointSpec, prompts: list[Prompt], control: dict[str, Sequence[str]]
    ) -> tuple[Point | None, list[Problem], dict[str, float]]:
        """Return the point's record, or what there is to tell the user, and the seconds spent so far."""
        try:
            if self._setup is None or self._bench is None:
                self._setup = open_setup(self._project, self._options)
                self._bench = Bench(self._setup, Path(self._scratch.name), self._also)
            setup = self._setup.on(prompts, control)
            ((_, point),) = self._bench.produce(setup, {spec: "point"}, ["point"])
        except UserError as error:
            return None, list(error.problems), {}
        return point, [], self._bench.seconds()

    def process(self) -> int:
        """Return the id of the process, by which a test can end it."""
        return os.getpid()


@dataclass
class _Hand:
    """A worker from outside: its actor, and the point that it is at."""

    actor: Any
    seconds: dict[str, float] = field(default_factory=dict)


class Cluster:
    """Makes points on the workers of a Ray cluster."""

    def __init__(
        self,
        setup: Setup,
        address: str,
        also: Sequence[Prompt] = (),
        workers: int | None = None,
        progress: Progress = SILENT,
    ) -> None:
        """Remember the cluster; it is joined on entry.

        Args:
            setup: the project.
            address: of the cluster, "auto" for the one that this machine belongs to, or "local" to start one here.
            also: further prompts that engines must have room for.
            workers: how many; by default one for each `tensor_parallel` GPUs, without GPUs one for each machine.
            progress: is told of the steps.
        """
        self._setup = setup
        self._progress = progress
        self._address = address
        self._also = list(also)
        self._wanted = workers
        self._hands: list[_Hand] = []
        self._past: list[dict[str, float]] = []

    def __enter__(self) -> Cluster:
        """Join the cluster.

        Raises:
            UserError: Ray is not installed, or no cluster answers.
        """
        self._progress.start("joining the cluster")
        _join(self._address)
        import ray

        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) // self._setup.options.tensor_parallel
        machines = sum(name.startswith("node:") and "head" not in name for name in resources)
        count = self._wanted or gpus or max(1, machines)
        cpus = max(1, int(resources.get("CPU", 1)) // count)
        share: dict[str, Any] = {"num_gpus": self._setup.options.tensor_parallel} if gpus else {"num_cpus": cpus}
        self._kind: Any = ray.remote(**share)(Worker)
        self._hands = [self._hire() for _ in range(count)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Let the workers go and leave the cluster; one that was started here ends."""
        import ray

        with suppress(Exception):
            for hand in self._hands:
                ray.kill(hand.actor)
        ray.shutdown()

    @property
    def width(self) -> int:
        """How many points are made at the same time."""
        return len(self._hands)

    def processes(self) -> list[int]:
        """Return the process ids of the workers."""
        import ray

        return [int(ray.get(hand.actor.process.remote())) for hand in self._hands]

    def produce(self, setup: Setup, keys: Keys, missing: Iterable[str]) -> Iterator[tuple[str, Point]]:
        """See `Producer.produce`: every worker has one point at a time; that of one that dies goes to another."""
        import ray

        specs = {key: spec for spec, key in reversed(list(keys.items()))}
        queue = deque(missing)
        deaths = dict.fromkeys(queue, 0)
        shared = ray.put(list(setup.prompts)), ray.put(dict(setup.control))
        at_work: dict[Any, tuple[_Hand, str]] = {}
        idle = list(self._hands)
        self._progress.start(f"waiting for the first of {len(idle)} workers")
        while queue or at_work:
            while queue and idle:
                hand, key = idle.pop(), queue.popleft()
                at_work[hand.actor.evaluate.remote(specs[key], *shared)] = hand, key
            (done, *_), _ = ray.wait(list(at_work))
            hand, key = at_work.pop(done)
            try:
                point, problems, hand.seconds = ray.get(done)
            except ray.exceptions.RayActorError:
                deaths[key] += 1
                self._replace(hand, str(specs[key]), deaths[key])
                idle.append(self._hands[-1])
                queue.appendleft(key)
                continue
            if problems:
                raise UserError(problems)
            idle.append(hand)
            yield key, point
            self._progress.start(f"{len(self._hands)} workers at work", counted=True)

    def seconds(self) -> dict[str, float]:
        """Return the workers' seconds, summed."""
        parts = [*self._past, *(hand.seconds for hand in self._hands)]
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: sum(part.get(name, 0.0) for part in parts) for name in names}

    def _hire(self) -> _Hand:
        setup = self._setup
        # Workers have working directories of their own.
        project = replace(setup.project, path=setup.project.path.resolve())
        return _Hand(self._kind.remote(project, setup.options, self._also))

    def _replace(self, hand: _Hand, point: str, deaths: int) -> None:
        """Put a new worker in the place of one that died.

        Raises:
            UserError: the point has ended too many.
        """
        if deaths >= _MOST_DEATHS:
            raise fail(
                f"{deaths} workers died over the same point",
                where=f"--ray {self._address}, {point}",
                remedy="look at Ray's logs; for want of memory, give each worker more or lower the batch",
            )
        self._past.append(hand.seconds)
        self._hands.remove(hand)
        self._hands.append(self._hire())


def _join(address: str) -> None:
    if find_spec("ray") is None:
        raise fail("Ray is not installed", where="--ray", remedy="pip install 'rewarded-lines[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without a GPU none is hidden from a worker either; a later Ray will do so by itself.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        ray.init(address=LOCAL, include_dashboard=False, **quiet)
        return
    try:
        _knock(address)
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise fail(
            "no Ray cluster answers",
            where=f"--ray {address}",
            expected="the address of a running cluster (`ray start --head` prints it), auto, or local",
            got=" ".join(str(error).split()) or type(error).__name__,
            remedy="start the cluster, or leave --ray out",
        ) from error


def _knock(address: str) -> None:
    """Connect to the cluster's port and hang up: where nobody answers, Ray would end this process without a word.

    Raises:
        OSError: nobody answers.
        ValueError: the address is none.
    """
    if address == "auto":
        current = Path(tempfile.gettempdir(), "ray", "ray_current_cluster")
        address = os.environ.get("RAY_ADDRESS") or (current.read_text().strip() if current.is_file() else "")
        if not address:
            raise ConnectionError("this machine belongs to no cluster, and RAY_ADDRESS is not set")
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError("not HOST:PORT")
    socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
