"""What torch leaves open when it rounds: the bits of a NaN, and a word about values that have become infinite."""

from __future__ import annotations

import math
from typing import Any

_MASKED = 1 << 16  # elements: pieces in which NaNs and infinities are looked for


def settle(given: Any, made: Any) -> int:
    """Makes every NaN of what was ``made`` of numbers the same; how many are infinite there, and finite as they were ``given``."""
    import torch

    largest = torch.finfo(made.dtype).max
    if largest >= torch.finfo(given.dtype).max:
        if given.min().isnan():
            settle_nans(made)
        return 0
    low, high = given.aminmax()
    if -largest <= low and high <= largest:  # which NaNs are not
        return 0
    if low.isnan():
        settle_nans(made)
    return count_overflows(given, made)


def count_overflows(given: Any, made: Any) -> int:
    """How many are infinite in one and finite in the other, in pieces small enough for their masks not to count."""
    if given.numel() > _MASKED:
        axis = max(range(given.dim()), key=lambda k: given.shape[k])
        return sum(count_overflows(*halves) for halves in zip(given.chunk(2, axis), made.chunk(2, axis), strict=True))
    return int((made.isinf() & given.isfinite()).sum())


def settle_nans(values: Any) -> None:
    """Makes every NaN the same, in pieces small enough for their masks not to count."""
    if values.numel() > _MASKED:
        for half in values.chunk(2, dim=max(range(values.dim()), key=lambda k: values.shape[k])):
            settle_nans(half)
    else:
        values.masked_fill_(values.isnan(), math.nan)
