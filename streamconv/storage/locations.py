"""What people give - a path, or a URL - as a file or a folder."""

from __future__ import annotations

from pathlib import Path, PurePath
from urllib.parse import unquote

from streamconv.storage import is_url
from streamconv.storage.addresses import forget, from_page, is_offline, public, scheme_of
from streamconv.storage.folder import AnyPath, Location
from streamconv.storage.local import LocalFolder
from streamconv.storage.sources import Catalog


def locate(path: AnyPath, catalog: Catalog = Catalog()) -> Location:  # noqa: B008 - it is frozen
    """The file or folder that a path names. What a revision of a repository on the Hub stands for is looked up.

    ``catalog`` says what files a folder behind a URL may consist of.

    Raises:
        StreamconvError: nothing knows such URLs, there is nothing behind it, or the server does not answer.
    """
    if isinstance(path, Location):
        return path
    text = str(path)
    if not is_url(text):
        return _locate_here(Path(path))
    if scheme_of(text) in ("file", "local"):
        return _locate_here(Path(unquote(text.partition("://")[2])))
    url = shown(from_page(path if isinstance(path, str) else text))
    if scheme_of(url) == "hf" and is_offline():
        from streamconv.storage.repositories import cached_snapshot

        return _locate_here(Path(cached_snapshot(url)))
    from streamconv.storage.remote import locate_url

    return locate_url(url, catalog)


def as_given(path: AnyPath, location: Location) -> str:
    """A path of this machine as people wrote it, which need not be absolute; a URL as it was located."""
    return str(location) if is_url(path) else str(PurePath(str(path)))


def _locate_here(path: Path) -> Location:
    """A path of this machine, which need not lead anywhere; links in it stay."""
    path = path.absolute()  # a plan may be run elsewhere
    whole = LocalFolder(path)
    return whole.file("") if whole.has_folder("") else LocalFolder(path.parent).file(path.name)


class Shown(str):
    """A URL that was taken off its query by `shown`: `locate` still knows it."""

    __slots__ = ()

    def __str__(self) -> str:
        return self  # else it would be a text like any other


def shown(path: str) -> str:
    """A path as it is, a URL as everybody may see it: without its query, which `locate` remembers."""
    if isinstance(path, Shown) or not is_url(path):
        return path
    url = public(path)
    if url == path:
        forget(url)  # whoever gives it without a query means it without
    return Shown(url)
