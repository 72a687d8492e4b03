"""A small fake of the Hugging Face Hub for tests with the real huggingface_hub client.

It has two origins on the loopback interface: the hub, and the storage that large files are uploaded to, by LFS or Xet.
The client runs in the test's process (`patch_client`), or in a separate process (`env`), which takes longer to start:

    with HubServer() as hub:
        hub.fail("POST", "/commit/", status=503)
        subprocess.run(command, env=os.environ | hub.env(tmp_path))
        assert hub.repos["me/digits"].files("main")["config.json"] == b"{}"

Datasets can be read, not written. Not implemented: spaces, tags, pages of long listings, multipart uploads (above
5 GB) and downloads by Xet; the server offers no Xet hash, so the client uses plain HTTP.
"""

import base64
import hashlib
import json
import re
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

LICENSES = ("apache-2.0", "mit")
"""The real hub knows more."""


class User(NamedTuple):
    name: str
    role: Literal["read", "write"]


WRITE_TOKEN, READ_TOKEN, OTHER_USERS_TOKEN, XET_TOKEN = "hf_write", "hf_read", "hf_other", "xet"
USERS = {WRITE_TOKEN: User("me", "write"), READ_TOKEN: User("me", "read"), OTHER_USERS_TOKEN: User("alex", "write")}

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.onnx", "*.pt", "*.pth", "*.tfevents*")
MAX_REGULAR_BYTES = 10 << 20
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Blob:
    """A file; for a large one, git has only a pointer."""

    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def in_git(self) -> bytes:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return pointer.encode() if self.lfs else self.data

    @cached_property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.in_git) + self.in_git).hexdigest()

    @property
    def etag(self) -> str:
        """What the client compares its own file with."""
        return self.sha256 if self.lfs else self.git_oid

    def entry(self, path: str) -> dict[str, Any]:
        """Its entry in a listing."""
        lfs = {"oid": self.sha256, "sha256": self.sha256, "size": len(self.data), "pointerSize": len(self.in_git)}
        entry = {"type": "file", "path": path, "oid": self.git_oid, "size": len(self.data)}
        return entry | ({"lfs": lfs} if self.lfs else {})


class Commit(NamedTuple):
    oid: str
    parent: str | None
    title: str
    blobs: dict[str, Blob]


class Repo:
    """Commits by oid, beginning with the hub's own first one; and in `refs` the heads of the branches."""

    def __init__(self, private: bool, gated: bool = False):
        self.private, self.gated = private, gated
        self.accepted_by: set[str] = set()
        """Users who have accepted the terms of a gated one."""
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.pull_requests: list[str] = []
        """Their titles; the first one's branch is refs/pr/1."""
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        self.add("main", "initial commit", {".gitattributes": Blob(attributes.encode())})

    def add(self, branch: str, title: str, blobs: dict[str, Blob]) -> str:
        # Numbered: as on the real hub, a commit without changes is still a new commit.
        oid = hashlib.sha1(f"{len(self.commits)} {title}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, self.refs.get(branch), title, blobs)
        self.refs[branch] = oid
        return oid

    def open_pull_request(self, title: str) -> str:
        self.pull_requests.append(title)
        branch = f"refs/pr/{len(self.pull_requests)}"
        self.refs[branch] = self.refs["main"]
        return branch

    def head(self, revision: str) -> Commit:
        """The commit of a branch, or the one with this oid."""
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise ErrorResponse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def history(self, revision: str) -> list[Commit]:
        """Newest first, down to the hub's own first commit."""
        commits = [self.head(revision)]
        while commits[-1].parent:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def files(self, revision: str) -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.head(revision).blobs.items()}


class Request(NamedTuple):
    """A request received, whether or not a response was sent."""

    origin: Literal["hub", "storage"]
    method: str
    path: str
    """With the query; percent-decoded."""
    token: str | None
    """None if there was no Authorization header."""


@dataclass
class Fault:
    """What happens to the next `times` requests with this method and a path in which the regex `path` is found."""

    kind: Literal["status", "drop", "lose_response", "damage"]
    method: str
    path: str
    times: int
    status: int = 500
    retry_after: int | None = None
    midway: bool = False


class HubServer:
    """Serves within `with`; its contents can be read afterwards, too."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.objects: dict[str, bytes] = {}
        """Large files by sha256, committed or not."""
        self.xorbs: dict[str, list[bytes]] = {}
        """Chunks of large files, by the name of the Xet bundle that they are in."""
        self.lock = threading.Lock()
        handlers = [partial(Handler, self, origin) for origin in ("hub", "storage")]
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in handlers]
        self.url, self.storage_url = [f"http://127.0.0.1:{server.server_port}" for server in self._servers]

    def __enter__(self) -> "HubServer":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def env(self, home: Path, token: str = WRITE_TOKEN, xet: bool = True) -> dict[str, str]:
        """For a client process that uses this hub, and `home` for its files; a token of "" is none."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "0" if xet else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_XET_XORB_COMPRESSION_POLICY": "none",  # Python's own library has no LZ4
            "NO_PROXY": "127.0.0.1",
        }

    def patch_client(self, monkeypatch: pytest.MonkeyPatch, home: Path, token: str = WRITE_TOKEN) -> None:
        """As `env` without Xet, for the client in this process, which read its environment at import."""
        from huggingface_hub import constants
        from huggingface_hub.utils import close_session

        for name in ("HF_TOKEN", "NO_PROXY"):
            monkeypatch.setenv(name, self.env(home, token)[name])
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

    def fail(self, method: str, path: str, status: int = 500, times: int = 1, retry_after: int | None = None) -> None:
        """Respond with this status, without doing what is requested."""
        self.faults.append(Fault("status", method, path, times, status=status, retry_after=retry_after))

    def drop(self, method: str, path: str, times: int = 1, midway: bool = False) -> None:
        """Close the connection at once; or midway in the request's body or, if it has none, in the response's."""
        self.faults.append(Fault("drop", method, path, times, midway=midway))

    def lose_response(self, method: str, path: str, times: int = 1) -> None:
        """Do what is requested, then close the connection without a response."""
        self.faults.append(Fault("lose_response", method, path, times))

    def damage(self, path: str, times: int = 1) -> None:
        """Change a byte of a download. A large file comes from the storage, but under the same path."""
        self.faults.append(Fault("damage", "GET", path, times))

    def receive(self, request: Request) -> Fault | None:
        """Record a request, and return the fault that applies to it."""
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times > 0 and fault.method == request.method and re.search(fault.path, request.path):
                    fault.times -= 1
                    return fault
        return None

    def store(self, sha256: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ErrorResponse(400, "The content does not match its hash")
        self.objects[sha256] = data


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
MODEL, REPO, REVISION = "hub/api/models/(?P<name>[^/]+/[^/]+)", "(?P<name>[^/]+/[^/]+)", "(?P<revision>[^/]+)"
ANY = "hub/api/(?:models|datasets)/(?P<name>[^/]+/[^/]+)"


def route(method: str, path: str) -> Callable[[Route], Route]:
    """Registers a method of Handler for such requests. `path` begins with the origin; its groups are the arguments."""

    def register(function: Route) -> Route:
        ROUTES.append((method, path, function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: HubServer, origin: Literal["hub", "storage"], *connection: Any):
        self.hub, self.origin = hub, origin
        super().__init__(*connection)

    def handle_request(self) -> None:
        authorization = self.headers.get("Authorization")
        self.token = authorization and authorization.removeprefix("Bearer ")
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        size = int(self.headers.get("Content-Length", 0))
        fault = self.hub.receive(Request(self.origin, self.command, unquote(self.path), self.token))
        kind = fault and fault.kind
        self.close_connection |= kind in ("drop", "lose_response")
        if kind == "drop" and (size or not fault.midway):
            self.rfile.read(size // 2 if fault.midway else 0)
            return
        self.body = self.rfile.read(size)
        try:
            if kind == "status":
                wait = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
                raise ErrorResponse(fault.status, "a fault on request", headers=wait)
            with self.hub.lock:
                response = self.respond(url.path)
        except ErrorResponse as error:
            response = error.response
        if kind != "lose_response":
            self.send(response, damaged=kind == "damage", cut=kind == "drop")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def send(self, response: Response, damaged: bool, cut: bool) -> None:
        binary = isinstance(response.body, bytes)
        body = response.body if binary else json.dumps(response.body).encode()
        headers = {"Content-Type": "application/octet-stream" if binary else "application/json"} | response.headers
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and response.status == 200:
            start, end = int(wanted[1]), min(int(wanted[2] or len(body)), len(body) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
            response.status, body = 206, body[start : end + 1]
        if damaged:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 0xFF]) + body[middle + 1 :]
        self.send_response(response.status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)

    def log_message(self, *_: object) -> None:
        pass

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def respond(self, path: str) -> Response:
        self.user = USERS.get(self.token or "")
        if self.origin == "hub" and self.token and not self.user:
            raise ErrorResponse(401, "Invalid credentials in Authorization header")
        if self.origin == "storage" and self.token not in (None, XET_TOKEN):
            raise ErrorResponse(400, "Only one auth mechanism allowed")  # as S3, for a signed URL with a token
        for method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, self.origin + path)
            if match and self.command in method.split():
                return function(self, **{key: unquote(value) for key, value in match.groupdict().items() if value})
        raise ErrorResponse(404, "not implemented by this fake")

    def signed_in(self) -> User:
        if self.user is None:
            raise ErrorResponse(401, "Invalid username or password.")
        return self.user

    def readable(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not owns(self.user, name)):
            # Without a token, a private repository and a missing one look the same.
            raise ErrorResponse(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, name: str, revision: str = "refs/pr/") -> Repo:
        """Everyone may open a pull request and write to it; other revisions are for the owner."""
        repo, user = self.readable(name), self.signed_in()
        if user.role == "read" or not (revision.startswith("refs/pr/") or owns(user, name)):
            raise ErrorResponse(403, "Forbidden: you must use a write token to upload to a repository.")
        return repo

    @route("GET", "hub/api/whoami-v2")
    def whoami(self) -> Response:
        name, role = self.signed_in()
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role, "createdAt": DATE}}
        return Response({"type": "user", "id": name, "name": name, "fullname": name, "orgs": [], "auth": auth})

    @route("POST", "hub/api/repos/create")
    def create(self) -> Response:
        user, requested = self.signed_in(), self.json
        owner = requested.get("organization") or user.name
        if user != User(owner, "write"):
            raise ErrorResponse(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        name = f"{owner}/{requested['name']}"
        about = {"name": name, "id": name, "url": f"{self.hub.url}/{name}"}
        if name in self.hub.repos:
            return Response(about | {"error": "You already created this model repo"}, 409)
        self.hub.repos[name] = Repo(private=requested.get("visibility") == "private" or requested.get("private", False))
        return Response(about)

    @route("POST", "hub/api/validate-yaml")
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
        repo, head = self.readable(name), self.hub.repos[name].head(revision)
        siblings = [{"rfilename": path} for path in head.blobs]
        about = {"id": name, "modelId": name, "author": name.split("/")[0], "private": repo.private, "tags": []}
        return Response(about | {"sha": head.oid, "lastModified": DATE, "createdAt": DATE, "siblings": siblings})

    @route("GET", f"{ANY}/tree/{REVISION}(/(?P<folder>.+))?")
    def tree(self, name: str, revision: str, folder: str = "") -> Response:
        start = f"{folder}/" if folder else ""
        blobs = {
            path: blob for path, blob in self.readable(name).head(revision).blobs.items() if path.startswith(start)
        }
        if folder and not blobs:
            raise ErrorResponse(404, f"{folder} does not exist", "EntryNotFound")
        if self.query["recursive"] == ["true"]:
            return Response([blob.entry(path) for path, blob in blobs.items()])
        folders = {start + rest.split("/")[0] for path in blobs if "/" in (rest := path[len(start) :])}
        files = [blob.entry(path) for path, blob in blobs.items() if "/" not in path[len(start) :]]
        return Response(
            [*files, *({"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in folders)]
        )

    @route("POST", f"{MODEL}/branch/{REVISION}")
    def create_branch(self, name: str, revision: str) -> Response:
        repo = self.writable(name, revision)
        if revision in repo.refs:
            raise ErrorResponse(409, f"Reference already exists: refs/heads/{revision}")
        repo.refs[revision] = repo.head(self.json.get("startingPoint", "main")).oid
        return Response({})

    @route("POST", f"{MODEL}/discussions")
    def open_pull_request(self, name: str) -> Response:
        branch = self.writable(name).open_pull_request(self.json["title"])
        return Response({"num": int(branch.removeprefix("refs/pr/"))})

    @route("GET", f"{MODEL}/discussions")
    def discussions(self, name: str) -> Response:
        titles = self.readable(name).pull_requests
        about = {"author": {"name": "me"}, "status": "draft", "createdAt": DATE, "isPullRequest": True}
        repo = {"repo": {"name": name, "type": "model"}}
        listed = [about | repo | {"num": number, "title": title} for number, title in enumerate(titles, start=1)]
        page = listed if self.query.get("p", ["0"]) == ["0"] else []
        return Response({"discussions": page, "count": len(listed), "start": 0, "numClosedDiscussions": 0})

    @route("GET", rf"{MODEL}/discussions/(?P<number>\d+)")
    def pull_request(self, name: str, number: str) -> Response:
        title = self.readable(name).pull_requests[int(number) - 1]
        about = {"title": title, "num": int(number), "status": "draft", "createdAt": DATE, "isPullRequest": True}
        changes = {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "events": []}
        return Response(about | changes | {"repo": {"name": name, "type": "model"}})

    @route("POST", f"{MODEL}/preupload/{REVISION}")
    def preupload(self, name: str, revision: str) -> Response:
        """Which files are large and, for the client to skip, which exist already."""
        blobs = self.writable(name, revision).head(revision).blobs
        files = []
        for path, size, sample in ((file["path"], file["size"], file["sample"]) for file in self.json["files"]):
            binary = b"\0" in base64.b64decode(sample) or size > MAX_REGULAR_BYTES
            large = binary or any(fnmatch(Path(path).name, pattern) for pattern in LFS_PATTERNS)
            existing = {"oid": blobs[path].etag} if path in blobs else {}
            files.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False} | existing)
        return Response({"files": files})

    @route("POST", rf"hub/{REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, name: str) -> Response:
        self.writable(name)
        objects = self.json["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.storage_url}/lfs/{entry['oid']}"}
                verify = {"href": f"{self.hub.url}/{name}.git/info/lfs/objects/verify"}
                entry["actions"] = {"upload": upload, "verify": verify}
        # Clients before 2.0 offer Xet here. Newer ones use it for all large files if it is installed.
        return Response({"transfer": "basic", "objects": objects})

    @route("PUT", "storage/lfs/(?P<sha256>[0-9a-f]{64})")
    def lfs_put(self, sha256: str) -> Response:
        self.hub.store(sha256, self.body)
        return Response()

    @route("POST", rf"hub/{REPO}\.git/info/lfs/objects/verify")
    def lfs_verify(self, name: str) -> Response:
        self.writable(name)
        if len(self.hub.objects.get(self.json["oid"], b"")) != self.json["size"]:
            raise ErrorResponse(404, "Object not found, or of another size")
        return Response()

    @route("GET", f"{MODEL}/xet-write-token/{REVISION}")
    def xet_token(self, name: str, revision: str) -> Response:
        self.writable(name, revision)
        return Response({"accessToken": XET_TOKEN, "exp": 4_000_000_000, "casUrl": self.hub.storage_url})

    @route("POST", "storage/v1/xorbs/default/(?P<xorb>[0-9a-f]{64})")
    def xet_xorb(self, xorb: str) -> Response:
        self.hub.xorbs[xorb] = unpack_xorb(self.body)
        return Response({"was_inserted": True})

    @route("POST", "storage/v1/shards")
    def xet_shard(self) -> Response:
        for sha256, segments in unpack_shard(self.body).items():
            if any(xorb not in self.hub.xorbs for xorb, _, _ in segments):
                raise ErrorResponse(400, "The shard names a xorb that was not uploaded")
            chunks = [chunk for xorb, start, end in segments for chunk in self.hub.xorbs[xorb][start:end]]
            self.hub.store(sha256, b"".join(chunks))
        return Response({"result": 1})

    @route("POST", f"{MODEL}/commit/{REVISION}")
    def commit(self, name: str, revision: str) -> Response:
        repo, head = self.writable(name, revision), self.hub.repos[name].head(revision)
        header, *operations = ((line["key"], line["value"]) for line in map(json.loads, self.body.splitlines()))
        title = header[1]["summary"]
        if header[1].get("parentCommit", head.oid) != head.oid:
            raise ErrorResponse(412, "A commit has happened since. Please refresh and try again.")
        blobs = dict(head.blobs)
        for key, value in operations:
            path = value["path"]
            if key == "file":
                blobs[path] = Blob(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise ErrorResponse(400, f"LFS pointer pointed to a file that does not exist: {path}")
                blobs[path] = Blob(self.hub.objects[value["oid"]], lfs=True)
            elif key == "deletedFile" and path in blobs:
                del blobs[path]
            else:
                raise ErrorResponse(404, "A file with this name doesn't exist", "EntryNotFound")
        oid = repo.add(revision, title, blobs)
        return Response({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    @route("HEAD GET", f"hub/(?:datasets/)?{REPO}/resolve/{REVISION}/(?P<path>.+)")
    def resolve(self, name: str, revision: str, path: str) -> Response:
        repo = self.readable(name)
        if repo.gated and (self.user is None or self.user.name not in repo.accepted_by):
            # What is in it everyone may know, but not have.
            raise ErrorResponse(403 if self.user else 401, f"Access to dataset {name} is restricted.", "GatedRepo")
        head = repo.head(revision)
        about = {"X-Repo-Commit": head.oid}
        if path not in head.blobs:
            raise ErrorResponse(404, "Entry not found", "EntryNotFound", about)
        blob = head.blobs[path]
        if not blob.lfs:
            return Response(blob.data, headers=about | {"ETag": f'"{blob.etag}"'})
        linked = {"X-Linked-Size": str(len(blob.data)), "X-Linked-ETag": f'"{blob.etag}"'}
        return Response(status=302, headers=about | linked | {"Location": self.hub.storage_url + self.path})

    @route("HEAD GET", f"storage/(?:datasets/)?{REPO}/resolve/{REVISION}/(?P<path>.+)")
    def resolve_large(self, name: str, revision: str, path: str) -> Response:
        """The target of the redirect. The real one is signed, so that it works for private repositories, too."""
        blob = self.hub.repos[name].head(revision).blobs[path]
        return Response(blob.data, headers={"ETag": f'"{blob.etag}"'})


def owns(user: User | None, name: str) -> bool:
    return user is not None and user.name == name.split("/")[0]


def unpack_xorb(xorb: bytes) -> list[bytes]:
    """Its chunks. Before each: a version, its stored length, its compression, and its length."""
    chunks, at = [], 0
    while at < len(xorb):
        length, compression = int.from_bytes(xorb[at + 1 : at + 4], "little"), xorb[at + 4]
        if compression:
            raise ErrorResponse(400, "this fake reads only HF_XET_XORB_COMPRESSION_POLICY=none")
        chunks.append(xorb[at + 8 : at + 8 + length])
        at += 8 + length
    return chunks


def unpack_shard(shard: bytes) -> dict[str, list[tuple[str, int, int]]]:
    """By a file's sha256 its segments: the name of a xorb, and the first and the end of its range of chunks.

    Records of 48 bytes: a header; for each file its head, its segments, as many checks of these, and its sha256; ...
    """
    files, at = {}, 48
    while shard[at : at + 32] != b"\xff" * 32:
        flags, count = struct.unpack_from("<II", shard, at + 32)
        if flags != 0xC0000000:
            raise ErrorResponse(400, "this fake reads only shards with checks and sha256")
        records = range(at + 48, at + 48 * (count + 1), 48)
        segments = [(xet_name(shard, record), *struct.unpack_from("<II", shard, record + 40)) for record in records]
        at += 48 * (2 * count + 2)
        files[xet_name(shard, at - 48)] = segments
    return files


def xet_name(shard: bytes, at: int) -> str:
    """Xet writes a hash as four numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack_from("<4Q", shard, at))
