"""What the command prints: all of it leaves by here, a line at a time.

Lines repeat names out of files, what was given on the command line, and messages of libraries. None of it may have a terminal do anything,
no query of a URL is shown wherever that was given, and a path stands as it was given.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from streamconv.text import one_line, without_secrets


class StdoutError(Exception):
    """What was printed did not arrive. ``reason``: what the system says; None where the reader has gone, which is its good right."""

    def __init__(self, error: OSError) -> None:
        self.reason = None if isinstance(error, BrokenPipeError) else error.strerror or str(error)
        super().__init__(self.reason)


class Console:
    """Prints for a command that was given these arguments."""

    def __init__(self, arguments: Sequence[str] = ()) -> None:
        self._given = dict(_full_paths(arguments))
        paths = sorted(self._given, key=len, reverse=True)
        self._paths = re.compile(rf"(?<![\w/.-])(?:{'|'.join(map(re.escape, paths))})(?=[\s/:;,)\]'\"]|\.?$)") if paths else None

    def show(self, text: object) -> str:
        """A text as it is printed, on one line."""
        line = one_line(without_secrets(str(text)))
        return self._paths.sub(lambda match: self._given[match[0]], line) if self._paths else line

    def say(self, text: object) -> None:
        """Prints lines on stdout. Those that a text has are kept apart: what makes it sees to it that names have none in them.

        Raises:
            StdoutError: they do not arrive.
        """
        self.write(f"{self.show(line)}\n" for line in str(text).split("\n"))

    def say_json(self, document: Any) -> None:
        """Prints one JSON document; lists and other iterables at its top level are streamed item by item. Raises as `say` does."""
        self.write(_json_parts(document))

    def write(self, parts: Iterable[str]) -> None:
        """Prints text as it is. Raises as `say` does."""
        for part in parts:
            try:
                sys.stdout.write(part)
            except OSError as error:
                raise _lost(error) from error

    def flush(self) -> None:
        """Sees that what was printed arrives. Raises as `say` does."""
        try:
            sys.stdout.flush()
        except OSError as error:
            raise _lost(error) from error

    def complain(self, message: object) -> None:
        """Prints a line on stderr, if anybody is there to read it."""
        with suppress(OSError):
            sys.stderr.write(f"{self.show(message)}\n")
            sys.stderr.flush()

    def fail(self, error: BaseException | str, code: int, *, verbose: bool) -> int:
        """Says what went wrong, and ``verbose`` where; gives the exit code back."""
        if verbose:
            for line in traceback.format_exc().rstrip("\n").split("\n"):
                self.complain(line)
        text = " ".join(str(error).split("\n"))
        self.complain(f"streamconv: error: {text}")
        return code


def _lost(error: OSError) -> StdoutError:
    """The error for what could not be printed; the interpreter, which would try again when it ends, has nothing left to print."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return StdoutError(error)


def _full_paths(arguments: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Absolute paths of what may be one among the arguments -> how it was given."""
    for argument in arguments:
        text = argument.partition("=")[2] if argument.startswith("-") else argument
        text = text.rstrip("/") or text
        if text and "\0" not in text and "://" not in text:
            yield one_line(os.path.abspath(text)), one_line(text)  # noqa: PTH100 - links stay as they are


def _json_parts(document: Any) -> Iterator[str]:
    if not isinstance(document, Mapping):
        yield f"{_to_json(document)}\n"
        return
    for number, (key, value) in enumerate(document.items()):
        yield f"{', ' if number else '{'}{_to_json(key)}: "
        if isinstance(value, Mapping | str) or not isinstance(value, Iterable):
            yield _to_json(value)
            continue
        yield "["
        for k, item in enumerate(value):
            yield f"{', ' if k else ''}{_to_json(item)}"
        yield "]"
    yield "}\n" if document else "{}\n"


def _to_json(value: Any) -> str:
    """JSON in ASCII: of what a terminal would obey json.dumps leaves one character as it is."""
    return json.dumps(value, allow_nan=False).replace("\x7f", "\\u007f")
