"""The read backends by name."""

from __future__ import annotations

from collections.abc import Callable

from streamconv.engine.direct import AVAILABLE, DirectReader
from streamconv.engine.io import MappedReader, PositionedReader

Reader = PositionedReader
BACKENDS: dict[str, Callable[[int], Reader]] = {
    "auto": DirectReader if AVAILABLE else PositionedReader,
    "mmap": MappedReader,
    "pread": PositionedReader,
}
