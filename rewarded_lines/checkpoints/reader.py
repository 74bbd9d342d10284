"""Checkpoints as they lie on disk: names, shapes, dtypes and lazily mapped tensors. Read only, nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rewarded_lines.config import looks_local
from rewarded_lines.errors import Problem, UserError, fail

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CONVERT = (
    'python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
)
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """What the header of a safetensors file says of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path


class Checkpoint:
    """A model folder opened for reading; tensors are mapped when asked for and stay in the page cache's care."""

    def __init__(self, folder: Path, name: str = "") -> None:
        """Open every weight file of `folder` and read its headers.

        Args:
            folder: holds config.json and model*.safetensors.
            name: how messages call this checkpoint, e.g. the policy's name; the folder by default.

        Raises:
            UserError: with everything that is wrong with the folder, all at once.
        """
        self.folder = folder
        self.name = name or str(folder)
        self.files = _weight_files(folder)
        self.config = _read_config(folder)
        self._handles: dict[Path, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        problems: list[Problem] = []
        for file in self.files:
            try:
                self._open(file)
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, mapped from its file."""
        tensor: torch.Tensor = self._handles[self.tensors[name].file].get_tensor(name)
        return tensor

    def _open(self, file: Path) -> None:
        try:
            handle: Any = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise _damaged(file, str(error)) from error
        self._handles[file] = handle
        for name in handle.offset_keys():
            piece = handle.get_slice(name)
            kind = piece.get_dtype()
            if kind not in DTYPES:
                raise fail(
                    f"tensor {name} is of type {kind}",
                    where=str(file),
                    expected="float32, bfloat16 or float16 weights",
                    remedy="merge the unquantized checkpoints and quantize the result",
                )
            self.tensors[name] = TensorInfo(name, DTYPES[kind], tuple(piece.get_shape()), file)


def open_checkpoint(reference: str, name: str = "") -> Checkpoint:
    """Open a folder, or fetch a Hub id `organisation/name` into the Hub's cache and open that.

    Raises:
        UserError: neither of the two exists, or the checkpoint is not whole.
    """
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return Checkpoint(folder, name)
    if looks_local(reference):
        what = "is a file" if folder.exists() else "no such folder"
        raise fail(
            what,
            where=str(folder),
            expected=f"a model folder with config.json and {SINGLE_FILE}",
            remedy="give the folder of a checkpoint, or a Hub id organisation/name",
        )
    return Checkpoint(_from_hub(reference), name or reference)


def open_all(references: Mapping[str, str]) -> dict[str, Checkpoint]:
    """Open several checkpoints by name.

    Raises:
        UserError: with the problems of all of them together.
    """
    opened: dict[str, Checkpoint] = {}
    problems: list[Problem] = []
    for name, reference in references.items():
        try:
            opened[name] = open_checkpoint(reference, name)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return opened


def _from_hub(reference: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(reference, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise fail(
            "neither a folder here nor a model that the Hub gives us",
            where=reference,
            got=str(error).splitlines()[0],
            remedy="check the spelling, log in with `hf auth login`, or download it and give the folder",
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if index.is_file():
        files = [folder / name for name in dict.fromkeys(_indexed(index).values())]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise fail(
                "shards are missing",
                where=str(folder),
                expected=f"every file of {INDEX_FILE}",
                got="no " + ", ".join(missing),
                remedy="copy or download the checkpoint again",
            )
        return sorted(files)
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise fail(
            "pickled weights are never opened: loading a pickle runs code from it",
            where=str(folder),
            expected=SINGLE_FILE,
            got=", ".join(pickled[:3]),
            remedy="if you trust the file, convert it: " + _CONVERT.format(folder=folder),
        )
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:5])
    raise fail("no weights there", where=str(folder), expected=SINGLE_FILE, got=found or "an empty folder")


def _indexed(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(index, f"{type(error).__name__}: {error}") from error
    if not isinstance(weight_map, dict):
        raise _damaged(index, f"its weight_map is a {type(weight_map).__name__}")
    return weight_map


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise fail("no config.json there", where=str(folder), expected="a Hugging Face model folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, "not a JSON object")
    return content


def _damaged(file: Path, reason: str) -> UserError:
    return fail(
        "the file is damaged or cut short",
        where=str(file),
        got=f"{reason} ({file.stat().st_size} bytes)",
        remedy="copy or download it again",
    )


def total_bytes(tensors: Iterable[TensorInfo]) -> int:
    """Return how many bytes the tensors take on disk."""
    return sum(torch.Size(info.shape).numel() * info.dtype.itemsize for info in tensors)
