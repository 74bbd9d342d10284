"""Run folders with invented but realistic scores, written as a sweep writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.records import FORMAT, Point, point_path, write_point
from rewarded_lines.evaluator.weight_designs import LATTICE, SPREAD, Design
from rewarded_lines.folders import write_json
from rewarded_lines.merger.spec import MergeSpec

METHODS = {"soup": (1.0, 0.0), "lines": (1.0, 1.0)}
POLICIES = ("cheerful", "detailed", "kind", "plain", "honest", "brief", "safe", "formal")
UNITS = {"positive": "logit", "detailed": "words", "polite": "", "readable": "grade"}
UNITS |= {"truthful": "logit", "short": "words", "harmless": "logit", "in style": ""}


def _mean(spec: PointSpec, bulge: float, gain: float) -> np.ndarray:
    """Return mean scores that rise with each policy's weight, and bulge in between as real fronts do."""
    weights = np.array(spec.weights)
    scale = gain * (1 + 0.25 * spec.merge.beta) * spec.merge.alpha
    return scale * (weights + bulge * weights * (1 - weights)) - 0.1 * scale * (1 - weights)


def _point(spec: PointSpec, levels: np.ndarray, names: list[str], options: dict[str, float]) -> Point:
    """Return a point whose scores are its means plus the prompts' own levels and noise of the sampling."""
    prompts = len(levels)
    rng = np.random.default_rng([int(1000 * weight) for weight in spec.weights] + [abs(int(10 * spec.merge.beta))])
    shape = (prompts, len(names))
    mean = _mean(spec, options["bulge"], options["gain"]) if spec.weights else np.zeros(2)
    mean = np.resize(mean, len(names))
    units = np.array([0.4, 8.0, 1.0, 3.0, 2.0, 5.0, 0.7, 1.0])[: len(names)]
    base = np.array([0.1, 14.0, 0.0, 7.0, -1.0, -20.0, 2.0, 0.0])[: len(names)]
    levels = base + units * options["spread"] * levels[:, : len(names)]
    scores = levels + units * (2.0 * mean + 0.3 * options["spread"] * rng.normal(size=shape))
    words = np.clip(12 + 6 * mean[-1] + 3 * rng.normal(size=prompts), 1, 40).astype(int)
    return Point(
        spec=spec,
        prompts=[f"prompt {index}" for index in range(prompts)],
        responses=[" ".join(["word"] * count) for count in words],
        prompt_index=np.arange(prompts),
        seeds=np.arange(prompts),
        tokens=words + 1,
        ended=rng.random(prompts) < 0.9,
        kl=(rng.normal(4.0, 2.0, size=prompts) if spec.weights else np.zeros(prompts)),
        scores={name: scores[:, index] for index, name in enumerate(names)},
        control=_control(spec) if options["control"] else None,
    )


def _control(spec: PointSpec) -> np.ndarray:
    """Return what a point makes of 20 control texts of 10 tokens: the worse, the further it is from SFT."""
    strength = spec.merge.alpha + spec.merge.beta / 2 if spec.weights else 0.0
    loss = 3.0 + 0.2 * strength + 0.3 * np.random.default_rng(11).normal(size=20)
    return np.stack([10 * loss, np.full(20, 10.0)], axis=1)


def synthetic_run(
    folder: Path,
    *,
    rewards: int = 2,
    prompts: int = 256,
    points: int = 11,
    policies: int = 2,
    resamples: int | None = None,
    methods: dict[str, tuple[float, float]] | None = None,
    drop: int = 0,
    **options: float,
) -> Path:
    """Write a run and return its folder.

    Args:
        folder: where.
        rewards: 1 to 8.
        prompts: how many.
        points: λ of each method: on each edge of the simplex, or in all from five policies on.
        policies: 1 to 8.
        resamples: declared in `run.json`; not declared when None.
        methods: name → (alpha, beta).
        drop: this many last points are declared but not there.
        options: `spread` of the scores, `bulge` of the fronts, `gain` of the policies over SFT; `control`, whether
            there are control texts.
    """
    methods = METHODS if methods is None else methods
    options = {"spread": 1.0, "bulge": 0.6, "gain": 1.0, "control": 0.0} | options
    names = list(UNITS)[:rewards]
    specs = [PointSpec("sft")] + [
        PointSpec(name, MergeSpec(weights, alpha, beta))
        for name, (alpha, beta) in methods.items()
        for weights in Design(LATTICE if policies < 5 else SPREAD, policies).weights(points)
    ]
    keys = [f"{index:016x}" for index in range(len(specs))]
    header: dict[str, Any] = {
        "format": FORMAT,
        "title": "synthetic",
        "base": {"path": "sft"},
        "policies": {name: {"path": name} for name in POLICIES[:policies]},
        "baselines": {},
        "rewards": {name: {"unit": UNITS[name]} for name in names},
        "generation": {"temperature": 1.0, "top_p": 1.0, "max_tokens": 48, "seed": 0},
        "sweep": {} if resamples is None else {"resamples": resamples},
        "options": {"engine": "vllm", "layers": None},
        "identity": {"engine": {"as": "adapters"}},
        "points": [{**spec.as_dict(), "key": key} for spec, key in zip(specs, keys, strict=True)],
        "complete": drop == 0,
    }
    write_json(folder / "run.json", header)
    levels = np.random.default_rng(7).normal(size=(prompts, 3))
    more = [np.random.default_rng(seed).normal(size=(prompts, 1)) for seed in range(8, 13)]
    levels = np.concatenate([levels, *more], axis=1)
    for index, spec in enumerate(specs[: len(specs) - drop]):
        write_point(point_path(folder, keys[index]), _point(spec, levels, names, options))
    return folder
