"""The half of the Hub of our own that takes uploads: repositories made, large files by LFS or Xet, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import yaml

if TYPE_CHECKING:
    from stand_in_hub import StandInHub

# The Hub keeps these as large files whatever their size.
LARGE = (".safetensors", ".png", ".parquet")
BRANCHES = ".branches"
XET = "xet"


class Uploads(BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks when it uploads a model, and what hf-xet does.

    Of what hf-xet sends, only that it was sent is kept: pieces of files and their order have a format of their own.
    """

    server: StandInHub

    def do_POST(self) -> None:
        """Answer everything but the large files themselves."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self._refused(body):
            return
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:3] == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif parts[:2] == ["api", "validate-yaml"]:
            self._validate(json.loads(body)["content"])
        elif parts[2:] == ["info", "lfs", "objects", "batch"]:
            self._batch(**json.loads(body))
        elif parts[2:] == ["info", "lfs", "verify"] or parts[-1] == "telemetry":
            self._json(200, {})
        elif parts[0] == XET:
            self._xet(parts[1:], body)
        elif not (folder := self.server.root.joinpath(*parts[2:4])).is_dir():
            self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif parts[4] == "branch":
            self._branch(folder, parts[5])
        elif parts[4] == "preupload":
            self._preupload(self.server.branch(folder, parts[5]), json.loads(body)["files"])
        else:
            self._commit(self.server.branch(folder, parts[5]), [json.loads(line) for line in body.splitlines()])

    def do_PUT(self) -> None:
        """Take a large file."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self._refused(body):
            return
        digest = urlsplit(self.path).path.split("/")[-1]
        if hashlib.sha256(body).hexdigest() != digest:
            return self._json(400, {"error": "another file"})
        self.server.large[digest] = body
        self._json(200, {})

    def _refused(self, body: bytes) -> bool:
        """Refuse a request without the token, or one that a test wants refused; the answer says too much."""
        self.server.asked.append((self.command, self.path))
        self.server.sent.append((self.command, self.path, body))
        told = self.headers.get("Authorization", "")
        code = next((code for part, code in self.server.refused.items() if part in self.path), 0)
        known = self.server.tokens and f"/{XET}/" not in self.path and "telemetry" not in self.path
        if not code and known and self.command == "POST" and told[7:] not in self.server.tokens:
            code = 401
        if code:
            self._json(code, {"error": f"refused: {told}"}, {"X-Error-Message": f"refused: {told}"})
        return bool(code)

    def _xet(self, parts: list[str], body: bytes) -> None:
        """Take pieces of files (xorbs), and what files are made of (shards), by the first version of the protocol."""
        if parts[:2] == ["v1", "xorbs"]:
            new = parts[-1] not in self.server.pieces
            self.server.pieces[parts[-1]] = body
            self._json(200, {"was_inserted": new})
        elif parts == ["v1", "shards"]:
            self._json(200, {"result": 1})
        else:
            self._json(404, {})

    def xet_token(self) -> None:
        """Send the way to the storage of pieces, with the token for it."""
        token, until, place = "xet-token", str(int(time.time()) + 3600), f"{self.server.url}/{XET}"
        content = {"accessToken": token, "exp": int(until), "casUrl": place}
        headers = {"X-Xet-Cas-Url": place, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": until}
        self._json(200, content, headers)

    def _create(self, content: dict) -> None:
        name = f"{content['organization']}/{content['name']}"
        if (self.server.root / name).is_dir():
            return self._json(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"})
        (self.server.root / name).mkdir(parents=True)
        # huggingface_hub up to 1 says `private`.
        self.server.visibility[name] = content.get("visibility") or ("private" if content.get("private") else "")
        self._json(200, {"url": f"{self.server.url}/{name}", "name": name})

    def _branch(self, folder: Path, name: str) -> None:
        place = folder / BRANCHES / name
        if place.is_dir():
            return self._json(409, {"error": "Reference already exists"})
        shutil.copytree(folder, place, ignore=shutil.ignore_patterns(BRANCHES))
        self._json(200, {})

    def _validate(self, content: str) -> None:
        """Accept metadata as the Hub does: a mapping, with a licence that is a word, and names of models."""
        found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        metadata = yaml.safe_load(found[1]) if found else {}
        models = metadata.get("base_model", [])
        right = all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in models)
        right = right and re.fullmatch(r"[a-z0-9.+-]+", metadata.get("license", "other")) is not None
        answer = {"errors": [] if right else [{"message": "not what the Hub takes"}], "warnings": []}
        self._json(200 if right else 400, answer)

    def _preupload(self, folder: Path, files: list[dict]) -> None:
        answer = []
        for file in files:
            large = file["path"].endswith(LARGE)
            there = folder / file["path"]
            raw = there.read_bytes() if there.is_file() else None
            known = None if raw is None else (hashlib.sha256(raw).hexdigest() if large else git_hash(raw))
            mode = "lfs" if large else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known})
        self._json(200, {"files": answer})

    def _batch(self, objects: list[dict], transfers: list[str], **_: object) -> None:
        """Say what is to be sent: nothing of what has arrived. huggingface_hub up to 1 asks here for Xet, too."""
        if "xet" in transfers:
            return self._json(200, {"transfer": "xet", "objects": objects})
        name = "/".join(urlsplit(self.path).path.split("/")[1:3])
        actions = {
            one["oid"]: {
                "upload": {"href": f"{self.server.url}/storage/{one['oid']}?signature=lets-others-in"},
                "verify": {"href": f"{self.server.url}/{name}/info/lfs/verify"},
            }
            for one in objects
            if one["oid"] not in self.server.large
        }
        told = [{**one, "actions": actions[one["oid"]]} if one["oid"] in actions else one for one in objects]
        self._json(200, {"transfer": "basic", "objects": told})

    def _commit(self, folder: Path, lines: list[dict]) -> None:
        self.server.commits.append(lines)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                # By Xet its pieces have come, in a format of their own.
                content = self.server.large.get(value["oid"]) or f"oid sha256:{value['oid']}\n".encode()
                (folder / value["path"]).write_bytes(content)
            elif line["key"] == "deletedFile":
                (folder / value["path"]).unlink()
        oid = hashlib.sha1(repr(lines).encode()).hexdigest()
        name = "/".join(folder.relative_to(self.server.root).parts[:2])
        self._json(200, {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid})

    def _json(self, code: int, content: object, headers: dict[str, str] | None = None) -> None:
        self._send(code, json.dumps(content).encode(), headers)

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        raise NotImplementedError


def git_hash(raw: bytes) -> str:
    """Return the name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()
