"""The parts of a recipe: arguments, data, models, rewards, trainers, and the run with its folder.

A recipe imports from here before it imports trl, so that a missing package or a version that does not fit is told.
"""

import sys

from rewarded_lines.errors import UserError
from rewarded_lines.extras import require

try:
    require("train", "recipes")
except UserError:
    # A script cannot catch this yet; it ends with the message, not with a traceback.
    sys.excepthook = lambda kind, error, trace: sys.stderr.write(f"{error}\n")
    raise
