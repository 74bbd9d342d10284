"""The parts of a recipe: arguments, data, models, rewards, trainers, and the run with its folder.

A recipe imports from here before it imports trl, so that a missing package or a version that does not fit is told.
"""

import logging
import os
import sys
import warnings

from rewarded_lines.errors import UserError
from rewarded_lines.extras import require
from rewarded_lines.processes import VLLM_SETTINGS

try:
    require("train", "recipes")
except UserError:
    # A script cannot catch this yet; it ends with the message, not with a traceback.
    _own = sys.excepthook

    def _tell(kind, error, trace):  # type: ignore[no-untyped-def]
        sys.stderr.write(f"{error}\n") if issubclass(kind, UserError) else _own(kind, error, trace)

    sys.excepthook = _tell
    raise

# TRL imports vLLM, which reads its level then, and warns five times of a version that `versions` accepts.
logging.getLogger("vllm").setLevel(os.environ.setdefault("VLLM_LOGGING_LEVEL", VLLM_SETTINGS["VLLM_LOGGING_LEVEL"]))
warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")
