"""What the outputs of a conversion are written to, where that is no directory: an object store, a repository on the Hub."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from streamconv.errors import UsageError
from streamconv.storage import Outdated, Version
from streamconv.storage.addresses import WEB, missing, scheme_of


class Sink(Protocol):
    """A place for the files of an output, by names relative to it. A file appears whole under its name, or not at all.

    Errors are one line: UsageError or DestinationError for what cannot be written at all, RunError for what failed on the way.
    """

    url: str
    pull_request: str
    """The URL of the one that was made, if that was wanted, and which old files it removes."""

    def list(self) -> Mapping[str, Version]:
        """What is there, as far as the store tells; of a pull request, what it changes."""
        ...

    def address(self, name: str) -> str:
        """The URL that a file can be read by."""
        ...

    def holds(self, url: str) -> bool:
        """Whether a URL to read from is of what this place has now."""
        ...

    def put(self, files: Mapping[str, Path | bytes]) -> None:
        """Puts complete files there, in one step where the store has such."""
        ...

    def remove(self, names: Collection[str]) -> None:
        """Removes files; those that are not there do not matter."""
        ...

    def abandon(self, names: Collection[str], *, others: bool) -> None:
        """Takes back what killed runs have left of these files, and of ``others`` directly in the directory, without their being there."""
        ...

    def load_state(self, name: str) -> bytes | None:
        """What `save_state` has kept, by this process or another."""
        ...

    def save_state(self, name: str, data: bytes) -> None:
        """Keeps what says how far an unfinished output is."""
        ...

    def drop_state(self, name: str) -> None:
        """Forgets it."""
        ...


def open_sink(url: str, *, create_pr: bool = False, outdated: Outdated = lambda _, __: []) -> Sink:
    """The place for outputs that a URL names; nothing is asked of it yet.

    Args:
        url: of a directory.
        create_pr: what is put there shall be a pull request.
        outdated: which files the pull request removes by the commit that puts these files there, of those that are there.

    Raises:
        UsageError: it cannot be written to.
    """
    scheme = scheme_of(url)
    if scheme == "hf":
        from streamconv.storage.hub import HubSink

        try:
            return HubSink(url, create_pr=create_pr, outdated=outdated)
        except ImportError as error:
            raise missing(scheme, error) from None
    if create_pr:
        raise UsageError(f"--create-pr: {url} has no pull requests: give a repository on the Hub, such as hf://org/name")
    if scheme in WEB:
        raise UsageError(f"{url}: web servers are read only: give a path, or a URL of a store (s3://, gs://, hf://)")
    from streamconv.storage.objects import ObjectSink

    return ObjectSink(url)
