"""The text of a plan: its document, with types that are checked when it is read. Nodes and ops stand in tables, each once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from msgspec import Struct

from streamconv import codec
from streamconv.digests import Checksum
from streamconv.dtypes import TensorSpec, read_dtype, write_dtype
from streamconv.errors import FormatError
from streamconv.graph import ops
from streamconv.graph.moves import Move
from streamconv.graph.node import AnyNode, Extent, Node, Source
from streamconv.library import foreign  # noqa: F401 - plans may have its op
from streamconv.planning.segments import Account, Check, Compute, Copy, FilePlan, Segment, SourceFile, Totals
from streamconv.rows import Row

VERSION = 3


class TextRow(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What stands in tables as a list of values, the first of which says what it is."""


class CopyRow(TextRow, frozen=True, tag="copy"):
    """A `Copy`."""

    source: int
    offset: int
    dst: int
    nbytes: int


class ComputeRow(TextRow, frozen=True, tag="compute"):
    """A `Compute`, with the parts of its move between ``dst`` and ``tile``."""

    node: int
    dst: int
    sizes: tuple[int, ...]
    to: int
    to_strides: tuple[int, ...]
    of: int
    of_strides: tuple[int, ...]
    tile: tuple[int, ...]
    source: int
    offset: int
    itemsize: int


class StoredRow(TextRow, frozen=True, tag="stored"):
    """A leaf of the graph: (number of the source file, offset, bytes) of each of its extents."""

    dtype: str
    shape: tuple[int, ...]
    extents: tuple[tuple[int, int, int], ...]


class MadeRow(TextRow, frozen=True, tag="made"):
    """A node: the numbers of its op and of its inputs, which are rows before it."""

    dtype: str
    shape: tuple[int, ...]
    op: int
    inputs: tuple[int, ...]


class ChecksumRow(TextRow, frozen=True):
    """A `Checksum`."""

    kind: str
    start: int
    nbytes: int
    positions: tuple[int, ...]
    seed: int
    tail: tuple[int, ...]
    prefix: str


class MappingRow(TextRow, frozen=True):
    """A `Row`."""

    target: str
    sources: tuple[str, ...]
    layout: str
    dtype: str
    shape: tuple[int, ...]


class FileRow(Struct, frozen=True, forbid_unknown_fields=True):
    """A `FilePlan`."""

    path: str
    size: int
    literals: tuple[tuple[int, bytes], ...]
    segments: tuple[CopyRow | ComputeRow, ...]
    tensors: tuple[str, ...]
    checksums: tuple[ChecksumRow, ...]


class Document(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A whole plan."""

    streamconv_plan: int = VERSION
    root: str
    single: str | None
    format: str
    workers: int
    arena: int
    read_backend: str
    peak_memory: int
    sources: tuple[SourceFile, ...]
    ops: tuple[dict[str, Any], ...]
    graph: tuple[StoredRow | MadeRow, ...]
    nodes: tuple[int, ...]
    files: tuple[FileRow, ...]
    checks: tuple[Check, ...]
    mapping: tuple[MappingRow, ...]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    totals: Totals
    account: Account
    names: tuple[str, ...] = ()
    sidecars: tuple[str, ...] = ()
    measures: bool = False
    strict: bool = False


FIELDS = Document.__struct_fields__[1:]  # after its version


class _Version(Struct):
    """What of a document says whether it can be read."""

    streamconv_plan: int = 0


def read(text: bytes | str) -> Document:
    """The document in a text.

    Raises:
        FormatError: there is none, or one of another version.
    """
    version = codec.decode(text, _Version).streamconv_plan
    if version != VERSION:
        raise FormatError(f"not a plan of version {VERSION}, but of {version or 'none'}: it is another release's or no plan")
    return codec.decode(text, Document)


class Graph:
    """Nodes flattened into rows that name what they are made of by number."""

    def __init__(self, files: Sequence[SourceFile]) -> None:
        self._files = {file.path: k for k, file in enumerate(files)}
        self._numbers: dict[int, int] = {}
        self._ops: dict[ops.Op, int] = {}
        self.rows: list[StoredRow | MadeRow] = []

    @property
    def ops(self) -> Iterator[dict[str, Any]]:
        """The ops that rows refer to."""
        return (op.to_json() for op in self._ops)

    def add(self, node: AnyNode) -> int:
        """The number of a node's row."""
        if id(node) not in self._numbers:
            dtype, shape = write_dtype(node.spec.dtype), node.spec.shape
            row: StoredRow | MadeRow
            if isinstance(node, Node):
                inputs = tuple(self.add(child) for child in node.inputs)
                row = MadeRow(dtype, shape, self._ops.setdefault(node.op, len(self._ops)), inputs)
            else:
                row = StoredRow(dtype, shape, tuple((self._files[e.path], e.offset, e.nbytes) for e in node.extents))
            self._numbers[id(node)] = len(self.rows)
            self.rows.append(row)
        return self._numbers[id(node)]


def read_graph(document: Document) -> list[AnyNode]:
    """The nodes of a document's rows.

    Raises:
        FormatError: a row says what cannot be.
    """
    table = [ops.from_json(row) for row in document.ops]
    paths = [file.path for file in document.sources]
    graph: list[AnyNode] = []
    for row in document.graph:
        spec = _spec(row)
        if isinstance(row, MadeRow):
            inputs = tuple(_pick(graph, number, "an input of a node") for number in row.inputs)
            graph.append(Node(spec, _pick(table, row.op, "an op"), inputs))
        else:
            extents = (Extent(_pick(paths, number, "a source"), offset, nbytes) for number, offset, nbytes in row.extents)
            graph.append(Source(spec, tuple(extents)))
    return graph


def read_nodes(document: Document) -> tuple[AnyNode, ...]:
    """The nodes that segments refer to. Raises FormatError."""
    graph = read_graph(document)
    return tuple(_pick(graph, number, "a node") for number in document.nodes)


def _pick(table: Sequence[Any], number: int, what: str) -> Any:
    if not 0 <= number < len(table):
        raise FormatError(f"{what} is number {number} of {len(table)}")
    return table[number]


def _spec(row: StoredRow | MadeRow | MappingRow) -> TensorSpec:
    return TensorSpec(read_dtype(row.dtype), row.shape)


def file_row(file: FilePlan) -> FileRow:
    """A file as it stands in a document."""
    checksums = (ChecksumRow(c.kind, c.start, c.nbytes, c.positions, c.seed, c.tail, c.prefix.decode()) for c in file.checksums)
    return FileRow(file.path, file.size, file.literals, tuple(map(_segment_row, file.segments)), file.tensors, tuple(checksums))


def _segment_row(segment: Segment) -> CopyRow | ComputeRow:
    if isinstance(segment, Copy):
        return CopyRow(*segment)
    move = segment.move
    strides = (move.sizes, move.dst, move.dst_strides, move.src, move.src_strides)
    return ComputeRow(segment.node, segment.dst, *strides, segment.tile, segment.source, segment.offset, segment.itemsize)


def read_file(row: FileRow) -> FilePlan:
    """The file of a row."""
    checksums = (Checksum(c.kind, c.start, c.nbytes, c.positions, c.seed, c.tail, c.prefix.encode()) for c in row.checksums)
    return FilePlan(row.path, row.size, row.literals, tuple(map(_read_segment, row.segments)), row.tensors, tuple(checksums))


def _read_segment(row: CopyRow | ComputeRow) -> Segment:
    if isinstance(row, CopyRow):
        return Copy(row.source, row.offset, row.dst, row.nbytes)
    move = Move(row.sizes, row.to, row.to_strides, row.of, row.of_strides)
    return Compute(row.node, row.dst, move, row.tile, row.source, row.offset, row.itemsize)


def mapping_rows(mapping: Iterable[Row]) -> Iterator[MappingRow]:
    """Rows of the mapping as they stand in a document."""
    return (MappingRow(m.target, m.sources, m.layout, write_dtype(m.spec.dtype), m.spec.shape) for m in mapping)


def read_mapping(rows: Iterable[MappingRow]) -> tuple[Row, ...]:
    """The mapping of a document."""
    return tuple(Row(row.target, row.sources, row.layout, _spec(row)) for row in rows)
