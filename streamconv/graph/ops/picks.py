"""Which of a model's deltas count, the differences of its tensor and the base's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamconv.graph.moves import Move

if TYPE_CHECKING:
    from numpy import ndarray

    Array = ndarray[Any, Any]

ALL, NONE, LARGEST, RANDOM = "all", "none", "largest", "random"
"""Which of a model's deltas count."""
CHANCES = 1 << 53
"""A delta that is picked with probability p is with ``p * CHANCES`` of so many equal chances."""


@dataclass(frozen=True)
class Pick:
    """Which of a model's deltas count.

    Attributes:
        rule: one of `ALL`, `NONE`, `LARGEST` (by a cutoff, an input of its own), `RANDOM`.
        chances: of `CHANCES`, how many pick a random one.
        key: decides with an element's place whether it is picked: below 2^63, and no two tensors' the same.
        rescaled: those that are picked are multiplied with what an input of its own says.
        offset: elements of other tensors of the same unit before this one.
    """

    rule: str = ALL
    chances: int = 0
    key: int = 0
    rescaled: bool = False
    offset: int = 0

    def mask(self, bits: Array, region: Move, cutoff: Array | None) -> Array:
        """Which deltas of a region count, by their magnitudes' ``bits``."""
        import numpy as np

        from streamconv.graph import deltas

        if self.rule == RANDOM:
            picked: Array = deltas.chances_of(deltas.places_of(region), self.key) < np.uint64(self.chances)
            return picked.reshape(bits.shape)
        assert cutoff is not None
        size, last = (int(number) for number in cutoff)
        mask: Array = bits > bits.dtype.type(size)
        alike = bits == bits.dtype.type(size)
        if alike.any():
            mask |= alike & (deltas.places_of(region) + self.offset <= last).reshape(bits.shape)
        return mask
