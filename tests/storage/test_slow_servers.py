"""Servers that answer to everything, or never to an end: how long and how often they are asked, and what is said meanwhile."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_files import run
from servers import silent_port

import streamconv
from streamconv.errors import RunError, StreamconvError
from streamconv.running.progress import Phase, Progress
from streamconv.storage import Version, pace, probing, remote, retries, web
from streamconv.storage.locations import locate
from streamconv.storage.ranges import Ranges
from streamconv.storage.sources import Catalog, in_parallel
from tools.range_server import Handler, Server

SLOW = 0.3  # seconds that stand for the minutes of real patience


class Everything(Handler):
    """Gives the same bytes for every name that ``wanted`` accepts."""

    content = b"7\n"
    wanted = ""

    def answer(self) -> None:
        if self.wanted in self.path and self.path != "/":
            content = self.content
            self.send_range(len(content), "1", lambda start, stop: [content[start:stop]])
        else:
            self.send_text(404)


class Dripping(Handler):
    """Announces a large file and sends a byte of it now and then; or does so with the head of the answer."""

    head = False

    def answer(self) -> None:
        self.close_connection = True
        if not self.head:
            start = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])
            said = f"Content-Length: {8192 - start}\r\nContent-Range: bytes {start}-8191/8192\r\nETag: 1\r\n\r\n"
            self.wfile.write(f"HTTP/1.1 206 Partial Content\r\n{said}".encode())
        for _ in range(2000):
            self.wfile.write(b"H")
            time.sleep(SLOW / 30)


@pytest.fixture
def impatient(monkeypatch):
    for module, name in ((pace, "SPAN"), (web, "PATIENCE"), (retries, "PATIENCE"), (web, "ANSWERING")):
        monkeypatch.setattr(module, name, SLOW)
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)


@pytest.mark.parametrize(
    ("wanted", "said"), [("", "has a file for every name"), ("consolidated.", "more: a model has no so many ranks")], ids=["all", "ranks"]
)
def test_a_server_that_answers_to_every_name_is_asked_for_few(wanted, said, monkeypatch):
    monkeypatch.setattr(probing, "_MAX_RANKS", 50)
    with Server(type("Own", (Everything,), {"wanted": wanted})) as server:
        with pytest.raises(StreamconvError, match=said):
            streamconv.open(server.url)
        assert len(server.requests) < 300


@pytest.mark.parametrize("said", ["{:0900000000}", "{0.__class__}", "../..", "a/b", "x" * 4000, "\n"])
def test_what_latest_says_is_a_name_and_no_format(said):
    with Server(type("Own", (Everything,), {"wanted": "latest", "content": said.encode()})) as server:
        before = sys.getallocatedblocks()
        with pytest.raises(StreamconvError):
            streamconv.open(server.url)
        assert sys.getallocatedblocks() - before < 200_000
        assert all(len(request.path) < 400 and ".." not in request.path for request in server.requests)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("head", [False, True], ids=["body", "head"])
def test_a_server_that_drips_is_given_up(head):
    with Server(type("Own", (Dripping,), {"head": head})) as server:
        with pytest.raises(RunError, match="no answer") as caught:
            streamconv.open(f"{server.url}/model.safetensors")
        assert "\n" not in str(caught.value)
        with pytest.raises(RunError, match="rerun the same command with --resume") as caught:
            Ranges({f"{server.url}/x": Version(8192, "1")}).read(f"{server.url}/x", 0, memoryview(bytearray(8192)))
        assert head or "bytes came in" in str(caught.value)


def test_a_pace_is_measured_in_spans(monkeypatch):
    monkeypatch.setattr(pace, "SPAN", 10.0)
    found = pace.Pace()
    found.add(9.0, 10)
    with pytest.raises(retries.Failed, match="10 bytes came in 11 s"):
        found.add(2.0, 0)
    assert found.slow == 1
    found.add(11.0, 11_000)
    assert found.slow == 0


def test_whom_a_run_waits_for_is_shown(monkeypatch):
    monkeypatch.setattr("streamconv.running.progress.WAITED", 0.0)
    waiting, over = threading.Event(), threading.Event()

    def wait() -> None:
        with pace.waiting_for("https://slow.example:81/model.safetensors, byte 5"):
            waiting.set()
            over.wait(10)

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait(10)
    try:
        assert Progress().describe_state(5) == "waiting for slow.example:81"
        assert "waiting for slow.example:81" in Progress().describe(Phase("converting", 10), (1.0, 5, 5))
    finally:
        over.set()
        thread.join()
    assert pace.find_longest_wait() == (0.0, "")


def test_heads_of_many_files_are_kept_by_several_threads(monkeypatch):
    class Endless:
        def list(self, _url: str, _catalog: object) -> dict[str, Version]:
            return {f"{k}.bin": Version(-1) for k in range(4000)}

        def head(self, _url: str) -> tuple[Version, bytes]:
            return Version(8), b"8 bytes."

    monkeypatch.setattr(remote, "store_of", lambda _url: Endless())
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        tree = remote.Tree("memory://bucket/", Catalog())
        tree.files()
        assert {entry.size for entry in in_parallel(lambda k: tree.entry(f"{k}.bin"), range(4000)) if entry} == {8}
        assert sum(bool(tree.head(f"{k}.bin")) for k in range(4000)) == 256
    finally:
        sys.setswitchinterval(before)


class Signed(Everything):
    """Wants a query."""

    def answer(self) -> None:
        if "?" in self.path:
            super().answer()
        else:
            self.send_text(403)


@pytest.fixture
def signed(tmp_path: Path) -> Iterator[str]:
    import torch
    from safetensors.torch import save

    with Server(type("Own", (Signed,), {"content": save({"w": torch.ones(3)})})) as server:
        yield f"{server.url}/model.safetensors"


def test_a_query_is_forgotten_when_the_url_is_given_without(signed, tmp_path, capsys):
    assert list(streamconv.open(f"{signed}?sig=1")) == ["w"]
    with pytest.raises(StreamconvError, match="access is denied"):
        streamconv.open(signed)
    assert run("convert", f"{signed}?sig=1", tmp_path / "out.safetensors", "--verify") == 0
    assert run("inspect", signed) == 2
    plan = streamconv.plan(f"{signed}?sig=1", tmp_path / "again.safetensors")
    locate(plan.destination)
    streamconv.run(plan, verify=True)
    assert "403" in capsys.readouterr().err


@pytest.mark.usefixtures("impatient")
def test_nobody_is_waited_for_where_nobody_listens():
    with silent_port() as port, pytest.raises(StreamconvError):
        streamconv.open(f"http://127.0.0.1:{port}/model.safetensors")
    assert pace.find_longest_wait() == (0.0, "")
