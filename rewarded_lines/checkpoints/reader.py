"""Checkpoints on disk: names, shapes, types and values of tensors. Read only; nothing is unpickled."""

from __future__ import annotations

import math
import os
import re
import sys
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from rewarded_lines.checkpoints.headers import TensorInfo, damaged, named_quantized, parse_json, read_header
from rewarded_lines.checkpoints.missing_weights import for_inference, no_weights
from rewarded_lines.checkpoints.tensor_names import never_loaded
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.references import looks_local

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_LARGEST_JSON = 64_000_000
_KEPT_MATRICES = 4
_NUMBER = re.compile(r"\.[0-9]+\.")


class TensorFiles:
    """Safetensors files opened for reading; all headers are read and checked."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Read every header; raise one `UserError` with the problems of all files."""
        self.files = list(files)
        self.tensors: dict[str, TensorInfo] = {}
        problems: list[Problem] = []
        for file in self.files:
            try:
                for info in read_header(file):
                    if info.name in self.tensors:
                        other = self.tensors[info.name].file.name
                        raise damaged(file, f"tensor {info.name[:80]!r} is also in {other}")
                    self.tensors[info.name] = info
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)
        self._descriptors = {file: os.open(file, os.O_RDONLY) for file in self.files}
        self._matrices: dict[tuple[TensorInfo, int], np.ndarray[Any, Any]] = {}
        self._lock = Lock()
        self._lenders: list[TensorFiles] = []
        weakref.finalize(self, _close, list(self._descriptors.values()))

    def read(self, name: str, start: int = 0, count: int | None = None) -> np.ndarray[Any, Any]:
        """Return values of a tensor from the `start`-th on, flat, in their storage type; `count` None: all."""
        info = self.tensors[name]
        values = np.empty(info.elements - start if count is None else count, info.dtype.storage)
        self.read_into(name, start, values)
        return values

    def read_into(self, name: str, start: int, values: np.ndarray[Any, Any]) -> None:
        """Fill `values`, a flat array of the storage type, with a tensor from its `start`-th value on."""
        info = self.tensors[name]
        assert values.dtype == info.dtype.storage and start + values.size <= info.elements, name
        fill = self._fill_transposed if info.transposed else self._fill
        for piece in info.pieces or (info,):
            count = max(0, min(values.size, piece.elements - start))
            fill(piece, start, values[:count])
            start, values = max(0, start - piece.elements), values[count:]

    def run(self, name: str) -> tuple[int, int] | None:
        """Return a descriptor of a tensor's file and the place of its first byte; None if it is stored in parts."""
        info = self.tensors.get(name)
        whole = info and not info.pieces and not info.transposed
        return (self._descriptors[info.file], info.start) if info and whole else None

    def _fill(self, info: TensorInfo, start: int, values: np.ndarray[Any, Any]) -> None:
        view, place = values.view(np.uint8).data, info.start + start * info.dtype.itemsize
        while len(view):
            count = os.preadv(self._descriptors[info.file], [view], place)
            if count == 0:
                raise damaged(info.file, f"no bytes at {place}: it changed while it was read")
            view, place = view[count:], place + count

    def _fill_transposed(self, info: TensorInfo, start: int, values: np.ndarray[Any, Any]) -> None:
        size, done = math.prod(info.shape[-2:]), 0
        while done < values.size:
            number, inside = divmod(start + done, size)
            count = min(size - inside, values.size - done)
            values[done : done + count] = self._matrix(info, number)[inside : inside + count]
            done += count

    def _matrix(self, info: TensorInfo, number: int) -> np.ndarray[Any, Any]:
        """Return a matrix of a transposed tensor, flat; the last few are kept, since each has many blocks."""
        with self._lock:
            if (kept := self._matrices.get((info, number))) is not None:
                return kept
            rows, columns = info.shape[-2:]
            stored = np.empty(rows * columns, info.dtype.storage)
            self._fill(info, number * stored.size, stored)
            while len(self._matrices) >= _KEPT_MATRICES:
                del self._matrices[next(iter(self._matrices))]
            self._matrices[info, number] = stored.reshape(columns, rows).T.flatten()
            return self._matrices[info, number]

    def borrow(self, source: TensorFiles, tensors: Mapping[str, TensorInfo]) -> None:
        """Take tensors of other files for one's own, by the name that they get here."""
        self.tensors |= {key: info if info.name == key else replace(info, name=key) for key, info in tensors.items()}
        self._descriptors |= source._descriptors
        # The other object closes its files when it is collected.
        self._lenders.append(source)

    def descriptor(self, file: Path) -> int:
        """Return the descriptor by which one of the files is read: another file may have its name meanwhile."""
        return self._descriptors[file]

    def header_bytes(self, file: Path) -> bytes:
        """Return the bytes before the tensors in one of the files."""
        length = int.from_bytes(os.pread(self._descriptors[file], 8, 0), "little")
        return os.pread(self._descriptors[file], 8 + length, 0)


class Checkpoint(TensorFiles):
    """A model folder opened for reading.

    Attributes:
        absent: tensors that the index lists and no file has, and that the model does not need.
    """

    def __init__(self, folder: Path, name: str = "") -> None:
        """Open every weight file of `folder`; messages call the checkpoint `name`, by default the folder."""
        self.folder = folder
        self.name = name or str(folder)
        index = folder / INDEX_FILE
        # If the folder has both, transformers loads the single file.
        weight_map = _indexed(index) if index.is_file() and not (folder / SINGLE_FILE).is_file() else None
        files = _weight_files(folder, weight_map)
        self.config = read_config(folder, files)
        super().__init__(files)
        self.absent = _absent(index, weight_map, self.tensors, self.config) if weight_map is not None else []

    def hold(self, base: Checkpoint, names: Iterable[str]) -> None:
        """Hold some of the base's tensors, which this checkpoint has not, so that their residual is zero."""
        self.borrow(base, {name: base.tensors[name] for name in names})


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def resolve_folder(reference: str, weights: bool = True, revision: str | None = None) -> Path:
    """Return the folder of a model: a local one, or a Hub id `organisation/name` fetched into the Hub's cache.

    Args:
        reference: the folder or the id.
        weights: fetch the weights, too, not only the files beside them.
        revision: branch, tag or commit of a Hub id; by default the main branch.
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
            remedy=for_inference([folder]) or "give the folder of a checkpoint, or a Hub id organisation/name",
        )
    return _from_hub(reference, weights, revision)


def open_checkpoint(reference: str, name: str = "") -> Checkpoint:
    """Open a folder, or a Hub id after fetching it into the Hub's cache."""
    return Checkpoint(resolve_folder(reference), name or reference)


def read_config(folder: Path, files: Iterable[Path] = ()) -> dict[str, Any]:
    """Return the content of a model folder's config.json; refuse a quantized model. `files` have its weights."""
    path = folder / "config.json"
    if not path.is_file():
        raise fail("no config.json there", where=str(folder), expected="a Hugging Face model folder")
    config = read_json_object(path)
    if quantization := config.get("quantization_config"):
        raise named_quantized(quantization, path, files)
    return config


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file; refuse other content, and a file larger than any model's."""
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
    # README.md has the licence. Code is copied beside the merge, never run.
    texts = ["*.json", "*.jinja", "*.model", "*.txt", "*.spm", "*.tiktoken", "*.codes", "*.py", "README.md"]
    patterns = [*(["*.safetensors"] if weights else []), *texts]
    # The same weights once more, in the form of their makers.
    repeated = ["*/*.safetensors", "consolidated*.safetensors"]
    try:
        return Path(snapshot_download(reference, revision=revision, allow_patterns=patterns, ignore_patterns=repeated))
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
    raise no_weights(folder, SINGLE_FILE)


def _indexed(index: Path) -> dict[str, str]:
    """Return the file of each tensor; refuse an index of files outside the checkpoint's folder."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(index, "it has no weight_map")
    for name in set(map(str, weight_map.values())):
        _check_entry(index, name)
    return weight_map


def _check_entry(index: Path, name: str) -> None:
    folder = index.parent
    plain = Path(name).name == name and name not in ("", ".", "..") and len(name) < 256
    if plain and name.isprintable() and name.endswith(".safetensors"):
        # Not Path.resolve: it raises another error on circular links.
        here, place = (Path(os.path.realpath(path)).parent for path in (folder / "index", folder / name))
        # Snapshots of the Hub's cache, and downloads of its earlier versions, are links to `blobs` of the cache.
        if place == here or (place.name == "blobs" and place.parent.name.startswith("models--")):
            return
    raise fail(
        "the index names a file that is not in the checkpoint's folder",
        where=str(index),
        expected="names of *.safetensors files beside the index",
        got=repr(name[:120]),
        remedy="copy the files into the folder; if you did not make this checkpoint, do not trust it",
    )


def _absent(
    index: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> list[str]:
    """Return what an index lists and no file has; refuse an index that says otherwise than its files."""
    wrong = [name for name, info in tensors.items() if weight_map.get(name) != info.file.name]
    absent = [name for name in weight_map if name not in tensors]
    # A block has the tensors of the other blocks, so these are lost; others a model may do without (tied heads, masks).
    kinds, unloaded = {_NUMBER.sub(".#.", name) for name in tensors}, never_loaded(absent, config)
    wrong += [name for name in absent if _NUMBER.sub(".#.", name) in kinds and name not in unloaded]
    if wrong:
        raise damaged(index, f"it does not fit its files: {', '.join(name[:80] for name in wrong[:3])}")
    return absent
