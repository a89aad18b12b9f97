"""In boxes of what shape a tensor is computed, so that reading and writing them takes few pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from streamconv.graph.moves import Move, identity
from streamconv.graph.node import AnyNode, Source, trace
from streamconv.storage import is_url
from streamconv.storage.ranges import SKIPPED

REQUEST = 1 << 20  # bytes that a connection receives while it waits for an answer, about
READ = 4  # times as long as writing a piece to the page cache, about, takes reading one that a disk has yet to give
WRITE = 128  # bytes that it receives while a piece is written to a file of this machine, about


@dataclass(frozen=True)
class Tile:
    """A box of a move: its ``sizes``, and how many contiguous ``pieces`` reading and writing it takes."""

    sizes: tuple[int, ...]
    pieces: int


@lru_cache(maxsize=4096)
def choose_tile(
    sizes: tuple[int, ...], dst_strides: tuple[int, ...], src_strides: tuple[int, ...], numel: int, remote_itemsize: int = 0
) -> Tile:
    """The box of at most ``numel`` elements of a simplified move that takes the fewest reads and writes for each element.

    Where the source is remote, with items of ``remote_itemsize`` bytes, it is the box that takes the least time to receive and write.
    Candidates make the innermost axes of the source and of the destination long enough for pieces of some power of two, and fill
    the rest from either side outwards.
    """
    by_dst = sorted(range(len(sizes)), key=lambda k: dst_strides[k])
    by_src = sorted((k for k in range(len(sizes)) if src_strides[k]), key=lambda k: src_strides[k])  # what is repeated is read once
    best: tuple[float, Tile] | None = None
    powers = [1 << k for k in range(numel.bit_length())]
    for src_piece in powers:
        for dst_piece in powers:
            start = [1] * len(sizes)
            for order, piece in ((by_src, src_piece), (by_dst, dst_piece)):
                _grow(start, sizes, order, piece)
            if math.prod(start) > numel:
                break
            for filling in (by_src, by_dst):
                tile = list(start)
                for k in filling:
                    tile[k] = min(sizes[k], max(tile[k], numel // (math.prod(tile) // tile[k])))
                writes = _pieces(tile, sizes, by_dst, dst_strides)
                reads = _pieces(tile, sizes, by_src, src_strides)
                cost = (
                    WRITE * writes + _request_cost(tile, by_src, src_strides, remote_itemsize) if remote_itemsize else READ * reads + writes
                )
                score = cost / math.prod(tile)
                if best is None or score < best[0]:
                    best = score, Tile(tuple(tile), reads + writes)
    assert best is not None
    return best[1]


def boxes(node: AnyNode, numel: int) -> Iterator[Move]:
    """All of a tensor in boxes of at most ``numel`` elements that take few reads: moves whose destination is the tensor itself."""
    if not node.spec.numel:
        return
    for piece in trace(node, identity(node.spec.numel)):
        move, leaf = piece.move.simplify(), piece.leaf
        is_remote = isinstance(leaf, Source) and any(is_url(extent.path) for extent in leaf.extents)
        remote = leaf.spec.dtype.itemsize if is_remote else 0
        yield from move.tiles(choose_tile(move.sizes, move.dst_strides, move.src_strides, max(1, numel), remote).sizes)


def _grow(tile: list[int], sizes: Sequence[int], order: Sequence[int], piece: int) -> None:
    """Widens ``tile`` along ``order`` until a run has ``piece`` elements."""
    run = 1
    for k in order:
        if run >= piece:
            break
        tile[k] = max(tile[k], min(sizes[k], -(-piece // run)))
        run *= tile[k]


def _pieces(tile: Sequence[int], sizes: Sequence[int], order: Sequence[int], strides: Sequence[int]) -> int:
    """How many contiguous pieces a box has on the side with these strides."""
    run = 1
    for k in order:
        if strides[k] != run:
            break
        run *= tile[k]
        if tile[k] < sizes[k]:
            break
    return math.prod(tile[k] for k in order) // run


def _request_cost(tile: Sequence[int], order: Sequence[int], strides: Sequence[int], itemsize: int) -> int:
    """What asking for a box and receiving it costs, in bytes: pieces that are near each other come in one answer, with what is between."""
    requests = span = 1
    for k in order:
        if (strides[k] - span) * itemsize <= SKIPPED:
            span += (tile[k] - 1) * strides[k]
        else:
            requests *= tile[k]
    return requests * (REQUEST + span * itemsize)
