"""Ctrl-C in the process of the command: one line, exit code 130, and nothing that still has to go well after it.

Most of the time there is nothing to clean up, and the process ends where it stands: Python's own way, an exception in whatever runs just
then, may pass through the import of a library or meet its threads while the interpreter is taken down, which ends in a traceback or an
abort. Only what has something to take back asks for the exception, by `Unwinding`; and it is given one.

This is the first of the package's modules to be imported, and itself imports next to nothing, since Ctrl-C may come then, too.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found] # the module signal without its enumerations, which would take longer to import than all of this
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType, TracebackType
    from typing import NoReturn

EXIT_CODE = 130
COMMAND = "streamconv"


class _State:
    """What the process is at: whether the handler is ours, how deep in `Unwinding`, whether Ctrl-C came."""

    installed = False
    depth = 0
    caught = False


_state = _State()


class Unwinding:
    """While the block runs, Ctrl-C is a KeyboardInterrupt, so that what is begun can be taken back; a second one does not wait for it."""

    def __enter__(self) -> None:
        _state.depth += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _state.depth -= 1


def is_command() -> bool:
    """Whether this process is the command, as a script or by ``python -m``, and not a program that uses the package."""
    if sys.argv[0] == "-m":  # until the module is found
        module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv[:-1] else ""
        return module.partition(".")[0] == COMMAND
    return sys.argv[0].rpartition("/")[2] == COMMAND


def take_over() -> None:
    """Has Ctrl-C end this process as said above, unless it ignores it, as ``nohup`` and shells have jobs in the background do."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, handle)
        _state.installed = True


def handle(_number: int, _frame: FrameType | None) -> None:
    """The handler of the signal."""
    if _state.depth and not _state.caught:
        _state.caught = True
        raise KeyboardInterrupt
    line = f"{COMMAND}: error: interrupted\n"
    on_bar = _state.depth and os.isatty(2)
    os.write(2, (f"\n{line}" if on_bar else line).encode())  # not by sys.stderr, which may be in the middle of a write
    leave()


def is_installed() -> bool:
    """Whether Ctrl-C is handled here."""
    return _state.installed


def came() -> bool:
    """Whether Ctrl-C was given as an exception, whatever became of that."""
    return _state.caught


def finish() -> None:
    """From now on Ctrl-C changes nothing: the process says how it ended, and leaves."""
    if _state.installed:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def leave(code: int = EXIT_CODE) -> NoReturn:
    """Ends the process at once. Threads that a slow disk or a server holds are not waited for, nor taken down one by one."""
    os._exit(code)


if is_command():
    take_over()
