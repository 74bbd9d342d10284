"""The scripts in benchmarks/, imported by tests as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent / "benchmarks"


def load(name, monkeypatch):
    """Return a script as a module; the files beside it can be imported, as when it is run."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look for their module there.
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module
