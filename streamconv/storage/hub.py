"""A model repository on the Hugging Face Hub as the place of an output: files are uploaded by commits, of huggingface_hub's public API."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from streamconv.errors import DestinationError, RunError, StreamconvError, UsageError
from streamconv.storage import Entry
from streamconv.storage.objects import ATTEMPTS, bare, describe, failed, wait

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

_URL = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(?:@(?P<branch>refs/pr/\d+|[^/]+))?(?:/(?P<folder>.+))?")
_OURS = {".gitattributes"}  # made with every repository
_TRANSIENT = {408, 409, 412, 425, 429, 500, 502, 503, 504}  # 412: another commit was quicker
_Found = TypeVar("_Found")


class _Absent(Exception):
    """There is no such repository or revision, or none that may be seen; or no such folder in it (``is_entry``)."""

    def __init__(self, status: int, *, is_entry: bool) -> None:
        super().__init__(f"HTTP {status}, no such repository or branch, or none that the token may see")
        self.is_entry = is_entry


class HubSink:
    """A branch of a repository, or a folder in it; with ``create_pr`` a pull request on it, made by the first commit.

    Each `put` is one commit. What says how far an unfinished output is lies in a file of this machine's cache, since every change of a
    repository is a commit that everybody sees.

    Attributes:
        pull_request: its URL, once there is one.
    """

    def __init__(self, url: str, *, create_pr: bool = False) -> None:
        try:
            from huggingface_hub import HfApi
            from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]
        except ImportError:
            raise UsageError("hf:// needs the package huggingface_hub: pip install 'streamconv[remote]'") from None
        parts = _parse(url)
        if parts is None or parts["repo"].split("/")[0] in ("datasets", "spaces", "buckets"):
            raise UsageError(f"{url}: not a model repository: give hf://ORGANIZATION/NAME, with @BRANCH if it is not main")
        self.url = url.rstrip("/")
        self.pull_request = ""
        self._written: set[str] = set()
        self._states: dict[str, bytes] = {}
        self._repo, self._branch, self._folder = parts["repo"], parts["branch"] or "main", parts["folder"] or ""
        self._revision, self._create_pr, self._is_made = self._branch, create_pr, False
        self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="streamconv")
        disable_progress_bars()
        logging.getLogger("huggingface_hub._commit_api").setLevel(logging.ERROR)  # it warns of files that do not go by Xet: see `put`
        kind = "pull request" if create_pr else ""
        key = hashlib.sha256("\n".join((self._repo, self._branch, self._folder, kind)).encode()).hexdigest()
        self._state = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamconv" / key[:32]

    def list(self) -> Mapping[str, Entry]:
        """What is there, with the SHA-256 of large files and git's digest of others; of a pull request, what it changes.

        A branch that is not there yet will begin as main is.
        """
        there = self._list(self._revision)
        if there is None and self._branch != "main":
            there = self._list("main")
        if not self._create_pr or not there:
            return there or {}
        before = self._list(self._branch) or {}
        return {name: entry for name, entry in there.items() if name in self._written or entry != before.get(name)}

    def _list(self, revision: str) -> Mapping[str, Entry] | None:
        """What a revision holds; None where there is none."""
        from huggingface_hub.hf_api import RepoFile

        try:
            tree = self._ask(lambda: [*self._api.list_repo_tree(self._repo, self._folder or None, recursive=True, revision=revision)])
        except _Absent as absent:
            return {} if absent.is_entry else None
        files = {file.path.removeprefix(self._path("")): file for file in tree if isinstance(file, RepoFile)}
        return {name: Entry(file.size, file.lfs.sha256 if file.lfs else file.blob_id) for name, file in files.items() if name not in _OURS}

    def address(self, name: str) -> str:
        revision = self._revision.replace("/", "%2F")
        return f"hf://{self._repo}@{revision}/{self._path(name)}"

    def holds(self, url: str) -> bool:
        """Whether it is of this repository, at the commit that the branch is at: of a later one what was read is kept by its commit."""
        parts = _parse(url)
        if parts is None or parts["repo"] != self._repo:
            return False
        try:
            head = self._ask(lambda: self._api.model_info(self._repo, revision=self._branch)).sha
        except _Absent:
            return False
        return (parts["branch"] or "main") in (head, self._branch)

    def _make(self) -> None:
        """Makes the repository and the branch, if they are not there."""
        if self._create_pr or self._is_made:
            return
        self._do(lambda: self._api.create_repo(self._repo, exist_ok=True))
        if self._branch != "main" and not self._branch.startswith("refs/"):
            self._do(lambda: self._api.create_branch(self._repo, branch=self._branch, exist_ok=True))
        self._is_made = True

    def put(self, files: Mapping[str, Path | bytes]) -> None:
        """Puts complete files there by one commit, of those that are not there already with the same bytes.

        Raises:
            DestinationError: access is refused, or there is no such repository.
            RunError: the server failed several times.
        """
        from huggingface_hub import CommitOperationAdd

        self._make()
        known = self._list(self._revision) or {}
        changed = {name: given for name, given in files.items() if not _is_same(given, known.get(name))}
        if not changed:
            self._written |= files.keys()
            return

        def commit() -> None:
            with ExitStack() as stack:
                # From an open file it goes by plain HTTP in bounded memory; from a path Xet would hold what it likes.
                opened = {
                    name: given if isinstance(given, bytes) else stack.enter_context(given.open("rb")) for name, given in changed.items()
                }
                self._commit([CommitOperationAdd(self._path(name), given) for name, given in opened.items()], f"Upload {_name(changed)}")

        self._do(commit)
        self._written |= files.keys()

    def remove(self, names: Collection[str]) -> None:
        from huggingface_hub import CommitOperationDelete

        self._make()
        known = self.list()
        if doomed := [name for name in names if name in known]:
            self._do(lambda: self._commit([CommitOperationDelete(self._path(name)) for name in doomed], f"Remove {_name(doomed)}"))

    def _commit(self, operations: Sequence[CommitOperationAdd | CommitOperationDelete], message: str) -> None:
        opens = self._create_pr and not self.pull_request
        made = self._api.create_commit(
            self._repo,
            operations,
            commit_message="Add converted weights" if opens else message,
            commit_description="Converted by streamconv." if opens else None,
            revision=self._revision,
            create_pr=opens,
            num_threads=1,
        )
        if opens and made.pr_revision:
            self._revision, self.pull_request = made.pr_revision, made.pr_url or made.pr_revision
            for name, data in self._states.items():
                self.save_state(name, data)

    def abandon(self, names: Collection[str], *, others: bool) -> None:
        """Nothing: what was sent without a commit is the server's to drop."""

    def load_state(self, name: str) -> bytes | None:
        """What `save_state` has kept on this machine, if what it is about is still there."""
        if name in self._states:
            return self._states[name]
        try:
            first, _, data = (self._state / name).read_bytes().partition(b"\n")
        except OSError:
            return None
        revision, _, pull_request = first.decode().partition(" ")
        if not self._list(revision):  # it went, or this is another Hub: there is nothing to go on with
            return None
        self._revision, self.pull_request = revision, pull_request
        self._states[name] = data
        return data

    def save_state(self, name: str, data: bytes) -> None:
        self._make()  # first, so that a refusal leaves nothing
        path = self._state / name
        self._states[name] = data
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f"{path.name}.{os.getpid()}")
            draft.write_bytes(f"{self._revision} {self.pull_request}\n".encode() + data)
            draft.replace(path)
        except OSError as error:
            raise DestinationError(f"{path}: cannot be written: {error.strerror}; give another XDG_CACHE_HOME") from error

    def drop_state(self, name: str) -> None:
        self._states.pop(name, None)
        with suppress(OSError):
            (self._state / name).unlink(missing_ok=True)
            self._state.rmdir()

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name

    def _do(self, call: Callable[[], object]) -> None:
        """A call that changes something."""
        try:
            self._ask(call)
        except _Absent as absent:
            raise self._refuse(str(absent)) from None

    def _ask(self, call: Callable[[], _Found]) -> _Found:
        """What a call gives that may fail for some time."""
        from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

        reason = ""
        for attempt in range(ATTEMPTS):
            try:
                return call()
            except OfflineModeIsEnabled:
                raise DestinationError(f"{self.url}: HF_HUB_OFFLINE is set: unset it, or give another DST") from None
            except HfHubHTTPError as error:
                status = error.response.status_code
                if status == 404 or (isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)):
                    raise _Absent(status, is_entry=isinstance(error, EntryNotFoundError)) from None
                reason = f"HTTP {status}{f', {bare(said)}' if (said := error.server_message) else ''}"
                if status not in _TRANSIENT:
                    raise self._refuse(reason) from None
            except ValueError as error:  # what it will not send
                raise self._refuse(describe(error)) from None
            except Exception as error:  # noqa: BLE001 - of the network
                reason = describe(error)
            wait(attempt)
        raise failed(self.url, reason)

    def _refuse(self, reason: str) -> StreamconvError:
        said = f"{self.url}: cannot be written ({reason}): set HF_TOKEN to a token that may write it"
        return (
            RunError(f"{said}, then rerun with --resume") if self._written else DestinationError(f"{said}, or propose it with --create-pr")
        )


def _parse(url: str) -> re.Match[str] | None:
    return _URL.fullmatch(url.rstrip("/").replace("%2F", "/"))


def _is_same(given: Path | bytes, entry: Entry | None) -> bool:
    """Whether a file is there already; those in the large file storage are told by SHA-256, others by git's digest of a blob."""
    size = len(given) if isinstance(given, bytes) else given.stat().st_size
    if entry is None or entry.size != size:
        return False
    digest = hashlib.sha256() if len(entry.tag) == 64 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    if isinstance(given, bytes):
        digest.update(given)
    else:
        with given.open("rb") as file:
            while data := file.read(1 << 20):
                digest.update(data)
    return digest.hexdigest() == entry.tag


def _name(names: Collection[str]) -> str:
    """What a commit is about, in a line."""
    first = next(iter(names))
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"
