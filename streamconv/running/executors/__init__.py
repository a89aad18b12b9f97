"""Where the files of an output are made: each module here is one way, called by its name (``--engine NAME``).

A module has an `Executor` as ``EXECUTOR``; it is imported when it is chosen. `EXECUTORS` takes others.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from streamconv.errors import UsageError

if TYPE_CHECKING:
    from streamconv.planning.plan import Plan

LOCAL = "local"
MakeFiles = Callable[["Plan", Iterable[int], Callable[[int], None]], Counter[str]]
"""Makes files of a plan, by number, each complete under its name or not at all, and tells how many bytes have come; gives how many values
overflowed, by target. What it raises is a StreamconvError, and finished files stay."""


class Executor(Protocol):
    """A way to make the files of an output."""

    threads: int | None
    """For each file, unless users say how many; None: as many as are best in one process."""

    def load(self, root: str) -> int:
        """Loads what it takes to make files below a root; gives the bytes of memory that this process will take more than it does now.

        Raises:
            UsageError: something is missing, or files there cannot be made so.
        """
        ...

    def open(self, plan: Plan, here: MakeFiles, address: str | None) -> AbstractContextManager[MakeFiles]:
        """What makes files of a plan, while the block runs. Nothing is written yet: what can be refused is refused now.

        Args:
            plan: that files are made of.
            here: makes them in this process; in another one that is `making.make_files`.
            address: of what makes them, if users have given one.

        Raises:
            StreamconvError: they cannot be made so.
        """
        ...


def _load(name: str) -> Executor:
    executor: Executor = importlib.import_module(f"{__name__}.{name}").EXECUTOR
    return executor


EXECUTORS: dict[str, Callable[[], Executor]] = {
    path.stem: partial(_load, path.stem) for path in sorted(Path(__file__).parent.glob("[!_]*.py"))
}
"""Gives the executor of a name."""


def executor_of(engine: str) -> Executor:
    """The executor of that name.

    Raises:
        UsageError: there is none.
    """
    if engine not in EXECUTORS:
        raise UsageError(f"unknown engine {engine!r}: known are {', '.join(EXECUTORS)}")
    return EXECUTORS[engine]()
