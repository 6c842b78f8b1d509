"""A model hub on loopback: as much of the Hugging Face hub's interface as its client uses to fetch a model and to push one.

Files are kept in memory, by repository and revision. Uploads are of the kind that the hub calls regular; those of large files
(LFS, Xet) are not spoken.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What the server holds and was asked for.

    Attributes:
        files: content by (repository, revision) and name.
        claims: sizes that are claimed in place of the true ones, by name of the file.
        asked: method and path of every request.
    """

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.claims: dict[str, int] = {}
        self.asked: list[str] = []
        self.endpoint = ""

    def commit_of(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Name and files of a revision, which may be a branch or a commit."""
        for (name, branch), files in self.files.items():
            commit = hashlib.sha1(repr((name, branch, sorted(files.items()))).encode()).hexdigest()
            if name == repo and revision in (branch, commit):
                return commit, files
        return None


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers on loopback."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._file()

    def do_GET(self) -> None:
        self._file()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.asked.append(f"POST {self.path}")
        parts = self.path.strip("/").split("/")
        if parts[:2] == ["api", "repos"]:
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            known = (name, "main") in self.hub.files
            self.hub.files.setdefault((name, "main"), {})
            self._say(409 if known else 200, {"url": f"{self.hub.endpoint}/{name}", "error": "exists"})
        elif parts[1] == "validate-yaml":
            self._say(200, {"errors": [], "warnings": []})
        elif parts[4] == "branch":
            self.hub.files[f"{parts[2]}/{parts[3]}", parts[5]] = dict(self.hub.files[f"{parts[2]}/{parts[3]}", "main"])
            self._say(200, {})
        elif parts[4] == "preupload":
            files = [{"path": each["path"], "uploadMode": "regular"} for each in json.loads(body)["files"]]
            self._say(200, {"files": [{**each, "shouldIgnore": False, "oid": None} for each in files]})
        else:
            self._commit(f"{parts[2]}/{parts[3]}", parts[5], body)

    def _commit(self, repo: str, revision: str, body: bytes) -> None:
        for line in body.splitlines():
            said = json.loads(line)
            if said["key"] == "file":
                self.hub.files[repo, revision][said["value"]["path"]] = base64.b64decode(said["value"]["content"])
        found = self.hub.commit_of(repo, revision)
        assert found is not None
        self._say(200, {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{found[0]}", "commitOid": found[0], "success": True})

    def _file(self) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        parts = self.path.strip("/").split("/")
        if len(parts) < 5:
            return self._say(404, {})
        owner, repo, _, revision, *name = parts
        known = any(each == f"{owner}/{repo}" for each, _ in self.hub.files)
        found = self.hub.commit_of(f"{owner}/{repo}", revision)
        if not known or found is None:
            return self._say(404, {}, {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
        commit, files = found
        content = files.get("/".join(name))
        if content is None:
            return self._say(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        size = self.hub.claims.get(name[-1], len(content))
        self.send_response(200)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Content-Length": str(size)}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
        return None

    def _say(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(text)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass
