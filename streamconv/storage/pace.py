"""Whether what a server sends comes at a pace at which it will ever be there, and whom threads are waiting for meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from streamconv.storage.retries import Failed

LEAST = 1000  # bytes a second: a server that sends less for a whole span of `SPAN` is asked anew ...
SPAN = 30.0  # seconds
SPANS = 3  # ... and given up after so many spans in a row


class Pace:
    """Bytes against the time that was spent waiting for them, span by span.

    Args:
        span: seconds of waiting after which the bytes of it are looked at.

    Attributes:
        slow: spans in a row in which too little came.
        progress: what came in the last one, for a message.
    """

    def __init__(self, span: float | None = None) -> None:
        self.slow, self.progress = 0, ""
        self._span = SPAN if span is None else span
        self._waited, self._came = 0.0, 0

    def add(self, seconds: float, nbytes: int) -> None:
        """Takes a wait into account, and what it brought.

        Raises:
            Failed: it ends a span in which less than `LEAST` bytes a second came.
        """
        self._waited += seconds
        self._came += nbytes
        if self._waited < self._span:
            return
        enough = self._came >= LEAST * self._waited
        self.progress = f"{self._came} bytes came in {self._waited:.0f} s"
        self.slow = 0 if enough else self.slow + 1
        self._waited, self._came = 0.0, 0
        if not enough:
            raise Failed(f"too slow, {self.progress}")


_waits: dict[int, tuple[float, str]] = {}
"""What each thread asks a server for, and since when."""


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Has `find_longest_wait` know that this thread waits for a server; ``what`` is a public URL, or begins with one."""
    thread = threading.get_ident()
    before = _waits.get(thread)
    _waits[thread] = (time.monotonic(), what)
    try:
        yield
    finally:
        if before is None:
            del _waits[thread]
        else:
            _waits[thread] = before


def find_longest_wait() -> tuple[float, str]:
    """For how many seconds some thread has been waiting by now, and for which host; (0.0, "") where none is."""
    waits = list(_waits.values())
    if not waits:
        return 0.0, ""
    since, what = min(waits)
    parts = urlsplit(what.partition(", ")[0])
    host = parts.netloc if parts.scheme in ("http", "https") else f"{parts.scheme}://{parts.netloc}"
    return time.monotonic() - since, host
