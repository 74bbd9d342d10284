"""What the command line adds to the cards of a merge: a run that knows it, and the Hub id that it will have.

It stands apart from `run_card` because most merges have no run, and must not load the libraries that read runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rewarded_lines.merger.model_card import Additions, CardAddition
from rewarded_lines.merger.plan import Plan
from rewarded_lines.merger.spec import MergeSpec

RUN_FOLDER = "sweep"


def card_additions(run: Path | None, project: Path, repository: str | None) -> Additions | None:
    """Return what the cards of a merge show beside what the merge knows, for `merge` and `replay`; None for nothing.

    Args:
        run: a run that the user named; it must have the same base and policies.
        project: the project file. A finished run in the folder `sweep` beside it is taken if it has the same models.
        repository: the Hub id that the merged folder will have.

    Raises:
        UserError: the user named something that is no run.
    """
    card = None
    if run is not None or (project.is_file() and (project.parent / RUN_FOLDER).is_dir()):
        from rewarded_lines.hub.run_card import run_card

        card = run_card(run, project.parent / RUN_FOLDER)
    if card is None and repository is None:
        return None

    def additions(plan: Plan) -> Callable[[MergeSpec], CardAddition]:
        addition = card.additions(plan) if card else lambda spec: CardAddition()
        return lambda spec: replace(addition(spec), repository=repository or "")

    return additions
