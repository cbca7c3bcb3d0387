"""
A Hub on this machine: the part of its HTTP API that huggingface_hub uses to push and pull, with faults on demand.

Clients find it through HF_ENDPOINT and upload over plain LFS with HF_HUB_DISABLE_XET=1. Files over 1 KB that are no
text are LFS objects, as safetensors are on the real Hub.
"""

import base64
import copy
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_owner": "owner", "hf_reader": "reader"}  # token → user
TEXT = re.compile(r".*\.(json|md|txt|py|jinja|gitattributes)$|\.gitattributes$")


@dataclass
class Repository:
    """Commits are whole trees: path → (bytes, whether it is an LFS object)."""

    owner: str
    private: bool
    commits: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    pull_requests: int = 0

    def commit(self, branch: str, tree: dict[str, tuple[bytes, bool]]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(tree)}".encode()).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, a pull request or a hash."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    r"""
    Args:
        kind (`str`): `"drop"` (close in the middle of a body), `"status"` (an error in place of the answer),
            `"corrupt"` (other bytes at the end of a body), `"mangle"` (the same to what was sent) or `"slow"` (wait
            before each block). Files that are sent (`PUT`) are dropped, mangled and slowed as they arrive.
        path (`str`): a regular expression that the request's method and path match.
        times (`int`): how many requests it hits.
        status (`int`), retry_after (`int`, *optional*): of `"status"`.
        seconds (`float`): of `"slow"`.
    """

    kind: str
    path: str
    times: int = 1
    status: int = 500
    retry_after: int | None = None
    seconds: float = 0.05


class LocalHub(ThreadingHTTPServer):
    """Runs inside `with`; `requests` lists what came in, as `METHOD path`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by SHA-256
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Clients hang up, some because they were told to."""

    def environment(self, home, token: str | None = "hf_owner") -> dict[str, str]:
        """What a client process needs to find this Hub, with a cache of its own in `home`."""
        found = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return found | ({"HF_TOKEN": token} if token else {})

    def add(self, name: str, folder) -> str:
        """Put a folder up as somebody else's public repository; give its commit."""
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        tree = {str(path.relative_to(folder)): (path.read_bytes(), not TEXT.match(path.name)) for path in files}
        repository = self.repositories.setdefault(name, Repository(name.split("/")[0], private=False))
        return repository.commit("main", tree)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds at a revision."""
        repository = self.repositories[name]
        return {path: content for path, (content, _) in repository.commits[repository.resolve(revision)].items()}

    def hold(self, published: tuple[dict[str, Repository], str]) -> str:
        """Put up what [`publish`] has made; give the sum of its logits."""
        self.repositories = copy.deepcopy(published[0])
        return published[1]

    def fault_of(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.path, request):
                    fault.times -= 1
                    return fault
        return None


class RefusedError(Exception):
    """Ends a request with an error of the Hub's form."""

    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, *arguments):
        pass

    def _serve(self):
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        self.server.requests.append(f"{self.command} {path}")
        self.fault = self.server.fault_of(f"{self.command} {path}")
        if (body := self._receive()) is None:
            return None
        self.body = body
        try:
            if self.fault and self.fault.kind == "status":
                raise RefusedError(self.fault.status, "told to fail")
            for method, pattern, action in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    with self.server.lock:
                        answer = action(self, **match.groupdict())
                    return self._answer(*answer)
            raise RefusedError(404, f"no such route: {self.command} {path}", "RepoNotFound")
        except RefusedError as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            if self.fault and self.fault.retry_after is not None:
                headers["Retry-After"] = str(self.fault.retry_after)
            return self._answer(json.dumps({"error": error.message}).encode(), headers, error.status)

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

    def _receive(self) -> bytes | None:
        """What was sent, through the request's fault; None where the connection is dropped in the middle."""
        kind, blocks = self.fault.kind if self.fault and self.command == "PUT" else None, []
        for block in self._blocks():
            if kind == "slow":
                time.sleep(self.fault.seconds)
            if kind == "drop" and blocks:
                self.connection.close()
                self.close_connection = True
                return None
            blocks.append(block)
        return damaged(b"".join(blocks)) if kind == "mangle" else b"".join(blocks)

    def _blocks(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        left = int(self.headers.get("Content-Length") or 0)
        while left > 0:
            yield self.rfile.read(min(65536, left))
            left -= 65536

    def _answer(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200):
        headers = {"Content-Type": "application/json"} | (headers or {})
        fault = self.fault.kind if self.fault and self.command != "HEAD" else None
        if fault == "corrupt":
            body = damaged(body)
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "drop":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
        elif fault == "slow":
            for start in range(0, len(body), 65536):
                time.sleep(self.fault.seconds)
                self.wfile.write(body[start : start + 65536])
        else:
            self.wfile.write(body)

    # Who asks, and for what

    @property
    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def _repository(self, name: str, write: bool = False) -> Repository:
        repository, user = self.server.repositories.get(name), self.user
        if repository is None or (repository.private and user != repository.owner):
            raise RefusedError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise RefusedError(401, "Log in to write")
        if write and user != repository.owner and "create_pr" not in self.query:
            raise RefusedError(403, "Forbidden: you have no write access to this repository")
        return repository

    def _tree(self, repository: Repository, revision: str) -> tuple[str, dict[str, tuple[bytes, bool]]]:
        if (sha := repository.resolve(revision)) is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]

    # The API

    def whoami(self):
        if self.user is None:
            raise RefusedError(401, "Invalid username or password")
        return as_json({"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self):
        wanted, user = json.loads(self.body), self.user
        if user is None:
            raise RefusedError(401, "Log in to create repositories")
        owner = wanted.get("organization") or user
        if owner != user:
            raise RefusedError(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        name = f"{owner}/{wanted['name']}"
        url = {"url": f"{self.server.url}/{name}", "name": name}
        if name in self.server.repositories:
            return as_json(url | {"error": "You already created this model repo"}, 409)
        repository = Repository(owner, wanted.get("visibility") == "private" or bool(wanted.get("private")))
        repository.commit("main", {".gitattributes": (b"*.safetensors filter=lfs\n", False)})
        self.server.repositories[name] = repository
        return as_json(url)

    def validate_yaml(self):
        """As the Hub does for a card's metadata, in the fields that matter here."""
        content, errors = json.loads(self.body)["content"], []
        try:
            data = front_matter(content)
        except yaml.YAMLError as error:
            return as_json({"errors": [{"message": str(error)}]}, 400)
        if "license" in data and not isinstance(data["license"], (str, list)):
            errors.append({"message": '"license" must be a string'})
        for model in data.get("model-index") or []:
            if not model.get("name") or not isinstance(model.get("results"), list):
                errors.append({"message": '"model-index[0].name" and "results" are required'})
        warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        return as_json({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    def preupload(self, name: str, revision: str):
        repository = self._repository(name, write=True)
        self._tree(repository, revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "regular" if TEXT.match(file["path"]) or file["size"] < 1024 else "lfs",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(self.body)["files"]
        ]
        return as_json({"files": files})

    def lfs_batch(self, name: str):
        self._repository(name, write=True)
        objects = []
        for entry in json.loads(self.body)["objects"]:
            oid, upload = entry["oid"], {}
            if oid not in self.server.objects:
                url = f"{self.server.url}/lfs/{name}/{oid}"
                upload = {"actions": {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}}
            objects.append({"oid": oid, "size": entry["size"]} | upload)
        return as_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, name: str, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusedError(400, "The uploaded bytes are not those of the checksum")
        self.server.objects[oid] = self.body
        return b"", {}, 200

    def lfs_verify(self, name: str, oid: str):
        if len(self.server.objects.get(oid, b"")) != json.loads(self.body)["size"]:
            raise RefusedError(404, "Object not found")
        return as_json({})

    def commit(self, name: str, revision: str):
        repository = self._repository(name, write=True)
        sha, tree = self._tree(repository, revision)
        tree = dict(tree)
        for line in map(json.loads, self.body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, sha):
                raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
            if line["key"] == "file":
                tree[value["path"]] = (base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise RefusedError(400, f"LFS object {value['oid']} of {value['path']} was not uploaded")
                tree[value["path"]] = (self.server.objects[value["oid"]], True)
            elif line["key"] in ("deletedFile", "deletedFolder"):
                tree = {path: entry for path, entry in tree.items() if not f"{path}/".startswith(f"{value['path']}/")}
        pull_request = "create_pr" in self.query
        if pull_request:
            repository.pull_requests += 1
            revision = f"refs/pr/{repository.pull_requests}"
        commit, url = repository.commit(revision, tree), f"{self.server.url}/{name}"
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{url}/commit/{commit}"}
        return as_json(
            answer | ({"pullRequestUrl": f"{url}/discussions/{repository.pull_requests}"} if pull_request else {})
        )

    def info(self, name: str, revision: str = "main"):
        repository = self._repository(name)
        sha, tree = self._tree(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(tree)]
        card = front_matter(tree.get("README.md", (b"", False))[0].decode())
        answer = {"id": name, "sha": sha, "private": repository.private, "tags": [], "siblings": siblings}
        return as_json(answer | {"cardData": card})

    def refs(self, name: str):
        branches = self._repository(name).branches.items()
        entries = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in branches]
        return as_json({"branches": entries, "converts": [], "tags": [], "pullRequests": []})

    def branch(self, name: str, branch: str):
        repository = self._repository(name, write=True)
        if branch in repository.branches:
            raise RefusedError(409, "Reference already exists")
        repository.branches[branch] = self._tree(
            repository, json.loads(self.body or b"{}").get("startingPoint", "main")
        )[0]
        return as_json({})

    def tree(self, name: str, revision: str, folder: str | None = None):
        _, tree = self._tree(self._repository(name), revision)
        prefix, entries, folders = f"{folder}/" if folder else "", [], set()
        for path, (content, is_lfs) in sorted(tree.items()):
            rest = path.removeprefix(prefix)
            if not path.startswith(prefix):
                continue
            if "/" in rest and self.query.get("recursive") not in (["true"], ["True"]):
                folders.add(prefix + rest.split("/")[0])
                continue
            lfs = {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 128}}
            entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            entries.append(entry | (lfs if is_lfs else {}))
        entries += [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)]
        if folder and not entries:
            raise RefusedError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        return as_json(entries)

    def paths_info(self, name: str, revision: str):
        _, tree = self._tree(self._repository(name), revision)
        wanted = json.loads(self.body)["paths"] if self.body[:1] == b"{" else parse_qs(self.body.decode())["paths"]
        found = [
            {"type": "file", "path": p, "size": len(tree[p][0]), "oid": hashlib.sha1(tree[p][0]).hexdigest()}
            for p in wanted
            if p in tree
        ]
        return as_json(found)

    def resolve(self, name: str, revision: str, path: str):
        sha, tree = self._tree(self._repository(name), revision)
        if path not in tree:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        content, is_lfs = tree[path]
        digest = (hashlib.sha256 if is_lfs else hashlib.sha1)(content).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": sha, "Content-Type": "application/octet-stream"}
        headers |= {"Accept-Ranges": "bytes", "X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{digest}"'}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return content[start : end + 1], headers, 206
        return content, headers, 200


def as_json(value, status: int = 200) -> tuple[bytes, dict[str, str], int]:
    return json.dumps(value).encode(), {}, status


def damaged(body: bytes) -> bytes:
    """Other numbers at the end, behind the header of safetensors."""
    return body[:-64] + bytes(byte ^ 64 for byte in body[-64:])


def front_matter(text: str) -> dict:
    """A card's metadata."""
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    return yaml.safe_load(match[1]) if match else {}


NAME = r"(?P<name>[^/]+/[^/]+)"
REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
ROUTES = [
    (("GET",), "/api/whoami-v2", Handler.whoami),
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.validate_yaml),
    (("POST",), f"/api/models/{NAME}/preupload/{REVISION}", Handler.preupload),
    (("POST",), f"/api/models/{NAME}/commit/{REVISION}", Handler.commit),
    (("GET",), f"/api/models/{NAME}/revision/{REVISION}", Handler.info),
    (("GET",), f"/api/models/{NAME}/refs", Handler.refs),
    (("POST",), f"/api/models/{NAME}/branch/(?P<branch>.+)", Handler.branch),
    (("GET",), rf"/api/models/{NAME}/tree/{REVISION}(/(?P<folder>.+))?", Handler.tree),
    (("POST",), f"/api/models/{NAME}/paths-info/{REVISION}", Handler.paths_info),
    (("GET",), f"/api/models/{NAME}", Handler.info),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), f"/lfs/{NAME}/(?P<oid>[0-9a-f]+)", Handler.lfs_upload),
    (("POST",), f"/lfs/{NAME}/(?P<oid>[0-9a-f]+)/verify", Handler.lfs_verify),
    (("GET", "HEAD"), f"/{NAME}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]
