"""A hub on this machine: the calls that huggingface_hub makes to push and to load, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """Repositories by name: revision to files. The newest is ``main``."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.downloaded: list[str] = []
        self.refuses: int | None = None
        self.url = ""

    def commit(self, repo: str, files: dict[str, bytes], gone: Iterable[str] = ()) -> str:
        revisions = self.repos[repo]
        kept = {path: body for path, body in revisions["main"].items() if path not in gone} | files
        revision = hashlib.sha1(str(len(revisions)).encode(), usedforsecurity=False).hexdigest()
        revisions |= {"main": kept, revision: kept}
        return revision

    def add(self, repo: str, files: dict[str, bytes]) -> str:
        self.repos.setdefault(repo, {"main": {}})
        return self.commit(repo, files)

    def last(self, repo: str) -> str:
        return list(self.repos[repo])[-1]


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def answer(self, content: Any, status: int = 200, **headers: str) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if hub.refuses is not None:
                self.answer({"error": "no"}, hub.refuses)
            elif self.path == "/api/repos/create":
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}"
                if repo not in hub.repos and (asked.get("visibility") == "private" or asked.get("private")):
                    hub.private.add(repo)
                status = 409 if repo in hub.repos else 200
                hub.repos.setdefault(repo, {"main": {}})  # before the answer: the next request is another thread's
                self.answer({"url": f"{hub.url}/{repo}"}, status)
            elif self.path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                modes = {"uploadMode": "regular", "shouldIgnore": False}
                self.answer({"files": [{"path": file["path"], **modes} for file in json.loads(body)["files"]]})
            elif self.path.endswith("/commit/main"):
                repo = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
                lines = [json.loads(line) for line in body.splitlines()]
                files = {
                    line["value"]["path"]: base64.b64decode(line["value"]["content"])
                    for line in lines
                    if line["key"] == "file"
                }
                gone = {line["value"]["path"] for line in lines if line["key"] == "deletedFile"}
                revision = hub.commit(repo, files, gone)
                self.answer({"commitUrl": f"{hub.url}/{repo}/commit/{revision}", "commitOid": revision})
            else:
                self.answer({"error": self.path}, 501)

        def do_GET(self) -> None:
            if "/tree/" in self.path:
                files = hub.repos[self.path.removeprefix("/api/models/").partition("/tree/")[0]]["main"]
                self.answer([{"type": "file", "path": path, "oid": "", "size": 1} for path in files])
                return
            if "/resolve/" not in self.path:
                repo = self.path.removeprefix("/api/models/").partition("/revision/")[0]
                if repo in hub.repos:
                    self.answer({"id": repo, "sha": hub.last(repo), "private": repo in hub.private})
                else:
                    self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")
                return
            repo, _, rest = self.path[1:].partition("/resolve/")
            revision, _, file = rest.partition("/")
            found = hub.repos.get(repo, {}).get(revision)
            if repo not in hub.repos:
                self.answer({"error": "no repo"}, 404, X_Error_Code="RepoNotFound")
            elif found is None:
                self.answer({"error": "no revision"}, 404, X_Error_Code="RevisionNotFound")
            elif file not in found:
                self.answer({"error": "no file"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=hub.last(repo))
            else:
                if self.command == "GET":
                    hub.downloaded.append(file)
                commit = hub.last(repo) if revision == "main" else revision
                etag = hashlib.sha256(found[file]).hexdigest()
                self.answer(found[file], ETag=f'"{etag}"', X_Repo_Commit=commit)

        do_HEAD = do_GET  # noqa: N815  # the name that http.server calls

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
