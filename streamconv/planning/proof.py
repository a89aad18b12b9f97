"""Proves of a plan, whoever made it, that it can be run: each byte of each file is written once, from what there is.

Whatever it says is looked at: numbers of sources and nodes, ranges, shapes, what ops make of their inputs. It takes no data and no file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from streamconv.digests import Checksum, places_of
from streamconv.dtypes import TensorSpec
from streamconv.errors import FormatError, StreamconvError
from streamconv.graph.node import AnyNode, Node, Source
from streamconv.planning.cover import Box, Fault, check_boxes, check_ranges, make_box
from streamconv.planning.segments import Check, Compute, Copy, FilePlan, SourceFile
from streamconv.storage.filenames import find_fault

LARGEST = 2**63  # bytes, elements and whatever else is counted stay below it
MOST_WORKERS = 1024
DEEPEST = 128  # ops on top of each other
MOST_PATHS = 1 << 24  # ways from a node down to its leaves
_CRC = 2**32


class Proof:
    """What is to be proved of a plan's tables. Each raises FormatError, which says what does not hold."""

    def __init__(self, sources: Sequence[SourceFile], nodes: Sequence[AnyNode]) -> None:
        self._sources, self._nodes = sources, nodes
        self._sizes = {source.path: source.size for source in sources}
        self._sound: set[int] = set()  # ids of specs that were looked at: many tensors have the same one
        self._reach: dict[int, tuple[int, int]] = {}  # of a node, by id: how deep it is, and in how many ways its leaves are reached

    def check_sources(self) -> None:
        """Sources are files of sensible sizes, each once."""
        if len(self._sizes) != len(self._sources):
            raise FormatError("a source file is there twice")
        for source in self._sources:
            if not source.path or "\0" in source.path:
                raise FormatError(f"{source.path!r} is no path of a source")
            if not (0 <= source.size < LARGEST and 0 <= source.allocated < LARGEST and abs(source.mtime_ns) < LARGEST):
                raise FormatError(f"{source.path}: no file has such a size or date")

    def check_nodes(self) -> None:
        """Ops fit their inputs and make what is said of them; stored tensors lie inside their files."""
        specs: dict[object, TensorSpec] = {}
        for root in self._nodes:
            stack: list[AnyNode] = [root]
            while stack:
                node = stack[-1]
                below = [child for child in node.inputs if id(child) not in self._reach] if isinstance(node, Node) else []
                if below:
                    stack.extend(below)
                    continue
                stack.pop()
                if id(node) not in self._reach:
                    self._reach[id(node)] = self._check_node(node, specs)

    def _check_node(self, node: AnyNode, specs: dict[object, TensorSpec]) -> tuple[int, int]:
        if id(node.spec) not in self._sound:
            _check_shape(node.spec)
            self._sound.add(id(node.spec))
        if isinstance(node, Source):
            self._check_extents(node)
            return 0, 1
        deep, ways = 1, 1
        for child in node.inputs:
            deep_below, ways_below = self._reach[id(child)]
            deep, ways = max(deep, deep_below + 1), ways + ways_below
        if deep > DEEPEST or ways > MOST_PATHS:
            raise FormatError(f"{node.spec} by {node.op.kind}: more ops on top of each other than any conversion has")
        inputs = tuple([child.spec for child in node.inputs])
        spec = specs.get((node.op, inputs))
        if spec is None:
            try:
                spec = specs[node.op, inputs] = node.op.infer(inputs)
            except StreamconvError as error:
                raise FormatError(f"{node.op.kind}: {error}") from error
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # parameters that nobody gives an op
                raise FormatError(f"{node.op.kind} cannot be what it is said to be of {', '.join(map(str, inputs))}") from error
        if spec != node.spec:
            raise FormatError(f"{node.op.kind} makes {spec}, not {node.spec}")
        return deep, ways

    def _check_extents(self, leaf: Source) -> None:
        total = 0
        for extent in leaf.extents:
            self._check_range(extent.path, extent.offset, extent.nbytes)
            total += extent.nbytes
        if total != leaf.spec.nbytes:
            raise FormatError(f"a stored tensor {leaf.spec} has {leaf.spec.nbytes} bytes, not {total}")

    def _check_range(self, path: str, offset: int, nbytes: int) -> None:
        if not (offset >= 0 and nbytes >= 0 and offset + nbytes <= self._sizes.get(path, -1)):
            raise FormatError(f"bytes {offset} to {offset + nbytes} are not in {path} of {self._sizes.get(path, 0)} bytes")

    def check_pairs(self, checks: Iterable[Check]) -> None:
        """What is compared is there."""
        for check in checks:
            if not (0 <= check.left < len(self._nodes) and 0 <= check.right < len(self._nodes)):
                raise FormatError(f"{check.names[0]} is compared with a tensor that is not there")

    def check_files(self, files: Sequence[FilePlan]) -> None:
        """Each byte of each file is written once; tiles are not looked at."""
        check_paths([file.path for file in files])
        for file in files:
            if not 0 <= file.size < LARGEST:
                raise FormatError(f"{file.path}: no file has {file.size} bytes")
            try:
                self._check_file(file)
            except Fault as fault:
                what = "in more than one piece" if fault.again else "in none"
                raise FormatError(f"{file.path}: byte {fault.at} of {file.size} is {what} of those that it is made of") from fault

    def check_tiles(self, files: Sequence[FilePlan], *, workers: int, arena: int, peak: int) -> None:
        """Tiles are boxes of what is computed, and the memory for them is there."""
        if not (1 <= workers <= MOST_WORKERS and arena >= 0 and workers * arena <= peak < LARGEST):
            raise FormatError(f"{workers} workers with {arena} bytes each do not fit in {peak} bytes")
        for file in files:
            for segment in file.segments:
                if isinstance(segment, Compute):
                    self._check_tile(segment, file, arena)

    def _check_tile(self, segment: Compute, file: FilePlan, arena: int) -> None:
        from streamconv.graph.evaluate import arena_bytes

        if len(segment.tile) != len(segment.move.sizes) or min(segment.tile, default=1) < 1:
            raise FormatError(f"{file.path}: a region of {list(segment.move.sizes)} in tiles of {list(segment.tile)} cannot be")
        node, numel = self._nodes[segment.node], math.prod(map(min, segment.tile, segment.move.sizes))
        nbytes = arena_bytes(node, numel * node.spec.dtype.itemsize)
        if nbytes > arena:
            raise FormatError(f"{file.path}: tiles of {list(segment.tile)} take {nbytes} bytes of memory, not {arena}")

    def _check_file(self, file: FilePlan) -> None:
        ranges = [(offset, offset + len(data)) for offset, data in file.literals if data]
        boxes: list[Box] = []
        for segment in file.segments:
            if isinstance(segment, Copy):
                self._check_copy(segment, file)
                ranges.append((segment.dst, segment.dst + segment.nbytes))
            else:
                box = self._check_compute(segment, file)
                if box.axes:
                    boxes.append(box)
                else:
                    ranges.append((box.start, box.stop))
        ranges.extend(_check_checksums(file))
        if boxes:
            check_boxes([*boxes, *(Box(start, stop - start) for start, stop in ranges)], file.size)
        else:
            check_ranges(ranges, file.size)

    def _check_copy(self, copy: Copy, file: FilePlan) -> None:
        if not 0 <= copy.source < len(self._sources) or copy.nbytes < 1:
            raise FormatError(f"{file.path}: {copy} copies nothing")
        self._check_range(self._sources[copy.source].path, copy.offset, copy.nbytes)

    def _check_compute(self, segment: Compute, file: FilePlan) -> Box:
        """The bytes that a segment writes."""
        move, axes = segment.move, len(segment.move.sizes)
        if not 0 <= segment.node < len(self._nodes) or not 0 <= segment.source < max(1, len(self._sources)):
            raise FormatError(f"{file.path}: computed from a node or source that is not there: {segment.node}, {segment.source}")
        if not axes == len(move.dst_strides) == len(move.src_strides):
            raise FormatError(f"{file.path}: a region of {list(move.sizes)} has other axes elsewhere")
        if min(move.sizes, default=1) < 1 or min((move.dst, move.src, *move.dst_strides, *move.src_strides)) < 0:
            raise FormatError(f"{file.path}: a region of {list(move.sizes)} cannot be")
        if not (0 <= segment.offset < LARGEST and 0 <= segment.itemsize <= 8 and max((*move.src_strides, move.src)) < LARGEST):
            raise FormatError(f"{file.path}: a region lies nowhere in its source")
        spec = self._nodes[segment.node].spec
        if spec.dtype.is_packed:
            raise FormatError(f"{file.path}: {spec} cannot be computed")
        box = make_box(segment.dst + move.dst * spec.dtype.itemsize, spec.dtype.itemsize, move.sizes, move.dst_strides)
        if box.stop > segment.dst + spec.nbytes:
            raise FormatError(f"{file.path}: a region reaches over the end of its tensor {spec}")
        return box


def check_paths(paths: Sequence[str]) -> None:
    """Raises FormatError unless these are files below a folder, each in a place of its own."""
    unique: set[str] = set()
    for path in paths:
        if fault := find_fault(path):
            raise FormatError(f"a plan's files lie below its root: {path!r} {fault}")
        if path in unique:
            raise FormatError(f"{path} is made twice")
        unique.add(path)
    for path in paths:
        above = path.rpartition("/")[0]
        while above:
            if above in unique:
                raise FormatError(f"{above} is a file and a folder")
            above = above.rpartition("/")[0]


def _check_shape(spec: TensorSpec) -> None:
    if min(spec.shape, default=0) < 0 or max(spec.shape, default=0) >= LARGEST or len(spec.shape) > DEEPEST or spec.nbytes >= LARGEST:
        raise FormatError(f"no tensor is {str(spec)[:200]}")


def _check_checksums(file: FilePlan) -> Iterator[tuple[int, int]]:
    """The ranges that checksums are written to."""
    for checksum in file.checksums:
        if not _is_sound(checksum, file.size):
            raise FormatError(f"{file.path}: a checksum of bytes {checksum.start} to {checksum.start + checksum.nbytes} cannot be")
    for start, nbytes in places_of(file.checksums):
        yield start, start + nbytes


def _is_sound(checksum: Checksum, size: int) -> bool:
    numbers = (checksum.start, checksum.nbytes, *checksum.positions, checksum.seed, *checksum.tail)
    if min(numbers) < 0 or checksum.start + checksum.nbytes > size:
        return False
    if max(checksum.tail, default=0) >= _CRC or checksum.seed >= 2**64:
        return False
    return checksum.kind == "crc32" or (checksum.kind == "torch-id" and checksum.nbytes == len(checksum.prefix) + 20)
