"""The model cards of a merge's inputs: Hub ids, licences, languages and data sets.

Cards are other people's files: a field that is missing, damaged or malformed is ignored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.adapters import Adapter, BareBase
from rewarded_lines.checkpoints.reader import Checkpoint
from rewarded_lines.merger.plan import Plan
from rewarded_lines.merger.record import title
from rewarded_lines.references import looks_local

CARD_FILE = "README.md"
_LARGEST = 256 * 1024
_FRONT = re.compile(r"\ufeff?\s*---[ \t]*\r?\n(.*?\r?\n)---[ \t]*(?:\r?\n|$)", re.DOTALL)
_FIELD = re.compile(
    r"^(license|license_name|license_link|language|datasets|base_model):.*(?:\n(?:[ \t#-].*)?)*", re.MULTILINE
)
_LONGEST_FIELD = 8192
_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", re.ASCII)
_WORD = re.compile(r"[A-Za-z0-9][\w.\-+]{0,95}", re.ASCII)
_DATASET = re.compile(r"(?:[A-Za-z0-9][\w.\-]*/)?[A-Za-z0-9][\w.\-]*", re.ASCII)


@dataclass(frozen=True)
class InputCard:
    """What is known about one input.

    Attributes:
        title: its Hub id, or the name of its folder.
        ids: its Hub id; for a folder without one, the ids of the models it was made from.
        licence: "" if the card gives none.
        licence_name: the name of a licence that the Hub does not list.
    """

    title: str
    ids: tuple[str, ...] = ()
    licence: str = ""
    licence_name: str = ""
    licence_link: str = ""
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()


def input_cards(plan: Plan) -> dict[str, InputCard]:
    """Return the cards of the base, under the name "", and of every policy by name."""
    bases = [policy.config.base for policy in plan.policies.values() if isinstance(policy, Adapter)]
    cards = {"": _input_card(plan.reference, plan.base.folder, [*_made_from(plan.base), *bases])}
    for name, policy in plan.policies.items():
        cards[name] = _input_card(plan.references.get(name, ""), policy.folder, _made_from(policy))
    return cards


def read_front_matter(folder: Path) -> Mapping[str, Any]:
    """Return the fields of a folder's model card that a merge passes on."""
    path = folder / CARD_FILE
    try:
        # Reading a pipe would wait for ever.
        if not path.is_file():
            return {}
        with path.open("rb") as file:
            text = file.read(_LARGEST).decode("utf-8", errors="replace")
    except OSError:
        return {}
    found = _FRONT.match(text)
    return _parse(found[1]) if found else {}


def _parse(text: str) -> Mapping[str, Any]:
    """Return the fields of `_FIELD`; others are skipped, because tables of results can be very long."""
    import yaml

    found: dict[str, Any] = {}
    for field in _FIELD.finditer(text.replace("\r\n", "\n")):
        try:
            content = yaml.safe_load(field[0]) if len(field[0]) <= _LONGEST_FIELD else None
        except (yaml.YAMLError, ValueError, RecursionError):
            continue
        found |= content if isinstance(content, dict) else {}
    return found


def _input_card(reference: str, folder: Path, made_from: Iterable[str]) -> InputCard:
    card = read_front_matter(folder)
    own = _own_id(reference, folder)
    licences = _texts(card.get("license"), _WORD)
    link = card.get("license_link")
    return InputCard(
        title=own or title(reference, folder),
        ids=(own,) if own else _ancestors(folder, card, made_from),
        licence=", ".join(licences),
        licence_name=next(iter(_texts(card.get("license_name"), _WORD)), ""),
        licence_link=link if isinstance(link, str) and re.fullmatch(r"https?://[^\s<>()|`\"]{1,500}", link) else "",
        languages=_texts(card.get("language"), _WORD),
        datasets=_texts(card.get("datasets"), _DATASET),
    )


def _own_id(reference: str, folder: Path) -> str:
    """Return the Hub id of an input, or ""; a path in the Hub's cache contains the id."""
    if reference and not looks_local(reference):
        return reference
    place = folder.resolve()
    cached = place.parent.parent.name.split("--") if place.parent.name == "snapshots" else []
    return f"{cached[1]}/{cached[2]}" if len(cached) == 3 and cached[0] == "models" else ""


def _ancestors(folder: Path, card: Mapping[str, Any], made_from: Iterable[str]) -> tuple[str, ...]:
    """Return the Hub ids of the models that a folder was made from, by its card, else by its config."""
    place = folder.resolve()
    named = _texts(card.get("base_model"), _ID) or [text for text in made_from if _ID.fullmatch(text)]
    return tuple(dict.fromkeys(name for name in named if not _lies_here(name, place)))


def _lies_here(name: str, folder: Path) -> bool:
    """True if a name that looks like an id is a path on this machine; trainers record such names."""
    return any(os.path.exists(place / name) for place in (Path(), folder, *list(folder.parents)[:4]))


def _made_from(source: Checkpoint | BareBase | Adapter) -> list[str]:
    name = source.config.base if isinstance(source, Adapter) else source.config.get("_name_or_path")
    return [name] if isinstance(name, str) else []


def _texts(value: Any, form: re.Pattern[str]) -> tuple[str, ...]:
    """Return the well-formed texts of a field with one text or a list."""
    values = value if isinstance(value, list) else [value]
    # YAML reads `no`, the code of Norwegian, as false.
    texts = ["no" if one is False else one for one in values]
    return tuple(dict.fromkeys(one for one in texts if isinstance(one, str) and form.fullmatch(one)))
