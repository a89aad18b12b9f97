"""What target tensors are made of, by name: as recipes find it, and as plans tell it."""

from __future__ import annotations

from typing import NamedTuple

from streamconv.dtypes import TensorSpec


class Row(NamedTuple):
    """Which sources a target tensor is made of, by which layout ("" where only the name changes)."""

    target: str
    sources: tuple[str, ...]
    layout: str
    spec: TensorSpec
