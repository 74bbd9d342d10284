"""The options that `sweep`, `search` and `score` share, for Python and for the command line.

Importing this module loads no heavy library, because the command line reads it at its start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from rewarded_lines.errors import fail
from rewarded_lines.merger.merge_options import TOWER_HELP, joined_towers
from rewarded_lines.options import option, parse_assignments, takes_fields

_PARALLEL = "tensor_parallel_size"


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep runs; a UserError for values that are wrong or do not go together."""

    engine: str = option(
        "vllm", "vllm, hf (transformers; slower), or the URL of a server that takes adapters.", offers=("vllm", "hf")
    )
    device: str = option("auto", "Where reward models run: auto, cpu, cuda.", offers=("auto", "cpu", "cuda"))
    layers: str | None = option(None, r"Pattern of the block list, e.g. 'blocks\.(\d+)\.'")
    tower: str | None = option(None, TOWER_HELP, typed=list[str] | None)
    tensor_parallel: int | None = option(
        None, "Devices that vLLM spreads the model over; by default the project's, or one.", min=1
    )
    engine_args: Mapping[str, Any] | None = option(
        None,
        "A setting of `engine:`: resident, attention, or any argument of vLLM's EngineArgs (repeat).",
        typed=list[str] | None,
        flag="--engine-arg",
        metavar="KEY=VALUE",
    )
    offload: str = option(
        "auto", "Reward models leave memory when idle: auto, always, never.", offers=("auto", "always", "never")
    )
    reward_memory: str | None = option(
        None, "What reward models may take of a GPU together, e.g. 24GiB or 30%; the rest is the engine's."
    )
    ray: str | None = option(
        None, "Share the points out over Ray workers: HOST:PORT, auto, or local.", metavar="ADDRESS"
    )
    rehash: bool = option(False, "Hash all checkpoints again; large files that have not changed are hashed once.")
    trace: str | None = option(
        None, "Write what this process does when, for ui.perfetto.dev or chrome://tracing.", metavar="FILE"
    )
    workers: int | None = option(
        None, "With --ray: how many. By default one for each GPU (or --tensor-parallel of them) or machine.", min=1
    )

    def __post_init__(self) -> None:
        """Join the towers if they are several, parse the engine's arguments; refuse options that do not fit."""
        object.__setattr__(self, "tower", joined_towers(self.tower))
        self._parse_arguments()
        if self.workers is not None and self.ray is None:
            raise fail("workers need Ray", where="--workers", remedy="add --ray local, or leave it out")
        parallel = 1 if self.tensor_parallel is None else self.tensor_parallel
        if parallel < 1:
            raise fail("not a number of devices", where="--tensor-parallel", got=str(self.tensor_parallel))
        if parallel > 1 and self.engine != "vllm":
            raise fail("only vLLM spreads a model", where="--tensor-parallel", remedy="use --engine vllm")
        if self.offload not in ("auto", "always", "never"):
            raise fail(f"unknown value `{self.offload}`", where="--offload", expected="auto, always, never")
        if self.reward_memory is not None:
            from rewarded_lines.config_values import parse_memory

            try:
                parse_memory(self.reward_memory)
            except ValueError as error:
                raise fail(str(error), where="--reward-memory") from error

    def _parse_arguments(self) -> None:
        try:
            given = parse_assignments(self.engine_args)
        except ValueError as error:
            raise fail(str(error), where="--engine-arg", expected="for instance max_num_seqs=64") from error
        object.__setattr__(self, "engine_args", given or None)
        if self.engine != "vllm" and set(given) - ({"resident"} if self.engine == "hf" else set()):
            expected = "resident alone" if self.engine == "hf" else "none"
            remedy = "use --engine vllm, or leave it out"
            raise fail("only vLLM takes arguments", where="--engine-arg", expected=expected, remedy=remedy)
        if self.tensor_parallel is not None and given.get(_PARALLEL, self.tensor_parallel) != self.tensor_parallel:
            got = f"--tensor-parallel {self.tensor_parallel}, --engine-arg {_PARALLEL}={given[_PARALLEL]}"
            raise fail("two numbers of devices", where="--engine-arg", got=got, remedy="give one of them")

    @property
    def arguments(self) -> dict[str, Any]:
        """The settings of the engine that the command line gives, those of the project apart."""
        given = self.tensor_parallel is not None and self.engine == "vllm"
        return {**(self.engine_args or {}), **({_PARALLEL: self.tensor_parallel} if given else {})}


takes_sweep_options = partial(takes_fields, SweepOptions, "options")
"""Lets callers pass the options one by one, or whole as `options`; see `takes_fields`."""
