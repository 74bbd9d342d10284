"""`rewarded-lines push`, and the upload of what `merge` has made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from rewarded_lines.cli.display import show_json, show_line, stdout_for_results
from rewarded_lines.cli.parameters import AsJson, Quiet, run_folders
from rewarded_lines.errors import fail
from rewarded_lines.options import option

_PANEL = "Publishing"
_PRIVATE = "Upload into a repository that only its owner sees."
_REVISION = "Upload to this branch; main by default."


@dataclass(frozen=True)
class MergePublishing:
    """What the model card of a merge shows beside it, and where the merged folder is uploaded."""

    run: Path | None = option(
        None,
        "A run of these policies: the model card shows the scores of this merge, and the figure. "
        "Default: `sweep` beside the project file, if it is one and has its report.",
        rich_help_panel=_PANEL,
        offers=run_folders,
    )
    push_to_hub: str | None = option(
        None, "Upload the merged folder to the Hub.", metavar="OWNER/NAME", rich_help_panel=_PANEL
    )
    private: bool = option(False, _PRIVATE, rich_help_panel=_PANEL)
    revision: str | None = option(None, _REVISION, metavar="BRANCH", rich_help_panel=_PANEL)


@dataclass(frozen=True)
class Destination:
    """Where a merged folder is uploaded."""

    repository: str
    private: bool
    revision: str | None

    @classmethod
    def checked(cls, asked: MergePublishing, outputs: int) -> Destination | None:
        """Return where the output of a merge is uploaded; None where it is not.

        Raises:
            UserError: everything that can be known to be wrong before the merge.
        """
        if asked.push_to_hub is None:
            if asked.private or asked.revision:
                where = "--private" if asked.private else "--revision"
                raise fail("nothing is uploaded", where=where, remedy="add --push-to-hub OWNER/NAME")
            return None
        if outputs > 1:
            where, remedy = "--push-to-hub", "upload each folder afterwards: rewarded-lines push FOLDER OWNER/NAME"
            raise fail(
                "one repository holds one model", where=where, expected="one --lam", got=str(outputs), remedy=remedy
            )
        from rewarded_lines.hub.push import check_ready, check_repository

        check_repository(asked.push_to_hub)
        check_ready()
        return cls(asked.push_to_hub, asked.private, asked.revision)

    def push(self, folder: Path, quiet: bool) -> str:
        """Upload a merged folder; return the address of the commit."""
        from rewarded_lines.hub.push import push as upload

        with stdout_for_results():
            return upload(folder, self.repository, private=self.private, revision=self.revision, quiet=quiet)


def push(
    folder: Annotated[Path, typer.Argument(help="Folder that `merge` wrote.", show_default=False)],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Of the Hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help=_PRIVATE)] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help=_REVISION)] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Upload a merged folder to the Hub: model, card and figure.

    An upload that failed goes on where it stopped: files that arrived are
    not sent again. The token comes from HF_TOKEN or `hf auth login`. All
    files but hidden ones are uploaded; merge.json names the inputs' folders.

    \b
    rewarded-lines push merged me/my-merge
    rewarded-lines push merged me/my-merge --private --revision second-try
    """
    address = Destination(repository, private, revision).push(folder, quiet=quiet or as_json)
    if as_json:
        show_json({"folder": str(folder), "repository": repository, "commit": address})
    else:
        show_line(address)
