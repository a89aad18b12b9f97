"""What lies in the way of a run, what an interrupted one leaves, and how it is gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from checkpoint_files import assert_same, failure, random_tensor, read, refusal, run, write
from small_source import INDEX, document, stop_after, tensors, tree

import streamconv
from streamconv.cli import command as cli
from streamconv.engine.check import OutputCheck
from streamconv.running import filling
from streamconv.running.output import STATE


def test_overwrite_removes_old_weights_and_nothing_else(source, tmp_path):
    dst = tmp_path / "dst"
    mine = {
        "README.md": b"mine",
        "sub/notes.txt": b"mine",
        "sub/model.safetensors": b"mine",
        "training_args.bin": b"mine",
        "vocab.txt": b"mine",
    }
    stale = [
        "model.safetensors",
        "model-00001-of-00009.safetensors",
        INDEX,
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "x.safetensors",
    ]
    for name, data in {**mine, **dict.fromkeys(stale, b"stale"), "config.json": b"{}"}.items():
        (dst / name).parent.mkdir(parents=True, exist_ok=True)
        (dst / name).write_bytes(data)
    (dst / "gone.safetensors").symlink_to("nowhere")
    assert run("convert", source, dst, "--overwrite", "--max-shard-size", "3KB", "--quiet") == 0
    assert run("convert", source, tmp_path / "fresh", "--max-shard-size", "3KB", "--quiet") == 0
    found = {name: data for name, data in tree(dst).items() if data is not None}
    assert found == {name: data for name, data in {**mine, **tree(tmp_path / "fresh")}.items() if data is not None}
    assert_same({name: entry.torch() for name, entry in streamconv.open(dst).items()}, tensors())


@pytest.mark.parametrize("shards", [("5GB", "2KB"), ("2KB", "5GB"), ("1KB", "3KB")])
def test_overwrite_of_another_number_of_shards(source, tmp_path, shards):
    for size in shards:
        assert run("convert", source, tmp_path / "dst", "--overwrite", "--max-shard-size", size, "--quiet") == 0
        assert_same({name: entry.torch() for name, entry in streamconv.open(tmp_path / "dst").items()}, tensors())
        assert_same(read(tmp_path / "dst"), tensors())


def test_overwrite_does_not_follow_links(source, tmp_path):
    dst, blobs = tmp_path / "dst", tmp_path / "blobs"
    blobs.mkdir()
    dst.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "model.safetensors.partial", "config.json.partial"):
        (blobs / name).write_bytes(b"precious")
        (dst / name).symlink_to(blobs / name)
    assert run("convert", source, dst, "--overwrite", "--quiet") == 0
    assert set(tree(blobs).values()) == {b"precious"}
    assert not any(path.is_symlink() for path in dst.rglob("*"))
    assert_same(read(dst), tensors())


def test_a_hub_snapshot_is_read_and_never_written_through(source, snapshot, tmp_path, capsys):
    hub = tmp_path / "hub"
    before = tree(hub)
    assert run("convert", source, tmp_path / "plain", "--quiet", "--max-shard-size", "3KB") == 0
    for dst in (tmp_path / "dst", snapshot.parent / "4567"):
        for more in ([], ["--overwrite"]):
            assert run("convert", snapshot, dst, "--quiet", "--max-shard-size", "3KB", *more) == 0
            assert tree(dst) == tree(tmp_path / "plain")
    assert {name: data for name, data in tree(hub).items() if not name.startswith("models--a--b/snapshots/4567")} == before
    for dst in (snapshot, snapshot / "new", snapshot.parent, snapshot.parent.parent / "blobs", hub, snapshot / "x.safetensors"):
        for more in ([], ["--overwrite"], ["--resume"]):
            refusal(capsys, "convert", snapshot, dst, *more)
    (tmp_path / "link").symlink_to(snapshot)
    assert "DST is SRC" in refusal(capsys, "convert", snapshot, tmp_path / "link", "--overwrite")
    assert {name: data for name, data in tree(hub).items() if not name.startswith("models--a--b/snapshots/4567")} == before


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("options", "workers"),
    [
        pytest.param(["--max-shard-size", "2KB"], 1, marks=pytest.mark.slow),
        (["--max-shard-size", "2KB"], 3),
        (["--max-shard-size", "2KB", "--dtype", "bf16"], 3),
        (["--single-file"], 1),
    ],
)
def test_a_run_stopped_anywhere_resumes_to_the_same_bytes(source, tmp_path, capsys, monkeypatch, options, workers):
    assert run("convert", source, tmp_path / "whole", *options, "--quiet") == 0
    calls = 0
    while True:
        dst = tmp_path / f"dst{calls}"
        capsys.readouterr()
        with monkeypatch.context() as patch:
            stop_after(patch, calls)
            code = run("convert", source, dst, *options, "-j", workers, "--quiet")
        if code == 0:
            break
        assert code == 3
        assert capsys.readouterr().err == "streamconv: error: stopped\n"
        assert not {"model.safetensors", INDEX} & set(tree(dst)), "committed before it was complete"
        finished = {path.name: path.stat().st_ino for path in dst.glob("model-*.safetensors")}
        assert "--resume" in refusal(capsys, "convert", source, dst, *options)
        with monkeypatch.context() as patch:  # and again
            stop_after(patch, calls)
            assert run("convert", source, dst, *options, "--quiet", "--resume") in {0, 3}
        assert run("convert", source, dst, *options, "--quiet", "--resume") == 0
        assert tree(dst) == tree(tmp_path / "whole")
        assert {name: (dst / name).stat().st_ino for name in finished} == finished, "finished work was done again"
        calls += 1
    assert calls > 10


def test_resume_of_another_conversion_is_refused(source, tmp_path, capsys, monkeypatch):
    dst = tmp_path / "dst"
    stop_after(monkeypatch, 8)
    assert run("convert", source, dst, "--max-shard-size", "2KB", "--quiet") == 3
    monkeypatch.undo()
    before = tree(dst)
    for other in (["--max-shard-size", "3KB"], ["--max-shard-size", "2KB", "--dtype", "bf16"], ["--single-file"]):
        message = refusal(capsys, "convert", source, dst, "--resume", *other)
        assert "another one" in message
        assert "--overwrite" in message
        assert tree(dst) == before
    os.utime(source / "model-00002-of-00003.safetensors", ns=(5, 5))
    assert "another one" in refusal(capsys, "convert", source, dst, "--resume", "--max-shard-size", "2KB")
    assert run("convert", source, dst, "--overwrite", "--max-shard-size", "3KB", "--quiet") == 0
    assert run("convert", source, tmp_path / "whole", "--max-shard-size", "3KB", "--quiet") == 0
    assert tree(dst) == tree(tmp_path / "whole")


def test_resume_with_other_workers_and_memory_goes_on(source, tmp_path, monkeypatch):
    stop_after(monkeypatch, 8)
    assert run("convert", source, tmp_path / "dst", "--max-shard-size", "2KB", "--quiet", "-j", "4") == 3
    monkeypatch.undo()
    again = ["--max-memory", "3GB", "-j", "1", "--read-backend", "mmap", "--resume", "--verify", "--quiet", "--max-shard-size", "2KB"]
    assert cli.main(["convert", str(source), str(tmp_path / "dst"), *again]) == 0
    assert_same(read(tmp_path / "dst"), tensors())


def test_resume_with_a_damaged_log_is_refused(source, tmp_path, capsys, monkeypatch):
    stop_after(monkeypatch, 8)
    assert run("convert", source, tmp_path / "dst", "--quiet") == 3
    monkeypatch.undo()
    log = tmp_path / "dst" / ".streamconv" / "log.jsonl"
    for text in ("", "[]", '{"plan": 1', "null"):
        log.write_text(text)
        assert "--overwrite" in refusal(capsys, "convert", source, tmp_path / "dst", "--resume")


def test_resume_where_nothing_is_to_be_resumed(source, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "draft" / ".streamconv").mkdir(parents=True)
    (tmp_path / "draft" / ".streamconv" / "log.jsonl.new").write_text("{")
    for dst in (tmp_path / "new", tmp_path / "empty", tmp_path / "draft", tmp_path / "one.safetensors"):
        assert run("convert", source, dst, "--resume", "--quiet") == 0
    assert tree(tmp_path / "new") == tree(tmp_path / "empty") == tree(tmp_path / "draft")
    write(tmp_path / "foreign", {"w": random_tensor(3)}, shards=1)
    before = tree(tmp_path / "foreign")
    assert "not empty" in refusal(capsys, "convert", source, tmp_path / "foreign", "--resume")
    assert tree(tmp_path / "foreign") == before


def test_resume_checks_a_finished_destination(source, tmp_path, capsys):
    dst = tmp_path / "dst"
    assert run("convert", source, dst, "--quiet", "--max-shard-size", "3KB") == 0
    before = {path: path.stat().st_mtime_ns for path in dst.rglob("*")}
    found = document(capsys, "convert", source, dst, "--resume", "--max-shard-size", "3KB")
    assert found["verified"] is True
    assert {path: path.stat().st_mtime_ns for path in dst.rglob("*")} == before
    shard = dst / "model-00002-of-00002.safetensors"
    with shard.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"??")
    assert shard.name in refusal(capsys, "convert", source, dst, "--resume", "--max-shard-size", "3KB")
    shard.unlink()
    refusal(capsys, "convert", source, dst, "--resume", "--max-shard-size", "3KB")


SLOW = """
import os, signal, sys, threading
left, go_on = [3], threading.Event()
def interrupt(*given):
    go_on.set()
    signal.default_int_handler(*given)
signal.signal(signal.SIGINT, interrupt)
from streamconv.cli import command as cli
from streamconv.engine import writers
copy = writers.copy_range
def slow(*given):
    copy(*given)
    os.write(1, b"copied\\n")
    left[0] -= 1
    if left[0] <= 0:  # until the signal comes
        go_on.wait(600)
writers.copy_range = slow
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_interrupted_process_can_go_on(source, tmp_path, number, code):
    dst = tmp_path / "dst"
    options = ["--max-shard-size", "1KB", "-j", "2"]
    command = [sys.executable, "-c", SLOW, "convert", source, dst, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(3):
            assert process.stdout.readline() == "copied\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=600)
    assert process.returncode == code
    if code == 130:
        assert err.startswith("streamconv: error: interrupted")
        assert "--resume" in err
        assert err.count("\n") == 1
    assert INDEX not in tree(dst)
    assert run("convert", source, dst, *options, "--resume", "--verify", "--quiet") == 0
    assert run("convert", source, tmp_path / "whole", *options, "--quiet") == 0
    assert tree(dst) == tree(tmp_path / "whole")


@pytest.mark.parametrize("where", ["create", "check", "finish"])
def test_an_interrupt_at_any_step_says_how_to_go_on(source, tmp_path, capsys, monkeypatch, where):
    def interrupt(*_):
        raise KeyboardInterrupt

    if where == "create":
        monkeypatch.setattr(filling.LocalEngine, "_create", interrupt)
    elif where == "finish":
        monkeypatch.setattr(filling.LocalEngine, "_commit", interrupt)
    else:
        monkeypatch.setattr(OutputCheck, "run", interrupt)
    message = failure(capsys, 130, "convert", source, tmp_path / "dst", "--verify")
    assert "--resume" in message
    monkeypatch.undo()
    assert run("convert", source, tmp_path / "dst", "--resume", "--quiet") == 0
    assert_same(read(tmp_path / "dst"), tensors())


def test_a_state_that_a_killed_run_has_emptied_is_removed_from_a_complete_output(source, tmp_path):
    dst = tmp_path / "dst"
    assert run("convert", source, dst, "--quiet") == 0
    complete = tree(dst)
    (dst / STATE).mkdir()
    assert run("convert", source, dst, "--resume", "--quiet") == 0
    assert not (dst / STATE).exists()
    assert tree(dst) == complete
