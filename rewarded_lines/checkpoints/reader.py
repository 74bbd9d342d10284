"""Checkpoints as they lie on disk: names, shapes, types and values of tensors. Read only, nothing is unpickled."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rewarded_lines.checkpoints.headers import TensorInfo, damaged, parse_json, read_exactly, read_header
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.references import looks_local

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CONVERT = "python -c \"from {load} as M; M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
_LARGEST_JSON = 64_000_000


class TensorFiles:
    """Safetensors files opened for reading, with the headers of all of them read and checked."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Read every header.

        Raises:
            UserError: with everything that is wrong with the files, all at once.
        """
        self.files = list(files)
        self.tensors: dict[str, TensorInfo] = {}
        problems: list[Problem] = []
        for file in self.files:
            try:
                self._add(read_header(file))
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)
        self._descriptors = {file: os.open(file, os.O_RDONLY) for file in self.files}
        weakref.finalize(self, _close, list(self._descriptors.values()))

    def read(self, name: str, start: int = 0, count: int | None = None) -> np.ndarray[Any, Any]:
        """Return `count` values of a tensor from the `start`-th on, flat, in their storage type; all by default."""
        info = self.tensors[name]
        values = np.empty(info.elements - start if count is None else count, info.dtype.storage)
        self.read_into(name, start, values)
        return values

    def read_into(self, name: str, start: int, values: np.ndarray[Any, Any]) -> None:
        """Fill `values`, a flat array of the tensor's storage type, from its `start`-th value on."""
        info = self.tensors[name]
        assert values.dtype == info.dtype.storage and start + values.size <= info.elements, name
        if not values.size:
            return
        view = values.view(np.uint8).data
        try:
            read_exactly(self._descriptors[info.file], view, info.start + start * info.dtype.itemsize)
        except EOFError as error:
            raise damaged(info.file, f"{error}: it changed while it was read") from error

    def header_bytes(self, file: Path) -> bytes:
        """Return what stands before the tensors in one of the files."""
        length = int.from_bytes(os.pread(self._descriptors[file], 8, 0), "little")
        return os.pread(self._descriptors[file], 8 + length, 0)

    def _add(self, entries: list[TensorInfo]) -> None:
        for info in entries:
            if info.name in self.tensors:
                raise damaged(info.file, f"tensor {info.name[:80]!r} is also in {self.tensors[info.name].file.name}")
            self.tensors[info.name] = info


class Checkpoint(TensorFiles):
    """A model folder opened for reading."""

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
        index = folder / INDEX_FILE
        # Where both are there, transformers loads the single file.
        weight_map = _indexed(index) if index.is_file() and not (folder / SINGLE_FILE).is_file() else None
        files = _weight_files(folder, weight_map)
        self.config = read_config(folder)
        super().__init__(files)
        if weight_map is not None:
            _check_index(index, weight_map, self.tensors)


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def resolve_folder(reference: str, weights: bool = True, revision: str | None = None) -> Path:
    """Return the folder of a model: a local one, or a Hub id `organisation/name` fetched into the Hub's cache.

    Args:
        reference: the folder or the id.
        weights: fetch the weights too; otherwise what lies beside them.
        revision: branch, tag or commit of a Hub id; its main branch by default.

    Raises:
        UserError: neither of the two exists.
    """
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return folder
    if looks_local(reference):
        what = "is a file" if folder.exists() else "no such folder"
        raise fail(
            what,
            where=str(folder),
            expected=f"a model folder with config.json and {SINGLE_FILE}",
            remedy="give the folder of a checkpoint, or a Hub id organisation/name",
        )
    return _from_hub(reference, weights, revision)


def open_checkpoint(reference: str, name: str = "") -> Checkpoint:
    """Open a folder, or fetch a Hub id `organisation/name` into the Hub's cache and open that.

    Raises:
        UserError: neither of the two exists, or the checkpoint is not whole.
    """
    return Checkpoint(resolve_folder(reference), name or reference)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a model folder's config.json.

    Raises:
        UserError: it is not there, or is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise fail("no config.json there", where=str(folder), expected="a Hugging Face model folder")
    config = read_json_object(path)
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "") if isinstance(quantization, dict) else ""
        raise fail(
            f"the model is quantized{f' ({str(method)[:40]})' if method else ''}",
            where=str(path),
            expected="float64, float32, bfloat16 or float16 weights",
            remedy="quantized values cannot be interpolated: merge the unquantized checkpoints, quantize the result",
        )
    return config


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file.

    Raises:
        UserError: the file holds no JSON object, or is larger than any model's.
    """
    try:
        # Reading a pipe may never end.
        if not path.is_file():
            raise damaged(path, "not a file")
        if path.stat().st_size > _LARGEST_JSON:
            raise damaged(path, "more JSON than any model's")
        content = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise damaged(path, str(error)[:200]) from error
    if not isinstance(content, dict):
        raise damaged(path, "not a JSON object")
    return content


def total_bytes(tensors: Iterable[TensorInfo]) -> int:
    """Return how many bytes the tensors take on disk."""
    return sum(info.bytes for info in tensors)


def _from_hub(reference: str, weights: bool, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    # The card, because it has the licence.
    patterns = [*(["*.safetensors"] if weights else []), "*.json", "*.jinja", "*.model", "*.txt", "README.md"]
    try:
        return Path(snapshot_download(reference, revision=revision, allow_patterns=patterns))
    except Exception as error:  # noqa: BLE001 - networks fail in the ways of four libraries, none of them ours
        raise fail(
            "neither a folder here nor a model that the Hub gives us",
            where=reference,
            got=(str(error).strip() or type(error).__name__).splitlines()[0],
            remedy="check the spelling, log in with `hf auth login`, or download it and give the folder",
        ) from error


def _weight_files(folder: Path, weight_map: Mapping[str, str] | None) -> list[Path]:
    if weight_map is not None:
        files = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise fail(
                "shards are missing",
                where=str(folder),
                expected=f"every file of {INDEX_FILE}",
                got="no " + ", ".join(missing[:5]),
                remedy="copy or download the checkpoint again",
            )
        return files
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    refuse_pickles(folder, SINGLE_FILE)
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:5])
    raise fail("no weights there", where=str(folder), expected=SINGLE_FILE, got=found or "an empty folder")


def refuse_pickles(folder: Path, expected: str, load: str = "transformers import AutoModelForCausalLM") -> None:
    """Refuse a folder whose weights are pickled.

    Args:
        folder: of a model or adapter.
        expected: the file of weights that is looked for.
        load: what the command that converts them imports.

    Raises:
        UserError: naming the files, and that command.
    """
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise fail(
            "pickled weights are never opened: loading a pickle runs code from it",
            where=str(folder),
            expected=expected,
            got=", ".join(pickled[:3]),
            remedy="if you trust the file, convert it: " + _CONVERT.format(load=load, folder=folder),
        )


def _indexed(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(index, "it has no weight_map")
    for name in set(map(str, weight_map.values())):
        _check_entry(index, name)
    return weight_map


def _check_entry(index: Path, name: str) -> None:
    """Refuse an index that names files outside the checkpoint's own folder."""
    folder = index.parent
    plain = Path(name).name == name and name not in ("", ".", "..") and len(name) < 256
    if plain and name.isprintable() and name.endswith(".safetensors"):
        # Not Path.resolve, which raises another error on circular links.
        here = Path(os.path.realpath(folder))
        # The Hub's cache keeps the files of a snapshot as links into its own `blobs`.
        allowed = [here, here.parent.parent / "blobs"] if here.parent.name == "snapshots" else [here]
        if Path(os.path.realpath(folder / name)).parent in allowed:
            return
    raise fail(
        "the index names a file that is not in the checkpoint's folder",
        where=str(index),
        expected="names of *.safetensors files beside the index",
        got=repr(name[:120]),
        remedy="copy the files into the folder; if you did not make this checkpoint, do not trust it",
    )


def _check_index(index: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    wrong = [name for name, info in tensors.items() if weight_map.get(name) != info.file.name]
    wrong += [name for name in weight_map if name not in tensors]
    if wrong:
        raise damaged(index, f"it does not fit its files: {', '.join(name[:80] for name in wrong[:3])}")
