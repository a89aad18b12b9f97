"""Which files lie on a server that cannot list them: those that are there under names that somebody knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from urllib.parse import quote

from streamconv.errors import UsageError
from streamconv.storage import Version
from streamconv.storage.addresses import refusal
from streamconv.storage.retries import Refused
from streamconv.storage.sources import CONCURRENT, Catalog, Probed, in_parallel

First = Callable[[str, int], tuple[Version, bytes]]
"""What a server tells of a file by its URL and gives of its first bytes; raises `Refused` where there is none."""

_ABSENT = "there-is-no-such-file"  # with a suffix of the catalog
_MAX_TEXT = 100_000_000  # bytes of an index
_MAX_RANKS = 4096  # files of ranks that are asked for


def probe(url: str, first: First, catalog: Catalog) -> Probed:
    """The files of the folder ``url``, as far as their names can be known.

    Raises:
        UsageError: there is none, or the server answers to every name.
    """
    folder = url.rstrip("/") + "/"
    refused: set[int] = set()

    def look(name: str) -> Version | None:
        try:
            return first(folder + quote(name), 1)[0]
        except Refused as error:
            refused.add(error.status)
            return None

    def look_for(names: Iterable[str]) -> dict[str, Version]:
        candidates = list(names)
        return {name: entry for name, entry in zip(candidates, in_parallel(look, candidates), strict=True) if entry is not None}

    files = Probed()
    files.update(look_for(catalog.hints.names))
    if not files:
        raise refusal(url, next((status for status in (401, 403, 200) if status in refused), 404))
    absent = _ABSENT + next(iter(catalog.suffixes), "")
    if look_for([absent]):
        raise UsageError(f"{url}: the server has a file for every name, even {absent}: give the URL of the checkpoint's file or index")
    for name, entry in files.items():
        if catalog.tells(name):
            files.read[name] = first(folder + name, max(1, min(entry.size, _MAX_TEXT)))[1]
    series = list(catalog.hints.series)
    for name, raw in files.read.items():
        hints = catalog.read(name, raw)
        files.update(look_for(hints.names))
        files.update(dict.fromkeys(hints.present, Version(-1)) | files)
        series += hints.series
    for before, after in series:
        files.update(_look_for_ranks(url, look_for, before, after))
    return files


def _look_for_ranks(url: str, look_for: Callable[[Iterable[str]], dict[str, Version]], before: str, after: str) -> dict[str, Version]:
    """The files of a series that are there: ``before``, a number of two digits or more from 00, ``after``."""
    ranks = look_for([f"{before}00{after}"])
    more = ranks
    while more and len(ranks) < _MAX_RANKS:
        start = len(ranks)
        more = look_for(f"{before}{number:02}{after}" for number in range(start, start + CONCURRENT))
        ranks |= more
        if len(more) < CONCURRENT:
            return ranks
    if ranks:
        raise UsageError(f"{url}: the server has {len(ranks)} files {before}*{after} and more: a model has no so many ranks")
    return ranks
