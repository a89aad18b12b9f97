"""A tensor of an open checkpoint: what it is, and its data on request, whole or in part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from typing import TYPE_CHECKING, Any

from streamconv.dtypes import TensorSpec
from streamconv.errors import FormatError, UsageError
from streamconv.extras import require
from streamconv.graph.moves import Move, region
from streamconv.graph.node import AnyNode, Node, apply, items_of
from streamconv.graph.tiles import boxes
from streamconv.graph.views import Index, select
from streamconv.notebook import table
from streamconv.storage import is_url
from streamconv.storage.ranges import announced, read_range
from streamconv.text import one_line
from streamconv.units import format_size

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from streamconv.graph.arena import Array
    from streamconv.graph.gather import Read

TILE = 8 << 20  # bytes of a tensor that is stored in pieces that are put together at a time


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of an open checkpoint: ``dtype``, ``shape``, ``nbytes``, and its data on request.

    ``entry[0:16, 3]`` reads a part of it as a numpy array, as basic indexing has it, and no more of the file than that takes.

    >>> entry = streamconv.open("model")["w"]
    >>> entry
    <TensorEntry w: float32[2, 3], 24 B>
    >>> entry[:, ::2]
    array([[0., 2.],
           [3., 5.]], dtype=float32)
    >>> float(np.asarray(entry, dtype=np.float64).sum())
    15.0
    >>> entry.torch((1, slice(0, 2)))
    tensor([3., 4.])
    """

    name: str
    source: AnyNode

    @property
    def spec(self) -> TensorSpec:
        """Its dtype and shape."""
        return self.source.spec

    @property
    def dtype(self) -> str:
        """The name of its type, as ``inspect`` spells it: ``bfloat16``, ``float8_e4m3fn``, ``int64``."""
        return self.spec.dtype.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of each axis, in elements; empty for a scalar."""
        return self.spec.shape

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.spec.nbytes

    def __repr__(self) -> str:
        return f"<TensorEntry {one_line(self.name)}: {self.spec}, {format_size(self.nbytes)}>"

    def _repr_html_(self) -> str:
        return table("", ["name", "dtype", "shape", "size"], [(self.name, self.dtype, list(self.shape), format_size(self.nbytes))])

    def __getitem__(self, index: Index) -> Any:
        array = self.numpy(index)
        items = index if isinstance(index, tuple) else (index,)
        is_number = not array.shape and not any(item is ... for item in items)
        return array[()] if is_number else array  # as numpy has it

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if copy is False:
            raise ValueError(f"{self.name}: reading it makes an array of its own: leave out copy=False")
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def torch(self, rows: Index = ...) -> Tensor:
        """The tensor, or ``rows`` of it (a slice, or any index that ``entry[...]`` takes), as a torch tensor that owns its memory."""
        from streamconv.graph.ops import as_torch

        torch = require("torch", f"{self.name}: a tensor of torch")
        dtype = getattr(torch, self.dtype, None)
        if dtype is None:
            raise UsageError(f"{self.name}: torch has no type for {self.dtype}")
        data, shape = self._read(rows)
        tensor: Tensor = as_torch(data, self.spec.dtype).reshape(shape) if len(data) else torch.empty(shape, dtype=dtype)
        return tensor

    def numpy(self, rows: Index = ...) -> np.ndarray[Any, Any]:
        """The tensor, or ``rows`` of it (a slice, or any index that ``entry[...]`` takes), as a numpy array that owns its memory.

        Types that numpy does not have, bfloat16 and float8, are those of the package ml_dtypes.
        """
        from streamconv.graph.arrays import numpy_dtype

        if self.spec.dtype.is_packed:
            raise UsageError(f"{self.name}: numpy has no packed {self.dtype}; copy such tensors with streamconv convert")
        data, shape = self._read(rows)
        return data.view(numpy_dtype(self.dtype)).reshape(shape)

    def pieces(self, nbytes: int) -> Iterator[np.ndarray[Any, Any]]:
        """All of the tensor's values, flat, in pieces of at most ``nbytes`` bytes, in the order in which they are best read.

        Types that numpy does not have, bfloat16 and float8, are those of the package ml_dtypes.
        """
        import numpy as np

        from streamconv.graph.arena import Arena
        from streamconv.graph.arrays import numpy_dtype
        from streamconv.graph.evaluate import arena_bytes, evaluate

        dtype = numpy_dtype(self.dtype)
        itemsize = self.spec.dtype.itemsize
        arena = Arena(arena_bytes(self.source, min(nbytes, self.nbytes), scattered=True))
        with self._reader() as read:
            for box in boxes(self.source, nbytes // itemsize):
                values = np.empty(box.numel, f"u{itemsize}")
                with _asked_for(self.source, region(box)):
                    evaluate(self.source, region(box), values, arena, read)
                yield values.view(dtype)

    def _read(self, index: Index) -> tuple[Array, tuple[int, ...]]:
        """The items that an index selects as unsigned integers, or bytes of packed types, and the shape they have."""
        import numpy as np

        if index is ...:
            return self._evaluate(items_of(self.source)), self.shape
        if self.spec.dtype.is_packed:
            raise UsageError(f"{self.name}: {self.spec.dtype.packing}: take the whole tensor")
        view, shape, reversed_axes = select(self.shape, index, self.name)
        data = self._evaluate(apply(view, self.source))
        if reversed_axes:
            data = np.ascontiguousarray(np.flip(data.reshape(shape), reversed_axes)).reshape(-1)
        return data, shape

    def _evaluate(self, node: AnyNode) -> Array:
        """All items of a node, in its order."""
        import numpy as np

        from streamconv.graph.arena import Arena
        from streamconv.graph.evaluate import arena_bytes, evaluate
        from streamconv.graph.gather import read_bytes

        itemsize, numel = node.spec.dtype.itemsize, node.spec.numel
        try:
            out = np.empty(numel, f"u{itemsize}")
        except (MemoryError, ValueError) as error:
            raise UsageError(f"{self.name}: its {node.spec.nbytes} bytes do not fit into memory: take a part of it") from error
        with self._reader() as read:
            if not isinstance(node, Node):
                read_bytes(node, 0, out.data.cast("B"), read)
                return out
            step = max(1, TILE // itemsize)
            arena = Arena(arena_bytes(node, step * itemsize, scattered=True))
            for box in boxes(node, step):
                here = Move(box.sizes, box.dst, box.dst_strides, box.dst, box.dst_strides)
                with _asked_for(node, here):
                    evaluate(node, here, out, arena, read)
        return out

    @contextmanager
    def _reader(self) -> Iterator[Read]:
        """What fills memory from files, which it keeps open, and from URLs."""
        files: dict[str, FileIO] = {}

        def read(path: str, offset: int, view: memoryview) -> None:
            if is_url(path):
                read_range(path, offset, view)
                return
            if path not in files:
                files[path] = stack.enter_context(FileIO(path))
            files[path].seek(offset)
            while view:  # one call reads 2 GiB at most
                count = files[path].readinto(view)
                if not count:
                    raise FormatError(f"{path}: ends before tensor {self.name}; it changed since it was opened")
                view = view[count:]

        with ExitStack() as stack:
            yield read


@contextmanager
def _asked_for(node: AnyNode, move: Move) -> Iterator[None]:
    """Has what is behind URLs of a region be asked for in few requests."""
    from streamconv.graph.evaluate import reads

    ranges = [one for one in reads(node, move) if is_url(one[0])]
    with announced(ranges) if ranges else ExitStack():
        yield
