"""A hub on this machine: repositories in memory, by the parts of the hub's protocol that up- and downloads use."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"


class Hub:
    """Repositories by name: {path: content}. `asked` has what was asked for, `private` which repositories are."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.asked: list[str] = []
        self.url = ""

    def sha(self, repo: str) -> str:
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()

    def create(self, body: dict[str, Any]) -> tuple[int, Any]:
        repo = f"{body.get('organization') or 'me'}/{body['name']}"
        there = repo in self.repos
        self.repos.setdefault(repo, {})
        if not there and (body.get("visibility") == "private" or body.get("private")):
            self.private.add(repo)
        found = {"url": f"{self.url}/{repo}", "name": repo, "id": repo}
        return (409 if there else 200), found

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> Any:
        files = self.repos[repo]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
            else:
                assert line["key"] == "header", line["key"]
        sha = self.sha(repo)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo}/commit/{sha}", "hookOutput": ""}

    def tree(self, repo: str) -> Any:
        return [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in self.repos[repo].items()
        ]

    def info(self, repo: str) -> Any:
        files = [{"rfilename": path} for path in self.repos[repo]]
        return {"id": repo, "modelId": repo, "sha": self.sha(repo), "siblings": files, "private": repo in self.private}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.hub.asked.append(f"POST {self.path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
        elif parts[1:] == ["repos", "create"]:
            self.answer(*self.hub.create(json.loads(body)))
        elif parts[1] == "validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif parts[4] == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif parts[4] == "commit":
            lines = [json.loads(line) for line in body.decode().splitlines()]
            self.answer(200, self.hub.commit("/".join(parts[2:4]), lines))
        else:
            self.answer(404, {"error": self.path})

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.hub.asked.append(f"{self.command} {self.path}")
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        if repo not in self.hub.repos:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif api:
            self.answer(200, self.hub.tree(repo) if "tree" in parts else self.hub.info(repo))
        else:
            content = self.hub.repos[repo].get("/".join(parts[4:]))
            if content is None:
                self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            else:
                sha = hashlib.sha1(content).hexdigest()
                self.answer(200, content, {"ETag": f'"{sha}"', "X-Repo-Commit": self.hub.sha(repo)})

    do_HEAD = do_GET


@contextmanager
def local_hub() -> Iterator[Hub]:
    """A hub at `url`, for a process whose HF_ENDPOINT that is."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
