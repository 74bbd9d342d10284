"""A Hub of our own on the loopback interface: what downloads and uploads of models, and downloads of data sets, ask of
the real one over HTTP."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from stand_in_uploads import BRANCHES, Uploads, git_hash

COMMIT = hashlib.sha1(b"the only one").hexdigest()


class StandInHub(ThreadingHTTPServer):
    """Serves every folder `organisation/name` below a root as a model, and `datasets/organisation/name` as a data set;
    counts what it is asked. Models can be uploaded, to branches too. Of other revisions, whichever is asked for, there
    is the one that the folder holds.

    Attributes:
        asked: method and path of every request.
        fault: what goes wrong: "" for nothing, "cut" (files end early), "broken" (500), "garbled" (no JSON),
            "outside" (a model lists a file outside of itself).
        tokens: those that may upload; any may when there are none.
        refused: the status of the answer to uploads whose path has a text in it.
        sent: method, path and body of every request of an upload.
        large: the content of large files that have arrived, by SHA-256.
        pieces: of large files that have come by Xet.
        commits: the lines of every commit.
        visibility: of each repository that was made, as it was asked for.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.asked: list[tuple[str, str]] = []
        self.fault = ""
        self.tokens: set[str] = set()
        self.refused: dict[str, int] = {}
        self.sent: list[tuple[str, str, bytes]] = []
        self.large: dict[str, bytes] = {}
        self.pieces: dict[str, bytes] = {}
        self.commits: list[list[dict]] = []
        self.visibility: dict[str, str] = {}

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that have gone: one failed upload ends those beside it."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def branch(self, folder: Path, name: str) -> Path:
        """Return the place of a model's branch."""
        place = folder / BRANCHES / name
        return place if place.is_dir() else folder

    @property
    def url(self) -> str:
        """Return what belongs into HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def stand_in_hub(root: Path) -> Iterator[StandInHub]:
    """Serve `root` while the block runs."""
    with StandInHub(root) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(Uploads):
    server: StandInHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer `/api/KIND/ID/ACTION/REVISION/...` and `/ID/resolve/REVISION/FILE`, where a data set's ID begins with
        `datasets/`."""
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        self.server.asked.append((self.command, self.path))
        if self.server.fault == "broken":
            return self._send(500, b"out of order")
        if "xet-write-token" in parts:
            return self.xet_token()
        api = parts[0] == "api"
        if api and len(parts) < 4:
            # What the Hub's library may ask beside what it is told to do.
            return self._send(404, b"{}")
        if api:
            parts = parts[1:] if parts[1] == "datasets" else parts[2:]
        start = 3 if parts[0] == "datasets" else 2
        folder = self.server.root.joinpath(*parts[:start])
        if not folder.is_dir():
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        action, path = parts[start : start + 1], parts[start + 2 :]
        folder = self.server.branch(folder, parts[start + 1]) if action else folder
        if api:
            return self._describe(folder, folder.joinpath(*path) if action == ["tree"] else None, url.query)
        file = folder.joinpath(*path)
        if not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        raw = file.read_bytes()
        self._send(200, raw, {"X-Repo-Commit": COMMIT, "ETag": f'"{git_hash(raw)}"'}, cut=self.server.fault == "cut")

    do_HEAD = do_GET

    def _describe(self, folder: Path, below: Path | None, query: str) -> None:
        """Send what `folder` is, or what there is `below` a folder in it."""
        content: object = {"id": "/".join(folder.parts[-2:]), "sha": COMMIT, "siblings": []}
        if below is not None:
            if not below.is_dir():
                return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            found = below.glob("*") if "recursive=false" in query.lower() else below.rglob("*")
            found = [path for path in sorted(found) if BRANCHES not in path.relative_to(folder).parts]
            content = [_entry(path, str(path.relative_to(folder))) for path in found]
            if self.server.fault == "outside":
                content.append({"type": "file", "path": "../../../../outside.json", "size": 2, "oid": git_hash(b"{}")})
        self._send(200, b"<html>" if self.server.fault == "garbled" else json.dumps(content).encode())

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def _entry(path: Path, name: str) -> dict[str, object]:
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": git_hash(name.encode())}
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": git_hash(path.read_bytes())}
