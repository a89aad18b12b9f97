"""Pickles of tensors, read by a machine that builds inert records from a fixed table of names.

It imports nothing and calls nothing that a pickle names, and needs no torch.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from streamconv.dtypes import DTYPES, DType
from streamconv.errors import FormatError
from streamconv.formats.files import damaged, short, show
from streamconv.storage.remote import Location

MAX_PICKLE = 256 << 20
_MAX_READS = 1 << 24  # of a pickle: about 300000 tensors; each read can make one object

_UTILS = "torch._utils._rebuild_"
_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128",
    "QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32", "QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4",
}  # fmt: skip
_FOREIGN = {"complex128": 128, "complex32": 32, "qint8": 8, "quint8": 8, "qint32": 32, "quint4x2": 8, "quint2x4": 8, "float4_e2m1fn_x2": 8}
_TYPES = {name: dtype for name, dtype in DTYPES.items() if dtype.bits >= 8} | {name: DType(name, bits) for name, bits in _FOREIGN.items()}
_STORAGE_TYPES = {f"{module}.{kind}Storage": _TYPES[name] for kind, name in _STORAGES.items() for module in ("torch", "torch.cuda")}
_STORAGE_TYPES["torch.storage.UntypedStorage"] = _TYPES["uint8"]
_DENSE = {f"{_UTILS}tensor", f"{_UTILS}tensor_v2", f"{_UTILS}tensor_v3"}
_WRAPPED = {f"{_UTILS}parameter", f"{_UTILS}parameter_with_state", "torch.nn.parameter.Parameter"}
_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
_ODD = "qtensor sparse_tensor meta_tensor_no_storage nested_tensor wrapper_subclass device_tensor_from_numpy device_tensor_from_cpu_tensor"
_ODD_TENSORS = {_UTILS + name for name in _ODD.split()}
VALUES = {"collections.Counter", "torch.device", "torch.serialization._get_layout", "_codecs.encode"}
VALUES |= {"builtins.bytearray", "builtins.set", "builtins.complex", "torch.per_tensor_affine", "torch.per_tensor_symmetric"}
VALUES |= {f"torch.per_channel_{kind}" for kind in ("affine", "symmetric", "affine_float_qparams")}
GLOBALS = {"collections.OrderedDict", "torch.Size", "torch.Tensor", _FROM_TYPE, *(f"torch.{name}" for name in _TYPES)}
GLOBALS |= VALUES | _ODD_TENSORS | _WRAPPED | _DENSE | _STORAGE_TYPES.keys()
_OPCODES = b"\x80.c(N\x88\x89]})tu\x85\x86\x87KMJ\x8aGUXQhjqrseba\x81R"  # what torch's weights_only loading knows
ATOMS = {str, int, float, bool, bytes, type(None)}
NAMES = {str, int}


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle mentions. It is not looked up."""

    name: str


@dataclass(frozen=True, slots=True)
class Odd:
    """What a call would have made, were it made: a value, or a tensor that is not plain bytes."""

    maker: str


@dataclass(frozen=True, slots=True)
class Storage:
    """Raw bytes that tensors share."""

    key: str
    dtype: DType
    shift: int = 0  # bytes from the storage's start, for the views of old files


@dataclass(frozen=True, slots=True)
class Tensor:
    """A view of a storage; offset, shape and stride count elements."""

    storage: Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    lazy: bool  # conjugated or negated when it is read, not in the file


Storages = dict[str, tuple[int, DType]]  # key -> elements, and of which type


class _Refused(Exception):
    """What a pickle asks for and does not get."""


class Window:
    """A file of which an unpickler may read so much and no more."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self.file, self.left, self.reads = file, MAX_PICKLE, _MAX_READS

    def read(self, count: int) -> bytes:
        self.left -= count
        self.spend(1)
        if len(data := self.file.read(count)) < count:
            raise EOFError
        return data

    def spend(self, objects: int) -> None:
        self.reads -= objects
        if self.left < 0 or self.reads < 0:
            raise _Refused(f"it takes more than {MAX_PICKLE} bytes or {_MAX_READS} steps")

    def readline(self) -> bytes:
        return self.file.readline(1024)


class _Unpickler(pickle._Unpickler):
    """Builds dicts, lists, tuples, atoms and the records above; everything else is refused."""

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Any]] = {code: pickle._Unpickler.dispatch[code] for code in _OPCODES}

    def __init__(self, window: Window, storages: Storages) -> None:
        super().__init__(window, encoding="utf-8", errors="surrogateescape")
        self.window, self.storages = window, storages

    def find_class(self, module: str, name: str) -> Global:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full not in GLOBALS:
            raise _Refused(f"it asks for {short.repr(full)[1:-1]}, which no tensor needs; nothing of it was run")
        return Global(full)

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage, key, _, numel, *view = pid
        dtype = _STORAGE_TYPES.get(storage.name) if type(storage) is Global else None
        if kind != "storage" or dtype is None or type(numel) is not int or numel < 0 or type(key) not in NAMES:
            raise _Refused(f"it describes a storage as {short.repr(pid)}")
        known, first = self.storages.setdefault(str(key), (numel, dtype))
        if known * first.itemsize != numel * dtype.itemsize:
            raise _Refused(f"it gives storage {short.repr(key)} two sizes, {known} {first} and {numel} {dtype}")
        shift = view[0][1] if view and view[0] else 0
        if type(shift) is not int or shift < 0:
            raise _Refused(f"it describes a storage as {short.repr(pid)}")
        return Storage(str(key), dtype, shift * dtype.itemsize)

    def _call(self, made: Any, args: Any) -> Any:
        """What stands for the result of a call."""
        if type(made) is not Global or type(args) is not tuple:
            raise _Refused(f"it calls {short.repr(made)}")
        name = made.name
        if name == _FROM_TYPE:
            plain = args[1].name in _WRAPPED | {"torch.Tensor"}
            return self._call(args[0], args[2]) if plain else Odd(args[1].name)
        if name in _DENSE:
            return self._tensor(args, version=name)
        if name in _WRAPPED:
            return args[0]
        if name == "torch.Size":
            self.window.spend(len(args[0]))
            return tuple(args[0])
        if name == "collections.OrderedDict":
            self.window.spend(len(args[0]) if args else 0)
            return {_key(key): value for key, value in (args[0] if args else ())}
        if name in VALUES or name in _ODD_TENSORS:
            return Odd(name)
        raise _Refused(f"it calls {name}, which no tensor needs; nothing of it was run")

    def _tensor(self, args: tuple[Any, ...], version: str) -> Tensor:
        storage, offset, shape, stride = args[:4]
        third = version == f"{_UTILS}tensor_v3"
        dtype = _TYPES[args[6].name.removeprefix("torch.")] if third else storage.dtype
        metadata = args[7:8] if third else args[6:7]
        self.window.spend(len(shape) + len(stride))
        sizes = (offset, *shape, *stride)
        if type(storage) is not Storage or {*map(type, sizes)} != {int} or min(sizes) < 0 or len(shape) != len(stride):
            raise _Refused(f"it describes a tensor as {short.repr(args)}")
        lazy = any(facts.get("conj") or facts.get("neg") for facts in metadata if facts)
        return Tensor(storage, dtype, offset, tuple(shape), tuple(stride), lazy)

    def _reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], args)

    def _build(self) -> None:
        self.stack.pop()  # attributes of what was made: none of them is a tensor's data

    def _set_items(self) -> None:
        items = self.pop_mark()
        self._fill(items[::2], items[1::2])

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key], [value])

    def _fill(self, keys: list[Any], values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is dict:
            target.update(zip(map(_key, keys), values, strict=True))
        elif type(target) is not Odd:
            raise _Refused(f"it puts items into {short.repr(target)}")

    dispatch |= {b"R"[0]: _reduce, b"\x81"[0]: _reduce, b"b"[0]: _build, b"u"[0]: _set_items, b"s"[0]: _set_item}


def _key(key: Any) -> Any:
    """A dict's key: nothing whose hash could be made deep."""
    if type(key) in ATOMS or (type(key) is tuple and ATOMS.issuperset(map(type, key))):
        return key
    raise _Refused(f"it has a dict whose key is a {type(key).__name__}")


def unpickle(path: Location, window: Window, storages: Storages) -> Any:
    """What the next pickle of a file describes; the storages it names are added to ``storages``.

    Raises:
        FormatError: it is damaged, or asks for what no tensor needs.
    """
    try:
        return _Unpickler(window, storages).load()
    except _Refused as error:
        raise FormatError(f"{show(path)}: its pickle is refused: {error}; do not load this file unless you trust who made it") from error
    except (pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        problem = f"its pickle is not one that weights_only loading can read: {type(error).__name__} {short.repr(str(error))}"
        raise damaged(path, problem) from error
