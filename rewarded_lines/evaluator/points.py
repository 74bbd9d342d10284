"""The points of a sweep, and the hash that names a point's records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import blake3

from rewarded_lines.config import SFT
from rewarded_lines.engines.base import Model
from rewarded_lines.evaluator.weight_designs import Weights
from rewarded_lines.merger.schedule_forms import recorded_schedule
from rewarded_lines.merger.spec import MergeSpec


@dataclass(frozen=True)
class PointSpec:
    """A point of a sweep.

    Attributes:
        method: the curve that it belongs to, by its name in the run; `sft` for the SFT model.
        merge: weights and schedule; without weights for a model that is not merged. The method `MOD` merges nothing.
        checkpoint: the name of the policy (which has weights, too) or baseline evaluated as it is.
        edit: a single policy is edited, and the curve goes along α.
    """

    method: str
    merge: MergeSpec = MergeSpec((), 1.0, 0.0)
    checkpoint: str = ""
    edit: bool = False

    @property
    def weights(self) -> Weights:
        """The weights of the policies, or α where a single policy is edited."""
        return (self.merge.alpha,) if self.edit else self.merge.weights

    @property
    def lam(self) -> float | None:
        """The first policy's weight, λ; None for a model that is not merged."""
        return self.weights[0] if self.weights else None

    def __str__(self) -> str:
        """Return the point's name in messages, e.g. `lines λ=0.30,0.70`."""
        if self.checkpoint:
            return f"{self.method} {self.checkpoint}"
        return f"{self.method} λ={','.join(f'{w:g}' for w in self.weights)}" if self.weights else self.method

    def as_dict(self) -> dict[str, Any]:
        """Return the point for JSON."""
        merge = self.merge
        return {
            "method": self.method,
            "weights": list(self.weights),
            **merge.schedule.as_dict(),
            "merge": merge.method,
            "options": dict(merge.options),
            "checkpoint": self.checkpoint,
            "edit": self.edit,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PointSpec:
        """Return the point that `as_dict` described; a TypeError for unknown keys."""
        edit, weights = content.get("edit", False), tuple(content["weights"])
        merged = (1.0,) if edit else weights
        rule: Any = {"method": content["merge"], "options": dict(content["options"])}
        merge = MergeSpec(merged, **rule, **recorded_schedule(content, len(merged)))
        spec = cls(content["method"], merge, content.get("checkpoint", ""), edit)
        if unknown := content.keys() - spec.as_dict().keys():
            raise TypeError(f"a point has no {', '.join(sorted(unknown))}")
        return spec

    def model(self, checkpoints: Sequence[str]) -> Model:
        """Return the model to generate with; `checkpoints` are the plan's, in order."""
        if self.method == SFT:
            return None
        if self.checkpoint and not self.weights:
            index = checkpoints.index(self.checkpoint)
            return MergeSpec((0.0,) * index + (1.0,), 1.0, 0.0)
        return self.merge


def point_key(shared: Mapping[str, Any], spec: PointSpec, hashes: Mapping[str, str]) -> str:
    """Return the name of a point's records: the BLAKE3 hash, 16 hex digits, of all that determines them.

    That is the identity that all points of a run share, and of the point its merge or its checkpoint's hash. Two
    methods with the same merge share its records, since the method's name is not hashed.
    """
    if spec.method == SFT:
        identity: list[Any] = [SFT]
    elif not spec.weights:
        identity = ["checkpoint", hashes[spec.checkpoint]]
    else:
        merge = spec.merge
        identity = ["merge", merge.method, dict(merge.options), merge.alpha, merge.beta, merge.weights]
        # Points of runs that are older than other schedules keep their names.
        if merge.lines or merge.modules:
            identity.append(merge.schedule.as_dict())
    text = json.dumps({**shared, "point": identity}, sort_keys=True, ensure_ascii=False)
    return blake3.blake3(text.encode()).hexdigest(length=8)
