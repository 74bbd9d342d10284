"""A Hub of our own on the loopback interface: as much of its HTTP interface as a snapshot's download asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = hashlib.sha1(b"the only one").hexdigest()


class StandInHub(ThreadingHTTPServer):
    """Serves every folder `organisation/name` below a root as a model; counts what it is asked.

    Attributes:
        asked: method and path of every request.
        fault: what goes wrong: "" for nothing, "cut" (files end early), "broken" (500), "garbled" (no JSON),
            "outside" (a model lists a file outside of itself).
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.asked: list[tuple[str, str]] = []
        self.fault = ""

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


class _Handler(BaseHTTPRequestHandler):
    server: StandInHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.server.asked.append((self.command, self.path))
        if self.server.fault == "broken":
            return self._send(500, b"out of order")
        model = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        folder = self.server.root / model
        if not folder.is_dir():
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if parts[0] == "api":
            content = self._tree(folder) if "tree" in parts else {"id": model, "sha": COMMIT, "siblings": []}
            garbled = self.server.fault == "garbled"
            return self._send(200, b"<html>" if garbled else json.dumps(content).encode())
        file = folder.joinpath(*parts[4:])
        if not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        raw = file.read_bytes()
        self._send(200, raw, {"X-Repo-Commit": COMMIT, "ETag": f'"{_digest(raw)}"'}, cut=self.server.fault == "cut")

    do_HEAD = do_GET

    def _tree(self, folder: Path) -> list[dict[str, object]]:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        listed = [(str(path.relative_to(folder)), path.read_bytes()) for path in files]
        if self.server.fault == "outside":
            listed.append(("../../../../outside.json", b"{}"))
        return [{"type": "file", "path": name, "size": len(raw), "oid": _digest(raw)} for name, raw in listed]

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def _digest(raw: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()
