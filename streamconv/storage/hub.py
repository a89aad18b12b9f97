"""A model repository on the Hugging Face Hub as the place of an output: files are uploaded by commits, of huggingface_hub's public API."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from streamconv.errors import DestinationError, StreamconvError, UsageError
from streamconv.storage import Outdated, Version
from streamconv.storage.addresses import Repository, is_offline, repository, unwritable
from streamconv.storage.repositories import Absent, ask, tree
from streamconv.storage.retries import OVER, Refused, again

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

_OURS = {".gitattributes"}  # made with every repository
_TITLE = "Add converted weights"  # of pull requests
_Result = TypeVar("_Result")


class HubSink:
    """A branch of a repository, or a folder in it; with ``create_pr`` a pull request on it, made by the first commit.

    Each `put` is one commit; that which completes a pull request also removes old weights. The description of its first one has a token by
    which it is found where the server's answer was lost, so that no second one is made. What says how far an unfinished output is lies
    in a file of this machine's cache, since every change of a repository is a commit that everybody sees.

    Args:
        url: of a model repository, or a folder in it.
        create_pr: make a pull request.
        outdated: see `open_sink`.

    Attributes:
        pull_request: its URL, once there is one, and which old files it removes.
    """

    def __init__(self, url: str, *, create_pr: bool = False, outdated: Outdated = lambda _, __: []) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        repo = repository(url)
        if repo.kind or "/" not in repo.name or repo.name.startswith("buckets/"):
            raise UsageError(f"{url}: not a model repository: give hf://ORGANIZATION/NAME, with @BRANCH if it is not main")
        if is_offline():
            raise DestinationError(f"{url}: HF_HUB_OFFLINE is set: unset it, or give another DST")
        self.url = url.rstrip("/")
        self.pull_request = ""
        self._written: set[str] = set()
        self._states: dict[str, bytes] = {}
        self._repo, self._branch, self._folder = repo.name, repo.revision or "main", repo.path
        self._revision, self._create_pr, self._is_made, self._is_unsure = self._branch, create_pr, False, False
        self._outdated, self._removed = outdated, set[str]()
        self._token, self._head = os.urandom(6).hex(), ""  # the head is a commit: of a branch, readers remember what it led to before
        self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="streamconv")
        disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of files that do not go by Xet, and of those that are there
        kind = "pull request" if create_pr else ""
        key = hashlib.sha256("\n".join((self._repo, self._branch, self._folder, kind)).encode()).hexdigest()
        self._state = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamconv" / key[:32]

    def list(self) -> Mapping[str, Version]:
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

    def _list(self, revision: str) -> Mapping[str, Version] | None:
        """What a revision holds; None where there is none."""
        try:
            files = self._ask(tree, self._api, Repository(None, self._repo, revision, self._folder))
        except Absent as absent:
            return {} if absent.is_path else None
        return {name: entry for name, entry in files.items() if name not in _OURS}

    def address(self, name: str) -> str:
        revision = self._head or self._revision.replace("/", "%2F")
        return f"hf://{self._repo}@{revision}/{self._path(name)}"

    def holds(self, url: str) -> bool:
        """Whether it is of this repository, at the commit that the branch is at: of a later one what was read is kept by its commit."""
        if not url.startswith("hf://") or (repo := repository(url))[:2] != (None, self._repo):
            return False
        try:
            head = self._ask(self._api.model_info, self._repo, revision=self._branch).sha
        except Absent:
            return False
        return (repo.revision or "main") in (head, self._branch)

    def _make(self) -> None:
        """Makes the repository and the branch, if they are not there."""
        if self._create_pr or self._is_made:
            return
        self._do(self._api.create_repo, self._repo, exist_ok=True)
        if self._branch != "main" and not self._branch.startswith("refs/"):
            self._do(self._api.create_branch, self._repo, branch=self._branch, exist_ok=True)
        self._is_made = True

    def put(self, files: Mapping[str, Path | bytes]) -> None:
        """Puts complete files there by one commit, of those that are not there already with the same bytes.

        Raises:
            DestinationError: access is refused, or there is no such repository.
            RunError: the server failed several times.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        self._make()

        def commit() -> None:
            if self._is_unsure:
                self._find_pull_request()
            doomed = self._outdated(files, self._list(self._revision) or ()) if self._create_pr else []
            self._removed.update(doomed)
            with ExitStack() as stack:
                # From an open file it goes by plain HTTP in bounded memory; from a path Xet would hold what it likes.
                opened = {name: data if isinstance(data, bytes) else stack.enter_context(data.open("rb")) for name, data in files.items()}
                additions = [CommitOperationAdd(self._path(name), content) for name, content in opened.items()]
                self._commit([*additions, *(CommitOperationDelete(self._path(name)) for name in doomed)], f"Upload {_name(files)}")

        self._do(commit)
        self._written |= files.keys()
        if self._removed:
            first, *more = sorted(self._removed)
            self.pull_request += f", which removes the old {first}{f' and {len(more)} more' if more else ''}"
            self._removed.clear()

    def remove(self, names: Collection[str]) -> None:
        from huggingface_hub import CommitOperationDelete

        self._make()

        def commit() -> None:
            if doomed := [name for name in self.list() if name in names]:
                self._commit([CommitOperationDelete(self._path(name)) for name in doomed], f"Remove {_name(doomed)}")

        self._do(commit)

    def _commit(self, operations: Sequence[CommitOperationAdd | CommitOperationDelete], message: str) -> None:
        self._is_unsure = opens = self._create_pr and not self.pull_request  # until there is an answer
        with warnings.catch_warnings():
            # The library uploads in a way that its own HTTP library frowns upon.
            warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning, module="httpx")
            commit = self._api.create_commit(
                self._repo,
                operations,
                commit_message=_TITLE if opens else message,
                commit_description=f"Converted by streamconv ({self._token})." if opens else None,
                revision=self._revision,
                create_pr=opens,
                num_threads=1,
            )
        self._head, self._is_unsure = commit.oid, False
        if opens and commit.pr_revision:
            self._go_on_in(commit.pr_revision, commit.pr_url or commit.pr_revision)

    def _find_pull_request(self) -> None:
        """Goes on in the pull request that was made without our hearing of it, if one was."""
        for pull in self._ask(lambda: [*self._api.get_repo_discussions(self._repo, discussion_status="open")]):
            if pull.is_pull_request and pull.title == _TITLE:
                commits = self._ask(self._api.list_repo_commits, self._repo, revision=pull.git_reference)
                if any(self._token in commit.message for commit in commits):
                    self._go_on_in(f"refs/pr/{pull.num}", pull.url)

    def _go_on_in(self, revision: str, pull_request: str) -> None:
        self._revision, self.pull_request, self._is_unsure = revision, pull_request, False
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
        revision, _, rest = first.decode().partition(" ")
        if (there := self._list(revision)) is None or not (there or self._create_pr):
            return None  # it went, or this is another Hub: there is nothing to go on with
        self._revision, (self.pull_request, _, self._token) = revision, rest.partition(" ")
        self._states[name], self._is_unsure = data, self._create_pr and not self.pull_request
        return data

    def save_state(self, name: str, data: bytes) -> None:
        self._make()  # first, so that a refusal leaves nothing
        path = self._state / name
        self._states[name] = data
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f"{path.name}.{os.getpid()}")
            draft.write_bytes(f"{self._revision} {self.pull_request} {self._token}\n".encode() + data)
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

    def _ask(self, call: Callable[..., _Result], *args: Any, **options: Any) -> _Result:
        """What a call gives that may fail for some time."""
        try:
            return again(lambda: ask(call, *args, **options), self.url, OVER, small=True)
        except Absent:
            raise
        except Refused as refused:
            raise self._refuse(refused) from None

    def _do(self, call: Callable[..., object], *args: Any, **options: Any) -> None:
        """A call that changes something."""
        try:
            again(lambda: ask(call, *args, **options), self.url, OVER)
        except Refused as refused:
            if self._create_pr and not self.pull_request:  # nothing was begun
                for name in [*self._states]:
                    self.drop_state(name)
            raise self._refuse(refused) from None

    def _refuse(self, refused: Refused) -> StreamconvError:
        instead = "give another DST" if self._create_pr else "propose it with --create-pr"
        return unwritable(self.url, refused, begun=bool(self._written), instead=instead)


def _name(names: Collection[str]) -> str:
    """What a commit is about, in a line; of several files the Hub tells which have changed."""
    return next(iter(names)) if len(names) == 1 else f"{len(names)} files"
