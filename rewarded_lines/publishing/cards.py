"""What the command line adds to the cards of a merge: a run that knows it, and the Hub id that it will have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rewarded_lines.merging.cards import Additions, CardAddition
from rewarded_lines.planning.plan import Plan
from rewarded_lines.rules.spec import MergeSpec

RUN_FOLDER = "sweep"


def card_additions(run: Path | None, project: Path, repository: str | None) -> Additions | None:
    """Return what the cards of a merge show beside what the merge knows, for `merge` and `replay`; None for nothing.

    Args:
        run: a run that the user has named, which must be one of the same base and policies.
        project: the project file; a finished run in the folder `sweep` beside it is taken where it is one of these.
        repository: the Hub id that the merged folder will have.

    Raises:
        UserError: the user has named something that is no run.
    """
    # Runs are read with libraries that other merges do without.
    if run is None and not (project.is_file() and (project.parent / RUN_FOLDER).is_dir()):
        if repository is None:
            return None
        named = CardAddition(repository=repository)
        return lambda plan: lambda spec: named
    from rewarded_lines.publishing.run_cards import run_card

    card = run_card(run, project.parent / RUN_FOLDER)

    def additions(plan: Plan) -> Callable[[MergeSpec], CardAddition]:
        addition = card.additions(plan) if card else lambda spec: CardAddition()
        return lambda spec: replace(addition(spec), repository=repository or "")

    return additions
