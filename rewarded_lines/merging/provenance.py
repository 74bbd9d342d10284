"""What a merged folder says of itself to programs: `merge.json`, with the hash of every input file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rewarded_lines import __version__
from rewarded_lines.checkpoints.hashing import file_hash
from rewarded_lines.planning.plan import Plan
from rewarded_lines.references import looks_local
from rewarded_lines.rules.spec import MergeSpec
from rewarded_lines.streaming.pool import share_out

RECORD_FILE = "merge.json"
Record = dict[str, Any]


def hash_inputs(plan: Plan) -> Record:
    """Return place and BLAKE3 hash of every input file, for the base and for each policy by name."""
    base, policies = plan.input_files()
    # `file_hash` remembers what it hashed: several files are hashed at a time here, and looked up below.
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
        **spec.as_dict(list(plan.policies)),
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


def _hashed(files: Iterable[Path]) -> dict[str, str]:
    return {file.name: file_hash(file) for file in files}


def _place(reference: str, folder: Path) -> str:
    """Return where an input is found again: its Hub id, or its folder."""
    return str(folder.resolve()) if not reference or looks_local(reference) else reference
