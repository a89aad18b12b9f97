"""Runs that are killed, and system calls that fail or do half of what they were asked: one clear line, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoint_files import ROOMY, random_tensor, run, write

from streamconv.engine import direct
from streamconv.running import filling
from streamconv.running.log import Log
from tools import crash, faults, make_checkpoint, measure

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "src", {f"w{k}": random_tensor(300, 300 + k, seed=k) for k in range(9)}, shards=3, config={"dtype": "float32"})


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert run(*arguments) == 3
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("streamconv: error: ")
    assert err.count("\n") == 1
    return err


def test_killed_runs_resume_to_the_same_bytes(tmp_path):
    kinds = ["fuse", "reclaim"]
    command = [sys.executable, "-m", "tools.crash", "--kills", str(len(kinds)), "--dir", str(tmp_path)]
    command += [part for kind in kinds for part in ("--kind", kind)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=Path(crash.__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(kinds)


def test_the_harness_sees_a_result_that_differs(tmp_path, monkeypatch):
    trees = iter([{"a": b"1"}, {"a": b"2"}])
    monkeypatch.setattr(crash, "read_tree", lambda _: next(trees))
    monkeypatch.setattr(crash, "start", lambda *_: os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "0.01"))
    with pytest.raises(crash.CrashError, match="a differ after a resumed run"):
        crash.crash("reshard", 1, tmp_path, crash.random.Random(0))


@pytest.mark.skipif(not shutil.which("cc") or sys.platform != "linux", reason="calls fail by a library that is compiled")
def test_whatever_call_of_the_system_fails_nothing_is_lost(tmp_path):
    command = [sys.executable, "-m", "tools.faults", "--kind", "reshard", "--kind", "torch", "--count", "2", "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=Path(crash.__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["reshard", "2"], ["torch", "2"]]


def test_the_faults_see_bytes_that_differ(tmp_path, monkeypatch):
    monkeypatch.setitem(faults.KINDS, "reshard", [])
    bench = faults.Bench("reshard", tmp_path)
    (tmp_path / "src").mkdir()
    monkeypatch.setattr(bench, "run", lambda *_: faults.Outcome(0, "", {}))
    bench.wanted = {"a": b"1"}
    with pytest.raises(faults.FaultError, match=r"reshard: convert: read 1 is short: a differ with exit code 0"):
        bench.suffer(0, faults.Fault("read", 1, faults.SHORT))


# System calls ------------------------------------------------------------------------------------------------------


def fails_once(call: Callable[..., int], number: int, after: int) -> tuple[Callable[..., int], list[int]]:
    """A system call that fails with ``number`` once, after ``after`` that do not; counts down in the list."""
    left = [after]

    def failing(*given: object, **more: object) -> int:
        left[0] -= 1
        if left[0] == -1:
            raise OSError(number, os.strerror(number))
        return call(*given, **more)

    return failing, left


SMALL = ["--max-shard-size", "500KB"]


@pytest.fixture(params=["direct", "cached"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Past the page cache, or through it; the copies through the worker's buffer, so that their calls can be caught."""
    monkeypatch.setattr(direct, "LEAST", 16 << 10)
    if request.param == "cached":
        monkeypatch.setattr(filling, "shares_extents", lambda _: True)
    monkeypatch.setattr(filling, "SAVE_BYTES", 100 << 10)
    monkeypatch.delattr(os, "copy_file_range")
    return request.param


@pytest.mark.sampled(3)
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("pwrite", errno.ENOSPC), ("pwrite", errno.EIO), ("pwrite", errno.EDQUOT), ("preadv", errno.EIO), ("fsync", errno.EIO),
        ("fsync", errno.ENOSPC), ("fdatasync", errno.EIO), ("truncate", errno.ENOSPC), ("write", errno.ENOSPC),
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", [[], pytest.param(["--dtype", "bf16"], marks=pytest.mark.slow)])
def test_a_system_call_that_fails(source, tmp_path, capsys, monkeypatch, way, call, number, after, options):
    options = [*SMALL, *options]
    assert run("convert", source, tmp_path / "whole", *options, "--quiet") == 0
    failing, left = fails_once(getattr(os, call), number, after)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        code = run("convert", source, tmp_path / "dst", *options, "--quiet", "-j", "1")
    err = capsys.readouterr().err
    if left[0] >= 0:
        assert code == 0
        pytest.skip(f"only {after - left[0]} of these calls")
    assert code == 3
    assert err.count("\n") == 1
    assert ("no room left" if number in (errno.ENOSPC, errno.EDQUOT) else os.strerror(number)) in err
    if (call, number) == ("preadv", errno.EIO):
        assert "model-0000" in err
        assert ", byte " in err
    assert run("convert", source, tmp_path / "dst", *options, "--quiet", "--resume") == 0
    assert crash.read_tree(tmp_path / "dst") == crash.read_tree(tmp_path / "whole")


def test_an_error_in_writing_names_file_and_offset(source, tmp_path, capsys, monkeypatch, way):
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(filling, "write", lambda *_: None)  # literals
        patch.setattr(os, "pwrite", fail)
        err = failure(capsys, "convert", source, tmp_path / "dst", *SMALL, "--quiet", "-j", "1")
    assert ".safetensors.partial, byte " in err or "model-00001-of-00003.safetensors, byte " in err
    assert os.strerror(errno.EIO) in err


@pytest.mark.sampled(3)
@pytest.mark.parametrize("most", [1 << 12, 999])
@pytest.mark.parametrize("backend", ["auto", "pread"])
@pytest.mark.parametrize("options", [[], ["--dtype", "bf16"], ["--checksum", "--format", "torch"]])
def test_short_reads_and_writes(source, tmp_path, monkeypatch, way, most, backend, options):
    options = [*SMALL, *options, "--read-backend", backend]
    assert run("convert", source, tmp_path / "whole", *options, "--quiet") == 0
    pread, preadv, pwrite, write_, copied = os.pread, os.preadv, os.pwrite, os.write, getattr(os, "copy_file_range", None)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", lambda fd, nbytes, offset: pread(fd, min(nbytes, most), offset))
        if copied:
            patch.setattr(os, "copy_file_range", lambda source, target, nbytes, *at: copied(source, target, min(nbytes, most), *at))
        patch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:most]], offset))
        patch.setattr(os, "pwrite", lambda fd, view, offset: pwrite(fd, view[:most], offset))
        patch.setattr(os, "write", lambda fd, view: write_(fd, view[:7]))
        assert run("convert", source, tmp_path / "dst", *options, "--quiet", "--verify") == 0
    assert crash.read_tree(tmp_path / "dst") == crash.read_tree(tmp_path / "whole")


def test_an_interrupted_system_call_is_made_again(source, tmp_path):
    """Signals arrive all the time; Python makes the call again, and ctypes' `fallocate` is allowed to be given up."""
    code = (
        "import signal, sys\nfrom streamconv.cli.command import main\n"
        "signal.signal(signal.SIGALRM, lambda *_: None)\nsignal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)\n"
        "code = main()\nsignal.setitimer(signal.ITIMER_REAL, 0)\nsys.exit(code)"
    )
    command = [sys.executable, "-c", code, "convert", source, tmp_path / "dst", *SMALL, "--dtype", "bf16", "--verify", "--quiet"]
    done = subprocess.run([*command, "--max-memory", ROOMY], capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# A full disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False).returncode
    ):
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True, timeout=600)


@pytest.mark.parametrize("options", [[], ["--dtype", "bf16"]])
@pytest.mark.parametrize("reserved", [True, False])
def test_a_disk_that_is_full(source, tmp_path, small_disk, capsys, monkeypatch, options, reserved):
    options = [*SMALL, *options]
    assert run("convert", source, tmp_path / "whole", *options, "--quiet") == 0
    junk = small_disk / "junk"
    junk.write_bytes(bytes(1_300_000))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, 10**12))
        if not reserved:
            patch.setattr(filling, "allocate", lambda *_: None)
        assert "no room left on the disk" in failure(capsys, "convert", source, small_disk / "dst", *options, "--quiet")
    junk.unlink()
    if not options[2:]:
        subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True, timeout=600)
    assert run("convert", source, small_disk / "dst", *options, "--quiet", "--resume") == 0
    assert crash.read_tree(small_disk / "dst") == crash.read_tree(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--recipe", "fuse.json"]])
def test_gigabytes_where_the_kernel_gives_256_mb(tmp_path, options):
    """Page cache and all: a re-shard, and a fusion of q, k and v, of 20 GB."""
    make_checkpoint.main(["llama-3-8b", str(tmp_path / "src"), "--size", "20GB"])
    (tmp_path / "fuse.json").write_text(json.dumps(crash.FUSE | {"dims": {"g": 8, "d": 128}}))
    command = ["convert", str(tmp_path / "src"), str(tmp_path / "dst"), *options, "--max-memory", "180MB", "--quiet"]
    try:
        took = measure.measure([sys.executable, "-m", "streamconv", *command], cgroup=256_000_000, cwd=tmp_path)
    except measure.NotPermittedError as error:
        pytest.skip(str(error))
    assert took.exit_code == 0
    assert took.cgroup is not None
    assert took.cgroup.oom_kills == 0


# A source that changes ---------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("backend", ["auto", "mmap", "pread"])
@pytest.mark.parametrize("how", ["cut", "written", "replaced"])
@pytest.mark.parametrize("options", [[], ["--dtype", "bf16"]])
def test_a_source_that_changes_while_it_is_read(source, tmp_path, capsys, monkeypatch, backend, how, options):
    changed = source / "model-00002-of-00003.safetensors"
    first = [True]

    def change() -> None:
        if first.pop() if first else False:
            if how == "cut":
                os.truncate(changed, changed.stat().st_size // 2)
            elif how == "written":
                with changed.open("r+b") as file:
                    file.seek(-1, os.SEEK_END)
                    file.write(b"?")
            else:
                shutil.copyfile(changed, tmp_path / "other")
                (tmp_path / "other").replace(changed)

    for name in ("_copy", "_compute"):
        real = getattr(filling.LocalEngine, name)
        monkeypatch.setattr(filling.LocalEngine, name, lambda engine, *task, real=real: (change(), real(engine, *task))[1])
    err = failure(capsys, "convert", source, tmp_path / "dst", *SMALL, *options, "--read-backend", backend, "--quiet", "-j", "2")
    assert changed.name in err
    assert "plan again" in err
    assert not (tmp_path / "dst" / "model.safetensors.index.json").exists()


def test_a_changed_source_is_told_before_the_rest_is_done(source, tmp_path, capsys, monkeypatch):
    done: list[int] = []
    real = filling.LocalEngine._copy

    def copy(engine: filling.LocalEngine, number: int, segment: object) -> int:
        done.append(number)
        if len(done) == 2:
            os.utime(source / "model-00001-of-00003.safetensors", ns=(1, 1))
        return real(engine, number, segment)

    monkeypatch.setattr(filling.LocalEngine, "_copy", copy)
    assert "model-00001-of-00003" in failure(capsys, "convert", source, tmp_path / "dst", *SMALL, "-j", "1", "--quiet")
    assert len(done) == 2


def test_a_log_that_cannot_be_written_is_one_line(source, tmp_path, capsys, monkeypatch):
    def fail(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Log, "append", fail)
    assert os.strerror(errno.EROFS) in failure(capsys, "convert", source, tmp_path / "dst", "--quiet")
