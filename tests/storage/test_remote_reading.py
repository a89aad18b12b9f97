"""Bytes from servers: what is asked for, what happens when it does not come, and that a conversion makes the same of it."""

from __future__ import annotations

import filecmp
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import numbered, random_tensor, run, write, write_both
from hub_server import hub
from hypothesis import given
from hypothesis import strategies as st
from servers import Fault, Flaky, Nginx, Request, computed, flaky, nginx, s3, unavailable

from streamconv.conversion import api
from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.engine import order
from streamconv.engine.remote import join
from streamconv.errors import Interrupted, RunError, SourceChanged, UsageError
from streamconv.formats import Extent, Source
from streamconv.graph import evaluate
from streamconv.graph.moves import Move, region
from streamconv.graph.tiles import choose_tile
from streamconv.running import filling
from streamconv.running.directory import Directory
from streamconv.running.filling import LocalEngine
from streamconv.running.log import Log
from streamconv.running.output import LOG, finished_files
from streamconv.storage import Version, ranges, retries, stores, web
from streamconv.storage.addresses import public
from streamconv.storage.ranges import Ranges, read_range
from streamconv.storage.retries import ATTEMPTS

KB, MB = 1 << 10, 1 << 20
DATA = np.random.default_rng(0).integers(0, 256, 5 * MB + 123, dtype=np.uint8).tobytes()


class Clock(threading.Event):
    """A stop flag that notes how long it is waited for, and does not wait."""

    def __init__(self, stop_after: int = -1) -> None:
        super().__init__()
        self.waits: list[float] = []
        self._stop_after = stop_after

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0.0)
        if len(self.waits) == self._stop_after:
            self.set()
        return self.is_set()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("served")
    (made / "data").write_bytes(DATA)
    return made


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Nginx]:
    with nginx(folder) as made:
        yield made


@pytest.fixture
def proxy(server) -> Iterator[Flaky]:
    with flaky(server.url) as made:
        yield made


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)


def take(reader: Ranges, url: str, start: int, stop: int, step: int = 1 << 30) -> bytes:
    """Bytes [start, stop) of a file, read ``step`` at a time."""
    found = bytearray(stop - start)
    for at in range(0, len(found), step):
        reader.read(url, start + at, memoryview(found)[at : at + step])
    return bytes(found)


def asked(server: Flaky) -> list[tuple[int, int]]:
    """The ranges a server was asked for, first byte and the one after the last."""
    return [(at[0], (at[1] or 0) + 1) for request in server.requests if (at := request.range)]


# Requests ------------------------------------------------------------------------------------------------------------


def test_a_range_is_one_request(proxy):
    reader = Ranges()
    assert take(reader, f"{proxy.url}/data", 1000, 3 * MB) == DATA[1000 : 3 * MB]
    assert asked(proxy) == [(1000, 3 * MB)]
    assert proxy.requests[0].headers["accept-encoding"] == "identity"
    reader.close()


def test_what_is_announced_is_asked_for_at_once_and_received_as_it_is_read(proxy):
    reader, url = Ranges(), f"{proxy.url}/data"
    reader.expect([(url, 0, 2 * MB), (url, 3 * MB, 4 * MB)])
    assert take(reader, url, 0, 2 * MB, 100 * KB) == DATA[: 2 * MB]
    assert take(reader, url, 3 * MB, 4 * MB, 100 * KB) == DATA[3 * MB : 4 * MB]
    assert asked(proxy) == [(0, 2 * MB), (3 * MB, 4 * MB)]
    reader.close()


def test_small_gaps_are_received_for_nothing(proxy):
    reader, url = Ranges(), f"{proxy.url}/data"
    pieces = [(k * 100 * KB, k * 100 * KB + 5) for k in range(20)]
    reader.expect(join((url, start, stop - start) for start, stop in pieces))
    assert b"".join(take(reader, url, *piece) for piece in pieces) == b"".join(DATA[a:b] for a, b in pieces)
    assert asked(proxy) == [(0, pieces[-1][1])]
    reader.close()


def test_files_that_are_read_by_turns_are_streamed_side_by_side(proxy, folder):
    for name in "abc":
        (folder / name).write_bytes(DATA[: 300 * KB])
    reader, urls = Ranges(), [f"{proxy.url}/{name}" for name in "abc"]
    reads = [(url, at, 100 * KB) for at in range(0, 300 * KB, 100 * KB) for url in urls]
    reader.expect(join(reads))
    for url, at, size in reads:
        assert take(reader, url, at, at + size) == DATA[at : at + size]
    assert asked(proxy) == [(0, 300 * KB)] * 3
    reader.close()


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3 * MB), st.integers(1, MB)), max_size=12))
def test_joined_requests_cover_what_is_read(reads):
    reads = [(f"http://host/{name}", start, size) for name, start, size in reads]
    found = list(join(reads))
    for url, start, size in reads:
        assert any(name == url and first <= start and start + size <= stop for name, first, stop in found)
    assert len(found) <= len(reads)
    assert list(join([("/a/path", 0, 10)])) == []


def test_connections_are_kept(server):
    web._session.cache_clear()
    reader, url = Ranges(), f"{server.url}/data"
    take(reader, url, 0, 10)
    for start in range(0, MB, 100 * KB):
        take(reader, url, start, start + 10)
    pools = web._session().get_adapter(url).poolmanager.pools
    (pool,) = [pools.get(key) for key in pools.keys()]  # noqa: SIM118 - it is no mapping
    assert (pool.num_connections, pool.num_requests) == (1, 12)
    reader.close()


# Failures ------------------------------------------------------------------------------------------------------------


FAULTS = {
    "unavailable": [unavailable()],
    "all kinds of unavailable": [Fault(status=status) for status in (500, 502, 503, 504, 429)],
    "cut after 1 MB": [Fault(cut=MB)],
    "cut after 100 KB": [Fault(cut=100 * KB)],
    "cut after 10 bytes": [Fault(cut=10)],
    "reset": [Fault(cut=100 * KB, reset=True)],
    "no answer": [Fault(drop=True)],
    "short": [Fault(shorten=1000)],
    "stall": [Fault(cut=200 * KB, stall=1.0)],
    "other range": [Fault(headers={"Content-Range": f"bytes 0-9/{len(DATA)}"})],
    "no range": [Fault(headers={"Content-Range": ""})],
}


def at_most(times: int) -> Callable[[Request], bool]:
    """Which requests may fail: not the same one more often than that, since in the end that is given up, whoever draws the faults."""
    seen: Counter[tuple[str, object]] = Counter()

    def only(request: Request) -> bool:
        if (request.range or (0, 0))[1] == 0:
            return False
        seen[request.path, request.range] += 1
        return seen[request.path, request.range] <= times

    return only


@pytest.mark.parametrize("kind", FAULTS)
def test_what_fails_is_gone_on_with(proxy, kind, monkeypatch):
    if kind == "stall":
        monkeypatch.setattr(web, "SILENCE", 0.5)
    proxy.faults, proxy.probability = FAULTS[kind], 0.6 if kind != "stall" else 0.3
    proxy.only = at_most(4)
    reader = Ranges()
    assert take(reader, f"{proxy.url}/data", 77, len(DATA), 300 * KB) == DATA[77:]
    assert proxy.injected
    reader.close()


@pytest.mark.parametrize("cut", [MB, 100 * KB])
def test_a_server_that_always_cuts_is_put_up_with(proxy, cut):
    """No byte is asked for twice, and nothing waited for: each connection brings something."""
    proxy.faults, stop = [Fault(cut=cut)], Clock()
    reader, url = Ranges(stop=stop), f"{proxy.url}/data"
    reader.expect([(url, 0, len(DATA))])
    assert take(reader, url, 0, len(DATA), MB) == DATA
    assert asked(proxy) == [(start, len(DATA)) for start in range(0, len(DATA), cut)]
    assert set(stop.waits) == {0.0}
    reader.close()


def test_attempts_are_bounded_and_wait_longer_each_time(proxy, monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.5)
    proxy.faults, stop = [unavailable()], Clock()
    reader = Ranges(stop=stop)
    with pytest.raises(RunError, match=rf"^{proxy.url}/data, byte 5: HTTP 503, {ATTEMPTS} times in a row: .*--resume$"):
        take(reader, f"{proxy.url}/data", 5, 10)
    assert len(proxy.requests) == ATTEMPTS
    for k, seconds in enumerate(stop.waits):
        longest = min(retries.LONGEST_WAIT, 0.5 * 2**k)
        assert longest / 2 <= seconds <= longest
    assert len(stop.waits) == ATTEMPTS - 1
    reader.close()


@pytest.mark.parametrize(
    ("text", "wait"), [("7", 7.0), ("100000", retries.LONGEST_ASKED), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("soon", None)]
)
def test_a_server_may_say_how_long_to_wait(proxy, text, wait):
    proxy.faults, proxy.first, stop = [unavailable(text)], 1, Clock()
    reader = Ranges(stop=stop)
    assert take(reader, f"{proxy.url}/data", 0, 10) == DATA[:10]
    assert len(stop.waits) == 1
    assert stop.waits[0] == wait if wait is not None else stop.waits[0] < 0.01
    reader.close()


def test_stopping_ends_the_waits(proxy):
    proxy.faults, stop = [unavailable("200")], Clock(stop_after=2)
    reader = Ranges(stop=stop)
    with pytest.raises(Interrupted):
        take(reader, f"{proxy.url}/data", 0, 10)
    assert len(proxy.requests) == 2
    reader.close()


@pytest.mark.parametrize(
    ("small", "patience", "unreached", "attempts"),
    [(False, -1.0, True, 6), (True, 1e9, False, 6), (True, 1e9, True, 3), (True, -1.0, False, 1)],
    ids=["large", "small", "nobody there", "late"],
)
def test_what_is_small_is_given_up_soon(monkeypatch, small, patience, unreached, attempts):
    monkeypatch.setattr(retries, "PATIENCE", patience)
    made: list[None] = []

    def fail() -> None:
        made.append(None)
        raise retries.Failed("no", unreached=unreached)

    with pytest.raises(RunError, match=rf"^what: no answer \(no, attempts: {attempts}\): "):
        retries.again(fail, "what", 6, small=small, stop=Clock())
    assert len(made) == attempts


def test_nobody_listens():
    reader = Ranges()
    with pytest.raises(RunError, match=r"http://127.0.0.1:9/data, byte 3: Connection refused, 8 times in a row"):
        take(reader, "http://127.0.0.1:9/data", 3, 10)
    reader.close()


# Another file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers", [{"ETag": '"other"'}, {"Content-Range": f"bytes {2 * MB}-{3 * MB - 1}/{len(DATA) + 1}"}], ids=["tag", "size"]
)
@pytest.mark.parametrize("known", [True, False])
def test_another_version_in_the_middle_is_refused(proxy, headers, known):
    url = f"{proxy.url}/data"
    reader = Ranges({url: stores.store_of(url).entry(url)} if known else None)
    take(reader, url, 0, 2 * MB)
    proxy.faults = [Fault(headers=headers)]
    with pytest.raises(SourceChanged, match=rf"^{url}: planned .* it changed; plan again$"):
        take(reader, url, 2 * MB, 3 * MB)
    reader.close()


def test_tags_with_and_without_quotes_are_the_same(server):
    url = f"{server.url}/data"
    entry = stores.store_of(url).entry(url)
    for tag in (entry.tag, entry.tag.strip('"'), f"W/{entry.tag}"):
        reader = Ranges({url: Version(entry.size, tag)})
        assert take(reader, url, 0, 10) == DATA[:10]
        reader.close()


def test_a_file_that_ends_early_is_refused(server):
    with pytest.raises(SourceChanged, match="ends before byte"):
        read_range(f"{server.url}/data", len(DATA), memoryview(bytearray(10)))


def test_a_file_may_be_another_one_the_next_time_it_is_opened(server, folder):
    url = f"{server.url}/changing"
    for content in (b"one", b"other"):
        (folder / "changing").write_bytes(content)
        entry, found = stores.store_of(url).entry(url), bytearray(len(content))
        read_range(url, 0, memoryview(found), entry.tag)
        assert bytes(found) == content
    with pytest.raises(SourceChanged):
        read_range(url, 0, memoryview(found), '"first"')


def test_whole_files_are_refused(server):
    with pytest.raises(UsageError, match=r"/noranges/data: .*no range"):
        read_range(f"{server.url}/noranges/data", 0, memoryview(bytearray(10)))


@pytest.mark.parametrize(("path", "status"), [("forbidden/data", 403), ("private/data", 401), ("nothing", 404)])
def test_a_refusal_in_the_middle_is_a_line_that_says_how_to_go_on(server, path, status):
    url = public(f"{server.url}/{path}?token=hush")
    for read, kind, end in ((Ranges().read, RunError, "--resume"), (read_range, UsageError, "")):
        with pytest.raises(kind, match=rf"HTTP {status}.*{end}$") as caught:
            read(url, 5, memoryview(bytearray(10)))
        assert "hush" not in str(caught.value)


def test_redirects_are_asked_for_once(server):
    with flaky(server.url, host="127.0.0.2") as elsewhere, nginx(server.root, elsewhere=elsewhere.url) as front, flaky(front.url) as hub:
        reader, url = Ranges(), f"{hub.url}/elsewhere/data"
        for start in range(0, MB, 100 * KB):
            assert take(reader, url, start, start + 10) == DATA[start : start + 10]
        assert (len(hub.requests), len(elsewhere.requests)) == (1, 11)
        elsewhere.faults, elsewhere.first = [Fault(status=403)], len(elsewhere.requests) + 1
        elsewhere.faults, elsewhere.first = [Fault(status=403)], 1
        assert take(reader, url, MB, MB + 10) == DATA[MB : MB + 10]
        assert len(hub.requests) == 2
        reader.close()


# Stores without an address -------------------------------------------------------------------------------------------


class Pieces:
    """A store that fails as it is told to: `None`, or an error, for each fetch."""

    def __init__(self, *failures: Exception | None) -> None:
        self.failures, self.sizes = list(failures), []

    def request(self, url: str) -> None:
        assert url == "any://data"

    def fetch(self, url: str, start: int, stop: int) -> bytes:
        assert url == "any://data"
        self.sizes.append(stop - start)
        if self.failures and (failure := self.failures.pop(0)) is not None:
            raise failure
        return DATA[start:stop]

    def receive(self, url: str, start: int, stop: int) -> None:
        assert url == "any://data"
        assert start < stop


def test_pieces_shrink_with_failures_and_grow_again(monkeypatch):
    store = Pieces(None, None, *[TimeoutError()] * 4, OSError(5, "broken"), None, OSError(5, "broken"))
    monkeypatch.setattr(ranges, "store_of", lambda _: store)
    reader = Ranges()
    reader.expect([("any://data", 0, len(DATA))])
    assert take(reader, "any://data", 0, len(DATA), 700 * KB) == DATA
    assert [size // KB for size in store.sizes[:12]] == [1024, 2048, 2048, 1024, 512, 256, 128, 64, 128, 64, 128, 256]
    assert max(store.sizes) == 2 * MB
    reader.close()


def test_an_end_in_a_store_without_an_address_is_a_line(monkeypatch):
    for failure, kind in (
        (FileNotFoundError(), SourceChanged),
        (PermissionError(13, "Access denied"), RunError),
        (UsageError("no"), UsageError),
    ):
        monkeypatch.setattr(ranges, "store_of", lambda _, failure=failure: Pieces(failure))
        with pytest.raises(kind):
            take(Ranges(), "any://data", 0, 10)
    monkeypatch.setattr(ranges, "store_of", lambda _: Pieces(*[ValueError("secret")] * ATTEMPTS))
    with pytest.raises(RunError, match=r"^any://data, byte 0: ValueError, 8 times in a row") as caught:
        take(Ranges(), "any://data", 0, 10)
    assert "secret" not in str(caught.value)


# Tiles ---------------------------------------------------------------------------------------------------------------


def requests_for(sizes: tuple[int, ...], dst: tuple[int, ...], src: tuple[int, ...], itemsize: int, tile: int) -> tuple[int, float]:
    """How many requests a rearrangement takes in tiles of so many bytes, and how often it receives its source."""
    move = Move(sizes, 0, dst, 0, src)
    last = sum((n - 1) * s for n, s in zip(sizes, src, strict=True))
    leaf = Source(
        TensorSpec(DTYPES[{2: "bfloat16", 4: "float32"}[itemsize]], (last + 1,)), (Extent("http://h/f", 8, (last + 1) * itemsize),)
    )
    count = received = 0
    for part in move.tiles(choose_tile(sizes, dst, src, tile // itemsize, itemsize).sizes):
        wanted = Move(part.sizes, 0, region(part).dst_strides, part.src, part.src_strides)
        for _, start, stop in join(evaluate.reads(leaf, wanted.simplify())):
            count, received = count + 1, received + stop - start
    return count, received / (move.numel * itemsize)


@pytest.mark.parametrize(
    ("sizes", "dst", "src", "tile", "most", "share"),
    [
        ((28672, 8192), (8192, 1), (1, 28672), 32 * MB, 15, 1.01),
        ((28672, 8192), (8192, 1), (1, 28672), 8 * MB, 58, 1.01),
        ((28672, 8192), (8192, 1), (1, 28672), MB, 512, 2.01),
        ((64, 2, 64, 8192), (128 * 8192, 64 * 8192, 8192, 1), (128 * 8192, 8192, 2 * 8192, 1), 8 * MB, 16, 1.01),
        ((8, 8, 128, 4096), (10 * 128 * 4096, 128 * 4096, 4096, 1), (8 * 128 * 4096, 128 * 4096, 4096, 1), 8 * MB, 8, 1.01),
    ],
    ids=["transpose", "transpose in 8 MB", "transpose in 1 MB", "rotary halves", "heads"],
)
def test_a_rearranged_tensor_is_received_once_and_in_large_pieces(sizes, dst, src, tile, most, share):
    count, received = requests_for(sizes, dst, src, 2, tile)
    assert count <= most
    assert received <= share


# Conversions ---------------------------------------------------------------------------------------------------------

SMALL = ["--max-shard-size", "2MB", "--quiet"]
RECIPES = {
    "fuse": [{"rule": "{i}.{q,k,v}", "right": "{i}.qkv", "layout": "(h q) c, h c, h c -> (h (q + 1 + 1)) c", "dims": {"h": 8}}],
    "transpose": [{"rule": f"{{i}}.{name}", "right": f"{{i}}.{name}", "layout": "a b -> b a"} for name in "qkv"],
}
CONVERSIONS = {
    "re-shard": [],
    "cast": ["--dtype", "bfloat16"],
    "fuse": ["--recipe", "{recipes}/fuse.yaml"],
    "transpose": ["--recipe", "{recipes}/transpose.yaml"],
    "transpose and cast": ["--recipe", "{recipes}/transpose.yaml", "--dtype", "float16"],
    "to torch": ["--format", "torch"],
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """The same tensors as ``safetensors/`` and ``bin/``, and recipe files."""
    made = tmp_path_factory.mktemp("checkpoints")
    shapes = {f"{k}.{name}": (rows, 500 + k) for k in range(4) for name, rows in (("q", 800), ("k", 8), ("v", 8))}
    return write_both(made, numbered(shapes), RECIPES)


@pytest.fixture(scope="module")
def library(checkpoints) -> Iterator[Nginx]:
    with nginx(checkpoints) as made:
        yield made


def options(name: str, checkpoints: Path) -> list[str]:
    return [option.format(recipes=checkpoints) for option in CONVERSIONS[name]]


def same_files(one: Path, other: Path) -> None:
    """The same names and bytes in both directories."""
    names = sorted(path.relative_to(one).as_posix() for path in one.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(other).as_posix() for path in other.rglob("*") if path.is_file())
    assert filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])
    assert names


@pytest.mark.parametrize("container", ["safetensors", "bin"])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_the_result_is_that_of_the_local_conversion(library, checkpoints, tmp_path, name, container):
    faults = [Fault(cut=300 * KB), unavailable("0"), Fault(drop=True), Fault(shorten=5000), Fault(cut=1000, reset=True)]
    given = options(name, checkpoints)
    assert run("convert", checkpoints / container, tmp_path / "local", *SMALL, *given) == 0
    with flaky(library.url, *faults, probability=0.3, only=at_most(3)) as proxy:
        url = f"{proxy.url}/{container}"
        assert run("convert", url, tmp_path / "remote", *SMALL, *given, "--verify") == 0
        assert proxy.injected
        recipe = [option for option in given if name != "to torch"]
        assert run("verify", url, tmp_path / "remote", *recipe) == 0
        if not recipe:
            assert run("verify", tmp_path / "remote", url) == 0
    same_files(tmp_path / "remote", tmp_path / "local")


def test_a_difference_is_found_behind_a_url(library, checkpoints, tmp_path, capsys):
    assert run("convert", checkpoints / "safetensors", tmp_path / "made", *SMALL) == 0
    file = next((tmp_path / "made").glob("*2-of-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 255
    file.write_bytes(data)
    with nginx(tmp_path) as server:
        for sides in ([library.url + "/safetensors", tmp_path / "made"], [checkpoints / "safetensors", server.url + "/made"]):
            assert run("verify", *sides) == 1
            assert "differs: " in capsys.readouterr().out


def test_copies_are_one_request_each(library, tmp_path, monkeypatch):
    with flaky(library.url) as proxy:
        made = api.plan(f"{proxy.url}/safetensors", tmp_path / "dst", max_memory="4GB")
        copies = [(s.offset, s.offset + s.nbytes) for file in made.files for s in file.segments]
        proxy.forget()
        (tmp_path / "dst").mkdir()
        LocalEngine(made, Log()).run()
        assert sorted(at for at in asked(proxy) if at != (0, 1)) == sorted(copies)
        assert proxy.sent < sum(stop - start for start, stop in copies) + 100


def test_another_source_is_noticed(checkpoints, library, tmp_path, capsys):
    with flaky(library.url) as proxy:
        made = api.plan(f"{proxy.url}/safetensors", tmp_path / "dst", max_memory="4GB")
        proxy.faults = [Fault(headers={"ETag": '"other"'})]
        with pytest.raises(SourceChanged, match="it changed; plan again"):
            api.run(made)
        proxy.faults = ()
        api.run(made)


def test_sources_are_looked_at_now_and_then(library, tmp_path, monkeypatch):
    looked: list[object] = []
    monkeypatch.setattr(filling, "check_files", looked.append)
    monkeypatch.setattr(order, "COPY_CHUNK", 64 * KB)
    monkeypatch.setattr(filling, "LOOK_SECONDS", 1e9)
    made = api.plan(f"{library.url}/safetensors", tmp_path / "dst", max_memory="4GB")
    (tmp_path / "dst").mkdir()
    LocalEngine(made, Log()).run()
    assert len(looked) < 10  # before, after, and for each file
    looked.clear()
    monkeypatch.setattr(filling, "LOOK_SECONDS", 0.0)
    engine = LocalEngine(made, Log(), suffix=".again")
    engine.run()
    assert len(looked) > 100


def test_a_plan_knows_the_version_of_its_sources(library, checkpoints, tmp_path):
    made = api.plan(f"{library.url}/safetensors", tmp_path / "dst", max_memory="4GB")
    assert all(source.tag and not source.mtime_ns for source in made.sources)
    again = api.Plan.from_json(made.to_json())
    assert again == made
    from dataclasses import replace

    other = replace(made, sources=(made.sources[0]._replace(tag="other"), *made.sources[1:]))
    assert other.digest() != made.digest()
    assert made.totals == api.plan(checkpoints / "safetensors", tmp_path / "dst", max_memory="4GB").totals


def test_sources_behind_urls_are_not_reclaimed(library, tmp_path, capsys):
    assert run("convert", f"{library.url}/safetensors", tmp_path / "dst", "--reclaim-source", "--yes") == 2
    assert "leave out --reclaim-source" in capsys.readouterr().err
    assert not (tmp_path / "dst").exists()


def test_s3(checkpoints, tmp_path, monkeypatch):
    """A range is one answer, received as it is read, and gone on with where it is cut."""
    import s3fs

    with s3() as store:
        s3fs.S3FileSystem.clear_instance_cache()
        for name, value in store.env.items():
            monkeypatch.setenv(name, value)
        store.put_folder(checkpoints / "safetensors", "there/")
        for name in ("re-shard", "transpose"):
            given = options(name, checkpoints)
            assert run("convert", f"{store.url}/there", tmp_path / f"remote {name}", *SMALL, *given) == 0
            assert run("convert", checkpoints / "safetensors", tmp_path / f"local {name}", *SMALL, *given) == 0
            same_files(tmp_path / f"remote {name}", tmp_path / f"local {name}")
        store.put("data", DATA)
        url, reader = f"{store.url}/data", Ranges()
        for faults, requests in (((), 1), ([Fault(cut=300 * KB)], 2)):
            store.proxy.forget()
            store.proxy.faults, store.proxy.first = faults, 1
            reader.expect([(url, 0, len(DATA))])
            assert take(reader, url, 0, len(DATA), 700 * KB) == DATA
            assert [request.method for request in store.requests] == ["GET"] * requests
        store.proxy.faults = ()
        reader.expect([(url, 0, len(DATA))])
        assert take(reader, url, 0, 10) == DATA[:10]
        reader.expect([])
        assert take(reader, url, MB, MB + 10) == DATA[MB : MB + 10]
        store.client.delete_object(Bucket=store.bucket, Key="data")
        with pytest.raises(SourceChanged, match="is not there any more"):
            take(reader, url, 0, 10)
        reader.close()
        s3fs.S3FileSystem.clear_instance_cache()


def test_the_hub(checkpoints, tmp_path, monkeypatch):
    """Its files come from another host, by addresses that expire."""
    real = LocalEngine._copy
    with hub({"org/name": checkpoints / "safetensors"}) as server, flaky(server.cdn.url, Fault(cut=300 * KB), host="127.0.0.2") as cdn:
        server.cdn_url = cdn.url
        server.patch(monkeypatch)
        assert run("convert", "hf://org/name", tmp_path / "remote", *SMALL) == 0
        weights = len(list((checkpoints / "safetensors").glob("*.safetensors")))
        sent_on = [request for request in server.requests if request.status in (302, 307) and request.path.endswith(".safetensors")]
        assert 0 < len(sent_on) <= 16 * weights
        assert len(cdn.requests) > 10

        def expire(*task: object) -> int:
            server.expire()
            return real(*task)

        monkeypatch.setattr(LocalEngine, "_copy", expire)
        assert run("convert", "hf://org/name@main", tmp_path / "expiring", *SMALL, "--verify") == 0
        assert any(request.status == 403 for request in cdn.requests)
    monkeypatch.setattr(LocalEngine, "_copy", real)
    assert run("convert", checkpoints / "safetensors", tmp_path / "local", *SMALL) == 0
    same_files(tmp_path / "remote", tmp_path / "local")
    same_files(tmp_path / "expiring", tmp_path / "local")


@pytest.mark.parametrize("given", [[], pytest.param(["--dtype", "float16"], marks=pytest.mark.slow)], ids=["copies", "casts"])
def test_memory_stays_below_what_is_planned(tmp_path, given):
    shapes = {f"layers.{k}.weight": ("bfloat16", (3000 + k, 4096)) for k in range(6)}
    with computed(shapes, max_shard_size="60MB") as server:
        done = start("convert", server.url, tmp_path / "dst", "--json", "--quiet", "--max-memory", "300MB", *given)
        out, said = done.communicate(timeout=600)
        assert done.returncode == 0, said
        result = json.loads(out)
        assert result["peak_rss"] <= result["peak_memory"] <= 300e6
        sent = [request.sent for request in server.requests if request.range and request.sent > 1]
        assert sum(sent) < sum(file.size for file in server.checkpoint.files.values()) + MB
        assert len(sent) < sum(sent) / (400 * KB) + 10


# Interruptions -------------------------------------------------------------------------------------------------------


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "streamconv", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_is_gone_on_with(checkpoints, library, tmp_path, how):
    given = ["--max-shard-size", "2MB", "--quiet", "-j", "2"]
    with flaky(library.url, Fault()) as proxy:
        url, dst, go_on = f"{proxy.url}/safetensors", tmp_path / "remote", threading.Event()

        def hold(request: Request) -> bool:
            """No answer, once a file is done, before the run is over: it is always hit in the middle."""
            if finished_files(Directory(dst).load(LOG)):
                go_on.wait(600)
            return False

        proxy.only = hold
        process = start("convert", url, dst, *given)
        while process.poll() is None and not finished_files(Directory(dst).load(LOG)):
            time.sleep(0.02)
        process.send_signal(how)
        with suppress(subprocess.TimeoutExpired):  # what waits for an answer takes no notice before it has one
            process.wait(2)
        go_on.set()
        _, said = process.communicate(timeout=600)
        assert process.returncode == (130 if how == signal.SIGINT else -how)
        assert how == signal.SIGKILL or "--resume" in said
        proxy.faults = ()
        kept = next(iter(finished_files(Directory(dst).load(LOG))))
        for damaged in [path for path in dst.glob("model-*.safetensors") if path.name != kept][:1]:  # it is made again
            data = bytearray(damaged.read_bytes())
            data[len(data) // 2] ^= 255
            damaged.write_bytes(data)
        before = proxy.sent
        assert run("convert", url, dst, *given, "--resume") == 0
        assert proxy.sent - before < sum(path.stat().st_size for path in (checkpoints / "safetensors").iterdir()) - MB
    assert run("convert", checkpoints / "safetensors", tmp_path / "local", *given) == 0
    same_files(dst, tmp_path / "local")


def test_what_changed_behind_a_url_is_not_gone_on_with(checkpoints, tmp_path, capsys):
    source = tmp_path / "served" / "source"
    write(source, {name: random_tensor(300, 300, seed=k) for k, name in enumerate("abcdef")}, shards=3)
    with nginx(tmp_path / "served") as server, flaky(server.url) as proxy:
        url, dst = f"{proxy.url}/source", tmp_path / "dst"
        proxy.faults = [Fault(status=404)]
        proxy.only = lambda request: (request.range or (0, 0))[1] > 300 * KB
        assert run("convert", url, dst, "--max-shard-size", "700KB", "--quiet", "-j", "1") == 3
        assert "--resume" in capsys.readouterr().err
        proxy.faults = ()
        write(source, {name: random_tensor(300, 300, seed=k + 9) for k, name in enumerate("abcdef")}, shards=3)
        for path in source.iterdir():
            os.utime(path, (0, 0))  # nginx's tags know no fractions of a second
        assert run("convert", url, dst, "--max-shard-size", "700KB", "--quiet", "--resume") == 2
        assert "has other bytes" in capsys.readouterr().err
