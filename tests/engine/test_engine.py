"""The engine's fast paths give the bytes of its plain ones: direct reads, writes and copies, chunks, and the comparison afterwards."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoint_files import write
from hypothesis import given
from hypothesis import strategies as st

import streamconv
from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.engine import check, direct, edges, io, order
from streamconv.engine.check import OutputCheck
from streamconv.engine.direct import LEAST, DirectReader, allocate, open_direct
from streamconv.engine.io import BUFFER, CHUNK, PositionedReader, filled
from streamconv.engine.order import tasks_in_order
from streamconv.engine.readers import BACKENDS
from streamconv.engine.writers import LocalFiles, Stream
from streamconv.errors import RunError, SourceChanged
from streamconv.formats import Extent, FileLayout
from streamconv.graph.arena import place
from streamconv.graph.node import Source
from streamconv.memory import BLOCK, allocate_pages
from streamconv.planning.compiler import compile_plan
from streamconv.planning.fitting import Budget
from streamconv.planning.plan import Copy, Plan
from streamconv.running import filling
from streamconv.running.filling import LocalEngine
from streamconv.running.log import Log
from streamconv.threads import run_threads

SIZE = 4 * CHUNK + 12_345
DATA = random.Random(0).randbytes(SIZE)
OFFSETS = (0, 8, BLOCK - 1, BLOCK, CHUNK - 5, CHUNK)
LENGTHS = (0, 1, BLOCK, LEAST - 1, LEAST, CHUNK - BLOCK + 1, CHUNK, CHUNK + 1, 2 * CHUNK + BLOCK + 7)
RANGES = [(offset, length) for offset in OFFSETS for length in LENGTHS] + [(SIZE - length, length) for length in LENGTHS]


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "stored"
    path.write_bytes(DATA)
    return path


def make_cold(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def cached(path: Path) -> bool:
    """Whether the kernel says that a file is in the page cache: an old one says nothing, an overlay no, a tmpfs yes at any time."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return direct.is_cached(fd, 0, path.stat().st_size)
    finally:
        os.close(fd)


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def has_direct_io(path: Path) -> bool:
    if (fd := open_direct(str(path), os.O_RDONLY)) >= 0:
        os.close(fd)
    return fd >= 0


def refuse(call: Callable[..., int]) -> Callable[..., int]:
    """A file system that opens files for direct I/O and then has none."""

    def refusing(fd: int, *arguments: object) -> int:
        if is_direct(fd):
            raise OSError(errno.EINVAL, "refused")
        return call(fd, *arguments)

    return refusing


# ------------------------------------------------------------------------------------------------------------------ buffer


def test_the_buffer_lies_at_a_huge_page() -> None:
    buffer = allocate_pages(io.BUFFER)
    assert len(buffer) == BUFFER
    assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % CHUNK == 0
    buffer[:] = bytes(BUFFER)


@pytest.mark.parametrize("how", ["no such advice", "advice refused"])
def test_the_buffer_without_huge_pages(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(errno.EINVAL, "refused")

    if how == "no such advice":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    else:
        monkeypatch.setattr(mmap, "mmap", Refusing)
    buffer = allocate_pages(io.BUFFER)
    assert len(buffer) == BUFFER
    assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % BLOCK == 0
    buffer[:] = bytes(BUFFER)


def in_place(offset: int, length: int) -> memoryview:
    """Memory that lies as many bytes behind a block as ``offset`` does."""
    return memoryview(place(np.frombuffer(allocate_pages(length + BLOCK), np.uint8), length, 1, offset)).cast("B")


# ----------------------------------------------------------------------------------------------------------------- readers


@pytest.mark.sampled(3)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", ["cold", "warm", "refused"])
def test_every_reader_reads_what_is_there(stored: Path, monkeypatch: pytest.MonkeyPatch, backend: str, state: str) -> None:
    if state == "refused":
        monkeypatch.setattr(os, "preadv", refuse(os.preadv))
    direct_reads: list[int] = []
    real = direct._read_blocks
    monkeypatch.setattr(direct, "_read_blocks", lambda *given: direct_reads.append(given[1]) or real(*given))
    reader = BACKENDS[backend](2)
    for offset, length in RANGES:
        if state != "warm":
            make_cold(stored)
        view = bytearray(length)
        reader.read(str(stored), offset, memoryview(view))
        assert view == DATA[offset : offset + length]
        if state != "warm":
            make_cold(stored)
        placed = in_place(offset, length)
        reader.read(str(stored), offset, placed)
        assert placed == DATA[offset : offset + length]
        if length <= CHUNK:
            if state != "warm":
                make_cold(stored)
            at = reader.load(str(stored), offset, length, reader.buffer())
            assert reader.buffer()[at : at + length] == DATA[offset : offset + length]
    reader.close()
    if state != "warm":
        make_cold(stored)
    if backend == "auto" and has_direct_io(stored) and cached(stored) == (state == "warm"):
        assert bool(direct_reads) == (state != "warm")
        assert state != "refused" or len(direct_reads) == 1  # it is not tried again
        assert all(offset % BLOCK == 0 for offset in direct_reads)


@pytest.mark.skipif(not direct.AVAILABLE, reason="there is no direct I/O here")
@pytest.mark.parametrize("most", [1, 2, 1 << 20])
def test_a_range_that_lies_as_in_its_file_is_one_read(stored: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """With the blocks at its ends; or several, where the system reads at most so many blocks at once."""
    calls: list[int] = []

    def reading(fd: int, views: list[memoryview], offset: int) -> int:
        calls.append(fd)
        left, taken = most * BLOCK, []
        for view in views:
            taken.append(view[:left])
            left -= len(taken[-1])
        return real(fd, [view for view in taken if view], offset)

    real = os.preadv
    monkeypatch.setattr(direct, "is_cached", lambda *_: False)
    monkeypatch.setattr(os, "preadv", reading)
    reader = DirectReader(2)
    for offset, length in [*RANGES, (5, LEAST), (BLOCK, LEAST), (BLOCK - 1, LEAST + 2), (SIZE - LEAST - 7, LEAST + 7)]:
        if length < LEAST:
            continue
        calls.clear()
        placed = in_place(offset, length)
        reader.read(str(stored), offset, placed)
        assert placed == DATA[offset : offset + length]
        assert most < 1 << 20 or not has_direct_io(stored) or len(calls) == 1
    reader.close()


def test_a_file_that_the_page_cache_holds_in_part_is_read_directly(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even what of it is there: reads from there have the kernel read ahead, and soon all of it is."""
    direct_reads: list[int] = []
    real = direct._read_blocks
    monkeypatch.setattr(direct, "_read_blocks", lambda *given: direct_reads.append(given[1]) or real(*given))
    monkeypatch.setattr(direct, "is_cached", lambda *_: True)
    for share, is_direct in ((0.5, True), (0.95, False)):
        monkeypatch.setattr(direct, "_share_cached", lambda *_, share=share: share)
        direct_reads.clear()
        reader, view = DirectReader(2), bytearray(LEAST)
        reader.read(str(stored), 3, memoryview(view))
        reader.close()
        assert view == DATA[3 : 3 + LEAST]
        assert bool(direct_reads) == (is_direct and has_direct_io(stored))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [LEAST - 1, CHUNK, 2 * CHUNK])
def test_a_file_that_ends_early(stored: Path, backend: str, length: int) -> None:
    make_cold(stored)
    reader = BACKENDS[backend](2)
    with pytest.raises(SourceChanged, match="plan again"):
        reader.read(str(stored), SIZE - length + 1, memoryview(bytearray(length)))
    with pytest.raises(SourceChanged, match="plan again"):
        reader.read(str(stored), SIZE - length + 1, in_place(SIZE - length + 1, length))
    with pytest.raises(SourceChanged, match="plan again"):
        reader.load(str(stored), SIZE - min(length, CHUNK) + 1, min(length, CHUNK), reader.buffer())
    reader.close()


# ----------------------------------------------------------------------------------------------------------------- writers


def short(call: Callable[..., int], most: int) -> Callable[..., int]:
    return lambda fd, view, offset: call(fd, view[:most] if is_direct(fd) else view, offset)


@pytest.mark.parametrize(
    "pwrite",
    [os.pwrite, refuse(os.pwrite), short(os.pwrite, 3 * BLOCK), short(refuse(os.pwrite), 5)],
    ids=["direct", "refused", "short", "short, refused"],
)
def test_a_direct_write_changes_only_its_range(stored: Path, monkeypatch: pytest.MonkeyPatch, pwrite: Callable[..., int]) -> None:
    monkeypatch.setattr(os, "pwrite", pwrite)
    reader, files = PositionedReader(), LocalFiles(2, is_direct=True)
    data, expected = memoryview(random.Random(1).randbytes(SIZE)), bytearray(DATA)
    for offset, length in RANGES:
        with files.open(str(stored), reader.buffer, keeps_holes=False) as writer:
            writer.write(data[:length], offset)
        with files.settled(str(stored)):  # what comes next is of the same bytes
            expected[offset : offset + length] = data[:length]
        placed = in_place(offset, length)
        placed[:] = data[1 : length + 1]
        with files.open(str(stored), reader.buffer, keeps_holes=False) as writer:
            writer.write(placed, offset)
        with files.settled(str(stored)):
            expected[offset : offset + length] = placed
    buffer = reader.buffer()
    for at, length, offset in ((0, CHUNK, BLOCK), (7, CHUNK, 3 * BLOCK - 5), (BLOCK, CHUNK - 1, 5 * BLOCK)):  # from the buffer itself
        buffer[at : at + length] = data[:length]
        with files.open(str(stored), reader.buffer, keeps_holes=False) as writer:
            writer.write(buffer[at : at + length], offset)
        with files.settled(str(stored)):
            expected[offset : offset + length] = data[:length]
    files.close()
    assert stored.read_bytes() == expected
    make_cold(stored)
    assert stored.read_bytes() == expected


@pytest.mark.parametrize("most", [256, 1])
def test_blocks_that_ranges_share_are_written_once(stored: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Whichever range comes first, from any thread, and whenever the file is synced meanwhile."""
    monkeypatch.setattr(edges, "MOST", most)
    rng, files = random.Random(2), LocalFiles(2, is_direct=True)
    cuts = sorted({rng.randrange(0, SIZE, 2 * LEAST) + rng.randrange(LEAST) for _ in range(12)} | {5, SIZE})
    ranges = list(pairwise(cuts))
    rng.shuffle(ranges)
    data = memoryview(rng.randbytes(SIZE))
    through_cache: list[int] = []

    def pwrite(fd: int, view: memoryview, offset: int) -> int:
        if not is_direct(fd):
            through_cache.append(offset)
        return write_at(fd, view, offset)

    write_at = os.pwrite
    monkeypatch.setattr(os, "pwrite", pwrite)

    def work(queue: Iterator[tuple[int, int]]) -> None:
        reader = PositionedReader()
        for start, stop in queue:
            with files.open(str(stored), reader.buffer, keeps_holes=False) as writer:
                writer.write(data[start:stop], start)

    run_threads(3, work, ranges[:-2], threading.Event())
    unsynced = set(through_cache)
    with files.settled(str(stored)):
        pass
    run_threads(3, work, ranges[-2:], threading.Event())
    with files.settled(str(stored)) as fd:
        assert os.pread(fd, SIZE, 5) == data[5:]
    files.close()
    make_cold(stored)
    assert stored.read_bytes() == DATA[:5] + data[5:]
    if most > 1:
        assert unsynced <= {start for start, stop in ranges if stop - start < LEAST}


@given(st.data())
def test_edges_hand_on_all_bytes(data: st.DataObject) -> None:
    """In parts of any order, of blocks that are whole in the end or not, settled at any time."""
    size = 3 * BLOCK
    cuts = sorted({0, size} | data.draw(st.sets(st.integers(1, size - 1), max_size=8)) | {BLOCK, 2 * BLOCK})
    parts = data.draw(st.permutations(list(pairwise(cuts))))
    whole, made, own = random.Random(3).randbytes(size), bytearray(size), edges.Edges()
    written: list[int] = []

    def write_to(view: memoryview, offset: int) -> None:
        made[offset : offset + len(view)] = view
        written.append(len(view))

    left_out = data.draw(st.integers(0, len(parts) - 1))
    times = data.draw(st.sets(st.integers(0, len(parts))))
    for number, (start, stop) in enumerate(parts):
        if number in times:
            own.settle(write_to)
        if number != left_out:
            own.add(memoryview(whole)[start:stop], start, write_to)
    if not times:
        assert set(written) <= {BLOCK}
    own.settle(write_to)
    start, stop = parts[left_out]
    assert made == whole[:start] + bytes(stop - start) + whole[stop:]
    own.settle(write_to)
    assert not own._blocks


@given(st.lists(st.booleans(), max_size=6), st.integers(0, 15))
def test_blocks_of_zeros_stay_holes(blocks: list[bool], rest: int) -> None:
    data = b"".join((b"a" if full else b"\0") * 16 for full in blocks) + b"b" * rest
    ranges = [*filled(memoryview(data), 16)]
    kept = bytearray(len(data))
    for start, stop in ranges:
        kept[start:stop] = data[start:stop]
    assert kept == data
    assert all(any(data[at : at + 16]) for start, stop in ranges for at in range(start, stop, 16))
    assert all(stop < start for (_, stop), (start, _) in pairwise(ranges))


def test_a_stream_sends_zeros_for_what_is_left_out_and_nothing_twice() -> None:
    sent: list[bytes] = []
    stream = Stream(lambda view: sent.append(bytes(view)))
    stream.write(memoryview(b"abc"), 2)
    stream.write(memoryview(b"de"), 5)
    assert not stream.copy_from(0, 0, 1, 7, "")
    stream.fill(100_000)
    assert b"".join(sent) == b"\0\0abcde" + bytes(100_000 - 7)
    assert stream.sent == 100_000
    with pytest.raises(AssertionError):
        stream.write(memoryview(b"x"), 99_999)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINTR, errno.ENOSPC])
def test_blocks_that_cannot_be_reserved(stored: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fallocate(*_: object) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(direct, "_libc", SimpleNamespace(fallocate=fallocate))
    with stored.open("r+b") as file:
        if number == errno.ENOSPC:
            with pytest.raises(OSError, match="space"):
                allocate(file.fileno(), SIZE)
        else:
            allocate(file.fileno(), SIZE)


# -------------------------------------------------------------------------------------------------------------------- runs


def make_plan(stored: Path, backend: str = "auto") -> Plan:
    """Ranges of one source in two files, at every distance from a block on both sides; what they hold is `expected`."""
    outputs: dict[str, Source] = {}
    layouts = []
    for number, start in enumerate((3, BLOCK - 8)):
        slots, at = {}, start
        for offset, length in RANGES[number::2]:
            name = f"{number}.{len(slots)}"
            outputs[name] = Source(TensorSpec(DTYPES["uint8"], (length,)), (Extent(str(stored), offset, length),))
            slots[name], at = at, at + length
        layouts.append(FileLayout(f"out{number}", at, ((0, b"x" * start),), slots))
    layouts.append(FileLayout("commit", 1, ((0, b"!"),), {}))
    root = stored.parent / "made"
    root.mkdir()
    return compile_plan(outputs, layouts, root=str(root), format="test", budget=Budget(1 << 40, 3, lambda: 0), read_backend=backend)


def expected(number: int, start: int) -> bytes:
    return b"x" * start + b"".join(DATA[offset : offset + length] for offset, length in RANGES[number::2])


def run(plan: Plan) -> None:
    LocalEngine(plan, Log()).run()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", ["cold", "warm", "refused", "shared"])
def test_copies_are_the_same_however_they_are_made(stored: Path, monkeypatch: pytest.MonkeyPatch, backend: str, state: str) -> None:
    if state == "refused":
        monkeypatch.setattr(os, "preadv", refuse(os.preadv))
        monkeypatch.setattr(os, "pwrite", refuse(os.pwrite))
    monkeypatch.setattr(filling, "shares_extents", lambda _: state == "shared")
    if state == "cold":  # what short reads have brought into the page cache with them is read directly, too
        monkeypatch.setattr(direct, "is_cached", lambda *_: False)
    monkeypatch.setattr(order, "COPY_CHUNK", CHUNK + 3 * BLOCK)
    reserved: list[int] = []
    real = allocate
    monkeypatch.setattr(filling, "allocate", lambda fd, nbytes: reserved.append(nbytes) or real(fd, nbytes))
    plan = make_plan(stored, backend)
    if state != "warm":
        make_cold(stored)
    run(plan)
    assert sorted(reserved) == (sorted(file.size for file in plan.files) if backend == "auto" and state != "shared" else [])
    for number, start in enumerate((3, BLOCK - 8)):
        path = Path(plan.root) / f"out{number}"
        make_cold(path)
        assert path.read_bytes() == expected(number, start)
    assert OutputCheck(plan).run() is None


def test_files_made_of_holes_are_not_reserved(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored.unlink()
    stored.touch()
    os.truncate(stored, SIZE)
    if stored.stat().st_blocks:
        pytest.skip("no holes here")
    reserved: list[int] = []
    monkeypatch.setattr(filling, "shares_extents", lambda _: False)
    monkeypatch.setattr(filling, "allocate", lambda _, nbytes: reserved.append(nbytes))
    plan = make_plan(stored)
    run(plan)
    assert reserved == [1]  # of the commit
    assert (Path(plan.root) / "out0").stat().st_blocks < 64


def test_no_room_to_reserve_is_told_before_anything_is_copied(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(filling, "shares_extents", lambda _: False)
    monkeypatch.setattr(filling, "allocate", full)
    plan = make_plan(stored)
    with pytest.raises(RunError, match="no room left on the disk"):
        run(plan)
    assert not (Path(plan.root) / "out0").exists()


def test_tasks_of_a_copy_begin_at_blocks_of_the_target(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "COPY_CHUNK", 16 * BLOCK)
    plan = make_plan(stored)
    covered: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    firsts = {(number, segment.dst) for number, file in enumerate(plan.files) for segment in file.segments if isinstance(segment, Copy)}
    for number, segment, _ in tasks_in_order(plan, range(len(plan.files))):
        assert isinstance(segment, Copy)
        assert 0 < segment.nbytes <= 16 * BLOCK
        assert (number, segment.dst) in firsts or segment.dst % BLOCK == 0
        covered[number].append((segment.dst, segment.nbytes))
    for number, start in enumerate((3, BLOCK - 8)):
        at = start
        for dst, nbytes in sorted(covered[number]):
            assert dst == at
            at += nbytes
        assert at == plan.files[number].size


# ------------------------------------------------------------------------------------------------------------------- check


@pytest.mark.sampled(3)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_wrong_byte_anywhere_is_found(stored: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(direct, "is_cached", lambda *_: False)  # so that the longer reads are all direct
    plan = make_plan(stored, backend)
    run(plan)
    path = Path(plan.root) / "out1"
    good = path.read_bytes()
    for at in (0, BLOCK - 9, BLOCK - 8, check.STEP, check.STEP + BLOCK, CHUNK, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:at] + bytes([good[at] ^ 128]) + good[at + 1 :])
        make_cold(path)
        assert OutputCheck(plan).run() == "out1", at
    path.write_bytes(good)
    assert OutputCheck(plan).run() is None


def test_equal_sees_every_byte() -> None:
    data = DATA[:41]
    for length in range(len(data)):
        for start in (0, 1):
            one = memoryview(data)[start : start + length]
            other = bytearray(one)
            assert check._equal(one, memoryview(other))
            for at in range(len(other)):
                other[at] ^= 1
                assert not check._equal(one, memoryview(other))
                other[at] ^= 1


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel copies out of a map there only")
@pytest.mark.parametrize("length", [100, 4096 * 64, 4096 * 64 + 100])
def test_a_map_that_ends_meanwhile_is_an_error_and_no_signal(tmp_path, length):
    """As a disk's error is: both are fatal to who touches the page."""
    (tmp_path / "file").write_bytes(b"x" * 4096 * 100)
    code = (
        "import mmap, os, sys\nfrom streamconv.engine import io\n"
        "make = mmap.mmap\n"
        "def shrink(*given, **more):\n    made = make(*given, **more)\n    os.truncate(sys.argv[1], int(sys.argv[2]))\n    return made\n"
        "mmap.mmap = shrink\n"
        "io.MappedReader().read(sys.argv[1], 5, memoryview(bytearray(4096 * 99)))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "file", str(length)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"file: ends at byte {length}, " in done.stderr


def test_a_task_looks_at_its_own_source_and_no_other(tmp_path, monkeypatch):
    """With as many sources as tasks, a look at all of them for each task would take the square."""
    write(tmp_path / "src", {f"w{k}": torch.ones(8) for k in range(30)}, shards=30)
    looked: list[str] = []
    real = filling.fingerprint
    monkeypatch.setattr(filling, "fingerprint", lambda path: looked.append(path) or real(path))
    streamconv.convert(tmp_path / "src", tmp_path / "dst")
    assert len(looked) <= 5 * 30
