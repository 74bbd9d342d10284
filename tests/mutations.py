"""Damage to the files of a checkpoint, drawn by a seeded generator: each function takes sound bytes, returns others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

Mutation = Callable[[Random, bytes], bytes]

_DEEP = 3000
# JSON values as they stand in a file: of every type, out of every range, and some that are no JSON.
VALUES = (
    *("null", "true", "false", "0", "1", "2", "3", "7", "-1", "-0", "1.5", "2.0", "1e2", "1e400", "NaN", "-Infinity"),
    *("01", "0x10", "+1", "1_000", str(10**12), str(2**31), str(2**53), str(2**62), str(2**63), str(2**64), "9" * 5000),
    *(
        '""',
        '"x"',
        '"2"',
        '"\\u0000"',
        '"\\ud800"',
        '"\\u001b[2J"',
        '"\u202e\U0001f600"',
        '"[/red]"',
        '"' + "y" * 9999 + '"',
    ),
    *('"../../etc/passwd"', '"/etc/passwd"', '"config.json"', '"model.safetensors"', '"."', '"a/b.safetensors"'),
    *("[]", "{}", "[[]]", '{"a": 1}', "[2, 2]", "[0]", '["x"]', '{"a": 1, "a": 2}'),
    *("[" * 90 + "]" * 90, "[" * 400 + "]" * 400, "[" * _DEEP + "]" * _DEEP, '{"a":' * 300 + "1" + "}" * 300),
    *("[" * _DEEP, "{", "}", ",", ":", "tru", "\x00", "\ufeff", '"'),
)
DTYPES = (
    *("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"),
    *("F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F4", "C64", "f32", "F32 ", "", "F128", "\u0000", "\x1b[31m"),
)
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "C64": 8}
_TWO_BYTES = ("F16", "BF16", "I16", "U16")
NAMES = (
    *("", "__metadata__", "a", ".", "..", "../x", "/etc/passwd", "x" * 999, "x" * 1001, "x" * 40_000, "\x00", "a\nb"),
    *("model.layers.2.w", "model.layers.01.w", "model.layers.-1.w", "model.layers.1e3.w", "model.layers.99999999.w"),
    *("model.layers.٣.w", "model.layers.0", "model.layers..w", "v_head.weight", "lm_head.weight", "[/red]", "\x1b[2J"),
    *(
        "\u202egnp.exe",
        "naïve",
        "模型.层",
        "rotary_emb.inv_freq",
        "model.norm.weight",
        "{0}",
        "%s",
        "a b",
        "\ud83d\ude00",
    ),
)


def pack(header: str | bytes, data: bytes, length: int | None = None) -> bytes:
    """Return a safetensors file of a header's text and the tensors' bytes."""
    raw = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def unpack(file: bytes) -> tuple[dict[str, Any], bytes]:
    """Return header and tensors of a sound safetensors file."""
    length = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def damaged_bytes(random: Random, raw: bytes) -> bytes:
    """Flip, insert, delete, repeat or overwrite a few bytes, or cut the file short."""
    changed = bytearray(raw)
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        at, length = random.randrange(len(changed) + 1), random.choice((1, 1, 2, 8, 40))
        noise = bytes(random.choice((random.randrange(256), 0, 0x22, 0x7B, 0x5B, 0x30)) for _ in range(length))
        kind = random.choice(("flip", "insert", "delete", "repeat", "over", "cut"))
        if kind == "flip" and at < len(changed):
            changed[at] ^= 1 << random.randrange(8)
        elif kind == "insert":
            changed[at:at] = noise
        elif kind == "delete":
            del changed[at : at + length]
        elif kind == "repeat":
            changed[at:at] = changed[at : at + length]
        elif kind == "over":
            changed[at : at + length] = noise
        elif random.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def damaged_header_bytes(random: Random, raw: bytes) -> bytes:
    """Damage bytes of the header alone, with its length made to fit or left."""
    length = int.from_bytes(raw[:8], "little")
    header = damaged_bytes(random, raw[8 : 8 + length])
    return pack(header, raw[8 + length :], None if random.random() < 0.8 else length)


def wrong_length(random: Random, raw: bytes) -> bytes:
    """Declare another length of the header."""
    length = int.from_bytes(raw[:8], "little")
    small = [length + step for step in range(-20, 21)]
    large = [2**power + step for power in (16, 24, 26, 31, 32, 53, 62, 63) for step in (-1, 0, 1)]
    value = random.choice(
        [*small, *large, 0, 1, 2, 2**64 - 1, 2**64 - 8, len(raw), len(raw) - 8, random.getrandbits(64)]
    )
    return value.to_bytes(8, "little") + raw[8:]


def cut_short(random: Random, raw: bytes) -> bytes:
    """End the file anywhere, or go on after its end."""
    return (
        raw[: random.randrange(len(raw))] if random.random() < 0.8 else raw + random.randbytes(random.randrange(1, 99))
    )


def json_value(random: Random, raw: bytes) -> bytes:
    """Put another value in any place of a JSON text, take the place away, give its key twice, or name it otherwise."""
    content = json.loads(raw)
    holder, key = random.choice(_places(content))
    kind = random.choice(("value", "value", "value", "value", "delete", "twice", "rename", "all"))
    text = random.choice(VALUES)
    if kind == "all":
        return text.encode("utf-8", "surrogatepass")
    if kind == "delete":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[random.choice(NAMES)] = holder.pop(key)
    else:
        if kind == "twice" and isinstance(holder, dict):
            text = f"{text}, {json.dumps(key)}: {json.dumps(holder[key])}"
        holder[key] = "@@"
    return json.dumps(content).replace('"@@"', text).encode("utf-8", "surrogatepass")


def json_text(random: Random, raw: bytes) -> bytes:
    """Write the same JSON otherwise: in another encoding, with a mark before it, with space around it, damaged."""
    content, text = json.loads(raw), raw.decode()
    return random.choice(
        (
            lambda: text.encode(random.choice(("utf-16", "utf-32", "utf-8-sig"))),
            lambda: text.replace("a", random.choice("äé\u20ac")).encode("latin-1", "replace"),
            lambda: json.dumps(content, indent=random.randrange(5)).encode(),
            lambda: (
                (" \n\t"[random.randrange(3)] * random.randrange(1, 9)).encode() + raw + b"\n" * random.randrange(9)
            ),
            lambda: raw + random.choice((b"\x00", b"{}", b",", b" x", b"//", raw)),
            lambda: raw[: random.randrange(len(raw))],
            lambda: damaged_bytes(random, raw),
            lambda: json.dumps(content, ensure_ascii=True).replace("l", "\\u006c").encode(),
        )
    )()


def header_value(random: Random, raw: bytes) -> bytes:
    """Change a value, a key or the writing of the header."""
    length = int.from_bytes(raw[:8], "little")
    return pack(random.choice((json_value, json_value, json_text))(random, raw[8 : 8 + length]), raw[8 + length :])


def header_number(random: Random, raw: bytes) -> bytes:
    """Replace one number of a shape or of offsets by another value."""
    header, data = unpack(raw)
    text = json.dumps(header)
    number = random.choice(list(re.finditer(r"\b\d+(?=[,\]])", text)))
    near = str(int(number[0]) + random.choice((-4, -1, 1, 4, 16)))
    return pack(text[: number.start()] + random.choice((*VALUES[:28], near, near, near)) + text[number.end() :], data)


def header_tensors(random: Random, raw: bytes) -> bytes:
    """Change what the header says of tensors as a whole: their places, types, names, number and order."""
    header, data = unpack(raw)
    names = [name for name in header if name != "__metadata__"]
    first, second = random.sample(names, 2)
    data = random.choice(_TENSORS)(random, header, first, second, data) or data
    return pack(json.dumps(header), data)


def _swap(random: Random, header: Any, first: str, second: str, data: bytes) -> None:
    keys = random.choice((["data_offsets"], ["shape"], ["data_offsets", "shape"], ["dtype", "shape", "data_offsets"]))
    for key in keys:
        header[first][key], header[second][key] = header[second][key], header[first][key]


def _overlap(random: Random, header: Any, first: str, second: str, data: bytes) -> None:
    header[first]["data_offsets"] = list(header[second]["data_offsets"])


def _shift(random: Random, header: Any, first: str, second: str, data: bytes) -> bytes | None:
    """Move one tensor, or all behind a gap that is really there."""
    by = random.choice((-64, -4, -1, 1, 4, 8, 2**40, 2**63))
    start = header[first]["data_offsets"][0]
    moved = (
        [first]
        if random.random() < 0.5
        else [n for n in header if n[:2] != "__" and header[n]["data_offsets"][0] >= start]
    )
    for name in moved:
        header[name]["data_offsets"] = [offset + by for offset in header[name]["data_offsets"]]
    return data[:start] + bytes(by) + data[start:] if 0 < by < 99 else None


def _retype(random: Random, header: Any, first: str, second: str, data: bytes) -> None:
    """Give another type, the shape made to fit the bytes where that is possible."""
    entry, kind = header[first], random.choice(DTYPES)
    entry["dtype"] = kind
    elements = (entry["data_offsets"][1] - entry["data_offsets"][0]) // (
        2 if kind in _TWO_BYTES else _SIZES.get(kind, 1)
    )
    if random.random() < 0.8:
        entry["shape"] = [elements] if len(entry["shape"]) == 1 else [entry["shape"][0], elements // entry["shape"][0]]


def _reshape(random: Random, header: Any, first: str, second: str, data: bytes) -> None:
    """Give another shape, now and then of equally many values."""
    shape = header[first]["shape"]
    shape[:] = random.choice(
        (
            [*shape, 1],
            [1] * 64 + shape,
            [1] * 65 + shape,
            shape[::-1],
            [0, *shape],
            [0, 2**62, 2**62],
            [2**62, 2**62, 0],
            [2**32, 2**32],
            [-1, *shape],
            [-shape[0], -1],
            [],
            [shape[0] * 2, *shape[1:]],
        )
    )


def _rename(random: Random, header: Any, first: str, second: str, data: bytes) -> None:
    name = random.choice((*NAMES, first.upper(), first + " ", " " + first, first[:-1], second))
    header[name] = header.pop(first)


def _drop(random: Random, header: Any, first: str, second: str, data: bytes) -> bytes | None:
    """Leave a tensor out, its bytes with it or not."""
    start, end = header.pop(first)["data_offsets"]
    if random.random() < 0.4:
        return None
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset - (end - start) for offset in entry["data_offsets"]]
    return data[:start] + data[end:]


def _add(random: Random, header: Any, first: str, second: str, data: bytes) -> bytes:
    """Add a tensor of any name and type, with bytes of its own or none."""
    kind, size = random.choice(DTYPES[:13]), random.choice((0, 8, 32))
    elements = size // (2 if kind in _TWO_BYTES else _SIZES.get(kind, 1))
    name = random.choice((*NAMES, "model.layers.0.extra", "model.extra.bias"))
    shape = random.choice(([elements], [1, elements], [elements, 1]))
    header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + size]}
    return data + bytes(size)


def _order(random: Random, header: Any, first: str, second: str, data: bytes) -> None:
    items = list(header.items())
    random.shuffle(items)
    header.clear()
    header.update(items)


_TENSORS = (_swap, _overlap, _shift, _retype, _retype, _reshape, _rename, _drop, _add, _order)

WEIGHTS: tuple[Mutation, ...] = (
    *(header_tensors, header_tensors, header_tensors, header_number, header_value),
    *(damaged_header_bytes, damaged_bytes, wrong_length, cut_short),
)
JSONS: tuple[Mutation, ...] = (json_value, json_value, json_value, json_text, damaged_bytes)


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Return holder and key of every value inside a JSON value."""
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else []
    return [place for key in keys for place in [(content, key), *_places(content[key])]]
