"""What a run folder holds, to compare two of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def contents(folder: Path) -> dict[str, dict[str, Any]]:
    """Return every record by name, column by column."""
    return {path.name: pq.read_table(path).to_pydict() for path in sorted((folder / "points").iterdir())}
