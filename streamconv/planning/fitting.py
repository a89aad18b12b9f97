"""What fits a memory budget: how large tiles may be, and how many workers run with them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

from streamconv import memory
from streamconv.errors import BudgetError, UsageError
from streamconv.graph.moves import region
from streamconv.graph.node import AnyNode, Node, is_made_whole, shared_values, trace
from streamconv.graph.ops.op import Compute as Operation
from streamconv.graph.ops.op import Elementwise
from streamconv.graph.tiles import Tile, choose_tile
from streamconv.planning.plan import Check, Compute, Copy, FilePlan, Plan, Segment, SourceFile
from streamconv.planning.proof import MOST_WORKERS
from streamconv.planning.segments import computations
from streamconv.storage import is_url
from streamconv.storage.objects import stream_bytes, takes_streams
from streamconv.storage.ranges import MEMORY
from streamconv.units import format_size

TILE = 8 << 20  # bytes: larger tiles gain nothing, except ...
SCATTERED_TILE = 128 << 20  # bytes: ... where they are read or written in many pieces, which larger tiles make longer
SCATTERED = 64  # pieces of a tile of `TILE` bytes from which on that is so
SMALL_TILE = 1 << 20  # bytes: smaller ones cost more than another worker gains
SMALLEST_TILE = 64 << 10
MARGIN = 6 << 20  # bytes: how much one process may differ from the next in what it takes itself
RESERVE = 6 << 20  # bytes: thread stacks, descriptors, the bar, what the allocator keeps; per worker see WORKER
HELD_COMPUTE, HELD_COPY = 640, 240  # bytes: what a run holds of a segment from planning to its end: its tile, its task, its place when done
HELD_SHARED = 1 << 10  # bytes: what holding a value takes beside the value
_MANY_GRAINS = 8  # less is lost of a tile than one of so many
WORKERS = 8  # unless asked otherwise: so many reads and writes in flight saturate a disk, on any number of cores
REMOTE_WORKERS = 16  # ... or connections; one alone is often slow
WORKER = 2560 << 10  # bytes: a worker's stack, its buffer, and what it maps at a time


@dataclass(frozen=True)
class Budget:
    """``limit`` bytes for the whole process, of which ``measure()`` are taken already; ``workers`` at most."""

    limit: int
    workers: int
    measure: Callable[[], int] = memory.resident


def refit(plan: Plan, budget: Budget) -> Plan:
    """The plan with tiles and workers chosen anew, for a process that has other memory; its files hold the same bytes.

    Raises:
        BudgetError: the memory limit cannot be kept.
    """
    fitting = Fitting(plan.nodes, plan.sources, bytes_of_stream(plan.root, (file.size for file in plan.files)))
    files = [replace(file, segments=tuple(map(fitting.without_tile, file.segments))) for file in plan.files]
    fit = fitting.fit(budget, files, plan.checks)
    tiled = tuple(fitting.tiled(file, fit) for file in files)
    return replace(plan, files=tiled, workers=fit.workers, arena=fit.arena, peak_memory=fit.peak)


def base_of(plan: Plan) -> int:
    """Bytes that a plan counts for the process itself, before its workers and what is held of its segments."""
    stream = bytes_of_stream(plan.root, (file.size for file in plan.files))
    return plan.peak_memory - RESERVE - _bytes_held(plan.files, plan.nodes) - plan.workers * _bytes_each(plan.arena, plan.sources, stream)


def _bytes_held(files: Iterable[FilePlan], nodes: Sequence[AnyNode]) -> int:
    """What a run holds of the segments of these files, and of the values that they share."""
    nbytes = sum(node.spec.nbytes + HELD_SHARED for node in shared_values(nodes))
    for file in files:
        nbytes += sum(HELD_COPY if isinstance(segment, Copy) else HELD_COMPUTE for segment in file.segments)
    return nbytes


def _bytes_each(arena: int, files: Iterable[SourceFile], stream: int) -> int:
    """What a worker takes, with ``stream`` bytes for writing a file front to back."""
    return WORKER + arena + stream + (MEMORY if any(is_url(source.path) for source in files) else 0)


def bytes_of_stream(root: str, sizes: Iterable[int]) -> int:
    """What writing one of these files takes a worker, beside what it is written from, where it goes to a store front to back; else 0."""
    return stream_bytes(max(sizes, default=0)) if takes_streams(root) else 0


@dataclass(frozen=True)
class Fit:
    """What fits the budget: arena bytes for each worker, workers, bytes of a tile (of ``scattered`` nodes), peak bytes."""

    arena: int
    workers: int
    tile: int
    peak: int
    scattered: frozenset[int] = frozenset()


class Fitting:
    """The choice of tiles for nodes, whose leaves lie in these sources.

    ``stream``: bytes that writing a file takes a worker; ``in_order``: nodes computed front to back that lie scattered in the sources.
    """

    def __init__(self, nodes: Sequence[AnyNode], sources: Sequence[SourceFile], stream: int) -> None:
        self._nodes, self._sources, self._stream = nodes, sources, stream
        self.in_order: set[int] = set()
        self._kinds: list[int] = []  # of nodes, see `_kind`
        self._numbers: dict[Hashable, int] = {}
        self._tiles: dict[Hashable, Tile] = {}  # of segments that are alike

    def fit(self, budget: Budget, files: Sequence[FilePlan], checks: Sequence[Check], beside: int = 0) -> Fit:
        """The largest tiles that leave room for two workers (four where sources are remote), else what fits.

        For the sake of more workers tiles are not made smaller than `SMALL_TILE`.

        Raises:
            BudgetError: a worker does not fit with the smallest.
        """
        if self._nodes:
            from streamconv.graph.evaluate import prepare

            prepare(self._nodes)
        computes = list(computations(files))
        base = budget.measure() + _bytes_held(files, self._nodes)
        scattered = frozenset(self.in_order | {s.node for s in computes if not s.tile and self.tile(s, TILE).pieces > SCATTERED})
        tile = SCATTERED_TILE if scattered else TILE
        largest = max((self._nbytes(s) for s in computes if s.node in self.in_order), default=0)
        while tile < min(largest, budget.limit):  # read once, if it can be: each tile that is front to back reads all over the source
            tile *= 2
        wish = 1
        if self._nodes:
            wish = 4 if self._is_remote() else 2
        wish, first = min(wish, budget.workers), True
        while True:
            arena, what = self._find_arena(computes, checks, tile, scattered)
            arena += beside if arena else 0  # which is not touched, but as much elsewhere
            each = _bytes_each(arena, self._sources, self._stream)
            workers = min(budget.workers, (budget.limit - base - RESERVE) // each)
            if workers >= wish:
                return Fit(arena, workers, tile, base + RESERVE + workers * each, scattered)
            if tile <= SMALLEST_TILE or not self._nodes:
                limit = -(-(base + RESERVE + each + MARGIN) // 10**6) * 10**6
                raise BudgetError(
                    f"--max-memory {format_size(budget.limit)} is too small: the process itself takes {format_size(base)}, and {what} "
                    f"needs {format_size(limit - base)} beside it; use --max-memory {limit // 10**6}MB",
                    limit,
                )
            if first:
                arena, _ = self._find_arena(computes, checks, SMALL_TILE, scattered)
                most = (budget.limit - base - RESERVE) // _bytes_each(arena, self._sources, self._stream)
                wish, first = max(1, min(wish, most)), False
            if workers < wish:
                tile = _next_smaller(tile)

    def _find_arena(self, computes: Sequence[Compute], checks: Sequence[Check], tile: int, scattered: Collection[int]) -> tuple[int, str]:
        """Bytes of arena that tiles of this size take, and what for."""
        if not self._nodes:
            return 0, "copying"
        from streamconv.graph.evaluate import COMPARE, arena_bytes

        fixed = ((s.node, self._nbytes(s)) for s in computes if s.tile and s.tile == s.move.sizes)
        one_of_each = {(self._kind(k), k in scattered): k for k in range(len(self._nodes))}.values()
        sizes = ((k, min(tile if k in scattered else TILE, tile, self._nodes[k].spec.nbytes)) for k in one_of_each)
        arena, worst = max((arena_bytes(self._nodes[k], nbytes), k) for k, nbytes in (*sizes, *fixed))
        numbers = {check.left for check in checks} | {check.right for check in checks}
        if numbers:
            arena = max(arena, 2 * COMPARE + max(arena_bytes(self._nodes[k], max(tile, COMPARE)) for k in numbers))
        return arena, f"{self._nodes[worst].spec} by {describe(self._nodes[worst])}"

    def _kind(self, number: int) -> int:
        """A number for all nodes that take as much to evaluate as this one."""
        if number >= len(self._kinds):
            from streamconv.graph.evaluate import made_alike

            for node in self._nodes[len(self._kinds) :]:
                self._kinds.append(self._numbers.setdefault(made_alike(node), len(self._numbers)))
        return self._kinds[number]

    def _nbytes(self, segment: Compute) -> int:
        return segment.move.numel * self._nodes[segment.node].spec.dtype.itemsize

    def _is_remote(self) -> bool:
        return any(is_url(source.path) for source in self._sources)

    def tile(self, segment: Compute, nbytes: int) -> Tile:
        """The shape of a segment's tiles of so many bytes."""
        move, remote = segment.move, segment.itemsize if self._sources and is_url(self._sources[segment.source].path) else 0
        key = (self._kind(segment.node), move.sizes, move.dst_strides, move.src_strides, nbytes, remote)
        tile = self._tiles.get(key)
        if tile is None:
            node = self._nodes[segment.node]
            numel = max(1, nbytes // node.spec.dtype.itemsize)
            if len(move.sizes) == 1 < move.sizes[0] // numel:
                numel = _whole_grains(node, numel)
            tile = self._tiles[key] = choose_tile(move.sizes, move.dst_strides, move.src_strides, numel, remote)
        return tile

    def without_tile(self, segment: Segment) -> Segment:
        """A segment whose tile is to be chosen, unless it has to be all of it: see `compiler`."""
        if isinstance(segment, Copy) or (segment.tile == segment.move.sizes and self._is_whole(segment)):
            return segment
        return segment._replace(tile=())

    def _is_whole(self, segment: Compute) -> bool:
        return any(is_made_whole(piece.leaf) for piece in trace(self._nodes[segment.node], region(segment.move)))

    def tiled(self, file: FilePlan, fit: Fit) -> FilePlan:
        """The file with its tiles chosen."""

        def nbytes(segment: Compute) -> int:
            return fit.tile if segment.node in fit.scattered else min(fit.tile, TILE)

        segments = tuple(s._replace(tile=s.tile or self.tile(s, nbytes(s)).sizes) if isinstance(s, Compute) else s for s in file.segments)
        return replace(file, segments=segments)


def _whole_grains(node: AnyNode, numel: int) -> int:
    """At most ``numel`` elements, of which the op at the bottom of elementwise ones makes as many with the least work."""
    while isinstance(node, Node) and isinstance(node.op, Elementwise) and not node.op.grains:
        node = node.inputs[0]
    grains = node.op.grains if isinstance(node, Node) and isinstance(node.op, Operation) else ()
    return next((numel - numel % grain for grain in grains if grain * _MANY_GRAINS <= numel), numel)


def _next_smaller(tile: int) -> int:
    """The size that is tried after ``tile`` bytes: large ones go down by eighths of a power of two, since all of a tensor may fit."""
    if tile <= TILE:
        return tile // 2
    return tile - (1 << (tile - 1).bit_length() - 3)


def describe(node: AnyNode) -> str:
    """The ops of a node, outermost first."""
    names = []
    while isinstance(node, Node):
        names.append(node.op.label)
        if not node.inputs:
            break
        node = node.inputs[0]
    return " of ".join(names) or "reading"


def check_workers(workers: int | None, *, remote: bool = False) -> int:
    """The number asked for, or the default.

    Raises:
        UsageError: not a number of workers that there can be.
    """
    if workers is not None and not 1 <= workers <= MOST_WORKERS:
        raise UsageError(f"--workers {workers}: give 1 to {MOST_WORKERS}")
    return workers or (REMOTE_WORKERS if remote else WORKERS)
