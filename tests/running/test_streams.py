"""How much of a file goes to a store at a time, and what memory that takes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import numbered, run, write
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import graphs, settings_of, thresholds, world
from servers import Fault, Request, flaky, s3

import streamconv
from streamconv.engine.worker import Workers
from streamconv.engine.writers import Stream
from streamconv.errors import BudgetError, RunError
from streamconv.planning.compiler import compile_plan
from streamconv.planning.fitting import RESERVE, Budget, Fitting, _bytes_each
from streamconv.planning.plan import SourceFile
from streamconv.running.making import make_files
from streamconv.running.stretches import cut, send
from streamconv.storage import retries
from streamconv.storage.objects import HELD, LARGEST, PARTS, part_size, stream_bytes
from streamconv.storage.sinks import open_sink
from tools import range_server

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


@pytest.fixture
def store(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty bucket that this process finds by its environment."""
    import s3fs

    for name, value in bucket.env.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    bucket.clear()
    yield bucket
    bucket.proxy.faults, bucket.proxy.only, bucket.proxy.first = (), None, 0
    bucket.clear()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one file, 40 MB."""
    return write(tmp_path_factory.mktemp("source"), numbered({f"{k}.w": (2500, 1000 + k) for k in range(4)}))


def parts_sent(store: Any) -> Counter[str]:
    """How often each part of the file was sent, by its number."""
    numbers = (re.search(r"partNumber=(\d+)", request.path) for request in store.requests if request.method == "PUT")
    return Counter(number[1] for number in numbers if number)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_stretches_hold_what_the_file_holds(data: st.DataObject) -> None:
    """Parts of any size, made by any thread in any order, are the bytes of the file."""
    with world() as here:
        data.draw(graphs(here))
        here.store()
        layouts = here.layouts(data.draw(st.integers(1, 3)))
        with settings_of(**data.draw(thresholds)):
            budget = Budget(1 << 40, 2, lambda: 0)
            plan = compile_plan(here.outputs, layouts, root="memory://cut", format="test", budget=budget, read_backend="pread")
            workers = Workers(plan)
            expected = here.expected(layouts)
            for number, file in enumerate(plan.files):
                part = data.draw(st.integers(2, 400))
                stretches = list(cut(plan, number, part))
                assert [stretch.start for stretch in stretches] == [0, *(stretch.stop for stretch in stretches[:-1])]
                assert stretches[-1].stop == file.size
                content, first = bytearray(file.size), 1
                for stretch in data.draw(st.permutations(stretches)):
                    at = stretch.start

                    def take(view: memoryview, content: bytearray = content) -> None:
                        nonlocal at
                        content[at : at + len(view)] = view
                        at += len(view)

                    stream = Stream(take, stretch.start)
                    send(stretch.pieces, workers.own, stream)
                    stream.fill(stretch.stop)
                    assert at == stretch.stop
                assert bytes(content) == expected[file.path]
                for stretch in stretches:
                    assert stretch.first == first
                    nbytes = stretch.stop - stretch.start
                    sizes = [min(stretch.part, nbytes - done) for done in range(0, nbytes, stretch.part or 1)]
                    assert all(size <= part for size in sizes)
                    assert stretch is stretches[-1] or all(size >= part // 2 - len(sizes) for size in sizes)  # which round up
                    first += len(sizes)
            workers.close()


def test_parts_of_one_file_are_on_their_way_together(store: Any, tmp_path: Path) -> None:
    """None of four is answered before all are there, and before that as many ranges were asked for."""
    sent, asked = threading.Barrier(4), threading.Barrier(4)

    def together(request: Request) -> bool:
        if "partNumber=" in request.path and int(request.path.partition("partNumber=")[2].partition("&")[0]) <= 4:
            sent.wait(120)
        return False

    def ahead(request: Request) -> bool:
        if request.range and (request.range[1] or 0) - request.range[0] > MB and request.range[0] < 32 * MB:
            asked.wait(120)
        return False

    store.proxy.faults, store.proxy.only = (Fault(),), together
    shapes = {f"{k}.w": ("bfloat16", (2500, 2000 + k)) for k in range(4)}
    given = ["--single-file", "--quiet", "-j", "4"]
    with range_server.serve(range_server.Checkpoint(shapes)) as server, flaky(server.url, Fault(), only=ahead) as proxy:
        assert run("convert", proxy.url, f"{store.url}/made", *given) == 0
        assert proxy.peak >= 4
        proxy.only = lambda _: False
        assert run("convert", proxy.url, tmp_path / "local", *given) == 0
    assert store.get("made/model.safetensors") == (tmp_path / "local" / "model.safetensors").read_bytes()
    assert set(parts_sent(store).values()) == {1}
    assert not store.uploads()


def test_a_part_that_fails_is_sent_again_alone(store: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.0)
    store.proxy.only = lambda request: "partNumber=2" in request.path
    store.proxy.faults, store.proxy.first = (Fault(status=400, body="<Error><Code>Odd</Code></Error>"),), 1
    assert run("convert", source, f"{store.url}/made", "--single-file", "--quiet") == 0
    assert run("convert", source, tmp_path / "local", "--single-file", "--quiet") == 0
    assert store.get("made/model.safetensors") == (tmp_path / "local" / "model.safetensors").read_bytes()
    sent = parts_sent(store)
    assert sent.pop("2") == 2
    assert set(sent.values()) == {1}
    assert not store.uploads()


@pytest.mark.parametrize("fault", ["part", "source"])
def test_what_cannot_be_completed_leaves_nothing(
    store: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.0)
    shutil.copytree(source, tmp_path / "src")
    plan = streamconv.plan(tmp_path / "src", f"{store.url}/made", single_file=True)

    def change(request: Request) -> bool:
        if "partNumber=3" in request.path:
            os.utime(tmp_path / "src" / "model.safetensors", ns=(1, 1))
        return fault == "part" and "partNumber=3" in request.path

    store.proxy.faults, store.proxy.only = (Fault(status=400, body="<Error><Code>Odd</Code></Error>"),), change
    with pytest.raises(RunError, match="it changed; plan again" if fault == "source" else "--resume"):
        make_files(plan, range(len(plan.files)), sink=open_sink(plan.root))
    assert not store.keys("made/model")
    assert not store.uploads()


@pytest.mark.slow
def test_parts_of_one_file_are_sent_within_the_budget(bucket: Any, source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streamconv", "convert", str(source), f"{bucket.url}/made", "--single-file", "--json", "-q"]
    done = subprocess.run(
        [*command, "--max-memory", "250MB"], env=os.environ | bucket.env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    result = json.loads(done.stdout)
    assert result["workers"] > 2
    assert result["peak_rss"] <= result["peak_memory"] <= 250 * MB
