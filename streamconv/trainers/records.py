"""Pickles of tables of contents, of which nearly all are objects of few classes: each is read at once, and kept as a record.

The machine would build each of dozens of steps, dicts and tuples, and its memo would hold them to the end. What the memo is ever asked for
is known ahead, since the bytes say it: the rest is not kept. Where an object is another than is known here, or a part of it is asked for
again, the machine takes its steps.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Mapping
from typing import Any, cast

from streamconv.formats.unpickling import Budget, Global, Machine, Maker, Record, Refused
from streamconv.formats.zips import open_section
from streamconv.storage.folder import File

_MAX_SCAN = 1 << 30  # bytes of a table that is looked through ahead: 7 million boxes
_PIECE = 1 << 20
_OVERLAP = 16  # bytes: what asks the memo for something may lie on the end of a piece
_SMALL = 256  # numbers in the memo that are asked for by one byte
_ASKED = re.compile(rb"(?=j(.{4}))", re.DOTALL)
_ASKED_IN_TEXT = re.compile(rb"g(\d{1,9})\n")
_SIZE = "torch.Size"
# What is remembered is so by MEMOIZE alone (\x94), as in all protocols that torch writes tables in.
_FETCH = rb"(?:h.|j.{4})"
_INTEGER = rb"(?:K.|M..|J.{4}|\x8a(?:\x01.|\x02..|\x03...|\x04.{4}|\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}))"
_TUPLE = rb"(?:\)|%b\x85\x94|%b{2}\x86\x94|%b{3}\x87\x94|\(%b{4,}t\x94)" % ((_INTEGER,) * 4)
_VALUE = rb"%b(?:%b\x85\x94R\x94)?|%b|N|\x8c.[^\x94]*\x94" % (_FETCH, _TUPLE, _INTEGER)
_ATTRIBUTE = rb"(%b)(%b)" % (_FETCH, _VALUE)
_OBJECT = re.compile(rb"\)\x81\x94}\x94\(" + _ATTRIBUTE * 2 + rb"(?:%b)?(?:%b)?ub" % (_ATTRIBUTE, _ATTRIBUTE), re.DOTALL)
_NUMBERS = re.compile(_INTEGER, re.DOTALL)
_DOUBLE, _LONG, _TEXT = 0x4A, 0x8A, 0x8C  # steps by their bytes: numbers with a sign, texts
_NUMERIC = b"KMJ\x8a"
_FETCHES = (2, 5)  # bytes of steps that ask the memo; those of sizes are more
_SHARED, _NUMBER = 250, 32  # bytes, with what names them


def open_table(file: File) -> io.BufferedReader:
    """A file of a table, with a buffer that is copied in no time."""
    return cast("io.BufferedReader", open_section(file, 0, file.size, buffer=8 << 10))


def find_asked(file: File, budget: Budget) -> set[int] | None:
    """Numbers of all that a pickle's memo may be asked for, and some others; None for a file that is no table."""
    if file.size > _MAX_SCAN:
        return None
    asked = set(range(_SMALL))
    size = file.size
    for start in range(0, size, _PIECE):
        data = file.pread(_PIECE + _OVERLAP, start)
        before = len(asked)
        asked.update(index for index in map(_little, set(_ASKED.findall(data))) if index < size)
        asked.update(map(int, _ASKED_IN_TEXT.findall(data)))
        budget.spend(100 * (len(asked) - before))
    return asked


def _little(raw: bytes) -> int:
    return int.from_bytes(raw, "little")


class TableMachine(Machine):
    """The machine for pickles, which reads objects of some classes at once.

    Args:
        file: see `open_table`.
        maker: see `Machine`.
        budget: see `Machine`.
        kinds: the classes, whose objects have no more than attributes: numbers, texts and sizes.
        asked: see `find_asked`.
    """

    def __init__(self, file: io.BufferedReader, maker: Maker, budget: Budget, *, kinds: Collection[str], asked: set[int]) -> None:
        super().__init__(file, maker, budget)
        self._buffer, self._kinds, self._asked = file, kinds, asked
        self._kept: dict[int, Any] = {}
        self._count = 0
        self._shared: dict[bytes, Any] = {}  # names of attributes, texts and sizes by their steps: a table has few, many times

    def _memoize(self) -> None:
        self._put(self._count)

    def _put(self, index: int) -> None:
        value = self._single()
        self._count = max(self._count, index + 1)
        if index in self._asked:
            self._keep(index, value)

    def _duplicate(self) -> None:
        self._stack.append(self._single())

    def _single(self) -> Any:
        """The top of the stack, for a second place. Raises Refused for a record, whose bytes count once."""
        value = self._stack[-1]
        if type(value) is Record:
            raise Refused(f"it has a {value.kind} at two places")
        return value

    def _keep(self, index: int, value: Any) -> None:
        if index in self._kept:
            self._shared.clear()
        self._spend(_SHARED)
        self._kept[index] = value

    def _get(self, index: int) -> None:
        value = self._fetch(index)
        if type(value) is not Global or value.name not in self._kinds or not self._read_record(value.name):
            self._stack.append(value)

    def _fetch(self, index: int) -> Any:
        if index not in self._kept:
            raise LookupError(f"nothing is remembered as {index}")
        return self._kept[index]

    def _read_record(self, kind: str) -> bool:
        """Pushes an object of a class, whose steps are next; False: they are others than those of an object of plain attributes."""
        steps = _OBJECT.match(self._buffer.peek())
        if steps is None:
            return False
        groups = steps.groups(b"")
        names = self._names(groups[::2])
        values: list[Any] = []
        texts: dict[int, str] = {}
        place = self._count + 2  # the object's and its dict's come first
        for raw in groups[1::2]:
            if not raw:
                break
            if raw[0] in _NUMERIC:
                values.append(_number(raw))
            elif raw == b"N":
                values.append(None)
            elif raw[0] != _TEXT and len(raw) in _FETCHES:
                values.append(self._fetch(_little(raw[1:])))
            else:
                value = self._shared.get(raw)
                if value is None:
                    value = self._share(raw)
                if value is None:
                    return False
                values.append(value)
                if raw[0] == _TEXT:
                    texts[place] = value
                    place += 1
                else:
                    place += 3 if value else 2
        if not names or not self._keep_texts(texts, range(self._count, place)):
            return False
        record = Record(kind, names, tuple(values))
        self._spend(record.nbytes)
        self._buffer.read(steps.end())
        self._count = place
        self._stack.append(record)
        return True

    def _keep_texts(self, texts: Mapping[int, str], places: range) -> bool:
        """Keeps those texts at places of the memo that it is asked for; False: it is asked for what is no text."""
        if self._asked.isdisjoint(places):
            return True
        asked = self._asked.intersection(places)
        if not asked <= texts.keys():
            return False
        for index in asked:
            self._keep(index, texts[index])
        return True

    def _names(self, fetches: tuple[bytes, ...]) -> tuple[str, ...]:
        """The names of attributes; none if they are no texts."""
        key = b"".join(fetches)
        names = self._shared.get(key)
        if names is None:
            names = tuple(self._fetch(_little(raw[1:])) for raw in fetches if raw)
            if not all(type(name) is str for name in names):
                return ()
            self._spend(_SHARED + len(key) + 8 * len(names))
            self._shared[key] = names
        return cast("tuple[str, ...]", names)

    def _share(self, raw: bytes) -> Any:
        """The text or the sizes that some steps make; None if they make others."""
        value: Any
        if raw[0] == _TEXT:
            if raw[1] != len(raw) - 3:
                return None
            value = str(raw[2:-1], "utf-8", "surrogatepass")
        else:
            fetch = 2 if raw[:1] == b"h" else 5
            callee = self._fetch(_little(raw[1:fetch]))
            if type(callee) is not Global or callee.name != _SIZE:
                return None
            value = tuple(map(_number, _NUMBERS.findall(raw, fetch)))
        self._spend(_SHARED + 5 * len(raw) + _NUMBER * len(value))
        self._shared[raw] = value
        return value


def _number(integer: bytes) -> int:
    return int.from_bytes(integer[2 if integer[0] == _LONG else 1 :], "little", signed=integer[0] in (_DOUBLE, _LONG))
