"""Which λ a sweep evaluates: a lattice for few policies, points spread over the simplex for many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from rewarded_lines.errors import fail
from rewarded_lines.merger.spec import simplex_grid
from rewarded_lines.pareto.next_point import STEPS, rounded

Kind = Literal["lattice", "spread"]
Weights = tuple[float, ...]
LATTICE: Kind = "lattice"
SPREAD: Kind = "spread"
# Up to this many policies the lattice is the default: with 8 policies and λ in tenths it has 19,448 λ.
FEW = 3
_ON_AN_EDGE = 11


@dataclass(frozen=True)
class Design:
    """A rule that gives as many λ as a sweep asks for.

    Attributes:
        kind: "lattice", where a number counts the λ on each edge of the simplex; or "spread", where it counts all λ.
        policies: N, the length of each λ.
    """

    kind: Kind
    policies: int

    @classmethod
    def of(cls, kind: Kind | None, policies: int, where: str) -> Design:
        """Return the design that the project at `where` asks for; by default a spread from four policies on.

        Raises:
            UserError: a spread of fewer than three policies.
        """
        if kind == SPREAD and policies < FEW:
            raise fail(
                "fewer than three policies have no simplex to spread over",
                where=where,
                expected="three policies or more",
                got=str(policies),
                remedy="leave `design` out, or write `design: lattice`",
            )
        return cls(kind or (SPREAD if policies > FEW else LATTICE), policies)

    @property
    def usual(self) -> int:
        """The number to ask for by default: 11 on each edge; or all vertices, the centre and the edges' middles."""
        return _ON_AN_EDGE if self.kind == LATTICE else self.policies * (self.policies + 1) // 2 + 1

    @property
    def first(self) -> int:
        """The number that a search begins with: 3 on each edge; or the vertices and the centre."""
        return 3 if self.kind == LATTICE else self.policies + 1

    def check(self, count: int, where: str) -> None:
        """Refuse a number of λ that lacks a vertex, which is a single policy; a UserError at `where`."""
        if self.kind == SPREAD and count < self.policies:
            raise fail(
                "too few λ",
                where=where,
                expected=f"{self.policies} or more: `design: spread` begins with every single policy",
                got=str(count),
                remedy=f"ask for {self.policies} or more; {self.usual} have the edges' middles and the centre, too",
            )
        if count < 2:
            raise fail("too few λ", where=where, expected="2 or more", got=str(count))

    def weights(self, count: int) -> list[Weights]:
        """Return the λ, each [policies], none negative, with a sum of 1."""
        if self.kind == LATTICE:
            return simplex_grid(self.policies, count)
        return spread(self.policies, count)


def spread(policies: int, count: int) -> list[Weights]:
    """Return `count` ≥ N λ of N ≥ 3 policies, spread over the simplex; more of them begin with the same ones.

    The order: each policy alone; the centre, 1/N each; the middles of the edges, those of neighbours in the order of
    the policies first, so that every policy is in as many; then the inside, by a Sobol sequence u in [0, 1)^(N − 1):
    λ_i = (1 − v_i) Π_(j<i) v_j with v_j = u_j^(1/(N − j)), j = 1 … N − 1, and λ_N = Π_j v_j. If u is uniform, so is λ.
    The inside is in steps of 1/10,000, the same on every machine.

    Source: Fang and Wang, "Number-theoretic Methods in Statistics", 1994, section 1.5 (the map); Joe and Kuo,
    "Constructing Sobol Sequences with Better Two-Dimensional Projections", SIAM J. Sci. Comput. 30, 2008.
    """
    found: dict[Weights, None] = {}
    for one in _sequence(policies):
        found[one] = None
        if len(found) == count:
            break
    return list(found)


def _sequence(policies: int) -> Iterator[Weights]:
    """Yield the λ of `spread` without end, some of them twice."""
    corners = np.eye(policies)
    yield from map(tuple, corners.tolist())
    yield (1 / policies,) * policies

    def apart(pair: tuple[int, int]) -> int:
        # On a ring of the policies.
        return min(pair[1] - pair[0], policies - pair[1] + pair[0])

    for one, other in sorted(combinations(range(policies), 2), key=apart):
        yield tuple(((corners[one] + corners[other]) / 2).tolist())
    import torch

    engine = torch.quasirandom.SobolEngine(policies - 1)
    while True:
        for row in engine.draw(64, dtype=torch.float64).numpy():
            yield tuple(part / STEPS for part in rounded(_on_the_simplex(row)))


def _on_the_simplex(cube: np.ndarray) -> np.ndarray:
    """Return the λ of a point of the unit cube, [policies − 1] → [policies]; see `spread`."""
    shares = cube ** (1 / np.arange(len(cube), 0, -1))
    left = np.cumprod(np.concatenate([[1.0], shares]))
    return np.concatenate([left[:-1] * (1 - shares), left[-1:]])
