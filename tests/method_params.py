"""Methods as parameters of tests; those for policies of RL have quick tests of their own, and the others are slow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

RL = ("sum", "ram", "ram-plus", "sce", "della", "breadcrumbs")


def methods(names: Iterable[str]) -> list[Any]:
    """Return the names as parameters, slow for the methods in `RL`."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in RL else name for name in names]
