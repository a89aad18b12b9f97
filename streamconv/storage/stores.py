"""Where URLs lead: which files a store has, how large they are, what tells one version from another, and how to ask for their bytes.

The URLs that the rest of the package sees are public ones: a query, which may be a signature or a token, stays in this process's memory
(`public`) and is put back when a server is asked (`private`).
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from html import unescape
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import quote, unquote, urljoin

from streamconv.errors import RunError, StreamconvError, UsageError
from streamconv.storage import Entry

if TYPE_CHECKING:
    import requests

HEAD = 8 << 10  # bytes of a file that are asked for together with its size
CONCURRENT = 16  # requests at a time, where many small ones are made
TRIES = 10  # attempts of a small request ...
UNREACHED = 4  # ... and where nobody is there to answer
FIRST_WAIT, LONGEST_WAIT = 0.25, 4.0  # seconds before another attempt: doubled each time
TIMEOUT = (10.0, 60.0)  # seconds to connect, and between two bytes
WEB = ("http", "https")

_MAX_PAGE = 4 << 20  # bytes of a server's listing of a directory
_MAX_TEXT = 100_000_000  # bytes of an index
_DEPTH = 2  # folders below a checkpoint's that are looked into, where each takes a request ...
_FOLDERS = 256  # ... at most
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_KNOWN = (
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin", "model.ckpt", "latest",
    "consolidated.safetensors", "consolidated.00.pth", "consolidated.pth", "param_name_map.json", "config.json", "generation_config.json",
    "params.json", "model_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "modules.json", "README.md", "LICENSE",
)  # fmt: skip
_TELLING = ("latest", "param_name_map.json", "config.json")  # which other files there are, beside the indexes
_VERSIONS = (  # what file systems call what changes with a file
    "ETag", "etag", "e_tag", "md5Hash", "md5", "sha256", "generation", "checksum", "LastModified", "last_modified", "mtime", "created",
)  # fmt: skip
_LINK = re.compile(r"""<a\s[^>]*?\bhref\s*=\s*("[^"]*"|'[^']*'|[^\s>]+)""", re.IGNORECASE)
_HUB = re.compile(
    r"hf://(?:(?P<kind>models|datasets|spaces)/)?(?P<id>[^/@]+(?:/[^/@]+)?)"
    r"(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)
_Found = TypeVar("_Found")

opened: dict[str, Entry] = {}
"""What files of web servers were when their headers were read: what a plan is made for."""


class Probed(dict[str, Entry]):
    """What was found by asking for names: there may be more. ``read`` holds what had to be read to know the names."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[str, bytes] = {}


class Store(Protocol):
    """What answers for the URLs of a scheme. The URLs it takes and gives are public ones.

    Errors are one line: UsageError for what is not there, not allowed or has no ranges, RunError where nothing answers after several tries.
    """

    def pin(self, url: str) -> str:
        """The URL of what it stands for now, where the names of versions can move (``hf://org/name@main``)."""
        ...

    def list(self, url: str) -> Mapping[str, Entry]:
        """Every file below a URL by its relative name, ``""`` for one that is a file itself; empty where there is nothing.

        A size is -1 where only `entry` tells it. What a server cannot list is `Probed`, by the names that checkpoints have.
        """
        ...

    def entry(self, url: str) -> Entry:
        """A file's size and tag, asked for anew."""
        ...

    def head(self, url: str) -> tuple[Entry, bytes]:
        """The same, with those of the first `HEAD` bytes that come along without another request."""
        ...

    def target(self, url: str) -> tuple[str, dict[str, str]] | None:
        """The http(s) address and the headers to ask for ranges of a file, neither to be shown to anybody; None: `fetch` is the way."""
        ...

    def fetch(self, url: str, start: int, stop: int) -> bytes:
        """Bytes of a file in a store without such an address."""
        ...


def store_of(url: str) -> Store:
    """The store of a URL.

    Raises:
        UsageError: nothing knows its scheme, or a package is missing.
    """
    scheme = scheme_of(url)
    if scheme in WEB:
        return _web()
    if scheme == "hf":
        return _hub(os.environ.get("HF_ENDPOINT") or None)
    return _filesystem(url)


def scheme_of(url: str) -> str:
    """What stands before the ``://``, in small letters."""
    return url.partition("://")[0].lower()


# Secrets -------------------------------------------------------------------------------------------------------------

_queries: dict[str, str] = {}


def public(url: str) -> str:
    """A URL without its query, which is kept for `private`.

    Raises:
        UsageError: it has a user's name or password in it, or a query where there can be none.
    """
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    rest, _, query = rest.partition("#")[0].partition("?") if scheme in WEB else rest.partition("?")
    host, slash, path = rest.partition("/")
    if "@" in host and (scheme != "hf" or ":" in host):
        shown = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
        raise UsageError(f"{shown}: the URL has a name or password in it, which would end up in logs: leave it out, {_variables(scheme)}")
    url = f"{scheme}://{rest}"
    if query and scheme not in WEB:
        raise UsageError(f"{url}: a {scheme}:// URL has no query (what follows a ?): leave it out")
    if query:
        _queries[url.rstrip("/")] = query
    return url


def private(url: str) -> str:
    """A public URL with the query that it, or the folder it lies in, was given with."""
    above = url.rstrip("/")
    while above and above not in _queries:
        above = above.rpartition("/")[0]
    return f"{url}?{_queries[above]}" if above else url


def _variables(scheme: str) -> str:
    """How credentials are given."""
    if scheme == "hf":
        return "set HF_TOKEN to a token that may read it, and accept the model's terms on its page if it has any"
    if scheme in WEB:
        return "give a signed URL that is still valid (signatures are not kept in plans), or put a login into ~/.netrc"
    if scheme in ("s3", "s3a"):
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (and AWS_ENDPOINT_URL for a server of your own)"
    if scheme in ("gs", "gcs"):
        return "set GOOGLE_APPLICATION_CREDENTIALS, or log in with gcloud"
    return f"set the credentials that fsspec's {scheme} file system looks for"


def refusal(url: str, status: int) -> UsageError:
    """The error for a file that a server does not give away."""
    shown = url if url.isprintable() else repr(url)
    if status in (401, 403, 407):
        what = "not without credentials" if status == 401 else "access is denied"
        return UsageError(f"{shown}: {what} (HTTP {status}): {_variables(scheme_of(url))}")
    if status in (404, 410):
        told = f" (HTTP {status})" if scheme_of(url) in WEB else ""
        return UsageError(f"{shown}: no such file or directory{told}: give the URL of a checkpoint's file or its directory")
    return UsageError(f"{shown}: the server answers HTTP {status}: check the address")


def _missing(scheme: str, error: ImportError) -> UsageError:
    """The error for a package that is not there; fsspec's own says only ``Install s3fs to access S3``."""
    said = re.search(r"[Ii]nstall '?([\w-]+)", str(error))
    name = (error.name or (said[1] if said else "fsspec")).partition(".")[0]
    more = "" if name in ("fsspec", "requests", "huggingface_hub", "s3fs", "gcsfs", "aiohttp") else f" {name}"
    return UsageError(f"{scheme}:// needs the package {name}: pip install 'streamconv[remote]'{more}")


# HTTP ----------------------------------------------------------------------------------------------------------------


@cache
def _session() -> requests.Session:
    """The connections for small requests, of all threads."""
    import requests
    from requests.adapters import HTTPAdapter

    session = requests.Session()
    for scheme in WEB:
        session.mount(f"{scheme}://", HTTPAdapter(pool_maxsize=CONCURRENT))
    return session


class _Refused(Exception):
    """A final answer of a server that is not the file; the status is 200 for one that knows no ranges."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"HTTP {status}")


def _ask(url: str, read: Callable[[requests.Response], _Found], headers: Mapping[str, str] | None = None) -> _Found:
    """What ``read`` makes of the answer to a GET, which is made again where another attempt may do better."""
    from urllib3.exceptions import HTTPError

    given = {"Accept-Encoding": "identity", **(headers or {})}
    attempts = _Attempts(url)
    while True:
        try:
            with _session().get(private(url), headers=given, stream=True, timeout=TIMEOUT) as answer:
                if answer.status_code not in (408, 425, 429) and answer.status_code < 500:
                    return read(answer)
                attempts.failed(f"HTTP {answer.status_code}", answer.headers.get("Retry-After", ""))
        except (OSError, ValueError, HTTPError) as error:  # whose text may hold the address
            if isinstance(error, ValueError):
                raise UsageError(f"{url}: not an address that can be asked: check it") from None
            if "CERTIFICATE_VERIFY_FAILED" in repr(error):
                raise UsageError(f"{url}: the server's certificate is not one that is trusted: set REQUESTS_CA_BUNDLE") from None
            attempts.failed(_cause(error), unreached=re.search("NewConnection|NameResolution", repr(error.args)) is not None)


class _Attempts:
    """Counts the failures of a request and waits after each, longer and longer."""

    def __init__(self, url: str, most: int = TRIES, unreached: int = UNREACHED) -> None:
        self._url, self._count, self._most, self._unreached = url, 0, most, unreached

    def failed(self, problem: str, asked: str = "", *, unreached: bool = False) -> None:
        """Waits before the next attempt, at least the seconds ``asked`` for.

        Raises:
            RunError: there have been enough.
        """
        self._count += 1
        if self._count >= (self._unreached if unreached else self._most):
            raise RunError(
                f"{self._url}: no answer ({problem}, attempts: {self._count}): check the address and the network, then try again"
            ) from None
        wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (self._count - 1)) * random.uniform(0.5, 1)  # noqa: S311 - no secret
        time.sleep(max(wait, min(float(asked), 60.0)) if asked.isdigit() else wait)


def _cause(error: BaseException) -> str:
    """What failed, without what the libraries' messages say of addresses."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror and inner.errno:
            return inner.strerror
        inner = next((arg for arg in (getattr(inner, "reason", None), *inner.args) if isinstance(arg, BaseException)), inner.__cause__)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()


def _first(url: str, nbytes: int) -> tuple[Entry, bytes]:
    """A file's size, tag and first bytes, by a request for a range."""

    def read(answer: requests.Response) -> tuple[Entry, bytes]:
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        place = answer.headers.get("Content-Range", "")
        total = place.rpartition("/")[2]
        if answer.status_code == 206 and place.startswith("bytes 0-") and total.isdigit():
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise UsageError(f"{url}: the server sends its files compressed: switch that off there, or download the file")
            return Entry(int(total), tag), answer.raw.read(nbytes + 1, decode_content=False)[:nbytes]
        if answer.status_code == 416 and total == "0":
            return Entry(0, tag), b""
        if answer.status_code == 200 and answer.headers.get("Content-Length") == "0":
            return Entry(0, tag), b""
        raise _Refused(200 if answer.status_code == 206 else answer.status_code)

    return _ask(url, read, {"Range": f"bytes=0-{nbytes - 1}"})


def _in_parallel(work: Callable[[str], _Found], items: Iterable[str]) -> list[_Found]:
    with ThreadPoolExecutor(CONCURRENT) as pool:
        return list(pool.map(work, items))


def _links(page: str, address: str) -> dict[str, None]:
    """The names directly below an address that the page there links to, folders' with a slash at the end."""
    above = address.partition("?")[0].rpartition("/")[0] + "/"
    names: dict[str, None] = {}
    for link in _LINK.findall(page):
        found = urljoin(above, unescape(link.strip("\"'")))
        name = unquote(found.removeprefix(above))
        if found.startswith(above) and not {"?", "#"} & {*found} and name.strip("/") and "/" not in name.rstrip("/"):
            names[name] = None
    return names


class _Addressed:
    """A store whose files have addresses for requests."""

    def fetch(self, url: str, start: int, stop: int) -> bytes:  # noqa: ARG002 - there is no other way
        raise AssertionError("it is read by requests")


class _Web(_Addressed):
    """Servers of plain files."""

    def pin(self, url: str) -> str:
        return url

    def entry(self, url: str) -> Entry:
        return self._first(url, 1)[0]

    def head(self, url: str) -> tuple[Entry, bytes]:
        return self._first(url, HEAD)

    def target(self, url: str) -> tuple[str, dict[str, str]] | None:
        return private(url), {}

    def _first(self, url: str, nbytes: int) -> tuple[Entry, bytes]:
        try:
            return _first(url, nbytes)
        except _Refused as refused:
            raise (_unranged(url) if refused.status == 200 else refusal(url, refused.status)) from None

    def list(self, url: str) -> Mapping[str, Entry]:
        folder = url.rstrip("/") + "/"
        names = self._page(folder)
        if names is None:
            with suppress(_Refused):
                return {"": _first(url, 1)[0]}
            return self._probe(url, folder)
        found: dict[str, Entry] = {}
        waiting: Sequence[tuple[str, Sequence[str]]] = [("", names)]
        for depth in range(_DEPTH + 1):
            folders = []
            for above, inside in waiting:
                found |= {above + name: Entry(-1) for name in inside if not name.endswith("/")}
                folders += [above + name for name in inside if name.endswith("/") and not name.startswith((".", "__pycache__"))]
            if len(folders) > _FOLDERS:
                raise UsageError(f"{url}: there are {len(folders)} folders below it: give the URL of one checkpoint")
            if depth < _DEPTH:
                listed = _in_parallel(lambda name: self._page(folder + quote(name)) or (), folders)
                waiting = tuple(zip(folders, listed, strict=True))
        if "latest" in found or any(name.endswith(_WEIGHTS) for name in found):
            return found
        with suppress(UsageError):  # the page was about something else
            return self._probe(url, folder)
        return found

    def _page(self, folder: str) -> Sequence[str] | None:
        """The names on a server's page about a folder; None where it gives no such page."""

        def read(answer: requests.Response) -> Sequence[str] | None:
            if answer.status_code != 200 or "html" not in answer.headers.get("Content-Type", ""):
                return None
            page = answer.raw.read(_MAX_PAGE, decode_content=True).decode("utf-8", "replace")
            return tuple(_links(page, answer.url)) or None

        return _ask(folder, read)

    def _probe(self, url: str, folder: str) -> Probed:
        """The files there that are called as those of checkpoints are; what an index names is taken to be there."""
        refused: set[int] = set()

        def look(name: str) -> Entry | None:
            try:
                return _first(folder + quote(name), 1)[0]
            except _Refused as error:
                refused.add(error.status)
                return None

        def look_for(*names: str) -> dict[str, Entry]:
            return {name: entry for name, entry in zip(names, _in_parallel(look, names), strict=True) if entry is not None}

        found = Probed()
        found.update(look_for(*_KNOWN))
        if not found:
            status = next((status for status in (401, 403, 200) if status in refused), 404)
            raise _unranged(url) if status == 200 else refusal(url, status)
        found.read = {name: self._read(folder + name) for name in found if name in _TELLING or name.endswith(".index.json")}
        series = {"consolidated.00.pth": "consolidated.{:02}.pth"}
        for name, raw in found.read.items():
            if name == "latest":
                said = raw.decode("utf-8", "replace").strip()
                number = str(int(said)) if said.isdigit() else said
                series[f"{number}/mp_rank_00_model_states.pt"] = number + "/mp_rank_{:02}_model_states.pt"
                continue
            with suppress(ValueError, AttributeError, TypeError):  # reading it says what is wrong
                said = json.loads(raw)
                if name != "config.json":
                    found.update(dict.fromkeys(map(str, said.get("weight_map", said).values()), Entry(-1)) | found)
                else:
                    code = (str(value) for value in said.get("auto_map", {}).values())
                    found.update(look_for(*(f"{value.partition('.')[0]}.py" for value in code if "--" not in value)))
        for first, pattern in series.items():
            ranks = look_for(first)
            while ranks:
                more = look_for(*(pattern.format(len(ranks) + k) for k in range(CONCURRENT)))
                ranks |= more
                if len(more) < CONCURRENT:
                    break
            found.update(ranks)
        return found

    @staticmethod
    def _read(url: str) -> bytes:
        """A whole file, which is small."""

        def read(answer: requests.Response) -> bytes:
            raw: bytes = answer.raw.read(_MAX_TEXT, decode_content=True)
            return raw

        return _ask(url, read)


def _unranged(url: str) -> UsageError:
    what = "the server sends whole files only and knows no ranges"
    return UsageError(f"{url}: {what}: download the checkpoint, or put it on a server that does (nginx, an object store)")


@cache
def _web() -> Store:
    try:
        import requests  # noqa: F401 - asked for here, so that its absence is told once
    except ImportError as error:
        raise _missing("https", error) from None
    return _Web()


# The Hub -------------------------------------------------------------------------------------------------------------


class _Hub(_Addressed):
    """Repositories of the Hugging Face Hub, at the commit that a revision stands for when they are opened."""

    def __init__(self, endpoint: str | None) -> None:
        import huggingface_hub
        import requests  # noqa: F401 - both are needed

        self._endpoint = endpoint
        self._api = huggingface_hub.HfApi(endpoint=endpoint)
        self._tags: dict[str, Entry] = {}

    @staticmethod
    def _parse(url: str) -> tuple[str | None, str, str | None, str]:
        """Kind, name, revision and path in it."""
        found = _HUB.fullmatch(url.rstrip("/"))
        if not found:
            raise UsageError(f"{url}: expected hf://organization/name, with @revision and a path in it where wanted")
        kind = (found["kind"] or "models").removesuffix("s")
        return None if kind == "model" else kind, found["id"], found["revision"] and unquote(found["revision"]), found["path"] or ""

    def pin(self, url: str) -> str:
        kind, name, revision, path = self._parse(url)
        if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
            return url
        commit = self._call(url, self._api.repo_info, name, revision=revision, repo_type=kind).sha
        above = f"hf://{f'{kind}s/' if kind else ''}{name}@{commit or quote(revision or 'main', safe='')}"
        return f"{above}/{path}" if path else above

    def list(self, url: str) -> Mapping[str, Entry]:
        kind, name, revision, path = self._parse(url)

        def tree() -> dict[str, Entry]:
            rows = self._api.list_repo_tree(name, path or None, recursive=True, revision=revision, repo_type=kind)
            return {row.path: _hub_entry(row) for row in rows if hasattr(row, "size")}

        above = f"{path}/" if path else ""
        if path and (single := self._files(url, path)):
            return {"": single[path]}
        found = self._call(url, tree)
        inside = {file.removeprefix(above): entry for file, entry in found.items() if file.startswith(above)}
        self._tags |= {f"{url.rstrip('/')}/{file}": entry for file, entry in inside.items()}
        return inside

    def _files(self, url: str, *paths: str) -> dict[str, Entry]:
        kind, name, revision, _ = self._parse(url)
        rows = self._call(url, self._api.get_paths_info, name, [*paths], revision=revision, repo_type=kind)
        return {row.path: _hub_entry(row) for row in rows if hasattr(row, "size")}

    def entry(self, url: str) -> Entry:
        """As it is at a commit, which does not change."""
        if url not in self._tags:
            path = self._parse(url)[3]
            if path not in (found := self._files(url, path)):
                raise refusal(url, 404)
            self._tags[url] = found[path]
        return self._tags[url]

    def head(self, url: str) -> tuple[Entry, bytes]:
        return self.entry(url), b""

    def target(self, url: str) -> tuple[str, dict[str, str]]:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        kind, name, revision, path = self._parse(url)
        address = hf_hub_url(name, path, repo_type=kind, revision=revision, endpoint=self._endpoint)
        return address, build_hf_headers(library_name="streamconv")

    @staticmethod
    def _call(url: str, call: Callable[..., _Found], *args: Any, **options: Any) -> _Found:
        """A request of the library, made again where another attempt may do better."""
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

        attempts = _Attempts(url)
        while True:
            try:
                return call(*args, **options)
            except HFValidationError:
                raise UsageError(f"{url}: not the name of a repository: expected hf://organization/name") from None
            except OfflineModeIsEnabled:
                raise _offline(url) from None
            except EntryNotFoundError:
                raise refusal(url, 404) from None
            except HfHubHTTPError as error:
                status = error.response.status_code if error.response is not None else 503
                if status not in (408, 425, 429) and status < 500:
                    raise _hub_refusal(url, status, type(error).__name__) from None
                attempts.failed(f"HTTP {status}")
            except Exception as error:
                if not isinstance(error, OSError) and not type(error).__module__.startswith("http"):
                    raise
                attempts.failed(_cause(error), unreached=type(error).__name__ == "ConnectError")


def _hub_entry(row: Any) -> Entry:
    return Entry(row.size, row.lfs.sha256 if row.lfs else row.blob_id or "")


def _hub_refusal(url: str, status: int, kind: str) -> UsageError:
    if kind == "RevisionNotFoundError":
        return UsageError(f"{url}: no such revision of the repository: give a branch, a tag or a commit that is there")
    if kind == "GatedRepoError":
        return UsageError(f"{url}: a gated repository: accept its terms on its page, and {_variables('hf')}")
    if status in (401, 404):
        return UsageError(f"{url}: no such repository, or a private one (HTTP {status}): check the name, or {_variables('hf')}")
    return refusal(url, status)


def _offline(url: str) -> UsageError:
    return UsageError(f"{url}: not in the local cache, and HF_HUB_OFFLINE is set: unset it, or download the repository first")


@cache
def _hub(endpoint: str | None) -> Store:
    try:
        return _Hub(endpoint)
    except ImportError as error:
        raise _missing("hf", error) from None


def cached_snapshot(url: str) -> str | None:
    """The path of a repository's files, or of the one named, in the Hub's cache on this machine, where HF_HUB_OFFLINE is set.

    Raises:
        UsageError: they are not there.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE"):
        return None
    _hub(os.environ.get("HF_ENDPOINT") or None)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    kind, name, revision, path = _Hub._parse(url)
    try:
        return os.path.join(snapshot_download(name, repo_type=kind, revision=revision, local_files_only=True), path).rstrip("/")  # noqa: PTH118
    except (OSError, ValueError, HFValidationError):
        raise _offline(url) from None


# Any file system of fsspec -------------------------------------------------------------------------------------------


class _FileSystem:
    """A file system that fsspec knows: object stores, and whatever is registered. fsspec keeps the instances."""

    def __init__(self, url: str) -> None:
        import fsspec.core  # type: ignore[import-untyped]

        self._fs: Any = fsspec.core.url_to_fs(url)[0]

    def pin(self, url: str) -> str:
        return url

    def target(self, url: str) -> None:  # noqa: ARG002 - nothing has one
        return None

    def _path(self, url: str) -> str:
        return str(self._fs._strip_protocol(url))

    def list(self, url: str) -> Mapping[str, Entry]:
        path = self._path(url)
        self._fs.invalidate_cache()
        found = self._call(url, self._fs.find, path, detail=True)
        rows = {name.strip("/"): row for name, row in found.items() if row.get("type", "file") == "file"}
        above = path.strip("/")
        if above in rows:
            return {"": _row_entry(rows[above])}
        return {
            name.removeprefix(f"{above}/"): _row_entry(row) for name, row in rows.items() if name.startswith(f"{above}/" if above else "")
        }

    def entry(self, url: str) -> Entry:
        path = self._path(url)
        self._fs.invalidate_cache()
        row = self._call(url, self._fs.info, path)
        if row.get("type", "file") != "file":
            raise UsageError(f"{url}: not a file: give the URL of one")
        return _row_entry(row)

    def head(self, url: str) -> tuple[Entry, bytes]:
        return self.entry(url), b""

    def fetch(self, url: str, start: int, stop: int) -> bytes:
        return bytes(self._fs.cat_file(self._path(url), start=start, end=stop))

    def _call(self, url: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """A call of the file system, made again where another attempt may do better."""
        scheme = scheme_of(url)
        attempts = _Attempts(url, most=3, unreached=1)  # most make several themselves
        while True:
            try:
                return call(*args, **options)
            except StreamconvError:
                raise
            except FileNotFoundError:
                raise refusal(url, 404) from None
            except PermissionError:
                raise refusal(url, 403) from None
            except ImportError as error:
                raise _missing(scheme, error) from None
            except Exception as error:  # noqa: BLE001 - every file system has its own
                status = getattr(error, "status", None) or getattr(error, "code", None)
                if status in (401, 403, 404, 410, "401", "403", "404"):
                    raise refusal(url, int(status)) from None
                if re.search("Credential|Token|Auth", type(error).__name__):
                    raise UsageError(f"{url}: no valid credentials ({_cause(error)}): {_variables(scheme)}") from None
                final = (ValueError, TypeError, AttributeError, NotImplementedError, KeyError)
                if isinstance(error, final) or getattr(error, "errno", None) == errno.EINVAL:
                    raise UsageError(f"{url}: the {scheme} file system cannot read it ({_cause(error)}): check the address") from None
                attempts.failed(_cause(error), unreached="Connect" in type(error).__name__)


def _row_entry(row: Mapping[str, Any]) -> Entry:
    tag = next((row[key] for key in _VERSIONS if row.get(key)), "")
    return Entry(-1 if row.get("size") is None else int(row["size"]), str(tag).strip('"'))


def _filesystem(url: str) -> Store:
    scheme = scheme_of(url)
    for name in ("gcsfs", "s3fs"):  # they tell of what they try again, on stderr where nobody listens
        logging.getLogger(name).addHandler(logging.NullHandler())
    try:
        return _FileSystem(url)
    except ImportError as error:
        raise _missing(scheme, error) from None
    except ValueError:
        raise UsageError(
            f"{scheme}://: no store of that kind is known: use https, hf, s3, gs, or another scheme that fsspec knows"
        ) from None
