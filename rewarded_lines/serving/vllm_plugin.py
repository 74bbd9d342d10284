"""The plugin that vLLM finds by its entry point `vllm.general_plugins`: λ in the request.

    vllm serve BASE --enable-lora --max-lora-rank 32 --lora-modules helpful=… brief=…
    REWARDED_LINES_PROJECT=rewarded-lines.yaml vllm serve BASE --enable-lora --max-lora-rank 32

vLLM calls `register` in each of its processes, also for servers that have nothing to do with preferences. So this file
imports nothing heavy, and changes nothing unless the server has adapters or a project.
"""

from __future__ import annotations

import os
import sys

from rewarded_lines.processes import DIE_WITH_PARENT, die_with_parent
from rewarded_lines.serving.served_settings import PROJECT

# Set for the worker processes, which do not see the command line.
_ADAPTERS = "REWARDED_LINES_ADAPTERS"
# A file may name adapters, too.
_OPTIONS = ("--lora-modules", "--config")


def register() -> None:
    """Let vLLM answer for preferences, if the server has adapters or a project."""
    if os.environ.get(DIE_WITH_PARENT):
        # `rewarded-lines serve` asks for that: each process ends with its parent, and its children with it.
        die_with_parent()
        os.environ[DIE_WITH_PARENT] = str(os.getpid())
    if any(word.replace("_", "-").split("=")[0] in _OPTIONS for word in sys.argv):
        os.environ[_ADAPTERS] = "1"
    if os.environ.get(PROJECT) or os.environ.get(_ADAPTERS):
        from rewarded_lines.serving.vllm_hooks import install

        install()
