"""Pickles of tensors: what torch's names stand for, as inert records. It needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from streamconv.dtypes import DTYPES, DType
from streamconv.errors import FormatError
from streamconv.formats.files import damaged, short, show
from streamconv.formats.unpickling import MAX_BYTES, OBJECTS, Budget, Global, Inert, Machine, Maker, Record, Refused, fill
from streamconv.storage.folder import Location

_UTILS = "torch._utils._rebuild_"
_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128",
    "QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32", "QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4",
}  # fmt: skip
_FOREIGN = {"complex128": 16, "complex32": 4, "qint8": 1, "quint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1, "float4_e2m1fn_x2": 1}
_PLAIN = {name: dtype for name, dtype in DTYPES.items() if not dtype.is_packed}
_TYPES = _PLAIN | {name: DType(name, nbytes) for name, nbytes in _FOREIGN.items()}
_STORAGE_TYPES = {f"torch.{kind}Storage": _TYPES[name] for kind, name in _STORAGES.items()}
_STORAGE_TYPES |= {f"torch.cuda.{kind}Storage": _TYPES[name] for kind, name in _STORAGES.items()}
_STORAGE_TYPES["torch.storage.UntypedStorage"] = _TYPES["uint8"]
_DENSE = {f"{_UTILS}tensor", f"{_UTILS}tensor_v2", f"{_UTILS}tensor_v3"}
_WRAPPED = {f"{_UTILS}parameter", f"{_UTILS}parameter_with_state", "torch.nn.parameter.Parameter"}
_FROM_TYPE = {"torch._tensor._rebuild_from_type", "torch._tensor._rebuild_from_type_v2"}
_FROM_CPU = f"{_UTILS}device_tensor_from_cpu_tensor"
_ODD = "qtensor sparse_tensor sparse_csr_tensor meta_tensor_no_storage nested_tensor wrapper_subclass device_tensor_from_numpy xla_tensor"
_ODD_TENSORS = {_UTILS + name for name in _ODD.split()}
_WRAPPER = f"{_UTILS}wrapper_subclass"
_SHARDED = {
    "torch.distributed._tensor.api.DTensor", "torch.distributed.tensor.DTensor", "torch.distributed.tensor._api.DTensor",
    "torch.distributed._shard.sharded_tensor.api.ShardedTensor",
}  # fmt: skip
_INDEX = "torch.distributed.checkpoint.metadata.MetadataIndex"  # whose dict says where each piece of a tensor lies
_PLACE = ("relative_path", "offset", "length", "transform_descriptors")
_NEW_OBJECT = {"copyreg.__newobj__", "copyreg.__newobj_ex__"}
_RECONSTRUCTOR = "copyreg._reconstructor"  # of protocols 0 and 1
_ENCODE = "_codecs.encode"  # bytes in protocol 2
_LOCATED = 144  # bytes
NAMES = {str, int}
MAGIC = 0x1950A86A20F9469CFC6C  # the first of the pickles in a file from before torch 1.6


@dataclass(frozen=True, slots=True)
class Odd:
    """A tensor that is not plain bytes, by what would have made it."""

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


@dataclass(frozen=True, slots=True)
class Located:
    """Where a box of a tensor lies, as a table has it; None for what it does not say. Nothing is checked.

    Attributes:
        name: of the tensor.
        offsets: where the box begins along each axis.
        file: in which it lies.
        start: of its bytes.
        nbytes: how many these are.
        transforms: by way of what they are stored.
    """

    name: Any
    offsets: Any
    file: Any
    start: Any
    nbytes: Any
    transforms: Any


@dataclass(frozen=True, slots=True)
class Sharded:
    """A tensor of which a rank's file has a part, or none.

    Attributes:
        kind: its class.
        dtype: of the whole.
        shape: of the whole.
        state: what its attributes would have been set from.
    """

    kind: str
    dtype: DType
    shape: tuple[int, ...]
    state: Any


Storages = dict[str, tuple[int, DType]]  # key -> elements, and of which type


class _Maker:
    """What stands for calls in pickles of torch, and for the storages beside them, which are noted."""

    def __init__(self, storages: Storages, budget: Budget) -> None:
        self._storages, self._spend = storages, budget.spend

    def persistent(self, pid: Any) -> Any:
        if type(pid) is tuple and len(pid) > 1 and pid[0] == "module":
            return pid[1]  # a class, with its source text beside it
        if type(pid) is not tuple or len(pid) < 5:
            raise Refused(f"it describes a storage as {short.repr(pid)}")
        kind, storage, key, _, numel, *view = pid
        dtype = _STORAGE_TYPES.get(storage.name) if type(storage) is Global else None
        if kind != "storage" or dtype is None or type(numel) is not int or numel < 0 or type(key) not in NAMES:
            raise Refused(f"it describes a storage as {short.repr(pid)}")
        self._spend(200)
        count, first = self._storages.setdefault(str(key), (numel, dtype))
        if count * first.itemsize != numel * dtype.itemsize:
            raise Refused(f"it gives storage {short.repr(key)} two sizes, {count} {first} and {numel} {dtype}")
        shift = view[0][1] if view and view[0] else 0
        if type(shift) is not int or shift < 0:
            raise Refused(f"it describes a storage as {short.repr(pid)}")
        return Storage(str(key), dtype, shift * dtype.itemsize)

    def call(self, callee: Any, args: tuple[Any, ...]) -> Any:
        name = callee.name
        if name in _FROM_TYPE:
            return self._typed(args)
        if name in _DENSE:
            return self._tensor(args, version=name)
        if name in _WRAPPED and args:
            return args[0]
        if name == _FROM_CPU:
            same = type(args[0]) is Tensor and type(args[1]) is Global and args[1].name == f"torch.{args[0].dtype}"
            return args[0] if same else Odd(name)
        if name == "torch.Size":
            self._spend(8 * len(args[0]))
            return tuple(args[0])
        if name == "collections.OrderedDict":
            return self._dict(args[0] if args else ())
        if name == _ENCODE and len(args) == 2 and type(args[0]) is str and len(args[0]) <= MAX_BYTES and args[1] == "latin1":
            return args[0].encode("latin1")
        if name in _ODD_TENSORS:
            return Odd(name)
        if name in _NEW_OBJECT and args and type(args[0]) is Global:
            return Inert(args[0].name, args[1:])
        if name == _RECONSTRUCTOR and len(args) == 3 and type(args[0]) is Global:
            return Inert(args[0].name, items=args[2] if type(args[2]) is dict else None)
        return Inert(name, args)

    def _typed(self, args: tuple[Any, ...]) -> Any:
        """A tensor of a subclass: what its own function makes, seen as that class."""
        function, kind, inner = args[:3]
        if type(function) is not Global or type(inner) is not tuple:
            raise Refused(f"it describes a tensor as {short.repr(args)}")
        if function.name == _WRAPPER and type(kind) is Global and kind.name in _SHARDED:
            return self._sharded(kind.name, inner, args[3] if len(args) > 3 else None)
        tensor = self.call(function, inner)
        return tensor if type(tensor) is Tensor else Odd(kind.name if type(kind) is Global else function.name)

    def _sharded(self, kind: str, inner: tuple[Any, ...], state: Any) -> Sharded:
        _, dtype, shape = inner[:3]
        numbers = tuple(shape)
        known = _TYPES.get(dtype.name.removeprefix("torch.")) if type(dtype) is Global else None
        if known is None or not all(type(size) is int and size >= 0 for size in numbers):
            raise Refused(f"it describes a tensor as {short.repr(inner)}")
        self._spend(200)
        return Sharded(kind, known, numbers, state)

    def value(self, key: Inert | Record, value: Any) -> Any:
        if key.kind != _INDEX or type(value) not in OBJECTS:
            return value
        self._spend(_LOCATED)
        self._spend(-sum(one.nbytes for one in (key, value) if type(one) is Record))  # which go
        return Located(key.attribute("fqn"), key.attribute("offset"), *map(value.attribute, _PLACE))

    def _dict(self, pairs: Any) -> dict[str, Any]:
        table: dict[str, Any] = {}
        if type(pairs) not in (list, tuple):
            raise Refused(f"it makes a dict of {short.repr(pairs)}")
        self._spend(105 * len(pairs))
        fill(table, pairs)
        return table

    def _tensor(self, args: tuple[Any, ...], version: str) -> Any:
        storage, offset, shape, stride = args[:4]
        if type(storage) is Inert:
            return Odd(storage.kind)
        third = version == f"{_UTILS}tensor_v3"
        dtype = _TYPES[args[6].name.removeprefix("torch.")] if third else storage.dtype
        metadata = args[7:8] if third else args[6:7]
        self._spend(16 * (len(shape) + len(stride)))
        numbers = (offset, *shape, *stride)
        if type(storage) is not Storage or {*map(type, numbers)} != {int} or min(numbers) < 0 or len(shape) != len(stride):
            raise Refused(f"it describes a tensor as {short.repr(args)}")
        lazy = any(flags.get("conj") or flags.get("neg") for flags in metadata if flags)
        return Tensor(storage, dtype, offset, tuple(shape), tuple(stride), lazy)


def unpickle(
    path: Location, file: BinaryIO, storages: Storages, budget: Budget, machine: Callable[[BinaryIO, Maker, Budget], Machine] = Machine
) -> Any:
    """What the next pickle of a file describes, by a machine for it; the storages it names are added to ``storages``.

    Raises:
        FormatError: it is damaged, or asks for more than a pickle gets.
    """
    try:
        return machine(file, _Maker(storages, budget), budget).run()
    except Refused as error:
        raise FormatError(f"{show(path)}: its pickle is refused: {error}; do not load this file unless you trust who made it") from error
    except (EOFError, LookupError, AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise damaged(path, f"its pickle cannot be read: {type(error).__name__} {short.repr(str(error))}") from error


def is_legacy(head: bytes) -> bool:
    """Whether a file's first bytes are those of torch's older format, in whichever pickle protocol."""
    return MAGIC.to_bytes(10, "little") in head[:32] or head.startswith(b"L%dL\n" % MAGIC)
