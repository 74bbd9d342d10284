"""The parts of a recipe: arguments, data, models, rewards, trainers, and the run with its folder.

A recipe imports from here before it imports trl, so that a missing package or a version that does not fit is told.
"""

import sys
import warnings

from rewarded_lines.errors import UserError
from rewarded_lines.extras import require

try:
    require("train", "recipes")
except UserError:
    # A script cannot catch this yet; it ends with the message, not with a traceback.
    _own = sys.excepthook

    def _tell(kind, error, trace):  # type: ignore[no-untyped-def]
        sys.stderr.write(f"{error}\n") if issubclass(kind, UserError) else _own(kind, error, trace)

    sys.excepthook = _tell
    raise

# `versions` checks vLLM's; TRL would warn five times.
warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")
