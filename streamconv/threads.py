"""The one pool of threads: whoever does the same work on many items has it done here, by one rule for order, errors and Ctrl-C.

And the one thread beside a run that looks at it now and then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from streamconv.errors import Interrupted

PATIENCE = 1.5  # seconds between Ctrl-C and leaving
Item = TypeVar("Item")


class _Shared(Generic[Item]):
    """Items that several threads take one by one, until there are no more or the work is to end."""

    def __init__(self, items: Iterable[Item], stop: threading.Event) -> None:
        self._items, self._stop, self._lock = iter(items), stop, threading.Lock()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        with self._lock:
            if self._stop.is_set():
                raise StopIteration
            return next(self._items)


def run_threads(count: int, work: Callable[[Iterator[Item]], None], items: Iterable[Item], stop: threading.Event) -> None:
    """Has ``count`` threads take items, each when it is done with the one before, and waits for them.

    Args:
        count: of threads.
        work: of one thread; gets what gives it items. It begins with what the thread has of its own, and ends by closing that.
        items: in the order in which they are begun.
        stop: is set when a thread fails and on Ctrl-C: nobody gets another item then. Long work on an item looks at it, and raises
            Interrupted.

    Raises:
        BaseException: the first error of any thread, but Interrupted only where there is no other, which that followed from.
        KeyboardInterrupt: Ctrl-C. A thread that a slow disk keeps at its item for `PATIENCE` seconds is left behind.
    """
    shared = _Shared(items, stop)
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work(shared)
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
        raise next((error for error in errors if not isinstance(error, Interrupted)), errors[0])


@contextmanager
def looking(look: Callable[[], object], interval: Callable[[], float]) -> Iterator[None]:
    """Has another thread ``look`` while the block runs, every ``interval()`` seconds."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(interval()):
            look()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
