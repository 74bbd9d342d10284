"""The header of a safetensors file, read strictly: eight bytes of length, then JSON; tensors follow.

The format's own library hides the offsets, which a stream needs, and accepts a key twice, which is refused here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.dtypes import DTYPES, DType
from rewarded_lines.checkpoints.missing_weights import model_class
from rewarded_lines.errors import UserError, fail

# Below the 100 MB of the format's own library: parsed JSON takes many times its bytes, and 32 MB name 200,000 tensors.
_LONGEST = 32_000_000
_LONGEST_NAME = 1000
_MOST_DIMENSIONS = 64
# Other parsers of the output accept no deeper nesting.
_DEEPEST = 100
_LARGEST = 2**62
# Releases in these types have no other; by default transformers would save them in the same type again.
_DEQUANTIZED = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
_DEQUANTIZE = (
    "python -c \"import transformers as t; t.{model}.from_pretrained('{folder}', quantization_config="
    "t.{kind}(dequantize=True)).save_pretrained('{folder}-dequantized', save_original_format=False)\""
)
_HALF = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class TensorInfo:
    """Name, type and shape of a tensor, and where its bytes start in the file.

    A tensor whose values the file stores under several names has `pieces`: they follow one another in it. `transposed`:
    the file stores each matrix of the last two axes with rows and columns exchanged.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: Path = Path()
    start: int = 0
    pieces: tuple[TensorInfo, ...] = ()
    transposed: bool = False

    @property
    def elements(self) -> int:
        """Return the number of values."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Return the bytes of all values."""
        return self.elements * self.dtype.itemsize


def read_header(file: Path) -> list[TensorInfo]:
    """Return every tensor of a safetensors file, in the order of their bytes.

    Raises:
        UserError: the file is damaged or not safetensors, or has a type that cannot be merged.
    """
    try:
        size = file.stat().st_size
        content, begin = _content(file, size)
        entries = [_entry(file, name, value, begin) for name, value in content.items() if name != "__metadata__"]
        ordered = sorted(entries, key=lambda info: (info.start, info.bytes))
        _check_layout(ordered, begin, size)
    except (ValueError, OSError, RecursionError) as error:
        raise damaged(file, str(error)) from error
    return ordered


def damaged(file: Path, reason: str) -> UserError:
    """Return the error for a file that is cut short or contradicts itself."""
    size = file.stat().st_size if file.is_file() else 0
    return fail(
        "the file is damaged or cut short",
        where=str(file),
        got=f"{reason} ({size} bytes)",
        remedy="copy or download it again",
    )


def quantized(what: str, where: Path, method: str = "") -> UserError:
    """Return the error for weights that are quantized; `what` describes them, `method` is transformers' name."""
    remedy = "merge the unquantized checkpoints, quantize the result; adapters merge over it with --as adapter"
    if method in _DEQUANTIZED:
        folder = where.parent
        command = _DEQUANTIZE.format(kind=_DEQUANTIZED[method], folder=folder, model=model_class(folder))
        remedy = f"dequantize it as the policies' trainer did, and give the result: {command}"
    return fail(
        what,
        where=str(where),
        expected="float64, float32, bfloat16 or float16 weights",
        remedy=f"quantized values cannot be interpolated: {remedy}",
    )


def named_quantized(settings: Any, path: Path, files: Iterable[Path]) -> UserError:
    """Return the error for a config with `quantization_config`; `files` have the weights, if they are known."""
    method = str(settings.get("quant_method", "") if isinstance(settings, dict) else "")[:40]
    said = f" ({method})" if method else ""
    try:
        kinds = {info.dtype for file in files for info in read_header(file)}
    except UserError:
        kinds = set()
    # Some tools leave the key there when they save dequantized weights.
    if kinds and all(kind.floating for kind in kinds):
        what = f"the config says that the model is quantized{said}, its weights are not"
        remedy = "remove quantization_config from it: with it, loaders would quantize the weights"
        return fail(what, where=str(path), remedy=remedy)
    return quantized(f"the model is quantized{said}", path, method)


def parse_json(raw: str, number: Callable[[str], int] | None = None) -> Any:
    """Return the value of a JSON text; `number` parses whole numbers in place of `int`.

    Raises:
        ValueError: the text is not JSON, has a key twice in an object, or is nested too deep.
    """
    try:
        content = json.loads(raw, object_pairs_hook=_unique, parse_int=number)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    level = [content]
    for _ in range(_DEEPEST):
        level = [item for value in level for item in _inside(value)]
    if level:
        raise ValueError("nested too deep")
    return content


def _size(digits: str) -> int:
    """Return a size; Python accepts "-0", other readers of the file do not."""
    if digits.startswith("-"):
        raise ValueError(f"{digits[:20]} is not a size")
    return int(digits)


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"the key {twice[:80]!r} is given twice")
    return content


def _content(file: Path, size: int) -> tuple[dict[str, Any], int]:
    """Return the header's JSON object and where the tensors begin."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST):
            raise ValueError(f"a header of {length} bytes in a file of {size}; the most is {_LONGEST}")
        raw = stream.read(length)
    try:
        content = parse_json(raw.decode("utf-8"), _size)
    except ValueError as error:
        raise ValueError(f"its header is not JSON: {str(error)[:120]}") from error
    if not isinstance(content, dict):
        raise ValueError("its header is not a JSON object")
    metadata = content.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(_text(part) for pair in metadata.items() for part in pair):
        raise ValueError("its metadata are not names with texts")
    return content, 8 + length


def _text(value: Any) -> bool:
    """Return whether a value is text that can be written: JSON escapes can make half characters."""
    return isinstance(value, str) and not _HALF.search(value)


def _entry(file: Path, name: str, value: Any, begin: int) -> TensorInfo:
    # Names are printed and written: no line breaks, no control codes, no page of text.
    if not name.isprintable() or len(name) > _LONGEST_NAME:
        raise ValueError(f"{ascii(name[:80])} is not a tensor's name")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name[:80]!r} is not described by dtype, shape and data_offsets")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _sizes(shape) or len(shape) > _MOST_DIMENSIONS or not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name[:80]!r} has a shape or offsets that are not sizes")
    kind = value["dtype"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise quantized(f"tensor {name[:80]} is of type {str(kind)[:20]}", file)
    info = TensorInfo(name, DTYPES[kind], tuple(shape), file, begin + offsets[0])
    # A shape that contains 0 takes no bytes, but its other sizes may still be absurd.
    if prod(max(size, 1) for size in shape) > _LARGEST or offsets[1] - offsets[0] != info.bytes:
        raise ValueError(f"tensor {name[:80]!r} takes {info.bytes} bytes, its offsets say {offsets[1] - offsets[0]}")
    return info


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _LARGEST for item in value)


def _check_layout(entries: list[TensorInfo], begin: int, size: int) -> None:
    """Check that tensors follow one another without gap or overlap, to the end of the file."""
    place = begin
    for info in entries:
        if info.start != place:
            found = f"tensor {info.name[:80]!r} starts at byte {info.start}"
            raise ValueError(f"{found}, the one before it ends at {place}")
        place += info.bytes
    if place != size:
        raise ValueError(f"its tensors end at byte {place}")
