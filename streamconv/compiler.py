"""Graph to plan: which bytes are copied, which are computed in tiles of what shape, and what memory that takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from streamconv import memory
from streamconv.errors import BudgetError, UsageError
from streamconv.formats import Extent, FileLayout
from streamconv.graph import AnyNode, Node, Source, sources, trace
from streamconv.plan import Account, Check, Compute, Copy, FilePlan, Plan, Segment, SourceFile, Totals
from streamconv.plan import Mapping as Row
from streamconv.runs import Move, identity
from streamconv.units import format_size

COPY_RUN = 256 << 10  # bytes: runs of at least this on average are copied, shorter ones go through tiles
TILE = 8 << 20  # bytes: larger tiles gain nothing, except ...
SCATTERED_TILE = 32 << 20  # bytes: ... where they are read or written in many pieces, which larger tiles make longer
SCATTERED = 64  # pieces of a tile of `TILE` bytes from which on that is so
SMALLEST_TILE = 64 << 10
SPARSE = 0.9  # share of a file's blocks below which it counts as one with holes
MARGIN = 6 << 20  # bytes: how much one process may differ from the next in what it takes itself
RESERVE = 6 << 20  # bytes: thread stacks, descriptors, the bar, what the allocator keeps; per worker see WORKER
WORKERS = 8  # unless asked otherwise: so many reads and writes in flight saturate a disk, on any number of cores
WORKER = 2560 << 10  # bytes: a worker's stack, its buffer, and what it maps at a time


@dataclass(frozen=True)
class Budget:
    """``limit`` bytes for the whole process, of which ``measure()`` are taken already; ``workers`` at most."""

    limit: int
    workers: int
    measure: Callable[[], int] = memory.resident


def compile_plan(
    outputs: Mapping[str, AnyNode],
    layouts: Sequence[FileLayout],
    *,
    root: str,
    single: str | None = None,
    format: str,  # noqa: A002 - the word of the command line
    budget: Budget,
    sidecars: Mapping[str, str | bytes] | None = None,
    mapping: Iterable[Row] = (),
    dropped: Iterable[str] = (),
    notes: Iterable[str] = (),
    replicas: Iterable[tuple[AnyNode, AnyNode, tuple[str, str]]] = (),
    read_backend: str = "auto",
    reasons: Mapping[str, str] | None = None,
    tied: int = 0,
) -> Plan:
    """Compiles target nodes and the layout of their files into a plan.

    Args:
        outputs: target name -> node.
        layouts: the files, the commit last, with a slot for every target.
        root: the directory of the files.
        single: see `Plan`.
        format: the container's name.
        budget: what memory may be used.
        sidecars: relative path -> file to copy, or bytes to write.
        mapping: rows to print, see `Plan`.
        dropped: source names left out.
        notes: lines for the user.
        replicas: pairs of nodes that must hold the same bytes.
        read_backend: how tiles are read.
        reasons: source names left out -> by which rule.
        tied: how many tensors repeat another.

    Raises:
        BudgetError: the memory limit cannot be kept.
    """
    compiler = _Compiler()
    files = [compiler.file(layout, outputs) for layout in layouts]
    beside = [compiler.sidecar(path, given) for path, given in (sidecars or {}).items()]
    files[-1:-1] = beside
    checks = [Check(compiler.node(a), compiler.node(b), names) for a, b, names in replicas]
    fit = compiler.fit(budget, files, checks)
    rows = tuple(mapping)
    return Plan(
        root=root,
        single=single,
        format=format,
        sources=tuple(compiler.sources),
        nodes=tuple(compiler.nodes),
        files=tuple(compiler.tiled(file, fit) for file in files),
        checks=tuple(checks),
        mapping=rows,
        dropped=tuple(dropped),
        notes=tuple(notes),
        totals=compiler.totals(files),
        workers=fit.workers,
        arena=fit.arena,
        read_backend=read_backend,
        peak_memory=fit.peak,
        account=compiler.account(files, outputs, rows, reasons or {}, tied),
    )


@dataclass(frozen=True)
class _Fit:
    """What fits the budget: arena bytes for each worker, workers, bytes of a tile (of ``scattered`` nodes), peak bytes."""

    arena: int
    workers: int
    tile: int
    peak: int
    scattered: frozenset[int] = frozenset()


class _Compiler:
    """The tables a plan is built from: sources and nodes by number."""

    def __init__(self) -> None:
        self.sources: list[SourceFile] = []
        self.nodes: list[AnyNode] = []
        self._source_numbers: dict[str, int] = {}
        self._node_numbers: dict[int, int] = {}

    def source(self, path: str) -> int:
        number = self._source_numbers.get(path)
        if number is None:
            number = self._source_numbers[path] = len(self.sources)
            found = Path(path).stat()
            allocated = getattr(found, "st_blocks", -(-found.st_size // 512)) * 512
            self.sources.append(SourceFile(path, found.st_size, found.st_mtime_ns, allocated))
        return number

    def node(self, node: AnyNode) -> int:
        if id(node) not in self._node_numbers:
            self._node_numbers[id(node)] = len(self.nodes)
            self.nodes.append(node)
            for leaf in sources(node):
                for extent in leaf.extents:
                    self.source(extent.path)
        return self._node_numbers[id(node)]

    def file(self, layout: FileLayout, outputs: Mapping[str, AnyNode]) -> FilePlan:
        """A file's plan; tiles are not chosen yet."""
        segments: list[Segment] = []
        filled = set()
        for name, slot in sorted(layout.slots.items(), key=lambda item: item[1]):
            if slot in filled:
                continue  # tied to the tensor before
            if outputs[name].spec.nbytes:
                filled.add(slot)
            for segment in self._segments(outputs[name], layout.pieces.get(name) or [(slot, outputs[name].spec.nbytes)]):
                last = segments[-1] if segments else None
                if isinstance(segment, Copy) and isinstance(last, Copy) and _continues(last, segment):
                    segments[-1] = last._replace(nbytes=last.nbytes + segment.nbytes)
                else:
                    segments.append(segment)
        return FilePlan(layout.path, layout.size, layout.literals, tuple(segments), tuple(layout.slots), layout.checksums)

    def sidecar(self, path: str, given: str | bytes) -> FilePlan:
        """A file beside the weights: another file's bytes, or these."""
        if isinstance(given, bytes):
            return FilePlan(path, len(given), ((0, given),), ())
        number = self.source(given)
        size = self.sources[number].size
        return FilePlan(path, size, (), (Copy(number, 0, 0, size),) if size else ())

    def _segments(self, node: AnyNode, pieces: Iterable[tuple[int, int]]) -> Iterator[Segment]:
        """How a tensor gets into the ranges of its file, (offset, bytes) each, that hold its bytes one after the other."""
        start = 0
        for slot, nbytes in pieces:
            if isinstance(node, Node):
                yield from self._computed(node, start, slot, nbytes)
            else:
                yield from self._range(node.extents, start, slot, nbytes)
            start += nbytes

    def _computed(self, node: Node, start: int, slot: int, nbytes: int) -> Iterator[Segment]:
        """Bytes [start, start + nbytes) of a node; where they are those of a stored tensor for long enough, copies."""
        itemsize = node.spec.dtype.itemsize
        if not nbytes:
            return
        for found in trace(node, identity(nbytes // itemsize, start // itemsize)):
            move = found.move.simplify()
            if found.exact and isinstance(found.leaf, Source) and _copyable(move, itemsize):
                for dst, src in move.runs():
                    yield from self._range(found.leaf.extents, src * itemsize, slot + dst * itemsize, move.run * itemsize)
            else:
                extent = next((extent for leaf in sources(found.leaf) for extent in leaf.extents), None)
                leaf_item = found.leaf.spec.dtype.itemsize if isinstance(found.leaf, Source) else 0
                where = (self.source(extent.path), extent.offset) if extent else (0, 0)
                whole = replace(move, dst=move.dst + start // itemsize)
                # What has to see all of its input makes all of its output: in one tile, once.
                tile = move.sizes if isinstance(found.leaf, Node) and (found.leaf.op.streams or found.leaf.op.whole) else ()
                yield Compute(self.node(node), slot - start, whole, tile, *where, leaf_item)

    def _range(self, extents: Sequence[Extent], start: int, dst: int, nbytes: int) -> Iterable[Copy]:
        """Bytes [start, start + nbytes) of a tensor, which may lie in several extents."""
        for extent in extents:
            if start < extent.nbytes and nbytes:
                take = min(nbytes, extent.nbytes - start)
                yield Copy(self.source(extent.path), extent.offset + start, dst, take)
                start, dst, nbytes = start + take, dst + take, nbytes - take
            start -= extent.nbytes
            start = max(start, 0) if nbytes else start

    # Memory ----------------------------------------------------------------------------------------------------

    def fit(self, budget: Budget, files: Sequence[FilePlan], checks: Sequence[Check]) -> _Fit:
        """The largest tiles that leave room for two workers, else what fits."""
        if not self.nodes:
            found = self._settle(budget, budget.measure(), 0, 0, "copying")
            assert found is not None
            return found
        from streamconv.evaluate import COMPARE, arena_bytes, prepare

        prepare(self.nodes)
        base = budget.measure()
        checked = {node for check in checks for node in (check.left, check.right)}
        computed = [s for file in files for s in file.segments if isinstance(s, Compute)]
        scattered = {s.node for s in computed if not s.tile and self._tile(s, TILE).pieces > SCATTERED}
        fixed = [(s.node, math.prod(s.tile) * self.nodes[s.node].spec.dtype.itemsize) for s in computed if s.tile]
        tile = SCATTERED_TILE if scattered else TILE
        while True:
            sizes = [(k, tile if k in scattered else min(tile, TILE)) for k in range(len(self.nodes))]
            arena, worst = max((arena_bytes(self.nodes[k], nbytes), k) for k, nbytes in [*sizes, *fixed])
            what = f"{self.nodes[worst].spec} by {describe(self.nodes[worst])}"
            if checked:
                arena = max(arena, 2 * COMPARE + max(arena_bytes(self.nodes[k], max(tile, COMPARE)) for k in checked))
            if found := self._settle(budget, base, arena, tile, what):
                return replace(found, scattered=frozenset(scattered))
            tile //= 2

    def _tile(self, segment: Compute, nbytes: int) -> Tile:
        numel = max(1, nbytes // self.nodes[segment.node].spec.dtype.itemsize)
        return choose_tile(segment.move.sizes, segment.move.dst_strides, segment.move.src_strides, numel)

    @staticmethod
    def _settle(budget: Budget, base: int, arena: int, tile: int, what: str) -> _Fit | None:
        """What `fit` returns for tiles of this size, or None where smaller ones would let more workers run."""
        workers = min(budget.workers, (budget.limit - base - RESERVE) // (WORKER + arena))
        smallest = tile <= SMALLEST_TILE
        if workers < 1 and smallest:
            needed = -(-(base + RESERVE + WORKER + arena + MARGIN) // 10**6) * 10**6
            raise BudgetError(
                f"--max-memory {format_size(budget.limit)} is too small: the process itself takes {format_size(base)}, and {what} "
                f"needs {format_size(needed - base)} beside it; use --max-memory {needed // 10**6}MB",
                needed,
            )
        if workers < min(2, budget.workers) and not smallest:
            return None
        return _Fit(arena, workers, tile, base + RESERVE + workers * (WORKER + arena))

    def tiled(self, file: FilePlan, fit: _Fit) -> FilePlan:
        """The file with its tiles chosen."""

        def nbytes(segment: Compute) -> int:
            return fit.tile if segment.node in fit.scattered else min(fit.tile, TILE)

        segments = tuple(s._replace(tile=s.tile or self._tile(s, nbytes(s)).sizes) if isinstance(s, Compute) else s for s in file.segments)
        return replace(file, segments=segments)

    def account(
        self, files: Sequence[FilePlan], outputs: Mapping[str, AnyNode], rows: Sequence[Row], reasons: Mapping[str, str], tied: int
    ) -> Account:
        computed = {id(self.nodes[s.node]) for file in files for s in file.segments if isinstance(s, Compute)}
        count = sum(id(node) in computed for node in outputs.values())
        leaves = ((node, next(sources(node), node)) for node in outputs.values())
        return Account(
            tensors=len(outputs),
            copied=len(outputs) - count,
            computed=count,
            renamed=sum(not row.layout and len(row.sources) == 1 and _bare(row.target) != _bare(row.sources[0]) for row in rows),
            dropped=dict(Counter(reasons.values()).most_common()),
            tied=tied,
            cast=sum(leaf.spec.dtype != node.spec.dtype for node, leaf in leaves),
        )

    def totals(self, files: Sequence[FilePlan]) -> Totals:
        copied = computed = read = 0
        disk = 0.0
        # What is left of a sparse source's blocks may straddle twice as many blocks in the output.
        shares = [source.allocated / source.size if source.size else 1.0 for source in self.sources]
        density = [min(1.0, share if share > SPARSE else 2 * share) for share in shares] or [1.0]  # nothing is read: all is made
        for file in files:
            disk += sum(len(data) for _, data in file.literals)
            for segment in file.segments:
                if isinstance(segment, Copy):
                    copied += segment.nbytes
                    disk += segment.nbytes * density[segment.source]
                else:
                    nbytes = segment.move.numel * self.nodes[segment.node].spec.dtype.itemsize
                    computed += nbytes
                    read += segment.move.numel * segment.itemsize
                    disk += nbytes * density[segment.source]
        written = sum(file.size for file in files)
        return Totals(read + copied, copied, computed, written, round(disk))


def _bare(name: str) -> str:
    """A tensor's name without that of a rank's file."""
    return name.rpartition("/")[2]


def _continues(last: Copy, segment: Copy) -> bool:
    return last.source == segment.source and last.offset + last.nbytes == segment.offset and last.dst + last.nbytes == segment.dst


def _copyable(move: Move, itemsize: int) -> bool:
    return move.run * itemsize >= COPY_RUN or move.run == move.numel


def describe(node: AnyNode) -> str:
    """The ops of a node, outermost first."""
    names = []
    while isinstance(node, Node):
        names.append(node.op.label)
        if not node.inputs:
            break
        node = node.inputs[0]
    return " of ".join(names) or "reading"


@dataclass(frozen=True)
class Tile:
    """A box of a move: its ``sizes``, and how many contiguous ``pieces`` reading and writing it takes."""

    sizes: tuple[int, ...]
    pieces: int


@lru_cache(maxsize=4096)
def choose_tile(sizes: tuple[int, ...], dst_strides: tuple[int, ...], src_strides: tuple[int, ...], numel: int) -> Tile:
    """The box of at most ``numel`` elements of a simplified move that takes the fewest reads and writes for each element.

    Candidates make the innermost axes of the source and of the destination long enough for pieces of some power of two, and fill
    the rest from either side outwards.
    """
    by_dst = sorted(range(len(sizes)), key=lambda k: dst_strides[k])
    by_src = sorted(range(len(sizes)), key=lambda k: src_strides[k])
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
                pieces = _pieces(tile, sizes, by_src, src_strides) + _pieces(tile, sizes, by_dst, dst_strides)
                score = pieces / math.prod(tile)
                if best is None or score < best[0]:
                    best = score, Tile(tuple(tile), pieces)
    assert best is not None
    return best[1]


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
    return math.prod(tile) // run


def check_workers(workers: int | None) -> int:
    """The number asked for, or the default.

    Raises:
        UsageError: not a positive number.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: give at least 1")
    return workers or WORKERS
