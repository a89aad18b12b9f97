"""Where the files of an output are made: each module here is one way, called by its name (``--engine NAME``).

A module has an `Executor` as ``EXECUTOR``; it is imported when it is chosen. Another package adds one by an entry point of the group
``streamconv.executors``, whose name is that of ``--engine``.
"""

from __future__ import annotations

import importlib
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from streamconv.errors import UsageError
from streamconv.extensions import Extension, extensions

if TYPE_CHECKING:
    from streamconv.graph.losses import Losses
    from streamconv.planning.plan import Plan

GROUP = "streamconv.executors"
LOCAL = "local"
MakeFiles = Callable[["Plan", Iterable[int], Callable[[int], None]], "Losses"]
"""Makes files of a plan, by number, each complete under its name or not at all, and tells how many bytes have come; gives what their values
have lost, by target. What it raises is a StreamconvError, and finished files stay."""


@runtime_checkable
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


def _load(extension: Extension) -> Executor:
    executor = extension.load()
    if not isinstance(executor, Executor):
        raise UsageError(f"{extension.origin}: expected an Executor, found a {type(executor).__name__}: mend it")
    return executor


def _own(name: str) -> Extension:
    module = f"{__name__}.{name}"
    return Extension(name, module, lambda: importlib.import_module(module).EXECUTOR)


class _Executors(UserDict[str, Callable[[], Executor]]):
    """This package's by name; entry points are looked for when another is asked for, or all are, since that takes time."""

    def __contains__(self, name: object) -> bool:
        return name in self.data or name in set(self)

    def __iter__(self) -> Iterator[str]:
        for extension in extensions(GROUP):
            self.data.setdefault(extension.name, partial(_load, extension))
        return iter(self.data)


EXECUTORS = _Executors({path.stem: partial(_load, _own(path.stem)) for path in sorted(Path(__file__).parent.glob("[!_]*.py"))})
"""Gives the executor of a name."""


def executor_of(engine: str) -> Executor:
    """The executor of that name.

    Raises:
        UsageError: there is none.
    """
    if engine not in EXECUTORS:
        raise UsageError(f"unknown engine {engine!r}: known are {', '.join(EXECUTORS)}")
    return EXECUTORS[engine]()
