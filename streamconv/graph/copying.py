"""Copies between strided places in memory."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from streamconv.graph.arena import round_up

if TYPE_CHECKING:
    from streamconv.graph.arena import Arena, Array

BAND = 32 << 10  # bytes: a transposing copy goes through packed blocks of this size, which stay in the first cache ...
ROWS = 128  # ... of at most so many rows
NARROW = 64  # elements: axes shorter than this are not worth a block


def block_bytes() -> int:
    """Bytes of arena that a copy takes at most."""
    return round_up(BAND)


def copy_strided(out: Array, array: Array, axes: list[tuple[int, int, int]], arena: Arena) -> None:
    """``out[index . d] = array[index . s]`` for axes of (size, d, s). Transposing copies go block by block, several times as fast."""
    itemsize = out.itemsize
    sizes = [n for n, _, _ in axes]
    target = np.lib.stride_tricks.as_strided(out, sizes, [d * itemsize for _, d, _ in axes])
    origin = np.lib.stride_tricks.as_strided(array, sizes, [s * itemsize for _, _, s in axes], writeable=False)
    rows = min(range(len(axes)), key=lambda k: axes[k][1], default=0)
    columns = min(range(len(axes)), key=lambda k: axes[k][2], default=0)
    if rows == columns or min(axes[rows][0], axes[columns][0]) < NARROW:
        target[...] = origin
        return
    others = [k for k in range(len(axes)) if k not in (rows, columns)]
    target, origin = (side.transpose(*others, rows, columns) for side in (target, origin))
    mark = arena.mark
    height = min(axes[rows][0], ROWS, max(1, BAND // itemsize))
    width = min(axes[columns][0], max(1, BAND // (height * itemsize)))
    packed = arena.take(height * width, itemsize)
    for index in itertools.product(*(range(axes[k][0]) for k in others)):
        for top in range(0, axes[rows][0], height):
            for left in range(0, axes[columns][0], width):
                here: Any = (*index, slice(top, top + height), slice(left, left + width))
                block = origin[here]
                piece = packed[: block.size].reshape(block.shape)
                piece[...] = block
                target[here] = piece
    arena.release(mark)
