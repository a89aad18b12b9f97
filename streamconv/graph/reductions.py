"""Small values that many regions need: each is made once in a process, by whoever needs it first, and kept while its node is."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from streamconv.graph.node import Node

if TYPE_CHECKING:
    from numpy import ndarray

    Array = ndarray[Any, Any]

_lock = Lock()
_values: WeakKeyDictionary[Node, tuple[Array, int]] = WeakKeyDictionary()
_making: WeakKeyDictionary[Node, Lock] = WeakKeyDictionary()


def value_of(node: Node, make: Callable[[], tuple[Array, int]]) -> tuple[Array, int]:
    """All of a node's output, and how many values overflowed for it.

    Who comes while another thread makes it waits, and makes it where that has failed.
    """
    with _lock:
        making = _making.setdefault(node, Lock())
    with making:
        value = _values.get(node)
        if value is None:
            value = _values[node] = make()
        return value
