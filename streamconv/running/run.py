"""Runs plans: what may be written, what is done already, the engine, and what a run took.

An ordinary run has DST to itself: it holds a lock. Where files are made apart (in parts, by Ray, behind a URL) runs hold a lease.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamconv import memory
from streamconv.engine.check import check_replicas
from streamconv.engine.io import describe_os_error
from streamconv.engine.readers import BACKENDS
from streamconv.errors import DestinationError, FormatError, Interrupted, UsageError
from streamconv.formats.registry import containers
from streamconv.interrupts import Unwinding
from streamconv.planning.plan import Plan
from streamconv.running.apart import Apart
from streamconv.running.destination import check_room, prepare
from streamconv.running.directory import Directory
from streamconv.running.executors import LOCAL, executor_of
from streamconv.running.kept import check_sources_stay
from streamconv.running.local import SUMS, LocalEngine, check_sources
from streamconv.running.lock import Lock, is_overwrite_noted
from streamconv.running.output import LOG, check_earlier, check_free, finished_files, tidy
from streamconv.running.progress import Progress, Shown, bar, how_to_show
from streamconv.running.reclaim import Reclaim
from streamconv.running.results import Overflow, Result, check_outputs, watch
from streamconv.running.stale import list_stale
from streamconv.storage import is_url


def with_reclaim(made: Plan, finished: Collection[str] = ()) -> Plan:
    """The plan with the room that it takes where the source's space is given back meanwhile.

    Raises:
        DestinationError: the source's space cannot be given back.
    """
    reclaim = Reclaim(made)
    reclaim.check(finished)
    kept = sum(file.size for file in made.files if file.path in finished)
    needed = min(made.totals.disk_needed, reclaim.disk_needed(finished) + kept)
    return replace(made, totals=replace(made.totals, disk_needed=needed))


def run(
    plan: Plan,
    *,
    overwrite: bool = False,
    resume: bool = False,
    verify: bool = False,
    checksum: bool = False,
    reclaim_source: bool = False,
    progress: Shown = False,
    settings: Mapping[str, Any] | None = None,
    part: tuple[int, int] | None = None,
    finish: bool = False,
    engine: str = LOCAL,
    ray_address: str | None = None,
    create_pr: bool = False,
) -> Result:
    """Runs a plan.

    Args:
        plan: what `plan` made; its sources must not have changed since.
        overwrite: remove weight and index files that are in the way first, nothing else.
        resume: keep what an interrupted run of the same plan has finished; with ``overwrite``, too: where one has begun.
        verify: read everything back and compare.
        checksum: write ``SHA256SUMS``, too, which ``sha256sum --check`` reads.
        reclaim_source: DELETE the source: give the space of its weight files back as soon as what was made of them is durable and checked.
        progress: show a bar, on stderr if that is a terminal or in a notebook; or how to; or a function that is told how many bytes are
            done, of how many.
        settings: what the plan was made with; says what differs if an interrupted run was another one.
        part: (I, N): make the files of part I of N only, those that are not done; several may run at once, on any hosts, and again.
        finish: look at what the parts have made, and write the index.
        engine: where files are made: ``local``, in this process, ``ray``, by a task for each, or whatever `running.executors` knows.
        ray_address: of the Ray cluster; unless given, Ray finds or starts one.
        create_pr: make what is uploaded to the Hub a pull request; it also removes the old weights and indices of the same container.

    Raises:
        StreamconvError: see the classes; nothing is lost.

    >>> plan = streamconv.plan("model", "copy", max_memory="4GB")
    >>> result = streamconv.run(plan, verify=True)
    >>> result.verified, streamconv.open("copy")["w"][0].tolist()
    (True, [0.0, 1.0, 2.0])
    """
    progress = how_to_show(progress)
    executor_of(engine)
    _check_known(plan)
    if part or finish or engine != LOCAL or is_url(plan.root):
        if reclaim_source:
            raise UsageError("--reclaim-source: goes with files that this process alone makes, below a path: leave it out")
        apart = Apart(plan, part=part, finish=finish, overwrite=overwrite, resume=resume, verify=verify, checksum=checksum)
        apart.choose(engine, ray_address, create_pr=create_pr)
        return apart.run(progress)
    started = time.perf_counter()
    root = Path(plan.root)
    output = Directory(root, plan.single)
    if resume and is_overwrite_noted(output, settings or {}):
        overwrite, resume = True, False  # as it would have gone on, had it not been killed before it was begun
    elif overwrite and resume:
        resume = output.is_begun() or _is_complete(plan, output)
        overwrite = not resume
    check_earlier(output, overwrite=overwrite)
    check_sources_stay(plan, overwrite=overwrite)
    if checksum:  # the source's own, if it has one, is of other files
        plan = replace(plan, files=tuple(file for file in plan.files if file.path != SUMS))
    reclaim = Reclaim(plan) if reclaim_source else None
    lock = Lock(output, plan, settings, reclaim=reclaim_source)
    done = finished_files(output.load(LOG)) if resume else {}
    check_sources(plan, given_back=reclaim.touched(done) if reclaim else ())
    overflowed: Mapping[str, int] = {}
    with Unwinding(), watch() as figures:
        try:
            is_done = resume and _is_complete(plan, output)
            if not is_done:
                check_room(with_reclaim(plan, done) if reclaim else plan, root, list_stale(plan, output) if overwrite else [])
                if not (reclaim and done):
                    check_replicas(plan)
                overflowed = _write(plan, lock, overwrite=overwrite, resume=resume, checksum=checksum, reclaim=reclaim, progress=progress)
            elif checksum:
                LocalEngine(plan, lock.log).write_sums({})
            if (verify and not reclaim) or is_done:
                check_outputs(plan, progress, found=is_done)
            if is_done:
                tidy(output, plan.single)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted: rerun the same command with --resume to go on with {root}") from None
    overflow = Overflow(overflowed, complete=not (is_done or done))
    verified = True if verify or is_done else None
    return Result(plan, time.perf_counter() - started, memory.peak(), figures["anonymous"], verified, overflow=overflow)


def _check_known(plan: Plan) -> None:
    """Refuses a plan that makes nothing, or that names what there is not. Raises FormatError."""
    if not plan.files:
        raise FormatError("the plan makes no file: make it again")
    if plan.format not in containers() or plan.read_backend not in BACKENDS:
        raise FormatError(
            f"the plan names a container or a read backend that is unknown: {plan.format}, {plan.read_backend}; make it again"
        )


def _write(
    plan: Plan, lock: Lock, *, overwrite: bool, resume: bool, checksum: bool, reclaim: Reclaim | None, progress: bool | Progress
) -> Mapping[str, int]:
    """Writes a plan's files, with DST to itself; how many values overflowed, by target."""
    root = Path(plan.root)
    output = Directory(root, plan.single)
    goes_on = resume and output.is_begun()
    if not overwrite and not goes_on:
        check_free(output)
    prepare(plan, root)
    try:
        lock.take(goes_on=goes_on, stale=(lambda: output.look(list_stale(plan, output))) if overwrite else None)
        if not overwrite and not lock.goes_on:  # another run may have finished in between
            try:
                output.check_empty()
            except DestinationError:
                lock.leave()
                raise
        with bar(plan.totals.bytes_written, "converting", show=progress) as tell:
            engine = LocalEngine(plan, lock.log, tell, checksum=checksum, reclaim=reclaim)
            engine.run()
        lock.leave()
    except OSError as error:
        raise describe_os_error(error, str(root)) from error
    else:
        return engine.overflowed
    finally:
        lock.release()


def _is_complete(plan: Plan, output: Directory) -> bool:
    """Whether DST holds all files of the plan at their sizes and no run is pending."""
    paths = {output.root / file.path: file.size for file in plan.files}
    return not output.is_begun() and all(path.is_file() and path.stat().st_size == size for path, size in paths.items())
