"""What a worker gets of the machines of a Ray cluster, and what it cannot see there. Nothing here needs Ray."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence

from rewarded_lines.engines.vllm_arguments import INVARIANT
from rewarded_lines.errors import fail
from rewarded_lines.evaluator.sweep_options import SweepOptions
from rewarded_lines.projects import Project

_REMEDY = "lower --workers or --tensor-parallel, or start more machines with `ray start` first"


def worker_shares(
    machines: Sequence[Mapping[str, float]], parallel: int, workers: int | None, where: str
) -> tuple[int, dict[str, int], int]:
    """Return how many workers there are, what each gets in the words of `ray.remote`, the most on one machine.

    Args:
        machines: the resources of each, by Ray's names.
        parallel: the GPUs of one engine.
        workers: how many are asked for; by default one for each `parallel` GPUs, or without GPUs for each machine.
        where: names the cluster in messages.

    Raises:
        UserError: a worker would wait forever, since no machine has room for it.
    """
    cpus, gpus = ([int(one.get(kind, 0)) for one in machines] for kind in ("CPU", "GPU"))
    if not any(gpus):
        count = workers or sum(map(bool, cpus))
        _check_room(count, sum(cpus), "a CPU", f"CPUs of each machine: {_listed(cpus)}", where)
        # The largest equal shares of machines that are not equal.
        sizes = range(max(cpus), 0, -1)
        size = next(one for one in sizes if sum(own // one for own in cpus) >= count)
        return count, {"num_cpus": size}, min(count, max(cpus) // size)
    # Beside its GPUs, Ray gives each worker a CPU.
    rooms = [min(own // parallel, beside) for own, beside in zip(gpus, cpus, strict=True)]
    room = sum(rooms)
    needs = "a GPU and a CPU" if parallel == 1 else f"{parallel} GPUs and a CPU, on one machine,"
    count = workers or room
    _check_room(count, room, needs, f"GPUs of each machine: {_listed(gpus)}; CPUs: {_listed(cpus)}", where)
    return count, {"num_gpus": parallel}, min(count, max(rooms))


def _check_room(count: int, room: int, needs: str, got: str, where: str) -> None:
    if not 0 < count <= room:
        what = f"the cluster has room for {room} workers" if room != 1 else "the cluster has room for one worker"
        raise fail(what, where=where, expected=f"{needs} for each of {max(count, 1)}", got=got, remedy=_REMEDY)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def check_devices(project: Project, device: str, own: int) -> None:
    """Refuse rewards on a GPU that a Ray worker does not see: it sees its `own` ones, numbered from 0.

    `device` is that of rewards that declare none.
    """
    for name, spec in project.config.rewards.items():
        kind, _, number = (spec.device or device).partition(":")
        if kind == "cuda" and number.isdecimal() and int(number) >= own:
            raise fail(
                "a Ray worker does not see this GPU",
                where=project.where("rewards", name, "device") if spec.device else "--device",
                expected="cuda" if own == 1 else f"cuda:0 to cuda:{own - 1}, the GPUs of one worker",
                got=f"cuda:{number}, with --ray",
                remedy="write `cuda`: each worker has GPUs of its own",
            )


def check_kernels(options: SweepOptions) -> None:
    """Refuse a worker whose environment chooses other kernels of vLLM than the run, which records its own."""
    chosen = options.arguments.get("attention") == "batch-invariant"
    if options.engine == "vllm" and os.environ.get(INVARIANT) == "1" and not chosen:
        raise fail(
            "a Ray worker's environment chooses kernels that the run does not",
            where=f"{INVARIANT}=1 on {socket.gethostname()}",
            expected="the same kernels on every machine",
            remedy="unset it there, or pass `--engine-arg attention=batch-invariant`",
        )
