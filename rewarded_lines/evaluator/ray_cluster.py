"""Points shared out over Ray workers, each with its own engine; only this process writes the records."""

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
from typing import Any

from rewarded_lines.data.prompts import Prompt
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.evaluator.evaluate import Keys, LocalEvaluator
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.records import Point
from rewarded_lines.evaluator.sweep_options import SweepOptions
from rewarded_lines.evaluator.sweep_setup import Setup, open_setup
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.projects import Project

LOCAL = "local"
# A point that has killed this many workers would kill the next one, too.
_MOST_DEATHS = 3
_CONNECT_SECONDS = 10


class Worker:
    """Evaluates points in a Ray actor; the first point builds the engine."""

    def __init__(self, project: Project, options: SweepOptions, also: Sequence[Prompt]) -> None:
        """Keep the project, whose paths must exist on every machine of the cluster."""
        self._project, self._options, self._also = project, options, list(also)
        self._setup: Setup | None = None
        self._evaluator: LocalEvaluator | None = None
        self._scratch = tempfile.TemporaryDirectory()

    def evaluate(
        self, spec: PointSpec, prompts: list[Prompt], control: dict[str, Sequence[str]]
    ) -> tuple[Point | None, list[Problem], dict[str, float]]:
        """Return the point's record or the problems that prevented it, and the seconds spent so far."""
        try:
            if self._setup is None or self._evaluator is None:
                self._setup = open_setup(self._project, self._options)
                self._evaluator = LocalEvaluator(self._setup, Path(self._scratch.name), self._also)
            setup = self._setup.on(prompts, control)
            ((_, point),) = self._evaluator.evaluate(setup, {spec: "point"}, ["point"])
        except UserError as error:
            return None, list(error.problems), {}
        return point, [], self._evaluator.seconds()

    def process(self) -> int:
        """Return the id of the process, so that a test can kill it."""
        return os.getpid()


@dataclass
class _Hand:
    """A worker's actor, and the seconds that it has reported."""

    actor: Any
    seconds: dict[str, float] = field(default_factory=dict)


class RayEvaluator:
    """Makes points on the workers of a Ray cluster."""

    def __init__(self, setup: Setup, also: Sequence[Prompt] = (), progress: Progress = SILENT) -> None:
        """Join the cluster and start the workers; engines have room for the prompts `also`, too.

        Raises:
            UserError: Ray is not installed, or no cluster answers.
        """
        self._setup, self._also, self._progress = setup, list(also), progress
        self._past: list[dict[str, float]] = []
        progress.start("joining the cluster")
        _join(str(setup.options.ray))
        import ray

        resources, parallel = ray.cluster_resources(), setup.options.tensor_parallel
        gpus = int(resources.get("GPU", 0)) // parallel
        machines = sum(name.startswith("node:") and "head" not in name for name in resources)
        # By default one worker for each `parallel` GPUs, or without GPUs for each machine.
        count = setup.options.workers or gpus or max(1, machines)
        cpus = max(1, int(resources.get("CPU", 1)) // count)
        share: dict[str, Any] = {"num_gpus": parallel} if gpus else {"num_cpus": cpus}
        self._kind: Any = ray.remote(**share)(Worker)
        self._hands = [self._hire() for _ in range(count)]

    def close(self) -> None:
        """Stop the workers and leave the cluster; a cluster started here ends."""
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

    def evaluate(self, setup: Setup, keys: Keys, missing: Iterable[str]) -> Iterator[tuple[str, Point]]:
        """Give each worker one point at a time; if it dies, another worker gets the point."""
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
        # Workers have other working directories, so the path must be absolute.
        project = replace(self._setup.project, path=self._setup.project.path.resolve())
        return _Hand(self._kind.remote(project, self._setup.options, self._also))

    def _replace(self, hand: _Hand, point: str, deaths: int) -> None:
        """Replace a dead worker; a UserError if its point has killed too many."""
        if deaths >= _MOST_DEATHS:
            raise fail(
                f"{deaths} workers died over the same point",
                where=f"--ray {self._setup.options.ray}, {point}",
                remedy="look at Ray's logs; if memory ran out, give each worker more or lower the batch",
            )
        self._past.append(hand.seconds)
        self._hands.remove(hand)
        self._hands.append(self._hire())


def _join(address: str) -> None:
    if find_spec("ray") is None:
        raise fail("Ray is not installed", where="--ray", remedy="pip install 'rewarded-lines[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A worker without a GPU request still sees the machine's GPUs, as in later versions of Ray.
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
    """Connect to the cluster's port once: without an answer, Ray would exit without a message.

    Raises:
        OSError: nobody answers.
        ValueError: the address is not HOST:PORT.
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
