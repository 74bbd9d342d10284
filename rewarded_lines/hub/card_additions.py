"""What the command line adds to the cards of merges: the scores of a run, and the Hub id.

This file is apart from `run_card` so that merges without a run load no library that reads runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rewarded_lines.errors import UserError
from rewarded_lines.merger.model_card import Additions, CardAddition
from rewarded_lines.merger.plan import Plan
from rewarded_lines.merger.spec import MergeSpec

RUN_FOLDER = "sweep"


def card_additions(run: Path | None, project: Path, repository: str | None) -> Additions | None:
    """Return the additions to the cards of a merge, or None.

    Args:
        run: the user's run; it must have the same base and policies.
        project: the project file; a finished run in `sweep` beside it counts if it has the same models.
        repository: the Hub id that the merged folder will have.
    """
    card, usual = None, project.parent / RUN_FOLDER
    if run is not None or (project.is_file() and usual.is_dir()):
        from rewarded_lines.hub.run_card import RunCard

        try:
            card = RunCard(run or usual, required=run is not None)
        except UserError:
            if run is not None:
                raise
        if card and run is None and card.header.get("complete") is not True:
            card = None
    if card is None and repository is None:
        return None

    def additions(plan: Plan) -> Callable[[MergeSpec], CardAddition]:
        addition = card.additions(plan) if card else lambda spec: CardAddition()
        return lambda spec: replace(addition(spec), repository=repository or "")

    return additions
