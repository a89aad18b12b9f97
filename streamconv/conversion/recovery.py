"""Going on where a run was interrupted, as far as the plan of a conversion does not say it again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamconv import memory
from streamconv.checkpoint.opening import open_checkpoint
from streamconv.errors import DestinationError, StreamconvError, UsageError
from streamconv.planning.plan import FilePlan, Plan, Totals
from streamconv.rows import Row
from streamconv.running.destination import RemoteTarget, Target
from streamconv.running.intent import forget_overwrite, note_overwrite
from streamconv.running.log import read_head
from streamconv.running.output import LOG, PLAN, begun_plan, finished_files
from streamconv.running.reclaim import Reclaim
from streamconv.storage.folder import AnyPath


@contextmanager
def overwrite_noted(target: Target | RemoteTarget, settings: Mapping[str, Any], *, overwrite: bool) -> Iterator[None]:
    """Has an overwrite that is killed before it is begun be gone on with by resuming; one that is refused leaves nothing."""
    if not overwrite or isinstance(target, RemoteTarget):
        yield
        return
    note_overwrite(target.output, settings)
    try:
        yield
    except StreamconvError as error:
        if error.exit_code == UsageError.exit_code:
            forget_overwrite(target.output)
        raise
    forget_overwrite(target.output)


def find_begun(src: AnyPath, target: Target | RemoteTarget, *, reclaim_source: bool) -> Plan | None:
    """The plan of an interrupted run that gives its source back, which cannot be planned again.

    Raises:
        DestinationError: such a run was interrupted, and this is none, or one of another source.
    """
    if isinstance(target, RemoteTarget):
        return None
    text = target.output.load(LOG)
    if text is None or not read_head(text).get("reclaim"):
        return None
    if not reclaim_source:
        raise DestinationError(f"{target.path}: the interrupted run was begun with --reclaim-source: add it, to go on")
    if not finished_files(text) and target.output.load(PLAN) is None:  # it was killed before it gave anything back
        return None
    plan, _ = begun_plan(target.output, str(target.root))
    above = Path(os.path.abspath(str(src)))  # noqa: PTH100 - links are looked for later
    if foreign := [file for file in Reclaim(plan).files if not Path(file).is_relative_to(above if above.is_dir() else above.parent)]:
        raise DestinationError(
            f"{target.path}: the interrupted run was another one (src was not {src}, it had {foreign[0]}): give the SRC of that run"
        )
    return plan


def find_finished(target: Target | RemoteTarget, error: StreamconvError) -> Plan | None:
    """What is in DST, where the source cannot be opened because a run that is complete has given it back."""
    if isinstance(target, RemoteTarget) or target.output.is_begun():
        return None
    try:
        checkpoint = open_checkpoint(target.path)
    except StreamconvError:
        return None
    own = (*checkpoint.contents.files, *checkpoint.contents.others)
    files = tuple(FilePlan(file.below(checkpoint.folder), file.size, (), ()) for file in own)
    return Plan(
        root=str(target.root),
        single=target.file,
        format=checkpoint.contents.format,
        sources=(),
        nodes=(),
        files=files,
        checks=(),
        mapping=tuple(Row(name, (name,), "", entry.spec) for name, entry in checkpoint.contents.entries.items()),
        dropped=(),
        notes=(f"nothing left to do: {target.path} is complete, and the source is not there any more ({error})",),
        totals=Totals(0, 0, 0, 0, 0),
        workers=1,
        arena=0,
        read_backend="auto",
        peak_memory=memory.peak(),
    )
