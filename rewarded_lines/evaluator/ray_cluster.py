"""Points shared out over Ray workers, each with its own engine; only this process writes the records."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rewarded_lines.data.prompts import Prompt
from rewarded_lines.data.rows import Row
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.evaluator.evaluate import Keys, LocalEvaluator
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.ray_machines import check_kernels, worker_shares
from rewarded_lines.evaluator.records import Point
from rewarded_lines.evaluator.sweep_options import SweepOptions
from rewarded_lines.evaluator.sweep_setup import Setup, open_setup
from rewarded_lines.extras import require
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.projects import Project

LOCAL = "local"
# A point that has killed this many workers would kill the next one, too.
_MOST_DEATHS = 3
_CONNECT_SECONDS = 10


class Worker:
    """Evaluates points in a Ray actor; the first point builds the engine."""

    def __init__(self, project: Project, options: SweepOptions, also: Sequence[Prompt], engines: int) -> None:
        """Keep the project, whose paths must exist on every machine, and how many workers share one machine."""
        self._project, self._options, self._also, self._engines = project, options, also, engines
        self._scratch = tempfile.TemporaryDirectory()

    @cached_property
    def _evaluator(self) -> LocalEvaluator:
        check_kernels(self._options)
        setup = replace(open_setup(self._project, self._options), engines=self._engines)
        return LocalEvaluator(setup, Path(self._scratch.name), self._also)

    def evaluate(
        self, spec: PointSpec, rows: list[Row], control: dict[str, Sequence[str]]
    ) -> tuple[Point | None, list[Problem], dict[str, float]]:
        """Return the point's record or the problems that prevented it, and the seconds spent so far."""
        try:
            setup = self._evaluator.setup.on(rows, control)
            ((_, point),) = self._evaluator.evaluate(setup, {spec: "point"}, ["point"])
        except UserError as error:
            return None, list(error.problems), {}
        return point, [], self._evaluator.seconds()


class RayEvaluator:
    """Makes points on the workers of a Ray cluster."""

    def __init__(self, setup: Setup, also: Sequence[Prompt] = (), progress: Progress = SILENT) -> None:
        """Join the cluster and start the workers; engines have room for the prompts `also`, too.

        Raises:
            UserError: Ray is not installed, no cluster answers, or the workers do not fit into it.
        """
        self._progress, self._ray = progress, f"--ray {setup.options.ray}"
        progress.start("joining the cluster")
        _join(str(setup.options.ray))
        import ray

        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        try:
            parallel = setup.settings.tensor_parallel
            count, share, engines = worker_shares(machines, parallel, setup.options.workers, self._ray)
        except UserError:
            ray.shutdown()
            raise
        # Workers have other working directories, so the path must be absolute.
        project = replace(setup.project, path=setup.project.path.resolve())
        kind: Any = ray.remote(**share)(Worker)
        self._hire = partial(kind.remote, project, _with_all_settings(setup), list(also), engines)
        self.width = count
        self._workers = [self._hire() for _ in range(count)]
        # What each worker has reported, dead ones included.
        self._seconds: dict[Any, dict[str, float]] = {}

    def close(self) -> None:
        """Stop the workers and leave the cluster; a cluster started here ends."""
        import ray

        with suppress(Exception):
            for worker in self._workers:
                ray.kill(worker)
        ray.shutdown()

    def evaluate(self, setup: Setup, keys: Keys, missing: Iterable[str]) -> Iterator[tuple[str, Point]]:
        """Give each worker one point at a time; if it dies, another worker gets the point."""
        import ray

        specs = {key: spec for spec, key in reversed(list(keys.items()))}
        queue = deque(missing)
        deaths = dict.fromkeys(queue, 0)
        shared = ray.put(list(setup.rows)), ray.put(dict(setup.control))
        at_work: dict[Any, tuple[Any, str]] = {}
        idle = list(self._workers)
        self._progress.start(f"waiting for the first of {len(idle)} workers")
        while queue or at_work:
            while queue and idle:
                worker, key = idle.pop(), queue.popleft()
                at_work[worker.evaluate.remote(specs[key], *shared)] = worker, key
            (done, *_), _ = ray.wait(list(at_work))
            worker, key = at_work.pop(done)
            try:
                point, problems, self._seconds[worker] = ray.get(done)
            except ray.exceptions.RayActorError:
                deaths[key] += 1
                idle.append(self._replace(worker, str(specs[key]), deaths[key]))
                queue.appendleft(key)
                continue
            if problems:
                raise UserError(problems)
            idle.append(worker)
            yield key, point
            self._progress.start(f"{len(self._workers)} workers at work", counted=True)

    def seconds(self) -> dict[str, float]:
        """Return the workers' seconds, summed."""
        parts = list(self._seconds.values())
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: sum(part.get(name, 0.0) for part in parts) for name in names}

    def _replace(self, worker: Any, point: str, deaths: int) -> Any:
        """Return a worker in the place of a dead one; a UserError if its point has killed too many."""
        if deaths >= _MOST_DEATHS:
            raise fail(
                f"{deaths} workers died over the same point",
                where=f"{self._ray}, {point}",
                remedy="look at Ray's logs; if memory ran out, give each worker more or lower the batch",
            )
        self._workers.remove(worker)
        self._workers.append(self._hire())
        return self._workers[-1]


def _with_all_settings(setup: Setup) -> SweepOptions:
    """Return the options with every setting of the engine, since a worker has another environment."""
    said = setup.project.config.engine.as_dict().keys()
    taken: dict[str, Iterable[str]] = {"vllm": said, "hf": said & {"resident"}}
    # None takes back what only the project says.
    back = dict.fromkeys(taken.get(setup.options.engine, ()))
    return replace(setup.options, engine_args={**back, **setup.settings.as_dict()})


def _join(address: str) -> None:
    require("ray", "--ray")
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
