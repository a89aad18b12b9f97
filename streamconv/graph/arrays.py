"""Numbers of every dtype as numpy has them: its own, and those of ml_dtypes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

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
