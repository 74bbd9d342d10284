"""The options that `sweep`, `search` and `score` share: declared once, for Python and for the command line.

Importing this module loads no heavy library, because the command line reads it at its start.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import Field, dataclass, field, fields, replace
from functools import wraps
from typing import Any, TypeVar, get_type_hints

from rewarded_lines.errors import fail

Result = TypeVar("Result")


def _option(default: Any, about: str, **more: Any) -> Any:
    """Return a field with what `typer.Option` takes: its help and more; `offers` are the words that shells offer."""
    return field(default=default, metadata={"help": about, **more})


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep runs, beside what its project says.

    Raises:
        UserError: an option has a value that it cannot have, or does not go with another one.
    """

    engine: str = _option(
        "vllm", "vllm, hf (transformers; slower), or the URL of a server that takes adapters.", offers=("vllm", "hf")
    )
    device: str = _option("auto", "Where reward models run: auto, cpu, cuda.", offers=("auto", "cpu", "cuda"))
    layers: str | None = _option(None, r"Pattern of the block list, e.g. 'blocks\.(\d+)\.'")
    tensor_parallel: int = _option(1, "Devices that vLLM spreads the model over.", min=1)
    offload: str = _option(
        "auto", "Reward models leave memory when idle: auto, always, never.", offers=("auto", "always", "never")
    )
    ray: str | None = _option(
        None, "Share the points out over Ray workers: HOST:PORT, auto, or local.", metavar="ADDRESS"
    )
    workers: int | None = _option(
        None, "With --ray: how many. By default one for each GPU (or --tensor-parallel of them) or machine.", min=1
    )

    def __post_init__(self) -> None:
        """Refuse options that do not fit."""
        if self.workers is not None and self.ray is None:
            raise fail("there are workers with Ray only", where="--workers", remedy="add --ray local, or leave it out")
        if self.tensor_parallel < 1:
            raise fail("not a number of devices", where="--tensor-parallel", got=str(self.tensor_parallel))
        if self.tensor_parallel > 1 and self.engine != "vllm":
            raise fail("only vLLM spreads a model", where="--tensor-parallel", remedy="use --engine vllm")
        if self.offload not in ("auto", "always", "never"):
            raise fail(f"unknown value `{self.offload}`", where="--offload", expected="auto, always, never")


def takes_sweep_options(
    without: Collection[str] = (), annotation: Callable[[Field[Any], Any], Any] = lambda one, kind: kind
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Let a function take the options one by one, too, in the place of its parameter `options`, which gets them whole.

    A parameter of the function that has the name of an option is left to the function.

    Args:
        without: options that it does not take.
        annotation: what the signature says of an option, given its field and its type.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        signature = inspect.signature(function, eval_str=True)
        kinds = get_type_hints(SweepOptions)
        taken = {one.name: one for one in fields(SweepOptions) if one.name not in {*without, *signature.parameters}}

        @wraps(function)
        def call(*args: Any, options: SweepOptions | None = None, **given: Any) -> Result:
            each = {name: given.pop(name) for name in taken if name in given}
            return function(*args, options=replace(options or SweepOptions(), **each), **given)

        parameters: list[inspect.Parameter] = []
        for one in signature.parameters.values():
            each = [
                one.replace(name=name, default=option.default, annotation=annotation(option, kinds[name]))
                for name, option in taken.items()
            ]
            parameters += each if one.name == "options" else [one]
        call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return call

    return decorate
