"""A compiled conversion as pure data: what each output file holds, byte range by byte range. JSON in, JSON out.

An output file is its literals (headers) and its segments. A `Copy` is a byte range of a source file; a `Compute` is a region
of a node, cut into tiles. Files are independent of each other: each is a function of the plan and the sources alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from streamconv import ops
from streamconv.digests import Checksum
from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import FormatError
from streamconv.filenames import find_fault
from streamconv.folding import fold, fold_names
from streamconv.formats import Extent
from streamconv.graph import AnyNode, Node, Source, sources
from streamconv.runs import Move
from streamconv.storage import is_url
from streamconv.text import join_lines
from streamconv.units import format_size

VERSION = 2
BEGINNING = '{"streamconv_plan"'  # of a plan as JSON
SHOWN = 40  # lines of a kind that a plan's picture has
SPARSE = 0.9  # share of a file's blocks below which it counts as one with holes


class SourceFile(NamedTuple):
    """A file that is read, with what tells whether it changed: of a URL its ETag, ``tag``. ``allocated``: bytes that it takes on disk."""

    path: str
    size: int
    mtime_ns: int
    allocated: int
    tag: str = ""


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


class Mapping(NamedTuple):
    """Which sources a target tensor is made of, and how."""

    target: str
    sources: tuple[str, ...]
    layout: str
    spec: TensorSpec


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


@dataclass(frozen=True)
class Plan:
    """Everything a run needs, and nothing it does not.

    Attributes:
        root: the directory that the output files' paths are relative to.
        single: the name of the one output file, where DST is a file in a directory of others; else None.
        files: in the order in which they are finished; the last is the commit.
        nodes: what `Compute` and `Check` refer to by number.
        mapping: one row for each target tensor, in tensor order.
        dropped: source tensors that are left out on purpose.
        notes: what a user should know of the conversion, a line each.
        arena: bytes of buffer for each worker.
        peak_memory: bytes of resident memory that the run stays below.
        account: what becomes of the tensors.
    """

    root: str
    single: str | None
    format: str
    sources: tuple[SourceFile, ...]
    nodes: tuple[AnyNode, ...]
    files: tuple[FilePlan, ...]
    checks: tuple[Check, ...]
    mapping: tuple[Mapping, ...]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    totals: Totals
    workers: int
    arena: int
    read_backend: str
    peak_memory: int
    account: Account = field(default_factory=Account)

    def __str__(self) -> str:
        totals, workers = self.totals, f"{self.workers} worker{'' if self.workers == 1 else 's'}"
        written = format_size(totals.bytes_written)
        taken = sum(source.allocated for source in self.sources)
        disk = f"{format_size(taken)} now, {format_size(taken + totals.disk_needed)} afterwards, with the sources"
        if is_url(self.root):
            disk = f"at most {format_size(totals.disk_needed)} at a time, until it is uploaded" if totals.disk_needed else "none"
        lines = [
            f"{self.destination} ({self.format}): {len(self.mapping)} tensors, {len(self.files)} files, {written}",
            f"  reads    {format_size(totals.bytes_read)}: {_list_files((source.path, source.size) for source in self.sources)}",
            f"  writes   {written}: {_list_files((file.path, file.size) for file in self.files)}",
            f"  moves    {format_size(totals.bytes_copied)} copied, {format_size(totals.bytes_computed)} computed",
            f"  memory   peak memory at most {format_size(self.peak_memory)}, with {workers}",
            f"  disk     {disk}",
            f"  account  {self.account}",
        ]
        changed = [(len(members), row) for row, members in self.fold_mapping() if row.layout or (row.target,) != row.sources]
        same = len(self.mapping) - sum(count for count, _ in changed)
        lines += [f"  {same} keep their names"] if same and changed else []
        for count, row in changed[:SHOWN]:
            target = f"-> {row.target}  {row.spec}{f'  x{count}' if count > 1 else ''}"
            if len(row.sources) == 1 and not row.layout:
                lines.append(f"  {row.sources[0]} {target}")
            else:
                lines += [f"  {source}" for source in row.sources[:SHOWN]]
                lines += [f"    [{row.layout}]"] if row.layout else []
                lines.append(f"    {target}")
        lines += [f"  ... and {len(changed) - SHOWN} kinds more; --json lists them"] if len(changed) > SHOWN else []
        dropped = fold_names(self.dropped)
        lines += [f"  dropped: {name}" for name in dropped[:SHOWN]]
        lines += [f"  ... and {len(dropped) - SHOWN} kinds more dropped"] if len(dropped) > SHOWN else []
        lines += [f"  note: {note}" for note in self.notes]
        return join_lines(lines)

    def fold_mapping(self) -> Iterator[tuple[Mapping, list[Mapping]]]:
        """Rows of the mapping that differ in numbers only as one, with ranges in its names, and the rows it stands for."""
        rows = (
            ((row.layout, row.spec), (row.target, *(fold_names(row.sources) if row.sources[1:] else row.sources))) for row in self.mapping
        )
        for (target, *made_of), members in fold(rows):
            yield self.mapping[members[0]]._replace(target=target, sources=tuple(made_of)), [self.mapping[k] for k in members]

    @property
    def destination(self) -> Path | str:
        """What DST was: the directory, or the one file; a URL's text."""
        if is_url(self.root):
            return f"{self.root}/{self.single}" if self.single else self.root
        return Path(self.root) / self.single if self.single else Path(self.root)

    def for_files(self, numbers: Iterable[int]) -> Plan:
        """The plan of some output files alone, with what they are made of and no more, as a remote worker receives it."""
        files = [self.files[number] for number in numbers]
        used = sorted({segment.node for file in files for segment in file.segments if isinstance(segment, Compute)})
        nodes = {node: k for k, node in enumerate(used)}
        kept = {segment.source for file in files for segment in file.segments} if self.sources else set()
        read = set(source_files(self.nodes[node] for node in used))
        sources = [k for k, source in enumerate(self.sources) if k in kept or source.path in read]
        numbered = {source: k for k, source in enumerate(sources)}

        def renumber(segment: Segment) -> Segment:
            source = numbered.get(segment.source, 0)  # a plan of constants has no sources at all
            if isinstance(segment, Copy):
                return segment._replace(source=source)
            return segment._replace(node=nodes[segment.node], source=source)

        mine = {name for file in files for name in file.tensors}
        return replace(
            self,
            sources=tuple(self.sources[k] for k in sources),
            nodes=tuple(self.nodes[node] for node in used),
            files=tuple(replace(file, segments=tuple(map(renumber, file.segments))) for file in files),
            checks=(),
            mapping=tuple(row for row in self.mapping if row.target in mine),
            totals=add_up(files, self.nodes, self.sources),
        )

    def summary(self) -> dict[str, Any]:
        """What ``plan --json`` prints."""
        return {
            "peak_memory": self.peak_memory,
            **asdict(self.totals),
            "workers": self.workers,
            "format": self.format,
            "outputs": [{"path": f.path, "size": f.size, "tensors": list(f.tensors)} for f in self.files],
            "mapping": [
                {"target": m.target, "sources": m.sources, "layout": m.layout, "dtype": m.spec.dtype.name, "shape": m.spec.shape}
                for m in self.mapping
            ],
            "dropped": list(self.dropped),
            "notes": list(self.notes),
            "summary": asdict(self.account),
        }

    def digest(self) -> str:
        """Identifies the conversion: same sources, same outputs, same bytes. Workers and memory are not part of it."""
        found = hashlib.sha256(f"{VERSION} {self.format}".encode())
        for source in self.sources:
            found.update(repr(source._replace(allocated=0)).encode())
        for row in self.mapping:
            found.update(repr((row.target, row.sources, row.layout, str(row.spec))).encode())
        for file in self.files:
            found.update(repr((file.path, file.size, file.tensors, file.checksums)).encode())
            for offset, data in file.literals:
                found.update(offset.to_bytes(8, "little") + data)
        return found.hexdigest()

    # JSON ------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The plan as one JSON document; `from_json` reads it back."""
        table = _Table(self.sources)
        roots = [table.add(node) for node in self.nodes]
        return json.dumps(
            {
                "streamconv_plan": VERSION,
                **{key: getattr(self, key) for key in ("root", "single", "format", "workers", "arena", "read_backend", "peak_memory")},
                "sources": self.sources,
                "graph": table.rows,
                "nodes": roots,
                "files": [_file_to_json(file) for file in self.files],
                "checks": self.checks,
                "mapping": [(m.target, m.sources, m.layout, m.spec.dtype.name, m.spec.shape) for m in self.mapping],
                "dropped": self.dropped,
                "notes": self.notes,
                "totals": asdict(self.totals),
                "account": asdict(self.account),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Reads a plan back.

        Raises:
            FormatError: not a plan, or of another version.
        """
        try:
            data = json.loads(text)
            if data.get("streamconv_plan") != VERSION:
                raise FormatError(f"not a plan of version {VERSION}: found {data.get('streamconv_plan')!r}; make it again")
            files = tuple(SourceFile(*row) for row in data["sources"])
            graph = _read_graph(data["graph"], files)
            return cls(
                **{key: data[key] for key in ("root", "single", "format", "workers", "arena", "read_backend", "peak_memory")},
                sources=files,
                nodes=tuple(graph[k] for k in data["nodes"]),
                files=tuple(_file_from_json(row) for row in data["files"]),
                checks=tuple(Check(a, b, tuple(names)) for a, b, names in data["checks"]),
                mapping=tuple(Mapping(t, tuple(s), how, TensorSpec(DTYPES[d], tuple(n))) for t, s, how, d, n in data["mapping"]),
                dropped=tuple(data["dropped"]),
                notes=tuple(data["notes"]),
                totals=Totals(**data["totals"]),
                account=Account(**data["account"]),
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
            raise FormatError(f"not a plan that can be read: {type(error).__name__}: {error}; make it again") from error


class _Table:
    """Nodes flattened into rows that name their inputs by row number."""

    def __init__(self, files: tuple[SourceFile, ...]) -> None:
        self._files = {file.path: k for k, file in enumerate(files)}
        self._numbers: dict[int, int] = {}
        self.rows: list[dict[str, Any]] = []

    def add(self, node: AnyNode) -> int:
        if id(node) not in self._numbers:
            row: dict[str, Any] = {"dtype": node.spec.dtype.name, "shape": node.spec.shape}
            if isinstance(node, Node):
                row |= {"inputs": [self.add(child) for child in node.inputs], "op": node.op.to_json()}
            else:
                row["extents"] = [(self._files[e.path], e.offset, e.nbytes) for e in node.extents]
            self._numbers[id(node)] = len(self.rows)
            self.rows.append(row)
        return self._numbers[id(node)]


def _read_graph(rows: list[dict[str, Any]], files: tuple[SourceFile, ...]) -> list[AnyNode]:
    graph: list[AnyNode] = []
    for row in rows:
        spec = TensorSpec(DTYPES[row["dtype"]], tuple(row["shape"]))
        if "op" in row:
            graph.append(Node(spec, ops.from_json(row["op"]), tuple(graph[k] for k in row["inputs"])))
        else:
            graph.append(Source(spec, tuple(Extent(files[f].path, offset, nbytes) for f, offset, nbytes in row["extents"])))
    return graph


def _move_to_json(move: Move) -> list[Any]:
    return [move.sizes, move.dst, move.dst_strides, move.src, move.src_strides]


def _move_from_json(row: list[Any]) -> Move:
    return Move(tuple(row[0]), row[1], tuple(row[2]), row[3], tuple(row[4]))


def _file_to_json(file: FilePlan) -> dict[str, Any]:
    segments = [s._replace(move=_move_to_json(s.move)) if isinstance(s, Compute) else s for s in file.segments]  # type: ignore[arg-type]
    literals = [(offset, base64.b64encode(data).decode()) for offset, data in file.literals]
    checksums = [(*astuple(checksum)[:-1], checksum.prefix.decode()) for checksum in file.checksums]
    return {
        "path": file.path,
        "size": file.size,
        "literals": literals,
        "segments": segments,
        "tensors": file.tensors,
        "checksums": checksums,
    }


def _file_from_json(row: dict[str, Any]) -> FilePlan:
    if fault := find_fault(row["path"]):
        raise FormatError(f"a plan's files lie below its root: {row['path']!r} {fault}; make it again")
    return FilePlan(
        row["path"],
        row["size"],
        tuple((offset, base64.b64decode(data)) for offset, data in row["literals"]),
        tuple(Copy(*s) if len(s) == 4 else Compute(s[0], s[1], _move_from_json(s[2]), tuple(s[3]), *s[4:]) for s in row["segments"]),
        tuple(row["tensors"]),
        tuple(Checksum(kind, at, n, tuple(to), seed, tuple(tail), p.encode()) for kind, at, n, to, seed, tail, p in row["checksums"]),
    )


def source_files(nodes: Iterable[AnyNode]) -> list[str]:
    """The paths that the leaves below ``nodes`` lie in, in order of first appearance."""
    return list(dict.fromkeys(extent.path for node in nodes for leaf in sources(node) for extent in leaf.extents))


def add_up(files: Iterable[FilePlan], nodes: Sequence[AnyNode], given: Sequence[SourceFile]) -> Totals:
    """What making these files of nodes and sources takes."""
    copied = computed = read = written = 0
    disk = 0.0
    # What is left of a sparse source's blocks may straddle twice as many blocks in the output.
    shares = [1.0 if is_url(source.path) or not source.size else source.allocated / source.size for source in given]
    density = [min(1.0, share if share > SPARSE else 2 * share) for share in shares] or [1.0]  # nothing is read: all is made
    for file in files:
        written += file.size
        disk += sum(len(data) for _, data in file.literals)
        for segment in file.segments:
            if isinstance(segment, Copy):
                copied += segment.nbytes
                disk += segment.nbytes * density[segment.source]
            else:
                nbytes = segment.move.numel * nodes[segment.node].spec.dtype.itemsize
                computed += nbytes
                read += segment.move.numel * segment.itemsize
                disk += nbytes * density[segment.source]
    return Totals(read + copied, copied, computed, written, round(disk))


def _list_files(files: Iterable[tuple[str, int]]) -> str:
    """``model-[1-9].safetensors x9, config.json``: the names, folded; the largest first."""
    listed = list(files)
    folded = sorted(fold((None, (Path(path).name,)) for path, _ in listed), key=lambda kind: -sum(listed[k][1] for k in kind.members))
    shown = [f"{kind.texts[0]}{f' x{len(kind.members)}' if len(kind.members) > 1 else ''}" for kind in folded[:4]]
    return ", ".join(shown) + (f", and {len(folded) - 4} more" if len(folded) > 4 else "")
