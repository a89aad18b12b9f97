"""Graph to plan: which bytes are copied, which are computed in tiles of what shape, and what memory that takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from streamconv import memory
from streamconv.errors import BudgetError, UsageError
from streamconv.formats import Extent, FileLayout
from streamconv.graph import AnyNode, Node, Source, sources, trace
from streamconv.plan import Account, Check, Compute, Copy, FilePlan, Plan, Segment, SourceFile, add_up, source_files
from streamconv.plan import Mapping as Row
from streamconv.runs import Move, identity, region
from streamconv.storage import is_url
from streamconv.storage.objects import stream_bytes, takes_streams
from streamconv.storage.ranges import MEMORY, SKIPPED, Fingerprint, fingerprints
from streamconv.storage.stores import opened
from streamconv.units import format_size

COPY_RUN = 256 << 10  # bytes: runs of at least this on average are copied, shorter ones go through tiles ...
REMOTE_COPY_RUN = 2 << 20  # bytes: ... and where each copy is a request
REQUEST = 1 << 20  # bytes that a connection receives while it waits for an answer, about
WRITE = 128  # bytes that it receives while a piece is written to a file of this machine, about
TILE = 8 << 20  # bytes: larger tiles gain nothing, except ...
SCATTERED_TILE = 32 << 20  # bytes: ... where they are read or written in many pieces, which larger tiles make longer
SCATTERED = 64  # pieces of a tile of `TILE` bytes from which on that is so
SMALLEST_TILE = 64 << 10
MARGIN = 6 << 20  # bytes: how much one process may differ from the next in what it takes itself
RESERVE = 6 << 20  # bytes: thread stacks, descriptors, the bar, what the allocator keeps; per worker see WORKER
WORKERS = 8  # unless asked otherwise: so many reads and writes in flight saturate a disk, on any number of cores
REMOTE_WORKERS = 16  # ... or connections; one alone is often slow
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
        root: the directory of the files; if it is the URL of a store that takes streams, files without checksums are planned front to back.
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
    compiler = _Compiler(fingerprints(source_files(outputs.values()), opened), _stream_bytes(root, (layout.size for layout in layouts)))
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
        totals=add_up(files, compiler.nodes, compiler.sources),
        workers=fit.workers,
        arena=fit.arena,
        read_backend=read_backend,
        peak_memory=fit.peak,
        account=compiler.account(files, outputs, rows, reasons or {}, tied),
    )


def refit(plan: Plan, budget: Budget) -> Plan:
    """The plan with tiles and workers chosen anew, for a process that has other memory; its files hold the same bytes.

    Raises:
        BudgetError: the memory limit cannot be kept.
    """
    compiler = _Compiler({}, _stream_bytes(plan.root, (file.size for file in plan.files)))
    compiler.nodes, compiler.sources = list(plan.nodes), list(plan.sources)
    files = [replace(file, segments=tuple(map(compiler.without_tile, file.segments))) for file in plan.files]
    fit = compiler.fit(budget, files, plan.checks)
    tiled = tuple(compiler.tiled(file, fit) for file in files)
    return replace(plan, files=tiled, workers=fit.workers, arena=fit.arena, peak_memory=fit.peak)


def base_of(plan: Plan) -> int:
    """Bytes that a plan counts for the process itself, before its workers."""
    stream = _stream_bytes(plan.root, (file.size for file in plan.files))
    return plan.peak_memory - RESERVE - plan.workers * _bytes_each(plan.arena, plan.sources, stream)


def _bytes_each(arena: int, files: Iterable[SourceFile], stream: int) -> int:
    """What a worker takes, with ``stream`` bytes for writing a file front to back."""
    return WORKER + arena + stream + (MEMORY if any(is_url(source.path) for source in files) else 0)


def _stream_bytes(root: str, sizes: Iterable[int]) -> int:
    """What writing one of these files takes a worker, beside what it is written from, where it goes to a store front to back; else 0."""
    return stream_bytes(max(sizes, default=0)) if takes_streams(root) else 0


_Computing = Callable[[Node, int, int, int], Iterator[Segment]]
"""How bytes [start, start + nbytes) of a node get into a file's range at a slot: of node, start, slot, nbytes."""


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

    def __init__(self, found: Mapping[str, Fingerprint], stream: int) -> None:
        self._found, self._stream = found, stream
        self._scattered: set[int] = set()  # nodes whose bytes, front to back, lie scattered in the sources
        self.sources: list[SourceFile] = []
        self.nodes: list[AnyNode] = []
        self._source_numbers: dict[str, int] = {}
        self._node_numbers: dict[int, int] = {}

    def source(self, path: str) -> int:
        number = self._source_numbers.get(path)
        if number is None:
            number = self._source_numbers[path] = len(self.sources)
            self.sources.append(SourceFile(path, *(self._found.get(path) or fingerprints([path])[path])))
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
        made = self._in_order if self._stream and not layout.checksums else self._computed
        for name, slot in sorted(layout.slots.items(), key=lambda item: item[1]):
            if slot in filled:
                continue  # tied to the tensor before
            if outputs[name].spec.nbytes:
                filled.add(slot)
            for segment in self._segments(outputs[name], layout.pieces.get(name) or [(slot, outputs[name].spec.nbytes)], made):
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

    def _segments(self, node: AnyNode, pieces: Iterable[tuple[int, int]], compute: _Computing) -> Iterator[Segment]:
        """How a tensor gets into the ranges of its file, (offset, bytes) each, that hold its bytes one after the other."""
        start = 0
        for slot, nbytes in pieces:
            if isinstance(node, Node):
                yield from compute(node, start, slot, nbytes)
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
            if found.exact and isinstance(found.leaf, Source) and _copyable(move, found.leaf):
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

    def _in_order(self, node: Node, start: int, slot: int, nbytes: int) -> Iterator[Segment]:
        """The same, front to back: what is not copied is computed in ranges of the file."""
        found = list(self._computed(node, start, slot, nbytes))
        copies = sorted((segment for segment in found if isinstance(segment, Copy)), key=lambda segment: segment.dst)
        computed = [segment for segment in found if isinstance(segment, Compute)]
        itemsize, at = node.spec.dtype.itemsize, slot
        if any(not segment.tile and self._tile(segment, TILE).pieces > SCATTERED for segment in computed):
            self._scattered.add(self.node(node))
        for copy in (*copies, None):
            end = copy.dst if copy else slot + nbytes
            if at < end:
                numel = (end - at) // itemsize
                range_ = Move((numel,), (start + at - slot) // itemsize, (1,), 0, (1,))
                yield computed[0]._replace(move=range_, tile=(numel,) if any(segment.tile for segment in computed) else ())
            if copy:
                yield copy
                at = copy.dst + copy.nbytes

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
        """The largest tiles that leave room for two workers (four where sources are remote), else what fits."""
        if not self.nodes:
            found = self._settle(budget, budget.measure(), 0, 0, "copying")
            assert found is not None
            return found
        from streamconv.evaluate import COMPARE, arena_bytes, prepare

        prepare(self.nodes)
        base = budget.measure()
        checked = {node for check in checks for node in (check.left, check.right)}
        computed = [s for file in files for s in file.segments if isinstance(s, Compute)]
        scattered = self._scattered | {s.node for s in computed if not s.tile and self._tile(s, TILE).pieces > SCATTERED}
        fixed = [(s.node, math.prod(s.tile) * self.nodes[s.node].spec.dtype.itemsize) for s in computed if s.tile]
        tile = SCATTERED_TILE if scattered else TILE
        largest = max((s.move.numel * self.nodes[s.node].spec.dtype.itemsize for s in computed if s.node in self._scattered), default=0)
        while tile < min(largest, budget.limit):  # read once, if it can be: each tile that is front to back reads all over the source
            tile *= 2
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
        remote = segment.itemsize if self.sources and is_url(self.sources[segment.source].path) else 0
        return choose_tile(segment.move.sizes, segment.move.dst_strides, segment.move.src_strides, numel, remote)

    def _settle(self, budget: Budget, base: int, arena: int, tile: int, what: str) -> _Fit | None:
        """What `fit` returns for tiles of this size, or None where smaller ones would let more workers run."""
        remote, each = any(is_url(source.path) for source in self.sources), _bytes_each(arena, self.sources, self._stream)
        workers = min(budget.workers, (budget.limit - base - RESERVE) // each)
        smallest = tile <= SMALLEST_TILE
        if workers < 1 and smallest:
            needed = -(-(base + RESERVE + each + MARGIN) // 10**6) * 10**6
            raise BudgetError(
                f"--max-memory {format_size(budget.limit)} is too small: the process itself takes {format_size(base)}, and {what} "
                f"needs {format_size(needed - base)} beside it; use --max-memory {needed // 10**6}MB",
                needed,
            )
        if workers < min(4 if remote else 2, budget.workers) and not smallest:
            return None
        return _Fit(arena, workers, tile, base + RESERVE + workers * each)

    def without_tile(self, segment: Segment) -> Segment:
        """A segment whose tile is to be chosen, unless it has to be all of it: see `_computed`."""
        if isinstance(segment, Copy) or (segment.tile == segment.move.sizes and self._is_whole(segment)):
            return segment
        return segment._replace(tile=())

    def _is_whole(self, segment: Compute) -> bool:
        leaves = (found.leaf for found in trace(self.nodes[segment.node], region(segment.move)))
        return any(isinstance(leaf, Node) and (leaf.op.streams or leaf.op.whole) for leaf in leaves)

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


def _bare(name: str) -> str:
    """A tensor's name without that of a rank's file."""
    return name.rpartition("/")[2]


def _continues(last: Copy, segment: Copy) -> bool:
    return last.source == segment.source and last.offset + last.nbytes == segment.offset and last.dst + last.nbytes == segment.dst


def _copyable(move: Move, leaf: Source) -> bool:
    least = REMOTE_COPY_RUN if any(is_url(extent.path) for extent in leaf.extents) else COPY_RUN
    return move.run * leaf.spec.dtype.itemsize >= least or move.run == move.numel


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
def choose_tile(
    sizes: tuple[int, ...], dst_strides: tuple[int, ...], src_strides: tuple[int, ...], numel: int, remote_itemsize: int = 0
) -> Tile:
    """The box of at most ``numel`` elements of a simplified move that takes the fewest reads and writes for each element.

    Where the source is remote, with items of ``remote_itemsize`` bytes, it is the box that takes the least time to receive and write.
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
                writes = _pieces(tile, sizes, by_dst, dst_strides)
                pieces = _pieces(tile, sizes, by_src, src_strides) + writes
                cost = WRITE * writes + _request_cost(tile, by_src, src_strides, remote_itemsize) if remote_itemsize else pieces
                score = cost / math.prod(tile)
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


def _request_cost(tile: Sequence[int], order: Sequence[int], strides: Sequence[int], itemsize: int) -> int:
    """What asking for a box and receiving it costs, in bytes: pieces that are near each other come in one answer, with what is between."""
    requests = span = 1
    for k in order:
        if (strides[k] - span) * itemsize <= SKIPPED:
            span += (tile[k] - 1) * strides[k]
        else:
            requests *= tile[k]
    return requests * (REQUEST + span * itemsize)


def check_workers(workers: int | None, *, remote: bool = False) -> int:
    """The number asked for, or the default.

    Raises:
        UsageError: not a positive number.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: give at least 1")
    return workers or (REMOTE_WORKERS if remote else WORKERS)
