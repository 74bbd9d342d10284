"""What the command line adds to the cards of merges: the scores of a run, and the Hub id.

This file is apart from `run_card` so that merges without a run load no library that reads runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rewarded_lines.extras import RUNS, install, is_installed, require
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
    folder = run or project.parent / RUN_FOLDER
    if run is not None:
        require("report", "--run", *RUNS)
    has_run = run is not None or (project.is_file() and folder.is_dir())
    if not has_run and repository is None:
        return None

    def additions(plan: Plan) -> Callable[[MergeSpec], CardAddition]:
        readable = all(map(is_installed, RUNS))
        if has_run and not readable:
            plan.notes.append(f"the model card lacks the scores of {folder}; to read them: {install('report')}")
        if not (has_run and readable):
            return lambda spec: CardAddition(repository=repository or "")
        from rewarded_lines.hub.run_card import run_additions

        addition = run_additions(folder, plan, required=run is not None)
        return lambda spec: replace(addition(spec), repository=repository or "")

    return additions
