"""A worker's memory: buffers out of one block, which lie there as their bytes lie in files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from streamconv.memory import BLOCK, allocate_pages

if TYPE_CHECKING:
    from streamconv.graph.losses import Loss

    Array = np.ndarray[Any, Any]

ALIGN = 64  # bytes
PLACED = 256 << 10  # bytes: shorter buffers are moved through the page cache, wherever they lie
Begin = Callable[[Callable[[], None]], Callable[[], None]]
"""Begins to do something; gives what waits for its end, and raises what it raised."""


def do_nothing() -> None:
    """Nothing."""


def do_now(work: Callable[[], None]) -> Callable[[], None]:
    """`Begin` without another thread."""
    work()
    return do_nothing


class Arena:
    """Buffers, given out from the front of one block of anonymous memory and taken back in reverse.

    Args:
        nbytes: how much it gives out at most.
        begin: has another thread read while this one computes.
        measures: whether what values lose is measured, too.

    Attributes:
        overflowed: values evaluated here that were finite, and are too large for what they were cast to.
        loss: what values evaluated here have lost, if that is measured.
    """

    def __init__(self, nbytes: int, begin: Begin = do_now, *, measures: bool = False) -> None:
        self.begin, self.overflowed, self.measures = begin, 0, measures
        self.loss: Loss | None = None
        memory = allocate_pages(nbytes)
        self._array: Array = np.frombuffer(memory, dtype=np.uint8)
        self._used = 0

    def take(self, numel: int, itemsize: int, offset: int | None = None) -> Array:
        """A flat array of ``numel`` items as unsigned integers (as bytes where an item is wider than eight); see `place` of ``offset``."""
        nbytes = numel * itemsize
        size = round_up(nbytes) if offset is None else round_up_placed(nbytes)
        start, self._used = self._used, self._used + size
        if start + nbytes > len(self._array):
            raise MemoryError(f"arena of {len(self._array)} bytes cannot hold {start + nbytes}")
        array = self._array[start : start + size]
        return (array[:nbytes] if offset is None else place(array, nbytes, itemsize, offset)).view(f"u{itemsize}")

    @property
    def mark(self) -> int:
        return self._used

    def release(self, mark: int) -> None:
        """Takes back everything given out since ``mark``."""
        self._used = mark


def place(buffer: Array, nbytes: int, itemsize: int, offset: int) -> Array:
    """``nbytes`` of a longer buffer that begin as many bytes behind a block of memory as ``offset`` lies behind one of its file.

    Direct I/O then moves whole blocks of the file to and from their place. Short ones, and items that are not aligned in the file, are
    moved otherwise.
    """
    is_placed = nbytes >= PLACED and offset % min(itemsize, ALIGN) == 0
    lead = (offset - buffer.ctypes.data) % BLOCK if is_placed else 0
    return buffer[lead : lead + nbytes]


def round_up(nbytes: int) -> int:
    """``nbytes`` as an arena counts them."""
    return -(-nbytes // ALIGN) * ALIGN


def round_up_placed(nbytes: int) -> int:
    """``nbytes`` as an arena counts them where they are placed by an offset of a file."""
    return round_up(nbytes) + (BLOCK if nbytes >= PLACED else 0)
