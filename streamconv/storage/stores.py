"""Where URLs lead."""

from __future__ import annotations

import os
from functools import cache

from streamconv.storage import Version
from streamconv.storage.addresses import WEB, missing, scheme_of
from streamconv.storage.held import SCHEME, Held
from streamconv.storage.sources import Store

opened: dict[str, Version] = {}
"""What files of web servers were when their headers were read: what a plan is made for."""


def store_of(url: str) -> Store:
    """The store of a URL.

    Raises:
        UsageError: nothing knows its scheme, or a package is missing.
    """
    scheme = scheme_of(url)
    try:
        if scheme in WEB:
            return _web()
        if scheme == SCHEME:
            return Held()
        if scheme == "hf":
            return _hub(os.environ.get("HF_ENDPOINT") or None)
        from streamconv.storage.filesystems import FileSystem

        return FileSystem(url)
    except ImportError as error:
        raise missing("https" if scheme in WEB else scheme, error) from None


@cache
def _web() -> Store:
    from streamconv.storage.web import Web

    return Web()


@cache
def _hub(endpoint: str | None) -> Store:
    from streamconv.storage.repositories import Hub

    return Hub(endpoint)
