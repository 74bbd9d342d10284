"""What a merged folder says of itself to programs: `merge.json`, with the hash of every input file."""

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


def title(reference: str, folder: Path) -> str:
    """Return what people call an input: its Hub id, or the name of its folder."""
    return folder.resolve().name if not reference or looks_local(reference) else reference


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
