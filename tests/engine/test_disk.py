"""Disks that are full or fail, and kernels that copy in other ways, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple

import pytest
import torch
from checkpoint_files import assert_same, failure, numbered, read, refusal, run, write
from safetensors_files import container, tensor
from small_source import document, raising, stop_after, tensors, tree

import streamconv
from streamconv.engine import io, writers

Usage = namedtuple("Usage", "total used free")


def test_no_room_on_the_disk(source, tmp_path, capsys, monkeypatch):
    before = tree(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12, 4096))
    message = refusal(capsys, "convert", source, tmp_path / "a" / "b" / "dst")
    assert "no room on the disk" in message
    assert "4.1 kB are free" in message
    assert tree(tmp_path) == before


def test_what_is_replaced_counts_as_room(source, tmp_path, monkeypatch):
    dst = tmp_path / "dst"
    stop_after(monkeypatch, 12)
    assert run("convert", source, dst, "--max-shard-size", "2KB", "--quiet") == 3
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12, 3000))
    assert run("convert", source, dst, "--max-shard-size", "2KB", "--quiet", "--resume") == 0
    assert run("convert", source, dst, "--single-file", "--quiet", "--overwrite") == 0


def test_a_disk_that_fills_up_can_be_gone_on_with(source, tmp_path, capsys, monkeypatch):
    real, left = io.copy_range, [2]

    def full(*given):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*given)

    monkeypatch.setattr(writers, "copy_range", full)
    message = failure(capsys, 3, "convert", source, tmp_path / "dst", "--max-shard-size", "2KB")
    assert "no room left" in message
    assert "--resume" in message
    monkeypatch.undo()
    assert run("convert", source, tmp_path / "dst", "--max-shard-size", "2KB", "--resume", "--quiet", "--verify") == 0


@pytest.mark.parametrize("step", ["truncate", "fsync", "pwrite"])
def test_an_error_of_the_disk_is_one_line(source, tmp_path, capsys, monkeypatch, step):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, step, fail)
    message = failure(capsys, 3, "convert", source, tmp_path / "dst", "--dtype", "bf16")
    assert os.strerror(errno.EIO) in message
    monkeypatch.undo()
    assert run("convert", source, tmp_path / "dst", "--dtype", "bf16", "--overwrite", "--quiet") == 0


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "how", ["absent", "short", *map(errno.errorcode.get, sorted({errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}))]
)
@pytest.mark.parametrize("preadv", [True, False])
def test_kernels_that_copy_otherwise(source, tmp_path, monkeypatch, how, preadv):
    real = os.copy_file_range
    if how == "absent":
        monkeypatch.delattr(os, "copy_file_range")
    elif how == "short":
        monkeypatch.setattr(os, "copy_file_range", lambda a, b, n, *offsets: real(a, b, min(n, 7), *offsets))
    else:
        monkeypatch.setattr(os, "copy_file_range", raising(getattr(errno, how)))
    if not preadv:
        monkeypatch.delattr(os, "preadv")
        monkeypatch.delattr(os, "pwrite")
    assert run("convert", source, tmp_path / "dst", "--quiet", "--max-shard-size", "1KB", "--verify") == 0
    assert_same(read(tmp_path / "dst"), tensors())
    if not preadv:  # whether direct reads can be had is asked once, when the module is loaded
        return
    large = numbered({"a": (700, 501), "odd": (3,), "b": (333, 777)})
    write(tmp_path / "large", {**large, "byte": torch.tensor([True])}, shards=2)
    for backend in ("auto", "mmap"):
        options = ["--max-shard-size", "1MB", "--overwrite", "--verify", "--read-backend", backend]
        assert run("convert", tmp_path / "large", tmp_path / "dst2", *options, "--quiet") == 0
        assert_same(read(tmp_path / "dst2"), read(tmp_path / "large"))


def test_a_kernel_that_copies_nothing_is_done_without(source, tmp_path, monkeypatch):
    """A file system may have no such thing and say so by 0, which is also what there is past a file's end."""
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    assert run("convert", source, tmp_path / "dst", "--quiet", "--verify") == 0
    assert_same(read(tmp_path / "dst"), tensors())


@pytest.mark.parametrize("how", [raising(errno.EIO), raising(errno.ENOSPC)], ids=["EIO", "ENOSPC"])
def test_kernels_that_do_not_copy(source, tmp_path, capsys, monkeypatch, how):
    monkeypatch.setattr(os, "copy_file_range", how)
    assert str(tmp_path) in failure(capsys, 3, "convert", source, tmp_path / "dst")


def test_holes_stay_holes(tmp_path, capsys):
    folder = tmp_path / "src"
    folder.mkdir()
    header = {"a": tensor(0, 1 << 30), "b": tensor(1 << 30, (1 << 30) + 8)}
    path = folder / "model.safetensors"
    path.write_bytes(container(header))
    start = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(start + (1 << 30) + 8)
        for offset in (0, 123_456_789, (1 << 30) - 1):
            file.seek(start + offset)
            file.write(b"!")
        file.write(b"tensor b")
    for name, options in {"two": ["--max-shard-size", "1GiB"], "one": [], "file.safetensors": []}.items():
        done = document(capsys, "convert", folder, tmp_path / name, *options)
        assert done["bytes_written"] > 1 << 30
        assert done["disk_needed"] < 1 << 20
        files = [tmp_path / name] if name.endswith("s") else list((tmp_path / name).glob("*.safetensors"))
        assert sum(file.stat().st_blocks * 512 for file in files) < 1 << 20
        entries = streamconv.open(tmp_path / name)
        assert entries["b"].numpy().tobytes() == b"tensor b"
        for offset in (0, 123_456_789, (1 << 30) - 1):
            assert entries["a"].numpy(rows=slice(offset, offset + 1)).tobytes() == b"!"
