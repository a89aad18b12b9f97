"""The machine that a pickle is a program for. It makes dicts, lists, tuples, numbers and texts, and inert records of all else.

Nothing that a pickle names is imported, looked up or called. What its objects take is counted before they are made.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

from streamconv.formats.files import short

MAX_MADE = 448 << 20  # bytes of objects that the pickles of a file may make: those of about 340000 tensors take so much
_MAX_STEPS = 1 << 24  # opcodes
_MAX_TEXT = 64 << 10  # bytes of a text that is kept: names are shorter
MAX_BYTES = 1 << 10  # the same of raw bytes
_MAX_LINE = 64 << 10
_MAX_GAP = 1 << 20  # numbers in the memo that pickletools.optimize may have left out
_MAX_INTEGER = 1 << 10  # bytes of a number
_PIECE = 1 << 20
_NEWEST = 5

ATOMS = {str, int, float, bool, bytes, type(None)}


class Refused(Exception):
    """What a pickle asks for and does not get."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle mentions. It is not looked up."""

    name: str


@dataclass(slots=True, eq=False, repr=False)
class Inert:
    """What stands for an object of another class: what it would have been made by and of.

    Attributes:
        kind: the name of its class, or of the function that would have made it.
        args: what that would have been called with.
        state: what its attributes would have been set from.
        items: what would have been put into it by key; None if nothing was.
        elements: what would have been added to it; None if nothing was.
    """

    kind: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[str, Any] | None = None
    elements: list[Any] | None = None

    def __repr__(self) -> str:
        return f"<{self.kind}>"

    def attribute(self, name: str) -> Any:
        """What the attribute of this name would have been, or None."""
        for part in self.attributes():
            if name in part:
                return part[name]
        return None

    def attributes(self) -> list[dict[str, Any]]:
        """What attributes would have been set from: ``__dict__`` and slots, or a dict that a function takes for that."""
        state = self.args[:1] if self.state is None else self.state
        parts = state if type(state) is tuple else (state,)
        return [part for part in parts if type(part) is dict]


@dataclass(slots=True, eq=False, repr=False)
class Record:
    """What stands for an object of which there are very many, that has no more than attributes.

    Attributes:
        kind: the name of its class.
        names: of its attributes, which such objects share.
        values: what these would have been set to.
    """

    kind: str
    names: tuple[str, ...]
    values: tuple[Any, ...]

    @property
    def nbytes(self) -> int:
        """What it takes in memory, with its numbers and without what it shares."""
        return 96 + 8 * len(self.names) + 32 * sum(type(value) is int for value in self.values)

    def __repr__(self) -> str:
        return f"<{self.kind}>"

    def attribute(self, name: str) -> Any:
        """What the attribute of this name would have been, or None."""
        return self.values[self.names.index(name)] if name in self.names else None


class Maker(Protocol):
    """Says what stands for calls and for what lies outside of a pickle."""

    def call(self, callee: Any, args: tuple[Any, ...]) -> Any:
        """What stands for the result of a call."""

    def persistent(self, pid: Any) -> Any:
        """What stands for something that is stored elsewhere under this id."""

    def value(self, key: Inert | Record, value: Any) -> Any:
        """What stands for a value whose key in a dict is an object, which itself becomes a text."""


class Budget:
    """Bytes that the objects of a file's pickles may still take."""

    def __init__(self) -> None:
        self.left = MAX_MADE

    def spend(self, nbytes: int) -> None:
        """Counts bytes before they are taken. Raises `Refused`."""
        self.left -= nbytes
        if self.left < 0:
            raise Refused(f"its objects take more than {MAX_MADE >> 20} MiB")


class Machine:
    """Runs one pickle from a file that ends where the pickle must."""

    def __init__(self, file: BinaryIO, maker: Maker, budget: Budget) -> None:
        self._file, self._maker, self._spend = file, maker, budget.spend
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under each mark
        self._memo: list[Any] = []

    def run(self) -> Any:
        """What the pickle describes.

        Raises:
            Refused: it asks for what it does not get.
            EOFError, LookupError, TypeError, ValueError: it is no pickle.
        """
        read, spend = self._file.read, self._spend
        for _ in range(_MAX_STEPS):
            code = read(1)
            if code == b".":
                return self._stack.pop()
            if code not in _STEPS:
                raise (ValueError(f"opcode {code!r}") if code else EOFError("it ends too early"))
            cost, step = _STEPS[code]
            spend(cost)
            step(self)
        raise Refused(f"it takes more than {_MAX_STEPS} steps")

    # Reading

    def _check_protocol(self, number: int) -> None:
        if number > _NEWEST:
            raise Refused(f"it is of protocol {number}, and at most {_NEWEST} is known")

    def _take(self, nbytes: int) -> bytes:
        data = self._file.read(nbytes)
        if len(data) < nbytes:
            raise EOFError("it ends too early")
        return data

    def _number(self, kind: str) -> Any:
        return struct.unpack(kind, self._take(struct.calcsize(kind)))[0]

    def _line(self) -> bytes:
        line = self._file.readline(_MAX_LINE)
        if line[-1:] != b"\n":
            raise EOFError("a line does not end")
        return line[:-1]

    def _skip(self, nbytes: int) -> None:
        while nbytes:
            nbytes -= len(self._take(min(nbytes, _PIECE)))

    def _text(self, nbytes: int, errors: str = "surrogatepass") -> Any:
        if nbytes > _MAX_TEXT:  # no name of a tensor
            self._skip(nbytes)
            return Inert("builtins.str")
        data = self._take(nbytes)
        self._spend(nbytes if data.isascii() else 4 * nbytes)
        return str(data, "utf-8", errors)

    def _bytes(self, nbytes: int) -> Any:
        if nbytes > MAX_BYTES:
            self._skip(nbytes)
            return Inert("builtins.bytes")
        self._spend(nbytes)
        return self._take(nbytes)

    # The stack

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _above_mark(self) -> list[Any]:
        """What was pushed since the mark, which goes."""
        values, self._stack = self._stack, self._below.pop()
        self._spend(-_MARK)
        return values

    def _drop(self) -> None:
        self._above_mark()

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._above_mark()

    def _memoize(self) -> None:
        self._put(len(self._memo))

    def _duplicate(self) -> None:
        self._stack.append(self._stack[-1])

    def _put(self, index: int) -> None:
        more = max(1, index + 1 - len(self._memo))
        if more > _MAX_GAP:
            raise Refused(f"it remembers something as {index}, and nothing since {len(self._memo)}")
        self._spend(9 * more)
        self._memo += [_ABSENT] * (index + 1 - len(self._memo))
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        value = self._memo[index] if 0 <= index < len(self._memo) else _ABSENT
        if value is _ABSENT:
            raise LookupError(f"nothing is remembered as {index}")
        self._stack.append(value)

    # Numbers and texts

    def _integer_line(self) -> None:
        line = self._line()[:_MAX_INTEGER]
        self._push({b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line.rstrip(b"L")))

    def _long(self, nbytes: int) -> None:
        if not 0 <= nbytes <= _MAX_INTEGER:
            raise Refused(f"it has a number of {nbytes} bytes")
        self._spend(nbytes)
        self._push(int.from_bytes(self._take(nbytes), "little", signed=True))

    def _quoted_line(self) -> None:
        line = self._line().strip()
        if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
            raise ValueError("a text without quotes")
        self._spend(4 * len(line))
        self._push(codecs.escape_decode(line[1:-1])[0].decode("utf-8", "surrogateescape"))

    def _unicode_line(self) -> None:
        line = self._line()
        self._spend(4 * len(line))
        self._push(str(line, "raw-unicode-escape"))

    # Containers

    def _tuple(self, size: int) -> None:
        if len(self._stack) < size:
            raise LookupError("the stack is empty")
        self._stack[-size:] = [tuple(self._stack[-size:])]

    def _marked_tuple(self) -> None:
        items = tuple(self._above_mark())
        self._spend(8 * len(items))
        self._push(items)

    def _marked_list(self) -> None:
        items = self._above_mark()
        self._push(items)

    def _marked_dict(self) -> None:
        items = self._above_mark()
        self._push({})
        self._fill(items[::2], items[1::2])

    def _marked_set(self) -> None:
        self._push(Inert("builtins.frozenset", elements=self._above_mark()))

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._fill([key], [value])

    def _set_items(self) -> None:
        items = self._above_mark()
        self._fill(items[::2], items[1::2])

    def _fill(self, keys: list[Any], values: list[Any]) -> None:
        target = self._stack[-1]
        self._spend(120 + 105 * len(keys))
        if type(target) is Inert:
            if target.items is None:
                target.items = {}
            target = target.items
        if type(target) is not dict:
            raise Refused(f"it puts items into {short.repr(target)}")
        kept = [self._maker.value(key, value) if type(key) in OBJECTS else value for key, value in zip(keys, values, strict=True)]
        fill(target, zip(keys, kept, strict=True))

    def _append(self) -> None:
        value = self._stack.pop()
        self._extend([value])

    def _appends(self) -> None:
        self._extend(self._above_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        self._spend(9 * len(values))
        if type(target) is Inert:
            if target.elements is None:
                self._spend(64)
                target.elements = []
            target = target.elements
        if type(target) is not list:
            raise Refused(f"it appends to {short.repr(target)}")
        target += values

    # What would run code

    def _global(self) -> None:
        module, name = self._line(), self._line()
        self._name(str(module, "utf-8"), str(name, "utf-8"))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("a name that is no text")
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        full = f"{_RENAMED.get(module, module)}.{name}"
        self._spend(len(full) if full.isascii() else 4 * len(full))
        self._push(Global(full))

    def _call(self, callee: Any, args: Any) -> None:
        if type(args) is not tuple or type(callee) not in (Global, Inert):
            raise Refused(f"it calls {short.repr(callee)}")
        self._push(self._maker.call(callee, args) if type(callee) is Global else Inert(callee.kind, args))

    def _reduce(self) -> None:
        args = self._stack.pop()
        self._call(self._stack.pop(), args)

    def _new_with_keywords(self) -> None:
        keywords, args = self._stack.pop(), self._stack.pop()
        self._call(self._stack.pop(), (*args, keywords))

    def _marked_call(self) -> None:
        callee, *args = self._above_mark()
        self._spend(8 * len(args))
        self._call(callee, tuple(args))

    def _instance(self) -> None:
        args = tuple(self._above_mark())
        self._spend(8 * len(args))
        self._global()
        self._call(self._stack.pop(), args)

    def _build(self) -> None:
        state = self._stack.pop()
        if type(self._stack[-1]) is Inert:  # attributes of other records: none of them is a tensor's data
            self._stack[-1].state = state

    def _persistent(self) -> None:
        self._push(self._maker.persistent(self._stack.pop()))

    def _refuse_extension(self) -> None:
        raise Refused("it names classes by numbers of a registry that is not in the file")

    def _refuse_buffer(self) -> None:
        raise Refused("it refers to buffers that are not in the file")

    def _refuse_text_id(self) -> None:
        raise Refused("it is of protocol 0, whose storages have no more than a text")


_ABSENT = object()
OBJECTS = (Inert, Record)
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # by Python 3


def fill(target: dict[str, Any], pairs: Any) -> None:
    """Puts pairs into a dict, under texts for keys: what else is hashed could be made slow to hash."""
    for key, value in pairs:
        text = key if type(key) is str else text_of(key)
        if text in target:
            if type(key) is str or type(key) in ATOMS:
                raise Refused(f"it has a dict with two keys that read {short.repr(text)}")
            text = f"{text} #{len(target)}"
        target[text] = value


def text_of(key: Any) -> str:
    """A key of a dict, or what stands for one, as part of a tensor's name."""
    if type(key) in ATOMS:
        return str(key)
    if type(key) is Global:
        return key.name
    if type(key) in OBJECTS:
        return str(key.kind)
    flat = type(key) is tuple and len(key) <= 64 and ATOMS.issuperset(map(type, key))
    return short.repr(key) if flat else type(key).__name__.lower()


_Step = Callable[[Machine], None]
_M = Machine
# Bytes that a step takes at most, with the place on the stack.
_PLACE, _NUMBER, _TEXT, _TUPLE, _MARK, _LIST, _DICT, _RECORD, _NAME = 9, 41, 66, 73, 73, 73, 73, 105, 210
_STEPS: dict[bytes, tuple[int, _Step]] = {
    b"I": (_NUMBER, _M._integer_line),
    b"J": (_NUMBER, lambda m: m._push(m._number("<i"))),
    b"K": (_PLACE, lambda m: m._push(m._number("B"))),
    b"M": (_NUMBER, lambda m: m._push(m._number("<H"))),
    b"L": (_NUMBER + _MAX_INTEGER, _M._integer_line),
    b"\x8a": (_NUMBER, lambda m: m._long(m._number("B"))),
    b"\x8b": (_NUMBER, lambda m: m._long(m._number("<i"))),
    b"F": (_NUMBER, lambda m: m._push(float(m._line()))),
    b"G": (_NUMBER, lambda m: m._push(m._number(">d"))),
    b"S": (_TEXT, _M._quoted_line),
    b"T": (_TEXT, lambda m: m._push(m._text(m._number("<I"), "surrogateescape"))),
    b"U": (_TEXT, lambda m: m._push(m._text(m._number("B"), "surrogateescape"))),
    b"V": (_TEXT, _M._unicode_line),
    b"X": (_TEXT, lambda m: m._push(m._text(m._number("<I")))),
    b"\x8c": (_TEXT, lambda m: m._push(m._text(m._number("B")))),
    b"\x8d": (_TEXT, lambda m: m._push(m._text(m._number("<Q")))),
    b"B": (_RECORD, lambda m: m._push(m._bytes(m._number("<I")))),
    b"C": (_RECORD, lambda m: m._push(m._bytes(m._number("B")))),
    b"\x8e": (_RECORD, lambda m: m._push(m._bytes(m._number("<Q")))),
    b"\x96": (_RECORD, lambda m: m._push(m._bytes(m._number("<Q")))),
    b"\x97": (0, _M._refuse_buffer),
    b"\x98": (0, _M._refuse_buffer),
    b"N": (_PLACE, lambda m: m._push(None)),
    b"\x88": (_PLACE, lambda m: m._push(True)),  # noqa: FBT003 - the value itself
    b"\x89": (_PLACE, lambda m: m._push(False)),  # noqa: FBT003 - the value itself
    b"]": (_LIST, lambda m: m._push([])),
    b"a": (0, _M._append),
    b"e": (0, _M._appends),
    b"l": (_LIST, _M._marked_list),
    b")": (_PLACE, lambda m: m._push(())),
    b"t": (_TUPLE, _M._marked_tuple),
    b"\x85": (_TUPLE, lambda m: m._tuple(1)),
    b"\x86": (_TUPLE, lambda m: m._tuple(2)),
    b"\x87": (_TUPLE, lambda m: m._tuple(3)),
    b"}": (_DICT, lambda m: m._push({})),
    b"d": (_DICT, _M._marked_dict),
    b"s": (0, _M._set_item),
    b"u": (0, _M._set_items),
    b"\x8f": (_RECORD + _LIST, lambda m: m._push(Inert("builtins.set", elements=[]))),
    b"\x90": (0, _M._appends),
    b"\x91": (_RECORD + _LIST, _M._marked_set),
    b"0": (0, _M._pop),
    b"2": (_PLACE, lambda m: m._duplicate()),
    b"(": (_MARK, _M._mark),
    b"1": (0, _M._drop),
    b"g": (_PLACE, lambda m: m._get(int(m._line()))),
    b"h": (_PLACE, lambda m: m._get(m._number("B"))),
    b"j": (_PLACE, lambda m: m._get(m._number("<I"))),
    b"p": (0, lambda m: m._put(int(m._line()))),
    b"q": (0, lambda m: m._put(m._number("B"))),
    b"r": (0, lambda m: m._put(m._number("<I"))),
    b"\x94": (0, lambda m: m._memoize()),
    b"\x82": (0, _M._refuse_extension),
    b"\x83": (0, _M._refuse_extension),
    b"\x84": (0, _M._refuse_extension),
    b"c": (_NAME, _M._global),
    b"\x93": (_NAME, _M._stack_global),
    b"R": (_RECORD, _M._reduce),
    b"b": (0, _M._build),
    b"i": (_NAME + _RECORD, _M._instance),
    b"o": (_RECORD, _M._marked_call),
    b"\x81": (_RECORD, _M._reduce),
    b"\x92": (_RECORD, _M._new_with_keywords),
    b"\x80": (0, lambda m: m._check_protocol(m._number("B"))),
    b"\x95": (0, lambda m: m._skip(8)),
    b"P": (0, _M._refuse_text_id),
    b"Q": (_RECORD, _M._persistent),
}
