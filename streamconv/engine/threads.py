"""A few threads that do the same work until it is done, one of them fails, or the user stops them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

PATIENCE = 1.5  # seconds between Ctrl-C and leaving


def run_threads(count: int, work: Callable[[], None], stop: threading.Event) -> None:
    """Runs ``work`` in ``count`` threads and waits for them; raises the first error of any.

    ``stop`` is set when one fails or on Ctrl-C; the work looks at it between its steps. A thread that a slow disk keeps in a step after
    Ctrl-C is left behind.
    """
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=guarded, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)
    except KeyboardInterrupt:
        stop.set()
        deadline = time.monotonic() + PATIENCE
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        raise
    if errors:
        raise errors[0]
