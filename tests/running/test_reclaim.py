"""--reclaim-source: the source's space comes back as what was made of it is safe, and at no moment is anything only half there."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_files import ROOMY, failure, random_tensor, refusal, run, write

import streamconv
from streamconv.conversion import api
from streamconv.errors import RunError
from streamconv.running import filling, reclaim
from streamconv.running.lock import Lock
from streamconv.running.log import Log
from streamconv.running.reclaim import Reclaim, can_punch, find_gaps
from tools.crash import read_tree

SMALL = ["--max-shard-size", "500KB", "--quiet"]
RECLAIM = [*SMALL, "--reclaim-source", "--yes"]
BLOCKS = 4096 * 16  # bytes: what is left of blocks at the edges of ranges, and of directories
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = {f"w{k}": random_tensor(300, 300 + k, seed=k) for k in range(9)}
    folder = write(tmp_path / "src", tensors, shards=3, config={"dtype": "float32"})
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(params=["holes", "whole files"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    if request.param == "whole files":
        monkeypatch.setattr(reclaim, "can_punch", lambda _: False)
    elif not can_punch(tmp_path):
        pytest.skip("files have no holes here")
    return request.param


def allocated(*folders: Path) -> int:
    return sum(path.stat().st_blocks * 512 for folder in folders for path in folder.rglob("*") if path.is_file())


def stop_at(patch: pytest.MonkeyPatch, step: str, number: int) -> None:
    """Fails a run when it comes to a step of `Reclaim`, the engine, its log or its lock for that time."""
    owner = {"release": Reclaim, "finish": Log, "leave": Lock}.get(step, filling.LocalEngine)
    real, left = getattr(owner, step), [number]

    def stopping(self: object, *given: object, **more: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise RunError("stopped")
        return real(self, *given, **more)

    patch.setattr(owner, step, stopping)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("options", [[], ["--dtype", "bf16"], ["--format", "torch"], ["--single-file"], ["--checksum", "--verify"]])
def test_the_same_bytes_and_no_source(source, tmp_path, way, options):
    assert run("convert", source, tmp_path / "whole", *SMALL, *options) == 0
    assert run("convert", source, tmp_path / "dst", *RECLAIM, *options) == 0
    assert read_tree(tmp_path / "dst") == read_tree(tmp_path / "whole")
    assert {path.name for path in source.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors.index.json"}


@pytest.mark.parametrize("options", [[], ["--dtype", "bf16"]])
def test_no_more_than_a_shard_is_needed(source, tmp_path, monkeypatch, options):
    if not can_punch(tmp_path):
        pytest.skip("files have no holes here")
    dst, most = tmp_path / "dst", [0]
    real = filling.LocalEngine._finish

    def finish(engine: filling.LocalEngine, number: int) -> None:
        most[0] = max(most[0], allocated(source, dst))
        real(engine, number)

    monkeypatch.setattr(filling.LocalEngine, "_finish", finish)
    before = allocated(source)
    assert run("convert", source, dst, *RECLAIM, *options) == 0
    assert before < most[0] <= before + 500_000 + BLOCKS


def test_a_plan_says_how_much_room_it_takes(source, tmp_path, way, monkeypatch):
    given = {"max_shard_size": "500KB", "max_memory": ROOMY}
    whole = api.plan(source, tmp_path / "dst", **given).totals.disk_needed
    needed = api.plan(source, tmp_path / "dst", reclaim_source=True, **given).totals.disk_needed
    size = max(path.stat().st_size for path in source.glob("*.safetensors"))
    assert needed <= 500_000 + (BLOCKS if way == "holes" else size)
    assert needed < whole // 2
    free = needed + 4096
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, free))
    assert run("convert", source, tmp_path / "no", *SMALL) == 2
    assert run("convert", source, tmp_path / "dst", *RECLAIM) == 0


@pytest.mark.sampled(3)
@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize("step", ["release", "finish", "_finish", "_copy", "leave"])
def test_stopped_at_any_step_it_goes_on(source, tmp_path, monkeypatch, way, step, number):
    assert run("convert", source, tmp_path / "whole", *SMALL) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, step, number)
        code = run("convert", source, tmp_path / "dst", *RECLAIM)
    assert code == (0 if step == "leave" and number else 3)
    with monkeypatch.context() as patch:
        stop_at(patch, step, number + 1)
        assert run("convert", source, tmp_path / "dst", *RECLAIM, "--resume") in {0, 3}
    assert run("convert", source, tmp_path / "dst", *RECLAIM, "--resume") == 0
    assert read_tree(tmp_path / "dst") == read_tree(tmp_path / "whole")
    assert not list(source.glob("*.safetensors"))
    assert run("convert", source, tmp_path / "dst", *RECLAIM, "--resume") == 0  # and once more


def stopped(source: Path, dst: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, "_finish", 4)
        assert run("convert", source, dst, *RECLAIM, *options) == 3


def test_a_run_that_fails_while_it_leaves_is_tidied_up_by_the_next(source, tmp_path, monkeypatch):
    assert run("convert", source, tmp_path / "whole", *SMALL) == 0
    real = Path.iterdir

    def refuse(path: Path) -> Iterator[Path]:
        if path.name == ".streamconv":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuse)
        assert run("convert", source, tmp_path / "dst", *RECLAIM) == 3
    assert (tmp_path / "dst" / ".streamconv" / "plan.json").is_file()
    assert run("convert", source, tmp_path / "dst", *RECLAIM, "--resume") == 0
    assert read_tree(tmp_path / "dst") == read_tree(tmp_path / "whole")


def test_what_is_left_of_the_source_is_not_taken_for_a_checkpoint(source, tmp_path, monkeypatch, capsys):
    stopped(source, tmp_path / "dst", monkeypatch)
    with pytest.raises(streamconv.StreamconvError):
        streamconv.open(source)


def test_the_only_copy_is_not_overwritten(source, tmp_path, monkeypatch, capsys):
    dst = tmp_path / "dst"
    stopped(source, dst, monkeypatch)
    before = read_tree(dst)
    other = write(tmp_path / "other", {"w": random_tensor(3)})
    assert "only copy" in refusal(capsys, "convert", other, dst, "--quiet", "--overwrite")
    assert read_tree(dst) == before
    assert "--reclaim-source: add it" in refusal(capsys, "convert", source, dst, *SMALL, "--resume")
    assert "dtype was None, is 'bf16'" in refusal(capsys, "convert", source, dst, *RECLAIM, "--dtype", "bf16", "--resume")
    assert "(src was not" in refusal(capsys, "convert", other, dst, *RECLAIM, "--resume")
    assert read_tree(dst) == before
    assert run("convert", source, dst, *RECLAIM, "--resume") == 0


def test_an_only_copy_that_is_damaged_is_told(source, tmp_path, monkeypatch, capsys):
    stopped(source, tmp_path / "dst", monkeypatch)
    damaged = tmp_path / "dst" / "model-00001-of-00009.safetensors"
    with damaged.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"???")
    assert f"{damaged.name}: is damaged" in failure(capsys, 3, "convert", source, tmp_path / "dst", *RECLAIM, "--resume")


def test_a_source_still_needed_must_not_change(source, tmp_path, monkeypatch, capsys):
    stopped(source, tmp_path / "dst", monkeypatch)
    os.utime(source / "model-00003-of-00003.safetensors", ns=(1, 1))
    capsys.readouterr()
    assert run("convert", source, tmp_path / "dst", *RECLAIM, "--resume") == 3
    assert "model-00003-of-00003.safetensors" in capsys.readouterr().err


def test_what_was_written_wrongly_is_not_paid_for_with_the_source(source, tmp_path, monkeypatch):
    before = read_tree(source)

    def spoil(engine: filling.LocalEngine, number: int, path: str, fd: int) -> None:
        os.pwrite(fd, b"??", os.fstat(fd).st_size - 2)

    with monkeypatch.context() as patch:
        patch.setattr(filling.LocalEngine, "_seal", spoil)
        assert run("convert", source, tmp_path / "dst", *RECLAIM, "-j", "1") == 3
    assert read_tree(source) == before
    assert run("convert", source, tmp_path / "dst", *RECLAIM, "--resume") == 0


def test_dst_may_have_moved(source, tmp_path, monkeypatch):
    assert run("convert", source, tmp_path / "whole", *SMALL) == 0
    stopped(source, tmp_path / "dst", monkeypatch)
    (tmp_path / "dst").rename(tmp_path / "moved")
    assert run("convert", source, tmp_path / "moved", *RECLAIM, "--resume") == 0
    assert read_tree(tmp_path / "moved") == read_tree(tmp_path / "whole")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("container", ["torch", "mindspore"])
def test_sources_of_other_containers(source, tmp_path, monkeypatch, container):
    other = tmp_path / "other"
    assert run("convert", source, other, *SMALL, "--format", container) == 0
    assert run("convert", other, tmp_path / "whole", *SMALL, "--format", "safetensors") == 0
    stopped(other, tmp_path / "dst", monkeypatch)
    with pytest.raises(streamconv.StreamconvError):
        streamconv.open(other)
    assert run("convert", other, tmp_path / "dst", *RECLAIM, "--resume") == 0
    assert read_tree(tmp_path / "dst") == read_tree(tmp_path / "whole")


# What is refused ---------------------------------------------------------------------------------------------------


def link(source: Path) -> Path:
    shutil.move(source / "model-00002-of-00003.safetensors", source.parent / "blob")
    (source / "model-00002-of-00003.safetensors").symlink_to(source.parent / "blob")
    return source


def link_folder(source: Path) -> Path:
    (source.parent / "link").symlink_to(source)
    return source.parent / "link"


def link_hard(source: Path) -> Path:
    (source.parent / "name").hardlink_to(source / "model-00002-of-00003.safetensors")
    return source


def link_beside(source: Path, name: str = "vocab.txt") -> Path:
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(source / "model-00001-of-00003.safetensors")
    return source


def link_weights(source: Path) -> Path:
    return link_beside(source, "consolidated.pth")


def link_below(source: Path) -> Path:
    return link_beside(source, "original/weights.safetensors")


@pytest.mark.parametrize(
    ("how", "named"),
    [
        (link, "through a link"),
        (link_folder, "through a link"),
        (link_hard, "hard links"),
        (link_beside, "vocab.txt leads to"),
        (link_weights, "consolidated.pth leads to"),
        (link_below, "weights.safetensors leads to"),
    ],
)
@pytest.mark.parametrize("command", ["convert", "plan"])
def test_sources_that_others_have_too_are_refused(source, tmp_path, capsys, how, named, command):
    src = how(source)
    before = read_tree(source)
    options = RECLAIM if command == "convert" else [*SMALL, "--reclaim-source"]
    assert named in refusal(capsys, command, src, tmp_path / "dst", *options)
    assert read_tree(source) == before
    assert not (tmp_path / "dst").exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stdin", "code"), [(io.StringIO("y\n"), 2), (Terminal(""), 2), (Terminal("n\n"), 2), (Terminal("y\n"), 0), (Terminal("Yes\n"), 0)]
)
def test_it_asks_first(source, tmp_path, monkeypatch, capsys, stdin, code):
    monkeypatch.setattr("sys.stdin", stdin)
    before = read_tree(source)
    assert run("convert", source, tmp_path / "dst", *SMALL, "--reclaim-source") == code
    out, err = capsys.readouterr()
    assert not out
    assert str(source) in err if isinstance(stdin, Terminal) else "--yes" in err
    assert (read_tree(source) == before) == bool(code)
    assert (tmp_path / "dst").exists() == (not code)


def test_a_reference_that_would_be_gone(source, tmp_path, capsys):
    assert "another reference" in refusal(capsys, "convert", source, tmp_path / "dst", *RECLAIM, "--compare", source)


def test_sidecars_from_elsewhere_stay(source, tmp_path):
    beside = write(tmp_path / "model", {"w": random_tensor(3)}, config={"dtype": "float32"})
    before = read_tree(beside)
    assert run("convert", source, tmp_path / "dst", *RECLAIM, "--sidecars-from", beside) == 0
    assert read_tree(beside) == before


def test_gaps():
    assert list(find_gaps([], 9)) == [(0, 9)]
    assert list(find_gaps([(2, 4), (3, 5), (7, 9)], 9)) == [(0, 2), (5, 7)]
    assert list(find_gaps([(0, 4), (1, 2)], 6)) == [(4, 6)]
