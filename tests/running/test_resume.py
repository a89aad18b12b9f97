"""Going on with an interrupted run: what is kept, what is checked, what is refused; the lock, and SHA256SUMS."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_files import ROOMY, random_tensor, refusal, run, write

from streamconv import threads
from streamconv.conversion import api, recovery
from streamconv.digests import format_sums
from streamconv.engine import order
from streamconv.errors import DestinationError, RunError
from streamconv.planning.plan import VERSION
from streamconv.running import difference, directory, filling, holder, lock
from streamconv.running import run as running
from streamconv.running.directory import Directory
from streamconv.running.lock import Lock
from streamconv.running.log import Log, read_lines
from streamconv.running.output import begun_plan
from streamconv.units import format_size
from tools.crash import read_tree

SMALL = ["--max-shard-size", "500KB", "--quiet", "-j", "1"]
STATE = ".streamconv"
LOG, PLAN = f"{STATE}/log.jsonl", f"{STATE}/plan.json"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = {f"w{k}": random_tensor(300, 300 + k, seed=k) for k in range(9)}
    return write(tmp_path / "src", tensors, shards=3, config={"dtype": "float32"})


@pytest.fixture(autouse=True)
def _small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "COPY_CHUNK", 64 << 10)
    monkeypatch.setattr(filling, "SAVE_BYTES", 100 << 10)


def watch(patch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[tuple[str, int]]:
    """The tasks that are begun, as file and place; stops the run before one more than ``stop_after``."""
    begun: list[tuple[str, int]] = []
    for name in ("_copy", "_compute"):
        real = getattr(filling.LocalEngine, name)

        def do(engine: filling.LocalEngine, *task: object, real: Callable[..., int] = real) -> int:
            if len(begun) == stop_after:
                raise RunError("stopped")
            whole = task if len(task) == 3 else (*task, None)
            begun.append((engine._plan.files[task[0]].path, order.place_of(engine._plan, whole)))
            return real(engine, *task)

        patch.setattr(filling.LocalEngine, name, do)
    return begun


def interrupt(monkeypatch: pytest.MonkeyPatch, source: Path, dst: Path, *options: str, after: int = 28) -> list[tuple[str, int]]:
    """Runs a conversion until it has done so many tasks."""
    with monkeypatch.context() as patch:
        begun = watch(patch, after)
        assert run("convert", source, dst, *SMALL, *options) == 3
    return begun


def go_on(monkeypatch: pytest.MonkeyPatch, source: Path, dst: Path, *options: str) -> list[tuple[str, int]]:
    with monkeypatch.context() as patch:
        begun = watch(patch)
        assert run("convert", source, dst, *SMALL, *options, "--resume") == 0
    return begun


@pytest.mark.parametrize("options", [[], ["--dtype", "bf16"], ["--checksum"]])
def test_what_is_durable_is_not_done_again(source, tmp_path, monkeypatch, options):
    before = interrupt(monkeypatch, source, tmp_path / "dst", *options, after=28 if not options[1:] else 7)
    state = Log()
    state.replay(read_lines((tmp_path / "dst" / LOG).read_bytes())[0])
    kept = {(name, place) for name, places in state.durable.items() for place in places}
    assert kept | {(name, 0) for name in state.finished}
    after = go_on(monkeypatch, source, tmp_path / "dst", *options)
    assert not kept & set(after)
    assert not {name for name, _ in after} & state.finished.keys()
    assert run("convert", source, tmp_path / "whole", *SMALL, *options) == 0
    assert read_tree(tmp_path / "dst") == read_tree(tmp_path / "whole")
    assert not (set(before) - kept) - set(after) - {task for task in before if task[0] in state.finished}


def test_what_is_kept_is_said(source, tmp_path, monkeypatch, capsys):
    dst = tmp_path / "dst"
    interrupt(monkeypatch, source, dst)
    state = Log()
    state.replay(read_lines((dst / LOG).read_bytes())[0])
    finished = sum((dst / name).stat().st_size for name in state.finished)
    capsys.readouterr()
    result = api.convert(source, dst, max_shard_size="500KB", workers=1, max_memory=ROOMY, resume=True)
    total = sum(file.size for file in result.plan.files)
    assert finished <= result.kept < total
    assert result.kept > 0
    kept = f"resumed: {format_size(result.kept)} of {format_size(total)} were there, and are kept"
    assert kept in result.notes
    loud = [option for option in SMALL if option != "--quiet"]
    assert run("convert", source, dst, *loud, "--resume") == 0
    assert f"note: resumed: {format_size(total)} of {format_size(total)} were there, and are kept\n" in capsys.readouterr().out
    assert run("convert", source, tmp_path / "other", *loud, "--resume") == 0
    assert "resumed" not in capsys.readouterr().out


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 255
    path.write_bytes(data)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("options", [[], ["--checksum"], ["--dtype", "bf16"], ["--format", "torch"]])
@pytest.mark.parametrize("what", ["finished", "finished's header", "half done", "cut", "gone"])
def test_what_is_kept_is_checked_first(source, tmp_path, monkeypatch, options, what):
    dst = tmp_path / "dst"
    interrupt(monkeypatch, source, dst, *options, after=28 if options != ["--dtype", "bf16"] else 7)
    finished = sorted(path for path in dst.glob("*model-*") if not path.name.endswith(".partial"))
    assert finished
    if what == "half done":
        places = [json.loads(line).get("durable", {}) for line in (dst / LOG).read_text().splitlines()]
        half = [(dst / f"{name}.partial", at[0]) for found in places for name, at in found.items() if (dst / f"{name}.partial").exists()]
        for path, at in half:
            flip(path, at + 5)
        assert half or options == ["--dtype", "bf16"]
    elif what == "cut":
        os.truncate(finished[0], 1000)
    elif what == "gone":
        finished[0].unlink()
    else:
        flip(finished[0], 20 if "header" in what else -9)
    go_on(monkeypatch, source, dst, *options)
    assert run("convert", source, tmp_path / "whole", *SMALL, *options) == 0
    assert read_tree(dst) == read_tree(tmp_path / "whole")


def test_other_workers_and_tiles_may_go_on(source, tmp_path, monkeypatch):
    interrupt(monkeypatch, source, tmp_path / "dst")
    monkeypatch.setattr(order, "COPY_CHUNK", 48 << 10)
    assert run("convert", source, tmp_path / "dst", "--max-shard-size", "500KB", "--quiet", "-j", "3", "--resume") == 0
    assert run("convert", source, tmp_path / "whole", *SMALL) == 0
    assert read_tree(tmp_path / "dst") == read_tree(tmp_path / "whole")


def rewrite(path: Path) -> None:
    """Other bytes of the same length, at the same time."""
    found = path.stat()
    flip(path, -1)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda src: os.utime(src / "model-00002-of-00003.safetensors", ns=(1, 1)), "model-00002-of-00003.safetensors was modified"),
        (lambda src: (src / "config.json").write_text("{}"), "config.json had "),
        (lambda src: rewrite(src / "model-00001-of-00003.safetensors"), "model-00001-of-00003.safetensors has other bytes"),
        (lambda src: (src / "more.txt").write_text("x"), "more.txt was not read"),
        (lambda src: (src / "note.txt").unlink(), "note.txt is not read any more"),
    ],
)
def test_a_source_that_is_another_one_is_named(source, tmp_path, monkeypatch, capsys, change, named):
    (source / "note.txt").write_text("x")
    interrupt(monkeypatch, source, tmp_path / "dst")
    change(source)
    before = read_tree(tmp_path / "dst")
    message = refusal(capsys, "convert", source, tmp_path / "dst", *SMALL, "--resume")
    assert named in message
    assert "another one" in message
    assert read_tree(tmp_path / "dst") == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--dtype", "bf16"], "dtype was None, is 'bf16'"),
        (["--max-shard-size", "1MB"], "max_shard_size was 500000, is 1000000"),
        (["--single-file"], "single_file was None, is True"),
        (["--format", "torch"], "format was None, is 'torch'"),
    ],
)
def test_an_option_that_is_another_one_is_named(source, tmp_path, monkeypatch, capsys, options, named):
    interrupt(monkeypatch, source, tmp_path / "dst")
    assert named in refusal(capsys, "convert", source, tmp_path / "dst", *SMALL, *options, "--resume")


def test_the_same_in_other_words_goes_on(source, tmp_path, monkeypatch):
    interrupt(monkeypatch, source, tmp_path / "dst", "--dtype", "bf16", after=7)
    assert run("convert", source, tmp_path / "dst", *SMALL, "--dtype", "bfloat16", "--resume") == 0


def test_another_version_of_the_plan_is_named(source, tmp_path, monkeypatch, capsys):
    interrupt(monkeypatch, source, tmp_path / "dst")
    monkeypatch.setattr(difference, "VERSION", VERSION + 1)
    assert f"of version {VERSION}, not {VERSION + 1}" in refusal(capsys, "convert", source, tmp_path / "dst", *SMALL, "--resume")


def test_a_line_that_was_cut_off_counts_for_nothing(source, tmp_path, monkeypatch):
    interrupt(monkeypatch, source, tmp_path / "dst")
    with (tmp_path / "dst" / LOG).open("a") as file:
        file.write('{"finished": "model-00003-of')
    assert run("convert", source, tmp_path / "dst", *SMALL, "--resume") == 0
    assert run("convert", source, tmp_path / "whole", *SMALL) == 0
    assert read_tree(tmp_path / "dst") == read_tree(tmp_path / "whole")


def test_old_files_go_even_if_the_run_that_was_to_remove_them_died(source, tmp_path, monkeypatch):
    dst = tmp_path / "dst"
    write(dst, {"old": random_tensor(4)})
    with monkeypatch.context() as patch:
        patch.setattr(Directory, "remove", lambda *_: (_ for _ in ()).throw(RunError("killed")))
        assert run("convert", source, dst, *SMALL, "--overwrite") == 3
    assert (dst / "model.safetensors").exists()
    assert run("convert", source, dst, *SMALL, "--resume") == 0
    assert not (dst / "model.safetensors").exists()
    assert not interrupt(monkeypatch, source, tmp_path / "b", after=28)[28:]
    assert list((tmp_path / "b").glob("*.partial"))
    assert run("convert", source, tmp_path / "b", "--single-file", "--quiet", "--overwrite") == 0
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"model.safetensors", "config.json"}


@pytest.mark.parametrize("at", [(api, "make_plan"), (Directory, "prepare")])
def test_an_overwrite_that_is_killed_before_its_log_is_begun_is_gone_on_with(source, tmp_path, capsys, monkeypatch, at):
    dst = tmp_path / "dst"
    write(dst, {"old": random_tensor(4)})
    before = read_tree(dst)
    if not (pid := os.fork()):
        monkeypatch.setattr(*at, lambda *_, **__: os._exit(9))
        run("convert", source, dst, *SMALL, "--overwrite")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert {name: data for name, data in read_tree(dst).items() if name != f"{LOG}.new"} == before
    assert "not empty" in refusal(capsys, "convert", source, dst, "--resume")  # another conversion
    assert run("convert", source, dst, *SMALL, "--resume") == 0
    assert run("convert", source, tmp_path / "whole", *SMALL) == 0
    assert read_tree(dst) == read_tree(tmp_path / "whole")


def test_a_log_that_cannot_be_read_now_is_not_taken_for_none(source, tmp_path, capsys, monkeypatch):
    interrupt(monkeypatch, source, tmp_path / "dst")
    before = read_tree(tmp_path / "dst")

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(directory, "read_whole", fail)
        for option in ("--overwrite", "--resume", "--quiet"):
            capsys.readouterr()
            assert run("convert", source, tmp_path / "dst", *SMALL, option) in {2, 3}
            assert os.strerror(errno.EIO) in capsys.readouterr().err
    found = read_tree(tmp_path / "dst")
    assert {name: data for name, data in found.items() if name != f"{LOG}.new"} == before


def test_the_same_command_with_resume_goes_on_with_an_overwrite(source, tmp_path, monkeypatch):
    dst = tmp_path / "dst"
    write(dst, {"old": random_tensor(4)})
    monkeypatch.setattr(recovery, "note_overwrite", lambda *_: None)
    interrupt(monkeypatch, source, dst, "--overwrite")
    begun = go_on(monkeypatch, source, dst, "--overwrite")
    assert len(begun) < 28
    assert not go_on(monkeypatch, source, dst, "--overwrite")  # complete
    write(dst, {"old": random_tensor(4)})  # over the index of that: nothing is to be gone on with
    next(dst.glob("model-*.safetensors")).unlink()
    assert go_on(monkeypatch, source, dst, "--overwrite")
    assert run("convert", source, tmp_path / "whole", *SMALL) == 0
    assert read_tree(dst) == read_tree(tmp_path / "whole")


@pytest.mark.parametrize("options", [["--dtype", "bf16"], ["--reclaim-source", "--yes"], ["--single-file"], []])
def test_dst_says_itself_how_to_go_on(source, tmp_path, monkeypatch, capsys, options):
    """Whatever was begun there, and wherever it has moved since."""
    single = "/one.safetensors" if options == ["--single-file"] else ""
    given = [option for option in options if option != "--single-file"]
    assert run("convert", source, f"{tmp_path}/whole{single}", *SMALL, *(given if "--yes" not in given else [])) == 0
    (tmp_path / "dst").mkdir()
    interrupt(monkeypatch, source, Path(f"{tmp_path}/dst{single}"), *given, after=7)
    assert run("run", f"{tmp_path}/dst{single}", "--quiet") == 2
    (tmp_path / "dst").rename(tmp_path / "moved")
    begun = []
    with monkeypatch.context() as patch:
        begun = watch(patch)
        assert run("run", f"{tmp_path}/moved{single}", "--resume", "--quiet") == 0
    assert begun
    assert read_tree(tmp_path / "moved") == read_tree(tmp_path / "whole")
    assert bool(list(source.glob("*.safetensors"))) == ("--yes" not in options)
    assert "holds no unfinished conversion" in refusal(capsys, "run", tmp_path / "moved", "--resume")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dtype": "bf16"}, "w0 was float32[300, 300], is bfloat16[300, 300]"),
        ({"format": "torch"}, "the container was safetensors, is torch"),
        ({"max_shard_size": "1MB"}, "model-00001-of-00005.safetensors was none of its files"),
    ],
)
def test_a_plan_that_is_another_one_is_compared(source, tmp_path, monkeypatch, capsys, change, named):
    """Where no command says by which options it was made."""
    interrupt(monkeypatch, source, tmp_path / "dst")
    other = api.plan(source, tmp_path / "dst", resume=True, **({"max_shard_size": "500KB", "max_memory": ROOMY} | change))
    with pytest.raises(DestinationError, match=re.escape(named)):
        running.run(other, resume=True)


@pytest.mark.parametrize("at", ["log.jsonl", "plan.json"])
def test_a_run_that_is_killed_while_it_leaves(source, tmp_path, at):
    """What it leaves of its state goes with the next one."""
    if not (pid := os.fork()):
        unlink, leave = Path.unlink, Directory.leave

        def unlink_and_die(path: Path, **more: bool) -> None:
            unlink(path, **more)
            if path.name == at:
                os._exit(9)

        def leave_and_die(output: Directory) -> None:
            Path.unlink = unlink_and_die
            leave(output)

        Directory.leave = leave_and_die
        run("convert", source, tmp_path / "dst", *SMALL)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert (tmp_path / "dst" / STATE).exists()
    assert run("convert", source, tmp_path / "dst", *SMALL, "--resume") == 0
    assert run("convert", source, tmp_path / "whole", *SMALL) == 0
    assert read_tree(tmp_path / "dst") == read_tree(tmp_path / "whole")
    assert not (tmp_path / "dst" / STATE).exists()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("step", ["lseek", "ftruncate", "unlink", "replace"])
def test_an_overwrite_that_is_killed_while_it_takes_the_output(source, tmp_path, monkeypatch, capsys, step):
    """What was begun there before is gone on with, or this overwrite is: no log lies beside the plan of another conversion."""
    dst = tmp_path / "dst"
    interrupt(monkeypatch, source, dst, "--dtype", "float16", after=5)
    if not (pid := os.fork()):
        place = os if hasattr(os, step) and step not in ("unlink", "replace") else Path
        call, replace = getattr(place, step), Lock._replace

        def call_and_die(*details: object, **more: object) -> object:
            result = call(*details, **more)
            os._exit(9)
            return result

        def replace_and_die(*details: object) -> object:
            setattr(place, step, call_and_die)
            return replace(*details)

        Lock._replace = replace_and_die
        run("convert", source, dst, *SMALL, "--overwrite")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    if (dst / LOG).exists():
        assert begun_plan(Directory(dst), str(dst))[0].files
    assert run("convert", source, dst, *SMALL, "--resume") == 0
    assert run("convert", source, tmp_path / "whole", *SMALL) == 0
    assert read_tree(dst) == read_tree(tmp_path / "whole")


def test_an_overwrite_that_is_refused_leaves_no_note(source, tmp_path, capsys):
    dst = tmp_path / "dst"
    write(dst, {"old": random_tensor(4)})
    before = read_tree(dst)
    refusal(capsys, "convert", source, dst, "--overwrite", "--recipe", "gemma-hf2custom")
    assert read_tree(dst) == before


def test_sources_that_cannot_be_read_for_the_log_are_no_others(source, tmp_path, monkeypatch):
    """Else what resumes would find that they are not those of before."""

    def fail(_: object) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(lock, "_read_ends", fail)
        assert run("convert", source, tmp_path / "dst", *SMALL) == 3
    assert not (tmp_path / "dst" / LOG).exists()
    assert not list((tmp_path / "dst").iterdir())


# The lock ----------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from streamconv.conversion import api
from streamconv.conversion.options import PlanOptions
from streamconv.running import run as running
from streamconv.running.directory import Directory
from streamconv.running.lock import Lock
made = api.plan(sys.argv[1], sys.argv[2], max_memory="4GB", max_shard_size="500KB")
Path(sys.argv[2]).mkdir()
settings = PlanOptions(sys.argv[1], sys.argv[2], max_shard_size="500KB").identity()
lock = Lock(Directory(Path(sys.argv[2])), made, settings)
lock.take(goes_on=False)
print("begun", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("locks", [True, False])
def test_two_runs_exclude_each_other_until_one_is_dead(source, tmp_path, capsys, monkeypatch, locks):
    dst = tmp_path / "dst"
    with subprocess.Popen([sys.executable, "-c", HOLDER, source, dst], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "begun\n"
        before = read_tree(dst)
        if not locks:

            def refuse(*_: object) -> None:
                raise OSError(errno.ENOLCK, "no locks")

            monkeypatch.setattr(fcntl, "flock", refuse)
        for more in (["--resume"], ["--overwrite"]):
            message = refusal(capsys, "convert", source, dst, *SMALL, *more)
            assert f"process {other.pid} on {socket.gethostname()}" in message
        assert "unfinished" in refusal(capsys, "convert", source, dst, *SMALL)
        assert read_tree(dst) == before
        other.kill()
        other.wait(60)
    assert run("convert", source, dst, *SMALL, "--resume") == 0
    assert run("convert", source, tmp_path / "whole", *SMALL) == 0
    assert read_tree(dst) == read_tree(tmp_path / "whole")


def test_who_holds_a_lock_on_another_host_is_taken_to_live(monkeypatch):
    me = holder.describe_process()
    assert holder.is_alive({**me, "host": "elsewhere"})
    assert not holder.is_alive(me)  # an earlier run of this process
    assert not holder.is_alive({**me, "pid": 1, "started": 0.0})  # the number was given to another one


def test_a_run_that_finished_while_another_waited(source, tmp_path):
    made = api.plan(source, tmp_path / "dst", max_memory=ROOMY)
    first, second = (lock.Lock(Directory(tmp_path / "dst"), made) for _ in range(2))
    (tmp_path / "dst").mkdir()
    first.take(goes_on=False)
    with pytest.raises(DestinationError, match="is writing there"):
        second.take(goes_on=True)
    first.leave()
    assert not list((tmp_path / "dst").iterdir())
    second.take(goes_on=True)
    assert not second.goes_on
    second.leave()


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_of_two_runs_that_begin_at_once_one_is_refused(source, tmp_path, monkeypatch, at, resume):
    """Wherever the first is in its looks at DST when the second comes."""
    made = api.plan(source, tmp_path / "dst", max_memory=ROOMY)
    first, second = (lock.Lock(Directory(tmp_path / "dst"), made) for _ in range(2))
    (tmp_path / "dst").mkdir()
    real, calls, refused = os.open, itertools.count(1), []

    def begin(run: lock.Lock) -> None:
        try:
            run.take(goes_on=resume)
        except DestinationError as error:
            refused.append(str(error))

    def opened(*given: object) -> int:
        if next(calls) == at:
            begin(second)
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opened)
        begin(first)
    assert next(calls) > at
    assert len(refused) == 1
    assert "is writing there" in refused[0]
    assert sorted(read_tree(tmp_path / "dst")) == [LOG, PLAN]
    (first if first.log.is_kept else second).leave()
    assert not list((tmp_path / "dst").iterdir())


# Ctrl-C ------------------------------------------------------------------------------------------------------------


def test_a_thread_that_hangs_does_not_keep_ctrl_c_waiting(monkeypatch):
    monkeypatch.setattr(threads, "PATIENCE", 0.05)
    hanging, begun = threading.Event(), threading.Event()

    def work(_: object) -> None:
        begun.set()
        hanging.wait(600)

    def join(thread: threading.Thread, timeout: float | None = None) -> None:
        begun.wait(60)
        if timeout == 0.1:
            raise KeyboardInterrupt
        real(thread, timeout)

    real = threading.Thread.join
    monkeypatch.setattr(threading.Thread, "join", join)
    stop = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        threads.run_threads(2, work, [], stop)
    assert stop.is_set()
    assert not hanging.is_set()
    hanging.set()


def test_long_copies_and_evaluations_look_whether_they_should_stop(source, tmp_path, monkeypatch, capsys):
    """Not only between tasks: a task of a whole tensor may take long."""
    real = filling.LocalEngine._compute

    def compute(engine: filling.LocalEngine, *task: object) -> int:
        engine._workers.stop.set()
        return real(engine, *task)

    monkeypatch.setattr(filling.LocalEngine, "_compute", compute)
    assert run("convert", source, tmp_path / "dst", *SMALL, "--dtype", "bf16") == 130
    assert "--resume" in capsys.readouterr().err


# SHA256SUMS --------------------------------------------------------------------------------------------------------


def check_sums(folder: Path) -> set[str]:
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {line.removesuffix(": OK") for line in done.stdout.splitlines()}


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="no sha256sum")
@pytest.mark.parametrize("options", [[], ["--format", "torch"], ["--format", "mindspore"], ["--dtype", "bf16", "--single-file"]])
def test_sums_cover_every_file(source, tmp_path, monkeypatch, options):
    (source / "SHA256SUMS").write_text("of other files\n")
    (source / "deep").mkdir()
    (source / "deep" / "a file.txt").write_text("x")
    dst = tmp_path / "dst"
    assert run("convert", source, dst, *SMALL, *options, "--checksum", "--verify") == 0
    assert check_sums(dst) == read_tree(dst).keys() - {"SHA256SUMS"}
    (dst / "SHA256SUMS").unlink()
    assert run("convert", source, dst, *SMALL, *options, "--checksum", "--resume") == 0  # on a finished one
    assert check_sums(dst) == read_tree(dst).keys() - {"SHA256SUMS"}


def test_sums_of_one_file_leave_those_of_others(source, tmp_path):
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  other.bin\n{'1' * 64}  one.safetensors\n")
    assert run("convert", source, tmp_path / "one.safetensors", "--checksum", "--quiet") == 0
    lines = (tmp_path / "SHA256SUMS").read_text().splitlines()
    assert lines[0] == f"{'0' * 64}  other.bin"
    assert len(lines) == 2
    assert not lines[1].startswith("1111")


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="no sha256sum")
def test_names_that_must_be_escaped(tmp_path):
    import hashlib

    names = ["a", "b c", "back\\slash", "new\nline", "*star"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "SHA256SUMS").write_bytes(format_sums({name: hashlib.sha256(name.encode()).hexdigest() for name in names}))
    assert len(check_sums(tmp_path)) == len(names)


def test_dst_never_looks_complete_before_it_is(source, tmp_path, monkeypatch):
    """Whatever the order of the other files, the commit is renamed when all of them are there and synced; nothing outside DST changes."""
    events: list[tuple[str, str]] = []
    real_replace, real_fsync = Path.replace, os.fsync

    def replace(path: Path, to: Path) -> Path:
        events.append(("rename", Path(to).name))
        return real_replace(path, to)

    def fsync(fd: int) -> None:
        events.append(("sync", Path(f"/proc/self/fd/{fd}").readlink().name))
        real_fsync(fd)

    before = read_tree(source)
    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(os, "fsync", fsync)
    dst = tmp_path / "dst"
    assert run("convert", source, dst, *SMALL, "--checksum") == 0
    monkeypatch.undo()
    assert read_tree(source) == before
    renamed = [name for event, name in events if event == "rename"]
    assert renamed[:2] == ["plan.json", "log.jsonl"]
    assert renamed[-1] == "model.safetensors.index.json"
    assert sorted(renamed[2:]) == sorted(read_tree(dst))
    for name in renamed[2:]:
        at = events.index(("rename", name))
        assert ("sync", f"{name}.partial") in events[:at]
        assert events[at + 1] == ("sync", "dst")
