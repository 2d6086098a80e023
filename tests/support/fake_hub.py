"""A Hugging Face hub on this machine: the requests that downloads make, over real HTTP.

Small files are answered directly, `.safetensors` as the hub answers large files: a redirect to
another path, with the size and the ETag in `X-Linked-*` headers.
"""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

from tests.support.serving import serving


@dataclasses.dataclass
class Revision:
    """A commit: files by name."""

    commit: str
    files: dict[str, bytes]


class FakeHub:
    """The server's content, what it was asked, and how it fails.

    `faults` are (pattern of "METHOD path", status, headers); the first that matches is the answer,
    and status 0 hangs up in the middle of one.
    `log` has "METHOD path" of every request; `sent` counts the bytes of files sent.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Revision]] = {}
        self.faults: list[tuple[str, int, dict[str, str]]] = []
        self.log: list[str] = []
        self.tokens: list[str | None] = []
        self.sent = 0
        self.url = self.cdn = ""

    def add(self, repo_id: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Publish files under a branch or tag; gives the commit."""
        content = json.dumps([[n, hashlib.sha1(b).hexdigest()] for n, b in sorted(files.items())])
        commit = hashlib.sha1(f"{repo_id}{content}".encode()).hexdigest()
        revisions = self.repositories.setdefault(repo_id, {})
        revisions[revision] = revisions[commit] = Revision(commit, dict(files))
        return commit

    def fetched(self) -> set[str]:
        """The names of the files whose content was asked for."""
        found = (
            re.match(r"GET /(?:cdn|[^/]+/[^/]+/resolve)/[^/]+/(.+)", line) for line in self.log
        )
        return {match[1] for match in found if match}


def _entry(name: str, data: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"size": len(data), "oid": oid}
    if name.endswith(".safetensors"):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
    return entry


def _handler(hub: FakeHub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def log_message(self, *args: Any) -> None:
            pass

        def _answer(self) -> None:
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            line = f"{self.command} {path}"
            hub.log.append(line)
            hub.tokens.append(self.headers.get("authorization"))
            for pattern, status, headers in hub.faults:
                if re.search(pattern, line) and status == 0:
                    self.close_connection = True
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\nsome bytes")
                    return None
                if re.search(pattern, line):
                    return self._send(status, b'{"error": "as the test asked"}', headers)
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path):
                return self._info(match[1], match[2] or "main")
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
                return self._tree(match[1], match[2])
            if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                return self._file(match[1], match[2], match[3])
            if match := re.fullmatch(r"/cdn/([0-9a-f]{64})/(.+)", path):
                return self._large(match[1])
            return self._send(404, b"{}")

        def _revision(self, repo_id: str, revision: str) -> Revision | None:
            if repo_id not in hub.repositories:
                # As the hub does: without a token nobody learns whether it exists.
                status = 404 if self.headers.get("authorization") else 401
                self._send(status, b'{"error": "x"}', {"X-Error-Code": "RepoNotFound"})
                return None
            found = hub.repositories[repo_id].get(revision)
            if found is None:
                self._send(404, b'{"error": "x"}', {"X-Error-Code": "RevisionNotFound"})
            return found

        def _info(self, repo_id: str, revision: str) -> None:
            found = self._revision(repo_id, revision)
            if found is None:
                return
            siblings = []
            for name, data in found.files.items():
                entry = _entry(name, data)
                sibling = {"rfilename": name, "size": entry["size"], "blobId": entry["oid"]}
                if "lfs" in entry:
                    lfs = entry["lfs"]
                    sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": 134}
                siblings.append(sibling)
            record = {"id": repo_id, "modelId": repo_id, "sha": found.commit, "siblings": siblings}
            self._send(200, json.dumps(record).encode())

        def _tree(self, repo_id: str, revision: str) -> None:
            found = self._revision(repo_id, revision)
            if found is None:
                return
            entries = [
                {"type": "file", "path": name, **_entry(name, data)}
                for name, data in found.files.items()
            ]
            for entry in entries:
                if "lfs" in entry:
                    entry["lfs"]["pointerSize"] = 134
            self._send(200, json.dumps(entries).encode())

        def _file(self, repo_id: str, revision: str, name: str) -> None:
            found = self._revision(repo_id, revision)
            if found is None:
                return None
            headers = {"X-Repo-Commit": found.commit}
            if name not in found.files:
                return self._send(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
            data = found.files[name]
            entry = _entry(name, data)
            if "lfs" in entry:
                sha = entry["lfs"]["oid"]
                headers |= {
                    "X-Linked-ETag": f'"{sha}"',
                    "X-Linked-Size": str(len(data)),
                    "Location": f"{hub.cdn}/cdn/{sha}/{name}",
                }
                return self._send(302, b"", headers)
            return self._send(200, data, {**headers, "ETag": f'"{entry["oid"]}"'}, is_file=True)

        def _large(self, sha: str) -> None:
            for revisions in hub.repositories.values():
                for revision in revisions.values():
                    for data in revision.files.values():
                        if hashlib.sha256(data).hexdigest() == sha:
                            return self._send(200, data, {"ETag": f'"{sha}"'}, is_file=True)
            return self._send(404, b"")

        def _send(
            self,
            status: int,
            data: bytes,
            headers: dict[str, str] | None = None,
            *,
            is_file: bool = False,
        ) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(data)
                if is_file:
                    hub.sent += len(data)

    return Handler


@contextlib.contextmanager
def running() -> Iterator[FakeHub]:
    """The hub, at `hub.url` until the block ends."""
    hub = FakeHub()
    with serving(_handler(hub)) as port:
        hub.url = f"http://127.0.0.1:{port}"
        hub.cdn = f"http://localhost:{port}"  # another host, which gets no token
        yield hub
