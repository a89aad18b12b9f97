"""What the device allows: the plainest program that reads and writes so many bytes past the page cache, and computes nothing.

Two threads, each with a buffer in a huge page, read chunks of the sources and write as large a share of the target, whose files are
allocated first. What it writes is what it has read last.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

CHUNK = 2 << 20  # bytes: a huge page
BLOCK = 4 << 10  # bytes
THREADS = 2


def huge_page() -> memoryview:
    """A buffer of `CHUNK` bytes in a huge page."""
    pages = mmap.mmap(-1, 2 * CHUNK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(pages)) % CHUNK
    pages.madvise(mmap.MADV_HUGEPAGE, start, CHUNK)
    return memoryview(pages)[start : start + CHUNK]


def chunks(descriptors: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Open files and their sizes to (file, offset) of each chunk."""
    return [(fd, offset) for fd, size in descriptors for offset in range(0, size, CHUNK)]


def create(folder: Path, total: int, shard: int) -> Iterator[tuple[int, int]]:
    """Files of ``shard`` bytes, ``total`` in all, allocated and open for direct writes."""
    for number, start in enumerate(range(0, total, shard)):
        size = -(-min(shard, total - start) // BLOCK) * BLOCK
        fd = os.open(folder / f"file-{number:05}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
        os.posix_fallocate(fd, 0, size)
        yield fd, size


def move(reads: Sequence[tuple[int, int]], writes: Sequence[tuple[int, int]]) -> None:
    """Reads these chunks, and between them writes those, evenly."""
    buffer, written = huge_page(), 0
    for number, (fd, offset) in enumerate(reads, 1):
        os.preadv(fd, [buffer], offset)
        while written < len(writes) * number // len(reads):
            target, place = writes[written]
            size = min(CHUNK, os.fstat(target).st_size - place)
            if os.pwrite(target, buffer[:size], place) != size:
                raise OSError(f"{place}: not all was written")
            written += 1


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", type=Path, nargs="+")
    parser.add_argument("--target", type=Path)
    parser.add_argument("--bytes", type=int, default=0)
    parser.add_argument("--shard-size", type=int, default=2 * 10**9)
    options = parser.parse_args(arguments)
    paths = sorted(path for folder in options.sources for path in folder.glob("*.safetensors"))
    reads = chunks([(os.open(path, os.O_RDONLY | os.O_DIRECT), path.stat().st_size) for path in paths])
    writes: list[tuple[int, int]] = []
    if options.target:
        options.target.mkdir()
        writes = chunks(list(create(options.target, options.bytes, options.shard_size)))
    threads = [threading.Thread(target=move, args=(reads[k::THREADS], writes[k::THREADS])) for k in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
