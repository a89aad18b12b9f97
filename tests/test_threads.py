"""The pool of threads: what it does in which order, and which of several errors is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from streamconv.errors import Interrupted
from streamconv.threads import run_threads


def test_each_item_is_done_once_and_begun_in_order():
    begun, lock = list[int](), threading.Lock()

    def work(items: Iterator[int]) -> None:
        for item in items:
            with lock:
                begun.append(item)

    run_threads(1, work, iter(range(100)), threading.Event())
    assert begun == list(range(100))
    run_threads(5, work, iter(range(100, 1000)), threading.Event())
    assert sorted(begun) == list(range(1000))


def test_the_first_error_ends_the_work_and_is_told():
    stop, done = threading.Event(), list[int]()

    def work(items: Iterator[int]) -> None:
        for item in items:
            if item == 3:
                raise OSError("the disk")
            done.append(item)

    with pytest.raises(OSError, match="the disk"):
        run_threads(1, work, range(10), stop)
    assert stop.is_set()
    assert done == [0, 1, 2]


def test_what_ended_because_another_had_failed_is_not_told():
    both = threading.Barrier(2)

    def work(items: Iterator[str]) -> None:
        for item in items:
            both.wait(60)
            if item == "fails":
                stopped.wait(60)
                raise OSError("the disk")
            stopped.set()
            raise Interrupted("ended")

    stopped = threading.Event()
    with pytest.raises(OSError, match="the disk"):
        run_threads(2, work, ["fails", "ends"], threading.Event())
    with pytest.raises(Interrupted):
        run_threads(1, lambda _: (_ for _ in ()).throw(Interrupted("by its caller")), [], threading.Event())


def test_an_error_of_what_gives_items_is_one_of_the_work():
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        run_threads(3, lambda shared: [*shared] and None, items(), threading.Event())
