"""Experts that files hold one by one, and transformers, and so mergekit, in two tensors of all of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<part>\w+)\.weight", re.DOTALL)
_PARTS = {
    "w1": ("gate_up_proj", 0), "gate_proj": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "up_proj": ("gate_up_proj", 1),
    "w2": ("down_proj", 0), "down_proj": ("down_proj", 0),
}  # fmt: skip
"""Parts of an expert: the tensor that they go into, and in what order."""
_MODULES = (("block_sparse_moe", "mlp"),)
"""What files call modules, and transformers."""


@dataclass(frozen=True)
class Piece:
    """Where a tensor lies in that of all experts: what this is called by the names of files, and the expert's number with the part's."""

    tensor: str
    order: tuple[int, int]


def piece_of(name: str) -> Piece | None:
    """Where a tensor lies in that of all experts; None: it is none of theirs."""
    match = _EXPERT.fullmatch(name)
    if match is None or match["part"] not in _PARTS:
        return None
    tensor, order = _PARTS[match["part"]]
    return Piece(f"{match['experts']}.{tensor}", (int(match["number"]), order))


def native_name(name: str) -> str:
    """What transformers calls the tensor that this one is a piece of, or is."""
    piece = piece_of(name)
    native = piece.tensor if piece else name
    for stored, own in _MODULES:
        native = native.replace(f".{stored}.", f".{own}.")
    return native
