"""`rewarded-lines push`, and the upload after a merge."""

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
_PRIVATE = "Make the repository private."
_REVISION = "Upload to this branch; main by default."


@dataclass(frozen=True)
class MergePublishing:
    """The run that a merge's model card shows, and the repository that receives the merged folder."""

    run: Path | None = option(
        None,
        "A run of these policies: its scores and figure appear on the model card. "
        "Default: `sweep` beside the project file, if it has a report.",
        rich_help_panel=_PANEL,
        offers=run_folders,
    )
    push_to_hub: str | None = option(
        None, "Upload the merged folder to the Hub.", metavar="OWNER/NAME", rich_help_panel=_PANEL
    )
    private: bool = option(False, _PRIVATE, rich_help_panel=_PANEL)
    revision: str | None = option(None, _REVISION, metavar="BRANCH", rich_help_panel=_PANEL)

    def check(self, outputs: int) -> None:
        """Refuse before the merge what would fail after it."""
        if self.push_to_hub is None:
            if self.private or self.revision:
                where = "--private" if self.private else "--revision"
                raise fail("nothing is uploaded", where=where, remedy="add --push-to-hub OWNER/NAME")
            return
        if outputs > 1:
            raise fail(
                "one repository holds one model",
                where="--push-to-hub",
                expected="one --lam",
                got=str(outputs),
                remedy="upload each folder afterwards: rewarded-lines push FOLDER OWNER/NAME",
            )
        from rewarded_lines.hub.push import check_ready, check_repository

        check_repository(self.push_to_hub)
        check_ready()


def upload(folder: Path, repository: str, private: bool, revision: str | None, quiet: bool) -> str:
    """Upload a merged folder; return the address of the commit."""
    from rewarded_lines.hub.push import push as run_push

    with stdout_for_results():
        return run_push(folder, repository, private=private, revision=revision, quiet=quiet)


def push(
    folder: Annotated[Path, typer.Argument(help="Folder that `merge` wrote.", show_default=False)],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository of the Hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help=_PRIVATE)] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help=_REVISION)] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Upload a merged folder to the Hub: model, card and figure.

    A failed upload goes on where it stopped: files that arrived are not
    sent again. The token comes from HF_TOKEN or `hf auth login`. All files
    but hidden ones are uploaded; merge.json names the inputs' folders.

    \b
    rewarded-lines push merged me/my-merge
    rewarded-lines push merged me/my-merge --private --revision second-try
    """
    address = upload(folder, repository, private, revision, quiet or as_json)
    if as_json:
        show_json({"folder": str(folder), "repository": repository, "commit": address})
    else:
        show_line(address)
