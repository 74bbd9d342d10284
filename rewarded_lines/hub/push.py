"""The verb `push`: upload a merged folder to the Hub without sending again what has arrived.

The Hub's library reads the token from HF_TOKEN or its login file; this file takes, shows and keeps no token.
"""

from __future__ import annotations

import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rewarded_lines.errors import UserError, fail, masked
from rewarded_lines.merger.input_cards import CARD_FILE
from rewarded_lines.merger.record import RECORD_FILE

_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+", re.ASCII)
# Files of an earlier model in the repository, which readers would load.
_REPLACED = ["model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "adapter_config.json"]
_REMEDIES = {
    401: "log in with `hf auth login`, or set HF_TOKEN to a token that may write",
    403: "use a token that may write there, and its owner's name",
    404: "check the owner's name, and that your token may see the repository",
}


def push(
    folder: str | Path, repository: str, *, private: bool = False, revision: str | None = None, quiet: bool = False
) -> str:
    """Upload a merged folder to a model repository of the Hub; return the address of the commit.

    All files are uploaded except hidden ones; `merge.json` has the paths of the inputs on this machine. A failed or
    killed upload goes on when started again: files that have arrived (with hf-xet, pieces of files) are not sent again.
    The branch changes only when everything has arrived; the same commit deletes the weights of an earlier model.

    Args:
        folder: a folder that `merge` wrote.
        repository: its Hub id, `owner/name`; made if it does not exist.
        private: make the repository private; an existing one is not changed.
        revision: the branch, made if it does not exist; by default `main`.
        quiet: show no progress.

    Raises:
        UserError: not a merged folder, no token, or a refusal of the Hub; the message has the command that goes on.
    """
    folder = Path(folder).expanduser()
    check_repository(repository)
    _check_folder(folder)
    check_ready()
    with _quiet_library(quiet):
        try:
            return _upload(folder, repository, private, revision)
        except Exception as error:  # noqa: BLE001 - four libraries raise their own errors for networks
            raise _failed(error, folder, repository, private, revision) from None


def check_repository(repository: str) -> None:
    """Refuse a text that cannot be the id of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        valid = bool(_ID.fullmatch(repository))
    except HFValidationError:
        valid = False
    if not valid:
        expected = "owner/name, of letters, digits, `-`, `_` and `.`, the name at most 96 of them"
        raise fail("not the id of a repository", where="--push-to-hub", expected=expected, got=masked(repository))


def check_ready() -> None:
    """Refuse to start without a token, or when the Hub's library must stay offline."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise fail("the Hub's library must stay offline", where="HF_HUB_OFFLINE", remedy="unset it to upload")
    if not get_token():
        raise fail(
            "no token for the Hub",
            where="--push-to-hub",
            expected="a token that may write, in HF_TOKEN or in the login file, not as an option",
            remedy="log in with `hf auth login`",
        )


def push_command(folder: Path, repository: str, private: bool = False, revision: str | None = None) -> str:
    """Return the command that uploads a merged folder."""
    words = ["rewarded-lines", "push", str(folder), repository, *(["--private"] if private else [])]
    return shlex.join([*words, *(["--revision", revision] if revision else [])])


def _check_folder(folder: Path) -> None:
    missing = [name for name in (RECORD_FILE, CARD_FILE) if not (folder / name).is_file()]
    if missing:
        raise fail(
            "not a merged folder",
            where=str(folder),
            expected=f"a folder that `rewarded-lines merge` wrote, with its {RECORD_FILE} and {CARD_FILE}",
            got=f"no {' and no '.join(missing)}" if folder.is_dir() else "no such folder",
        )


def _upload(folder: Path, repository: str, private: bool, revision: str | None) -> str:
    from huggingface_hub import HfApi

    hub = HfApi(library_name="rewarded-lines")
    # None is the owner's default.
    hub.create_repo(repository, private=private or None, exist_ok=True)
    if revision and revision != "main":
        hub.create_branch(repository, branch=revision, exist_ok=True)
    made = hub.upload_folder(
        repo_id=repository,
        folder_path=folder,
        revision=revision,
        commit_message="Upload a merge made by rewarded-lines",
        ignore_patterns=[".*", "*/.*"],
        delete_patterns=_REPLACED,
    )
    return str(made.commit_url)


@contextmanager
def _quiet_library(quiet: bool) -> Iterator[None]:
    """Let the Hub's library show only its progress: its notices hold signed addresses."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    silent, verbosity = are_progress_bars_disabled(), logging.get_verbosity()
    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if not silent:
            enable_progress_bars()


def _failed(error: Exception, folder: Path, repository: str, private: bool, revision: str | None) -> UserError:
    """Return one error: the Hub's message, and how to go on."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else None
    messages = [masked(_first_line(one)) for one in (error, cause) if one is not None]
    response = getattr(cause or error, "response", None)
    remedy = _REMEDIES.get(getattr(response, "status_code", 0), "what has arrived is not sent again")
    return fail(
        "the upload failed; the merged folder is whole",
        where=repository,
        got="; ".join(messages),
        remedy=f"{remedy}; go on with: {push_command(folder, repository, private, revision)}",
    )


def _first_line(error: BaseException) -> str:
    """Return an error's message in one line, without the queries of addresses, which may be signatures."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The last line of the Hub's errors is the server's message.
    text = " ".join(dict.fromkeys([*lines[:1], *lines[-1:]])) or type(error).__name__
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)
