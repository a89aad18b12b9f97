"""Numbers of every dtype as numpy has them: its own, and those of ml_dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from streamconv.errors import UsageError

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """numpy's type of that name, or the one that ml_dtypes adds to it.

    Raises:
        UsageError: neither has one.
    """
    try:
        return np.dtype(name)
    except TypeError:
        pass
    try:
        import ml_dtypes
    except ImportError:
        raise UsageError(f"numpy has no type for {name}: install ml_dtypes, or use .torch()") from None
    scalar = getattr(ml_dtypes, name, None)
    if scalar is None:
        raise UsageError(f"numpy has no type for {name}, nor has ml_dtypes: use torch, or copy such tensors with streamconv convert")
    dtype: np.dtype[Any] = np.dtype(scalar)
    return dtype


def as_values(array: Array, name: str) -> Array:
    """The same memory, a flat array, as numbers of the dtype of that name, which must fill whole bytes."""
    return array.view(np.uint8).view(numpy_dtype(name))


def view(array: Array, sizes: Sequence[int], strides: Sequence[int], start: int) -> Array:
    """Elements of an array's memory in another shape; ``strides`` and ``start``, from its first one on, in elements."""
    steps = [stride * array.itemsize for stride in strides]
    if array.flags.c_contiguous:  # `as_strided` takes several times as long
        return np.ndarray(tuple(sizes), array.dtype, array, start * array.itemsize, steps)
    first = as_strided(array, (start + 1,), (array.itemsize,))[start:]
    return as_strided(first, sizes, steps)
