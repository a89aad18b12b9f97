"""The command: reads what was given, has the command's module carry it out, says in one line what went wrong."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module

from streamconv import interrupts
from streamconv.cli.console import Console, StdoutError
from streamconv.cli.parser import FIRST, build_parser
from streamconv.errors import Interrupted, StreamconvError
from streamconv.storage import is_url

_WEIGHT = re.compile(r"(?<=.)@[+-]?[\d.]+(?:[eE][+-]?\d+)?$")  # of an adapter
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.*", re.DOTALL)


def _read_given(arguments: Sequence[str]) -> Iterator[str]:
    """Arguments with ``-`` for ``_`` in the names of options, and URLs without their queries: these only what asks servers knows."""
    for argument in arguments:
        name, mark, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if mark and is_url(value):
            yield name.replace("_", "-")
        elif name:
            yield name.replace("_", "-") + mark + value
            continue
        yield _show_url(value) if _URL.fullmatch(value) else _URL.sub(lambda url: _show_url(url[0]), value)


def _show_url(url: str) -> str:
    """A URL without its query; the weight of an adapter behind it stays."""
    from streamconv.storage.locations import Shown, shown

    weight = _WEIGHT.search(url) if "?" in url else None
    return Shown(f"{shown(url[: weight.start()])}{weight[0]}") if weight else shown(url)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; errors are one line on stderr.

    Args:
        argv: what was given; None: this process is the command and ends with it.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    out = Console(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path or name that the terminal cannot show is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    code = _execute(arguments, out, is_process=argv is None)
    if argv is None:
        interrupts.finish()
        if interrupts.came():
            interrupts.leave(code)
    return code


def _execute(arguments: Sequence[str], out: Console, *, is_process: bool) -> int:
    """Runs a command; says what went wrong; returns the exit code."""
    verbose = "-v" in arguments or "--verbose" in arguments
    try:
        if not arguments:
            out.say(FIRST.rstrip("\n"))
        args = build_parser().read(list(_read_given(arguments)))
        code: int = import_module(f"streamconv.cli.commands.{args.command}").execute(args, out)
        out.flush()
    except StdoutError as error:
        if error.reason:
            out.complain(f"streamconv: error: stdout cannot be written: {error.reason}")
        return 3 if error.reason else 1
    except KeyboardInterrupt:
        interrupts.finish()
        return out.fail("interrupted", Interrupted.exit_code, verbose=verbose)
    except StreamconvError as error:
        if interrupts.came():
            interrupts.finish()
            return out.fail(error if isinstance(error, Interrupted) else "interrupted", Interrupted.exit_code, verbose=verbose)
        return out.fail(error, error.exit_code, verbose=verbose)
    except MemoryError as error:
        return out.fail(f"out of memory ({error}); use a smaller --max-memory or fewer --workers", 3, verbose=verbose)
    except OSError as error:
        from streamconv.engine.io import name_in

        return out.fail(f"{name_in(error) or ' '.join(arguments[:3])}: {error.strerror or error}", 3, verbose=verbose)
    except Exception as error:
        if not is_process:
            raise
        if interrupts.came():  # whatever became of it on its way
            interrupts.finish()
            return out.fail("interrupted", Interrupted.exit_code, verbose=verbose)
        what = f"{type(error).__name__}: {error}"
        return out.fail(f"a fault of streamconv itself: {what}; please report it, with what -v prints", 3, verbose=verbose)
    return code


if __name__ == "__main__":
    sys.exit(main())
