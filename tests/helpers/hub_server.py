"""A small fake of the Hugging Face Hub for tests with the real huggingface_hub client, on the loopback interface.

The client runs in the test's process (`patch_client`), or in a separate process (`env`), which takes longer to start:

    with HubServer() as hub:
        hub.fail("POST", "/commit/", 503)
        subprocess.run(command, env=os.environ | hub.env(tmp_path))
        assert hub.repos["me/digits"].files("main")["config.json"] == b"{}"

Large files are uploaded by LFS, as the real Hub's clients do without Xet. Datasets can be read, not written.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

LICENSES = ("apache-2.0", "mit")
"""The real hub knows more."""

WRITE_TOKEN, READ_TOKEN, OTHER_USERS_TOKEN = "hf_write", "hf_read", "hf_other"
USERS = {WRITE_TOKEN: "me", READ_TOKEN: "me", OTHER_USERS_TOKEN: "alex"}
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Blob:
    """A file; for a large one, git has only a pointer."""

    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def git_oid(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        in_git = pointer.encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(in_git) + in_git).hexdigest()

    @property
    def etag(self) -> str:
        """What the client compares its own file with."""
        return self.sha256 if self.lfs else self.git_oid

    def entry(self, path: str) -> dict[str, Any]:
        """Its entry in a listing."""
        entry = {"type": "file", "path": path, "oid": self.git_oid, "size": len(self.data)}
        lfs = {"oid": self.sha256, "sha256": self.sha256, "size": len(self.data), "pointerSize": 130}
        return entry | ({"lfs": lfs} if self.lfs else {})


def is_large(path: str) -> bool:
    return Path(path).suffix in (".safetensors", ".bin", ".onnx", ".pt2", ".png")


class Repo:
    """The files of each commit by its oid, beginning with the hub's own first one; in `refs` the heads of branches."""

    def __init__(self, private: bool, gated: bool = False):
        self.private, self.gated = private, gated
        self.accepted_by: set[str] = set()
        """Users who have accepted the terms of a gated one."""
        self.commits: dict[str, dict[str, Blob]] = {}
        self.refs: dict[str, str] = {}
        self.pull_requests: list[str] = []
        """Their titles; the first one's branch is refs/pr/1."""
        self.add("main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n")})

    def add(self, branch: str, title: str, blobs: dict[str, Blob]) -> str:
        # Numbered: as on the real hub, a commit without changes is still a new commit.
        oid = hashlib.sha1(f"{len(self.commits)} {title}".encode()).hexdigest()
        self.commits[oid] = blobs
        self.refs[branch] = oid
        return oid

    def head(self, revision: str) -> str:
        """The oid of a branch's last commit, or of the commit with this oid."""
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise ErrorResponse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def blobs(self, revision: str) -> dict[str, Blob]:
        return self.commits[self.head(revision)]

    def files(self, revision: str) -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.blobs(revision).items()}


How = int | Literal["cut", "lose response", "damage"]


@dataclass
class Fault:
    """What happens to the next `times` requests with this method and a path in which the regex `path` is found."""

    method: str
    path: str
    how: How
    times: int
    retry_after: int | None


class HubServer:
    """Serves within `with`; its contents can be read afterwards, too."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requested: list[str] = []
        """Paths of all requests, whether or not a response was sent."""
        self.faults: list[Fault] = []
        self.objects: dict[str, bytes] = {}
        """Large files by sha256, committed or not."""
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def env(self, home: Path) -> dict[str, str]:
        """For a client process that uses this hub, and `home` for its files."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": WRITE_TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def patch_client(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """As `env`, for the client in this process, which read its environment at import."""
        from huggingface_hub import constants
        from huggingface_hub.utils import close_session

        for name in ("HF_TOKEN", "NO_PROXY"):
            monkeypatch.setenv(name, self.env(home)[name])
        values = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        close_session()  # the next session reads NO_PROXY

    def publish(self, name: str, files: dict[str, bytes]) -> None:
        """Add files to a repository, a public one if there is none."""
        repo = self.repos.setdefault(name, Repo(private=False))
        added = {path: Blob(data, lfs=is_large(path)) for path, data in files.items()}
        repo.add("main", "files", repo.blobs("main") | added)

    def fail(self, method: str, path: str, how: How, times: int = 1, retry_after: int | None = None) -> None:
        """Let the next such requests fail.

        Args:
            how: a status, without doing what is requested; or "cut" the connection midway in the request's body;
                or do what is requested and "lose response"; or "damage" a byte of a download.
        """
        self.faults.append(Fault(method, path, how, times, retry_after))

    def receive(self, method: str, path: str) -> Fault | None:
        """Record a request, and return the fault that applies to it."""
        with self.lock:
            self.requested.append(path)
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


@dataclass
class Response:
    body: Any = b""
    """Bytes, or a JSON value."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class ErrorResponse(Exception):
    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None):
        super().__init__(message)
        details = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})
        self.response = Response({"error": message}, status, details)


Route = Callable[..., Response]
ROUTES: list[tuple[str, str, Route]] = []
REPO, REVISION = "(?P<name>[^/]+/[^/]+)", "(?P<revision>[^/]+)"
MODEL, ANY = f"/api/models/{REPO}", f"/api/(?:models|datasets)/{REPO}"


def route(method: str, path: str) -> Callable[[Route], Route]:
    """Registers a method of Handler for such requests; the groups of `path` are its arguments."""

    def register(function: Route) -> Route:
        ROUTES.append((method, path, function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: HubServer, *connection: Any):
        self.hub = hub
        super().__init__(*connection)

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user = USERS.get(self.token)
        fault = self.hub.receive(self.command, unquote(self.path))
        how = fault and fault.how
        self.close_connection |= how in ("cut", "lose response")
        size = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(size // 2 if how == "cut" else size)
        if how == "cut":
            return
        try:
            if isinstance(how, int):
                wait = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
                raise ErrorResponse(how, "a fault on request", headers=wait)
            with self.hub.lock:
                response = self.respond(url.path)
        except ErrorResponse as error:
            response = error.response
        if how != "lose response":
            self.send(response, damaged=how == "damage")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def send(self, response: Response, damaged: bool) -> None:
        binary = isinstance(response.body, bytes)
        body = response.body if binary else json.dumps(response.body).encode()
        if damaged:
            body = body[:-1] + bytes([body[-1] ^ 0xFF])
        kind = "application/octet-stream" if binary else "application/json"
        self.send_response(response.status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(body)), **response.headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def respond(self, path: str) -> Response:
        if self.token and not self.user:
            raise ErrorResponse(401, "Invalid credentials in Authorization header")
        for method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                return function(self, **{key: unquote(value) for key, value in match.groupdict().items() if value})
        raise ErrorResponse(404, "not implemented by this fake")

    def readable(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.user != name.split("/")[0]):
            # Without a token, a private repository and a missing one look the same.
            raise ErrorResponse(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def require_write_token(self) -> None:
        if self.token not in (WRITE_TOKEN, OTHER_USERS_TOKEN):
            raise ErrorResponse(403, "Forbidden: you must use a write token to upload to a repository.")

    def writable(self, name: str) -> Repo:
        self.require_write_token()
        return self.readable(name)

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Response:
        role, name = "read" if self.token == READ_TOKEN else "write", self.user
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role, "createdAt": DATE}}
        return Response({"type": "user", "id": name, "name": name, "fullname": name, "orgs": [], "auth": auth})

    @route("POST", "/api/repos/create")
    def create(self) -> Response:
        self.require_write_token()
        requested = self.json
        if requested.get("organization") not in (None, self.user):
            raise ErrorResponse(403, "You don't have the rights to create a model under this namespace")
        name = f"{requested.get('organization') or self.user}/{requested['name']}"
        about = {"name": name, "id": name, "url": f"{self.hub.url}/{name}"}
        if name in self.hub.repos:
            return Response(about | {"error": "You already created this model repo"}, 409)
        self.hub.repos[name] = Repo(private=requested.get("visibility") == "private" or requested.get("private", False))
        return Response(about)

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> Response:
        metadata = yaml.safe_load(self.json["content"].split("---\n")[1])
        if metadata["license"] in LICENSES:
            return Response({"errors": [], "warnings": []})
        message = f'"license" must be one of [{", ".join(LICENSES)}]'
        if self.headers["Accept"] == "text/plain":
            return Response(f"- Error: {message}".encode(), 400)
        return Response({"errors": [{"message": message}], "warnings": []}, 400)

    @route("GET", f"{ANY}(/revision/{REVISION})?")
    def info(self, name: str, revision: str = "main") -> Response:
        repo = self.readable(name)
        siblings = [{"rfilename": path} for path in repo.blobs(revision)]
        about = {"id": name, "modelId": name, "author": name.split("/")[0], "private": repo.private, "tags": []}
        about |= {"sha": repo.head(revision), "lastModified": DATE, "createdAt": DATE}
        return Response(about | {"siblings": siblings})

    @route("GET", f"{ANY}/tree/{REVISION}(/(?P<folder>.+))?")
    def tree(self, name: str, revision: str, folder: str = "") -> Response:
        start = f"{folder}/" if folder else ""
        blobs = self.readable(name).blobs(revision)
        blobs = {path: blob for path, blob in blobs.items() if path.startswith(start)}
        if folder and not blobs:
            raise ErrorResponse(404, f"{folder} does not exist", "EntryNotFound")
        if self.query["recursive"] == ["true"]:
            return Response([blob.entry(path) for path, blob in blobs.items()])
        folders = {start + rest.split("/")[0] for path in blobs if "/" in (rest := path[len(start) :])}
        listed = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in folders]
        listed += [blob.entry(path) for path, blob in blobs.items() if "/" not in path[len(start) :]]
        return Response(listed)

    @route("POST", f"{MODEL}/branch/{REVISION}")
    def create_branch(self, name: str, revision: str) -> Response:
        repo = self.writable(name)
        repo.refs[revision] = repo.refs["main"]
        return Response({})

    def discussion(self, name: str, number: int) -> dict[str, Any]:
        """What the client asks of a pull request."""
        about = {"num": number, "title": self.readable(name).pull_requests[number - 1], "status": "open"}
        about |= {"author": {"name": "me"}, "createdAt": DATE, "isPullRequest": True}
        about |= {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "events": []}
        return about | {"repo": {"name": name, "type": "model"}}

    @route("GET", f"{MODEL}/discussions")
    def list_pull_requests(self, name: str) -> Response:
        listed = [self.discussion(name, number) for number in range(1, len(self.readable(name).pull_requests) + 1)]
        page = listed if self.query.get("p", ["0"]) == ["0"] else []
        return Response({"discussions": page, "count": len(listed), "start": 0, "numClosedDiscussions": 0})

    @route("GET", rf"{MODEL}/discussions/(?P<number>\d+)")
    def pull_request(self, name: str, number: str) -> Response:
        return Response(self.discussion(name, int(number)))

    @route("POST", f"{MODEL}/preupload/{REVISION}")
    def preupload(self, name: str, revision: str) -> Response:
        """Which files are large and, for the client to skip, which exist already."""
        blobs = self.writable(name).blobs(revision)
        files = []
        for path in (file["path"] for file in self.json["files"]):
            existing = {"oid": blobs[path].etag} if path in blobs else {}
            mode = "lfs" if is_large(path) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | existing)
        return Response({"files": files})

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, name: str) -> Response:
        self.writable(name)
        objects = self.json["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
        return Response({"transfer": "basic", "objects": objects})

    @route("PUT", "/lfs/(?P<sha256>[0-9a-f]{64})")
    def lfs_put(self, sha256: str) -> Response:
        self.hub.objects[sha256] = self.body
        return Response()

    @route("POST", f"{MODEL}/commit/{REVISION}")
    def commit(self, name: str, revision: str) -> Response:
        repo = self.writable(name)
        (_, header), *operations = ((line["key"], line["value"]) for line in map(json.loads, self.body.splitlines()))
        if header.get("parentCommit") not in (None, repo.head(revision)):
            raise ErrorResponse(412, "A commit has happened since. Please refresh and try again.")
        blobs = dict(repo.blobs(revision))
        for key, value in operations:
            path = value["path"]
            if key == "file":
                blobs[path] = Blob(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                blobs[path] = Blob(self.hub.objects[value["oid"]], lfs=True)
            else:
                assert key == "deletedFile", key
                del blobs[path]
        created = {}
        if self.query.get("create_pr") == ["1"]:
            repo.pull_requests.append(header["summary"])
            revision = f"refs/pr/{len(repo.pull_requests)}"
            created = {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{len(repo.pull_requests)}"}
        oid = repo.add(revision, header["summary"], blobs)
        commit = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"}
        return Response(commit | created)

    @route("HEAD GET", f"/(?:datasets/)?{REPO}/resolve/{REVISION}/(?P<path>.+)")
    def resolve(self, name: str, revision: str, path: str) -> Response:
        repo = self.readable(name)
        if repo.gated and self.user not in repo.accepted_by:
            # What is in it everyone may know, but not have.
            raise ErrorResponse(403 if self.user else 401, f"Access to dataset {name} is restricted.", "GatedRepo")
        blobs, about = repo.blobs(revision), {"X-Repo-Commit": repo.head(revision)}
        if path not in blobs:
            raise ErrorResponse(404, "Entry not found", "EntryNotFound", about)
        return Response(blobs[path].data, headers=about | {"ETag": f'"{blobs[path].etag}"'})
