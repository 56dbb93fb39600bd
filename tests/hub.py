"""A small Hub on localhost, in a thread: the endpoints that `huggingface_hub` calls to create, fill and read a model's repo."""

import base64
import hashlib
import json
import re
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SHUT_RDWR
from threading import Lock, Thread
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import transformers.utils.hub


# Users by token: what they may write, and the rights of the token.
USERS = {"hf_" + "w" * 34: ("ada", "write"), "hf_" + "r" * 34: ("bob", "read")}
TOKEN, READ_TOKEN = USERS
# Files of these kinds go by large file storage, as `.gitattributes` of the Hub has it.
_LARGE = (".safetensors", ".png")


class Hub:
    """State of the stand-in.

    url: where it listens. repos: {id: {"private": bool, "branches": {name: [(hash, {path: bytes})]}}}, oldest commit first.
    stored: {sha256: bytes} of large files. uploads: sha256 of every large file that was put, in order.
    uploads_left: large files that arrive before every connection is cut in the middle of one; None: all.
    """

    def __init__(self):
        self.repos, self.stored, self.uploads, self.uploads_left, self.lock = {}, {}, [], None, Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def commits(self, repo, branch="main"):
        """[(hash, {path: bytes})] of a branch, oldest first."""
        return self.repos[repo]["branches"][branch]

    def files(self, repo, branch="main"):
        """{path: bytes} at the head of a branch."""
        return self.commits(repo, branch)[-1][1]

    def commit(self, repo, files, branch="main"):
        commits = self.commits(repo, branch)
        commits.append((hashlib.sha1(f"{repo} {branch} {len(commits)}".encode()).hexdigest(), files))
        return commits[-1][0]


@contextmanager
def running_hub(cache):
    """A Hub that `huggingface_hub` and transformers of this process talk to, logged in with the token that may write.

    cache: folder of what is downloaded."""
    hub = Hub()
    with pytest.MonkeyPatch.context() as patch:
        constants = huggingface_hub.constants
        settings = {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": cache}
        settings["HUGGINGFACE_CO_URL_TEMPLATE"] = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in settings.items():
            patch.setattr(constants, name, value)
        patch.setattr(transformers.utils.hub, "_hf_api", None)
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        patch.setenv("HF_TOKEN", TOKEN)
        # Retries wait for seconds, and the stand-in is back at once.
        clock = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
        patch.setattr(huggingface_hub.utils._http, "time", clock)
        try:
            yield hub
        finally:
            hub.server.shutdown()
            hub.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # A head and a body in packets of their own would wait 40 ms for each other.
    wbufsize = -1
    hub = None

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self):
        path = unquote(urlsplit(self.path).path)
        self.sent = self._body() if self.command == "POST" else b""
        for pattern, name in _ROUTES:
            if found := re.fullmatch(pattern, path):
                return getattr(self, name)(**found.groupdict())
        return self._error(404, f"the stand-in has no {self.command} {path}")

    # Who asks, and what they may

    def _user(self):
        """(name, role) of the token; ("", "anonymous") without one, None of a wrong one."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return USERS.get(given) if given else ("", "anonymous")

    def _may_write(self, owner):
        """Whether the caller may write there; says so otherwise."""
        user = self._user()
        if user is None:
            self._error(401, "Invalid credentials in Authorization header")
        elif user[1] == "anonymous":
            self._error(401, "Invalid username or password.")
        elif user != (owner, "write"):
            self._error(403, "You don't have the rights to create a model under this namespace")
        else:
            return True
        return False

    def _commit(self, repo, revision):
        """(hash, files) of a revision that the caller may read, or None after an error was said."""
        found, user = self.hub.repos.get(repo), self._user()
        if user is None:
            return self._error(401, "Invalid credentials in Authorization header")
        if found is None or (found["private"] and user[0] != repo.split("/")[0]):
            return self._error(401, "Invalid username or password.", "RepoNotFound")
        branches, revision = found["branches"], revision or "main"
        if revision in branches:
            return branches[revision][-1]
        every = [commit for commits in branches.values() for commit in commits if commit[0] == revision]
        return every[0] if every else self._error(404, "Invalid rev id", "RevisionNotFound")

    # Answers

    def _send(self, status, body=b"", headers=()):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **dict(headers)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value, status=200, headers=()):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **dict(headers)})

    def _error(self, status, message, code=None):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._json({"error": message}, status, headers)

    def _body(self):
        """What the caller sent; chunked, as streams of files are, or not."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    # Endpoints

    def whoami(self):
        user = self._user()
        if user is None or user[1] == "anonymous":
            return self._error(401, "Invalid credentials in Authorization header")
        return self._json({"name": user[0], "type": "user", "orgs": [], "auth": {"accessToken": {"role": user[1]}}})

    def create(self):
        asked = json.loads(self.sent)
        user = self._user()
        owner = asked.get("organization") or (user[0] if user else "")
        repo = f"{owner}/{asked['name']}"
        if not self._may_write(owner):
            return
        if repo in self.hub.repos:
            return self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"}, 409)
        self.hub.repos[repo] = {"private": asked.get("visibility") == "private", "branches": {"main": []}}
        self.hub.commit(repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json({"url": f"{self.hub.url}/{repo}"})

    def validate(self):
        self._json({"errors": [], "warnings": []})

    def preupload(self, repo, revision):
        asked = json.loads(self.sent)["files"]
        if not self._may_write(repo.split("/")[0]) or (found := self._commit(repo, revision)) is None:
            return
        files = []
        for item in asked:
            large, old = item["path"].endswith(_LARGE), found[1].get(item["path"])
            files.append({"path": item["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
            if old is not None:
                files[-1]["oid"] = hashlib.sha256(old).hexdigest() if large else _git_hash(old)
        self._json({"files": files})

    def batch(self, repo):
        asked = json.loads(self.sent)["objects"]
        if not self._may_write(repo.split("/")[0]):
            return
        objects = [{"oid": item["oid"], "size": item["size"]} for item in asked]
        for item in objects:
            if item["oid"] not in self.hub.stored:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/storage/{item['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def store(self, oid):
        with self.hub.lock:
            cut = self.hub.uploads_left == 0
            if self.hub.uploads_left:
                self.hub.uploads_left -= 1
        if cut:
            self.rfile.read(100)
            self.close_connection = True
            return self.connection.shutdown(SHUT_RDWR)
        body = self._body()
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.stored[oid] = body
        self.hub.uploads.append(oid)
        self._send(200)

    def change(self, repo, revision):
        lines = [json.loads(line) for line in self.sent.splitlines()]
        if not self._may_write(repo.split("/")[0]) or (found := self._commit(repo, revision)) is None:
            return
        files = dict(found[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.hub.commit(repo, files, revision)
        self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha})

    def branch(self, repo, revision):
        if self._may_write(repo.split("/")[0]):
            branches = self.hub.repos[repo]["branches"]
            if revision in branches:
                return self._error(409, "Reference already exists")
            branches[revision] = list(branches["main"])
            self._json({}, 201)

    def no_dataset(self):
        self._error(401, "Invalid username or password.", "RepoNotFound")

    def info(self, repo, revision=None):
        if (found := self._commit(repo, revision)) is not None:
            siblings = [{"rfilename": path} for path in found[1]]
            self._json({"id": repo, "sha": found[0], "private": False, "tags": [], "siblings": siblings})

    def tree(self, repo, revision, folder=""):
        if (found := self._commit(repo, revision)) is None:
            return
        prefix = f"{folder}/" if folder else ""
        inside = {path: body for path, body in found[1].items() if path.startswith(prefix)}
        if not inside:
            return self._error(404, "no such folder", "EntryNotFound")
        self._json([{"type": "file", "path": p, "size": len(b), "oid": _git_hash(b)} for p, b in inside.items()])

    def resolve(self, repo, revision, path):
        if (found := self._commit(repo, revision)) is None:
            return
        if path not in found[1]:
            return self._error(404, "Entry not found", "EntryNotFound")
        body = found[1][path]
        self._send(200, body, {"ETag": f'"{_git_hash(body)}"', "X-Repo-Commit": found[0]})


def _git_hash(body):
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


_REPO = "(?P<repo>[^/]+/[^/]+)"
_ROUTES = [
    ("/api/whoami-v2", "whoami"),
    ("/api/repos/create", "create"),
    ("/api/validate-yaml", "validate"),
    (f"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    (f"/{_REPO}.git/info/lfs/objects/batch", "batch"),
    ("/storage/(?P<oid>[^/]+)", "store"),
    (f"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", "change"),
    (f"/api/models/{_REPO}/branch/(?P<revision>[^/]+)", "branch"),
    ("/api/datasets/.*", "no_dataset"),
    (f"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
    (f"/api/models/{_REPO}(/revision/(?P<revision>[^/]+))?", "info"),
    (f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]
