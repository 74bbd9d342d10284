"""Families of unkind checkpoints, made once, and blocks short enough for them."""

from __future__ import annotations

import sys

import pytest
from hostile import Family, make_family

# Tensors of a few hundred values are to have several blocks.
SHORT_BLOCK = 256


@pytest.fixture
def short_blocks(monkeypatch) -> int:
    """Shorten the blocks of every module that knows their length; return it."""
    import rewarded_lines.merging.merge
    import rewarded_lines.streaming.gpu  # noqa: F401

    for name, module in list(sys.modules.items()):
        if name.startswith("rewarded_lines.") and hasattr(module, "BLOCK"):
            monkeypatch.setattr(module, "BLOCK", SHORT_BLOCK)
    return SHORT_BLOCK


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """The family of given formats (the base's first), made on first use; gentle ones have only ordinary values."""
    made: dict[tuple, Family] = {}

    def family(formats, gentle=False) -> Family:
        key = (tuple(formats), gentle)
        if key not in made:
            made[key] = make_family(tmp_path_factory.mktemp("family"), key[0], len(made), gentle)
        return made[key]

    return family
