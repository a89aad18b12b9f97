"""Checkpoints as one side of a recipe stores them: how such a one is opened, and which files a new one consists of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streamconv.checkpoint.opening import Checkpoint, open_checkpoint, prefixed, ties
from streamconv.checkpoint.stems import has_stems, reads_shards, stem_of, variant_read
from streamconv.dtypes import TensorSpec
from streamconv.errors import UsageError
from streamconv.formats import Contents, FileLayout
from streamconv.formats.container import Container
from streamconv.formats.registry import DEFAULT, by_suffix, containers, find_format
from streamconv.notation.names import Matcher, Pattern
from streamconv.notation.names import parse as parse_names
from streamconv.recipe import Conversion, Side
from streamconv.running.destination import RemoteTarget, Target
from streamconv.stage import begin
from streamconv.storage.folder import AnyPath


@dataclass(frozen=True)
class Reading:
    """How a source is read, as ``--set`` says it with any recipe.

    Attributes:
        root: the key below which its files hold tensors; None: found by what is there.
        prefix: what its names begin with that goes; None: found by what they are; "": nothing.
        settings: what its container can be told beside.
    """

    root: str | None = None
    prefix: str | None = None
    settings: Mapping[str, bool | int] = field(default_factory=dict)


def open_side(path: AnyPath, side: Side, reading: Reading = Reading(), variant: str | None = None) -> Checkpoint:
    """A checkpoint as one side of a recipe has them."""
    return open_checkpoint(
        path,
        root=reading.root,
        ranks=side.ranks,
        files=side.files,
        config=side.config,
        variant=variant,
        settings=reading.settings,
    )


def open_other(path: AnyPath, side: Side, variant: str | None, root: str | None = None) -> Checkpoint:
    """A checkpoint to compare with, in that variant if it has it."""
    try:
        return open_side(path, side, Reading(root), variant)
    except UsageError:
        if variant is None:
            raise
        return open_side(path, side, Reading(root))


@dataclass(frozen=True)
class TargetSettings:
    """What a target shall be: ``tied`` names share the tensors of others, data starts at multiples of ``align`` bytes where that is given.

    ``metadata`` goes into each file that can hold some, beside that of the source; ``limit`` is the bytes of tensors in a file, or None.
    """

    target: Target | RemoteTarget
    limit: int | None
    tied: Mapping[str, str]
    metadata: Mapping[str, str]
    align: int | None = None


def lay_out_components(checkpoint: Checkpoint, conversion: Conversion, side: Side | None, settings: TargetSettings) -> list[FileLayout]:
    """The files of the target, each component's in its folder; ``side`` is how a recipe has those of the checkpoint's own."""
    begin(f"laying out {len(conversion.outputs)} tensors")
    tables: dict[str, dict[str, TensorSpec]] = {folder: {} for folder in sorted(checkpoint.components, reverse=True)}
    ties_in: dict[str, dict[str, str]] = {folder: {} for folder in tables}
    for name, node in conversion.outputs.items():
        folder, bare = checkpoint.component_of(name)
        tables[folder][bare] = node.spec
    for name, kept in settings.tied.items():
        folder, bare = checkpoint.component_of(name)
        ties_in[folder][bare] = checkpoint.component_of(kept)[1]
    layouts = []
    for folder, specs in tables.items():  # the checkpoint's own files come last, and so does its index
        format_ = _format_of(checkpoint, folder, side, settings.target.format)
        own = side if side and not folder else Side(format_, stem=stem_of(checkpoint, folder, format_))
        target = replace(settings.target, format=format_)
        keywords = _keywords(checkpoint.components[folder], ties_in[folder], containers()[format_], settings)
        if has_stems(format_) and (variant := variant_read(checkpoint, folder)):
            keywords["variant"] = variant
        files = lay_out(specs, target, own, settings.limit if reads_shards(checkpoint, folder, own.stem) else None, keywords)
        layouts += [_in_folder(folder, layout) for layout in files]
    return layouts


def _format_of(checkpoint: Checkpoint, folder: str, side: Side | None, format: str) -> str:  # noqa: A002
    """The container of a component, which keeps its own where a recipe makes one that only a whole model can have."""
    if not (side and folder) or has_stems(format):
        return format
    own = checkpoint.components[folder].format
    return own if has_stems(own) and containers()[own].lay_out else DEFAULT


def _keywords(contents: Contents, tied: Mapping[str, str], container: Container, settings: TargetSettings) -> dict[str, Any]:
    """What a container's `lay_out` takes beside tensors and names."""
    keywords: dict[str, Any] = {"tied": tied} if container.ties == "shared" else {}
    if "metadata" in container.takes:
        stays = containers()[contents.format].has_own_metadata and contents.format != container.name
        metadata = {} if stays else contents.metadata
        tie_entries = ties(contents) if metadata else {}
        own = {key: value for key, value in metadata.items() if key not in tie_entries}
        keywords["metadata"] = {**own, **settings.metadata, **(tied if container.ties == "named" else {})}
    if settings.align:
        keywords["align"] = settings.align
    return keywords


def _in_folder(folder: str, layout: FileLayout) -> FileLayout:
    """A component's file, as one of the whole checkpoint."""
    if not folder:
        return layout
    slots = {prefixed(folder, name): slot for name, slot in layout.slots.items()}
    pieces = {prefixed(folder, name): ranges for name, ranges in layout.pieces.items()}
    return replace(layout, path=prefixed(folder, layout.path), slots=slots, pieces=pieces)


def lay_out(
    specs: Mapping[str, TensorSpec], target: Target | RemoteTarget, side: Side, limit: int | None, keywords: Mapping[str, Any]
) -> list[FileLayout]:
    """The files of one component of the target."""
    container = find_format("--format", target.format)
    write = container.lay_out
    assert write is not None
    file = target.file
    if side.root and container.nests:  # whatever the side's own container
        keywords = {**keywords, "root": side.root}
    if target.format == side.format:
        keywords = {**keywords, **({"index": side.index} if side.index else {})}
        if side.shards and side.stem and not file:
            parts = _spread(specs, side.shards if limit is not None else 1)
            return _lay_out_shards(write, parts, parse_names(side.stem), keywords)
        if side.stem and side.stem.endswith(container.names.suffixes):
            file = file or side.stem
        elif side.stem:
            keywords = {**keywords, "stem": side.stem}
    for key in ("index", "stem"):
        if key in keywords and key not in container.takes:
            raise UsageError(f"recipe: {key} {keywords[key]!r}: what {target.format} files are called cannot be chosen: leave it out")
    if container.by_rank or not (ranks := _ranks(specs, side.ranks)):
        return write(specs, max_shard_size=limit, file=file, **keywords)
    if target.file and len(ranks) > 1:
        raise UsageError(f"{target.path}: {len(ranks)} ranks are files of their own: give a directory")
    if not (first := next(iter(ranks))).endswith(container.names.suffixes):
        other = by_suffix().get(Path(first).suffix)
        raise UsageError(f"{first}: not a {target.format} file{f': give --format {other.name}' if other else ', as the recipe calls it'}")
    layouts = []
    for rank, names in ranks.items():
        rows = {name: specs[f"{rank}/{name}"] for name in names}
        for layout in write(rows, max_shard_size=None, file=target.file or rank, **keywords):
            slots = {f"{rank}/{name}": slot for name, slot in layout.slots.items()}
            layouts.append(replace(layout, slots=slots, pieces={f"{rank}/{name}": parts for name, parts in layout.pieces.items()}))
    return layouts


def _lay_out_shards(
    write: Callable[..., list[FileLayout]], parts: Iterable[Mapping[str, TensorSpec]], stem: Pattern, keywords: Mapping[str, Any]
) -> list[FileLayout]:
    """The files of a side with numbered shards, which share one ``stem``: ``{n}`` in it is the shard's number."""
    layouts: list[FileLayout] = []
    for number, part in enumerate(parts):
        layouts += write(part, max_shard_size=None, file=stem.format({"n": number}), **keywords)
    return layouts


def _spread(specs: Mapping[str, TensorSpec], count: int) -> list[dict[str, TensorSpec]]:
    """Tensors in order, in ``count`` parts of about as many bytes."""
    parts: list[dict[str, TensorSpec]] = [{} for _ in range(count)]
    total, done = sum(spec.nbytes for spec in specs.values()), 0
    for name, spec in specs.items():
        parts[min(done * count // max(total, 1), count - 1)][name] = spec
        done += spec.nbytes
    return parts


def _ranks(names: Iterable[str], patterns: Iterable[str]) -> dict[str, list[str]]:
    """Tensors called ``<file>/<name>`` by file, where all are called so; else nothing."""
    names_in: dict[str, list[str]] = {}
    matcher = Matcher([parse_names(f"{pattern}/{{rest*}}") for pattern in patterns])
    for name in names:
        if not matcher.match(name):
            return {}
        file, _, rest = name.partition("/")
        names_in.setdefault(file, []).append(rest)
    return dict(sorted(names_in.items()))
