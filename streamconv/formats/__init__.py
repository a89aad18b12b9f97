"""Containers: what a checkpoint file holds and where, and how to lay out a new one.

A format never moves tensor bytes. It reads a table of contents (name -> dtype, shape, where the bytes lie) and it lays out
new files as literal bytes plus slots for tensors, which the engine fills.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from streamconv.digests import Checksum
from streamconv.graph.node import AnyNode, Extent, Node, Source
from streamconv.storage.folder import Location

__all__ = ["AnyNode", "Contents", "Extent", "FileLayout", "Node", "Source"]


@dataclass(slots=True)
class Contents:
    """A container's table of contents.

    ``entries`` is in tensor order: the index's file order (else file-name order), within a file by offset. What is not stored row by
    row in one piece is a layout of what is: a node whose ops move items and compute nothing.
    ``files`` are the weight files, ``others`` the files that belong to the container but hold no tensor (its index); ``notes`` say what
    else a user should know of them; ``config`` is what files say of their model, where that stands in them. ``beside`` is the folder, below
    that of the weights, with config and tokenizer, if it is another one. ``replicas`` are nodes that should hold the same bytes, and of
    which tensor they are; the first of each pair is read.
    """

    format: str
    entries: dict[str, AnyNode]
    files: list[Location]
    others: list[Location] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    beside: str = ""
    replicas: list[tuple[AnyNode, AnyNode, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A file to be written: ``size`` bytes, ``literals`` at their offsets, a slot (offset) for each tensor, and checksums.

    ``pieces`` are the tensors that lie in several ranges of the file: (offset, bytes) of each, the first at the slot; none ends inside an
    element. Literals lie neither in slots and pieces nor where checksums go.
    """

    path: str
    size: int
    literals: tuple[tuple[int, bytes], ...]
    slots: Mapping[str, int]
    checksums: tuple[Checksum, ...] = ()
    pieces: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
