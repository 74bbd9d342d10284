"""Families of checkpoints with difficult values, made once, and short blocks for them."""

from __future__ import annotations

import sys
from zlib import crc32

import pytest
from hostile import Family, make_family

# Small tensors must have several blocks, and blocks several pieces, each of whole `measures.SUMMED`.
SHORT = {"BLOCK": 256, "PIECE": 128}


@pytest.fixture
def short_blocks(monkeypatch) -> None:
    """Shorten blocks and pieces in every module that has their length."""
    import rewarded_lines.kernels.gpu_blocks  # noqa: F401

    for name, module in list(sys.modules.items()):
        for length in SHORT:
            if name.startswith("rewarded_lines.") and hasattr(module, length):
                monkeypatch.setattr(module, length, SHORT[length])


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """Return the family of given formats (base first), made on first use; gentle families have ordinary values."""
    made: dict[tuple, Family] = {}

    def family(formats, gentle=False) -> Family:
        key = (tuple(formats), gentle)
        if key not in made:
            made[key] = make_family(tmp_path_factory.mktemp("family"), key[0], crc32(repr(key).encode()), gentle)
        return made[key]

    return family
