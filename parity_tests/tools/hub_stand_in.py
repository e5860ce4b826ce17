"""A stand-in of the Hugging Face hub: the part of its HTTP interface that its client calls for what we do.

Repositories, commits and files are in memory. `tamper` changes what is delivered, as a hostile hub would.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

TOKEN = "hf_secret-of-the-tests"  # noqa: S105
_LFS_FROM_BYTES = 1000  # so that a small artifact goes both ways

Files = dict[str, bytes]


@dataclass
class Hub:
    """The state of the stand-in.

    Args:
        url: where it listens.
        commits: files by commit, oldest first, by repository.
        private: whether a repository was made private.
        objects: content of large files by SHA-256.
        tamper: changes the answer to a download, (path, content) → content; None: no such file.
        requests: method and path of every request.
        rejects_uploads: it answers 403 to the content of a large file.
        named_commit: what it says is the newest commit; None: the right one.
        raw_info: what it answers when it is asked about a repository; None: what a hub would.
    """

    url: str = ""
    commits: dict[str, dict[str, Files]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    tamper: Callable[[str, bytes], bytes | None] = lambda _, content: content
    requests: list[str] = field(default_factory=list)
    named_commit: str | None = None
    raw_info: bytes | None = None
    rejects_uploads: bool = False

    def commit(self, repository: str, files: Files) -> str:
        """Adds a commit and returns its hash."""
        history = self.commits.setdefault(repository, {})
        parts = [*history, *(name + hashlib.sha256(content).hexdigest() for name, content in sorted(files.items()))]
        commit = hashlib.sha1("\n".join(parts).encode(), usedforsecurity=False).hexdigest()
        history[commit] = files
        return commit

    def head(self, repository: str) -> str:
        return list(self.commits[repository])[-1]


def _error(code: str, status: int = 404) -> Response:
    return Response(status_code=status, headers={"X-Error-Code": code})


def _entry(path: str, content: bytes) -> dict[str, Any]:
    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git}
    if len(content) >= _LFS_FROM_BYTES:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


def application(hub: Hub) -> FastAPI:  # noqa: PLR0915 (one route after the other)
    app = FastAPI()

    @app.middleware("http")
    async def recorded(request: Request, go_on: Callable[[Request], Any]) -> Any:
        hub.requests.append(f"{request.method} {request.url.path}")
        reads = request.method in ("GET", "HEAD") and "whoami" not in request.url.path
        if not reads and "/objects/" not in request.url.path and not _has_token(request):
            return _error("", 401)
        return await go_on(request)

    def _has_token(request: Request) -> bool:
        return request.headers.get("authorization") == f"Bearer {TOKEN}"

    def found(repository: str, revision: str) -> tuple[str, Files] | Response:
        if repository not in hub.commits:
            return _error("RepoNotFound")
        commit = hub.head(repository) if revision == "main" else revision
        if commit not in hub.commits[repository]:
            return _error("RevisionNotFound")
        return commit, hub.commits[repository][commit]

    @app.get("/api/whoami-v2")
    async def whoami() -> Any:
        return {"type": "user", "name": "tester", "orgs": [{"name": "org"}]}

    @app.post("/api/validate-yaml")
    async def validate(request: Request) -> Any:
        assert (await request.json())["content"].startswith("---\n")
        return {"errors": [], "warnings": []}

    @app.post("/api/repos/create")
    async def create(request: Request) -> Any:
        asked = await request.json()
        repository = f"{asked['organization']}/{asked['name']}"
        if repository in hub.commits:
            return JSONResponse({"url": f"{hub.url}/{repository}"}, 409)
        hub.private[repository] = asked.get("visibility") == "private"
        hub.commit(repository, {".gitattributes": b""})
        return {"url": f"{hub.url}/{repository}", "name": repository, "id": repository}

    @app.get("/api/models/{organisation}/{name}")
    @app.get("/api/models/{organisation}/{name}/revision/{revision}")
    async def info(organisation: str, name: str, revision: str = "main") -> Any:
        there = found(f"{organisation}/{name}", revision)
        if isinstance(there, Response):
            return there
        if hub.raw_info is not None:
            return Response(hub.raw_info, media_type="application/json")
        siblings = [{"rfilename": path} for path in there[1]]
        return {
            "id": f"{organisation}/{name}",
            "sha": there[0] if hub.named_commit is None else hub.named_commit,
            "siblings": siblings,
        }

    @app.get("/api/models/{organisation}/{name}/tree/{revision}")
    async def tree(organisation: str, name: str, revision: str) -> Any:
        there = found(f"{organisation}/{name}", revision)
        return there if isinstance(there, Response) else [_entry(*item) for item in there[1].items()]

    @app.post("/api/models/{organisation}/{name}/preupload/{revision}")
    async def preupload(request: Request) -> Any:
        asked = (await request.json())["files"]
        modes = ["lfs" if file["size"] >= _LFS_FROM_BYTES else "regular" for file in asked]
        return {
            "files": [
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                for file, mode in zip(asked, modes, strict=True)
            ]
        }

    @app.post("/{organisation}/{name}.git/info/lfs/objects/batch")
    async def batch(request: Request) -> Any:
        objects = [
            {**each, "actions": {"upload": {"href": f"{hub.url}/objects/{each['oid']}"}}}
            for each in (await request.json())["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    @app.put("/objects/{sha256}")
    async def upload(sha256: str, request: Request) -> Any:
        content = await request.body()
        if hub.rejects_uploads:
            return _error("", 403)
        assert hashlib.sha256(content).hexdigest() == sha256
        hub.objects[sha256] = content
        return {}

    @app.post("/api/models/{organisation}/{name}/commit/{revision}")
    async def commit(organisation: str, name: str, request: Request) -> Any:
        repository = f"{organisation}/{name}"
        files = dict(hub.commits[repository][hub.head(repository)])
        for line in (await request.body()).splitlines():
            key, value = (operation := json.loads(line))["key"], operation["value"]
            if key == "header" and value.get("parentCommit") not in (None, hub.head(repository)):
                return _error("", 412)
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        made = hub.commit(repository, files)
        return {"commitUrl": f"{hub.url}/{repository}/commit/{made}", "commitOid": made}

    @app.api_route("/{organisation}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    async def resolve(organisation: str, name: str, revision: str, path: str) -> Any:
        there = found(f"{organisation}/{name}", revision)
        if isinstance(there, Response):
            return there
        content = hub.tamper(path, there[1][path]) if path in there[1] else None
        if content is None:
            return _error("EntryNotFound")
        entry = _entry(path, content)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        return Response(content, headers={"ETag": f'"{etag}"', "X-Repo-Commit": there[0]})

    return app


@contextmanager
def serving() -> Iterator[Hub]:
    """A stand-in that listens on a free port of this machine."""
    hub = Hub()
    server = uvicorn.Server(uvicorn.Config(application(hub), port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
    hub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join()
