"""Runs plans: what may be written, what is done already, the engine, and what a run took.

An ordinary run has DST to itself and keeps a journal. Where files are made apart (in parts, by Ray, behind a URL) a claim takes its place.
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
from streamconv.errors import DestinationError, FormatError, Interrupted, UsageError, writing
from streamconv.formats.registry import containers
from streamconv.interrupts import Unwinding
from streamconv.planning.plan import Plan
from streamconv.running.apart import Apart
from streamconv.running.destination import Target, check_room, clear, old_files, prepare
from streamconv.running.journal import Journal, is_overwrite_noted, journal_path, read_journal
from streamconv.running.kept import check_sources_stay
from streamconv.running.local import SUMS, LocalEngine, check_sources
from streamconv.running.progress import Progress, Shown, bar, how_to_show
from streamconv.running.reclaim import Reclaim
from streamconv.running.results import Overflow, Result, check_outputs, watch
from streamconv.storage import is_url

ENGINES = ("local", "ray")


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
    engine: str = "local",
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
        engine: ``local``, or ``ray``: a task for each file.
        ray_address: of the Ray cluster; unless given, Ray finds or starts one.
        create_pr: make what is uploaded to the Hub a pull request; it also removes the old weights and indices of the same container.

    Raises:
        StreamconvError: see the classes; nothing is lost.
    """
    progress = how_to_show(progress)
    if engine not in ENGINES:
        raise UsageError(f"unknown engine {engine!r}: known are {', '.join(ENGINES)}")
    _check_known(plan)
    if part or finish or engine != "local" or is_url(plan.root):
        if reclaim_source:
            raise UsageError("--reclaim-source: goes with files that this process alone makes, below a path: leave it out")
        apart = Apart(plan, part=part, finish=finish, overwrite=overwrite, resume=resume, verify=verify, checksum=checksum)
        apart.choose(engine, ray_address, create_pr=create_pr)
        return apart.run(progress)
    started = time.perf_counter()
    root = Path(plan.root)
    if resume and is_overwrite_noted(journal_path(root, plan.single), settings or {}):
        overwrite, resume = True, False  # as it would have gone on, had it not been killed before its journal was begun
    elif overwrite and resume:
        resume = journal_path(root, plan.single).exists() or _is_complete(plan)
        overwrite = not resume
    check_sources_stay(plan, overwrite=overwrite)
    if checksum:  # the source's own, if it has one, is of other files
        plan = replace(plan, files=tuple(file for file in plan.files if file.path != SUMS))
    reclaim = Reclaim(plan) if reclaim_source else None
    journal = Journal(journal_path(root, plan.single), plan, settings, overwrite=overwrite, reclaim=reclaim_source)
    done = read_journal(journal.path)[1] if resume else {}
    check_sources(plan, given_back=reclaim.touched(done) if reclaim else ())
    overflowed: Mapping[str, int] = {}
    with Unwinding(), watch() as figures:
        try:
            finished = resume and _is_complete(plan)
            if not finished:
                check_room(with_reclaim(plan, done) if reclaim else plan, root, old_files(plan, root) if overwrite else [])
                if not (reclaim and done):
                    check_replicas(plan)
                overflowed = _write(
                    plan, journal, overwrite=overwrite, resume=resume, checksum=checksum, reclaim=reclaim, progress=progress
                )
            elif checksum:
                LocalEngine(plan, journal).write_sums({})
            if (verify and not reclaim) or finished:
                check_outputs(plan, progress, found=finished)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted: rerun the same command with --resume to go on with {root}") from None
    overflow = Overflow(overflowed, complete=not (finished or done))
    verified = True if verify or finished else None
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
    plan: Plan, journal: Journal, *, overwrite: bool, resume: bool, checksum: bool, reclaim: Reclaim | None, progress: bool | Progress
) -> Mapping[str, int]:
    """Writes a plan's files, with DST to itself; how many values overflowed, by target."""
    root = Path(plan.root)
    goes_on = resume and journal.path.exists()
    prepare(plan, root, overwrite=overwrite, resume=goes_on)
    try:
        journal.begin(resume=goes_on)
        if journal.overwrites:
            with writing():
                clear(plan, root, journal)
        elif not goes_on:  # another run may have finished in between
            try:
                Target(root, plan.single, plan.format).check_empty()
            except DestinationError:
                journal.end()
                raise
        with bar(plan.totals.bytes_written, "converting", show=progress) as tell:
            engine = LocalEngine(plan, journal, tell, checksum=checksum, reclaim=reclaim)
            engine.run()
            return engine.overflowed
    except OSError as error:
        raise describe_os_error(error, str(root)) from error
    finally:
        journal.close()


def _is_complete(plan: Plan) -> bool:
    """Whether DST holds all files of the plan at their sizes and no run is pending."""
    root = Path(plan.root)
    return not journal_path(root, plan.single).exists() and all(
        (root / file.path).is_file() and (root / file.path).stat().st_size == file.size for file in plan.files
    )
