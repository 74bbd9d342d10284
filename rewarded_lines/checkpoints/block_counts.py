"""The numbers of blocks that a config declares, and which of them is meant for a list of blocks in the tensors' names.

A config has one number for the text, others for towers, encoders and decoders, in sections or in keys of their own:
`num_hidden_layers`, `vision_config.depth`, `decoder_layers`, `thinker_config.audio_config.encoder_layers`. The words of
section and key say which list is meant: `decoder_layers` means `model.decoder.layers`, not `model.encoder.layers`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# Keys such as num_hidden_layers, n_layer, depth, vision_layers, resampler_depth.
_COUNT = re.compile(
    r"(?:n|nb|num|number_of)_(?:\w+_)?(?:layers?|blocks?)|(?:\w+_)?(?:layers|depth)|num_\w+_per_(?:stack|block)"
)
# Keys that match, but count something else.
_NO_COUNT = re.compile(
    r"max_window_layers|(?:mtp|num_nextn|num_mtp)\w*|\w*(?:_shared|dense|sparse|conv|experts?|mlp|moe|group|random|mem|"
    r"upscale|res|feature|proj|full_attention|postnet|prenet|no_rope|lstm|transition|head|max|min)_(?:layers?|blocks?|depth)"
)
# Keys with a list that has one entry for each block.
_KINDS = re.compile(r"layer_types|layers_block_type")
# Words of keys that say nothing on which list is meant.
_PLAIN = set("num number of n nb hidden layer layers block blocks depth config model per stack".split())
# Words for one thing. The first names it, also for --tower.
_SYNONYMS = (
    ("vision", "visual", "vit", "image", "img", "video", "siglip", "clip", "eye"),
    ("audio", "speech", "sound"),
    ("text", "language", "llm", "lm"),
)
_MEANING = {word: row[0] for row in _SYNONYMS for word in row}
_DEEPEST = 4
_FURTHER, _MOST_FURTHER = "num_nextn_predict_layers", 100


class Declared(NamedTuple):
    """A number of blocks in the config; without a number the section alone, which says that it holds none."""

    key: str
    section: frozenset[str]
    words: frozenset[str]
    value: Any

    @property
    def valid(self) -> bool:
        """Return whether the value is a number of blocks."""
        return isinstance(self.value, int) and not isinstance(self.value, bool) and self.value > 0

    def holds_for(self, words: frozenset[str]) -> bool:
        """Return whether the number can be meant for the list whose path has these words."""
        # A text model alone is a list without a word, and so is the only half of an encoder and a decoder.
        other = {"encoder", "decoder"} if not words & {"encoder", "decoder"} else set()
        return self.section - {"text"} <= words and self.words - {"text"} - other <= words


def words_of(text: str) -> frozenset[str]:
    """Return the words of a dotted name, `visual` and `vision` as one word, without digits at the end."""
    parts = (part.rstrip("0123456789") for part in re.split(r"[._-]", text.lower()))
    return frozenset(_MEANING.get(part, part) for part in parts if part)


def declared_for(path: str, config: Mapping[str, Any]) -> list[Declared]:
    """Return the numbers that the config declares for the list at `path`; it may declare several, or none.

    A number holds for a list if all words of its section and key are in the list's path. Of those the ones with most
    words are returned: `vision_config.depth` for `visual.blocks`, not `num_hidden_layers`.
    """
    words = words_of(path)
    fitting = [one for one in _declarations(config, "", frozenset(), 0) if one.holds_for(words)]
    for most in sorted({len((one.section | one.words) & words) for one in fitting}, reverse=True):
        level = [one for one in fitting if len((one.section | one.words) & words) == most]
        found = [one for one in level if one.value is not None]
        least = min((len(one.words - words) for one in found), default=0)
        found = [one for one in found if len(one.words - words) == least]
        # Configs of older versions declare the text's number outside of the text's section.
        if found or any(one.section - {"text"} for one in level):
            return found
    return []


def all_counts(config: Mapping[str, Any]) -> frozenset[int]:
    """Return every number of blocks that the config declares."""
    return frozenset(one.value for one in _declarations(config, "", frozenset(), 0) if one.valid)


def _declarations(config: Mapping[str, Any], prefix: str, section: frozenset[str], level: int) -> Iterator[Declared]:
    """Yield what a section and those inside it declare."""
    yield Declared(prefix, section, frozenset(), None)
    for key, value in config.items():
        name, words = f"{prefix}{key}", words_of(key) - _PLAIN
        if _COUNT.fullmatch(key) and not _NO_COUNT.fullmatch(key):
            yield Declared(name, section, words, value)
        elif _KINDS.fullmatch(key) and isinstance(value, list) and value:
            yield Declared(name, section, frozenset(), len(value))
        elif isinstance(value, Mapping) and level < _DEEPEST:
            yield from _declarations(value, f"{name}.", section | words, level + 1)


def further_blocks(config: Mapping[str, Any]) -> int:
    """Return how many modules after the last block only predict further tokens, as in DeepSeek-V3 and GLM-4.5."""
    value = of_text(config, _FURTHER)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MOST_FURTHER else 0


def of_text(config: Mapping[str, Any], key: str) -> Any:
    """Return a setting of the language model; vision-language models have it in `text_config`."""
    text = config.get("text_config")
    return config.get(key, text.get(key) if isinstance(text, Mapping) else None)
