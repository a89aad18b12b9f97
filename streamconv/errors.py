"""Every error this package raises on purpose, one class per remedy.

    StreamconvError                 exit code 2 unless said otherwise; 3 once something was written (`writing`)
    |-- UsageError                  change the command line or the call
    |   |-- OutOfBounds             ... an index that a tensor does not have; an IndexError, too
    |   `-- MissingDependency       ... or install the package that it needs
    |-- DestinationError            choose another DST, or say --overwrite / --resume
    |-- FormatError                 the checkpoint is damaged or not what it says: fetch or write it again
    |-- RecipeError                 change the recipe
    |   `-- NotationError           ... at this character of this text
    |-- CoverageError               recipe and checkpoint do not fit each other
    |-- BudgetError                 give --max-memory the number named
    |-- SpaceError                  free room on the disk
    |-- RunError                    exit code 3: failed while running; rerun with --resume
    |   `-- SourceChanged           ... but the source is not what was planned: plan again
    `-- Interrupted                 exit code 130: stopped by the user; rerun with --resume

A message is one line: what, where, found, expected, what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "BudgetError",
    "CoverageError",
    "DestinationError",
    "FormatError",
    "Interrupted",
    "MissingDependency",
    "NotationError",
    "OutOfBounds",
    "RecipeError",
    "RunError",
    "SourceChanged",
    "SpaceError",
    "StreamconvError",
    "UsageError",
    "unforeseen",
    "writing",
]


class StreamconvError(Exception):
    """Base of the tree; ``exit_code`` is what the command line returns for it.

    ``nothing_written``: it is known that nothing was, though the writing had begun.
    """

    exit_code = 2
    nothing_written = False


class UsageError(StreamconvError):
    """An argument or option cannot be what it is."""


class OutOfBounds(UsageError, IndexError):
    """An index does not fit a tensor's shape."""


class MissingDependency(UsageError):
    """What is asked for needs a package that is not installed."""


class DestinationError(StreamconvError):
    """DST exists, lies inside SRC, or cannot be written."""


class FormatError(StreamconvError):
    """A checkpoint breaks the rules of its container."""


class RecipeError(StreamconvError):
    """A recipe contradicts itself or is malformed; ``place``: the keys that lead to the fault in the recipe's data."""

    place: tuple[str | int, ...] = ()


class NotationError(RecipeError):
    """A name pattern or layout cannot be parsed; points at the character."""

    def __init__(self, message: str, text: str, position: int) -> None:
        self.text = text
        self.position = position
        before, after = (repr(part)[1:-1] for part in (text[max(0, position - 400) : position], text[position : position + 400]))
        super().__init__(f"{message} at character {position + 1} of {text[:800]!r}: {before}>>>{after}")


class CoverageError(StreamconvError):
    """Sources without a rule, rules without a source, targets made twice, shapes or dtypes that do not fit."""


class BudgetError(StreamconvError):
    """The plan cannot keep --max-memory; ``needed`` is the number of bytes that would do."""

    def __init__(self, message: str, needed: int) -> None:
        self.needed = needed
        super().__init__(message)


class SpaceError(StreamconvError):
    """The disk has less room than the plan needs."""


class RunError(StreamconvError):
    """An I/O error, a full disk or the like while bytes were moving."""

    exit_code = 3


@contextmanager
def writing() -> Iterator[None]:
    """Something is written in the block, or was before: an error in it has no exit code that says that nothing is."""
    try:
        yield
    except StreamconvError as error:
        if error.exit_code == StreamconvError.exit_code and not error.nothing_written:
            error.exit_code = RunError.exit_code
        raise


@contextmanager
def unforeseen(where: str) -> Iterator[None]:
    """An error in the block that is neither ours nor the operating system's becomes a RunError that says where it came."""
    try:
        yield
    except (OSError, StreamconvError):
        raise
    except Exception as error:
        raise RunError(f"{where}: {type(error).__name__}: {error}") from error


class SourceChanged(RunError):
    """A source file is not the one that was planned with."""


class Interrupted(StreamconvError):
    """Stopped by the user; what is done is kept."""

    exit_code = 130
