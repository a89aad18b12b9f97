"""Which tensors hold what another one held under another name: told by shape and dtype, then by how they begin, then by digests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from streamconv.dtypes import TensorSpec
from streamconv.engine.side_by_side import Limits, SideBySide
from streamconv.graph.node import AnyNode

if TYPE_CHECKING:
    from streamconv.engine.side_by_side import Begin

HEAD = 64 << 10  # bytes of a tensor that are looked at first
_Key = tuple[TensorSpec, bytes]


def find_alike(a: Mapping[str, AnyNode], b: Mapping[str, AnyNode], names: Collection[str], limits: Limits) -> tuple[list[str], list[str]]:
    """Which tensors of A, and which of those of B, may hold the same: they have the same shape and dtype, and begin alike.

    One of B that begins with one value over and over counts only if A has none of its name: any other constant would do.

    Args:
        a: where they may have been.
        b: where they are.
        names: of tensors of B.
        limits: what reading may take.
    """
    shapes = {node.spec for node in a.values()} & {b[name].spec for name in names}
    ours = _keys(a, [name for name, node in a.items() if node.spec in shapes], _read_head, limits, step=HEAD)
    theirs = _keys(b, [name for name in names if b[name].spec in shapes], _read_head, limits, step=HEAD)
    theirs = {name: key for name, key in theirs.items() if not (key[1] == _ALIKE and name in a)}
    common = {*ours.values()} & {*theirs.values()}
    return [name for name, key in ours.items() if key in common], [name for name, key in theirs.items() if key in common]


def match_moved(
    a: Mapping[str, AnyNode],
    b: Mapping[str, AnyNode],
    alike: tuple[list[str], list[str]],
    limits: Limits,
    progress: Callable[[int], None],
) -> dict[str, str]:
    """For tensors of B the name under which A has their bytes, where it has; of several one that B has not, in order.

    Args:
        a: where they may have been.
        b: where they are.
        alike: what `find_alike` says; each of these is read once.
        limits: what reading may take.
        progress: told the bytes that were read.
    """
    ours = _keys(a, alike[0], _digest, limits, progress)
    theirs = _keys(b, alike[1], _digest, limits, progress)
    sources: dict[_Key, list[str]] = {}
    for name in sorted(ours, key=lambda name: name not in b):
        sources.setdefault(ours[name], []).append(name)
    moved = {}
    for name in reversed(theirs):
        known = sources.get(theirs[name])
        if known:
            moved[name] = known.pop() if len(known) > 1 else known[0]
    return moved


def _keys(
    nodes: Mapping[str, AnyNode],
    names: Iterable[str],
    look: Callable[[str, Begin], bytes],
    limits: Limits,
    progress: Callable[[int], None] = lambda _: None,
    *,
    step: int = 0,
) -> dict[str, _Key]:
    """What tensors are told apart by: shape and dtype, and what ``look`` says of their bytes."""
    rows = {name: (nodes[name],) for name in names}
    marks = SideBySide(rows, limits, held=240, in_order=True, step=step).run(look, progress)
    return {name: (nodes[name].spec, mark) for name, mark in marks.items()}


_ALIKE = b"alike"


def _read_head(_name: str, begin: Begin) -> bytes:
    """A digest of how a tensor begins, or `_ALIKE` if that is one value over and over."""
    for (items,) in begin():
        return _ALIKE if (items == items[0]).all() else hashlib.blake2b(items.data, digest_size=16).digest()
    return _ALIKE


def _digest(_name: str, begin: Begin) -> bytes:
    """A digest of all of a tensor."""
    digest = hashlib.blake2b(digest_size=24)
    for (items,) in begin():
        digest.update(items.data)
    return digest.digest()
