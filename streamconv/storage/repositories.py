"""Repositories of the Hugging Face Hub, at the commit that a revision stands for when they are opened."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from streamconv.errors import UsageError
from streamconv.storage import Version
from streamconv.storage.addresses import Repository, credentials, is_offline, missing, refusal, repository
from streamconv.storage.retries import READING, TRANSIENT, Failed, Refused, again, bare, fault
from streamconv.storage.sources import Catalog, Request, Store

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_BUSY = {409, 412}  # another commit was quicker
_Result = TypeVar("_Result")


class Absent(Refused):
    """There is no such repository or revision, or none that may be seen; or no such path in it."""

    is_path = is_revision = False


def ask(call: Callable[..., _Result], *args: Any, **options: Any) -> _Result:
    """A call of the library, its errors as those that `again` takes."""
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return call(*args, **options)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 503
        if status in TRANSIENT | _BUSY:
            raise Failed(f"HTTP {status}") from None
        if status == 404 or (isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)):
            absent = Absent(status, f"HTTP {status}, no such repository or branch, or none that the token may see")
            absent.is_path, absent.is_revision = isinstance(error, EntryNotFoundError), isinstance(error, RevisionNotFoundError)
            raise absent from None
        message = f", {bare(error.server_message)}" if error.server_message else ""
        raise Refused(status, f"HTTP {status}{message}") from None
    except ValueError as error:  # what it will not send, the name of a repository among that
        raise Refused(400, bare(str(error))) from None
    except Exception as error:
        if type(error) is RuntimeError and error.__cause__:  # how uploads to the storage fail
            raise _upload_fault(error.__cause__) from None
        if not isinstance(error, OSError) and not type(error).__module__.startswith("http"):
            raise
        raise fault(error) from None


def _upload_fault(error: BaseException) -> Failed:
    """Whatever it is, the next attempt may do: it asks for another signed address, which is not to be shown."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return Failed(f"HTTP {status} from the storage") if status else fault(error)


def tree(api: HfApi, repo: Repository) -> dict[str, Version]:
    """The files below a path of a repository by their relative names, with the SHA-256 of large ones and git's digest of others."""
    rows = api.list_repo_tree(repo.name, repo.path or None, recursive=True, revision=repo.revision, repo_type=repo.kind)
    return {row.path.removeprefix(f"{repo.path}/"): entry for row in rows if (entry := _entry(row))}


def _entry(row: Any) -> Version | None:
    return Version(row.size, row.lfs.sha256 if row.lfs else row.blob_id or "") if hasattr(row, "size") else None


class Hub(Store):
    """Reads them."""

    def __init__(self, endpoint: str | None) -> None:
        import requests  # noqa: F401 - ranges are asked for by it
        from huggingface_hub import HfApi

        self._endpoint = endpoint
        self._api = HfApi(endpoint=endpoint)
        self._tags: dict[str, Version] = {}

    def pin(self, url: str) -> str:
        kind, name, revision, path = repository(url)
        if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
            return url
        commit = _read(url, self._api.repo_info, name, revision=revision, repo_type=kind).sha
        above = f"hf://{f'{kind}s/' if kind else ''}{name}@{commit or quote(revision or 'main', safe='')}"
        return f"{above}/{path}" if path else above

    def list(self, url: str, catalog: Catalog = Catalog()) -> Mapping[str, Version]:  # noqa: ARG002, B008 - it can list
        repo = repository(url)
        if repo.path and (single := self._file(url, repo)):
            return {"": single}
        files = _read(url, tree, self._api, repo)
        self._tags |= {f"{url.rstrip('/')}/{file}": entry for file, entry in files.items()}
        return files

    def _file(self, url: str, repo: Repository) -> Version | None:
        rows = _read(url, self._api.get_paths_info, repo.name, [repo.path], revision=repo.revision, repo_type=repo.kind)
        return next(map(_entry, rows), None)

    def entry(self, url: str) -> Version:
        """As it is at a commit, which does not change."""
        if url not in self._tags:
            if (version := self._file(url, repository(url))) is None:
                raise refusal(url, 404)
            self._tags[url] = version
        return self._tags[url]

    def request(self, url: str) -> Request:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        kind, name, revision, path = repository(url)
        address = hf_hub_url(name, path, repo_type=kind, revision=revision, endpoint=self._endpoint)
        return address, build_hf_headers(library_name="streamconv")


def _read(url: str, call: Callable[..., _Result], *args: Any, **options: Any) -> _Result:
    """What a call gives that reads, or a line that says why not."""
    if is_offline():
        raise _offline(url)
    try:
        return again(lambda: ask(call, *args, **options), url, message=READING, small=True)
    except Absent as absent:
        if absent.is_revision:
            raise UsageError(f"{url}: no such revision of the repository: give a branch, a tag or a commit that is there") from None
        if absent.is_path:
            raise refusal(url, 404) from None
        what = f"no such repository, or a private one (HTTP {absent.status})"
        raise UsageError(f"{url}: {what}: check the name, or {credentials('hf')}") from None
    except Refused as refused:
        raise refusal(url, refused.status, str(refused)) from None


def _offline(url: str) -> UsageError:
    return UsageError(f"{url}: not in the local cache, and HF_HUB_OFFLINE is set: unset it, or download the repository first")


def cached_snapshot(url: str) -> str:
    """The path of a repository's files, or of the one named, in the Hub's cache on this machine.

    Raises:
        UsageError: they are not there.
    """
    kind, name, revision, path = repository(url)
    try:
        from huggingface_hub import snapshot_download

        return os.path.join(snapshot_download(name, repo_type=kind, revision=revision, local_files_only=True), path).rstrip("/")  # noqa: PTH118
    except ImportError as error:
        raise missing("hf", error) from None
    except (OSError, ValueError):
        raise _offline(url) from None
