"""What the threads of a run spend their time with."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace


@dataclass
class Times:
    """Seconds of all threads together, of which each counts its own.

    Attributes:
        read: waiting for bytes of sources.
        compute: making values of them, and moving them in memory.
        write: handing bytes on, to a file or a server.
        copy: having the kernel move bytes from file to file, or from a source right into a target's buffer.
    """

    read: float = 0.0
    compute: float = 0.0
    write: float = 0.0
    copy: float = 0.0

    @contextmanager
    def spent(self, what: str) -> Iterator[None]:
        """Counts the time of the block, without what is counted in it as something else."""
        started, before = time.perf_counter(), self.total
        try:
            yield
        finally:
            own = time.perf_counter() - started - (self.total - before)
            setattr(self, what, getattr(self, what) + own)

    @property
    def total(self) -> float:
        """Of all."""
        return self.read + self.compute + self.write + self.copy

    def add(self, other: Times, sign: int = 1) -> None:
        """Adds those of another thread, or takes them away."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + sign * getattr(other, one.name))


_all, _lock = Times(), threading.Lock()


def keep(times: Times) -> None:
    """Adds those of a thread that has ended to the process's."""
    with _lock:
        _all.add(times)


@contextmanager
def counted() -> Iterator[Times]:
    """Those of the threads that end while the block runs, which are known at its end."""
    times, before = Times(), replace(_all)
    try:
        yield times
    finally:
        with _lock:
            times.add(_all)
            times.add(before, -1)
