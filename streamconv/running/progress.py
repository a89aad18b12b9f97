"""How a run shows itself on stderr: a bar in bytes on a terminal or in a notebook, log lines elsewhere if wanted; and its record."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from streamconv import memory
from streamconv.storage.pace import find_longest_wait
from streamconv.text import one_line
from streamconv.threads import looking
from streamconv.units import format_size

if TYPE_CHECKING:
    from tqdm import tqdm

SAMPLES = 600  # of a phase: when there are as many, every other one goes, and further ones come half as often
EVERY = 10.0  # seconds between log lines
WAITED = 5.0  # seconds for which a server may be waited for before that is said
_YES = {"1", "ON", "YES", "TRUE"}
_NARROW = (
    (56, "{desc}: {percentage:3.0f}% {rate_fmt} {remaining}"),
    (80, "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {rate_fmt} {remaining}"),
)
"""What a bar shows on a terminal of fewer columns than these."""


@dataclass
class Phase:
    """A part of a run: what it did when. A sample is seconds since it ``began``, bytes done, resident bytes."""

    title: str
    total: int
    began: float = field(default_factory=time.perf_counter)
    done: int = 0
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    interval: float = 0.05

    def sample(self) -> tuple[float, int, int]:
        """Takes a sample and keeps it, if its time has come."""
        point = (time.perf_counter() - self.began, self.done, memory.resident())
        if not self.samples or point[0] - self.samples[-1][0] >= self.interval:
            self.samples.append(point)
        if len(self.samples) >= SAMPLES:
            self.samples, self.interval = self.samples[::2], 2 * self.interval
        return point


@dataclass
class Progress:
    """How to show a run.

    Attributes:
        show: with a bar.
        verbose: with log lines, too.
        budget: bytes of memory it may take.
        record: keep ``phases``.
        phases: its record.
        tell: is told how many bytes are done, of how many.
    """

    show: bool = True
    verbose: bool = False
    budget: int | None = None
    record: bool = False
    phases: list[Phase] = field(default_factory=list)
    tell: Callable[[int, int], None] | None = None

    def describe_memory(self, resident: int) -> str:
        """``45 MB of 1 GB``."""
        return f"memory {format_size(resident)}" + (f" of {format_size(self.budget)}" if self.budget else "")

    def describe_state(self, resident: int) -> str:
        """What stands behind a bar: the host that is waited for, if one is, else the memory."""
        waited, host = find_longest_wait()
        return f"waiting for {host}" if waited >= WAITED else self.describe_memory(resident)

    def describe(self, phase: Phase, sample: tuple[float, int, int], *, over: bool = False) -> str:
        """A log line."""
        seconds, done, resident = sample
        rate = done / max(seconds, 1e-9)
        share = f"{format_size(done)} of {format_size(phase.total)} ({100 * done // max(phase.total, 1)} %)"
        remainder = f", {max(phase.total - done, 0) / rate:.0f} s left" if done else ""
        waited, host = find_longest_wait()
        remainder += f", waiting for {host}" if waited >= WAITED else ""
        if over:
            share, remainder = f"{format_size(done)} in {seconds:.2f} s", ""
        return f"{phase.title}: {share}, {format_size(rate)}/s{remainder}, {self.describe_memory(resident)}"


Shown = bool | Progress | Callable[[int, int], None]
"""What a caller may say of a run: whether to show a bar, how to, or what to tell of bytes done, of how many."""


def how_to_show(shown: Shown) -> Progress:
    """A caller's wish as a `Progress`."""
    if isinstance(shown, Progress):
        return shown
    return Progress(show=False, tell=shown) if callable(shown) else Progress(show=shown)


@contextmanager
def bar(total: int, title: str, *, show: Shown) -> Iterator[Callable[[int], None]]:
    """Yields what is to be told how many bytes have come.

    A bar needs a terminal or a notebook, and gives way to ``HF_HUB_DISABLE_PROGRESS_BARS``; it has no colour under ``NO_COLOR``.
    """
    how = how_to_show(show)
    phase = Phase(title, total)
    with ExitStack() as stack:
        shown = stack.enter_context(_open_bar(phase)) if how.show and can_show() else None
        writes = how.show and how.verbose
        if writes:
            stack.enter_context(_log_to_stderr(shown))
        if shown is not None or writes or how.record:
            stack.enter_context(_sampling(how, phase, shown, log=writes and shown is None))

        def tell(nbytes: int) -> None:
            phase.done += nbytes
            if shown is not None:
                shown.update(nbytes)
            if how.tell is not None:
                how.tell(phase.done, total)

        yield tell


def can_show() -> bool:
    """Whether anybody looks at stderr, and wants to see how far things are."""
    notebook = "ipykernel" in sys.modules
    return (notebook or sys.stderr.isatty()) and os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() not in _YES


def columns() -> int:
    """How wide the terminal is, now."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns


def _format_bar() -> str | None:
    """What a bar has room for; None: for all."""
    width = columns()
    return next((text for least, text in _NARROW if width < least), None)


def _open_bar(phase: Phase) -> tqdm[Any]:
    from tqdm import tqdm

    kind: Any = tqdm
    if "ipykernel" in sys.modules:  # which alone needs what this loads
        from tqdm.auto import tqdm as kind
    colour = None if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else "cyan"
    shown: tqdm[Any] = kind(
        total=phase.total,
        unit="B",
        unit_scale=True,
        desc=phase.title,
        dynamic_ncols=True,
        miniters=1,
        colour=colour,
        bar_format=_format_bar(),
    )
    return shown


@contextmanager
def _sampling(how: Progress, phase: Phase, shown: tqdm[Any] | None, *, log: bool) -> Iterator[None]:
    """Samples while the block runs, and shows what it finds."""
    logger, logged = logging.getLogger(__name__), phase.began
    phase.sample()
    if how.record:
        how.phases.append(phase)

    def look() -> None:
        nonlocal logged
        sample = phase.sample()
        if shown is not None:
            shown.bar_format = _format_bar()
            shown.set_postfix_str(how.describe_state(sample[2]), refresh=find_longest_wait()[0] >= WAITED)
        if log and time.perf_counter() - logged >= EVERY:
            logged = time.perf_counter()
            logger.info("%s", how.describe(phase, sample))

    try:
        with looking(look, lambda: phase.interval if how.record else 0.2):
            yield
    finally:
        phase.interval = 0.0
        sample = phase.sample()
        if shown is not None:
            shown.set_postfix_str(how.describe_memory(sample[2]), refresh=False)
        if log:
            logger.info("%s", how.describe(phase, sample, over=True))


class _Lines(logging.StreamHandler[IO[str]]):
    """Log lines, above the bar where there is one."""

    def __init__(self, shown: tqdm[Any] | None) -> None:
        super().__init__(sys.stderr)
        self._shown = shown

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))

    def emit(self, record: logging.LogRecord) -> None:
        if self._shown is None:
            super().emit(record)
        else:
            self._shown.write(self.format(record), file=sys.stderr)


@contextmanager
def _log_to_stderr(shown: tqdm[Any] | None) -> Iterator[None]:
    logger, handler = logging.getLogger("streamconv"), _Lines(shown)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
