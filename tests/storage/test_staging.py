"""Folders for temporary files go with their processes, also with those that were killed, and never with others."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from streamconv.errors import UsageError
from streamconv.storage import staging


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for temporary files, which nobody has looked through yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    staging._clear.cache_clear()
    return tmp_path


def leave_one() -> None:
    """Has a process end in the middle."""
    if not (pid := os.fork()):
        with staging.staging() as folder:
            (folder / "half").write_text("made")
            os._exit(1)
    os.waitpid(pid, 0)


def test_what_a_killed_process_left_goes_and_what_others_hold_stays(place):
    with staging.staging() as held:
        leave_one()
        other = place / "streamconv-0123456789ab-x"  # of another machine that shares the directory
        other.mkdir()
        assert len(list(place.iterdir())) == 3
        staging._clear.cache_clear()
        with staging.staging() as folder:
            assert set(place.iterdir()) == {held, folder, other}
    assert set(place.iterdir()) == {other}


def test_without_locks_nothing_of_others_goes(place, monkeypatch):
    leave_one()
    monkeypatch.setattr(staging, "fcntl", None)
    with staging.staging():
        assert len(list(place.iterdir())) == 2
    assert len(list(place.iterdir())) == 1


def test_a_folder_that_another_process_takes_away_is_made_again(place, monkeypatch):
    lock, taken = staging._lock, []

    def late(folder: Path) -> int | None:
        if not taken:
            shutil.rmtree(folder)
        taken.append(folder)
        return lock(folder)

    monkeypatch.setattr(staging, "_lock", late)
    with staging.staging() as folder:
        assert folder.is_dir()
        assert len(taken) == 2
    assert not list(place.iterdir())


def test_a_system_that_fails_now_and_then_leaves_nothing(place, monkeypatch):
    unlink, calls = os.unlink, []

    def fail(*given, **more):
        calls.append(given)
        if len(calls) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        unlink(*given, **more)

    with staging.staging() as folder:
        (folder / "one").write_text("")
        monkeypatch.setattr(os, "unlink", fail)
    assert not list(place.iterdir())


def test_where_no_folder_can_be_made(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="set TMPDIR"), staging.staging():
        pass
