"""What a folder's tokenizer files say: ids of tokens, merges, and how text is split. Comparisons are elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.headers import damaged
from rewarded_lines.checkpoints.reader import read_json_object

FAST = "tokenizer.json"
_LARGEST_TEXT = 1 << 28
# Parts of tokenizer.json that say how text is split; padding and truncation change no token's meaning.
PARTS = ("normalizer", "pre_tokenizer")
# Kinds of SentencePiece tokens that stand for text: normal ones, the user's own, bytes.
_TEXT_PIECES = (1, 4, 6)


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer of a folder, read from one of its files.

    Attributes:
        file: tokenizer.json or, in a folder without it, vocab.json, vocab.txt or the SentencePiece model.
        tokens: the id of every token, added ones included; of a SentencePiece model the place of every piece.
        added: tokens that were added to the model's own, with their flags.
        merges: pairs in order of their rank, None if the file has none.
        scores: of the tokens of a Unigram model, in their order.
        settings: other settings of the model that are not off or empty.
        parts: how text is split, of tokenizer.json.
        around: the tokens that stand before and after every text, as tokenizer.json says.
    """

    file: Path
    tokens: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    merges: Sequence[tuple[str, ...]] | None = None
    scores: Sequence[float] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Any] = field(default_factory=dict)
    around: tuple[Sequence[str], Sequence[str]] = ((), ())

    @property
    def fast(self) -> bool:
        """True for tokenizer.json, which says everything."""
        return self.file.name == FAST

    @property
    def pieces(self) -> bool:
        """True for a SentencePiece model, whose ids may be shifted when it is loaded."""
        return self.file.suffix == ".model"


def tokenizer_file(folder: Path) -> Path | None:
    """Return the file that says most about a folder's tokenizer; None without any."""
    places = [folder / name for name in (FAST, "vocab.json", "vocab.txt")]
    places += [path for path in sorted(folder.glob("*.model")) if path.is_file()]
    found = next((path for path in places if os.path.lexists(path)), None)
    # Reading a pipe may never end.
    if found is not None and not found.is_file():
        raise damaged(found, "not a file")
    return found


def read_tokenizer(path: Path) -> TokenizerFiles:
    """Read the file that `tokenizer_file` found, with those that belong to it.

    Raises:
        UserError: the file is damaged, or no tokenizer.
    """
    try:
        if path.name == FAST:
            return _fast(path)
        if path.name == "vocab.json":
            return _vocabulary_and_merges(path)
        if path.name == "vocab.txt":
            lines = _text(path).splitlines()
            return _with_added(path, {line: index for index, line in enumerate(lines)})
        return _pieces(path)
    except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
        raise damaged(path, f"it is no tokenizer: {str(error)[:100]}") from error


def _fast(path: Path) -> TokenizerFiles:
    content = read_json_object(path)
    model = dict(content["model"])
    vocabulary, merges = model.pop("vocab"), model.pop("merges", None)
    added = {_name(one["content"]): one for one in content.get("added_tokens") or []}
    return TokenizerFiles(
        path,
        _ids(vocabulary) | {name: _id(one["id"]) for name, one in added.items()},
        added,
        None if merges is None else [_pair(one) for one in merges],
        [float(score) for _, score in vocabulary] if isinstance(vocabulary, list) else (),
        {key: value for key, value in model.items() if value is not None and value is not False and value != ""},
        {part: _without_offsets(content.get(part)) for part in PARTS},
        _around(content.get("post_processor") or {}),
    )


def _around(post_processor: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the tokens that a post-processor puts before and after a single text."""
    if "processors" in post_processor:
        several = [_around(one) for one in post_processor["processors"]]
        return [token for before, _ in several for token in before], [token for _, after in several for token in after]
    if "cls" in post_processor:
        return [post_processor["cls"][0]], [post_processor["sep"][0]]
    pieces = post_processor.get("single") or []
    names = [piece["SpecialToken"]["id"] if "SpecialToken" in piece else "" for piece in pieces]
    middle = names.index("") if "" in names else len(names)
    return names[:middle], names[middle + 1 :]


def _ids(vocabulary: Any) -> dict[str, int]:
    """Return the id of every token; a Unigram model lists tokens with their scores, in order."""
    if isinstance(vocabulary, list):
        return {_name(piece): index for index, (piece, _) in enumerate(vocabulary)}
    return {_name(name): _id(number) for name, number in vocabulary.items()}


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a token is no text")
    return value


def _id(value: Any) -> int:
    if type(value) is not int:
        raise TypeError("the id of a token is no number")
    return value


def _pair(merge: Any) -> tuple[str, ...]:
    """Return a merge as a pair; older versions of tokenizers write it as one text."""
    return tuple(merge.split(" ")) if isinstance(merge, str) else tuple(map(_name, merge))


def _without_offsets(part: Any) -> Any:
    """Return a part without `trim_offsets`, which changes where a token stands in the text, but not which it is."""
    if isinstance(part, dict):
        return {key: _without_offsets(value) for key, value in part.items() if key != "trim_offsets"}
    return [_without_offsets(value) for value in part] if isinstance(part, list) else part


def _vocabulary_and_merges(path: Path) -> TokenizerFiles:
    tokens, beside = _ids(read_json_object(path)), path.parent / "merges.txt"
    if not beside.is_file():
        return _with_added(path, tokens)
    lines = [line.rstrip("\r") for line in _text(beside).split("\n")]
    return _with_added(path, tokens, [_pair(line) for line in lines if line and not line.startswith("#version")])


def _with_added(path: Path, tokens: dict[str, int], merges: Sequence[tuple[str, ...]] | None = None) -> TokenizerFiles:
    """Return a vocabulary with the tokens that the files beside it add."""
    added, settings = path.parent / "added_tokens.json", path.parent / "tokenizer_config.json"
    more = _ids(read_json_object(added)) if added.is_file() else {}
    listed = read_json_object(settings).get("added_tokens_decoder") if settings.is_file() else None
    more |= {one["content"]: int(number) for number, one in (listed or {}).items()}
    return TokenizerFiles(path, tokens | more, {name: {} for name in more}, merges)


def _text(path: Path) -> str:
    if not path.is_file():
        raise ValueError("not a file")
    if path.stat().st_size > _LARGEST_TEXT:
        raise ValueError("larger than any vocabulary")
    return path.read_text(encoding="utf-8")


def _pieces(path: Path) -> TokenizerFiles:
    """Read a SentencePiece model: those pieces that stand for text are its tokens, the others are added ones.

    The file is a protocol buffer; field 1 of it holds the pieces, and of a piece 1 is the text and 3 the kind.
    """
    pieces = [dict(_fields(piece)) for number, piece in _fields(path.read_bytes()) if number == 1]
    if not pieces:
        raise ValueError("no pieces in it")
    places = {piece[1].decode(): place for place, piece in enumerate(pieces)}
    others = {piece[1].decode() for piece in pieces if piece.get(3, 1) not in _TEXT_PIECES}
    tokens = {name: place for name, place in places.items() if name not in others}
    return TokenizerFiles(path, tokens, {name: {} for name in others})


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of every field of a protocol buffer; fixed-size values are skipped."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        kind, number = key & 7, key >> 3
        if kind == 0:
            value, at = _varint(content, at)
            yield number, value
        elif kind == 2:
            length, at = _varint(content, at)
            if at + length > len(content):
                raise ValueError("it ends too early")
            yield number, content[at : at + length]
            at += length
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError("no protocol buffer")


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("no protocol buffer")
