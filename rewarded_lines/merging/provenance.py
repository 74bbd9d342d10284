"""What a merged folder says of itself: `merge.json` for programs, a model card for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rewarded_lines import __version__
from rewarded_lines.checkpoints.adapter_config import ADAPTER_CONFIG
from rewarded_lines.checkpoints.adapters import Adapter, BareBase
from rewarded_lines.checkpoints.hashing import file_hash
from rewarded_lines.checkpoints.reader import INDEX_FILE, Checkpoint
from rewarded_lines.planning.adapters import AdapterPlan
from rewarded_lines.planning.plan import MergePlan, MergeSpec
from rewarded_lines.references import looks_local
from rewarded_lines.streaming.pool import share_out

RECORD_FILE = "merge.json"
# What a checkpoint has beside weights and config; everything else in the base's folder stays there.
_COMPANIONS = (
    "generation_config.json",
    "*processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.model",
)

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


def input_files(plan: Plan) -> tuple[list[Path], dict[str, list[Path]]]:
    """Return every file that decides the output: of the base, and of each policy by name.

    Of a base whose weights an adapter's merge does not read, that is the config.
    """
    bare = isinstance(plan, AdapterPlan) and not plan.whole.names
    folder = plan.base.folder
    base = [folder / "config.json"] if bare else [*_model_files(plan.base), *companions(folder)]
    return base, {name: _model_files(policy) for name, policy in plan.policies.items()}


def companions(folder: Path) -> list[Path]:
    """Return what a checkpoint has beside weights and config that its merge takes along."""
    return sorted({path for pattern in _COMPANIONS for path in folder.glob(pattern) if path.is_file()})


def hash_inputs(plan: Plan) -> Record:
    """Return place and BLAKE3 hash of every input file, for the base and for each policy by name."""
    base, policies = input_files(plan)
    # What is hashed is remembered, so this fills the shelf and the lines below take from it.
    share_out([*base, *(file for files in policies.values() for file in files)], lambda: _hash)
    return {
        "base": {"path": _place(plan.reference, plan.base.folder), "files": _hashed(base)},
        "policies": {
            name: {"path": _place(plan.references.get(name, ""), plan.policies[name].folder), "files": _hashed(files)}
            for name, files in policies.items()
        },
    }


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
    titles = {name: _title(plan.references.get(name, ""), policy.folder) for name, policy in plan.policies.items()}
    rows = [
        f"| {name}, λ = {weight:g} | `{title}` |"
        for (name, title), weight in zip(titles.items(), spec.weights, strict=True)
    ]
    method = ", ".join([spec.method, *(f"{name} {value}" for name, value in spec.options.items())])
    kind = {"soup": "Rewarded Soups" if (spec.alpha, spec.beta) == (1, 0) else "LiNeS"}.get(spec.method, spec.method)
    adapter = isinstance(plan, AdapterPlan)
    return _CARD.format(
        library="peft" if adapter else "transformers",
        tags="merge, rewarded-soups, lines, rewarded-lines" + (", lora" if adapter else ""),
        use=_use_adapter(plan, spec) if isinstance(plan, AdapterPlan) else _USE_MODEL,
        title=f"{kind} of {', '.join(plan.policies)}",
        version=__version__,
        base=_title(plan.reference, plan.base.folder),
        policies="\n".join(rows),
        method=method,
        alpha=spec.alpha,
        beta=spec.beta,
        blocks=", ".join(f"{blocks} ({stack})" for stack, blocks in plan.depths.stacks.items()),
    )


def _use_adapter(plan: AdapterPlan, spec: MergeSpec) -> str:
    ranks = [stack.rank for stack in plan.output(spec).stacks.values()]
    return _USE_ADAPTER.format(rank=max(ranks, default=0), base=_title(plan.reference, plan.base.folder))


def _hash(file: Any) -> None:
    file_hash(file)


def _model_files(source: Checkpoint | BareBase | Adapter) -> list[Path]:
    """Return weights, settings and index of a model or adapter."""
    names = (ADAPTER_CONFIG,) if isinstance(source, Adapter) else ("config.json", INDEX_FILE)
    beside = [source.folder / name for name in names]
    return list(dict.fromkeys([*source.files, *(path for path in beside if path.is_file())]))


def _hashed(files: Iterable[Path]) -> dict[str, str]:
    return {file.name: file_hash(file) for file in files}


def _place(reference: str, folder: Path) -> str:
    """Return where an input is found again: its Hub id, or its folder."""
    return str(folder.resolve()) if not reference or looks_local(reference) else reference


def _title(reference: str, folder: Path) -> str:
    """Return what people call an input: its Hub id, or the name of its folder."""
    return folder.resolve().name if not reference or looks_local(reference) else reference
