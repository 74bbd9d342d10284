"""Run every recipe in each of two processes, one after the other: importing everything takes longer than that."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_recipes import run_as_one_of_two  # noqa: E402 - found by the line above

if __name__ == "__main__":
    run_as_one_of_two(Path(sys.argv[1]), sys.argv[2:])
