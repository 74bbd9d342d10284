"""What a merged folder says of itself: `merge.json` for programs, a model card for people."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rewarded_lines import __version__
from rewarded_lines.checkpoints.hashing import file_hash
from rewarded_lines.checkpoints.reader import Checkpoint
from rewarded_lines.merging.plan import MergePlan, MergeSpec

_CARD = """---
library_name: transformers
tags: [merge, rewarded-soups, lines, rewarded-lines]
---
# {title}

A merge of policies aligned with different rewards, made by
[rewarded-lines](https://pypi.org/project/rewarded-lines/) {version}:

    θ = θ_base + s(ℓ) · Σ λ_i (θ_i − θ_base),   s(ℓ) = α + β (ℓ − 1)/(L − 1)

| | |
|---|---|
| base | `{base}` |
{policies}
| α, β | {alpha:g}, {beta:g} |
| blocks L | {blocks} |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```

`merge.json` has the hash of every input file. Methods: LiNeS (arXiv 2410.17146), Rewarded Soups (arXiv 2306.04488).
"""


def hash_inputs(plan: MergePlan) -> dict[str, Any]:
    """Return folder and BLAKE3 hash of every weight file, for the base and for each policy by name."""
    return {
        "base": _hashed(plan.base),
        "policies": {name: _hashed(policy) for name, policy in plan.policies.items()},
    }


def describe(plan: MergePlan, spec: MergeSpec, inputs: dict[str, Any], command: Sequence[str]) -> dict[str, Any]:
    """Return the content of `merge.json`: enough to make the same bytes again."""
    return {
        "method": spec.method,
        "weights": dict(zip(plan.policies, spec.weights, strict=True)),
        "alpha": spec.alpha,
        "beta": spec.beta,
        "blocks": plan.depths.blocks,
        "scales": plan.scales(spec),
        "dtype": plan.widest_dtype(),
        **inputs,
        "versions": {
            "rewarded-lines": __version__,
            **{package: version(package) for package in ("torch", "safetensors")},
        },
        "command": [Path(command[0]).name, *command[1:]],
    }


def model_card(plan: MergePlan, spec: MergeSpec) -> str:
    """Return the README.md of a merged folder."""
    rows = [
        f"| {name}, λ = {weight:g} | `{policy.folder.name}` |"
        for (name, policy), weight in zip(plan.policies.items(), spec.weights, strict=True)
    ]
    kind = "Rewarded Soups" if spec.beta == 0 else "LiNeS"
    return _CARD.format(
        title=f"{kind} of {', '.join(plan.policies)}",
        version=__version__,
        base=plan.base.folder.name,
        policies="\n".join(rows),
        alpha=spec.alpha,
        beta=spec.beta,
        blocks=plan.depths.blocks,
    )


def _hashed(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "path": str(checkpoint.folder),
        "files": {file.name: file_hash(file) for file in checkpoint.files},
    }
