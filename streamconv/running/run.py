"""Runs plans. Every run takes the output, makes what is missing, commits the index last, and leaves.

An ordinary run has DST to itself: it holds a lock, and one engine makes all files. Where files are made apart, in parts, by Ray or behind a
URL, a run holds a lease, and each file is made by itself.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from streamconv import memory
from streamconv.engine.check import OutputCheck, check_replicas
from streamconv.engine.io import describe_os_error
from streamconv.engine.order import tasks_in_order
from streamconv.engine.readers import BACKENDS
from streamconv.engine.times import Times, counted
from streamconv.errors import DestinationError, FormatError, Interrupted, RunError, UsageError, writing
from streamconv.formats.registry import containers
from streamconv.graph.losses import UNSCALED, Losses
from streamconv.interrupts import Unwinding
from streamconv.planning.plan import Plan
from streamconv.running.bucket import Bucket
from streamconv.running.changed import ChangedWeights
from streamconv.running.directory import Directory
from streamconv.running.executors import LOCAL, Executor, MakeFiles, executor_of
from streamconv.running.filling import check_sources
from streamconv.running.kept import check_sources_stay
from streamconv.running.lease import Lease, files_to_make
from streamconv.running.loadable import check_loadable, open_output
from streamconv.running.lock import Lock
from streamconv.running.output import LOG, Output, check_earlier, check_free, finished_files, tidy
from streamconv.running.progress import Progress, Shown, bar, how_to_show
from streamconv.running.reclaim import Reclaim
from streamconv.running.results import Changes, Overflow, Part, Result, check_outputs, watch
from streamconv.running.stale import find_stale_beside, list_stale
from streamconv.running.sums import SUMS, write_sums
from streamconv.storage import is_url


def with_reclaim(plan: Plan, finished: Collection[str] = ()) -> Plan:
    """The plan with the room that it takes where the source's space is given back meanwhile.

    Raises:
        DestinationError: the source's space cannot be given back.
    """
    reclaim = Reclaim(plan)
    reclaim.check(finished)
    present = sum(file.size for file in plan.files if file.path in finished)
    needed = min(plan.totals.disk_needed, reclaim.disk_needed(finished) + present)
    return replace(plan, totals=replace(plan.totals, disk_needed=needed))


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
    check_load: bool = False,
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
        check_load: then have the library that the config names open it, without data: see `Result.load`.

    Raises:
        StreamconvError: see the classes; nothing is lost.

    >>> plan = streamconv.plan("model", "copy", max_memory="4GB")
    >>> result = streamconv.run(plan, verify=True)
    >>> result.verified, streamconv.open("copy")["w"][0].tolist()
    (True, [0.0, 1.0, 2.0])
    """
    progress = how_to_show(progress)
    executor = executor_of(engine)
    _check_known(plan)
    is_alone = engine == LOCAL and not (part or finish or is_url(plan.root))
    if reclaim_source and not is_alone:
        raise UsageError("--reclaim-source: goes with files that this process alone makes, below a path: leave it out")
    if create_pr and not is_url(plan.root):
        raise UsageError("--create-pr: goes with a DST on the Hub, such as hf://org/name")
    _check_share(plan, part, finish=finish, overwrite=overwrite, resume=resume, checksum=checksum)
    if is_alone and checksum:  # the source's own, if it has one, is of other files
        plan = replace(plan, files=tuple(file for file in plan.files if file.path != SUMS))
    if check_load:
        check_loadable(plan, part)
    reclaim = Reclaim(plan) if reclaim_source else None
    hold: Lock | Lease
    if is_alone:
        hold = Lock(Directory(Path(plan.root), plan.single), plan, settings, reclaim=reclaim, checksum=checksum)
    else:
        hold = Lease(_open_output(plan, create_pr=create_pr), plan, part)
    overwrite, resume = hold.settle(overwrite=overwrite, resume=resume)
    terms = _Terms(part, finish, overwrite, resume, verify, checksum, progress)
    result = _Run(plan, hold, reclaim, terms).run(executor, ray_address)
    if not check_load:
        return result
    with writing():
        return replace(result, load=open_output(plan))


def _check_known(plan: Plan) -> None:
    """Refuses a plan that makes nothing, or that names what there is not. Raises FormatError."""
    if not plan.files:
        raise FormatError("the plan makes no file: make it again")
    if plan.format not in containers() or plan.read_backend not in BACKENDS:
        raise FormatError(
            f"the plan names a container or a read backend that is unknown: {plan.format}, {plan.read_backend}; make it again"
        )


def _check_share(plan: Plan, part: tuple[int, int] | None, *, finish: bool, overwrite: bool, resume: bool, checksum: bool) -> None:
    """Refuses what does not go together. Raises UsageError."""
    if part and finish:
        raise UsageError("--part and --finish exclude each other: finish when all parts are made")
    if part and not 0 <= part[0] <= part[1] > 0:
        raise UsageError(f"--part {part[0]}/{part[1]}: expected I/N with I from 0 or 1 up to N, such as 3/16")
    if part and checksum:
        raise UsageError("--checksum goes with --finish: leave it out of --part")
    if part and overwrite and resume:
        raise UsageError("--part: --overwrite is not allowed with --resume: parts always go on with what is begun")
    if finish and overwrite:
        raise UsageError("--overwrite goes with --part: --finish has nothing to overwrite")
    if is_url(plan.root) and checksum:
        raise UsageError(f"--checksum: {plan.root} would have to be read back: leave it out")
    if plan.root.startswith("hf://") and (part or finish):
        raise UsageError(f"--part: {plan.root} takes files of one process alone: give s3://, gs:// or a path, or leave it out")


def _open_output(plan: Plan, *, create_pr: bool) -> Output:
    """Where a plan's files go. Raises UsageError."""
    if is_url(plan.root):
        from streamconv.storage.sinks import open_sink

        return Bucket(open_sink(plan.root, create_pr=create_pr, outdated=partial(find_stale_beside, plan)), plan.single)
    return Directory(Path(plan.root), plan.single)


class _Terms(NamedTuple):
    """What a run shall do, and what it may."""

    part: tuple[int, int] | None
    finish: bool
    overwrite: bool
    resume: bool
    verify: bool
    checksum: bool
    progress: bool | Progress

    @property
    def is_whole(self) -> bool:
        """Neither a part of a plan nor the end of its parts."""
        return not self.part and not self.finish


class _Run:
    """A run of a plan, or a part of it, or the end of its parts."""

    def __init__(self, plan: Plan, hold: Lock | Lease, reclaim: Reclaim | None, terms: _Terms) -> None:
        self._plan, self._hold, self._reclaim, self._terms = plan, hold, reclaim, terms
        self._output: Output = hold.output
        self._numbers = hold.list_numbers()
        self._mine = plan.for_files(self._numbers) if terms.part else plan
        self._missing: list[int] = []
        self._losses = Losses()
        self._times = Times()
        self._made = 0

    def run(self, executor: Executor, address: str | None) -> Result:
        """Makes what is not there, and ends what is to be ended."""
        started, plan = time.perf_counter(), self._plan
        finished = finished_files(self._output.load(LOG)) if self._reclaim and self._terms.resume else {}
        check_earlier(self._output, overwrite=self._terms.overwrite)
        if plan.strict and self._terms.resume:
            raise UsageError("--strict-values: values of an earlier run are not looked at again: give --overwrite instead of --resume")
        check_sources_stay(plan, overwrite=self._terms.overwrite)
        check_sources(self._mine, given_back=self._reclaim.touched(finished) if self._reclaim else ())
        with Unwinding(), watch() as figures, self._failing_in_words():
            is_done = self._is_done()
            if not is_done:
                try:
                    with counted() as self._times:
                        self._make(executor, address, finished)
                except DestinationError:
                    if self._terms.is_whole or not (is_done := self._is_done()):  # else other processes have finished it by now
                        raise
            if is_done:
                self._write_sums()
            if is_done or (self._terms.verify and isinstance(self._hold, Lock) and not self._reclaim):
                check_outputs(self._mine, self._terms.progress, self._address, found=is_done)
            if is_done:
                tidy(self._output, plan.single)
        return self._describe(time.perf_counter() - started, figures["anonymous"], is_done=is_done)

    def _address(self, number: int) -> Path | str:
        """Where a file that this run is to see to is read."""
        return self._output.address(self._mine.files[number].path)

    @contextmanager
    def _failing_in_words(self) -> Iterator[None]:
        """Says of what fails in the block, or ends it, what it is and how to go on."""
        try:
            yield
        except OSError as error:
            raise describe_os_error(error, self._plan.root) from error
        except (KeyboardInterrupt, Interrupted):
            again = " with --resume" if self._terms.is_whole else ""
            raise Interrupted(f"interrupted: rerun the same command{again} to go on with {self._output.where}") from None
        finally:
            self._hold.release()

    def _is_done(self) -> bool:
        """Whether all is there already and nothing says any more whose files they are: they are then compared."""
        goes_on = (self._terms.resume or not self._terms.is_whole) and not self._terms.overwrite
        return goes_on and not self._output.is_begun() and self._hold.is_complete()

    def _make(self, executor: Executor, address: str | None, finished: Collection[str]) -> None:
        """Takes the output, makes what is missing, and, but for a part, commits and leaves."""
        if self._terms.part or self._terms.is_whole:
            with executor.open(self._plan, self._hold.make, address) as make:  # which finds faults before anything is written
                self._take(finished)
                self._missing = self._hold.find_missing(self._find_altered if self._terms.part and self._terms.verify else None)
                self._write(make, self._missing, self._terms.progress)
        if not self._terms.part:
            self._commit()
        elif self._terms.verify and (altered := self._find_altered(self._missing)):
            names = ", ".join(self._plan.files[number].path for number in sorted(altered))
            raise RunError(f"{self._output.where}: {names}: not what was written: check disk and memory, then run the part again")

    def _take(self, finished: Collection[str]) -> None:
        """Takes the output, or goes on with what is begun there.

        Raises:
            StreamconvError: it is another's, or has no room, or replicas differ.
        """
        plan, output = self._plan, self._output
        goes_on = output.is_begun() and (self._terms.resume or not self._terms.is_whole)
        if not goes_on and not self._terms.overwrite:
            self._check_free()
        stale = partial(list_stale, plan, output) if self._terms.overwrite and not goes_on else None
        output.check_room(with_reclaim(plan, finished) if self._reclaim else self._mine, stale() if stale else ())
        if self._terms.is_whole and not goes_on:
            check_replicas(plan)
        output.prepare(plan, self._hold.suffix)
        self._hold.take(goes_on=goes_on, stale=stale)

    def _check_free(self) -> None:
        """Refuses an output that has something in it, unless another part was quicker to take it. Raises DestinationError."""
        try:
            check_free(self._output)
        except DestinationError:
            if self._terms.is_whole or not self._output.is_begun():
                raise

    def _write(self, make: MakeFiles, numbers: Sequence[int], progress: bool | Progress) -> None:
        self._made += len(numbers) - self._hold.count_finished()
        with writing(), bar(sum(self._plan.files[k].size for k in numbers), "converting", show=progress) as tell:
            self._losses += make(self._plan, numbers, tell)

    def _find_altered(self, numbers: Sequence[int]) -> set[int]:
        """Those of these files that do not hold what the plan makes of the sources."""
        mine = self._plan.for_files(numbers)
        with bar(mine.totals.bytes_written, "verifying", show=self._terms.progress) as tell:
            check = OutputCheck(mine, tell, lambda k: self._output.address(mine.files[k].path))
            every = range(len(numbers))
            return {numbers[k] for k in check.find_wrong_literals(every) | check.compare(tasks_in_order(mine, every))}

    def _commit(self) -> None:
        """Looks at every file that was made apart, writes the rest, with the commit, and leaves.

        Raises:
            DestinationError: files are missing or wrong; names each, and the part that makes it. Nothing is written.
            SourceChanged: a source is not what was planned with.
        """
        if isinstance(self._hold, Lease):
            self._check_made(self._hold)
            self._output.clear_up(self._plan)
            rest = [number for number in range(len(self._plan.files)) if number not in set(files_to_make(self._plan))]
            self._write(self._hold.make, rest, progress=False)
            self._write_sums()
        self._hold.leave()

    def _check_made(self, lease: Lease) -> None:
        count = lease.check()["parts"]
        check_sources(self._plan)
        numbers = files_to_make(self._plan)
        lost = set(numbers) - lease.find_done(numbers)
        if not lost and not self._terms.is_whole:  # which has looked before it began
            check_replicas(self._plan)
        altered = self._find_altered(numbers) if self._terms.verify and not lost else set()
        if wrong := sorted(lost | altered):
            which = ", ".join(f"{lease.describe(k)}{f' (part {k % count}/{count})' if count else ''}" for k in wrong)
            compared = " with --verify" if altered else ""
            advice = f"run those parts{compared}, then --finish again" if count else "run it again with --resume"
            what = f"{len(wrong)} of {len(self._plan.files)} files not there as planned"
            raise DestinationError(f"{self._output.where}: {what}: {which}; {advice}")

    def _write_sums(self) -> None:
        if self._terms.checksum:
            write_sums(self._plan, {})

    def _describe(self, seconds: float, anonymous: int, *, is_done: bool) -> Result:
        """What came of it."""
        plan, part, place = self._plan, None, self._output.address(self._plan.single or "")
        if self._terms.part:
            plan = plan.for_files(self._missing)
        if isinstance(self._hold, Lease) and not self._terms.is_whole:
            part = self._describe_part(self._hold)
        if self._output.sink and self._output.sink.pull_request:
            plan = replace(plan, notes=(*plan.notes, f"pull request: {self._output.sink.pull_request}"))
        verified = True if self._terms.verify or is_done else None
        complete = self._made == len(self._plan.files)
        overflow = Overflow(self._losses.overflowed, complete=complete)
        unscaled = Overflow(self._losses.unscaled, complete=complete, said=UNSCALED)
        losses = Changes(self._losses, complete=complete) if plan.measures else None
        changed = ChangedWeights(self._losses, complete=complete)
        kept = sum(file.size for file in plan.files) if is_done else self._hold.kept
        return Result(
            plan,
            seconds,
            memory.peak(),
            anonymous,
            verified,
            part=part,
            place=place,
            overflow=overflow,
            unscaled=unscaled,
            losses=losses,
            changed=changed,
            kept=kept if self._terms.is_whole and self._terms.resume else 0,
            times=self._times,
        )

    def _describe_part(self, lease: Lease) -> Part:
        every, names = files_to_make(self._plan), tuple(self._plan.files[number].path for number in self._missing)
        is_complete = not self._output.is_begun()
        there = len(every) if is_complete else len(lease.find_done(every))
        return Part("/".join(map(str, self._terms.part or ())), names, len(self._numbers) - len(names), there, len(every), is_complete)
