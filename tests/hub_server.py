"""A small Hub on the loopback address: enough of its HTTP interface for real clients in tests, with errors on demand.

It keeps repositories in memory, one branch each, and records every request. Clients find its
address in HF_ENDPOINT; see `Hub.environment`.
"""

import base64
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_ABOVE = 1000  # bytes; larger files are uploaded apart from the commit, as on the Hub
KINDS = {"datasets": "dataset", "models": "model", "spaces": "space"}


@dataclass
class Repo:
    """Files of each commit; the last one is the branch main."""

    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=lambda: [(_sha(b"empty"), {})])

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(sha, path -> content) of a revision."""
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class Hub(ThreadingHTTPServer):
    """The server; use it as a context manager.

    Attributes:
        repos: (kind, user/name) -> repository; kind is "dataset", "model" or "space".
        requests: "METHOD path" of every request so far, the query left out.
        error_status: Called with each such text; returns the HTTP status of an error to answer with, or None. Clients
            that retry are asked to do so at once.
        delay: Called with each such text; returns the seconds to wait before the answer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}  # large files, by their SHA-256
        self.requests: list[str] = []
        self.error_status: Callable[[str], int | None] = lambda request: None
        self.delay: Callable[[str], float] = lambda request: 0.0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.shutdown()
        self.server_close()

    def environment(self, cache: Path) -> dict[str, str]:
        """Environment of a process that takes this server for the Hub and `cache` for its cache."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return inherited | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        body = self._read_body()
        request = f"{self.command} {path}"
        with self.server.lock:
            self.server.requests.append(request)
            status = self.server.error_status(request)
        time.sleep(self.server.delay(request))
        if status is not None:
            return self._json({"error": f"error {status} on demand"}, status, headers={"Retry-After": "0"})
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                with self.server.lock:
                    named = {name: value for name, value in match.groupdict().items() if value is not None}
                    return answer(self, body, parse_qs(parts.query), **named)
        self._json({"error": f"no such route: {request}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    # ---- answers ----

    def whoami(self, body: bytes, query: dict) -> None:
        self._json({"type": "user", "name": "user", "fullname": "User", "orgs": [], "auth": {"type": "access_token"}})

    def may_write(self, body: bytes, query: dict, kind: str, repo: str) -> None:
        if self._find(KINDS[kind], repo, "main") is not None:
            self._json({})

    def create(self, body: bytes, query: dict) -> None:
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        key = wanted.get("type") or "model", repo_id
        status = 409 if key in self.server.repos else 200
        self.server.repos.setdefault(key, Repo())
        prefix = {"dataset": "datasets/", "space": "spaces/"}.get(key[0], "")
        self._json({"url": f"{self.server.url}/{prefix}{repo_id}", "name": repo_id, "id": repo_id}, status)

    def validate_yaml(self, body: bytes, query: dict) -> None:
        self._json({"errors": [], "warnings": []})

    def info(self, body: bytes, query: dict, kind: str, repo: str, revision: str = "main") -> None:
        found = self._find(KINDS[kind], repo, revision)
        if found is not None:
            sha, files = found
            siblings = [{"rfilename": path, "size": len(data)} for path, data in sorted(files.items())]
            self._json({"id": repo, "sha": sha, "private": False, "gated": False, "disabled": False, "tags": [],
                        "downloads": 0, "likes": 0, "siblings": siblings})  # fmt: skip

    def tree(self, body: bytes, query: dict, kind: str, repo: str, revision: str, folder: str = "") -> None:
        found = self._find(KINDS[kind], repo, revision)
        if found is None:
            return
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries: dict[str, dict] = {}
        for path, data in sorted(found[1].items()):
            rest = path.removeprefix(prefix)
            if not path.startswith(prefix):
                continue
            parents = rest.split("/")[:-1]
            for depth in range(1, len(parents) + 1 if recursive else min(len(parents), 1) + 1):
                name = prefix + "/".join(parents[:depth])
                entries[name] = {"type": "directory", "path": name, "oid": _sha(name.encode()), "size": 0}
            if recursive or not parents:
                entries[path] = _file_info(path, data)
        if prefix and not entries:
            return self._missing_entry()
        self._json(list(entries.values()))

    def paths_info(self, body: bytes, query: dict, kind: str, repo: str, revision: str) -> None:
        found = self._find(KINDS[kind], repo, revision)
        if found is None:
            return
        text = body.decode()
        paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
        answer = []
        for path in [paths] if isinstance(paths, str) else paths:
            if path in found[1]:
                answer.append(_file_info(path, found[1][path]))
            elif any(name.startswith(f"{path}/") for name in found[1]):
                answer.append({"type": "directory", "path": path, "oid": _sha(path.encode()), "size": 0})
        self._json(answer)

    def preupload(self, body: bytes, query: dict, kind: str, repo: str, revision: str) -> None:
        modes = {file["path"]: "lfs" if file["size"] > LFS_ABOVE else "regular" for file in json.loads(body)["files"]}
        files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        self._json({"files": files})

    def lfs_batch(self, body: bytes, query: dict, repo: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.objects:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects}, content_type="application/vnd.git-lfs+json")

    def lfs_put(self, body: bytes, query: dict, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._json({"error": "content does not match its SHA-256"}, 400)
        self.server.objects[oid] = body
        self._json({})

    def commit(self, body: bytes, query: dict, kind: str, repo: str, revision: str) -> None:
        found = self._find(KINDS[kind], repo, revision)
        if found is None:
            return
        files = dict(found[1])
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        repository = self.server.repos[KINDS[kind], repo]
        sha = _sha(repr((len(repository.commits), sorted(files))).encode())
        repository.commits.append((sha, files))
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{kind}/{repo}/commit/{sha}",
                    "hookOutput": "", "pullRequestUrl": None})  # fmt: skip

    def resolve(self, body: bytes, query: dict, repo: str, revision: str, path: str, kind: str = "models") -> None:
        found = self._find(KINDS[kind], repo, revision)
        if found is None:
            return
        sha, files = found
        if path not in files:
            return self._missing_entry({"X-Repo-Commit": sha})
        data = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        status, wanted = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            start, end = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            status, data = 206, data[start : end + 1]
        self._answer(data, status, "application/octet-stream", headers)

    # ---- plumbing ----

    def _find(self, kind: str, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """A revision's files; answers itself where there are none."""
        repository = self.server.repos.get((kind, repo))
        if repository is None:
            self._json({"error": "Repository not found"}, 404, headers={"X-Error-Code": "RepoNotFound"})
            return None
        found = repository.files(revision)
        if found is None:
            self._json({"error": "Invalid rev id"}, 404, headers={"X-Error-Code": "RevisionNotFound"})
        return found

    def _missing_entry(self, headers: dict[str, str] | None = None) -> None:
        self._json({"error": "Entry not found"}, 404, headers={"X-Error-Code": "EntryNotFound"} | (headers or {}))

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(
        self,
        value: Any,
        status: int = 200,
        headers: dict[str, str] | None = None,
        content_type: str = "application/json",
    ) -> None:
        self._answer(json.dumps(value).encode(), status, content_type, headers or {})

    def _answer(self, data: bytes, status: int, content_type: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _sha(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _file_info(path: str, data: bytes) -> dict[str, Any]:
    info = {"type": "file", "path": path, "size": len(data), "oid": _sha(data)}
    if len(data) > LFS_ABOVE:
        info["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return info


_REPO, _REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
_API = rf"/api/(?P<kind>datasets|models|spaces)/{_REPO}"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("GET", rf"{_API}/auth-check/write", Handler.may_write),
    ("GET", _API, Handler.info),
    ("GET", rf"{_API}/revision/{_REVISION}", Handler.info),
    ("GET", rf"{_API}/tree/{_REVISION}(?P<folder>/.*)?", Handler.tree),
    ("POST", rf"{_API}/paths-info/{_REVISION}", Handler.paths_info),
    ("POST", rf"{_API}/preupload/{_REVISION}", Handler.preupload),
    ("POST", rf"{_API}/commit/{_REVISION}", Handler.commit),
    ("POST", rf"/(?:datasets/|spaces/)?{_REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("GET|HEAD", rf"/(?P<kind>datasets)/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", Handler.resolve),
    ("GET|HEAD", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", Handler.resolve),
]
