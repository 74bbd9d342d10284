"""Every method again, over whole tensors and without its roundings: what a merge must be, to be rounded once.

A merged value is a sum of the inputs, c_0·base + Σ c_i·policy_i, with coefficients that depend on which policies take
part there. They are fractions; products and sums are long doubles, so that a base that all but vanishes takes nothing
with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial

import blake3
import numpy as np
from exact import LONG, Format, decode, encode, from_tie, ulp
from hostile import BLOCKS, SHAPES, Family

# Where terms are this much larger than their sum, float64 has not the bits to round the sum right every time.
CANCELLED = 2.0**7
FRAGILE = 2.0**-50
# From the policies that take part (ascending) to the coefficients of their residuals.
Coefficients = Callable[[Sequence[int]], Sequence[Fraction]]


@dataclass
class Answer:
    """The exact values of a tensor, the size of the terms that were added, and where a decision hung by a hair."""

    values: np.ndarray
    terms: np.ndarray
    fragile: np.ndarray


@dataclass
class Tally:
    """How many values were compared, and how many were not the exact one rounded, with the reason."""

    compared: int = 0
    near_tie: int = 0
    cancelled: int = 0
    undecided: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.compared += other.compared
        self.near_tie += other.near_tie
        self.cancelled += other.cancelled
        self.undecided += other.undecided
        self.wrong += other.wrong


def random_mask(seed: int, name: str, digest: bytes, density: float, start: int, count: int) -> np.ndarray:
    """Return which of `count` values the library keeps at random, from `start` on."""
    from rewarded_lines.kernels.thresholds_and_masks import RandomMask, uniform_numbers

    return RandomMask(seed, name, digest, density).chosen(uniform_numbers(seed, name, digest, start, count), ())


def scale_of(name: str, alpha: float, beta: float, outside: str = "alpha") -> Fraction:
    """Return α + β·(ℓ−1)/(L−1), and outside the blocks what `outside` says."""
    if ".layers." in name:
        return Fraction(alpha) + Fraction(beta) * int(name.split(".")[2]) / (BLOCKS - 1)
    after = outside == "depth" and not name.startswith("model.embed_tokens")
    return Fraction(alpha) + (Fraction(beta) if after else 0)


def as_long(value: Fraction) -> np.longdouble:
    head = float(value)
    return LONG(head) + LONG(float(value - Fraction(head)))


def as_fraction(value: np.longdouble) -> Fraction:
    head = float(value)
    return Fraction(head) + Fraction(float(value - LONG(head)))


class Reference:
    """The exact merges of a family."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.values = {name: family.values(name) for name in SHAPES}

    def merge(self, name: str, method: str, weights: Sequence[float], scale: Fraction, options: Mapping) -> Answer:
        base, *policies = self.values[name]
        residuals = [policy - base for policy in policies]
        if method in FACTORS:
            return self._by_factors(name, method, weights, scale, options)
        rule = RULES.get(method, Reference._soup)
        taking, coefficients, fragile = rule(self, name, residuals, [Fraction(w) for w in weights], options)
        values, terms = np.empty_like(base), np.abs(base)
        keys = sum(mask.astype(int) << i for i, mask in enumerate(taking))
        for key in np.unique(keys):
            here = keys == key
            rows = [i for i in range(len(policies)) if key >> i & 1]
            factors = [scale * factor for factor in coefficients(rows)]
            values[here] = as_long(1 - sum(factors)) * base[here]
            for row, factor in zip(rows, factors, strict=True):
                values[here] += as_long(factor) * policies[row][here]
                terms[here] += abs(as_long(factor)) * np.abs(residuals[row][here])
        return Answer(values, terms, fragile)

    def _by_factors(self, name, method, weights, scale, options) -> Answer:
        """Merge by a method whose coefficients differ from value to value: an array of them for each policy."""
        base, *policies = self.values[name]
        factors, fragile = FACTORS[method](self, name, [as_long(Fraction(weight)) for weight in weights], options)
        factors = [as_long(scale) * factor for factor in factors]
        pairs = list(zip(factors, policies, strict=True))
        values = (1 - sum(factors)) * base + sum(factor * policy for factor, policy in pairs)
        terms = np.abs(base) + sum(np.abs(factor * (policy - base)) for factor, policy in pairs)
        return Answer(values, terms, fragile)

    def _sum(self, name, weights, options):
        everywhere = np.ones(self.values[name][0].shape, LONG)
        return [everywhere * share for share in shares_of(weights)], everywhere == 0

    def _ram(self, name, weights, options):
        shares, changed = shares_of(weights), options["changed"]
        boosts = self.boosts(name, weights, options) if "boost" in options else [0.0] * len(weights)
        masks = changed_by(self.float64_residuals(name), weights, changed)
        count, size = sum(masks), sum(np.abs(share) * mask for share, mask in zip(shares, masks, strict=True))
        factors = []
        for share, mask, boost in zip(shares, masks, boosts, strict=True):
            factors.append(np.where(count > 1, share / np.where(size > 0, size, 1), share * (1 + LONG(boost))) * mask)
        return factors, np.zeros(count.shape, bool)

    def boosts(self, name, weights, options):
        """Return RAM+'s r·min(shared/unique, α)."""
        names = SHAPES if options.get("scope", "model") == "model" else [name]
        columns = [changed_by(self.float64_residuals(each), weights, options["changed"]) for each in names]
        masks = np.concatenate(columns, axis=1)
        alone = masks.sum(axis=0) == 1
        pairs = [((mask & ~alone).sum(), (mask & alone).sum()) for mask in masks]
        return [options["boost"] * min(shared / own, options["cap"]) if own else 0.0 for shared, own in pairs]

    def _sce(self, name, weights, options):
        residuals = [residual.astype(LONG) for residual in self.float64_residuals(name)]
        total, count = sum(residuals), len(residuals)
        variance = sum((count * residual - total) ** 2 for residual in residuals)
        chosen = int(options["select"] * np.count_nonzero(variance))
        least = np.sort(variance)[::-1][chosen - 1] if chosen else LONG(np.inf)
        kept = [np.where(variance >= least, residual, 0) for residual in residuals]
        squares = [(residual**2).sum() for residual in kept]
        shares = [share * square for share, square in zip(shares_of(weights), squares, strict=True)]
        factors, fragile = self._elect(kept, weights, "mean", shares)
        return factors, fragile | (np.abs(variance - least) <= FRAGILE * least)

    def _della(self, name, weights, options):
        """Compute the probabilities row by row, and draw with the library's random numbers."""
        from rewarded_lines.kernels.blocks import BLOCK
        from rewarded_lines.kernels.thresholds_and_masks import uniform_numbers

        density, window, kept = LONG(options["density"]), LONG(options["window"]), []
        for codes, residual in zip(self.family.codes[1:], self.float64_residuals(name), strict=True):
            rows, chances = residual.reshape(-1, SHAPES[name][-1]), []
            for row in np.abs(rows):
                ranks = np.empty(row.size, LONG)
                ranks[np.argsort(row, kind="stable")] = np.arange(row.size)
                chances.append(density + window * (ranks / max(1, row.size - 1) - LONG(0.5) * (row.size > 1)))
            chance, digest = np.concatenate(chances), blake3.blake3(codes[name].tobytes()).digest()
            starts = range(0, residual.size, BLOCK)
            drawn = [
                uniform_numbers(options["seed"], name, digest, start, min(BLOCK, residual.size - start))
                for start in starts
            ]
            kept.append((np.concatenate(drawn) * np.float32(2.0**-24) < chance.astype(np.float32)) / chance)
        residuals = [residual * mask for residual, mask in zip(self.float64_residuals(name), kept, strict=True)]
        factors, fragile = self._elect(residuals, weights, options["join"])
        return [factor * mask for factor, mask in zip(factors, kept, strict=True)], fragile

    def _breadcrumbs(self, name, weights, options):
        kept = []
        for residual in self.float64_residuals(name):
            sizes = np.sort(np.abs(residual))[::-1]
            wanted = max(1, int(options["density"] * sizes.size))
            first = min(int(options["outliers"] * sizes.size), sizes.size - wanted)
            inside = (np.abs(residual) >= sizes[first + wanted - 1]) & (np.abs(residual) <= sizes[first])
            kept.append(inside if first else np.abs(residual) >= sizes[wanted - 1])
        residuals = [np.where(mask, row, 0) for row, mask in zip(self.float64_residuals(name), kept, strict=True)]
        factors, fragile = self._elect(residuals, weights, options["join"])
        return [factor * mask for factor, mask in zip(factors, kept, strict=True)], fragile

    def _elect(self, kept, weights, join, shares=None):
        """Return each policy's coefficients in the mean or sum of the elected sign, or the sum of all."""
        parts = [weight * row.astype(LONG) for weight, row in zip(weights, kept, strict=True)]
        elected, size = sum(parts), sum(map(np.abs, parts))
        agree = [(np.sign(part) == np.sign(elected)) & (part != 0) | (join == "all") for part in parts]
        factors = [share * mask for share, mask in zip(weights if shares is None else shares, agree, strict=True)]
        whole = sum(map(np.abs, factors))
        if join == "mean":
            factors = [factor / np.where(whole > 0, whole, 1) for factor in factors]
        return factors, (np.abs(elected) <= FRAGILE * size) & (size > 0)

    def _soup(self, name, residuals, weights, options):
        everyone = [np.ones(residuals[0].shape, bool)] * len(residuals)
        return everyone, lambda rows: weights, np.zeros(residuals[0].shape, bool)

    def _slerp(self, name, residuals, weights, options):
        first, second = residuals
        norms = np.sqrt((first * first).sum()) * np.sqrt((second * second).sum())
        cosine = (first * second).sum() / norms if norms else LONG(1)
        if abs(cosine) <= 0.9995:
            angle = np.arccos(cosine)
            weights = [as_fraction(np.sin(as_long(weight) * angle) / np.sin(angle)) for weight in weights]
        return self._soup(name, residuals, weights, options)

    def _ties(self, name, residuals, weights, options):
        limits = self.thresholds(name, options["density"], options["scope"])
        kept = [np.abs(row) >= limit for row, limit in zip(self.float64_residuals(name), limits, strict=True)]
        return self._join(residuals, kept, weights, options["join"])

    def _dare(self, name, residuals, weights, options):
        weights = [weight / Fraction(options["density"]) for weight in weights]
        nothing = np.zeros(residuals[0].shape, bool)
        return self.kept(name, residuals, options), lambda rows: [weights[row] for row in rows], nothing

    def _dare_ties(self, name, residuals, weights, options):
        kept = self.kept(name, residuals, options)
        agreeing, coefficients, fragile = self._join(residuals, kept, weights, options["join"])
        density = Fraction(options["density"])
        return agreeing, lambda rows: [factor / density for factor in coefficients(rows)], fragile

    def _consensus(self, name, residuals, weights, options):
        total, tall = sum(residuals), LONG(options["tall"])
        size = sum(map(np.abs, residuals))
        rests = [tall * np.abs(total - residual) for residual in residuals]
        needed = sum((np.abs(residual) >= rest).astype(int) for residual, rest in zip(residuals, rests, strict=True))
        gaps = [np.abs(np.abs(residual) - rest) for residual, rest in zip(residuals, rests, strict=True)]
        fragile = np.any([(gap <= FRAGILE * size) & (size > 0) for gap in gaps], axis=0)
        keep = needed >= options["agree"]
        return [keep] * len(residuals), lambda rows: weights if rows else [], fragile

    def _join(self, residuals, kept, weights, join):
        pairs = zip(weights, residuals, kept, strict=True)
        parts = [np.where(mask, as_long(weight) * residual, 0) for weight, residual, mask in pairs]
        elected, size = sum(parts), sum(map(np.abs, parts))
        agreeing = [(np.sign(part) == np.sign(elected)) & (part != 0) for part in parts]

        def coefficients(rows):
            share = sum(abs(weights[row]) for row in rows) if join == "mean" else 1
            return [weights[row] / share for row in rows]

        return agreeing, coefficients, (np.abs(elected) <= FRAGILE * size) & (size > 0)

    def float64_residuals(self, name):
        base, *policies = (value.astype(np.float64) for value in self.values[name])
        return [policy - base for policy in policies]

    def thresholds(self, name, density, scope):
        """Return each policy's k-th largest magnitude, by a partition of the whole vector."""
        rows = [self.float64_residuals(other) for other in (SHAPES if scope == "model" else [name])]
        limits = []
        for parts in zip(*rows, strict=True):
            sizes = np.abs(np.concatenate(parts))
            kept = max(1, int(density * sizes.size))
            limits.append(np.partition(sizes, sizes.size - kept)[sizes.size - kept])
        return limits

    def kept(self, name, residuals, options):
        """Return the library's own random masks, from a digest of each policy's bytes."""
        from rewarded_lines.kernels.blocks import BLOCK

        count, result = residuals[0].size, []
        for codes in self.family.codes[1:]:
            digest = blake3.blake3(codes[name].tobytes()).digest()
            mask = partial(random_mask, options["seed"], name, digest, options["density"])
            starts = range(0, count, BLOCK)
            result.append(np.concatenate([mask(start, min(BLOCK, count - start)) for start in starts]))
        return result


RULES = {
    "slerp": Reference._slerp,
    "ties": Reference._ties,
    "dare": Reference._dare,
    "dare-ties": Reference._dare_ties,
    "consensus": Reference._consensus,
}

FACTORS = {
    "sum": Reference._sum,
    "ram": Reference._ram,
    "ram-plus": Reference._ram,
    "sce": Reference._sce,
    "della": Reference._della,
    "breadcrumbs": Reference._breadcrumbs,
}


def shares_of(weights: Sequence[np.longdouble]) -> list[np.longdouble]:
    """Return λ_i / max_j |λ_j|."""
    return [weight / max(map(abs, weights)) for weight in weights]


def changed_by(residuals: Sequence[np.ndarray], weights: Sequence[np.longdouble], changed: float) -> list[np.ndarray]:
    """Return where each policy of a weight changed its values."""
    return [(np.abs(row) > changed) & (weight != 0) for row, weight in zip(residuals, weights, strict=True)]


def compare(label: str, codes: np.ndarray, answer: Answer, kind: Format) -> Tally:
    """Compare a tensor with the exact values, rounded; say why where they differ."""
    codes = codes.ravel()
    expected = encode(answer.values, kind)
    # The sign of a zero that is exact is nobody's business.
    magnitude = (1 << (kind.bits - 1)) - 1
    differs = (codes != expected) & ~((answer.values == 0) & (codes & magnitude == 0))
    unit, got = ulp(answer.values, kind), decode(codes, kind)
    near = from_tie(answer.values, kind) <= unit * 2.0**-20
    # Off by no more than float64's own rounding of terms that are so large.
    slack = answer.terms * 2.0**-49
    lost = answer.terms > np.abs(answer.values) * CANCELLED
    with np.errstate(invalid="ignore"):
        # Overflow begins half a step beyond the largest number.
        limit = decode(np.array([kind.infinity - 1]), kind)[0]
        reached = np.where(np.isfinite(got), got, np.copysign(limit, got))
        excused = lost & (np.abs(reached - answer.values) <= ulp(reached, kind) / 2 + slack)
        neighbour = np.abs(got - answer.values) < unit
    tally = Tally(codes.size)
    for place in np.flatnonzero(differs):
        value = answer.values[place]
        if near[place] and (neighbour[place] or not np.isfinite(got[place])):
            tally.near_tie += 1
        elif excused[place]:
            tally.cancelled += 1
        elif answer.fragile[place]:
            tally.undecided += 1
        else:
            tally.wrong.append(f"{label}[{place}]: {codes[place]:#x} for {expected[place]:#x}, {value!r}")
    return tally
