"""Outputs behind URLs: the bytes of the local conversion, nothing left of what was not finished, and no more sent again than is missing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from checkpoint_files import ROOMY, numbered, refusal, run, write, write_both
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from hub_server import Hub, hub
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import graphs, settings_of, thresholds, world
from servers import S3, Fault, Flaky, Request, flaky, s3, unavailable

from streamconv.conversion import api
from streamconv.errors import RunError
from streamconv.planning.compiler import compile_plan
from streamconv.planning.fitting import Budget
from streamconv.planning.plan import Plan
from streamconv.running import streams
from streamconv.running.making import make_files
from streamconv.running.streams import in_order
from streamconv.storage import retries
from streamconv.storage.hub import HubSink
from streamconv.storage.objects import PART, PARTS, ObjectSink, part_size
from streamconv.storage.sinks import open_sink

MB = 10**6
STATE = ".streamconv/log.jsonl"
PLAN = ".streamconv/plan.json"
SECRETS = ("testing-secret", "hf_writes", "Signature")
RECIPES = {
    "fuse": [{"rule": "{i}.{q,k,v}", "right": "{i}.qkv", "layout": "(h q) c, h c, h c -> (h (q + 1 + 1)) c", "dims": {"h": 8}}],
    "transpose": [{"rule": f"{{i}}.{name}", "right": f"{{i}}.{name}", "layout": "a b -> b a"} for name in "qkv"],
}
SMALL = ["--max-shard-size", "3MB", "--quiet"]
CONVERSIONS = {
    "re-shard": SMALL,
    "one file": ["--single-file", "--align", "--quiet"],
    "cast": [*SMALL, "--dtype", "bfloat16"],
    "fuse": [*SMALL, "--recipe", "{recipes}/fuse.yaml"],
    "transpose": [*SMALL, "--recipe", "{recipes}/transpose.yaml"],
    "to torch": [*SMALL, "--format", "torch"],
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tensors as ``safetensors/`` and ``bin/``, 10 MB, and recipe files."""
    made = tmp_path_factory.mktemp("checkpoints")
    tensors = numbered({f"{k}.{name}": (rows, 500 + k) for k in range(6) for name, rows in (("q", 800), ("k", 8), ("v", 8))})
    return write_both(made, tensors, RECIPES)


@pytest.fixture(scope="module")
def bucket() -> Iterator[S3]:
    with s3() as store:
        yield store


@pytest.fixture
def store(bucket: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """An empty bucket that this process finds by its environment."""
    import s3fs

    for name, value in bucket.env.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    bucket.clear()
    yield bucket
    bucket.clear()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def memory_store() -> Iterator[MemoryFileSystem]:
    MemoryFileSystem.store.clear()
    yield MemoryFileSystem()
    MemoryFileSystem.store.clear()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Further attempts without a pause."""
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.0)


def options(name: str, checkpoints: Path) -> list[str]:
    return [option.format(recipes=checkpoints) for option in CONVERSIONS[name]]


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def objects_in(store: S3, prefix: str) -> dict[str, bytes]:
    return {key.removeprefix(prefix): store.get(key) for key in store.keys(prefix)}


def start(*arguments: object, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "streamconv", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env)


def wait_for(found: Callable[[], object]) -> None:
    until = time.monotonic() + 600
    while not found():
        assert time.monotonic() < until
        time.sleep(0.02)


# Streams -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_stream_holds_what_the_local_engine_writes(data: st.DataObject) -> None:
    with world() as here:
        data.draw(graphs(here))
        here.store()
        layouts = here.layouts(data.draw(st.integers(1, 3)))
        sink = open_sink("memory://streams")
        with settings_of(**data.draw(thresholds)):
            budget = Budget(1 << 40, 2, lambda: 0)
            plan = compile_plan(here.outputs, layouts, root=sink.url, format="test", budget=budget, read_backend="pread")
            assert all(in_order(plan, file) for file in plan.files)
            told: list[int] = []
            make_files(Plan.from_json(plan.to_json()), range(len(plan.files)), told.append, sink=sink)
        made = {name: MemoryFileSystem().cat_file(f"/streams/{name}") for name in sink.list()}
        assert made == here.expected(layouts)
        assert sum(told) == sum(file.size for file in plan.files)
        sink.remove(made)


@pytest.mark.parametrize("name", ["re-shard", pytest.param("one file", marks=pytest.mark.slow), "fuse", "to torch"])
def test_the_result_in_a_bucket_is_that_of_the_local_conversion(store: S3, checkpoints: Path, tmp_path: Path, name: str) -> None:
    given = options(name, checkpoints)
    assert run("convert", checkpoints / "safetensors", tmp_path / "local", *given) == 0
    assert run("convert", checkpoints / "safetensors", f"{store.url}/made", *given, "--verify") == 0
    assert objects_in(store, "made/") == files_in(tmp_path / "local")
    assert not store.uploads()
    if name == "re-shard":  # from store to store, and back
        assert run("convert", f"{store.url}/made", f"{store.url}/again", "--single-file", "--quiet") == 0
        assert run("convert", checkpoints / "safetensors", tmp_path / "one", "--single-file", "--quiet") == 0
        assert objects_in(store, "again/") == files_in(tmp_path / "one")


def test_what_is_sent_to_a_store_never_lies_on_this_machine(
    memory_store: MemoryFileSystem, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "staging", None)
    made = api.convert(checkpoints / "safetensors", "memory://made", dtype="float16", max_shard_size="3MB", max_memory="4GB")
    assert made.plan.totals.disk_needed == 0
    assert len(memory_store.find("/made")) == len(made.plan.files) > 3


def test_one_file_in_a_folder_of_others(memory_store: MemoryFileSystem, checkpoints: Path, tmp_path: Path) -> None:
    memory_store.pipe_file("/made/other.txt", b"mine")
    memory_store.pipe_file("/made/model-00001-of-00001.safetensors", b"mine, too")
    for again in ([], ["--overwrite"]):
        assert run("convert", checkpoints / "safetensors", "memory://made/all.safetensors", "--quiet", *again) == 0
    assert run("convert", checkpoints / "safetensors", tmp_path / "all.safetensors", "--quiet") == 0
    assert memory_store.cat_file("/made/all.safetensors") == (tmp_path / "all.safetensors").read_bytes()
    assert [path for path, data in memory_store.store.items() if data.getvalue().startswith(b"mine")] == [
        "/made/other.txt",
        "/made/model-00001-of-00001.safetensors",
    ]
    assert len(memory_store.store) == 3


@pytest.mark.parametrize("size", [0, 1, PART, PART * PARTS, PART * PARTS + 1, 700 * 10**9, 40 * 10**12])
def test_a_file_has_as_many_parts_as_a_store_takes(size: int) -> None:
    assert -(-size // part_size(size)) <= PARTS
    assert part_size(size) >= 5 << 20
    assert part_size(size) <= max(PART, size // PARTS + (2 << 20))


# A user's own file systems -------------------------------------------------------------------------------------------


class Hashing(AbstractFileSystem):
    """Keeps a digest of each file and nothing else; it cannot list, read or remove anything."""

    protocol = "hashing"
    cachable = False
    digests: ClassVar[dict[str, str]] = {}

    def _open(self, path: str, mode: str = "rb", **_: Any) -> HashingFile:
        assert mode == "wb"
        return HashingFile(self._strip_protocol(path))


class HashingFile:
    """What is written to it goes into a digest, which is kept when it is closed."""

    def __init__(self, path: str) -> None:
        self.path, self.found = path, hashlib.sha256()

    def write(self, data: bytes) -> int:
        assert isinstance(data, bytes)
        self.found.update(data)
        return len(data)

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        Hashing.digests[self.path] = self.found.hexdigest()


class Failing(AbstractFileSystem):
    """Fails at the write calls whose numbers are in ``bad``; keeps what was closed."""

    protocol = "failing"
    cachable = False
    files: ClassVar[dict[str, bytes]] = {}
    bad: ClassVar[set[int]] = set()
    calls = 0

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **_: Any) -> AbstractBufferedFile:
        return FailingFile(self, self._strip_protocol(path), mode, block_size or 1 << 20)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path)
        found = [
            {"name": name, "size": len(data), "type": "file"}
            for name, data in self.files.items()
            if name == path or name.startswith(f"{path}/")
        ]
        if not found:
            raise FileNotFoundError(path)
        return found if detail else [entry["name"] for entry in found]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        return self.files[self._strip_protocol(path)][start:end]

    def rm_file(self, path: str) -> None:
        del self.files[self._strip_protocol(path)]


class FailingFile(AbstractBufferedFile):
    def _initiate_upload(self) -> None:
        self.sent = b""

    def _upload_chunk(self, final: bool = False) -> bool:
        Failing.calls += 1
        if Failing.calls in Failing.bad:
            raise OSError(5, f"no luck at https://{SECRETS[0]}@host/path?{SECRETS[2]}=x")
        self.sent += self.buffer.getvalue()
        if final:
            Failing.files[self.path] = self.sent
        return True


@pytest.fixture(autouse=True)
def own_filesystems() -> Iterator[None]:
    fsspec.register_implementation("hashing", Hashing, clobber=True)
    fsspec.register_implementation("failing", Failing, clobber=True)
    yield
    Hashing.digests.clear()
    Failing.files.clear()
    Failing.bad, Failing.calls = set(), 0


@pytest.mark.parametrize("name", ["re-shard", "one file", "fuse", "to torch"])
def test_a_store_that_lists_nothing(checkpoints: Path, tmp_path: Path, name: str) -> None:
    given = options(name, checkpoints)
    assert run("convert", checkpoints / "safetensors", tmp_path / "local", *given) == 0
    assert run("convert", checkpoints / "safetensors", "hashing://some/where", *given) == 0
    made = {path.removeprefix("some/where/"): digest for path, digest in Hashing.digests.items()}
    assert made.pop(STATE)
    assert made.pop(PLAN)
    assert made == {path: hashlib.sha256(data).hexdigest() for path, data in files_in(tmp_path / "local").items()}


def test_a_file_that_fails_is_sent_again(quick: None, checkpoints: Path, tmp_path: Path) -> None:
    Failing.bad = {3, 4}  # one file is given up at three failures
    told: list[int] = []
    plan = api.plan(checkpoints / "safetensors", "failing://made", max_shard_size="3MB", max_memory="4GB")
    make_files(plan, range(len(plan.files)), told.append, sink=open_sink(plan.root))
    assert Failing.calls > 4
    assert sum(told) == sum(file.size for file in plan.files)
    assert run("convert", checkpoints / "safetensors", tmp_path / "local", *SMALL) == 0
    assert {path.removeprefix("made/"): data for path, data in Failing.files.items()} == files_in(tmp_path / "local")


@pytest.mark.parametrize("name", ["re-shard", "to torch"])
def test_a_store_that_always_fails_keeps_nothing(
    quick: None, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    Failing.bad = set(range(4, 10**5))
    assert run("convert", checkpoints / "safetensors", "failing://made", *options(name, checkpoints)) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no luck" in said
    assert "--resume" in said
    assert not any(secret in said for secret in SECRETS)
    whole = {path.removeprefix("made/"): data for path, data in Failing.files.items()}
    state = whole.pop(STATE) + whole.pop(PLAN)
    assert not any(secret.encode() in state for secret in SECRETS)
    assert run("convert", checkpoints / "safetensors", tmp_path / "local", *options(name, checkpoints)) == 0
    expected = files_in(tmp_path / "local")
    assert whole.items() <= expected.items()
    Failing.bad = set()
    assert refusal(capsys, "convert", checkpoints / "safetensors", "failing://made", *SMALL).endswith("start afresh with --overwrite")
    before = dict(Failing.files)
    assert run("convert", checkpoints / "safetensors", "failing://made", *options(name, checkpoints), "--resume") == 0
    assert {path.removeprefix("made/"): data for path, data in Failing.files.items()} == expected
    assert all(Failing.files[path] is data for path, data in before.items() if ".streamconv" not in path)


def test_a_store_says_itself_how_to_go_on(quick: None, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Failing.bad = set(range(4, 10**5))
    assert run("convert", checkpoints / "safetensors", "failing://made", *SMALL) == 3
    Failing.bad = set()
    capsys.readouterr()
    assert "add --resume" in refusal(capsys, "run", "failing://made")
    assert run("run", "failing://made", "--resume", "--verify", "--quiet") == 0
    assert run("convert", checkpoints / "safetensors", tmp_path / "local", *SMALL) == 0
    assert {path.removeprefix("made/"): data for path, data in Failing.files.items()} == files_in(tmp_path / "local")
    assert "holds no unfinished conversion" in refusal(capsys, "run", "failing://made", "--resume")


def test_what_an_earlier_release_has_begun_in_a_store_is_refused(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Failing.files["made/.streamconv.json"] = b'{"state":"incomplete","parts":0}\n'
    for more in ([], ["--resume"]):
        said = refusal(capsys, "convert", checkpoints / "safetensors", "failing://made", *SMALL, *more)
        assert "an earlier release of streamconv has begun a conversion there: finish it with that release" in said
    assert [*Failing.files] == ["made/.streamconv.json"]
    assert run("convert", checkpoints / "safetensors", "failing://made", *SMALL, "--overwrite") == 0
    assert "made/.streamconv.json" not in Failing.files


def test_a_changed_source_leaves_no_file(checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "safetensors", tmp_path / "src")
    plan = api.plan(tmp_path / "src", "memory://changed", max_shard_size="3MB", max_memory="4GB")
    for path in (tmp_path / "src").glob("*.safetensors"):
        os.utime(path, ns=(1, 1))
    sink = open_sink(plan.root)
    with pytest.raises(RunError, match="it changed; plan again"):
        make_files(plan, range(len(plan.files)), sink=sink)
    assert not [name for name in sink.list() if name.endswith(".safetensors")]


# Interruptions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_an_interrupted_run_leaves_no_parts_and_is_gone_on_with(store: S3, tmp_path: Path, how: signal.Signals) -> None:
    src = write(tmp_path / "src", numbered({f"{k}.w": (1600, 2000 + k) for k in range(6)}), config={"model_type": "any"})
    given = ["--max-shard-size", "14MB", "--quiet", "-j", "2"]
    signalled, over = threading.Event(), threading.Event()

    def hold(request: Request) -> bool:
        """Two files arrive, two wait for the signal, and no other before the run is over: it is always hit in the middle."""
        if request.method == "PUT" and (found := re.search(r"model-0000(\d)", request.path)) and int(found[1]) > 2:
            (signalled if int(found[1]) <= 4 else over).wait(600)
        return False

    store.proxy.faults, store.proxy.only = (Fault(),), hold
    try:
        process = start("convert", src, f"{store.url}/made", *given)
        wait_for(lambda: len(store.keys("made/model-")) >= 2 and store.uploads())
        process.send_signal(how)
        if how == signal.SIGINT:
            signalled.set()
        _, said = process.communicate(timeout=600)
    finally:
        store.proxy.faults, store.proxy.only = (), None
        signalled.set()
        over.set()
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert how == signal.SIGKILL or (said.count("\n") == 1 and "--resume" in said)
    assert bool(store.uploads()) == (how == signal.SIGKILL)
    whole = store.keys("made/model-")
    assert f"made/{STATE}" in store.keys("made/")
    store.proxy.forget()
    assert run("convert", src, f"{store.url}/made", *given, "--resume") == 0
    assert not store.uploads()
    sent = {request.path.removeprefix(f"/{store.bucket}/").partition("?")[0] for request in store.requests if request.method == "PUT"}
    assert sent
    assert not sent & set(whole)
    assert run("convert", src, tmp_path / "local", *given) == 0
    assert objects_in(store, "made/") == files_in(tmp_path / "local")


def test_ctrl_c_does_not_wait_for_a_store_that_hangs(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging, over = threading.Event(), threading.Event()

    class Hanging(FailingFile):
        def write(self, _: bytes) -> int:
            hanging.set()
            over.wait(600)
            raise AssertionError("too late")

        def discard(self) -> None:
            Failing.files["discarded"] = b""

    monkeypatch.setattr(Failing, "_open", lambda self, path, mode, block_size=0, **_: Hanging(self, path, mode, block_size))
    monkeypatch.setattr(streams, "PATIENCE", 0.1)
    plan = api.plan(checkpoints / "safetensors", "failing://hung", single_file=True, max_memory="4GB")

    def interrupt() -> None:
        hanging.wait(600)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            make_files(plan, [len(plan.files) - 1], sink=open_sink(plan.root))
        assert "discarded" in Failing.files
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
def test_a_server_that_fails_for_some_time(store: S3, checkpoints: Path, tmp_path: Path) -> None:
    store.proxy.faults, store.proxy.every = (unavailable("0"), Fault(drop=True)), 7
    try:
        assert run("convert", checkpoints / "safetensors", f"{store.url}/made", "--single-file", "--quiet") == 0
    finally:
        store.proxy.faults, store.proxy.every = (), 0
    assert run("convert", checkpoints / "safetensors", tmp_path / "local", "--single-file", "--quiet") == 0
    assert objects_in(store, "made/") == files_in(tmp_path / "local")
    assert not store.uploads()


# What may be written -------------------------------------------------------------------------------------------------


def test_overwrite_takes_weights_away_and_nothing_else(
    store: S3, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.put("made/model-00007-of-00007.safetensors", b"old")
    store.put("made/model.safetensors.index.json", b"{}")
    kept = {"README.md": b"mine", "1_Dense/model.safetensors": b"another model", "old/1/mp_rank_00_model_states.pt": b"another"}
    for name, data in kept.items():
        store.put(f"made/{name}", data)
    src = checkpoints / "safetensors"
    assert " already" in refusal(capsys, "convert", src, f"{store.url}/made", *SMALL)
    assert len(store.keys("made/")) == 5
    assert run("convert", src, f"{store.url}/made", *SMALL, "--overwrite") == 0
    assert run("convert", src, tmp_path / "local", *SMALL) == 0
    assert objects_in(store, "made/") == files_in(tmp_path / "local") | kept
    assert run("convert", src, f"{store.url}/made", *SMALL, "--overwrite") == 0
    assert objects_in(store, "made/") == files_in(tmp_path / "local") | kept
    for key in ("made/model-00009-of-00009.safetensors", "made/deeper/model.safetensors", "made-too/model.safetensors"):
        store.client.create_multipart_upload(Bucket=store.bucket, Key=key)
    assert run("convert", src, f"{store.url}/made/one.safetensors", "--quiet") == 0
    assert len(store.uploads()) == 3
    store.client.delete_object(Bucket=store.bucket, Key="made/one.safetensors")
    assert run("convert", src, f"{store.url}/made", *SMALL, "--overwrite") == 0
    assert sorted(store.uploads()) == ["made-too/model.safetensors", "made/deeper/model.safetensors"]
    before = len(store.requests)
    assert run("convert", src, f"{store.url}/made", *SMALL, "--resume") == 0  # nothing is left to do
    assert "PUT" not in {request.method for request in store.requests[before:]}


def test_what_cannot_be_written_is_refused(store: S3, checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = checkpoints / "safetensors"
    store.put_folder(src, "src/")
    for dst, more, said in [
        (f"{store.url}/src", [], "DST is SRC"),
        (f"{store.url}/src/below", [], "DST lies inside SRC"),
        (f"{store.url}", [], "lies inside DST"),
        (f"{store.url}/made", ["--create-pr"], "has no pull requests: give a repository on the Hub"),
        (f"{store.url}/made", ["--reclaim-source", "--yes"], "--reclaim-source"),
        (f"{store.url}/made/model.bin", ["--format", "safetensors"], "which is not --format safetensors"),
        ("https://localhost/made", [], "web servers are read only"),
        ("nobody://knows/this", [], "no store of that kind is known"),
        ("dropbox://needs/this", [], "pip install"),
        ("hf://name", [], "give hf://ORGANIZATION/NAME"),
        ("hf://datasets/org/name", [], "not a model repository"),
        ("s3://user:testing-secret@host/made", [], "leave it out"),
    ]:
        line = refusal(capsys, "convert", f"{store.url}/src", dst, *SMALL, *more)
        assert said in line, line
        assert not any(secret in line for secret in SECRETS)
    line = refusal(capsys, "convert", src, "s3://no-such-bucket/made", *SMALL)
    assert line.startswith("s3://no-such-bucket/made: cannot be written (")
    assert "AWS_ACCESS_KEY_ID" in line
    assert not store.keys("made")


def test_access_that_is_denied_is_one_line(store: S3, checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    denied = '<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'
    store.proxy.faults, store.proxy.only = (Fault(status=403, body=denied),), lambda request: request.method in ("PUT", "POST")
    try:
        line = refusal(capsys, "convert", checkpoints / "safetensors", f"{store.url}/made", *SMALL)
    finally:
        store.proxy.faults, store.proxy.only = (), None
    assert "cannot be written (" in line
    assert "Denied" in line
    assert "AWS_ACCESS_KEY_ID" in line
    assert not store.keys()


# In parts ------------------------------------------------------------------------------------------------------------


def test_parts_of_a_plan_in_a_bucket(store: S3, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src, plan = checkpoints / "safetensors", tmp_path / "plan.json"
    assert run("plan", src, f"{store.url}/made", *SMALL, "--out", plan) == 0
    assert not any(secret in plan.read_text() for secret in SECRETS)
    assert run("run", plan, "--part", "2/3", "--quiet") == 0
    assert "not there as planned" in refusal(capsys, "run", plan, "--finish", "--quiet")
    for part in ("0/3", "1/3", "2/3"):
        assert run("run", plan, "--part", part, "--quiet") == 0
    assert not [key for key in store.keys("made/") if key.endswith("index.json")]
    assert run("run", plan, "--finish", "--verify", "--quiet") == 0
    assert run("convert", src, tmp_path / "local", *SMALL) == 0
    assert objects_in(store, "made/") == files_in(tmp_path / "local")


def test_parts_over_old_files_in_a_bucket(store: S3, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those in the places of new ones stand until these replace them; others, and the index, go first."""
    src, plan = checkpoints / "safetensors", tmp_path / "plan.json"
    assert run("convert", src, tmp_path / "local", *SMALL) == 0
    made = files_in(tmp_path / "local")
    for name, data in made.items():
        store.put(f"made/{name}", data if name == "config.json" else b"?" * len(data))
    store.put("made/model-00007-of-00007.safetensors", b"old")
    time.sleep(1.1)  # a store's times are of whole seconds: by them config.json, whose bytes stay, is told from the old one
    assert run("plan", src, f"{store.url}/made", *SMALL, "--overwrite", "--out", plan) == 0
    assert run("run", plan, "--part", "1/3", "--quiet", "--overwrite") == 0
    left = objects_in(store, "made/")
    assert set(left) == {STATE, PLAN, *made} - {"model.safetensors.index.json"}
    names = [path for path in made if path.startswith("model-0")]
    assert [name for name in names if left[name] == made[name]] == [names[k] for k in range(len(names)) if k % 3 == 1]
    line = refusal(capsys, "run", plan, "--finish", "--quiet")
    assert all(f"{names[k]} holds something else (part {k % 3}/3)" in line for k in range(len(names)) if k % 3 != 1)
    for part in ("0/3", "2/3"):
        assert run("run", plan, "--part", part, "--quiet", "--overwrite") == 0
    assert run("run", plan, "--finish", "--quiet") == 0
    assert objects_in(store, "made/") == made


def test_a_state_that_goes_while_it_is_read(store: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has ended what it speaks of."""
    sink = ObjectSink(f"{store.url}/made")
    sink.save_state("state", b"1")
    assert sink.load_state("state") == b"1"
    found = sink.list
    monkeypatch.setattr(sink, "list", lambda: (found(), store.client.delete_object(Bucket=store.bucket, Key="made/state"))[0])
    assert sink.load_state("state") is None


# The Hub -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with hub() as made:
        yield made


@pytest.fixture
def library(server: Hub, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub, with ``org/bins`` alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server.repos.clear()
    server.add("org/bins", checkpoints / "bin")
    server.patch(monkeypatch)
    return server


@pytest.fixture
def staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files are made before they are uploaded."""
    folder = tmp_path / "staging"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def repository(library: Hub, name: str, revision: str = "main") -> dict[str, bytes]:
    return {path: library.read(name, path, revision) for path in library.files(name, revision)}


@pytest.mark.parametrize("name", ["re-shard", "one file", "to torch"])
def test_the_result_on_the_hub_takes_the_room_of_one_file(
    library: Hub, checkpoints: Path, tmp_path: Path, staged: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    most: list[int] = []
    put = HubSink.put

    def watched(self: HubSink, files: Any) -> None:
        most.append(sum(path.stat().st_size for path in staged.rglob("*") if path.is_file()))
        put(self, files)

    monkeypatch.setattr(HubSink, "put", watched)
    given = options(name, checkpoints)
    assert run("convert", checkpoints / "safetensors", tmp_path / "local", *given) == 0
    assert run("convert", checkpoints / "safetensors", "hf://org/new", *given, "--verify") == 0
    local = files_in(tmp_path / "local")
    assert repository(library, "org/new") == local
    assert max(most) <= max(map(len, local.values())) + (len(local["config.json"]) if name == "one file" else 0)
    assert not list(staged.iterdir())
    assert not list((tmp_path / "cache").rglob(STATE))
    last, before = library.log("org/new")[:2]
    index = {path for path in local if path.endswith("index.json")}
    assert last.files.keys() - before.files.keys() == ({"config.json"} | index if index else local.keys())


def test_an_upload_that_fails_is_gone_on_with(
    quick: None,
    library: Hub,
    checkpoints: Path,
    tmp_path: Path,
    staged: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    src, commit = checkpoints / "safetensors", HubSink._commit

    def fail(self: HubSink, operations: Any, message: str) -> None:
        if "00003" in message:
            raise ConnectionError("cut")
        commit(self, operations, message)

    with monkeypatch.context() as patch:
        patch.setattr(HubSink, "_commit", fail)
        assert run("convert", src, "hf://org/new", *SMALL) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--resume" in said
    assert not any(secret in said for secret in SECRETS)
    assert not list(staged.iterdir())
    (state,) = (tmp_path / "cache").rglob(STATE)
    assert not any(secret in state.read_text() for secret in SECRETS)
    assert len(library.files("org/new")) == 2
    before = len(library.log("org/new"))
    assert run("convert", src, "hf://org/new", *SMALL, "--resume") == 0
    assert not [commit.title for commit in library.log("org/new")[:-before] if "00001" in commit.title or "00002" in commit.title]
    assert run("convert", src, tmp_path / "local", *SMALL) == 0
    assert repository(library, "org/new") == files_in(tmp_path / "local")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_upload_leaves_nothing_on_this_machine(
    library: Hub, checkpoints: Path, tmp_path: Path, staged: Path, how: signal.Signals
) -> None:
    src, uploads, over = checkpoints / "safetensors", list[str](), threading.Event()
    for path in library.store.glob("?" * 64):  # what other tests have uploaded would not be asked for
        path.unlink()

    def hold(request: Request) -> bool:
        """A file arrives, and no other before the run is over: it is always hit with one on the Hub and the next on its way."""
        if request.method == "PUT":
            uploads.append(request.path)
            if len(uploads) > 1:
                over.wait(600)
        return False

    with flaky(library.cdn.url, Fault(), host="127.0.0.2", only=hold) as cdn:
        library.cdn_url = cdn.url
        try:
            process = start("convert", src, "hf://org/new", *SMALL, **library.env, TMPDIR=str(staged))
            wait_for(lambda: len(uploads) > 1 or process.poll() is not None)
            assert process.poll() is None
            assert [name for name in library.files("org/new") if name.startswith("model-")] == ["model-00001-of-00006.safetensors"]
            process.send_signal(how)
            _, said = process.communicate(timeout=600)
        finally:
            library.cdn_url = library.cdn.url
            over.set()
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert how == signal.SIGKILL or (said.count("\n") == 1 and "--resume" in said)
    assert bool(list(staged.iterdir())) == (how == signal.SIGKILL)
    before = len(library.log("org/new"))
    again = start("convert", src, "hf://org/new", *SMALL, "--resume", **library.env, TMPDIR=str(staged))
    assert again.communicate(timeout=600)[1] == ""
    assert not list(staged.iterdir())
    assert not [commit for commit in library.log("org/new")[:-before] if "00001" in commit.title]
    assert run("convert", src, tmp_path / "local", *SMALL) == 0
    assert repository(library, "org/new") == files_in(tmp_path / "local")


def test_a_pull_request_adds_what_was_converted(
    library: Hub, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--create-pr" in refusal(capsys, "convert", "hf://org/bins", "hf://org/bins", *SMALL)
    assert run("convert", "hf://org/bins", "hf://org/bins", "--max-shard-size", "3MB", "--create-pr", "--verify") == 0
    assert "note: pull request: http" in capsys.readouterr().out
    assert run("convert", checkpoints / "bin", tmp_path / "local", *SMALL) == 0
    before = files_in(checkpoints / "bin")
    assert repository(library, "org/bins") == before
    assert repository(library, "org/bins", "refs/pr/1") == before | files_in(tmp_path / "local")
    assert len(library.repos["org/bins"].pulls) == 1
    assert not [commit for commit in library.log("org/bins", "refs/pr/1") if "config.json" in commit.title]


def test_a_pull_request_is_gone_on_with(
    quick: None, library: Hub, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = HubSink._commit

    def fail(self: HubSink, operations: Any, message: str) -> None:
        if "00003" in message:
            raise ConnectionError("cut")
        commit(self, operations, message)

    given = ["convert", "hf://org/bins", "hf://org/bins", *SMALL, "--create-pr"]
    with monkeypatch.context() as patch:
        patch.setattr(HubSink, "_commit", fail)
        assert run(*given) == 3
    assert run(*given, "--resume") == 0
    assert len(library.repos["org/bins"].pulls) == 1
    assert run("convert", checkpoints / "bin", tmp_path / "local", *SMALL) == 0
    assert repository(library, "org/bins", "refs/pr/1") == files_in(checkpoints / "bin") | files_in(tmp_path / "local")


@pytest.mark.parametrize(
    "fault", [Fault(status=500), Fault(status=403, body="?Signature=1"), Fault(drop=True)], ids=["500", "403", "reset"]
)
def test_a_storage_that_fails_is_one_line(
    quick: None,
    library: Hub,
    checkpoints: Path,
    tmp_path: Path,
    staged: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    for path in library.store.glob("?" * 64):  # what other tests have uploaded would not be asked for
        path.unlink()
    src = checkpoints / "safetensors"
    with flaky(library.cdn.url, fault, host="127.0.0.2") as cdn:
        cdn.only = lambda request: request.method == "PUT" and len(library.files("org/new")) > 1
        monkeypatch.setattr(library, "cdn_url", cdn.url)
        assert run("convert", src, "hf://org/new", *SMALL, "--verbose") == 3
        assert cdn.injected
    trace, said = capsys.readouterr().err.rsplit("streamconv: error: ", 1)
    assert said.count("\n") == 1
    assert said.startswith("hf://org/new: no answer (")
    assert "--resume" in said
    assert "Traceback" in trace
    assert not any(secret in trace + said for secret in (*SECRETS, "?", "127.0.0.2"))
    assert not list(staged.iterdir())
    monkeypatch.setattr(library, "cdn_url", library.cdn.url)
    assert run("convert", src, "hf://org/new", *SMALL, "--resume") == 0
    assert run("convert", src, tmp_path / "local", *SMALL) == 0
    assert repository(library, "org/new") == files_in(tmp_path / "local")


@pytest.mark.parametrize("name", ["one file", "re-shard", "to torch"])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_pull_request_removes_old_weights_of_its_container(
    quick: None,
    library: Hub,
    checkpoints: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    resumed: bool,
) -> None:
    others = {path.name: path.read_bytes() for path in (checkpoints / "bin").glob("*.bin")} | {"below/model.safetensors": b"other"}
    library.add("org/both", checkpoints / "safetensors")
    library.put("org/both", others)
    before, commit = repository(library, "org/both"), HubSink._commit
    old = {path for path in before if path.startswith("pytorch_model" if name == "to torch" else "model")}
    shown = [option for option in options(name, checkpoints) if option != "--quiet"]
    given = ["convert", checkpoints / "safetensors", "hf://org/both", "--create-pr", *shown]

    def fail(self: HubSink, operations: Any, message: str) -> None:
        if "files" in message:
            raise ConnectionError("cut")
        commit(self, operations, message)

    if resumed:
        with monkeypatch.context() as patch:
            patch.setattr(HubSink, "_commit", fail)
            assert run(*given) == 3
        assert old <= set(library.files("org/both", "refs/pr/1" if library.repos["org/both"].pulls else "main"))
        capsys.readouterr()
    assert run(*given, *["--resume"] * resumed) == 0
    assert run("convert", checkpoints / "safetensors", tmp_path / "local", *options(name, checkpoints)) == 0
    made = files_in(tmp_path / "local")
    kept = {path: data for path, data in before.items() if path not in old}
    assert repository(library, "org/both") == before
    assert repository(library, "org/both", "refs/pr/1") == kept | made
    first, *more = sorted(old - made.keys())
    assert f", which removes the old {first}{f' and {len(more)} more' if more else ''}\n" in capsys.readouterr().out
    last, *_ = library.log("org/both", "refs/pr/1")
    above = library.repos["org/both"].commits[last.parent].files
    assert old - made.keys() == above.keys() - last.files.keys()


@pytest.fixture
def losing(library: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flaky]:
    """A way to the Hub on which no answer to a commit arrives: it is made, and the connection is reset."""
    with flaky(library.url, Fault(lose=True), only=lambda request: request.method == "POST" and "/commit/" in request.path) as proxy:
        monkeypatch.setattr(library, "endpoint", proxy.url)
        library.patch(monkeypatch)
        yield proxy


@pytest.mark.parametrize("name", ["one file", "re-shard"])
def test_an_answer_that_is_lost_makes_no_second_pull_request(
    quick: None, library: Hub, losing: Flaky, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    library.add("org/old", checkpoints / "safetensors")
    before = repository(library, "org/old")
    shown = [option for option in options(name, checkpoints) if option != "--quiet"]
    assert run("convert", checkpoints / "safetensors", "hf://org/old", "--create-pr", *shown, "--verify") == 0
    assert f"note: pull request: {losing.url}/org/old/discussions/1, which removes the old model-" in capsys.readouterr().out
    assert len(library.repos["org/old"].pulls) == 1
    assert run("convert", checkpoints / "safetensors", tmp_path / "local", *options(name, checkpoints)) == 0
    made = files_in(tmp_path / "local")
    kept = {path: data for path, data in before.items() if not path.startswith("model")}
    assert repository(library, "org/old", "refs/pr/1") == kept | made
    *commits, _ = library.log("org/old", "refs/pr/1")
    assert len(commits) == losing.injected == len({commit.title for commit in commits})
    assert not list((tmp_path / "cache").rglob(STATE))


@pytest.mark.parametrize("dst", ["hf://org/bins", "hf://org/bins/below"])
def test_a_pull_request_whose_answer_was_lost_is_gone_on_with(
    quick: None, library: Hub, losing: Flaky, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dst: str
) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi

    monkeypatch.setattr(library, "page", 1)
    losing.only = lambda request: "/commit/" in request.path or "/discussions" in request.path
    given = ["convert", checkpoints / "safetensors", dst, *SMALL, "--create-pr"]

    def propose_another() -> None:
        said = {"commit_message": "Add converted weights", "commit_description": "Converted by streamconv (0123456789ab)."}
        HfApi(library.url).create_commit("org/bins", [CommitOperationAdd("other.txt", b"other")], **said, create_pr=True)

    propose_another()
    assert run(*given) == 3
    losing.faults = ()
    propose_another()
    assert run(*given, "--resume") == 0
    assert len(library.repos["org/bins"].pulls) == 3
    assert run("convert", checkpoints / "safetensors", tmp_path / "local", *SMALL) == 0
    below = dst.removeprefix("hf://org/bins").lstrip("/")
    made = {f"{below}/{path}".lstrip("/"): data for path, data in files_in(tmp_path / "local").items()}
    assert repository(library, "org/bins", "refs/pr/2") == files_in(checkpoints / "bin") | made
    assert not list((tmp_path / "cache").rglob(STATE))


def test_files_are_removed_though_the_answer_is_lost(quick: None, library: Hub, losing: Flaky, checkpoints: Path, tmp_path: Path) -> None:
    assert run("convert", checkpoints / "safetensors", "hf://org/bins", *SMALL, "--overwrite") == 0
    assert run("convert", checkpoints / "safetensors", tmp_path / "local", *SMALL) == 0
    assert repository(library, "org/bins") == files_in(tmp_path / "local")
    assert len(library.log("org/bins")) == losing.injected + 1


@pytest.mark.parametrize("dst", ["hf://org/old", "hf://org/old/below", "hf://org/old/one.safetensors"])
def test_a_pull_request_is_compared(library: Hub, checkpoints: Path, tmp_path: Path, dst: str) -> None:
    old = write(tmp_path / "old", numbered({"0.q": (8, 500)}))
    library.add("org/old", old)
    given: dict[str, Any] = {"create_pr": True, "max_shard_size": "3MB", "max_memory": ROOMY}
    made = api.convert(checkpoints / "safetensors", dst, compare_with=checkpoints / "bin", **given)
    assert made.comparison
    assert made.comparison.equal
    made = api.convert(checkpoints / "safetensors", dst, compare_with=old, **given)
    assert made.comparison
    assert not made.comparison.equal
    assert len(library.repos["org/old"].pulls) == 2


@pytest.mark.parametrize("how", ["--create-pr", "--overwrite"])
def test_verify_reads_what_is_on_the_hub_now(
    library: Hub, checkpoints: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    put = HubSink.put

    def alter(self: HubSink, files: Any) -> None:
        put(self, files)
        if shard := next((name for name in files if "-00002-" in name), ""):
            data = library.read("org/bins", shard, self._revision)
            library.put("org/bins", {shard: data[:-1] + bytes([data[-1] ^ 1])}, self._revision)

    given = ["convert", checkpoints / "safetensors", "hf://org/bins", *SMALL, how, "--verify"]
    assert run(*given) == 0
    monkeypatch.setattr(HubSink, "put", alter)
    assert "model-00002-of-" in refusal(capsys, *given)


def test_an_upload_warns_of_nothing(library: Hub, checkpoints: Path) -> None:
    for path in library.store.glob("?" * 64):
        path.unlink()
    process = start(
        "convert", checkpoints / "safetensors", "hf://org/new", *SMALL, **library.env, PYTHONWARNINGS="error::DeprecationWarning"
    )
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0
    assert "model.safetensors.index.json" in library.files("org/new")


@pytest.mark.parametrize("token", ["", "hf_nobody"])
def test_a_refused_pull_request_leaves_nothing(
    library: Hub, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    given = ["convert", checkpoints / "safetensors", "hf://org/bins", *SMALL, "--create-pr"]
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", token)
        assert refusal(capsys, *given).endswith("or give another DST")
    assert not list((tmp_path / "cache").rglob("*.json*"))
    assert run(*given) == 0
    assert len(library.repos["org/bins"].pulls) == 1


def test_branches_and_folders_of_a_repository(library: Hub, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = checkpoints / "safetensors"
    assert run("convert", src, tmp_path / "local", *SMALL) == 0
    made = files_in(tmp_path / "local")
    assert run("convert", src, "hf://org/bins/below/it", *SMALL) == 0
    assert repository(library, "org/bins") == files_in(checkpoints / "bin") | {f"below/it/{name}": data for name, data in made.items()}
    assert "hf://org/bins@other: holds " in refusal(capsys, "convert", src, "hf://org/bins@other", *SMALL)
    assert "other" not in library.repos["org/bins"].refs
    assert run("convert", src, "hf://org/bins@other", *SMALL, "--overwrite") == 0
    assert {name: data for name, data in repository(library, "org/bins", "other").items() if "/" not in name} == made
    assert "pytorch_model.bin" in library.files("org/bins")


def test_the_hub_says_no_in_one_line(
    library: Hub, checkpoints: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", library.read_token)
    line = refusal(capsys, "convert", checkpoints / "safetensors", "hf://org/new", *SMALL)
    assert line.startswith("hf://org/new: cannot be written (HTTP 40")
    assert "HF_TOKEN" in line
    assert library.read_token not in line
    assert "--part" in _refuse_part(checkpoints, capsys)


def _refuse_part(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> str:
    plan = checkpoints / "hub.json"
    assert run("plan", checkpoints / "safetensors", "hf://org/new", *SMALL, "--out", plan) == 0
    return refusal(capsys, "run", plan, "--part", "0/2")


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_bucket_is_written_within_the_budget(store: S3, tmp_path: Path) -> None:
    src = write(tmp_path / "src", numbered({f"{k}.w": (2000, 1000) for k in range(8)}), shards=2)
    process = start("convert", src, f"{store.url}/made", "--max-memory", "200MB", "--max-shard-size", "17MB", "--json", "-q")
    out, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    found = json.loads(out)
    assert found["workers"] >= 2
    assert found["peak_rss"] <= found["peak_memory"] <= 200 * MB
    assert found["disk_needed"] == 0
