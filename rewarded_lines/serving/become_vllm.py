"""This process becomes vLLM's server. A file of its own, because nothing heavy may be imported before that."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from rewarded_lines.processes import DIE_WITH_PARENT, die_with_parent


def become(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Replace this process by a command; the workers that it starts end with it, even if it is killed."""
    os.execve(command[0], list(command), {**environment, DIE_WITH_PARENT: str(os.getpid())})


if __name__ == "__main__":
    die_with_parent()
    become(sys.argv[1:], dict(os.environ))
