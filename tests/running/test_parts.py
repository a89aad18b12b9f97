"""Outputs in parts: any division, any order, any number of times, at once and killed; what --finish finds; what is refused."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_files import ROOMY, failure, numbered, random_tensor, refusal, run, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamconv.conversion import api
from streamconv.errors import CoverageError, DestinationError, RunError, UsageError
from streamconv.planning.plan import Plan
from streamconv.running import filling, making
from streamconv.running import run as running
from streamconv.running.directory import Directory
from streamconv.running.lease import Lease
from streamconv.running.output import begun_plan
from streamconv.storage import Version
from tools import crash
from tools.crash import read_tree

STATE = ".streamconv"
LOG, PLAN = f"{STATE}/log.jsonl", f"{STATE}/plan.json"
SLOWED = """
import os, random, sys, time
from streamconv.cli import command as cli
root, seed = sys.argv[1:3]
numbers = random.Random(f"{seed} {os.getpid()}")
EVENTS = {"open", "os.link", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.scandir", "os.truncate"}
def pause(event, given):
    if event in EVENTS and any(str(part).startswith(root) for part in given) and numbers.random() < 0.5:
        time.sleep(numbers.random() ** 3 * 0.08)
sys.addaudithook(pause)
sys.exit(cli.main(sys.argv[3:]))
"""
"""A command that lingers at what it does in a directory, so that what several do at once happens in many orders."""
SMALL = ["--max-shard-size", "500KB", "--quiet"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = {f"w{k}": random_tensor(300, 300 + k, seed=k) for k in range(9)}
    folder = write(tmp_path / "src", tensors, shards=3, config={"dtype": "float32"})
    (folder / "tokenizer.json").write_text('{"a": 1}')
    return folder


@pytest.fixture
def wanted(source: Path, tmp_path: Path) -> dict[str, bytes]:
    assert run("convert", source, tmp_path / "wanted", *SMALL) == 0
    return read_tree(tmp_path / "wanted")


@pytest.fixture
def plan(source: Path, tmp_path: Path) -> Path:
    return make_plan(source, tmp_path / "dst", tmp_path / "plan.json")


def make_plan(source: Path, dst: Path, path: Path, *options: str) -> Path:
    assert run("plan", source, dst, *SMALL, *options, "--overwrite", "--out", path) == 0
    return path


def make(plan: Path, *numbers: int, of: int = 4, options: tuple[str, ...] = ()) -> None:
    for number in numbers or range(of):
        assert run("run", plan, "--part", f"{number}/{of}", "--quiet", *options) == 0


# The same bytes ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_division_in_any_order_gives_what_convert_gives(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any")
    shapes = data.draw(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=12), label="shapes")
    source = write(folder / "src", {f"t{k}": random_tensor(*shape, seed=k) for k, shape in enumerate(shapes)}, config={})
    options = ["--max-shard-size", str(data.draw(st.sampled_from([1000, 3000, 10_000, 10**6]), label="shard")), "--quiet"]
    options += data.draw(st.sampled_from([[], ["--dtype", "bf16"], ["--format", "torch"], ["--format", "mindspore"]]), label="options")
    single = "" if len(options) > 3 or not data.draw(st.booleans(), label="single") else "/one.safetensors"
    assert run("convert", source, f"{folder}/wanted{single}", *options) == 0
    assert run("plan", source, f"{folder}/dst{single}", *options, "--out", folder / "plan.json") == 0
    count = data.draw(st.integers(1, len(shapes) + 3), label="parts")
    again = data.draw(st.lists(st.integers(0, count), max_size=3), label="again")
    order = data.draw(st.permutations([*range(1, count + 1), *again]), label="order")
    for number in order:
        assert run("run", folder / "plan.json", "--part", f"{number}/{count}", "--quiet") == 0
    assert run("run", folder / "plan.json", "--finish", "--verify", "--quiet") == 0
    assert read_tree(folder / "dst") == read_tree(folder / "wanted")
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kills"), [("parts", 3), ("parts-fuse", 60)])
def test_killed_parts_are_run_again_to_the_same_bytes(tmp_path, kind, kills):
    command = [sys.executable, "-m", "tools.crash", "--kills", str(kills), "--kind", kind, "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=Path(crash.__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert f"{kills:4} runs" in done.stdout


@pytest.mark.parametrize("rounds", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_parts_at_once_as_processes(plan, tmp_path, wanted, rounds):
    """Over an old output of the same names and sizes, some of them twice; then the end, also twice, beside parts that are late."""
    dst, numbers = tmp_path / "dst", random.Random(0)

    def run_at_once(*options: str) -> list[str]:
        command = [sys.executable, "-c", SLOWED, str(dst), str(numbers.random()), "run", str(plan), "--quiet"]
        running = [subprocess.Popen([*command, *option.split()], stderr=subprocess.PIPE, text=True) for option in options]
        return [said for process in running if (said := process.communicate(timeout=120)[1]) or process.returncode]

    for _ in range(rounds):
        shutil.rmtree(dst, ignore_errors=True)
        shutil.copytree(tmp_path / "wanted", dst)
        for path in dst.iterdir():
            path.write_bytes(b"?" * path.stat().st_size)
        parts_of_all = [f"--overwrite --part {number}/4" for number in (1, 1, 2, 3, 4, 4)]
        assert not run_at_once(*numbers.sample(parts_of_all, 6))
        assert not run_at_once("--finish", "--finish", f"--part {numbers.randint(1, 4)}/4")
        assert read_tree(dst) == wanted


def test_an_attempt_to_take_dst_may_be_taken_away_by_the_one_that_has_it(plan, monkeypatch):
    """As with what else was there before."""
    whole = Plan.from_json(plan.read_text())
    root = Path(whole.root)
    root.mkdir()
    link = os.link

    def link_after_another(draft: Path, path: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        Lease(Directory(root), whole).take(stale=lambda: [path.relative_to(root).as_posix() for path in root.rglob("*")])
        link(draft, path)

    monkeypatch.setattr(os, "link", link_after_another)
    Lease(Directory(root), whole).take()
    assert sorted(read_tree(root)) == [LOG, PLAN]


@pytest.mark.parametrize("links", [True, False])
def test_what_another_has_made_meanwhile_is_not_taken_away(plan, tmp_path, wanted, monkeypatch, links):
    """Between the look at an old file and its removal."""
    dst, name = tmp_path / "dst", "model-00004-of-00009.safetensors"
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    dst.mkdir()
    (dst / name).write_bytes(b"?" * len(wanted[name]))
    whole, look, looked = Plan.from_json(plan.read_text()), Directory.look, list[str]()

    def look_before_another(output: Directory, names: Iterable[str]) -> dict[str, Version]:
        found = look(output, names)
        looked.extend(found)
        if looked.count(name) == 2:  # noted, and about to go
            making.make_files(whole, [[file.path for file in whole.files].index(name)])
        return found

    monkeypatch.setattr(Directory, "look", look_before_another)
    Lease(Directory(dst), whole).take(stale=list)
    assert looked.count(name) == 2
    assert (dst / name).read_bytes() == wanted[name]
    assert {path.name for path in dst.iterdir()} == {name, STATE}


def test_what_another_has_made_meanwhile_is_not_in_the_way(plan, tmp_path, wanted):
    whole = Plan.from_json(plan.read_text())
    (tmp_path / "dst").mkdir()
    lease, name = Lease(Directory(tmp_path / "dst"), whole), whole.files[3].path
    lease.take()
    assert not lease.find_done([3])
    making.make_files(whole, [3])
    lease.make_way([3])
    assert (tmp_path / "dst" / name).read_bytes() == wanted[name]
    (tmp_path / "dst" / name).write_bytes(b"?" * len(wanted[name]))
    assert not lease.find_done([3])
    lease.make_way([3])
    assert not (tmp_path / "dst" / name).exists()


def test_a_folder_in_the_place_of_a_file(plan, tmp_path, wanted, capsys):
    (tmp_path / "dst" / "model-00004-of-00009.safetensors").mkdir(parents=True)
    line = refusal(capsys, "run", plan, "--part", "1/4", "--overwrite")
    assert "model-00004-of-00009.safetensors: is a directory" in line
    (tmp_path / "dst" / "model-00004-of-00009.safetensors").rmdir()
    make(plan, options=("--overwrite",))
    assert run("run", plan, "--finish", "--quiet") == 0
    assert read_tree(tmp_path / "dst") == wanted


def test_what_a_finish_takes_away_is_begun_again(plan, tmp_path, wanted, monkeypatch):
    """Another end has removed what this one, or a late part, had begun."""
    make(plan)
    seal, taken = filling.LocalEngine._seal, list[str]()

    def seal_without(engine: filling.LocalEngine, number: int, path: str, fd: int) -> None:
        seal(engine, number, path, fd)
        if len(taken) < 2:
            taken.append(path)
            Path(path).unlink()

    monkeypatch.setattr(filling.LocalEngine, "_seal", seal_without)
    assert run("run", plan, "--finish", "--quiet") == 0
    assert len(taken) == 2
    assert read_tree(tmp_path / "dst") == wanted


def test_parts_of_one_output_know_of_each_other(plan, tmp_path, wanted, capsys):
    """What is told of a part, and of the end."""
    assert run("run", plan, "--part", "1/2", "--json") == 0
    first = json.loads(capsys.readouterr().out)
    count = len(wanted) - 1
    assert first["part"] == {
        "name": "1/2",
        "made": [file["path"] for file in first["outputs"]],
        "found": 0,
        "there": count // 2,
        "files": count,
        "complete": False,
    }
    assert first["bytes_written"] == sum(len(wanted[name]) for name in first["part"]["made"])
    assert run("run", plan, "--part", "1/2") == 0
    assert f"part 1/2: 0 files made, {count // 2} found done; {count // 2} of {count} are there\n" in capsys.readouterr().out
    assert run("run", plan, "--part", "2/2") == 0
    assert f"{count} of {count} are there; next: run --finish\n" in capsys.readouterr().out
    assert run("run", plan, "--finish") == 0
    assert f"all {count} files of the parts are there, the output is complete\n" in capsys.readouterr().out
    assert run("run", plan, "--part", "2/2") == 0
    assert f"0 files made, {count - count // 2} found done; all {count} files of the parts are there" in capsys.readouterr().out
    assert read_tree(tmp_path / "dst") == wanted


def test_more_parts_than_files_and_one_file(source, tmp_path, capsys):
    path = make_plan(source, tmp_path / "dst" / "one.safetensors", tmp_path / "plan.json")
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "another.txt").write_text("stays")
    make(path, *range(1, 4), of=3)
    assert (tmp_path / "dst" / f".one.safetensors{LOG}").exists()
    assert "its files are made in parts" in refusal(capsys, "convert", source, tmp_path / "dst" / "one.safetensors")
    assert run("run", path, "--finish", "--quiet") == 0
    assert run("convert", source, tmp_path / "other.safetensors", "--quiet") == 0
    assert read_tree(tmp_path / "dst") == {
        "another.txt": b"stays",
        "one.safetensors": (tmp_path / "other.safetensors").read_bytes(),
    }


def test_a_part_makes_its_files_in_groups(plan, tmp_path, monkeypatch):
    """What is complete stays when a part fails later."""
    monkeypatch.setattr(making, "SAVE_BYTES", 400_000)
    real, calls = filling.LocalEngine.run, []

    def fail_third(engine: filling.LocalEngine) -> None:
        calls.append([file.path for file in engine._plan.files])
        if len(calls) == 3:
            raise RunError("stopped")
        real(engine)

    with monkeypatch.context() as patch:
        patch.setattr(filling.LocalEngine, "run", fail_third)
        assert run("run", plan, "--part", "1/1") == 3
    assert [len(names) for names in calls] == [1, 1, 1]
    assert sorted({*read_tree(tmp_path / "dst")} - {LOG, PLAN}) == sorted(calls[0] + calls[1])
    assert run("run", plan, "--part", "1/1", "--quiet") == 0


# Leases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("links", [True, False])
def test_of_plans_that_take_a_dst_at_once_one_has_it(plan, source, tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    mine = Plan.from_json(plan.read_text())
    other = replace(api.plan(source, tmp_path / "dst", dtype="bf16", max_memory=ROOMY), root=mine.root)
    for _ in range(20):
        shutil.rmtree(mine.root, ignore_errors=True)
        Path(mine.root).mkdir()
        barrier, took = threading.Barrier(6), list[Plan]()

        def take(whole: Plan, barrier: threading.Barrier = barrier, took: list[Plan] = took) -> None:
            barrier.wait()
            with suppress(DestinationError):
                Lease(Directory(Path(whole.root)), whole).take()
                took.append(whole)

        threads = [threading.Thread(target=take, args=(whole,)) for whole in (mine, other) * 3]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (holder,) = [whole for whole in (mine, other) if f'"{whole.digest()}"' in (Path(mine.root) / LOG).read_text()]
        assert sorted(read_tree(Path(mine.root))) == [LOG, PLAN]
        if links:
            assert begun_plan(Directory(Path(mine.root)), mine.root)[0].digest() == holder.digest()
        Lease(Directory(Path(mine.root)), holder).check()
        with pytest.raises(DestinationError, match="another plan"):
            Lease(Directory(Path(mine.root)), other if holder is mine else mine).check()
        if links:
            assert took == [holder] * 3


def test_overwrite_removes_what_was_there_and_nothing_made_since(plan, source, tmp_path, wanted):
    dst = tmp_path / "dst"
    assert run("convert", source, dst, "--dtype", "bf16", "--quiet") == 0
    (dst / "config.json").write_bytes(b"?" * len(wanted["config.json"]))
    (dst / "notes.txt").write_text("stay")
    make(plan, 0, options=("--overwrite",))
    assert "model.safetensors" not in read_tree(dst)
    before = {path: path.stat().st_ino for path in dst.iterdir()}
    make(plan, 1, 2, 3, options=("--overwrite",))
    assert {path: path.stat().st_ino for path in before} == before
    assert run("run", plan, "--finish", "--quiet") == 0
    assert read_tree(dst) == wanted | {"notes.txt": b"stay"}


def test_a_lease_removes_nothing_outside(plan, tmp_path, capsys):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "dst").mkdir()
    Lease(Directory(tmp_path / "dst"), Plan.from_json(plan.read_text())).take()
    path = tmp_path / "dst" / LOG
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"stale": {"../victim": {"size": 4, "tag": str(victim.stat().st_mtime_ns)}}}) + "\n")
    make(plan, 0)
    assert victim.exists()
    path.write_text(json.dumps(said | {"stale": 3}) + "\n")
    assert "cannot be read" in refusal(capsys, "run", plan, "--part", "1/4")


def test_ordinary_runs_leave_parts_alone(plan, source, tmp_path, capsys, wanted):
    make(plan, 0)
    before = read_tree(tmp_path / "dst")
    for command in (["convert", source, tmp_path / "dst", *SMALL], ["run", plan]):
        for option in ([], ["--resume"]):
            assert "its files are made in parts" in refusal(capsys, *command, *option)
    assert read_tree(tmp_path / "dst") == before
    capsys.readouterr()
    assert run("doctor", tmp_path / "dst") == 1
    assert f"problem: {LOG}" in capsys.readouterr().out
    (tmp_path / "dst" / "model-00001-of-00009.safetensors.0123456789ab.partial").write_text("left by a killed part")
    assert run("convert", source, tmp_path / "dst", *SMALL, "--overwrite") == 0
    assert read_tree(tmp_path / "dst") == wanted


def test_parts_leave_others_alone(plan, source, tmp_path, capsys, monkeypatch):
    other = make_plan(source, tmp_path / "dst", tmp_path / "other.json", "--dtype", "bf16")
    make(plan, 0)
    before = read_tree(tmp_path / "dst")
    for options in (["--part", "1/4"], ["--part", "1/4", "--overwrite"], ["--part", "1/4", "--resume"], ["--finish"]):
        assert "another plan" in refusal(capsys, "run", other, *options)
    assert read_tree(tmp_path / "dst") == before
    shutil.rmtree(tmp_path / "dst")
    with monkeypatch.context() as patch:
        patch.setattr(filling.LocalEngine, "_copy", lambda *_: (_ for _ in ()).throw(RunError("stopped")))
        assert run("convert", source, tmp_path / "dst", *SMALL) == 3
    for options in (["--part", "1/4"], ["--part", "1/4", "--overwrite"], ["--finish"]):
        assert "holds an unfinished conversion that is none in parts" in refusal(capsys, "run", plan, *options)


def test_a_dst_that_is_lost_to_another_ends_the_work(plan, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(making, "SAVE_BYTES", 400_000)
    real = filling.LocalEngine.run

    def lose(engine: filling.LocalEngine) -> None:
        real(engine)
        (tmp_path / "dst" / LOG).write_text(json.dumps({"parts": 3, "stale": {}, "plan": "x"}) + "\n")

    monkeypatch.setattr(filling.LocalEngine, "run", lose)
    assert "another plan" in failure(capsys, 3, "run", plan, "--part", "1/1")


# What is left, what is wrong ---------------------------------------------------------------------------------------


def test_finish_names_every_file_that_is_missing_or_wrong(plan, tmp_path, capsys, wanted):
    dst = tmp_path / "dst"
    assert "holds no part of this plan" in refusal(capsys, "run", plan, "--finish")
    make(plan)
    names = [file.path for file in Plan.from_json(plan.read_text()).files]
    (dst / names[1]).unlink()
    os.truncate(dst / names[2], 100)
    with (dst / names[3]).open("r+b") as file:
        file.write(b"\0")
    with (dst / names[4]).open("r+b") as file:
        file.seek(len(wanted[names[4]]) - 1)
        file.write(bytes([wanted[names[4]][-1] ^ 1]))
    before = read_tree(dst)
    size = len(wanted[names[2]])
    expected = (
        f"3 of {len(names)} files not there as planned: {names[1]} is missing (part 1/4), {names[2]} has 100 bytes of {size} (part 2/4), "
        f"{names[3]} holds something else (part 3/4)"
    )
    assert expected in refusal(capsys, "run", plan, "--finish", "--verify")
    assert read_tree(dst) == before
    make(plan)
    message = refusal(capsys, "run", plan, "--finish", "--verify")
    assert f"1 of {len(names)} files not there as planned: {names[4]} holds something else (part 0/4)" in message
    assert names[-1] not in read_tree(dst)
    make(plan, 0, options=("--verify",))
    assert run("run", plan, "--finish", "--verify", "--checksum", "--quiet") == 0
    found = read_tree(dst)
    assert sorted(line.split("  ")[1] for line in found.pop("SHA256SUMS").decode().splitlines()) == sorted(wanted)
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=dst, check=False, timeout=60).returncode == 0
    assert found == wanted


@pytest.mark.parametrize("ahead", [0, 3600])
def test_what_killed_parts_left_goes(plan, tmp_path, monkeypatch, wanted, ahead):
    """By the file server's clock, from which that of this machine may differ."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead)
    make(plan, 1)
    folder, files = tmp_path / "dst", Plan.from_json(plan.read_text()).files
    old, new, other = (folder / f"{file}.{'0' * 11}{k}.partial" for k, file in enumerate([files[0].path, files[0].path, files[2].path]))
    mine = folder / f"unknown.{'0' * 12}.partial"
    for path in (old, new, other, mine):
        path.write_bytes(b"left")
    for path in (old, other):
        os.utime(path, (0, 0))
    make(plan, 0)
    assert [path.exists() for path in (old, new, other, mine)] == [False, True, True, True]
    make(plan)
    assert run("run", plan, "--finish", "--quiet") == 0
    assert read_tree(folder) == wanted | {mine.name: b"left"}


def test_a_file_that_another_finished_meanwhile_is_no_failure(plan, tmp_path, monkeypatch, wanted):
    """The others have cleared up, too: what was unfinished here is gone."""
    real = filling.LocalEngine._work

    def finish_elsewhere(engine: filling.LocalEngine, tasks: object) -> None:
        monkeypatch.setattr(filling.LocalEngine, "_work", real)
        make(plan, 0, 1, 2, 3)
        assert run("run", plan, "--finish", "--quiet") == 0
        real(engine, tasks)

    monkeypatch.setattr(filling.LocalEngine, "_work", finish_elsewhere)
    make(plan, 1)
    assert read_tree(tmp_path / "dst") == wanted


def test_after_the_end_parts_and_finish_compare(plan, tmp_path, capsys, wanted):
    make(plan)
    assert run("run", plan, "--finish", "--quiet") == 0
    make(plan, 2)
    capsys.readouterr()
    assert run("run", plan, "--finish") == 0
    assert "verified" in capsys.readouterr().out
    assert read_tree(tmp_path / "dst") == wanted
    name = Plan.from_json(plan.read_text()).files[0].path
    (tmp_path / "dst" / name).write_bytes(wanted[name][:-1] + b"?")
    make(plan, 1)
    for option in (["--part", "0/4"], ["--finish"]):
        assert f"{name} is not what this conversion makes" in refusal(capsys, "run", plan, *option)
    (tmp_path / "dst" / name).unlink()
    assert "already exists and is not empty" in refusal(capsys, "run", plan, "--part", "0/4")
    assert "holds no part of this plan" in refusal(capsys, "run", plan, "--finish")


def test_sources_that_changed(plan, source, tmp_path, capsys):
    make(plan, 0)
    before = read_tree(tmp_path / "dst")
    for path in source.glob("*.safetensors"):
        os.utime(path, (1, 1))
    assert "plan again" in failure(capsys, 3, "run", plan, "--part", "1/4")
    assert "plan again" in failure(capsys, 3, "run", plan, "--finish")
    assert read_tree(tmp_path / "dst") == before


def test_a_scheduler_that_ends_a_part_leaves_nothing_unfinished(plan, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(filling.LocalEngine, "_copy", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or threading.Event().wait(0.3) or 0)
    before = signal.getsignal(signal.SIGTERM)
    assert "rerun the same command" in failure(capsys, 130, "run", plan, "--part", "1/4")
    assert signal.getsignal(signal.SIGTERM) is before
    assert {*read_tree(tmp_path / "dst")} == {LOG, PLAN}


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["", "3", "5/4", "-1/4", "1/0", "0/0", "a/b", "1/4/2", "1.5/4", " 1/4", "٣/4", "1/99999999999999999999"])
def test_parts_that_are_none(plan, tmp_path, capsys, part):
    assert "expected I/N" in refusal(capsys, "run", plan, f"--part={part}")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--part", "1/4", "--finish"], "not allowed with"),
        (["--part", "1/4", "--checksum"], "--checksum goes with --finish"),
        (["--finish", "--overwrite"], "--overwrite goes with --part"),
        (["--part", "1/4", "--overwrite", "--resume"], "not allowed with"),
    ],
)
def test_options_that_do_not_go_together(plan, tmp_path, capsys, options, said):
    assert said in refusal(capsys, "run", plan, *options)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"part": (1, 2), "finish": True}, "--part and --finish"),
        ({"part": (3, 2)}, "--part 3/2"),
        ({"part": (-1, 2)}, "--part -1/2"),
        ({"part": (0, 0)}, "--part 0/0"),
        ({"part": (1, 2), "reclaim_source": True}, "--reclaim-source"),
        ({"create_pr": True, "finish": True}, "--create-pr"),
    ],
)
def test_calls_that_make_no_sense(plan, options, said):
    with pytest.raises(UsageError, match=said):
        running.run(Plan.from_json(plan.read_text()), **options)


def test_a_plan_that_was_edited_or_is_of_another_version(plan, tmp_path, capsys):
    make(plan, 0)
    data = json.loads(plan.read_text())
    edits: list[tuple[Callable[[], object], str]] = [
        (data["mapping"].reverse, "another plan"),
        (lambda: data["files"][1].update(size=7), "not a plan that can be run"),
        (lambda: data.update(streamconv_plan=data["streamconv_plan"] + 1), "not a plan of version"),
        (lambda: data.pop("files"), "not a plan"),
    ]
    for edit, said in edits:
        edit()
        plan.write_text(json.dumps(data))
        for option in (["--part", "1/4"], ["--finish"]):
            assert said in refusal(capsys, "run", plan, *option)


def test_a_dst_that_is_not_empty(plan, tmp_path, capsys):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "notes.txt").write_text("mine")
    assert "already exists and is not empty" in refusal(capsys, "run", plan, "--part", "1/4")
    assert read_tree(tmp_path / "dst") == {"notes.txt": b"mine"}


def test_replicas_are_compared_once_for_all_parts(plan, tmp_path, monkeypatch, capsys):
    def differ(whole: Plan) -> None:
        raise CoverageError(f"differ in {len(whole.files)} files")

    monkeypatch.setattr(running, "check_replicas", differ)
    make(plan)
    before = read_tree(tmp_path / "dst")
    assert f"differ in {len(before) - 1} files" in refusal(capsys, "run", plan, "--finish")
    assert read_tree(tmp_path / "dst") == before


def test_doctor_says_how_to_end_it(tmp_path, capsys):
    source = write(tmp_path / "src", numbered({f"a.{k}": (64, 64) for k in range(8)}))
    assert run("plan", source, tmp_path / "dst", "--max-shard-size", "40KB", "--out", tmp_path / "plan.json") == 0
    assert run("run", tmp_path / "plan.json", "--part", "1/2") == 0
    capsys.readouterr()
    assert run("doctor", tmp_path / "dst") == 1
    assert "'streamconv run PLAN --finish'" in capsys.readouterr().out
