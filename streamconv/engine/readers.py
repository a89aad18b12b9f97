"""The read backends by name, and the reader of a run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from streamconv.engine.direct import AVAILABLE, DirectReader
from streamconv.engine.io import MappedReader, PositionedReader
from streamconv.planning.plan import Plan
from streamconv.storage import Version, is_url

Reader = PositionedReader
BACKENDS: dict[str, Callable[[int], Reader]] = {
    "auto": DirectReader if AVAILABLE else PositionedReader,
    "mmap": MappedReader,
    "pread": PositionedReader,
}


def known_urls(plan: Plan) -> dict[str, Version]:
    """Size and version of those sources of a plan that are behind URLs."""
    return {source.path: Version(source.size, source.tag) for source in plan.sources if is_url(source.path)}


def make_reader(backend: str, limit: int, urls: Mapping[str, Version], stop: threading.Event | None = None) -> Reader:
    """A thread's reader, with ``limit`` descriptors of a kind; of ``urls``, too, if there are any, until ``stop`` is set."""
    local = BACKENDS[backend](limit)
    if not urls:
        return local
    from streamconv.engine.remote import RemoteReader

    return RemoteReader(local, urls, stop)
