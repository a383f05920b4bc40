"""A small Hub on this machine: enough of its HTTP interface for the real client, with commits kept in memory.

It also fails on demand: `POST /_fail` with `{"commit": 500}` makes every commit answer 500, `{"upload": "drop"}` closes the
connection in the middle of every upload, and `{}` ends all of it.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


Files = dict[str, bytes]
LFS_SUFFIXES = (".safetensors", ".png", ".bin")
TOKEN = "hf_test"


@dataclass
class Commit:
    oid: str
    message: str
    files: Files


@dataclass
class Repository:
    name: str
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": []})

    def commit(self, branch: str, message: str, files: Files) -> Commit:
        content = repr((branch, message, len(self.branches[branch]), sorted(files))).encode()
        commit = Commit(hashlib.sha1(content).hexdigest(), message, files)
        self.branches[branch].append(commit)
        return commit

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = (commit for branch in self.branches.values() for commit in branch)
        return next((commit for commit in commits if commit.oid == revision), None)


class Hub:
    """What the server holds: model repositories, names taken by other kinds of repositories, and uploaded files."""

    def __init__(self) -> None:
        self.models: dict[str, Repository] = {}
        self.taken: set[str] = set()
        self.uploads: dict[str, bytes] = {}
        self.failures: dict[str, int | str] = {}
        self.endpoint = ""

    def add_model(self, name: str, private: bool = False, files: Files | None = None) -> None:
        """Make a model repository with its first commit."""
        self.models[name] = Repository(name, private)
        attributes = {".gitattributes": b"*.safetensors filter=lfs\n"}
        self.models[name].commit("main", "initial commit", attributes | (files or {}))


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Print nothing."""

    def answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        self.answer(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def failing(self, what: str) -> bool:
        """Whether the request fails on demand; it is answered then."""
        failure = self.hub.failures.get(what)
        if failure == "drop":
            self.close_connection = True
            self.connection.close()
        elif failure is not None:
            self.answer(int(failure), {"error": f"{what} fails on demand"})
        return failure is not None

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repository = self.visible("/".join(parts[2:4]))
            if repository is None:
                return self.missing("RepoNotFound")
            what, revision = (parts[4:6] + ["main"])[:2] if len(parts) > 4 else ("revision", "main")
            commit = repository.find(revision)
            if commit is None:
                return self.missing("RevisionNotFound")
            if what == "tree":
                return self.answer(200, [self.entry(name, content) for name, content in commit.files.items()])
            information = {
                "id": "/".join(parts[2:4]),
                "modelId": "/".join(parts[2:4]),
                "sha": commit.oid,
                "private": repository.private,
                "siblings": [{"rfilename": name} for name in commit.files],
                "tags": [],
                "pipeline_tag": "image-segmentation",
                "library_name": "transformers",
            }
            return self.answer(200, information)
        if "resolve" in parts:
            return self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        self.missing("EntryNotFound")

    do_HEAD = do_GET

    def visible(self, name: str) -> Repository | None:
        repository = self.hub.models.get(name)
        hidden = repository is not None and repository.private and TOKEN not in self.headers.get("Authorization", "")
        return None if hidden else repository

    def file(self, repository_name: str, revision: str, name: str) -> None:
        repository = self.visible(repository_name)
        if repository is None:
            return self.missing("RepoNotFound")
        commit = repository.find(revision)
        if commit is None:
            return self.missing("RevisionNotFound")
        if name not in commit.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.oid}
            return self.answer(404, {"error": "no such file"}, headers)
        content = commit.files[name]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob_id(content)}"', "Accept-Ranges": "bytes"}
        if name.endswith(LFS_SUFFIXES):
            sha256 = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
        self.answer(200, content, headers)

    def entry(self, name: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "oid": blob_id(content), "size": len(content)}
        if name.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def do_POST(self) -> None:
        path, content = unquote(urlsplit(self.path).path), self.body()
        parts = path.strip("/").split("/")
        if path == "/_fail":
            self.hub.failures = json.loads(content)
            return self.answer(200, {})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if TOKEN not in self.headers.get("Authorization", "") and "info" not in parts:
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self.create(json.loads(content))
        if path.endswith("/info/lfs/objects/batch"):
            return self.answer(200, {"transfer": "basic", "objects": self.objects(json.loads(content))})
        if path.startswith("/_verify"):
            return self.answer(200, {})
        if parts[:2] == ["api", "models"] and len(parts) == 6:
            repository = self.hub.models.get("/".join(parts[2:4]))
            if repository is None:
                return self.missing("RepoNotFound")
            return getattr(self, f"post_{parts[4]}")(repository, parts[5], content)
        self.missing("EntryNotFound")

    def create(self, request: dict[str, Any]) -> None:
        name = f"{request['organization'] or 'me'}/{request['name']}"
        if self.failing("create"):
            return
        status = 409 if name in self.hub.models or name in self.hub.taken else 200
        if status == 200:
            self.hub.add_model(name, request.get("visibility") == "private")
        self.answer(status, {"url": f"{self.hub.endpoint}/{name}", "name": name})

    def objects(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Where to put each file; files that are there already need no upload."""
        answers = []
        for wanted in request["objects"]:
            answer = dict(wanted)
            if wanted["oid"] not in self.hub.uploads:
                hrefs = {name: f"{self.hub.endpoint}/_{name}/{wanted['oid']}" for name in ("upload", "verify")}
                answer["actions"] = {name: {"href": href, "header": {}} for name, href in hrefs.items()}
            answers.append(answer)
        return answers

    def post_branch(self, repository: Repository, branch: str, content: bytes) -> None:
        if branch in repository.branches:
            return self.answer(409, {"error": "Reference already exists"})
        repository.branches[branch] = list(repository.branches["main"])
        self.answer(201, {})

    def post_preupload(self, repository: Repository, revision: str, content: bytes) -> None:
        commit = repository.find(revision)
        if commit is None:
            return self.missing("RevisionNotFound")
        answers = []
        for file in json.loads(content)["files"]:
            present, mode = commit.files.get(file["path"]), "regular"
            if file["path"].endswith(LFS_SUFFIXES):
                mode = "lfs"
            oid = None
            if present is not None:
                oid = hashlib.sha256(present).hexdigest() if mode == "lfs" else blob_id(present)
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": answers})

    def post_commit(self, repository: Repository, revision: str, content: bytes) -> None:
        if self.failing("commit"):
            return
        lines = [json.loads(line) for line in content.splitlines()]
        files = dict(repository.find(revision).files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(revision, lines[0]["value"]["summary"], files)
        url = f"{self.hub.endpoint}/{repository.name}/commit/{commit.oid}"
        self.answer(200, {"commitOid": commit.oid, "commitUrl": url, "pullRequestUrl": None, "success": True})

    def do_PUT(self) -> None:
        if self.hub.failures.get("upload") == "drop":
            self.rfile.read(10)
        if self.failing("upload"):
            return
        content = self.body()
        self.hub.uploads[self.path.rsplit("/", 1)[-1]] = content
        self.answer(200, {})


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that answers at `hub.endpoint` until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
