"""JSON that strangers wrote: headers, indexes and configs, whose memory is bounded before they are taken apart."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, NoReturn

import msgspec

from streamconv import memory
from streamconv.errors import FormatError
from streamconv.formats.files import damaged, read_bytes, short, show
from streamconv.storage.folder import Location

MAX_JSON = 100_000_000  # safetensors' own limit for a header, in bytes; an index is held to the same
MAX_CONFIG = 8 << 20  # the largest there are have half of that

# What CPython takes for the parts of a text, in bytes, at most: measured with texts of nothing else.
_PARTS = {b"[": 96, b"{": 96, b",": 48, b":": 170, b'"': 40}

_LEAST = 16 << 10
_MINUS_ZERO = re.compile(rb"-0(?<=[\s:,\[]-0)")  # a number, or in a text what looks like one


class Repeated(dict[str, Any]):
    """A JSON object that says keys twice; refused where it is used, since only there its place is known."""

    keys_said_twice: list[str]

    @property
    def key(self) -> str:
        return self.keys_said_twice[0]


def memory_of(raw: bytes) -> int:
    """Bytes that reading a JSON text takes, its own included: no less than it does, and up to twice of that for what is usual."""
    decoded = len(raw)
    if not raw.isascii():  # a text has one width for all its characters, and so may the longest name in it
        decoded *= 8 if any(bytes([first]) in raw for first in range(0xF0, 0xF5)) else 4
    return len(raw) + decoded + _LEAST + sum(nbytes * raw.count(part) for part, nbytes in _PARTS.items())


def parse_object(path: Location, raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object; one in it that says a key twice is a `Repeated`.

    Raises:
        FormatError: it is none.
        BudgetError: it would take more memory than there is to be.
    """
    memory.claim(memory_of(raw), f"{show(path)}: its {what} of {len(raw)} bytes")
    table = _parse_plain(raw)
    if table is not None:
        return table
    hook = _parse_int if b"-0" in raw else None  # None is much faster
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_object, parse_int=hook, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        problem = f"its {what} is not UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        problem = f"its {what} is not JSON: {error.msg} at character {error.pos}"
    except (ValueError, RecursionError) as error:
        problem = f"its {what} is not JSON that can be read: {short.repr(str(error))}"
    else:
        if type(value) is dict:
            return value
        if type(value) is not Repeated:
            raise damaged(path, f"its {what} must be a JSON object and is a {type(value).__name__}")
        problem = f"its {what} names {short.repr(value.key)} twice"
    raise damaged(path, problem)


def _parse_plain(raw: bytes) -> dict[str, Any] | None:
    """A JSON object that is certain to say no key twice: each key has a colon, and there are as many of them as keys. None: look closer."""
    if _MINUS_ZERO.search(raw):
        return None
    try:
        table = msgspec.json.decode(raw)
    except (ValueError, RecursionError):
        return None
    if type(table) is not dict:
        return None
    keys = len(table) + sum(len(value) for value in table.values() if type(value) is dict)
    return table if raw.count(b":") == keys else None


def read_json(path: Location, most: int, noun: str) -> Any:
    """What a file of JSON says, as libraries read it: of a key that is said twice the last counts.

    Args:
        path: a regular file.
        most: bytes that it may have.
        noun: what it is, with its article.

    Raises:
        FormatError: it is no JSON, or larger.
        UsageError: it cannot be read.
        BudgetError: it would take more memory than there is to be.
    """
    raw, size = read_bytes(path, 0, most, noun)
    if size > most:
        raise FormatError(f"{show(path)}: {size} bytes, larger than {most >> 20} MiB, which {noun} never is; mend it")
    memory.claim(memory_of(raw), f"{show(path)}: its text of {len(raw)} bytes")
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{show(path)}: cannot be read as JSON: {str(error)[:200]}; mend it") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) == len(pairs):
        return table
    repeated = Repeated(table)
    counts = Counter(key for key, _ in pairs)
    repeated.keys_said_twice = [key for key, count in counts.items() if count > 1]
    return repeated


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _parse_int(text: str) -> int:
    return -1 if text == "-0" else int(text)  # as the reference library has it, -0 is no count
