"""What a terminal shows while a run is planned: nothing for a second, then a line that says what that is at."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from streamconv import stage
from streamconv.running.progress import Shown, can_show, columns, how_to_show
from streamconv.text import one_line
from streamconv.threads import looking

AFTER = 1.0  # seconds
EVERY = 0.2


@contextmanager
def showing_stage(show: Shown) -> Iterator[None]:
    """Shows on stderr what the block is at, if that is a terminal and the block takes longer than `AFTER`; clears the line at its end."""
    if not how_to_show(show).show or not sys.stderr.isatty() or not can_show():
        yield
        return
    began, width = time.monotonic(), 0

    def draw(text: str) -> None:
        nonlocal width
        with suppress(OSError):
            sys.stderr.write(f"\r{text.ljust(width)}\r{text}")
            sys.stderr.flush()
        width = len(text)

    def look() -> None:
        text = one_line(stage.current())
        if text and time.monotonic() - began >= AFTER:
            draw(text[: columns() - 1])

    stage.begin("")
    try:
        with looking(look, lambda: EVERY):
            yield
    finally:
        if width:
            draw("")
