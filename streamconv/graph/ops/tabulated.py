"""Ops whose codes fill bytes along rows, a scale for each block of them: what a byte stands for with a scale is made once, and looked up.

Scales of a byte or two are few numbers, again and again: thousands in a model of as many millions of blocks. What is looked up is what the
op itself makes of all bytes with a scale, as it is stored, so that there is one arithmetic.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.graph.moves import Move, packed_strides
from streamconv.graph.ops.boxes import Box, Boxed
from streamconv.graph.ops.op import Values

if TYPE_CHECKING:
    from numpy import ndarray

    Array = ndarray[Any, Any]

_OCTETS = 256
_TABLE = 2 << 20  # bytes of a table: thousands of scales, and what a cache near the processor holds
_SHARE = 4  # a region has at least so many times the elements that are made for it
_PIECE = 1 << 17  # bytes of codes that are looked up at once


class Tabulated(Boxed):
    """An op of codes and scales, the first two inputs.

    Attributes:
        block: rows and columns that share a scale.
    """

    block: tuple[int, int]

    @property
    @abstractmethod
    def per_byte(self) -> int:
        """How many codes a byte holds, one after the other along a row; 0 where they lie otherwise, or it takes more than a scale."""

    def prepare(self, inputs: Sequence[TensorSpec]) -> None:
        super().prepare(inputs)
        if self._is_narrow(inputs) and len(inputs) == 2:
            _table_of(self._of_a_byte, inputs[0].dtype.name, inputs[1].dtype.name)

    def piece(self, inputs: Sequence[TensorSpec] | Sequence[Values]) -> int:
        """See `Boxed.piece`: less, since it is rarely decoded, in favour of more workers."""
        return super().piece(inputs) // (4 if self._is_narrow(inputs) else 1)

    def scratch(self, inputs: Sequence[TensorSpec]) -> int:
        return super().scratch(inputs) + (_TABLE if self._is_narrow(inputs) and len(inputs) > 2 else 0)

    def values(self, region: Move, parts: Sequence[Values], out: Values) -> int:
        return 0 if self._look_up(region, parts, out) else super().values(region, parts, out)

    def _is_narrow(self, inputs: Sequence[TensorSpec] | Sequence[Values]) -> bool:
        """Whether a table has what each scale makes of each byte."""
        return (
            self.per_byte * DTYPES[self.dtype].itemsize in {1, 2, 4, 8}
            and inputs[1].dtype.nbytes in {1, 2}
            and self.block[0] == 1
            and self.block[1] % self.per_byte == 0
        )

    @property
    def _of_a_byte(self) -> Tabulated:
        """The same op of a row of all that a byte can be, which share a scale."""
        row = 1, _OCTETS * self.per_byte
        return replace(self, shape=row, block=row)  # type: ignore[type-var]

    def _look_up(self, region: Move, parts: Sequence[Values], out: Values) -> bool:
        """Has a region of whole blocks, one after the other, looked up; False where it is none, or something speaks against it."""
        if not self._is_narrow(parts):
            return False
        import numpy as np

        codes, scales = (part.items.reshape(-1) for part in parts[:2])
        order = sorted(range(len(region.sizes)), key=lambda axis: -region.src_strides[axis])
        sizes, strides = (tuple(values[axis] for axis in order) for values in (region.sizes, region.src_strides))
        run = Move(sizes, 0, packed_strides(sizes), region.src, strides).simplify().run
        if not 0 < region.numel == run == scales.size * self.block[1] == codes.nbytes * self.per_byte:
            return False
        names = parts[0].dtype.name, parts[1].dtype.name
        table = Table(self._of_a_byte, *names, parts[2:]) if len(parts) > 2 else _table_of(self._of_a_byte, *names)
        rows = table.rows_of(scales, region.numel // _SHARE)
        if rows is None:
            return False
        target = out.items.transpose(order)
        target = target.reshape(len(rows), -1) if target.flags.c_contiguous else target.squeeze()
        lines, rest = divmod(len(rows), len(target))  # blocks of what is written at a time
        if rest or lines * self.block[1] > self.piece(parts):
            return False
        octets = codes.view(np.uint8).reshape(len(rows), -1)
        step = max(1, _PIECE // (lines * octets.shape[1]))
        for start in range(0, len(target), step):
            piece = target[start : start + step]
            blocks = slice(start * lines, (start + len(piece)) * lines)
            table.take(octets[blocks], rows[blocks], piece)
        return True


class Table:
    """What each byte stands for with each scale that has come, as items of the output, those of a byte as one.

    Args:
        op: that makes them, of one row.
        codes: the dtype in which bytes come.
        scales: that of the scales.
        beside: what else the op takes.

    Attributes:
        items: those of a scale's bytes one after the other.
    """

    def __init__(self, op: Tabulated, codes: str, scales: str, beside: Sequence[Values] = ()) -> None:
        import numpy as np

        self._op, self._codes, self._scales, self._beside = op, DTYPES[codes], DTYPES[scales], beside
        width, numbers = op.per_byte * DTYPES[op.dtype].itemsize, 1 << 8 * self._scales.nbytes
        self._most = min(_TABLE // (_OCTETS * width), numbers)
        dtype = np.min_scalar_type(self._most * _OCTETS - 1)
        self._unknown = np.iinfo(dtype).max  # where no row begins
        self._rows = np.full(numbers, self._unknown, dtype)
        self.items: Array = np.full(self._most * _OCTETS, 0, f"u{width}")  # which takes its memory now
        self._count, self._lock = 0, threading.Lock()

    def rows_of(self, scales: Array, most: int) -> Array | None:
        """Where in `items` those of each scale begin; None where too many are new, or some of their values are too large.

        Args:
            scales: as unsigned integers.
            most: values that may be made for those that are new.
        """
        import numpy as np

        rows: Array = self._rows.take(scales)
        if rows.max() == self._unknown:
            with self._lock:
                new = np.unique(scales[self._rows[scales] == self._unknown])
                if len(new) > self._most - self._count or len(new) * self._op.shape[1] > most or not self._add(new):
                    return None
            rows = self._rows.take(scales)
        return rows

    def take(self, octets: Array, rows: Array, target: Array) -> None:
        """Has what the bytes of some blocks stand for in ``target``, by where their rows begin."""
        from streamconv.graph.casts import indices

        places = indices(octets, rows[:, None])
        if target.flags.c_contiguous:
            self.items.take(places, out=target.reshape(-1).view(self.items.dtype).reshape(places.shape), mode="wrap")
        else:
            target[...] = self.items.take(places).view(target.dtype).reshape(target.shape)

    def _add(self, scales: Array) -> bool:
        """Makes what is looked up for some scales; False, and none of it counts, where some of it has become infinite."""
        import numpy as np

        from streamconv.graph.casts import PIECE

        width = self._op.shape[1]
        step = max(1, PIECE // width)
        for start in range(0, len(scales), step):
            some = scales[start : start + step]
            box = Box(range(1), range(len(some)), range(width))
            codes = np.tile(np.arange(_OCTETS, dtype=np.uint8), (1, len(some), 1)).view(f"u{self._codes.itemsize}")
            op = replace(self._op, shape=box.sizes[1:])  # type: ignore[type-var]
            numbers, bound = op.decode([Values(codes, self._codes), Values(some[None, :, None], self._scales), *self._beside], box)
            room = self.items[(self._count + start) * _OCTETS :][: len(some) * _OCTETS]
            if op.store(numbers[0], room.view(f"u{DTYPES[op.dtype].itemsize}").reshape(box.sizes[1:]), bound):
                return False
        self._rows[scales] = np.arange(self._count, self._count + len(scales)) * _OCTETS
        self._count += len(scales)
        return True


@lru_cache(maxsize=2)
def _table_of(op: Tabulated, codes: str, scales: str) -> Table:
    """The one that all tensors of a kind share."""
    return Table(op, codes, scales)
