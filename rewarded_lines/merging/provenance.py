"""What a merged folder says of itself: `merge.json` for programs, a model card for people."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from rewarded_lines import __version__
from rewarded_lines.checkpoints.adapters import Adapter, BareBase
from rewarded_lines.checkpoints.hashing import file_hash
from rewarded_lines.checkpoints.reader import Checkpoint
from rewarded_lines.planning.adapters import AdapterPlan
from rewarded_lines.planning.plan import MergePlan, MergeSpec
from rewarded_lines.streaming.pool import share_out

Record = dict[str, Any]
Plan = MergePlan | AdapterPlan

_CARD = """---
library_name: {library}
tags: [{tags}]
---
# {title}

A merge of policies aligned with different rewards, made by
[rewarded-lines](https://pypi.org/project/rewarded-lines/) {version}:

    θ = θ_base + s(ℓ) · m(τ_1 … τ_N; λ),   τ_i = θ_i − θ_base,   s(ℓ) = α + β (ℓ − 1)/(L − 1)

| | |
|---|---|
| base | `{base}` |
{policies}
| method m | {method} |
| α, β | {alpha:g}, {beta:g} |
| blocks L | {blocks} |

{use}

`merge.json` has the hash of every input file; `rewarded-lines merge --from merge.json` makes the same bits again.
Methods: LiNeS (arXiv 2410.17146), Rewarded Soups (arXiv 2306.04488).
"""
_USE_MODEL = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```"""
_USE_ADAPTER = """A LoRA adapter of rank {rank}: the policies' adapters stacked, exactly their weighted sum.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "this folder")
```

In vLLM: `LLM("{base}", enable_lora=True, max_lora_rank=N)`, N one of its ranks and at least {rank}, with a
`LoRARequest` for this folder."""


def hash_inputs(plan: Plan) -> Record:
    """Return folder and BLAKE3 hash of every weight file, for the base and for each policy by name."""
    sources = [plan.base, *plan.policies.values()]
    # What is hashed is remembered, so this fills the shelf and the lines below take from it.
    share_out([file for source in sources for file in source.files], lambda: _hash)
    return {"base": _hashed(plan.base), "policies": {name: _hashed(policy) for name, policy in plan.policies.items()}}


def describe(plan: Plan, spec: MergeSpec, inputs: Record, settings: Mapping[str, Any]) -> Record:
    """Return the content of `merge.json`: enough to make the same bytes again.

    Args:
        plan: the inputs.
        spec: the numbers.
        inputs: what `hash_inputs` returned.
        settings: what else decides the bytes (dtype, shard size, --layers), and the command.
    """
    return {
        "method": spec.method,
        "options": dict(spec.options),
        "weights": dict(zip(plan.policies, spec.weights, strict=True)),
        "alpha": spec.alpha,
        "beta": spec.beta,
        "outside": spec.outside,
        "scales": plan.scales(spec),
        **settings,
        "notes": plan.notes,
        **inputs,
        "versions": {
            "rewarded-lines": __version__,
            **{package: version(package) for package in ("numpy", "numba", "safetensors")},
        },
    }


def model_card(plan: Plan, spec: MergeSpec) -> str:
    """Return the README.md of a merged folder."""
    rows = [
        f"| {name}, λ = {weight:g} | `{policy.folder.name}` |"
        for (name, policy), weight in zip(plan.policies.items(), spec.weights, strict=True)
    ]
    method = ", ".join([spec.method, *(f"{name} {value}" for name, value in spec.options.items())])
    kind = {"soup": "Rewarded Soups" if spec.beta == 0 else "LiNeS"}.get(spec.method, spec.method)
    adapter = isinstance(plan, AdapterPlan)
    return _CARD.format(
        library="peft" if adapter else "transformers",
        tags="merge, rewarded-soups, lines, rewarded-lines" + (", lora" if adapter else ""),
        use=_use_adapter(plan, spec) if isinstance(plan, AdapterPlan) else _USE_MODEL,
        title=f"{kind} of {', '.join(plan.policies)}",
        version=__version__,
        base=plan.base.folder.name,
        policies="\n".join(rows),
        method=method,
        alpha=spec.alpha,
        beta=spec.beta,
        blocks=", ".join(f"{blocks} ({stack})" for stack, blocks in plan.depths.stacks.items()),
    )


def _use_adapter(plan: AdapterPlan, spec: MergeSpec) -> str:
    ranks = [stack.rank for stack in plan.output(spec).stacks.values()]
    return _USE_ADAPTER.format(rank=max(ranks, default=0), base=plan.base.folder.name)


def _hash(file: Any) -> None:
    file_hash(file)


def _hashed(checkpoint: Checkpoint | BareBase | Adapter) -> Record:
    return {
        "path": str(checkpoint.folder.resolve()),
        "files": {file.name: file_hash(file) for file in checkpoint.files},
    }
