"""Whether two tokenizers mean the same: ids of tokens, merges, and how they split text, whatever the files' form."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.hashing import file_hash
from rewarded_lines.checkpoints.reader import read_json_object
from rewarded_lines.checkpoints.tokenizer_files import FAST, PARTS, TokenizerFiles, read_tokenizer, tokenizer_file

SHOWN = 3
_LONGEST = 60
# Flags of an added token that change where it is found in a text; `special` only hides it when text is decoded.
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
_SCORE = 1e-6
_SAMPLED_TOKENS = 4096
_TEXTS = (
    "Hello, world! It's the lowest price: don't, we'll, I'M, they'D",
    "CamelCase snake_case kebab-case ALLCAPS MiXeD",
    *("1 12 123 1234 12345 1234567890 3.14 1,000 -7 1e-5 0x1F", "٠١٢٣ ०१२ ２０２６ ½ ² Ⅷ"),
    *("naïve café Ångström İstanbul Straße ﬁne ﬃ ǅ", "nai\u0308ve cafe\u0301 A\u030angstro\u0308m"),
    *("ÀÉÎÕÜ àéîõü", "Καλημέρα κόσμε ΟΔΟΣ", "Привет, мир! Ёлка ёлка", "שלום עולם שָׁלוֹם", "مرحبا بالعالم مَرْحَبًا"),
    *("नमस्ते दुनिया क्षत्रिय", "สวัสดีชาวโลก", "你好，世界。", "こんにちは 世界 カタカナ ｶﾀｶﾅ", "안녕하세요 세계"),
    *("\u1112\u1161\u11ab\u1100\u1173\u11af", "გამარჯობა", "Բարեւ", "ሰላም", "👩‍👩‍👧 🇩🇪 👍🏽 ☃️"),
    *("𝔘𝔫𝔦 𝟙𝟚 𒀀 𐎀 \U0001f9ff \ue000 \U000e0001", "—–…“”‘’«»‹›€£¥₹ ∑∫√≠ →⇒"),
    *('for (int i=0; i<10; ++i) { x[i] += "a\\n"; } // end', "https://example.org/a?b=c&d=%20#e"),
    *("a@b.co #tag @user $5", "\x00\x01\x07\x1b\x7f", "\ufeffa", "▁ ▁a ▁▁", "Ġ Ġa Ċ", "##ing ##", "</w> a</w>"),
    *("<0x0A> <0x41>", "a" * 150, "1" * 40, "!" * 40, "é" * 40, "", "a ", " a", "  a  ", "\n a", "\ta \t b"),
    *("a\r\nb", " \n\n\n a"),
    *(" " * count for count in (1, 2, 3, 4, 7, 8, 16, 40)),
    *("\n" * 3, "\t" * 5, "a\u00a0b", "a\u3000b", "a\u200bb", "a\u2028b", "a\x0bb"),
)


@dataclass(frozen=True)
class Differences:
    """What differs between a first tokenizer and a second one.

    Attributes:
        vocabulary: tokens with other ids: rows of the embeddings would be mixed.
        behaviour: the same tokens, but some text gets others of them.
        form: parts of the files that are written differently and mean the same.
        unsure: what could not be compared.
        extra: added tokens that only the second has, with their ids.
        missing: likewise of the first.
        around: the tokens that the second puts before and after every text, if they differ.
    """

    vocabulary: Sequence[str] = ()
    behaviour: Sequence[str] = ()
    form: Sequence[str] = ()
    unsure: Sequence[str] = ()
    extra: Mapping[str, int] = field(default_factory=dict)
    missing: Mapping[str, int] = field(default_factory=dict)
    around: str | None = None


def compare_tokenizers(first: Path, second: Path) -> Differences:
    """Compare the tokenizers of two folders; a folder without one does not differ."""
    ours, theirs = tokenizer_file(first), tokenizer_file(second)
    if ours is None or theirs is None:
        return Differences()
    whole = ours.name == FAST or ours.suffix == ".model"
    if whole and ours.name == theirs.name and file_hash(ours) == file_hash(theirs):
        if ours.name == FAST:
            # It may still be damaged.
            read_json_object(ours)
        return Differences()
    return _compared(read_tokenizer(ours), read_tokenizer(theirs))


def _compared(first: TokenizerFiles, second: TokenizerFiles) -> Differences:
    if first.pieces != second.pieces:
        return _compare_pieces(*((first, second) if first.pieces else (second, first)))
    extra, missing = _only_in(second, first), _only_in(first, second)
    apart = {*extra, *missing}
    vocabulary = list(islice(_other_ids(first, second, apart), SHOWN))
    if vocabulary:
        return Differences(vocabulary)
    behaviour = _compare_merges(first, second)
    if not (first.fast and second.fast):
        whole = first.file.name == second.file.name and not first.pieces
        unsure = [] if whole else [_unsure(first, second)]
        return Differences((), behaviour, (), unsure, extra, missing)
    around = None if first.around == second.around else " … ".join(map(" ".join, second.around))
    written = [f"model.{key}" for key in _keys(first.settings, second.settings)]
    flags = {name: one for name, one in _compare_flags(first.added, second.added).items() if name not in apart}
    parts = [part for part in PARTS if first.parts[part] != second.parts[part]]
    if not behaviour and (written or parts or any(flags.values())):
        every = "model.ignore_merges" in written
        behaviour = list(islice(_probed(first, second, [name for name, changed in flags.items() if changed], every), 1))
    form = [*written, *parts, *(["added_tokens"] if flags else [])]
    return Differences((), behaviour, form, (), extra, missing, around)


def _only_in(one: TokenizerFiles, other: TokenizerFiles) -> dict[str, int]:
    """Return the added tokens of one tokenizer that the other does not have, at ids that it does not use."""
    taken = set(other.tokens.values())
    own = {name for name, flags in one.added.items() if name in one.tokens and name not in other.tokens}
    return {name: one.tokens[name] for name in own if one.tokens[name] not in taken}


def _other_ids(first: TokenizerFiles, second: TokenizerFiles, left_out: set[str]) -> Iterator[str]:
    """Yield every token whose id differs, in the order of ids."""
    if first.tokens == second.tokens:
        return
    for name in sorted(
        {**first.tokens, **second.tokens}, key=lambda name: first.tokens.get(name, second.tokens.get(name, 0))
    ):
        one, two = first.tokens.get(name), second.tokens.get(name)
        if one != two and name not in left_out:
            yield f"{shown(name)} is {_place(one)}, here {_place(two)}"


def _place(number: int | None) -> str:
    return "no token" if number is None else f"token {number}"


def _compare_merges(first: TokenizerFiles, second: TokenizerFiles) -> list[str]:
    """Return differences in the merges and in the scores."""
    if len(first.scores) != len(second.scores):
        return ["only one of them has scores (Unigram)"]
    close = (math.isclose(one, two, rel_tol=_SCORE) for one, two in zip(first.scores, second.scores, strict=True))
    if not all(close):
        return ["the scores of tokens (Unigram) differ"]
    if first.merges is None or second.merges is None or list(first.merges) == list(second.merges):
        return []
    pairs = enumerate(zip_longest(first.merges, second.merges, fillvalue=()))
    rank, (one, two) = next((rank, pair) for rank, pair in pairs if pair[0] != pair[1])
    ours, theirs = (" + ".join(map(shown, pair)) or "none" for pair in (one, two))
    return [f"merge {rank} is {ours}, here {theirs}"]


def _keys(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in {**first, **second} if first.get(key) != second.get(key))


def _compare_flags(first: Mapping[str, Mapping[str, Any]], second: Mapping[str, Mapping[str, Any]]) -> dict[str, bool]:
    """Return the added tokens with other flags, and whether those may change how a text is split."""
    both = [name for name in first if name in second and first[name] != second[name]]
    changed = {name: any(first[name].get(flag) != second[name].get(flag) for flag in _FLAGS) for name in both}
    # A token that only one of them lists as added is found in the text before it is split.
    return changed | {name: True for name in first.keys() ^ second.keys()}


def _compare_pieces(pieces: TokenizerFiles, other: TokenizerFiles) -> Differences:
    """Compare the pieces of a SentencePiece model with a vocabulary: all must be in it, their ids shifted alike."""
    missing = [name for name in pieces.tokens if name not in other.tokens]
    more = [name for name in other.tokens if not any(name in one for one in (pieces.tokens, pieces.added, other.added))]
    if missing or more:
        said = [f"{shown(name)} is not in {other.file.name}" for name in missing]
        said += [f"{shown(name)} is not in {pieces.file.name}" for name in more]
        return Differences(said[:SHOWN])
    shifts = Counter(other.tokens[name] - place for name, place in pieces.tokens.items())
    common = max(shifts, key=lambda shift: shifts[shift], default=0)
    wrong = [name for name, place in pieces.tokens.items() if other.tokens[name] - place != common]
    said = [
        f"{shown(name)} is token {other.tokens[name]} in {other.file.name}, not {pieces.tokens[name] + common}"
        for name in wrong[:SHOWN]
    ]
    return Differences(said) if said else Differences(unsure=[_unsure(pieces, other)])


def _unsure(first: TokenizerFiles, second: TokenizerFiles) -> str:
    return f"the ids of {first.file.name} and {second.file.name} agree; how they split text was not compared"


def _probed(first: TokenizerFiles, second: TokenizerFiles, names: Sequence[str], every: bool) -> Iterator[str]:
    """Yield texts that the two split otherwise; `names` are added tokens, `every` asks for all tokens as texts."""
    ours, theirs = _opened(first.file), _opened(second.file)
    if ours is None or theirs is None:
        yield "it is written differently, and the library `tokenizers` cannot read it"
        return
    around = [f"a{name}b a {name} b{name} {name}" for name in [*names, *islice(first.added, _SAMPLED_TOKENS)]]
    step = 1 if every else max(1, len(first.tokens) // _SAMPLED_TOKENS)
    words = ours.decode_batch([[number] for number in sorted(first.tokens.values())[::step]], skip_special_tokens=False)
    for texts in (_TEXTS, _characters(), around, words):
        rows = [
            [one.ids for one in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
            for tokenizer in (ours, theirs)
        ]
        for text, one, two in zip(texts, *rows, strict=True):
            if one != two:
                at = next(i for i, (a, b) in enumerate(zip_longest(one, two)) if a != b)
                yield f"in {shown(text)} it gives {_tokens(ours, one[at:])}, here {_tokens(theirs, two[at:])}"


def _tokens(tokenizer: Any, ids: Sequence[int]) -> str:
    return ", ".join(f"{shown(str(tokenizer.id_to_token(number)))} ({number})" for number in ids[:SHOWN]) or "no token"


@cache
def _characters() -> Sequence[str]:
    """Return every eighth letter, sign and space of Unicode's first plane, each within a word and alone."""
    usable = [chr(code) for code in (*range(0x20, 0x600), *range(0x600, 0xD800, 8), *range(0xF900, 0x10000, 4))]
    usable = [character for character in usable if character.isprintable() or character.isspace()]
    return ["".join(f"a{one}1 {one}" for one in usable[at : at + 32]) for at in range(0, len(usable), 32)]


def _opened(path: Path) -> Any:
    """Return the tokenizer of a file without truncation and padding; None if the library refuses it."""
    from tokenizers import Tokenizer

    content = json.loads(path.read_text(encoding="utf-8"))
    content |= {"truncation": None, "padding": None}
    try:
        return Tokenizer.from_str(json.dumps(content))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # noqa: BLE001 - a panic in Rust is no Exception
        return None


def shown(text: str) -> str:
    """Return a text in quotes, shortened."""
    return repr(shortened(text))


def shortened(text: str) -> str:
    """Return the beginning of a long text."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
