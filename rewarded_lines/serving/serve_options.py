"""The options of `serve`, for Python and for the command line. Importing this module loads no heavy library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from rewarded_lines.errors import fail
from rewarded_lines.merger.merge_options import TOWER_HELP, joined_towers
from rewarded_lines.options import option, parse_assignments, parse_numbers, takes_fields

LOCAL = "127.0.0.1"


@dataclass(frozen=True)
class ServeOptions:
    """How a server starts; a UserError for values that are wrong or do not go together."""

    host: str = option(LOCAL, "Address to listen on; 0.0.0.0 for all networks.")
    port: int = option(8000, "Port; 0 takes a free one.", min=0, max=65535)
    api_key: str | None = option(None, "Key that requests must bear.", envvar="VLLM_API_KEY")
    admin_key: str | None = option(
        None, "Key for POST /preference (whole models); by default a new one.", envvar="REWARDED_LINES_ADMIN_KEY"
    )
    at_least: Mapping[str, float] | None = option(
        None,
        "The default λ is the best of the run with at least this mean of a reward (repeat).",
        typed=list[str] | None,
        metavar="NAME=VALUE",
    )
    maximize: str | None = option(None, "With --at-least: the reward to maximize.", metavar="NAME")
    lam: str | None = option(None, "The default λ, such as 0.35 or helpful=0.7,brief=0.3.")
    row: str | None = option(None, "The row of --lam: a method of the sweep, soup or lines.")
    step: float = option(0.01, "λ of requests is rounded to multiples of it.")
    rank: int | None = option(
        None, "Serve whole policies as adapters of this rank, so that each request has its λ.", min=1
    )
    cache: str | None = option(None, "Folder for these adapters; by default `served` beside the project file.")
    max_body: str = option("32MB", "Longest request.")
    tensor_parallel: int | None = option(None, "Devices that vLLM spreads the model over.", min=1)
    engine_args: Mapping[str, Any] | None = option(
        None,
        "A setting of `engine:`, or any argument of `vllm serve` (repeat).",
        typed=list[str] | None,
        flag="--engine-arg",
        metavar="KEY=VALUE",
    )
    layers: str | None = option(None, r"Pattern of the block list, e.g. 'blocks\.(\d+)\.'")
    tower: str | None = option(None, TOWER_HELP, typed=list[str] | None)

    def __post_init__(self) -> None:
        """Parse what the command line gives as text; refuse options that do not fit."""
        object.__setattr__(self, "tower", joined_towers(self.tower))
        object.__setattr__(self, "at_least", parse_numbers("--at-least", self.at_least) or None)
        try:
            object.__setattr__(self, "engine_args", parse_assignments(self.engine_args) or None)
        except ValueError as error:
            raise fail(str(error), where="--engine-arg", expected="for instance max_num_seqs=64") from error
        if self.at_least and (self.lam or self.row):
            raise fail("two defaults", where="--at-least", got="--lam or --row beside it", remedy="give one of them")
        if self.maximize and not self.at_least:
            raise fail("nothing to maximize under", where="--maximize", remedy="give --at-least, too")
        if self.row and self.lam is None:
            raise fail("a row without λ", where="--row", remedy="give --lam, too")
        for name, key in (("--api-key", self.api_key), ("--admin-key", self.admin_key)):
            if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
                raise fail("not a key", where=name, expected="printable ASCII without spaces")

    @property
    def most_bytes(self) -> int:
        """The longest body of a request."""
        from rewarded_lines.checkpoints.writer import parse_size

        return parse_size(self.max_body, "--max-body")


takes_serve_options = partial(takes_fields, ServeOptions, "options")
"""Lets callers pass the options one by one, or whole as `options`; see `takes_fields`."""
