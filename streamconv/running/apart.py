"""Runs that hold a lease: a part of a plan, the end of its parts, or all of it by Ray or behind a URL. Each file is made by itself."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from streamconv import memory
from streamconv.engine.check import OutputCheck, check_replicas
from streamconv.engine.io import describe_os_error
from streamconv.engine.order import tasks_in_order
from streamconv.errors import DestinationError, Interrupted, RunError, UsageError, writing
from streamconv.interrupts import Unwinding
from streamconv.planning.plan import Plan
from streamconv.running.bucket import Bucket
from streamconv.running.destination import check_names, check_room, check_staging, prepare
from streamconv.running.directory import Directory, holds, new_suffix
from streamconv.running.executors import MakeFiles, executor_of
from streamconv.running.kept import check_sources_stay
from streamconv.running.lease import Lease, files_to_make
from streamconv.running.local import LocalEngine, check_sources
from streamconv.running.log import Log
from streamconv.running.making import make_files
from streamconv.running.output import Output, check_earlier, tidy
from streamconv.running.progress import Progress, bar
from streamconv.running.results import Overflow, Part, Result, check_outputs, watch
from streamconv.running.stale import find_stale_beside, list_stale
from streamconv.storage import is_url
from streamconv.storage.sinks import Sink


class Apart:
    """A run that makes each file by itself: a part of a plan, its end, or all of it by Ray or behind a URL."""

    def __init__(
        self, plan: Plan, *, part: tuple[int, int] | None, finish: bool, overwrite: bool, resume: bool, verify: bool, checksum: bool
    ) -> None:
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
        self._plan, self._part, self._is_all = plan, part, not part and not finish
        self._overwrite, self._resume, self._verify, self._checksum = overwrite, resume, verify, checksum
        self._numbers = files_to_make(plan, part)
        self._sink: Sink | None = None
        self._overflowed: Counter[str] = Counter()
        self._seen = 0

    def choose(self, engine: str, address: str | None, *, create_pr: bool) -> None:
        """Says where files go and where they are made."""
        plan = self._plan
        if is_url(plan.root):
            from streamconv.storage.objects import takes_streams
            from streamconv.storage.sinks import open_sink

            if self._checksum:
                raise UsageError(f"--checksum: {plan.root} would have to be read back: leave it out")
            if not self._is_all and not takes_streams(plan.root):
                raise UsageError(f"--part: {plan.root} takes files of one process alone: give s3://, gs:// or a path, or leave it out")
            self._sink = open_sink(plan.root, create_pr=create_pr, outdated=partial(find_stale_beside, plan))
            self._output: Output = Bucket(self._sink, plan.single)
        elif create_pr:
            raise UsageError("--create-pr: goes with a DST on the Hub, such as hf://org/name")
        else:
            self._output = Directory(Path(plan.root), plan.single)
        self._lease = Lease(self._output, plan, self._part[1] if self._part else 0)
        self._make: MakeFiles = partial(make_files, sink=self._sink) if self._sink else partial(make_files, check=self._lease.check)
        self._executor, self._address = executor_of(engine), address

    def run(self, progress: bool | Progress) -> Result:
        """Makes what is not there, and ends what is to be ended."""
        started, plan, waiting = time.perf_counter(), self._plan, list[int]()
        if self._overwrite and self._resume:
            self._overwrite = not self._lease.is_begun()
        check_earlier(self._output, overwrite=self._overwrite)
        check_sources_stay(plan, overwrite=self._overwrite)
        check_sources(plan.for_files(self._numbers))
        with Unwinding(), watch() as figures:
            try:
                if not (is_done := self._is_done()):
                    try:
                        waiting = self._make_files(progress)
                        if not self._part:
                            self._finish(progress)
                    except DestinationError:
                        if self._is_all or not (is_done := self._is_done()):  # else other processes have finished it by now
                            raise
                if is_done:
                    mine = plan.for_files(self._numbers) if self._part else plan
                    check_outputs(mine, progress, lambda number: self._output.address(mine.files[number].path), found=True)
                    tidy(self._output, plan.single)
            except OSError as error:
                raise describe_os_error(error, plan.root) from error
            except (KeyboardInterrupt, Interrupted):
                again = " with --resume" if self._is_all else ""
                raise Interrupted(f"interrupted: rerun the same command{again} to go on with {self._output.where}") from None
        seconds = time.perf_counter() - started
        made, part = (plan.for_files(waiting) if self._part else plan), (None if self._is_all else self._describe(waiting))
        if self._sink and self._sink.pull_request:
            made = replace(made, notes=(*made.notes, f"pull request: {self._sink.pull_request}"))
        verified, place = True if self._verify or is_done else None, self._output.address(plan.single or "")
        overflow = Overflow(self._overflowed, complete=self._seen == len(plan.files))
        return Result(made, seconds, memory.peak(), figures["anonymous"], verified, part=part, place=place, overflow=overflow)

    def _make_files(self, progress: bool | Progress) -> list[int]:
        """Makes what is to be made apart and is not there; the numbers of those files."""
        if not self._part and not self._is_all:
            return []
        with self._executor.open(self._plan, self._make, self._address) as make:  # which finds faults before anything is written
            waiting = self._take(progress)
            self._write(make, waiting, progress)
        if self._part and self._verify and (different := self._find_different(waiting, progress)):
            names = ", ".join(self._plan.files[number].path for number in sorted(different))
            raise RunError(f"{self._output.where}: {names}: not what was written: check disk and memory, then run the part again")
        return waiting

    def _is_done(self) -> bool:
        """Whether all is there already and nothing says any more whose files they are: they are then compared."""
        every = range(len(self._plan.files))
        goes_on = (not self._is_all or self._resume) and not self._overwrite
        return goes_on and not self._lease.is_begun() and len(self._lease.find_done(every)) == len(every)

    def _take(self, progress: bool | Progress) -> list[int]:
        """Takes DST, or goes on with what is begun there; the files to make.

        Raises:
            StreamconvError: DST is another's, or has no room, or replicas differ.
        """
        plan, lease, root = self._plan, self._lease, Path(self._plan.root)
        is_begun = lease.is_begun() and not (self._is_all and self._overwrite)
        if is_begun and self._is_all and not self._resume:
            raise DestinationError(
                f"{self._output.where}: holds an unfinished conversion: continue it with --resume, start afresh with --overwrite"
            )
        if is_begun:
            lease.check()
        elif not self._overwrite:
            try:
                self._output.check_empty()
            except DestinationError:
                if not lease.is_begun():  # else another part was quicker
                    raise
        stale = list_stale(plan, self._output) if self._overwrite and not is_begun else None
        if self._is_all and not is_begun:
            check_replicas(plan)
        if not self._sink:
            there = {k for k in self._numbers if is_begun and holds(root / plan.files[k].path, plan.files[k].size)}
            check_room(plan.for_files(k for k in self._numbers if k not in there), root, stale or ())
            check_names(plan, root, new_suffix())
            prepare(plan, root, suffix=new_suffix())
        else:
            check_staging(plan)
        if self._is_all and self._overwrite and lease.is_begun():
            lease.give_up()
        if is_begun:
            lease.go_on()
        else:
            lease.take(stale)
        done = lease.find_done(self._numbers)
        if self._verify and self._part:
            done -= self._find_different(sorted(done), progress)
        waiting = [number for number in self._numbers if number not in done]
        lease.make_way(waiting)
        return waiting

    def _write(self, make: MakeFiles, numbers: Sequence[int], progress: bool | Progress) -> None:
        with writing(), bar(sum(self._plan.files[k].size for k in numbers), "converting", show=progress) as tell:
            overflowed = make(self._plan, numbers, tell)
        self._overflowed += overflowed
        self._seen += len(numbers)

    def _find_different(self, numbers: Sequence[int], progress: bool | Progress) -> set[int]:
        """Those of these files that do not hold what the plan makes of the sources."""
        made = self._plan.for_files(numbers)
        with bar(made.totals.bytes_written, "verifying", show=progress) as tell:
            check = OutputCheck(made, tell, lambda k: self._output.address(made.files[k].path))
            every = range(len(numbers))
            return {numbers[k] for k in check.find_wrong_literals(every) | check.compare(tasks_in_order(made, every))}

    def _finish(self, progress: bool | Progress) -> None:
        """Looks at every file, writes the commit where it is not made yet, and leaves.

        Raises:
            DestinationError: files are missing or wrong; names each, and the part that makes it. Nothing is written.
            SourceChanged: a source is not what was planned with.
        """
        plan, lease = self._plan, self._lease
        count = lease.check()["parts"]
        check_sources(plan)
        made = files_to_make(plan)
        lost = set(made) - lease.find_done(made)
        if not lost and not self._is_all:  # which has looked before it began
            check_replicas(plan)
        altered = self._find_different(made, progress) if self._verify and not lost else set()
        if wrong := sorted(lost | altered):
            which = ", ".join(f"{lease.describe(k)}{f' (part {k % count}/{count})' if count else ''}" for k in wrong)
            compared = " with --verify" if altered else ""
            advice = f"run those parts{compared}, then --finish again" if count else "run it again with --resume"
            raise DestinationError(f"{self._output.where}: {len(wrong)} of {len(plan.files)} files not there as planned: {which}; {advice}")
        self._output.clear_up(plan)
        self._write(self._make, [number for number in range(len(plan.files)) if number not in made], progress=False)
        if self._checksum:
            LocalEngine(plan, Log()).write_sums({})
        lease.leave()

    def _describe(self, made: Sequence[int]) -> Part:
        every, names = files_to_make(self._plan), tuple(self._plan.files[number].path for number in made)
        is_complete = not self._lease.is_begun()
        there = len(every) if is_complete else len(self._lease.find_done(every))
        return Part("/".join(map(str, self._part or ())), names, len(self._numbers) - len(made), there, len(every), is_complete)
