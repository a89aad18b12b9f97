"""Runs plans: what may be written, what is done already, the engine, and what a run took."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamconv import memory
from streamconv.destination import Target, check_room, clear, old_files, prepare
from streamconv.engine.check import OutputCheck, check_replicas
from streamconv.engine.io import describe_os_error
from streamconv.engine.journal import Journal, journal_path, read_journal
from streamconv.engine.local import SUMS, LocalEngine, check_sources
from streamconv.engine.reclaim import Reclaim
from streamconv.errors import DestinationError, Interrupted, RunError
from streamconv.plan import Plan
from streamconv.progress import Progress, bar
from streamconv.units import format_size
from streamconv.verify import Comparison


@dataclass(frozen=True)
class Result:
    """What a run took. Memory in bytes, of the whole process."""

    plan: Plan
    seconds: float
    peak_rss: int
    peak_anonymous: int
    verified: bool | None = None
    comparison: Comparison | None = None

    def summary(self) -> dict[str, Any]:
        """What ``convert --json`` prints."""
        plan = self.plan.summary()
        kept = (
            "peak_memory",
            "bytes_read",
            "bytes_copied",
            "bytes_computed",
            "bytes_written",
            "disk_needed",
            "workers",
            "dropped",
            "notes",
            "summary",
        )
        found: dict[str, Any] = {key: plan[key] for key in kept}
        found |= {"seconds": self.seconds, "peak_rss": self.peak_rss, "peak_anonymous": self.peak_anonymous}
        found |= {"outputs": plan["outputs"], "verified": self.verified}
        return found | ({"comparison": self.comparison.summary()} if self.comparison else {})

    def __str__(self) -> str:
        totals, seconds = self.plan.totals, max(self.seconds, 1e-9)
        rate = format_size(totals.bytes_written / seconds)
        moved = f"{format_size(totals.bytes_copied)} copied, {format_size(totals.bytes_computed)} computed"
        checked = ", verified" if self.verified else ""
        return (
            f"{self.plan.destination}: {len(self.plan.mapping)} tensors, "
            f"{format_size(totals.bytes_written)} in {self.seconds:.2f} s ({rate}/s); "
            f"{moved}{checked}; peak memory {format_size(self.peak_rss)}\n{self.plan.account}"
        )


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
    progress: bool | Progress = False,
    settings: Mapping[str, Any] | None = None,
) -> Result:
    """Runs a plan.

    Args:
        plan: what `plan` made; its sources must not have changed since.
        overwrite: remove weight and index files that are in the way first, nothing else.
        resume: keep what an interrupted run of the same plan has finished.
        verify: read everything back and compare.
        checksum: write ``SHA256SUMS``, too, which ``sha256sum --check`` reads.
        reclaim_source: DELETE the source: give the space of its weight files back as soon as what was made of them is durable and checked.
        progress: show a bar, on stderr if that is a terminal or in a notebook; or how to.
        settings: what the plan was made with; says what differs if an interrupted run was another one.

    Raises:
        StreamconvError: see the classes; nothing is lost.
    """
    started = time.perf_counter()
    root = Path(plan.root)
    if checksum:  # the source's own, if it has one, is of other files
        plan = replace(plan, files=tuple(file for file in plan.files if file.path != SUMS))
    reclaim = Reclaim(plan) if reclaim_source else None
    journal = Journal(journal_path(root, plan.single), plan, settings, overwrite=overwrite, reclaim=reclaim_source)
    done = read_journal(journal.path)[1] if resume else {}
    check_sources(plan, given_back=reclaim.touched(done) if reclaim else ())
    with _watch() as figures:
        try:
            finished = resume and _is_complete(plan, journal)
            if not finished:
                check_room(with_reclaim(plan, done) if reclaim else plan, root, old_files(root, plan.single) if overwrite else [])
                if not (reclaim and done):
                    check_replicas(plan)
                _write(plan, journal, overwrite=overwrite, resume=resume, checksum=checksum, reclaim=reclaim, progress=progress)
            elif checksum:
                LocalEngine(plan, journal).write_sums({})
            if ((verify and not reclaim) or finished) and (different := _find_difference(plan, progress=progress)) is not None:
                if finished:
                    raise DestinationError(f"{root}: {different} is not what this conversion makes: start afresh with --overwrite")
                raise RunError(f"{root}: {different} does not hold what was written: check disk and memory, then rerun with --overwrite")
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted: rerun the same command with --resume to go on with {root}") from None
    return Result(plan, time.perf_counter() - started, memory.peak(), figures["anonymous"], True if verify or finished else None)


def _write(
    plan: Plan, journal: Journal, *, overwrite: bool, resume: bool, checksum: bool, reclaim: Reclaim | None, progress: bool | Progress
) -> None:
    """Writes a plan's files, with DST to itself."""
    root = Path(plan.root)
    goes_on = resume and journal.path.exists()
    prepare(plan, root, overwrite=overwrite, resume=goes_on)
    try:
        journal.begin(resume=goes_on)
        if journal.overwrites:
            clear(plan, root, journal)
        elif not goes_on:  # another run may have finished in between
            try:
                Target(root, plan.single, plan.format).check_empty()
            except DestinationError:
                journal.end()
                raise
        with bar(plan.totals.bytes_written, "converting", show=progress) as tell:
            LocalEngine(plan, journal, tell, checksum=checksum, reclaim=reclaim).run()
    except OSError as error:
        raise describe_os_error(error, str(root)) from error
    finally:
        journal.close()


@contextmanager
def _watch() -> Iterator[dict[str, int]]:
    """The largest anonymous memory seen while the block runs; the kernel keeps no mark of it."""
    figures, done = {"anonymous": memory.anonymous()}, threading.Event()

    def sample() -> None:
        while not done.wait(0.05):
            figures["anonymous"] = max(figures["anonymous"], memory.anonymous())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield figures
    finally:
        done.set()
        thread.join()


def _is_complete(plan: Plan, journal: Journal) -> bool:
    """Whether DST holds all files of the plan at their sizes and no run is pending."""
    root = Path(plan.root)
    return not journal.path.exists() and all(
        (root / file.path).is_file() and (root / file.path).stat().st_size == file.size for file in plan.files
    )


def _find_difference(plan: Plan, *, progress: bool | Progress) -> str | None:
    """Compares every output file, read back, with what the plan makes of the sources; names one that differs."""
    with bar(plan.totals.bytes_written, "verifying", show=progress) as tell:
        try:
            return OutputCheck(plan, tell).run()
        except OSError as error:
            raise describe_os_error(error, plan.root) from error
