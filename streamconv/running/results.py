"""What a run took, and whether what it wrote holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from streamconv import memory
from streamconv.engine.check import OutputCheck
from streamconv.engine.comparison import Comparison
from streamconv.engine.io import describe_os_error
from streamconv.engine.times import Times
from streamconv.errors import DestinationError, RunError
from streamconv.graph.losses import TOO_LARGE, Loss
from streamconv.library.loading import Loading
from streamconv.notebook import table
from streamconv.planning.plan import Plan
from streamconv.running.changed import ChangedWeights
from streamconv.running.progress import Progress, bar
from streamconv.text import join_lines
from streamconv.threads import looking
from streamconv.units import format_size

SHOWN = 5  # tensors that a note names
WORST = 10  # tensors of which a line says what they have lost


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
class Overflow:
    """Values that were finite, and are infinite now because they are too large for the dtype that they were cast to; or others.

    Attributes:
        counts: how many, by tensor; of what this run computed.
        complete: whether this run computed all that the output holds; an earlier one's values are not looked at again.
        said: what is said of them.
    """

    counts: Mapping[str, int] = field(default_factory=dict)
    complete: bool = True
    said: str = f"{TOO_LARGE}, infinite now"

    def summary(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        worst = [{"name": name, "values": count} for name, count in self._worst()]
        return {"tensors": len(self.counts), "values": sum(self.counts.values()), "worst": worst, "complete": self.complete}

    def _worst(self) -> list[tuple[str, int]]:
        return sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))[:SHOWN]

    def __str__(self) -> str:
        if not self.counts:
            return ""
        number = len(self.counts)
        named = ", ".join(f"{name} ({count})" for name, count in self._worst())
        more = f" and {number - SHOWN} more" if number > SHOWN else ""
        sentence = f"{sum(self.counts.values())} values in {number} tensor{'s' * (number > 1)} {self.said}"
        return f"{sentence}{'' if self.complete else ' (of what this run computed)'}: {named}{more}"


@dataclass(frozen=True)
class Changes:
    """What casts and quantization have changed.

    Attributes:
        losses: by target; of what this run computed.
        complete: see `Overflow`.
    """

    losses: Mapping[str, Loss] = field(default_factory=dict)
    complete: bool = True

    def summary(self) -> list[dict[str, Any]]:
        """What ``--json`` prints: the tensors whose values changed, the worst first."""
        return [loss.summary(name) for name, loss in self._worst()]

    def _worst(self) -> list[tuple[str, Loss]]:
        changed = [(name, loss) for name, loss in self.losses.items() if loss.rounded or loss.overflowed or loss.unscaled]
        return sorted(changed, key=lambda item: (-item[1].relative, item[0]))

    def lines(self) -> Iterator[str]:
        """In words: the totals, and the worst."""
        worst = self._worst()
        if not worst:
            yield "no values were rounded" + self._scope
            return
        total = sum((loss for _, loss in worst), Loss())
        yield (
            f"{len(worst)} tensors changed: {total.rounded} values rounded, {total.overflowed} overflowed, {total.underflowed} became "
            f"zero, by {total.most:.3g} at most, {total.relative:.3g} of their norm{self._scope}; the worst:"
        )
        yield from (
            f"  {name}: {loss.source} to {loss.target}, {loss.relative:.3g} of its norm, {loss.most:.3g} at most, {loss.rounded} rounded"
            for name, loss in worst[:WORST]
        )

    @property
    def _scope(self) -> str:
        return "" if self.complete else " (of what this run computed)"


@dataclass(frozen=True)
class Result:
    """What a run took, of a part that part's share. Memory in bytes, of the whole process.

    ``place``: where to read it, if not at DST. ``load``: what the library says that opens it, where that was asked for. ``kept``: bytes
    that an earlier run had left, and that hold what they should.
    """

    plan: Plan
    seconds: float
    peak_rss: int
    peak_anonymous: int
    verified: bool | None = None
    comparison: Comparison | None = None
    part: Part | None = None
    place: Path | str = ""
    overflow: Overflow = field(default_factory=Overflow)
    unscaled: Overflow = field(default_factory=Overflow)
    losses: Changes | None = None
    changed: ChangedWeights = field(default_factory=ChangedWeights)
    load: Loading | None = None
    kept: int = 0
    times: Times = field(default_factory=Times)

    @property
    def fits(self) -> bool:
        """Whether the library that was to open what was made, if any was, found it as its model has it."""
        return self.load is None or self.load.fits

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know: of the conversion, and of the values that it made."""
        total = sum(file.size for file in self.plan.files)
        resumed = f"resumed: {format_size(self.kept)} of {format_size(total)} were there, and are kept" if self.kept else ""
        return (*self.plan.notes, *filter(None, [resumed, str(self.overflow), str(self.unscaled)]))

    def summary(self) -> dict[str, Any]:
        """What ``convert --json`` prints."""
        plan = self.plan.summary()
        figures = (
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
        summary: dict[str, Any] = {key: plan[key] for key in figures}
        summary |= {"seconds": self.seconds, "peak_rss": self.peak_rss, "peak_anonymous": self.peak_anonymous}
        summary |= {"outputs": plan["outputs"], "verified": self.verified, "notes": list(self.notes), "overflowed": self.overflow.summary()}
        summary |= {"unscaled": self.unscaled.summary()}
        summary |= {"losses": self.losses.summary()} if self.losses else {}
        summary |= {"changed": changed} if (changed := self.changed.summary()) else {}
        summary |= {"comparison": self.comparison.summary()} if self.comparison else {}
        summary |= {"load": self.load.summary()} if self.load else {}
        return summary | ({"part": asdict(self.part)} if self.part else {})

    def __repr__(self) -> str:
        verified = {None: "", True: ", verified", False: ", not verified"}[self.verified]
        return f"<Result of {self.plan!r} in {self.seconds:.2f} s{verified}>"

    def _repr_html_(self) -> str:
        title, *others = str(self).split("\n")
        rows = [*others, *(f"note: {note}" for note in self.plan.notes)]
        return table(title, [], [(row,) for row in rows])

    def __str__(self) -> str:
        totals, seconds = self.plan.totals, max(self.seconds, 1e-9)
        rate = format_size(totals.bytes_written / seconds)
        moved = f"{format_size(totals.bytes_copied)} copied, {format_size(totals.bytes_computed)} computed"
        checked = ", verified" if self.verified else ""
        took = f"in {self.seconds:.2f} s ({rate}/s); {moved}" if not self.part or self.part.name else f"checked in {self.seconds:.2f} s"
        first = f"{self.plan.destination}: {len(self.plan.mapping)} tensors, {format_size(totals.bytes_written)} {took}{checked}; "
        lines: list[object] = [f"{first}peak memory {format_size(self.peak_rss)}", self.part or self.plan.account]
        lines += self.changed.lines()
        return join_lines([*lines, *(self.losses.lines() if self.losses else []), *(self.load.lines() if self.load else [])])


@contextmanager
def watch() -> Iterator[dict[str, int]]:
    """The largest anonymous memory seen while the block runs; the kernel keeps no mark of it."""
    figures = {"anonymous": memory.anonymous()}

    def sample() -> None:
        figures["anonymous"] = max(figures["anonymous"], memory.anonymous())

    with looking(sample, lambda: 0.05):
        yield figures


def check_outputs(
    plan: Plan, progress: bool | Progress, path_of: Callable[[int], Path | str] | None = None, *, found: bool = False
) -> None:
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
