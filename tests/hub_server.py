"""A stand-in for the Hugging Face Hub: the endpoints that huggingface_hub uses to read and write repositories, on this machine.

What it does is taken from what huggingface_hub (0.34 to 2.4) asks and expects; it has no Xet storage, so large files go by LFS.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import pytest

from tools.range_server import Checkpoint, Handler, Pieces, Server

# huggingface_hub uploads by LFS in a way that its own HTTP library frowns upon.
uploads_to_hub = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

_DATE = "2025-01-01T00:00:00.000Z"
_BLOCK = 1 << 20
_LFS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".gguf", ".model")
_LFS_ABOVE = 10_000_000


def read_file(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """The bytes of a range of a file, piece by piece."""
    with path.open("rb") as file:
        file.seek(start)
        while start < stop:
            piece = file.read(min(_BLOCK, stop - start))
            start += len(piece)
            yield piece


@dataclass(frozen=True)
class Blob:
    """The content of a file: ``oid`` is git's (of the pointer where it is an LFS file), ``lfs`` the sha256 of an LFS file, else empty."""

    size: int
    oid: str
    lfs: str
    read: Callable[[int, int], Pieces]

    @property
    def tag(self) -> str:
        return self.lfs or self.oid


@dataclass(frozen=True)
class Commit:
    """A state of a repository: its files by their paths."""

    oid: str
    parent: str
    title: str
    description: str
    files: Mapping[str, Blob]


@dataclass
class Repo:
    """A repository; ``name`` is ``org/name``, or ``datasets/org/name``. ``pulls[k]`` is the pull request k + 1, open or closed."""

    name: str
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    pulls: list[dict[str, str]] = field(default_factory=list)

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch, tag, pull request or hash names."""
        return self.commits.get(self.refs.get(revision.removeprefix("refs/heads/"), revision))

    def commit(self, revision: str, title: str, files: Mapping[str, Blob], description: str = "") -> Commit:
        """Moves a reference to a new state."""
        parent = self.refs.get(revision, "")
        text = json.dumps([self.name, len(self.commits), parent, title, sorted((path, blob.tag) for path, blob in files.items())])
        made = Commit(hashlib.sha1(text.encode()).hexdigest(), parent, title, description, dict(files))
        self.commits[made.oid] = made
        self.refs[revision] = made.oid
        return made


class Refused(Exception):
    """An answer that is an error: status, the Hub's code for it, and a message."""

    def __init__(self, status: int, code: str = "", message: str = "", commit: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message or code, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.headers = {name: value for name, value in self.headers.items() if value}


class Hub(Server):
    """The Hub: a server on 127.0.0.1 whose large files are on another (``cdn``, on 127.0.0.2), by signed URLs that expire.

    Attributes:
        endpoint: what HF_ENDPOINT must be: ``url``, unless set to that of a ``flaky(hub.url)``.
        token: may do everything.
        read_token: may read what is public and open pull requests there, but not see private or gated repositories.
        repos: the repositories by name.
        cdn: the server of large files; ``cdn.requests`` is what it was asked. It refuses requests that carry a token, as S3 does.
        cdn_url: where redirects and uploads lead to; set it to the ``url`` of a ``flaky(hub.cdn.url, host="127.0.0.2")``.
        lifetime: seconds until a signed URL answers 403.
        page: entries in one answer that lists files or pull requests.
        multipart_above: larger uploads go in parts of ``part_size`` bytes.
        resolve_cache: small files are answered by way of a relative redirect, as the Hub does.
    """

    def __init__(self, store: Path) -> None:
        self.store = store
        self.token = "hf_writes"
        self.read_token = "hf_reads"
        self.repos: dict[str, Repo] = {}
        self.lifetime = 3600.0
        self.page = 1000
        self.part_size = 5 << 20
        self.multipart_above = 16 << 20
        self.resolve_cache = True
        self._epoch = 0
        self.cdn = Cdn(self)
        self.cdn_url = self.cdn.url
        super().__init__(_Pages)
        self.endpoint = self.url
        self.home = store / "home"
        self.home.mkdir()

    @property
    def env(self) -> dict[str, str]:
        """The environment that leads huggingface_hub here, with ``token`` and an HF_HOME of its own, ``home``."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }

    # -- what tests do

    def add(self, name: str, folder: Path | None = None, *, private: bool = False, gated: bool = False) -> Repo:
        """A new repository with the files of a folder, which must stay as they are while they are served."""
        repo = self.repos[name] = Repo(name, private, gated)
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()] if folder is not None else []
        repo.commit("main", "initial commit", {path.relative_to(folder).as_posix(): self.blob(path) for path in paths if folder})
        return repo

    def add_computed(self, name: str, checkpoint: Checkpoint) -> Repo:
        """A new repository of files that never exist, of any size; the sha256 it tells of large ones is made up."""
        repo = self.repos[name] = Repo(name)
        blobs = {}
        for path, file in checkpoint.files.items():
            if is_lfs(path, file.size):
                blobs[path] = lfs_blob(file.size, hashlib.sha256(file.tag.encode()).hexdigest(), file.read)
            else:
                blobs[path] = Blob(file.size, git_oid(file.head), "", file.read)
        repo.commit("main", "initial commit", blobs)
        return repo

    def put(self, name: str, files: Mapping[str, bytes | None], revision: str = "main") -> str:
        """A commit of someone else's: changes files (None removes one) and returns the new commit's hash."""
        repo = self.repos[name]
        now = dict(repo.commits[repo.refs[revision]].files)
        for path, data in files.items():
            now.pop(path, None)
            if data is not None:
                now[path] = self.blob(self._keep(data), path)
        return repo.commit(revision, "an edit", now).oid

    def files(self, name: str, revision: str = "main") -> list[str]:
        """The paths of a repository's files, sorted."""
        return sorted(self._at(name, revision).files)

    def read(self, name: str, path: str, revision: str = "main") -> bytes:
        """The content of a file."""
        blob = self._at(name, revision).files[path]
        return b"".join(blob.read(0, blob.size))

    def log(self, name: str, revision: str = "main") -> list[Commit]:
        """The commits of a revision, the newest first."""
        repo, commit = self.repos[name], self._at(name, revision)
        found = [commit]
        while commit.parent:
            found.append(commit := repo.commits[commit.parent])
        return found

    def expire(self) -> None:
        """Makes every URL that was signed so far answer 403."""
        self._epoch += 1

    def unfinished(self) -> list[str]:
        """The sha256 of uploads in parts that were never completed."""
        return sorted({path.name.partition(".")[0] for path in self.store.glob("*.part*")})

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Leads the huggingface_hub that this process has imported here; a new process only needs ``env``."""
        import huggingface_hub
        from huggingface_hub import constants, hf_api
        from huggingface_hub.utils import _http

        for name, value in self.env.items():
            monkeypatch.setenv(name, value)
        here: dict[str, object] = {
            "ENDPOINT": self.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_OFFLINE": False,
            "HF_HOME": str(self.home),
            "HF_HUB_CACHE": str(self.home / "hub"),
            "HUGGINGFACE_HUB_CACHE": str(self.home / "hub"),
            "HF_TOKEN_PATH": str(self.home / "token"),
        }
        for name, constant in here.items():
            monkeypatch.setattr(constants, name, constant, raising=False)
        monkeypatch.setattr(_http, "_HUB_ORIGINS", frozenset(), raising=False)
        monkeypatch.setattr(hf_api.api, "endpoint", self.endpoint)
        huggingface_hub.HfFileSystem.clear_instance_cache()

    # -- what the servers do

    def _at(self, name: str, revision: str) -> Commit:
        commit = self.repos[name].at(revision)
        assert commit is not None, f"{name} has no {revision}: {sorted(self.repos[name].refs)}"
        return commit

    def _keep(self, data: bytes) -> Path:
        path = self.store / hashlib.sha256(data).hexdigest()
        path.write_bytes(data)
        return path

    def blob(self, path: Path, name: str = "") -> Blob:
        """A file's content as the Hub stores it."""
        size = path.stat().st_size
        if not is_lfs(name or path.name, size):
            return Blob(size, git_oid(path.read_bytes()), "", functools.partial(read_file, path))
        total = hashlib.sha256()
        for piece in read_file(path, 0, size):
            total.update(piece)
        return lfs_blob(size, total.hexdigest(), functools.partial(read_file, path))

    def find(self, sha256: str) -> Blob | None:
        """A large file, if the Hub has it."""
        if (path := self.store / sha256).exists():
            return lfs_blob(path.stat().st_size, sha256, functools.partial(read_file, path))
        blobs = (blob for repo in self.repos.values() for commit in repo.commits.values() for blob in commit.files.values())
        return next((blob for blob in blobs if blob.lfs == sha256), None)

    def sign(self, path: str, **query: str) -> str:
        """A URL of the CDN that is valid for a while."""
        text = f"{path}?{urlencode(query | {'Expires': f'{time.time() + self.lifetime:.3f}'})}"
        return f"{self.cdn_url}{text}&Signature={self.signature(text)}"

    def signature(self, text: str) -> str:
        return hmac.digest(f"{self._epoch}".encode(), text.encode(), "sha256").hex()

    def stop(self) -> None:
        try:
            super().stop()
        finally:
            self.cdn.stop()


def is_lfs(name: str, size: int) -> bool:
    """Whether the Hub stores a file of this name and size by LFS."""
    return size > 0 and (name.endswith(_LFS) or size > _LFS_ABOVE)


def git_oid(data: bytes) -> str:
    """git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def lfs_blob(size: int, sha256: str, read: Callable[[int, int], Pieces]) -> Blob:
    """A file stored by LFS."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize %d\n" % (sha256.encode(), size)
    return Blob(size, git_oid(pointer), sha256, read)


# ---------------------------------------------------------------------------------------------------------------------------------
# The store of large files


class Cdn(Server):
    """Gives and takes large files by their sha256, to whoever has a signed URL."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        super().__init__(_Objects, "127.0.0.2")


class _Objects(Handler):
    server: Cdn

    def answer(self) -> None:
        hub = self.server.hub
        text, _, signature = self.path.partition("&Signature=")
        query = parse_qs(urlsplit(text).query)
        if "authorization" in self.record.headers:
            self.send_text(400, "<Error><Code>InvalidArgument</Code><Message>Only one auth mechanism allowed</Message></Error>")
        elif signature != hub.signature(text):
            self.send_text(403, "<Error><Code>SignatureDoesNotMatch</Code></Error>")
        elif time.time() > float(query["Expires"][0]):
            self.send_text(403, "<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
        elif self.command == "PUT":
            total = hashlib.md5(usedforsecurity=False)
            with tempfile.NamedTemporaryFile(dir=hub.store, delete=False) as file:
                for piece in self.body():
                    total.update(piece)
                    file.write(piece)
            number = query.get("part", [""])[0]
            sha256 = urlsplit(text).path.rpartition("/")[2]
            Path(file.name).rename(hub.store / (f"{sha256}.part{number}" if number else f"{sha256}.sent"))
            self.send_text(200, headers={"ETag": f'"{total.hexdigest()}"'})
        else:
            sha256 = urlsplit(text).path.rpartition("/")[2]
            blob = hub.find(sha256)
            assert blob is not None, f"a signed URL of nothing: {self.path}"
            # The store's own tag is not the sha256 that the Hub tells: it is that of an upload in parts.
            tag = hashlib.md5(sha256.encode(), usedforsecurity=False).hexdigest() + "-1"
            self.send_range(blob.size, tag, blob.read)


# ---------------------------------------------------------------------------------------------------------------------------------
# The Hub itself

_TYPES = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}
_API = re.compile(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+)(?:/(.+))?)?)?")
_FILE = re.compile(r"/((?:datasets/|spaces/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_CACHED = re.compile(r"/api/resolve-cache/(models|datasets|spaces)/([^/]+/[^/]+)/([^/]+)/(.+)")
_BATCH = re.compile(r"/((?:datasets/|spaces/)?[^/]+/[^/]+)\.git/info/lfs/(objects/batch|verify|complete)")


class _Pages(Handler):
    server: Hub

    def answer(self) -> None:
        path = urlsplit(self.path).path
        self.query = parse_qs(urlsplit(self.path).query)
        try:
            self._route(path)
        except Refused as refused:
            self.send_json({"error": str(refused)}, refused.status, refused.headers)

    def _route(self, path: str) -> None:
        if found := _CACHED.fullmatch(path):
            self._file(_TYPES[found[1]] + found[2], unquote(found[3]), unquote(found[4]), direct=True)
        elif found := _FILE.fullmatch(path):
            self._file(found[1], unquote(found[2]), unquote(found[3]), direct=not self.server.resolve_cache)
        elif found := _BATCH.fullmatch(path):
            {"objects/batch": self._batch, "verify": self._verify, "complete": self._complete}[found[2]](found[1])
        elif path in _PLAIN:
            _PLAIN[path](self)
        elif (found := _API.fullmatch(path)) and (found[3] or "revision") in _VERBS:
            verb, revision = found[3] or "revision", unquote(found[4] or "main")
            writes = verb in ("branch", "preupload", "commit") and not revision.startswith("refs/pr/")
            repo = self._repo(_TYPES[found[1]] + found[2], write=writes)
            _VERBS[verb](self, repo, revision, unquote(found[5] or ""))
        else:
            raise Refused(404, "", f"no such page: {self.command} {path}")

    # -- who may do what

    def _account(self) -> str:
        token = self.record.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in (self.server.token, self.server.read_token):
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return token

    def _repo(self, name: str, *, write: bool = False) -> Repo:
        account = self._account()
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and account != self.server.token):
            if not account:
                raise Refused(401, "RepoNotFound", "Invalid username or password.")
            raise Refused(404, "RepoNotFound", "Repository not found")
        if write and not account:
            raise Refused(401, "", "Invalid username or password.")
        if write and account != self.server.token and self.query.get("create_pr") != ["1"]:
            raise Refused(403, "", "Forbidden: you don't have the required permissions to write to this repository")
        return repo

    def _at(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _json(self) -> Any:
        return json.loads(b"".join(self.body()))

    @property
    def _own(self) -> str:
        """This server as the client knows it: by way of a proxy, perhaps."""
        return f"http://{self.headers['Host']}"

    # -- reading

    def _file(self, name: str, revision: str, path: str, *, direct: bool) -> None:
        repo = self._repo(name)
        if repo.gated and self._account() != self.server.token:
            status, what = (403, "You are not in the authorized list") if self._account() else (401, "You must be authenticated")
            raise Refused(status, "GatedRepo", f"Access to model {name} is restricted. {what} to access it.")
        commit = self._at(repo, revision)
        blob = commit.files.get(path)
        if blob is None:
            raise Refused(404, "EntryNotFound", "Entry not found", commit.oid)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if blob.lfs:
            where = self.server.sign(f"/lfs/{blob.lfs}")
            linked = {"X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.lfs}"', "Location": where}
            self.send_text(302, f"Found. Redirecting to {where}", headers | linked)
        elif not direct:
            kind, _, short = name.rpartition("/")[0].rpartition("/")
            where = f"/api/resolve-cache/{kind or 'models'}/{short}/{name.rpartition('/')[2]}/{commit.oid}/{quote(path)}"
            self.send_text(307, headers=headers | {"Location": where, "X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.oid}"'})
        else:
            self.send_range(blob.size, blob.oid, blob.read, headers)

    def _info(self, repo: Repo, revision: str, _path: str) -> None:
        commit = self._at(repo, revision)
        siblings: list[dict[str, Any]] = []
        for path, blob in sorted(commit.files.items()):
            siblings.append({"rfilename": path})
            if "blobs" in self.query:
                siblings[-1] |= {"size": blob.size, "blobId": blob.oid}
                if blob.lfs:
                    siblings[-1]["lfs"] = {"sha256": blob.lfs, "size": blob.size, "pointerSize": 134}
        short = repo.name.removeprefix("datasets/").removeprefix("spaces/")
        flags = {"private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False, "downloads": 0, "likes": 0}
        dates = {"createdAt": _DATE, "lastModified": _DATE}
        about = {"_id": "0", "id": short, "author": short.partition("/")[0], "sha": commit.oid, "tags": [], "siblings": siblings}
        self.send_json(about | flags | dates, headers={"X-Repo-Commit": commit.oid})

    def _entries(self, commit: Commit, *, expand: bool) -> dict[str, dict[str, Any]]:
        """Every file and folder."""
        last = {"lastCommit": {"id": commit.oid, "title": commit.title, "date": _DATE}} if expand else {}
        found: dict[str, dict[str, Any]] = {}
        for path, blob in sorted(commit.files.items()):
            for end in (match.start() for match in re.finditer("/", path)):
                folder = path[:end]
                found.setdefault(folder, {"type": "directory", "oid": git_oid(folder.encode()), "size": 0, "path": folder, **last})
            lfs = {"lfs": {"oid": blob.lfs, "size": blob.size, "pointerSize": 134}} if blob.lfs else {}
            found[path] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path, **lfs, **last}
        return found

    def _tree(self, repo: Repo, revision: str, path: str) -> None:
        commit = self._at(repo, revision)
        expand = self.query.get("expand", [""])[0].lower() in ("1", "true")
        recursive = self.query.get("recursive", [""])[0].lower() in ("1", "true")
        entries = self._entries(commit, expand=expand)
        if path and entries.get(path, {}).get("type") != "directory":
            raise Refused(404, "EntryNotFound", f"{path} does not exist on {revision!r}", commit.oid)
        below = f"{path}/" if path else ""
        listed = [e for name, e in entries.items() if name.startswith(below) and (recursive or "/" not in name[len(below) :])]
        start = int(self.query.get("cursor", ["0"])[0])
        stop = start + min(self.server.page, int(self.query.get("limit", [self.server.page])[0]))
        headers = {"X-Repo-Commit": commit.oid}
        if stop < len(listed):
            query = urlencode({name: value[0] for name, value in self.query.items()} | {"cursor": str(stop)})
            headers["Link"] = f'<{self._own}{urlsplit(self.path).path}?{query}>; rel="next"'
        self.send_json(listed[start:stop], headers=headers)

    def _paths_info(self, repo: Repo, revision: str, _path: str) -> None:
        body = b"".join(self.body()).decode()
        asked = json.loads(body) if body.startswith("{") else parse_qs(body)
        expand = str(asked.get("expand", [""])).lower().strip("[']") in ("1", "true")
        entries = self._entries(self._at(repo, revision), expand=expand)
        self.send_json([entries[path] for path in asked.get("paths", []) if path in entries])

    def _refs(self, repo: Repo, _revision: str, _path: str) -> None:
        named: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for name, oid in repo.refs.items():
            pull = name.startswith("refs/pr/")
            ref = {"name": name.removeprefix("refs/pr/"), "ref": name if pull else f"refs/heads/{name}", "targetCommit": oid}
            named["pullRequests" if pull else "branches"].append(ref)
        self.send_json(named)

    def _commits(self, repo: Repo, revision: str, _path: str) -> None:
        self._at(repo, revision)
        log = self.server.log(repo.name, revision)
        self.send_json(
            [{"id": c.oid, "title": c.title, "message": c.description, "date": _DATE, "authors": [{"user": "user"}]} for c in log]
        )

    def _auth_check(self, repo: Repo, _revision: str, _path: str) -> None:
        if repo.gated and self._account() != self.server.token:
            raise Refused(403, "GatedRepo", f"Access to model {repo.name} is restricted.")
        self.send_json({})

    def _whoami(self) -> None:
        account = self._account()
        if not account:
            raise Refused(401, "", "Invalid username or password.")
        role = "write" if account == self.server.token else "read"
        self.send_json({"type": "user", "name": "user", "orgs": [], "auth": {"type": "access_token", "accessToken": {"role": role}}})

    # -- writing

    def _create(self) -> None:
        asked = self._json()
        if self._account() != self.server.token:
            raise Refused(403 if self._account() else 401, "", "You don't have the rights to create a model under this namespace")
        kind = asked.get("type", "model")
        short = f"{asked.get('organization') or 'user'}/{asked['name']}"
        name = _TYPES[f"{kind}s"] + short
        told = {"url": f"{self._own}/{name}", "name": short, "id": short}
        with self.server.lock:
            if name in self.server.repos:
                status, told["error"] = 409, f"You already created this {kind} repo: {short}"
            else:
                status = 200
                self.server.add(name, private=bool(asked.get("private")) or asked.get("visibility") == "private")
        self.send_json(told, status)

    def _delete(self) -> None:
        asked = self._json()
        name = _TYPES[f"{asked.get('type', 'model')}s"] + f"{asked.get('organization') or 'user'}/{asked['name']}"
        del self.server.repos[self._repo(name, write=True).name]
        self.send_json({})

    def _branch(self, repo: Repo, branch: str, _path: str) -> None:
        if self.command == "DELETE":
            repo.refs.pop(branch, None)
        elif branch in repo.refs:
            raise Refused(409, "", "Reference already exists")
        else:
            repo.refs[branch] = self._at(repo, self._json().get("startingPoint", "main")).oid
        self.send_json({})

    def _preupload(self, repo: Repo, revision: str, _path: str) -> None:
        files = self._at(repo, revision).files
        told = []
        for asked in self._json()["files"]:
            blob = files.get(asked["path"])
            mode = "lfs" if is_lfs(asked["path"], asked["size"]) else "regular"
            told.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False} | ({"oid": blob.tag} if blob else {}))
        self.send_json({"files": told})

    def _batch(self, name: str) -> None:
        asked = self._json()
        self._repo(name)
        if not self._account():
            raise Refused(401, "", "Invalid username or password.")
        told: list[dict[str, Any]] = []
        multipart = False
        for thing in asked["objects"]:
            oid, size = thing["oid"], thing["size"]
            told.append({"oid": oid, "size": size, "authenticated": True})
            if self.server.find(oid):
                continue
            upload: dict[str, Any] = {"href": self.server.sign(f"/upload/{oid}")}
            if size > self.server.multipart_above and "multipart" in asked["transfers"]:
                multipart = True
                count = -(-size // self.server.part_size)
                parts = {f"{k:05d}": self.server.sign(f"/upload/{oid}", part=f"{k:05d}") for k in range(1, count + 1)}
                done = {"oid": oid, "count": str(count), "signature": self.server.signature(f"{oid} {count}")}
                upload = {"href": f"{self._own}/{name}.git/info/lfs/complete?{urlencode(done)}"}
                upload["header"] = {"chunk_size": str(self.server.part_size), **parts}
            told[-1]["actions"] = {"upload": upload, "verify": {"href": f"{self._own}/{name}.git/info/lfs/verify"}}
        self.send_json({"transfer": "multipart" if multipart else "basic", "objects": told})

    def _complete(self, _name: str) -> None:
        asked = self._json()
        oid, count = self.query["oid"][0], int(self.query["count"][0])
        if self.query["signature"] != [self.server.signature(f"{oid} {count}")]:
            raise Refused(403, "", "Invalid signature")
        paths = [self.server.store / f"{oid}.part{k:05d}" for k in range(1, count + 1)]
        if [part["partNumber"] for part in asked["parts"]] != list(range(1, count + 1)) or not all(path.exists() for path in paths):
            raise Refused(400, "", f"some of {count} parts are missing")
        with (self.server.store / f"{oid}.sent").open("wb") as whole:
            for path, part in zip(paths, asked["parts"], strict=True):
                data = path.read_bytes()
                if part["etag"].strip('"') != hashlib.md5(data, usedforsecurity=False).hexdigest():
                    raise Refused(400, "", f"part {part['partNumber']} is another one")
                whole.write(data)
        for path in paths:
            path.unlink()
        self.send_json({"success": True})

    def _verify(self, name: str) -> None:
        asked = self._json()
        self._repo(name)
        path = self.server.store / f"{asked['oid']}.sent"
        if not self.server.find(asked["oid"]):
            if not path.exists():
                raise Refused(404, "", "the object was not uploaded")
            blob = self.server.blob(path, ".bin")
            if (blob.lfs, blob.size) != (asked["oid"], asked["size"]):
                path.unlink()
                raise Refused(422, "", "the uploaded object is not the one announced")
            path.rename(self.server.store / asked["oid"])
        self.send_json({"success": True})

    def _commit(self, repo: Repo, revision: str, _path: str) -> None:
        lines = [json.loads(line) for line in b"".join(self.body()).splitlines()]
        with self.server.lock:
            now = self._at(repo, revision)
            header = lines[0]["value"]
            if header.get("parentCommit") not in (None, now.oid):
                raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
            files = dict(now.files)
            for line in lines[1:]:
                self._apply(files, line["key"], line["value"])
            told: dict[str, Any] = {"success": True, "hookOutput": ""}
            if self.query.get("create_pr") == ["1"]:
                repo.pulls.append({"title": header["summary"], "description": header["description"], "status": "open"})
                number = len(repo.pulls)
                revision = f"refs/pr/{number}"
                repo.refs[revision] = now.oid
                told["pullRequestUrl"] = f"{self._own}/{repo.name}/discussions/{number}"
            made = repo.commit(revision, header["summary"], files, header["description"])
        self.send_json(told | {"commitOid": made.oid, "commitUrl": f"{self._own}/{repo.name}/commit/{made.oid}"})

    def _apply(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            data = base64.b64decode(value["content"])
            kept = self.server.store / f"git-{git_oid(data)}"
            kept.write_bytes(data)
            files[path] = Blob(len(data), git_oid(data), "", functools.partial(read_file, kept))
        elif key == "lfsFile":
            found = self.server.find(value["oid"])
            if found is None:
                raise Refused(400, "", f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = found
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if name == path or (key == "deletedFolder" and name.startswith(path.rstrip("/") + "/"))]
            if not gone:
                raise Refused(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
            for name in gone:
                del files[name]
        else:
            raise Refused(400, "", f"not an operation: {key}")

    # -- pull requests

    def _about(self, repo: Repo, number: int) -> dict[str, Any]:
        pull = repo.pulls[number - 1]
        kind = next(kind for kind, start in reversed(_TYPES.items()) if repo.name.startswith(start)).removesuffix("s")
        about = {"num": number, "title": pull["title"], "status": pull["status"], "author": {"name": "user"}, "createdAt": _DATE}
        return about | {"isPullRequest": True, "repo": {"name": repo.name.removeprefix(_TYPES[f"{kind}s"]), "type": kind}}

    def _discussions(self, repo: Repo, number: str, what: str) -> None:
        if self.command == "POST" and what:  # status or merge
            pull = repo.pulls[int(number) - 1]
            self._repo(repo.name, write=True)
            if what == "merge":
                theirs = self._at(repo, f"refs/pr/{number}")
                repo.commit("main", f"{pull['title']} (#{number})", theirs.files)
            pull["status"] = "merged" if what == "merge" else self._json()["status"]
            self.send_json({"newStatus": {"id": "0", "type": "status-change", "createdAt": _DATE, "author": {"name": "user"}}})
        elif self.command == "POST":
            if not self._account():
                raise Refused(401, "", "Invalid username or password.")
            asked = self._json()
            repo.pulls.append({"title": asked["title"], "description": asked["description"], "status": "draft"})
            repo.refs[f"refs/pr/{len(repo.pulls)}"] = repo.refs["main"]
            self.send_json(self._about(repo, len(repo.pulls)))
        elif number != "main":
            if int(number) > len(repo.pulls):
                raise Refused(404, "", "Discussion not found")
            changes = {"base": "refs/heads/main"}
            self.send_json(self._about(repo, int(number)) | {"changes": changes, "filesWithConflicts": [], "events": [], "diff": ""})
        else:
            wanted = self.query.get("status", ["all"])[0]
            start = int(self.query.get("p", ["0"])[0]) * self.server.page
            found = [self._about(repo, k) for k in range(len(repo.pulls), 0, -1) if wanted in ("all", repo.pulls[k - 1]["status"])]
            self.send_json({"discussions": found[start : start + self.server.page], "count": len(found), "start": start})


_PLAIN: dict[str, Callable[[_Pages], None]] = {
    "/api/whoami-v2": _Pages._whoami,
    "/api/repos/create": _Pages._create,
    "/api/repos/delete": _Pages._delete,
    "/api/validate-yaml": lambda page: page.send_json({}),
}
_VERBS: dict[str, Callable[[_Pages, Repo, str, str], None]] = {
    "revision": _Pages._info,
    "tree": _Pages._tree,
    "paths-info": _Pages._paths_info,
    "refs": _Pages._refs,
    "commits": _Pages._commits,
    "auth-check": _Pages._auth_check,
    "branch": _Pages._branch,
    "preupload": _Pages._preupload,
    "commit": _Pages._commit,
    "discussions": _Pages._discussions,
}


@contextmanager
def hub(repos: Mapping[str, Path] | None = None) -> Iterator[Hub]:
    """A Hub with these repositories: folders by ``org/name``. See ``Hub`` for what can be set and asked.

    For a process of its own: ``env=os.environ | hub.env``. In this process ``hub.patch(monkeypatch)``, since huggingface_hub reads its
    environment when it is imported.
    """
    with tempfile.TemporaryDirectory(prefix="hub-") as store, Hub(Path(store)) as server:
        for name, folder in (repos or {}).items():
            server.add(name, folder)
        yield server
