"""Merge policies aligned with several rewards: Rewarded Soups and LiNeS, measured honestly.

The verbs of the command line are here with the same names and defaults. They load on first use, so that
`import rewarded_lines` stays light.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_VERBS = {
    "merge": "rewarded_lines.merger.merge",
    "push": "rewarded_lines.hub.push",
    "inspect": "rewarded_lines.merger.inspect",
    "sweep": "rewarded_lines.evaluator.sweep",
    "score": "rewarded_lines.evaluator.sweep",
    "search": "rewarded_lines.evaluator.search",
    "choose": "rewarded_lines.evaluator.choose",
    "report": "rewarded_lines.reports.report",
    "serve": "rewarded_lines.serving.start_server",
    "rounds": "rewarded_lines.pipelines.rounds",
}

__all__ = ["__version__", "choose", "inspect", "merge", "push", "report", "rounds", "score", "search", "serve", "sweep"]


def __getattr__(name: str) -> Any:
    """Load the module behind a verb when it is first asked for (PEP 562)."""
    if name not in _VERBS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rewarded_lines.errors import UserError
    from rewarded_lines.extras import check_verb

    try:
        check_verb(name, f"rewarded_lines.{name}")
    except UserError as error:
        return _refusing(name, error)
    return getattr(import_module(_VERBS[name]), name)


def _refusing(name: str, error: Exception) -> Callable[..., Any]:
    """Return a function in place of a verb that lacks its extra: the call is refused, not the import."""

    def verb(*args: Any, **given: Any) -> Any:
        raise error.with_traceback(None)

    verb.__name__, verb.__doc__ = name, str(error)
    return verb
