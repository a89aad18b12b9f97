"""Runs plans: what may be written, what is done already, the engine, and what a run took.

An ordinary run has DST to itself and keeps a journal. Where files are made apart (in parts, by Ray, behind a URL) a claim takes its place.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from streamconv import memory
from streamconv.destination import Target, check_empty, check_room, check_staging, clear, old_files, old_names, prepare
from streamconv.engine import parts
from streamconv.engine.check import OutputCheck, check_replicas
from streamconv.engine.io import describe_os_error
from streamconv.engine.journal import Journal, journal_path, read_journal
from streamconv.engine.local import SUMS, LocalEngine, check_sources, holds
from streamconv.engine.order import tasks_in_order
from streamconv.engine.reclaim import Reclaim
from streamconv.errors import DestinationError, Interrupted, RunError, UsageError
from streamconv.plan import Plan
from streamconv.progress import Progress, bar
from streamconv.storage import is_url
from streamconv.storage.sinks import Sink
from streamconv.units import format_size
from streamconv.verify import Comparison

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Part:
    """What a part came to.

    Attributes:
        name: such as 3/16, or nothing of the end of a run in parts.
        made: its files that this run made.
        found: how many it found done.
        there: how many files of all parts there are.
        files: how many there will be.
        complete: whether the end has come, too.
    """

    name: str
    made: tuple[str, ...]
    found: int
    there: int
    files: int
    complete: bool

    def __str__(self) -> str:
        done = f"part {self.name}: {len(self.made)} files made, {self.found} found done; " if self.name else ""
        if self.complete:
            return f"{done}all {self.files} files of the parts are there, the output is complete"
        return f"{done}{self.there} of {self.files} are there{'; next: run --finish' if self.there == self.files else ''}"


@dataclass(frozen=True)
class Result:
    """What a run took, of a part that part's share. Memory in bytes, of the whole process."""

    plan: Plan
    seconds: float
    peak_rss: int
    peak_anonymous: int
    verified: bool | None = None
    comparison: Comparison | None = None
    part: Part | None = None

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
        found |= {"comparison": self.comparison.summary()} if self.comparison else {}
        return found | ({"part": asdict(self.part)} if self.part else {})

    def __str__(self) -> str:
        totals, seconds = self.plan.totals, max(self.seconds, 1e-9)
        rate = format_size(totals.bytes_written / seconds)
        moved = f"{format_size(totals.bytes_copied)} copied, {format_size(totals.bytes_computed)} computed"
        checked = ", verified" if self.verified else ""
        took = f"in {self.seconds:.2f} s ({rate}/s); {moved}" if not self.part or self.part.name else f"checked in {self.seconds:.2f} s"
        return (
            f"{self.plan.destination}: {len(self.plan.mapping)} tensors, {format_size(totals.bytes_written)} {took}{checked}; "
            f"peak memory {format_size(self.peak_rss)}\n{self.part or self.plan.account}"
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
        resume: keep what an interrupted run of the same plan has finished.
        verify: read everything back and compare.
        checksum: write ``SHA256SUMS``, too, which ``sha256sum --check`` reads.
        reclaim_source: DELETE the source: give the space of its weight files back as soon as what was made of them is durable and checked.
        progress: show a bar, on stderr if that is a terminal or in a notebook; or how to.
        settings: what the plan was made with; says what differs if an interrupted run was another one.
        part: (I, N): make the files of part I of N only, those that are not done; several may run at once, on any hosts, and again.
        finish: look at what the parts have made, and write the index.
        engine: ``local``, or ``ray``: a task for each file.
        ray_address: of the Ray cluster; unless given, Ray finds or starts one.
        create_pr: make what is uploaded to the Hub a pull request.

    Raises:
        StreamconvError: see the classes; nothing is lost.
    """
    if engine not in ENGINES:
        raise UsageError(f"unknown engine {engine!r}: known are {', '.join(ENGINES)}")
    if part or finish or engine != "local" or is_url(plan.root):
        if reclaim_source:
            raise UsageError("--reclaim-source: goes with files that this process alone makes, below a path: leave it out")
        apart = _Apart(plan, part=part, finish=finish, overwrite=overwrite, resume=resume, verify=verify, checksum=checksum)
        apart.choose(engine, ray_address, create_pr=create_pr)
        return apart.run(progress)
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
            finished = resume and _is_complete(plan)
            if not finished:
                check_room(with_reclaim(plan, done) if reclaim else plan, root, old_files(root, plan.single) if overwrite else [])
                if not (reclaim and done):
                    check_replicas(plan)
                _write(plan, journal, overwrite=overwrite, resume=resume, checksum=checksum, reclaim=reclaim, progress=progress)
            elif checksum:
                LocalEngine(plan, journal).write_sums({})
            if (verify and not reclaim) or finished:
                _verify(plan, progress, found=finished)
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


def _is_complete(plan: Plan) -> bool:
    """Whether DST holds all files of the plan at their sizes and no run is pending."""
    root = Path(plan.root)
    return not journal_path(root, plan.single).exists() and all(
        (root / file.path).is_file() and (root / file.path).stat().st_size == file.size for file in plan.files
    )


def _verify(plan: Plan, progress: bool | Progress, path_of: Callable[[int], Path | str] | None = None, *, found: bool = False) -> None:
    """Compares every output file, read back, with what the plan makes of the sources.

    Args:
        plan: whose files they are.
        progress: how to show it.
        path_of: where a file, by its number, is read; below the plan's root unless given.
        found: they were there before this run.

    Raises:
        DestinationError: one differs that was there.
        RunError: one differs.
    """
    with bar(plan.totals.bytes_written, "verifying", show=progress) as tell:
        try:
            different = OutputCheck(plan, tell, path_of).run()
        except OSError as error:
            raise describe_os_error(error, plan.root) from error
    if different is not None and found:
        raise DestinationError(f"{plan.root}: {different} is not what this conversion makes: start afresh with --overwrite")
    if different is not None:
        raise RunError(f"{plan.root}: {different} does not hold what was written: check disk and memory, then rerun with --overwrite")


class _Apart:
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
        if finish and overwrite:
            raise UsageError("--overwrite goes with --part: --finish has nothing to overwrite")
        self._plan, self._part, self._is_all = plan, part, not part and not finish
        self._overwrite, self._resume, self._verify, self._checksum = overwrite, resume, verify, checksum
        self._numbers = parts.files_to_make(plan, part)
        self._sink: Sink | None = None
        self._claim = parts.Claim(plan, part[1] if part else 0)
        self._make: Callable[..., None] = partial(parts.make_files, check=self._claim.check)
        self._join: Callable[[], AbstractContextManager[Callable[..., None]]] = lambda: nullcontext(self._make)
        self._path_of: Callable[[str], Path | str] = Path(plan.root).joinpath

    def choose(self, engine: str, ray_address: str | None, *, create_pr: bool) -> None:
        """Says where files go and where they are made."""
        plan = self._plan
        if is_url(plan.root):
            from streamconv.engine.streams import make_files
            from streamconv.storage.objects import takes_streams
            from streamconv.storage.sinks import open_sink

            if self._checksum:
                raise UsageError(f"--checksum: {plan.root} would have to be read back: leave it out")
            if not self._is_all and not takes_streams(plan.root):
                raise UsageError(f"--part: {plan.root} takes files of one process alone: give s3://, gs:// or a path, or leave it out")
            self._sink = sink = open_sink(plan.root, create_pr=create_pr)
            self._claim = parts.SinkClaim(plan, sink, self._part[1] if self._part else 0)
            self._make, self._path_of = partial(make_files, sink=sink), sink.address
        elif create_pr:
            raise UsageError("--create-pr: goes with a DST on the Hub, such as hf://org/name")
        if engine == "ray":
            from streamconv.engine import ray

            self._join = partial(ray.join, plan, ray_address)

    def run(self, progress: bool | Progress) -> Result:
        """Makes what is not there, and ends what is to be ended."""
        started, plan, waiting = time.perf_counter(), self._plan, list[int]()
        check_sources(plan.for_files(self._numbers))
        with _watch() as figures:
            try:
                if found := self._is_done():
                    mine = plan.for_files(self._numbers) if self._part else plan
                    _verify(mine, progress, lambda number: self._path_of(mine.files[number].path), found=True)
                elif self._part or self._is_all:
                    with self._join() as make:  # which finds faults before anything is written
                        waiting = self._take(progress)
                        self._write(make, waiting, progress)
                    if self._part and self._verify and (different := self._find_different(waiting, progress)):
                        names = ", ".join(plan.files[number].path for number in sorted(different))
                        raise RunError(
                            f"{self._claim.where}: {names}: not what was written: check disk and memory, then run the part again"
                        )
                if not self._part and not found:
                    self._finish(progress)
            except OSError as error:
                raise describe_os_error(error, plan.root) from error
            except (KeyboardInterrupt, Interrupted):
                again = " with --resume" if self._is_all else ""
                raise Interrupted(f"interrupted: rerun the same command{again} to go on with {self._claim.where}") from None
        seconds = time.perf_counter() - started
        made, part = (plan.for_files(waiting) if self._part else plan), (None if self._is_all else self._describe(waiting))
        if self._sink and self._sink.pull_request:
            made = replace(made, notes=(*made.notes, f"pull request: {self._sink.pull_request}"))
        return Result(made, seconds, memory.peak(), figures["anonymous"], True if self._verify or found else None, part=part)

    def _is_done(self) -> bool:
        """Whether all is there already and nothing says any more whose files they are: they are then compared."""
        every = range(len(self._plan.files))
        goes_on = (not self._is_all or self._resume) and not self._overwrite
        return goes_on and not self._claim.exists() and len(self._claim.finished(every)) == len(every)

    def _take(self, progress: bool | Progress) -> list[int]:
        """Takes DST, or goes on with what is begun there; the files to make.

        Raises:
            StreamconvError: DST is another's, or has no room, or replicas differ.
        """
        plan, claim, root = self._plan, self._claim, Path(self._plan.root)
        begun = claim.exists() and not (self._is_all and self._overwrite)
        if begun and self._is_all and not self._resume:
            raise DestinationError(
                f"{claim.where}: holds an unfinished conversion: continue it with --resume, start afresh with --overwrite"
            )
        if begun:
            claim.check()
        elif not self._overwrite:
            try:
                check_empty(plan, self._sink)
            except DestinationError:
                if not claim.exists():  # else another part was quicker
                    raise
        doomed = old_names(plan, self._sink) if self._overwrite and not begun else None
        if self._is_all and not begun:
            check_replicas(plan)
        if not self._sink:
            there = {k for k in self._numbers if begun and holds(root / plan.files[k].path, plan.files[k].size)}
            check_room(plan.for_files(k for k in self._numbers if k not in there), root, [root / name for name in doomed or ()])
            prepare(plan, root, overwrite=True, resume=False)
        else:
            check_staging(plan)
        if self._is_all and self._overwrite and claim.exists():
            claim.give_up()
        claim.begin(doomed)
        done = claim.finished(self._numbers)
        if self._verify and self._part:
            done -= self._find_different(sorted(done), progress)
        waiting = [number for number in self._numbers if number not in done]
        claim.make_way(waiting)
        return waiting

    def _write(self, make: Callable[..., None], numbers: Sequence[int], progress: bool | Progress) -> None:
        with bar(sum(self._plan.files[k].size for k in numbers), "converting", show=progress) as tell:
            make(self._plan, numbers, tell)

    def _find_different(self, numbers: Sequence[int], progress: bool | Progress) -> set[int]:
        """Those of these files that do not hold what the plan makes of the sources."""
        made = self._plan.for_files(numbers)
        with bar(made.totals.bytes_written, "verifying", show=progress) as tell:
            check, every = OutputCheck(made, tell, lambda k: self._path_of(made.files[k].path)), range(len(numbers))
            return {numbers[k] for k in check.find_wrong_literals(every) | check.compare(tasks_in_order(made, every))}

    def _finish(self, progress: bool | Progress) -> None:
        def check(made: Sequence[int]) -> set[int]:
            if not self._is_all:  # which has looked before it began
                check_replicas(self._plan)
            return self._find_different(made, progress) if self._verify else set()

        parts.finish(
            self._plan, self._claim, lambda numbers: self._write(self._make, numbers, progress=False), check, checksum=self._checksum
        )

    def _describe(self, made: Sequence[int]) -> Part:
        every, names = parts.files_to_make(self._plan), tuple(self._plan.files[number].path for number in made)
        complete = not self._claim.exists()
        there = len(every) if complete else len(self._claim.finished(every))
        return Part("/".join(map(str, self._part or ())), names, len(self._numbers) - len(made), there, len(every), complete)
