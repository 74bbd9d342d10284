"""From a preference over rewards to weights of policies, each of which was trained for a mixture of the rewards.

Policy j was trained for Σᵢ Bᵢⱼ rᵢ with Σᵢ Bᵢⱼ = 1. A user prefers Σᵢ μᵢ rᵢ. The weights with Bλ = μ are

    λ = B⁻¹ μ,    Σⱼ λⱼ = Σᵢ μᵢ

With one reward for each policy B is the identity, so λ = μ: Rewarded Soups. For a preference outside the mixtures a
weight is negative: the merge extrapolates.

Source: Xie et al., "Bone Soups: A Seek-and-Soup Model Merging Approach for Controllable Multi-Objective Generation",
arXiv 2502.10762.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rewarded_lines.errors import Problem, UserError, did_you_mean, fail
from rewarded_lines.folders import TRAINING_FILE, json_object_in
from rewarded_lines.merger.merge_options import MergeOptions
from rewarded_lines.merger.spec import TOLERANCE, on_simplex, parse_weights

Weights = float | str | Sequence[float] | Mapping[str, float]
"""λ of the first of two policies, or one weight for each, in order or by name."""
Shares = Mapping[str, Mapping[str, float]]
"""The share of each reward in what a policy was trained for: policy → reward → share."""
# Solvers of other machines differ in the last bits, and the weights name the records of a sweep.
_DECIMALS = 12
# Users round shares such as 1/3.
_SAME_SHARE = 0.01


@dataclass(frozen=True, eq=False)
class Mixtures:
    """The mixtures of all policies.

    Attributes:
        policies: their names, the columns of B.
        rewards: the names of the rewards, the rows of B.
        shares: B, [rewards, policies].
        where: the place that declares them, for messages.
    """

    policies: tuple[str, ...]
    rewards: tuple[str, ...]
    shares: np.ndarray
    where: str

    def weights(self, preference: Sequence[float]) -> tuple[float, ...]:
        """Return λ = B⁻¹μ, one for each policy, rounded to 12 decimals; `preference` is μ, one for each reward.

        Raises:
            UserError: B has no inverse, or there are not as many rewards as policies.
        """
        self._check_inverse()
        first = [round(one, _DECIMALS) + 0.0 for one in np.linalg.solve(self.shares, preference)[:-1].tolist()]
        # As `merge` completes the second of two weights.
        return (*first, round(math.fsum(preference) - math.fsum(first), _DECIMALS) + 0.0)

    def preference(self, weights: Sequence[float]) -> dict[str, float]:
        """Return μ = Bλ by reward, rounded to 12 decimals."""
        found = (self.shares @ np.array(weights)).round(_DECIMALS) + 0.0
        return dict(zip(self.rewards, found.tolist(), strict=True))

    def notes(self, every: Iterable[Sequence[float]]) -> list[str]:
        """Return a note on those of some weights λ that are outside the simplex."""
        listed = list(every)
        outside = [weights for weights in listed if not on_simplex(weights)]
        if not outside:
            return []
        furthest = min(outside, key=min)
        shown = ", ".join(f"{weight:.4g} {name}" for name, weight in zip(self.policies, furthest, strict=True))
        asked = preference_text(self.preference(furthest))
        return [
            f"λ = B⁻¹μ leaves the simplex for {len(outside)} of {len(listed)} preferences, so merges extrapolate: "
            f"{asked} is {shown}"
        ]

    def _check_inverse(self) -> None:
        count, policies = len(self.rewards), len(self.policies)
        if count != policies or np.linalg.matrix_rank(self.shares) < policies:
            rows = "; ".join(", ".join(f"{share:g}" for share in row) for row in self.shares.tolist())
            raise fail(
                "the mixtures give a preference many λ or none",
                where=self.where,
                expected="as many rewards as policies, and a matrix with an inverse",
                got=f"{policies} policies, {count} rewards: [{rows}]",
                remedy="give the weights of the policies with --lam; to sweep over them, leave `mixtures:` out",
            )


def read_mixtures(
    shares: Shares, policies: Collection[str], where: str = "mixtures", known: Collection[str] = ()
) -> Mixtures:
    """Return the checked mixtures of the policies, with the rewards in the order in which they are first named.

    Args:
        shares: for each policy.
        policies: in the order of the weights.
        where: the place of `shares`, for messages.
        known: the rewards of the project, if it declares some.

    Raises:
        UserError: a policy without a mixture or the reverse, an unknown reward, or shares that do not sum to 1; all
            faults at once.
    """
    problems = [_unknown("policy", name, policies, where) for name in shares if name not in policies]
    problems += [
        Problem(f"no mixture for the policy `{name}`", where, "one for each policy", remedy=f"add `{name}: {{…}}`")
        for name in policies
        if name not in shares
    ]
    rewards = tuple(dict.fromkeys(reward for name in policies for reward in shares.get(name, ())))
    problems += [_unknown("reward", name, known, where) for name in rewards if known and name not in known]
    for name in (name for name in policies if name in shares):
        total = math.fsum(shares[name].values())
        if not abs(total - 1) <= TOLERANCE:
            got, remedy = preference_text(shares[name]), "divide each share by their sum"
            problems.append(Problem("the shares do not sum to 1", f"{where}.{name}", "a sum of 1", got, remedy))
    if problems:
        raise UserError(problems)
    matrix = np.array([[shares[name].get(reward, 0.0) for name in policies] for reward in rewards])
    return Mixtures(tuple(policies), rewards, matrix, where)


def check_trained(shares: Shares, folders: Mapping[str, Path], where: str = "mixtures") -> None:
    """Refuse mixtures that contradict what the policies' `training.json` says they were trained for."""
    problems = []
    for name, folder in folders.items():
        recorded = json_object_in(folder / TRAINING_FILE).get("weights")
        total = sum(recorded.values()) if isinstance(recorded, dict) else 0
        if name not in shares or not recorded or not total:
            continue
        trained = {reward: weight / total for reward, weight in recorded.items() if weight}
        rewards = trained.keys() | shares[name].keys()
        if any(abs(trained.get(one, 0.0) - shares[name].get(one, 0.0)) > _SAME_SHARE for one in rewards):
            expected = f"{preference_text(trained)}, as in {folder / TRAINING_FILE}"
            got = preference_text(shares[name])
            problems.append(Problem("not what the policy was trained for", f"{where}.{name}", expected, got))
    if problems:
        raise UserError(problems)


def preferred_weights(lam: object, mixtures: Mixtures | None, how: MergeOptions) -> list[tuple[float, ...]]:
    """Return λ = B⁻¹μ for each preference μ."""
    if lam is not None:
        raise fail("λ and a preference are both given", where="--preference", got=f"--lam {lam}", remedy="give one")
    if mixtures is None:
        remedy = "declare `mixtures:` in the project, for each policy {reward: share}, or give --lam"
        raise fail("no mixtures map a preference to λ", where="--preference", got=str(how.preference), remedy=remedy)
    asked = each_weights(how.preference, mixtures.rewards, how.extrapolate, True, option="--preference")
    return [mixtures.weights(one) for one in asked]


def each_weights(
    lam: Weights | Sequence[Weights], names: Sequence[str], free: bool, total: bool, option: str = "--lam"
) -> list[tuple[float, ...]]:
    """Return the weights of one λ or of several; see `parse_weights`, of which `free` is `extrapolate`."""
    if isinstance(lam, Mapping):
        lam = ",".join(f"{name}={weight!r}" for name, weight in lam.items())
    if isinstance(lam, float | int | str) or all(isinstance(value, float | int) for value in lam):
        return [parse_weights(lam, names, free, total, option=option)]  # type: ignore[arg-type]
    found = [each_weights(value, names, free, total, option)[0] for value in lam]
    if len(set(found)) < len(found):
        raise fail("the same λ twice", where=option, got=", ".join(map(str, found)))
    return found


def preference_text(preference: Mapping[str, float]) -> str:
    """Return shares by reward in words: `helpful 0.7, harmless 0.3`."""
    return ", ".join(f"{name} {share:.4g}" for name, share in preference.items())


def _unknown(kind: str, name: str, known: Collection[str], where: str) -> Problem:
    return Problem(f"no {kind} `{name}`", where, ", ".join(known), remedy=did_you_mean(name, known))
