"""What a user should know of a plan: what the new container has no place for, and what could be had cheaper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath

from streamconv.checkpoint.opening import Checkpoint
from streamconv.checkpoint.stems import reads_shards
from streamconv.engine.direct import LEAST, shares_extents
from streamconv.formats import FileLayout
from streamconv.formats.registry import containers
from streamconv.graph.node import extents
from streamconv.memory import BLOCK
from streamconv.running.destination import RemoteTarget, Target
from streamconv.units import format_size

SHOWN = 5  # names that a note gives


def note_ties(ties: Mapping[str, str]) -> list[str]:
    """Names tensors that are stored once because they are others."""
    return [f"{name} is {kept}, stored once (--set tied=copy: twice)" for name, kept in list(ties.items())[:SHOWN]]


def note_layouts(checkpoint: Checkpoint, target: Target | RemoteTarget, layouts: Sequence[FileLayout], limit: int | None) -> list[str]:
    """What is to be said of the files of a plan, whose shards have ``limit`` bytes of tensors."""
    return [
        *_note_metadata(checkpoint, target.format),
        *_note_whole(checkpoint, layouts, limit),
        *_note_sharing(checkpoint, target, layouts),
    ]


def _note_metadata(checkpoint: Checkpoint, format: str) -> Iterator[str]:  # noqa: A002 - the word of the command line
    """Names the source's metadata where the new container has no place for it."""
    lost = [key for key in checkpoint.metadata if key != "format" and key not in checkpoint.ties]
    stays = "metadata" not in containers()[format].takes or containers()[checkpoint.contents.format].has_own_metadata
    if lost and stays:
        more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
        yield f"left out: metadata of the source, which {format} files have no place for: {', '.join(lost[:SHOWN])}{more}"


def _note_whole(checkpoint: Checkpoint, layouts: Sequence[FileLayout], limit: int | None) -> Iterator[str]:
    """Names files that are larger than shards were to be, since their library reads no shards."""
    for layout in layouts:
        folder, stem = checkpoint.component_of(layout.path)[0], PurePath(layout.path).stem.partition(".")[0]
        if limit is not None and layout.size > limit and not reads_shards(checkpoint, folder, stem):
            yield f"{layout.path}: one file, though larger than {format_size(limit)}: the library that looks for it reads no shards"


def _note_sharing(checkpoint: Checkpoint, target: Target | RemoteTarget, layouts: Sequence[FileLayout]) -> Iterator[str]:
    """Suggests ``--align`` where DST could share the source's blocks and only the headers' lengths keep it from that."""
    path = checkpoint.location.local
    if path is None or isinstance(target, RemoteTarget):
        return
    above = next(parent for parent in (target.root, *target.root.parents) if parent.exists())
    same_device = above.stat().st_dev == path.stat().st_dev
    if "align" not in containers()[target.format].takes or not same_device or not shares_extents(above):
        return
    starts = [next(extents(node)).offset for node in checkpoint.contents.entries.values() if node.spec.nbytes >= LEAST]
    aligned = all(min(layout.slots.values(), default=0) % BLOCK == 0 for layout in layouts)
    if starts and not aligned and sum(start % BLOCK == 0 for start in starts) > len(starts) // 2:
        yield "the file system can share blocks between SRC and DST: with --align it need not copy them"
