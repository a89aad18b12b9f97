"""A compiled conversion as pure data: what each output file holds, byte range by byte range. JSON in, JSON out.

An output file is its literals (headers) and its segments. A `Copy` is a byte range of a source file; a `Compute` is a region
of a node, cut into tiles. Files are independent of each other: each is a function of the plan and the sources alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from streamconv import codec
from streamconv.errors import FormatError
from streamconv.graph.node import AnyNode
from streamconv.notation.folding import Fold, fold, fold_names
from streamconv.notebook import table
from streamconv.planning import plan_text
from streamconv.planning.plan_text import VERSION, Graph, file_row, mapping_rows
from streamconv.planning.proof import Proof
from streamconv.planning.segments import (
    Account,
    Check,
    Compute,
    Copy,
    FilePlan,
    Segment,
    SourceFile,
    Totals,
    add_up,
    computations,
    source_files,
)
from streamconv.rows import Row
from streamconv.storage import is_url
from streamconv.text import join_lines, one_line
from streamconv.units import format_size

__all__ = [
    "BEGINNING", "VERSION", "Account", "Check", "Compute", "Copy", "FilePlan", "Plan", "Segment", "SourceFile", "Totals",
    "add_up", "source_files",
]  # fmt: skip

BEGINNING = '{"streamconv_plan"'  # of a plan as JSON
SHOWN = 40  # lines of a kind that a plan's picture has
SHOWN_BESIDE = 20  # sidecars in its line of them


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
        names: of the target that each node makes; "" of those that are compared only.
        sidecars: paths of those of the files that go along with the weights, sorted.
        measures: whether a run measures what values lose.
        strict: whether it fails, and commits nothing, where values overflow.
    """

    root: str
    single: str | None
    format: str
    sources: tuple[SourceFile, ...]
    nodes: tuple[AnyNode, ...]
    files: tuple[FilePlan, ...]
    checks: tuple[Check, ...]
    mapping: tuple[Row, ...]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    totals: Totals
    workers: int
    arena: int
    read_backend: str
    peak_memory: int
    account: Account = field(default_factory=Account)
    names: tuple[str, ...] = ()
    sidecars: tuple[str, ...] = ()
    measures: bool = False
    strict: bool = False

    def __repr__(self) -> str:
        return f"<Plan {one_line(self._title)}>"

    def _repr_html_(self) -> str:
        return table(self._title, [], [*self._facts(), *(("note", note) for note in self.notes)])

    @property
    def _title(self) -> str:
        size = format_size(self.totals.bytes_written)
        return f"{self.destination} ({self.format}): {len(self.mapping)} tensors, {len(self.files)} files, {size}"

    def _facts(self) -> list[tuple[str, str]]:
        """What a reader wants to know first, by name."""
        totals, workers = self.totals, f"{self.workers} worker{'' if self.workers == 1 else 's'}"
        allocated = sum(source.allocated for source in self.sources)
        disk = f"{format_size(allocated)} now, {format_size(allocated + totals.disk_needed)} afterwards, with the sources"
        if is_url(self.root):
            disk = f"at most {format_size(totals.disk_needed)} at a time, until it is uploaded" if totals.disk_needed else "none"
        return [
            ("reads", f"{format_size(totals.bytes_read)}: {_list_files(_name_sources(self.sources))}"),
            ("writes", f"{format_size(totals.bytes_written)}: {_list_files((Path(file.path).name, file.size) for file in self.files)}"),
            *([("sidecars", self._list_sidecars())] if self.sidecars else []),
            ("moves", f"{format_size(totals.bytes_copied)} copied, {format_size(totals.bytes_computed)} computed"),
            ("memory", f"peak memory at most {format_size(self.peak_memory)}, with {workers}"),
            ("disk", disk),
            ("account", str(self.account)),
        ]

    def __str__(self) -> str:
        lines = [self._title, *(f"  {name:<8} {text}" for name, text in self._facts())]
        changes: list[tuple[int, Row]] = []
        if any(map(_changes, self.mapping)):  # else no kind of row does
            changes = [(len(members), row) for row, members in self.fold_mapping() if _changes(row)]
        same = len(self.mapping) - sum(count for count, _ in changes)
        lines += [f"  {same} keep their names"] if same and changes else []
        for count, row in changes[:SHOWN]:
            target = f"-> {row.target}  {row.spec}{f'  x{count}' if count > 1 else ''}"
            if len(row.sources) == 1 and not row.layout:
                lines.append(f"  {row.sources[0]} {target}")
            else:
                lines += [f"  {source}" for source in row.sources[:SHOWN]]
                lines += [f"    [{row.layout}]"] if row.layout else []
                lines.append(f"    {target}")
        lines += [f"  ... and {len(changes) - SHOWN} kinds more; --json lists them"] if len(changes) > SHOWN else []
        dropped = fold_names(self.dropped)
        lines += [f"  dropped: {name}" for name in dropped[:SHOWN]]
        lines += [f"  ... and {len(dropped) - SHOWN} kinds more dropped"] if len(dropped) > SHOWN else []
        lines += [f"  note: {note}" for note in self.notes]
        return join_lines(lines)

    def _list_sidecars(self) -> str:
        more = len(self.sidecars) - SHOWN_BESIDE
        return ", ".join(self.sidecars[:SHOWN_BESIDE]) + (f", and {more} more" if more > 0 else "")

    def fold_mapping(self) -> Iterator[tuple[Row, list[Row]]]:
        """Rows of the mapping that differ in numbers only as one, with ranges in its names, and the rows it stands for."""
        for (target, *names), positions in fold(map(_as_texts, self.mapping)):
            members = [self.mapping[position] for position in positions]
            yield members[0]._replace(target=target, sources=tuple(names)), members

    @property
    def destination(self) -> Path | str:
        """What DST was: the directory, or the one file; a URL's text."""
        if is_url(self.root):
            return f"{self.root}/{self.single}" if self.single else self.root
        return Path(self.root) / self.single if self.single else Path(self.root)

    def for_files(self, numbers: Iterable[int]) -> Plan:
        """The plan of some output files alone, with what they are made of and no more, as a remote worker receives it."""
        files = [self.files[number] for number in numbers]
        segments = list(chain.from_iterable(file.segments for file in files))
        node_numbers = sorted({segment.node for segment in computations(files)})
        nodes = {node: k for k, node in enumerate(node_numbers)}
        source_numbers = {segment.source for segment in segments}
        paths = set(source_files(self.nodes[node] for node in node_numbers))
        sources = [k for k, source in enumerate(self.sources) if k in source_numbers or source.path in paths]
        new_numbers = {source: k for k, source in enumerate(sources)}

        def renumber(segment: Segment) -> Segment:
            source = new_numbers.get(segment.source, 0)  # a plan of constants has no sources at all
            if isinstance(segment, Copy):
                return segment._replace(source=source)
            return segment._replace(node=nodes[segment.node], source=source)

        targets = set(chain.from_iterable(file.tensors for file in files))
        return replace(
            self,
            sources=tuple(self.sources[k] for k in sources),
            nodes=tuple(self.nodes[node] for node in node_numbers),
            files=tuple(replace(file, segments=tuple(map(renumber, file.segments))) for file in files),
            checks=(),
            mapping=tuple(row for row in self.mapping if row.target in targets),
            totals=add_up(files, self.nodes, self.sources),
            names=tuple(self.names[node] for node in node_numbers if self.names),
        )

    def target_of(self, segment: Compute) -> str:
        """The name of the tensor that a segment is a part of."""
        return self.names[segment.node] if self.names else ""

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
            "sidecars": list(self.sidecars),
            "notes": list(self.notes),
            "summary": asdict(self.account),
        }

    def check(self) -> None:
        """Proves that every byte of every output file is written once, from what sources and nodes hold: see `proof`.

        Raises:
            FormatError: it does not hold; says where.
        """
        proof = Proof(self.sources, self.nodes)
        proof.check_sources()
        proof.check_nodes()
        proof.check_pairs(self.checks)
        proof.check_files(self.files)
        proof.check_tiles(self.files, workers=self.workers, arena=self.arena, peak=self.peak_memory)
        if self.single is not None and any(file.path != self.single for file in self.files):
            raise FormatError(f"{self.single} is to be the only file, and there are others")
        if not self.root or "\0" in self.root:
            raise FormatError(f"{self.root!r} is no folder")
        if self.names and len(self.names) != len(self.nodes):
            raise FormatError(f"{len(self.names)} names stand for {len(self.nodes)} nodes")

    def digest(self) -> str:
        """Identifies the conversion by its text: same sources, same outputs, same bytes.

        Workers, memory and tiles, where DST is, and what only speaks to users are not part of it.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        graph, digest = Graph(self.sources), hashlib.sha256()
        roots = [graph.add(node) for node in self.nodes]
        sources = [source._replace(allocated=0) for source in self.sources]
        for part in (VERSION, self.format, sources, roots, self.checks, self.dropped):
            digest.update(codec.encode(part))
        for row in (*graph.ops, *graph.rows, *mapping_rows(self.mapping)):
            digest.update(codec.encode(row))
        for file in self.files:
            digest.update(codec.encode(file_row(replace(file, segments=tuple(map(_without_tile, file.segments))))))
        return digest.hexdigest()

    # JSON ------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The plan as one JSON document, which any machine that sees the sources can run; `from_json` reads it back.

        >>> plan = streamconv.plan("model", "copy", max_memory="4GB")
        >>> streamconv.Plan.from_json(plan.to_json()).to_json() == plan.to_json()
        True
        """
        return b"".join(self.json_pieces()).decode()

    def json_pieces(self) -> Iterator[bytes]:
        """The bytes of `to_json`, piece by piece, so that the text of a large plan need not be held."""
        graph = Graph(self.sources)
        roots = tuple(graph.add(node) for node in self.nodes)
        rows: dict[str, Iterable[Any]] = {
            "ops": graph.ops,
            "graph": graph.rows,
            "files": map(file_row, self.files),
            "mapping": mapping_rows(self.mapping),
        }
        yield b'{"streamconv_plan":%d' % VERSION
        for name in plan_text.FIELDS:
            yield b',"%s":' % name.encode()
            if name in rows:
                yield b"["
                for number, row in enumerate(rows[name]):
                    yield b"," * (number > 0) + codec.encode(row)
                yield b"]"
            else:
                yield codec.encode(roots if name == "nodes" else getattr(self, name))
        yield b"}"

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Reads a plan back, and proves that it holds: see `check`. No source is looked at.

        Raises:
            FormatError: not a plan, of another version, or one that does not hold.

        >>> plan = streamconv.plan("model", "copy", max_memory="4GB")
        >>> streamconv.Plan.from_json(plan.to_json()).digest() == plan.digest()
        True
        >>> streamconv.Plan.from_json("{}")
        Traceback (most recent call last):
        ...
        streamconv.errors.FormatError: ...
        """
        try:
            document = plan_text.read(text)
            plan = cls(
                **{name: getattr(document, name) for name in _AS_THEY_ARE},
                nodes=plan_text.read_nodes(document),
                files=tuple(map(plan_text.read_file, document.files)),
                mapping=plan_text.read_mapping(document.mapping),
            )
            plan.check()
        except FormatError as error:
            raise FormatError(f"not a plan that can be run: {error}") from error
        return plan


_AS_THEY_ARE = (
    "root", "single", "format", "workers", "arena", "read_backend", "peak_memory", "sources", "checks", "dropped", "notes", "totals",
    "account", "names", "sidecars", "measures", "strict",
)  # fmt: skip


def _changes(row: Row) -> bool:
    """Whether a tensor gets another name or layout."""
    return bool(row.layout) or (row.target,) != row.sources


def _without_tile(segment: Segment) -> Segment:
    return segment._replace(tile=()) if isinstance(segment, Compute) else segment


def _as_texts(row: Row) -> tuple[Hashable, tuple[str, ...]]:
    """A row of the mapping as `fold` takes it; of several sources, their names are folded themselves."""
    names = fold_names(row.sources) if len(row.sources) > 1 else row.sources
    return (row.layout, row.spec), (row.target, *names)


def _name_sources(files: Sequence[SourceFile]) -> Iterator[tuple[str, int]]:
    """Names and sizes of what is read; where that lies in several folders, none of them in another, with its folder."""
    folders = sorted({file.path.rpartition("/")[0] for file in files}, key=lambda folder: folder.split("/"))
    roots: list[str] = []
    for folder in folders:
        if not roots or not f"{folder}/".startswith(f"{roots[-1]}/"):
            roots.append(folder)
    for file in files:
        name = file.path.rpartition("/")[2]
        if len(roots) > 1:
            root = next((root for root in roots if file.path.startswith(f"{root}/")), "")
            name = file.path[len(root.rpartition("/")[0]) :].lstrip("/")
        yield name, file.size


def _list_files(files: Iterable[tuple[str, int]]) -> str:
    """``model-[1-9].safetensors x9, config.json``: the names, folded; the largest first."""
    entries = list(files)

    def total(kind: Fold) -> int:
        return sum(entries[position][1] for position in kind.members)

    kinds = sorted(fold((None, (name,)) for name, _ in entries), key=total, reverse=True)
    texts = [f"{kind.texts[0]}{f' x{len(kind.members)}' if len(kind.members) > 1 else ''}" for kind in kinds[:4]]
    return ", ".join(texts) + (f", and {len(kinds) - 4} more" if len(kinds) > 4 else "")
