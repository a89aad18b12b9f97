"""What the sources of a conversion are read from, where that is no directory: a web server, an object store, a repository on the Hub."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from streamconv.storage import Version
from streamconv.threads import run_threads

HEAD = 8 << 10  # bytes of a file that are asked for together with its size
RECEIVED = 256 << 10  # bytes taken from a connection at a time, at most
CONCURRENT = 16  # requests at a time, where many small ones are made

Request = tuple[str, dict[str, str]]
"""An http(s) address and the headers to ask it with, neither to be shown to anybody."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Probed(dict[str, Version]):
    """What was found by asking for names: there may be more. ``read`` holds what had to be read to know the names."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[str, bytes] = {}


@dataclass(frozen=True, slots=True)
class Hints:
    """Other files that there are by what one says: ``present`` are taken to be there, ``names`` are asked for.

    ``series`` are numbered files that are asked for: what stands before and after a number of two digits or more, which begins at 00.
    """

    present: Collection[str] = ()
    names: Collection[str] = ()
    series: Collection[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True)
class Catalog:
    """What files a folder on a web server may consist of, which may not be able to list it; whoever opens a folder knows that.

    Attributes:
        hints: the files that are asked for in any case.
        suffixes: how files end: what is called so is no folder.
        is_listing: whether names on a page are such a folder's; else the page is about something else.
        tells: whether a file of that name says which others there are ...
        read: ... and what it says, by its name and its bytes.
    """

    hints: Hints = Hints()
    suffixes: tuple[str, ...] = ()
    is_listing: Callable[[Iterable[str]], bool] = any
    tells: Callable[[str], bool] = lambda _: False
    read: Callable[[str, bytes], Hints] = lambda _, __: Hints()


class Answer(Protocol):
    """An answer of a store that is being received."""

    def read(self, nbytes: int) -> bytes:
        """What comes next of it, at most so many bytes."""
        ...

    def close(self) -> None:
        """Ends it, before its end too."""
        ...


class Store(ABC):
    """What answers for the URLs of a scheme. The URLs it takes and gives are public ones.

    Errors are one line: UsageError for what is not there, not allowed or has no ranges, RunError where nothing answers after several tries.
    """

    def pin(self, url: str) -> str:
        """The URL of what it stands for now, where the names of versions can move (``hf://org/name@main``)."""
        return url

    @abstractmethod
    def list(self, url: str, catalog: Catalog = Catalog()) -> Mapping[str, Version]:
        """Every file below a URL by its relative name, ``""`` for one that is a file itself; empty where there is nothing.

        A size is -1 where only `entry` tells it. What a server cannot list is `Probed`, by the names of the catalog.
        """

    @abstractmethod
    def entry(self, url: str) -> Version:
        """A file's size and tag, asked for anew."""

    def head(self, url: str) -> tuple[Version, bytes]:
        """The same, with those of the first `HEAD` bytes that come along without another request."""
        return self.entry(url), b""

    @abstractmethod
    def request(self, url: str) -> Request | None:
        """What to ask for ranges of a file; None: `fetch` is the way."""

    def fetch(self, url: str, start: int, stop: int) -> bytes:  # noqa: ARG002 - there is another way
        """Bytes of a file in a store without such an address."""
        raise AssertionError("it is read by requests")

    def receive(self, url: str, start: int, stop: int) -> Answer | None:  # noqa: ARG002 - not every store has such
        """The same as one answer, however long, received as it is read; None: `fetch` is the way."""
        return None


def in_parallel(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """What small requests give for each of several items."""
    work_items = list(items)
    answers: dict[int, _Result] = {}

    def ask(numbers: Iterator[int]) -> None:
        for number in numbers:
            answers[number] = work(work_items[number])

    run_threads(min(CONCURRENT, len(work_items)), ask, range(len(work_items)), threading.Event())
    return [answers[number] for number in range(len(work_items))]
