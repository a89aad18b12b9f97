"""Graph to plan: which bytes are copied, which are computed in tiles of what shape, and what memory that takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter

from streamconv.errors import UsageError
from streamconv.formats import Extent, FileLayout
from streamconv.graph.moves import Move, identity
from streamconv.graph.node import AnyNode, Node, Source, extents, first_extent, first_source, is_made_whole, items_of, trace
from streamconv.planning.fitting import SCATTERED, TILE, Budget, Fitting, bytes_of_stream
from streamconv.planning.plan import Account, Check, Compute, Copy, FilePlan, Plan, Segment, SourceFile, add_up, source_files
from streamconv.planning.proof import Proof
from streamconv.planning.segments import computations
from streamconv.rows import Row
from streamconv.stage import begin
from streamconv.storage import is_url
from streamconv.storage.filenames import find_fault
from streamconv.storage.ranges import Fingerprint, fingerprints
from streamconv.storage.stores import opened

COPY_RUN = 256 << 10  # bytes: runs of at least this on average are copied, shorter ones go through tiles ...
MEASURING = 12 << 20  # bytes that measuring what values lose takes a worker
REMOTE_COPY_RUN = 2 << 20  # bytes: ... and where each copy is a request


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
    measures: bool = False,
    strict: bool = False,
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
        measures: see `Plan`.
        strict: see `Plan`.

    Raises:
        BudgetError: the memory limit cannot be kept.
        UsageError: a file would not lie below ``root``, or two would be at the same place.
    """
    _check_names([*(layout.path for layout in layouts), *(sidecars or ())])
    compiler = _Compiler(fingerprints(source_files(outputs.values()), opened), bytes_of_stream(root, (layout.size for layout in layouts)))
    stage = begin("finding copies and tiles of files", len(layouts))
    files = []
    for layout in layouts:
        files.append(compiler.file(layout, outputs))
        stage.done += 1
    beside = [compiler.sidecar(path, content) for path, content in (sidecars or {}).items()]
    files[-1:-1] = beside
    checks = [Check(compiler.node(items_of(a)), compiler.node(items_of(b)), names) for a, b, names in replicas]
    proof = Proof(compiler.sources, compiler.nodes)
    proof.check_nodes()
    proof.check_files(files)  # before memory is measured: this takes some, too
    fit = compiler.fitting.fit(budget, files, checks, MEASURING if measures else 0)
    rows = tuple(mapping)
    names = {id(items_of(node)): name for name, node in outputs.items()}
    return Plan(
        root=root,
        single=single,
        format=format,
        sources=tuple(compiler.sources),
        nodes=tuple(compiler.nodes),
        files=tuple(compiler.fitting.tiled(file, fit) for file in files),
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
        names=tuple(names.get(id(node), "") for node in compiler.nodes),
        sidecars=tuple(sorted(sidecars or ())),
        measures=measures,
        strict=strict,
    )


def _check_names(paths: Sequence[str]) -> None:
    """Refuses output files that would not lie below their folder, or be where another one is."""
    for path, count in Counter(paths).items():
        if fault := find_fault(path):
            raise UsageError(f"output file {path!r} {fault}: a recipe or the source names it so; mend that")
        if count > 1:
            raise UsageError(f"output file {path!r} would be made twice, of tensors and as a sidecar: give the recipe's files other names")


_Computing = Callable[[Node, int, int, int], Iterator[Segment]]
"""How bytes [start, start + nbytes) of a node get into a file's range at a slot: of node, start, slot, nbytes."""


class _Compiler:
    """The tables a plan is built from: sources and nodes by number."""

    def __init__(self, fingerprints: Mapping[str, Fingerprint], stream: int) -> None:
        self._fingerprints, self._stream = fingerprints, stream
        self.sources: list[SourceFile] = []
        self.nodes: list[AnyNode] = []
        self.fitting = Fitting(self.nodes, self.sources, stream)
        self._source_numbers: dict[str, int] = {}
        self._node_numbers: dict[int, int] = {}
        self._visited: set[int] = set()

    def source(self, path: str) -> int:
        number = self._source_numbers.get(path)
        if number is None:
            number = self._source_numbers[path] = len(self.sources)
            self.sources.append(SourceFile(path, *(self._fingerprints.get(path) or fingerprints([path])[path])))
        return number

    def node(self, node: AnyNode) -> int:
        if id(node) not in self._node_numbers:
            self._node_numbers[id(node)] = len(self.nodes)
            self.nodes.append(node)
            for extent in extents(node, self._visited):
                self.source(extent.path)
        return self._node_numbers[id(node)]

    def file(self, layout: FileLayout, outputs: Mapping[str, AnyNode]) -> FilePlan:
        """A file's plan; tiles are not chosen yet."""
        segments = _merge(self._file_segments(layout, outputs))
        return FilePlan(layout.path, layout.size, layout.literals, tuple(segments), tuple(layout.slots), layout.checksums)

    def _file_segments(self, layout: FileLayout, outputs: Mapping[str, AnyNode]) -> Iterator[Segment]:
        """What goes into a file, tensor by tensor in the order of their slots."""
        slots = set()
        compute = self._in_order if self._stream and not layout.checksums else self._in_any_order
        for name, slot in sorted(layout.slots.items(), key=itemgetter(1)):
            if slot in slots:
                continue  # tied to the tensor before
            node = outputs[name]
            nbytes = node.spec.nbytes
            if nbytes:
                slots.add(slot)
            yield from self._segments(node, layout.pieces.get(name) or [(slot, nbytes)], compute)

    def sidecar(self, path: str, content: str | bytes) -> FilePlan:
        """A file beside the weights: another file's bytes, or these."""
        if isinstance(content, bytes):
            return FilePlan(path, len(content), ((0, content),), ())
        number = self.source(content)
        size = self.sources[number].size
        return FilePlan(path, size, (), (Copy(number, 0, 0, size),) if size else ())

    def _segments(self, node: AnyNode, pieces: Iterable[tuple[int, int]], compute: _Computing) -> Iterator[Segment]:
        """How a tensor gets into the ranges of its file, (offset, bytes) each, that hold its bytes one after the other."""
        start, node = 0, items_of(node)
        for slot, nbytes in pieces:
            if isinstance(node, Node):
                yield from compute(node, start, slot, nbytes)
            else:
                yield from self._range(node.extents, start, slot, nbytes)
            start += nbytes

    def _in_any_order(self, node: Node, start: int, slot: int, nbytes: int) -> Iterator[Segment]:
        """Bytes [start, start + nbytes) of a node; where they are those of a stored tensor for long enough, copies."""
        itemsize = node.spec.dtype.itemsize
        if not nbytes:
            return
        for piece in trace(node, identity(nbytes // itemsize, start // itemsize)):
            move = piece.move.simplify()
            if piece.exact and isinstance(piece.leaf, Source) and _copyable(move, piece.leaf):
                for dst, src in move.runs():
                    yield from self._range(piece.leaf.extents, src * itemsize, slot + dst * itemsize, move.run * itemsize)
            else:
                extent = first_extent(piece.leaf)
                leaf_item = piece.leaf.spec.dtype.itemsize if isinstance(piece.leaf, Source) else 0
                where = (self.source(extent.path), extent.offset) if extent else (0, 0)
                whole = replace(move, dst=move.dst + start // itemsize) if start else move
                # What has to see all of its input makes all of its output: in one tile, once.
                tile = move.sizes if is_made_whole(piece.leaf) else ()
                yield Compute(self.node(node), slot - start, whole, tile, *where, leaf_item)

    def _in_order(self, node: Node, start: int, slot: int, nbytes: int) -> Iterator[Segment]:
        """The same, front to back: what is not copied is computed in ranges of the file."""
        segments = list(self._in_any_order(node, start, slot, nbytes))
        copies = sorted((segment for segment in segments if isinstance(segment, Copy)), key=lambda segment: segment.dst)
        computes = [segment for segment in segments if isinstance(segment, Compute)]
        itemsize, at = node.spec.dtype.itemsize, slot
        if any(not segment.tile and self.fitting.tile(segment, TILE).pieces > SCATTERED for segment in computes):
            self.fitting.in_order.add(self.node(node))
        for copy in (*copies, None):
            end = copy.dst if copy else slot + nbytes
            if at < end:
                numel = (end - at) // itemsize
                range_ = Move((numel,), (start + at - slot) // itemsize, (1,), 0, (1,))
                yield computes[0]._replace(move=range_, tile=(numel,) if any(segment.tile for segment in computes) else ())
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

    def account(
        self, files: Sequence[FilePlan], outputs: Mapping[str, AnyNode], rows: Sequence[Row], reasons: Mapping[str, str], tied: int
    ) -> Account:
        ids = {id(self.nodes[segment.node]) for segment in computations(files)}
        count = sum(id(items_of(node)) in ids for node in outputs.values()) if ids else 0
        leaves = ((node, first_source(node) or node) for node in outputs.values() if isinstance(node, Node))
        return Account(
            tensors=len(outputs),
            copied=len(outputs) - count,
            computed=count,
            renamed=sum(map(_is_rename, rows)),
            dropped=dict(Counter(reasons.values()).most_common()),
            tied=tied,
            cast=sum(leaf.spec.dtype != node.spec.dtype and not node.spec.dtype.is_packed for node, leaf in leaves),
        )


def _is_rename(row: Row) -> bool:
    """Whether a target is one source under another name, and nothing else of it changes."""
    return not row.layout and len(row.sources) == 1 and _bare(row.target) != _bare(row.sources[0])


def _bare(name: str) -> str:
    """A tensor's name without that of a rank's file."""
    return name.rpartition("/")[2]


def _merge(segments: Iterable[Segment]) -> Iterator[Segment]:
    """The segments, with copies that follow each other on both sides as one. A run is kept in numbers: there are many copies."""
    source, offset, dst, nbytes = -1, 0, 0, 0  # of the run; source -1: there is none
    for segment in segments:
        if not isinstance(segment, Copy):
            if source >= 0:
                yield Copy(source, offset, dst, nbytes)
            source = -1
            yield segment
        elif segment.source == source and segment.offset == offset + nbytes and segment.dst == dst + nbytes:
            nbytes += segment.nbytes
        else:
            if source >= 0:
                yield Copy(source, offset, dst, nbytes)
            source, offset, dst, nbytes = segment
    if source >= 0:
        yield Copy(source, offset, dst, nbytes)


def _copyable(move: Move, leaf: Source) -> bool:
    least = REMOTE_COPY_RUN if any(is_url(extent.path) for extent in leaf.extents) else COPY_RUN
    return move.run * leaf.spec.dtype.itemsize >= least or move.run == move.numel
