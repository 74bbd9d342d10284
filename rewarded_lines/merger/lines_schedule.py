"""The schedule: the scale of each policy's residual by depth and kind of module; LiNeS is its default. Pure numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rewarded_lines.checkpoints.families import KINDS, kind_of
from rewarded_lines.checkpoints.tensor_depth import Depths, Place
from rewarded_lines.errors import Problem, UserError, fail

Outside = Literal["alpha", "depth"]


def lines_scale(block: int | None, blocks: int, alpha: float, beta: float) -> float:
    """Return the LiNeS scale of one tensor by its block.

    λ^(ℓ) = α + β·(ℓ−1)/(L−1) for ℓ = 1 … L, the block counted from 1; tensors outside the blocks (embeddings, final
    norm, head) get α, as in the authors' code, and so does every tensor of a model with a single block.

    Args:
        block: the 0-based block index ℓ−1, or None outside the blocks.
        blocks: the number of blocks L ≥ 1.
        alpha: scale of the first block.
        beta: added by the last block.

    Source: LiNeS, arXiv 2410.17146, equation 3 and section 4.
    """
    if block is None or blocks == 1:
        return alpha
    # Divide first: the quotient is exactly 1 in the last block, so β = 1 − α gives scale 1 there.
    return alpha + beta * (block / (blocks - 1))


@dataclass(frozen=True)
class Line:
    """The scales of a residual over depth: α and β of LiNeS, or a coefficient for every block.

    Attributes:
        alpha: α, the scale of the first block.
        beta: β, added by the last block.
        blocks: the scale of each block, first to last; if there are any, α and β are not used.
    """

    alpha: float = 1.0
    beta: float = 1.0
    blocks: tuple[float, ...] = ()

    def at(self, block: int, blocks: int) -> float:
        """Return the scale of the 0-based `block` of `blocks`."""
        assert len(self.blocks) in (0, blocks), "Schedule.check comes first"
        return self.blocks[block] if self.blocks else lines_scale(block, blocks, self.alpha, self.beta)

    def text(self) -> str:
        """Return the line for people: `α = 1, β = 0.5`, or `12 coefficients, 1 to 1.5`."""
        if self.blocks:
            return f"{len(self.blocks)} coefficients, {min(self.blocks):.6g} to {max(self.blocks):.6g}"
        return f"α = {self.alpha:.6g}, β = {self.beta:.6g}"


def canonical(alpha: float, beta: float, lines: Sequence[Line], modules: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Return the one way in which a `MergeSpec` writes its schedule: equal schedules are equal fields."""
    kept = tuple(lines[:1] if len(set(lines)) == 1 else lines)
    alpha, beta = (1.0, 1.0) if kept else (alpha, beta)
    if len(kept) == 1 and not kept[0].blocks:
        alpha, beta, kept = kept[0].alpha, kept[0].beta, ()
    factors = sorted(dict(modules).items(), key=lambda factor: KINDS.index(factor[0]))
    return {"alpha": alpha, "beta": beta, "lines": kept, "modules": tuple(one for one in factors if one[1] != 1)}


def mean_line(lines: Sequence[Line]) -> Line:
    """Return the mean of lines of one form, number by number."""
    alpha, beta = (sum(getattr(line, name) for line in lines) / len(lines) for name in ("alpha", "beta"))
    blocks = zip(*(line.blocks for line in lines), strict=True)
    return Line(alpha, beta, tuple(sum(same) / len(lines) for same in blocks))


@dataclass(frozen=True)
class Schedule:
    """The scale s_i of every tensor of policy i: by depth, times a factor by kind of module.

    A line holds inside the blocks, L the length of the tensor's own block list: an encoder and a decoder each run from
    first to last. No paper defines the scale outside the blocks. There "alpha" gives that of the first block, as in
    the code of LiNeS' authors. "depth" gives that of the nearest block: the first for embeddings, the last for final
    norm and head. Towers are as the user says: kept as the base has them, so scaled by 0, or flat, as the first block.

    Attributes:
        lines: one for all policies, or one for each, in order.
        modules: the factors of kinds of module, see `kind_of`; 1 for the others.
        outside: the rule for tensors outside the blocks.
    """

    lines: tuple[Line, ...] = (Line(),)
    modules: tuple[tuple[str, float], ...] = ()
    outside: Outside = "alpha"

    def line(self, policy: int = 0) -> Line:
        """Return the line of a policy, by its place."""
        return self.lines[policy if len(self.lines) > 1 else 0]

    def scale(self, place: Place, name: str = "", policy: int = 0) -> float:
        """Return s_i of one tensor.

        Args:
            place: of the tensor.
            name: of the tensor: its kind is read from it.
            policy: i, from 0.

        Raises:
            UserError: a list has not one coefficient for each block. Or the rule is "depth", and the tensor may be
                before or after the blocks.
        """
        line = self.line(policy)
        if problem := _misfit(line, place.stack, place.blocks):
            raise UserError(problem)
        scale = _at(line, place, self.outside, name)
        return scale * dict(self.modules).get(kind_of(name, place.side), 1.0) if self.modules else scale

    def times(self, factor: float) -> Schedule:
        """Return the schedule with every scale multiplied."""
        lines = (
            Line(factor * one.alpha, factor * one.beta, tuple(factor * at for at in one.blocks)) for one in self.lines
        )
        return replace(self, lines=tuple(lines))

    def by_block(self, stacks: Mapping[str, int], policies: Sequence[str] = ()) -> dict[str, list[float]]:
        """Return the scale of every block, first to last, before the factors by kind of module.

        The keys are the lists of blocks; where policies have lines of their own, `LIST of POLICY`.
        """
        several = len(self.lines) > 1
        return {
            f"{stack} of {policies[index]}" if several else stack: [line.at(block, blocks) for block in range(blocks)]
            for stack, blocks in stacks.items()
            for index, line in enumerate(self.lines)
        }

    def check(self, depths: Depths) -> None:
        """Refuse lists of another length than a model's lists of blocks, and kinds of module that it has not."""
        stacks = depths.stacks.items()
        found = (_misfit(line, stack, blocks) for line in self.lines for stack, blocks in stacks)
        problems = [problem for problem in dict.fromkeys(found) if problem]
        if self.modules:
            kinds = {kind_of(name, place.side) for name, place in depths.place.items()}
            seen = [kind for kind in KINDS if kind in kinds]
            problems += [
                Problem(f"no tensor of the model is of the kind `{kind}`", "--modules", ", ".join(seen), kind)
                for kind, _ in self.modules
                if kind not in seen
            ]
        if problems:
            raise UserError(problems)

    @property
    def forms(self) -> str:
        """What the scale differs by, apart from plain LiNeS: `policy`, `block` and `module`; "" for LiNeS."""
        found = {"policy": len(self.lines) > 1, "block": any(line.blocks for line in self.lines)}
        return " and ".join(form for form, there in {**found, "module": bool(self.modules)}.items() if there)

    def text(self, policies: Sequence[str] = ()) -> str:
        """Return the schedule for people, with the policies' names."""
        shown = [line.text() for line in self.lines]
        if len(shown) > 1:
            names = [*policies, *(f"policy {index}" for index in range(len(policies) + 1, len(shown) + 1))]
            shown = [f"{name}: {line}" for name, line in zip(names, shown, strict=False)]
        factors = ", ".join(f"{kind} × {factor:.6g}" for kind, factor in self.modules)
        return "; ".join([*shown, *([factors] if factors else [])])

    def arguments(self, policies: Sequence[str]) -> list[tuple[str, str]]:
        """Return option and value of each argument of `merge` that gives this schedule; 1 is the default."""
        found = []
        for form in ("alpha", "beta", "schedule"):
            for index, line in enumerate(self.lines):
                numbers = line.blocks if form == "schedule" else () if line.blocks else (getattr(line, form),)
                if numbers and (form == "schedule" or numbers != (1,)):
                    name = f"{policies[index]}=" if len(self.lines) > 1 else ""
                    found.append((form, name + ",".join(map(brief_number, numbers))))
        factors = ",".join(f"{kind}={brief_number(factor)}" for kind, factor in self.modules)
        return [*found, *([("modules", factors)] if factors else [])]

    def as_dict(self, policies: Sequence[str] = ()) -> dict[str, Any]:
        """Return α, β, `schedule` and `modules` for JSON, in the forms that `read_schedule` takes.

        What is nothing is left out, so records of plain LiNeS stay as they were. Values of single policies are by name,
        or without names in the order of the policies.
        """
        columns: dict[str, list[Any]] = {
            "alpha": [None if line.blocks else line.alpha for line in self.lines],
            "beta": [None if line.blocks else line.beta for line in self.lines],
            "schedule": [list(line.blocks) or None for line in self.lines],
        }
        found: dict[str, Any] = {"modules": dict(self.modules)} if self.modules else {}
        for form, values in columns.items():
            if form != "schedule" or any(values):
                named = {name: value for name, value in zip(policies, values, strict=False) if value is not None}
                found[form] = values[0] if len(values) == 1 else named if policies else values
        return found


def brief_number(value: float) -> str:
    """Return a number as text that is read as the same number: `1`, not `1.0`."""
    return repr(int(value)) if value == int(value) else repr(value)


def _at(line: Line, place: Place, outside: Outside, name: str) -> float:
    """Return the scale of a tensor by its place; see `Schedule`."""
    if place.block is not None:
        return line.at(place.block, place.blocks)
    if place.side == "base":
        return 0.0
    if outside == "alpha" or place.side in ("before", "flat"):
        return line.at(0, place.blocks)
    if place.side == "after":
        return line.at(place.blocks - 1, place.blocks)
    raise fail(
        "unknown whether this tensor is before or after the blocks",
        where=name or place.stack,
        expected="embeddings, a final norm or a head with a known name",
        remedy="pass --outside alpha: all tensors outside the blocks get the first block's scale",
    )


def _misfit(line: Line, stack: str, blocks: int) -> Problem | None:
    """Return the problem of a list with another length than a list of blocks."""
    if len(line.blocks) in (0, blocks):
        return None
    remedy = "give one number for each block, first to last"
    remedy += "; lists of other lengths can be taken out: --tower NAME=flat"
    return Problem(
        "a schedule needs one coefficient for each block",
        f"--schedule, {stack}",
        f"{blocks}",
        f"{len(line.blocks)}",
        remedy,
    )
