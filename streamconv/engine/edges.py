"""The edges of what goes past the page cache in whole blocks: a block that neighbours share is put together here, and written once.

Through the page cache each edge would be a write that waits for all direct ones of its file to end, while none begins.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from streamconv.memory import BLOCK, PRIVATE

MOST = 256  # blocks of a file that wait for their other parts: what is told of more goes through the page cache


@dataclass
class _Block:
    """A block as far as it is known; memory of its own, which begins at a block.

    Attributes:
        data: its bytes.
        parts: which of them are known, as ranges in order.
    """

    data: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, BLOCK, **PRIVATE))
    parts: list[tuple[int, int]] = field(default_factory=list)

    def add(self, start: int, view: memoryview) -> bool:
        """Takes a part; whether all are known now."""
        self.data[start : start + len(view)] = view
        self.parts = sorted([*self.parts, (start, start + len(view))])
        known = 0
        for first, stop in self.parts:
            if first <= known:
                known = max(known, stop)
        return known == BLOCK


class Edges:
    """Those of one file, each byte of which comes once, from any thread. What is on its way to the disk is kept until it is written."""

    def __init__(self) -> None:
        self._blocks: dict[int, _Block] = {}
        self._lock = threading.Lock()

    def add(self, view: memoryview, offset: int, write: Callable[[memoryview, int], None]) -> None:
        """Takes a part of the block at an offset of the file; has the block written if that was its last."""
        number, start = divmod(offset, BLOCK)
        with self._lock:
            block = self._blocks.get(number)
            if block is None and len(self._blocks) < MOST:
                block = self._blocks[number] = _Block()
            is_whole = block is not None and block.add(start, view)
        if block is None:
            write(view, offset)
        elif is_whole:
            write(memoryview(block.data), number * BLOCK)
            self._drop(number, block.parts)

    def settle(self, write: Callable[[memoryview, int], None]) -> None:
        """Has all that waits written, before the file is synced: what a block lacks may have been there before."""
        with self._lock:
            waiting = [(number, block.data, block.parts) for number, block in self._blocks.items()]
        for number, data, parts in waiting:
            for start, stop in parts:
                write(memoryview(data)[start:stop], number * BLOCK + start)
            self._drop(number, parts)

    def _drop(self, number: int, parts: list[tuple[int, int]]) -> None:
        """Forgets a block that is written, unless another part has come meanwhile."""
        with self._lock:
            if number in self._blocks and self._blocks[number].parts == parts:
                del self._blocks[number]
