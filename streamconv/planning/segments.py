"""What a plan is made of: the files that are read, and output files with what goes into each of their bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from typing import NamedTuple

from streamconv.digests import Checksum
from streamconv.graph.moves import Move, region
from streamconv.graph.node import AnyNode, extents, sources, trace
from streamconv.storage import Version, is_url

SPARSE = 0.9  # share of a file's blocks below which it counts as one with holes


class SourceFile(NamedTuple):
    """A file that is read, with what tells whether it changed: of a URL its ETag, ``tag``. ``allocated``: bytes that it takes on disk."""

    path: str
    size: int
    mtime_ns: int
    allocated: int
    tag: str = ""

    @property
    def version(self) -> Version:
        return Version(self.size, self.tag or str(self.mtime_ns))


class Copy(NamedTuple):
    """``nbytes`` bytes of source file ``source`` at ``offset`` go to ``dst`` of the output file."""

    source: int
    offset: int
    dst: int
    nbytes: int


class Compute(NamedTuple):
    """A region of node ``node``, whose tensor starts at byte ``dst`` of the output file, evaluated in boxes of ``tile``.

    ``move.src_strides`` are those of the leaf that lies at byte ``offset`` of source file ``source``: they order the tiles.
    """

    node: int
    dst: int
    move: Move
    tile: tuple[int, ...]
    source: int
    offset: int
    itemsize: int


Segment = Copy | Compute


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One output file. ``path`` is relative to the plan's root; ``checksums`` are written when all else is there."""

    path: str
    size: int
    literals: tuple[tuple[int, bytes], ...]
    segments: tuple[Segment, ...]
    tensors: tuple[str, ...] = ()
    checksums: tuple[Checksum, ...] = ()


class Check(NamedTuple):
    """Two nodes whose bytes must be equal before anything is written."""

    left: int
    right: int
    names: tuple[str, str]


@dataclass(frozen=True)
class Totals:
    """Sizes in bytes of what a run does; ``disk_needed`` leaves out holes that stay holes."""

    bytes_read: int
    bytes_copied: int
    bytes_computed: int
    bytes_written: int
    disk_needed: int


@dataclass(frozen=True)
class Account:
    """What becomes of tensors, as numbers of them: of all ``tensors`` written ``copied`` and ``computed`` ones are two parts.

    ``renamed`` ones have another name and nothing else changed, ``cast`` ones another dtype; ``dropped`` says how many by which rule;
    ``tied`` ones repeat another, in the source or the target.
    """

    tensors: int = 0
    copied: int = 0
    computed: int = 0
    renamed: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    tied: int = 0
    cast: int = 0

    def __str__(self) -> str:
        rules = ", ".join(f"{count} by {rule!r}" for rule, count in self.dropped.items())
        return (
            f"{self.tensors} tensors: {self.copied} copied, {self.computed} computed, {self.renamed} renamed, "
            f"{sum(self.dropped.values())} dropped{f' ({rules})' if rules else ''}, {self.tied} tied, {self.cast} cast"
        )


def source_files(nodes: Iterable[AnyNode]) -> list[str]:
    """The paths that the leaves below ``nodes`` lie in, in order of first appearance."""
    visited: set[int] = set()
    every_extent = chain.from_iterable(extents(node, visited) for node in nodes)
    return list(dict.fromkeys(extent.path for extent in every_extent))


def computations(files: Iterable[FilePlan]) -> Iterator[Compute]:
    """What is computed in some output files, in order."""
    for file in files:
        yield from (segment for segment in file.segments if isinstance(segment, Compute))


def add_up(files: Iterable[FilePlan], nodes: Sequence[AnyNode], source_table: Sequence[SourceFile]) -> Totals:
    """What making these files of nodes and sources takes."""
    bytes_read = bytes_copied = bytes_computed = bytes_written = 0
    disk = 0.0
    nbytes_below = cache(_nbytes_below)
    # What is left of a sparse source's blocks may straddle twice as many blocks in the output.
    shares = [1.0 if is_url(source.path) or not source.size else source.allocated / source.size for source in source_table]
    density = [min(1.0, share if share > SPARSE else 2 * share) for share in shares] or [1.0]  # nothing is read: all is made
    for file in files:
        bytes_written += file.size
        disk += sum(len(data) for _, data in file.literals)
        for segment in file.segments:
            if isinstance(segment, Copy):
                bytes_copied += segment.nbytes
                disk += segment.nbytes * density[segment.source]
            else:
                nbytes = segment.move.numel * nodes[segment.node].spec.dtype.itemsize
                bytes_computed += nbytes
                if segment.itemsize:
                    bytes_read += segment.move.numel * segment.itemsize
                else:  # made of several tensors: of these its share
                    for piece in trace(nodes[segment.node], region(segment.move)):
                        bytes_read += nbytes_below(piece.leaf) * piece.move.numel // piece.leaf.spec.numel
                disk += nbytes * density[segment.source]
    return Totals(bytes_read + bytes_copied, bytes_copied, bytes_computed, bytes_written, round(disk))


def _nbytes_below(node: AnyNode) -> int:
    return sum(leaf.spec.nbytes for leaf in sources(node))
