"""The folder a recipe leaves behind: absent, or complete with a `training.json` that says how it was made."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.hashing import weights_hash
from rewarded_lines.errors import fail
from rewarded_lines.evaluation.records import write_json
from rewarded_lines.folders import atomic_folder

TRAINING_FILE = "training.json"
_PACKAGES = ("rewarded-lines", "torch", "transformers", "trl", "accelerate", "datasets")


class TrainingOutput:
    """A run of a recipe while it lasts: where it may write, and what it will record."""

    def __init__(self, folder: Path, final: Path, recipe: str) -> None:
        """Start the clock.

        Args:
            folder: where to write for now.
            final: the name that the folder takes when the run ends well.
            recipe: the recipe's name.
        """
        self.folder = folder
        self._final = final
        self._recipe = recipe
        self._started = time.monotonic()

    def record(
        self,
        configs: Mapping[str, Any],
        metrics: Mapping[str, Any],
        base: str | None = None,
        **facts: Any,
    ) -> None:
        """Write `training.json`.

        Args:
            configs: the recipe's resolved dataclasses by name.
            metrics: what was measured.
            base: the model that training started from, if any; its weights are hashed when it is a folder.
            **facts: anything else that tells how the model came about, such as the reward's name.
        """
        # The trainer's own record is a pickle, which nobody should have to trust; this one is text.
        (self.folder / "training_args.bin").unlink(missing_ok=True)
        local = base is not None and Path(base).is_dir()
        content = {
            "recipe": self._recipe,
            "base": base,
            "base_hash": weights_hash(Path(base)) if base is not None and local else None,
            **facts,
            "metrics": dict(metrics),
            "seconds": round(time.monotonic() - self._started, 1),
            "versions": {name: _version(name) for name in _PACKAGES},
            "config": {name: self._as_dict(config) for name, config in configs.items()},
        }
        write_json(self.folder / TRAINING_FILE, content)

    def _as_dict(self, config: Any) -> dict[str, Any]:
        content = config.to_dict() if hasattr(config, "to_dict") else dataclasses.asdict(config)
        if "output_dir" in content:
            content["output_dir"] = str(self._final)
        return {key: value for key, value in content.items() if not key.startswith("_")}


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer as it was before training.

    Batches leave their padding and truncation behind in a fast tokenizer, and would be saved with it; a policy's
    tokenizer has to be the SFT model's, byte for byte.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()
    tokenizer.save_pretrained(folder)


@contextmanager
def training_output(training: Any, recipe: str, overwrite: bool) -> Iterator[TrainingOutput]:
    """Train into a temporary folder that takes the name `training.output_dir` when the block ends well.

    Meanwhile `training.output_dir` is that temporary folder. With several processes the first one owns the
    output.

    Args:
        training: the trainer's configuration (a `TrainingArguments`).
        recipe: the recipe's name, for the record.
        overwrite: replace an output folder that exists.

    Raises:
        UserError: the output folder is not named, or exists and is not to be replaced.
    """
    final = check_output(training.output_dir, overwrite)
    with _folder(final, overwrite) as folder:
        training.output_dir = str(folder)
        try:
            yield TrainingOutput(folder, final, recipe)
        finally:
            training.output_dir = str(final)


def check_output(output_dir: str | None, overwrite: bool) -> Path:
    """Return where the model shall go.

    Raises:
        UserError: see `training_output`; called early by recipes, so that nothing is loaded in vain.
    """
    if not output_dir:
        raise fail("`output_dir` is missing", remedy="set it in the config, or pass --output_dir FOLDER")
    if Path(output_dir).exists() and not overwrite:
        raise fail(
            "the output folder exists",
            where=output_dir,
            remedy="pass --overwrite true to replace it, or another --output_dir",
        )
    return Path(output_dir)


@contextmanager
def _folder(final: Path, overwrite: bool) -> Iterator[Path]:
    if os.environ.get("RANK", "0") == "0":
        with atomic_folder(final, overwrite) as folder:
            yield folder
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
