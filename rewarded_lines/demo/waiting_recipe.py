"""Runs a recipe, but first loads its libraries and waits for a line on stdin.

    python -m rewarded_lines.demo.waiting_recipe recipes/sft.py --config recipes/configs/demo/sft.yaml

The demo starts the recipes of its next stage so: loading takes some ten seconds, for which a core is free meanwhile.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def main() -> None:
    """Load the recipe that the command line names; run it once told to, or end with the demo."""
    script = Path(sys.argv[1])
    del sys.argv[0]
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    # Dataclasses look their annotations up there.
    sys.modules[script.stem] = recipe
    spec.loader.exec_module(recipe)
    if sys.stdin.readline():
        recipe.run_recipe(recipe.main)


if __name__ == "__main__":
    main()
