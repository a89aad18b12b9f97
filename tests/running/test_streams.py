"""How much of a file goes to a store at a time, and what memory that takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import numbered, run, write
from hypothesis import given
from hypothesis import strategies as st
from servers import Fault, s3

from streamconv.errors import BudgetError
from streamconv.planning.fitting import RESERVE, Budget, Fitting, _bytes_each
from streamconv.planning.plan import SourceFile
from streamconv.storage.objects import HELD, LARGEST, PART, PARTS, part_size, stream_bytes

MB = 10**6


@given(st.integers(0, 10**14), st.integers(0, 1 << 34))
def test_a_part_is_as_large_as_there_is_room_for(size: int, room: int) -> None:
    least, part = part_size(size), part_size(size, room)
    assert least <= part <= max(least, LARGEST)
    assert part == least or HELD * part <= room
    assert part * PARTS >= size
    assert part % (1 << 20) == 0
    if HELD * least <= room - (HELD << 20) and part < LARGEST:
        assert part > least


@pytest.mark.parametrize("path", ["https://host/file", "/file"])
def test_as_many_workers_copy_as_there_is_memory_for(path: str) -> None:
    sources = [SourceFile(path, 1, 0, 1)]
    stream = stream_bytes(10**9)
    each = _bytes_each(0, sources, stream)
    fitting = Fitting([], sources, stream)
    for workers in range(1, 8):
        limit = RESERVE + workers * each
        found = fitting.fit(Budget(limit, 16, lambda: 0), [], [])
        assert (found.workers, found.peak) == (workers, limit)
    with pytest.raises(BudgetError):
        fitting.fit(Budget(RESERVE + each - 1, 16, lambda: 0), [], [])


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    with s3() as store:
        yield store


@pytest.mark.slow
def test_one_file_goes_in_larger_parts_within_the_budget(bucket: Any, tmp_path: Path) -> None:
    """It has the memory of the workers that have nothing to do."""
    src = write(tmp_path / "src", numbered({f"{k}.w": (4000, 1500) for k in range(4)}))
    bucket.proxy.only = lambda request: "partNumber=2" in request.path
    bucket.proxy.faults, bucket.proxy.first = (Fault(status=400, body="<Error><Code>Odd</Code></Error>"),), 1
    command = [sys.executable, "-m", "streamconv", "convert", str(src), f"{bucket.url}/made", "--single-file", "--json", "-q"]
    done = subprocess.run(
        [*command, "--max-memory", "250MB"], env=os.environ | bucket.env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    found = json.loads(done.stdout)
    assert found["workers"] > 2
    assert found["peak_rss"] <= found["peak_memory"] <= 250 * MB
    parts = [request for request in bucket.requests if "partNumber=" in request.path]
    assert bucket.proxy.injected == 1  # after which the file was sent again
    assert min(request.received for request in parts if "partNumber=1&" in request.path) > PART
    assert run("convert", src, tmp_path / "local", "--single-file", "--quiet") == 0
    for path in (tmp_path / "local").iterdir():
        assert bucket.get(f"made/{path.name}") == path.read_bytes()
    assert not bucket.uploads()
