"""Runs that are killed at each of their steps in the file system are gone on with to the bytes of an undisturbed run.

A step is a call that changes something there: the kill comes just before it. What is killed runs in a fork, all else in this process.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkpoint_files import random_tensor, refusal, run, write

from streamconv.engine import order
from streamconv.running import filling, reclaim
from streamconv.running.output import LOG, STATE
from tools.crash import read_tree

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="the kill comes at calls of this system")]

EVENTS = {"os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.truncate"}
CALLS = ["fsync", "write", "pwrite", "ftruncate", "copy_file_range"]  # of which Python tells nobody
MOST = 120  # kills of a scenario; where there are more steps, those in its middle are sampled
ENDS = 40  # steps at either end, all of which are killed at: there an output is taken, and left
NOTED = 5  # steps until the note of an overwrite stands there
OPTIONS = ["--max-shard-size", "100KB", "--quiet", "-j", "1"]
CONVERT = ["convert", "{src}", "{dst}", *OPTIONS]
RESUME = [*CONVERT, "--resume"]
OVERWRITE = [*CONVERT, "--overwrite"]
RECLAIM = [*CONVERT, "--reclaim-source", "--yes"]
OTHER = ["convert", "{src}", "{dst}", "--dtype", "bf16", "--quiet"]
SINGLE = ["convert", "{src}", "{dst}/m.safetensors", "--quiet", "-j", "1"]


Tree = dict[str, bytes]


def is_not_noted(number: int, _: Tree) -> bool:
    """Whether an overwrite is killed before its note of that."""
    return number <= NOTED


def has_no_log(_: int, now: Tree) -> bool:
    return f"{STATE}/{LOG}" not in now


@dataclass(frozen=True)
class Refusal:
    """What gives the result after most kills, and after some is refused.

    Attributes:
        command: the arguments.
        message: of the refusal.
        is_due: says by the number of the step, and what the output holds after the kill, whether it is to be refused.
    """

    command: list[str]
    message: str
    is_due: Callable[[int, Tree], bool]


@dataclass(frozen=True)
class Scenario:
    """A command that is killed, and the one that goes on with it.

    Attributes:
        command: what is killed.
        go_on: what always gives the result.
        before: what makes an output first; nothing does if it is empty.
        is_begun: that is killed in its middle.
        refusal: is tried before `go_on`.
    """

    command: list[str]
    go_on: list[str]
    before: Sequence[str] = ()
    is_begun: bool = False
    refusal: Refusal | None = None


SCENARIOS = {
    "convert": Scenario(CONVERT, RESUME),
    "run DST": Scenario(
        CONVERT,
        RESUME,
        refusal=Refusal(["run", "{dst}", "--resume", "--quiet"], "holds no unfinished conversion", has_no_log),
    ),
    "overwrite": Scenario(
        OVERWRITE,
        [*OVERWRITE, "--resume"],
        before=OTHER,
        refusal=Refusal(RESUME, "already exists and is not empty", is_not_noted),
    ),
    "overwrite of a begun one": Scenario(
        OVERWRITE,
        OVERWRITE,
        before=OTHER,
        is_begun=True,
        refusal=Refusal(RESUME, "the interrupted run was another one", is_not_noted),
    ),
    "resume": Scenario(RESUME, RESUME, before=CONVERT, is_begun=True),
    "reclaim": Scenario(RECLAIM, [*RECLAIM, "--resume"]),
    "run DST that reclaims": Scenario(
        RECLAIM,
        [*RECLAIM, "--resume"],
        refusal=Refusal(["run", "{dst}", "--resume", "--quiet"], "holds no unfinished conversion", has_no_log),
    ),
    "single file": Scenario(SINGLE, [*SINGLE, "--resume"]),
}


@dataclass(frozen=True)
class Place:
    """A folder in which a checkpoint is ``src``, and ``dst`` the output."""

    folder: Path

    @property
    def dst(self) -> Path:
        return self.folder / "dst"

    @property
    def weights(self) -> list[Path]:
        """Files of the checkpoint."""
        return list((self.folder / "src").glob("*.safetensors"))

    def save(self, copy: Path) -> None:
        shutil.copytree(self.folder, copy)

    def restore(self, copy: Path) -> None:
        """Makes it what it was when it was saved."""
        shutil.rmtree(self.folder)
        shutil.copytree(copy, self.folder)

    def fill(self, command: Iterable[str]) -> list[str]:
        return [word.format(src=self.folder / "src", dst=self.dst) for word in command]

    def count_steps(self, command: Iterable[str]) -> int:
        """Runs a command to its end; how many steps it takes."""
        assert self.kill(command, 0) == 0
        return int((self.folder / "steps").read_text())

    def kill(self, command: Iterable[str], number: int) -> int:
        """The exit code of a command that is killed before its step of this number, from 1 on."""
        if pid := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        code = 70
        try:
            steps = count_and_kill(number)
            code = run(*self.fill(command))
            (self.folder / "steps").write_text(str(len(steps)))
        finally:
            os._exit(code)


def count_and_kill(number: int) -> list[str]:
    """Has this process killed before its step of this number; the steps until then."""
    steps: list[str] = []

    def take(step: str) -> None:
        steps.append(step)
        if len(steps) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def listen(event: str, details: tuple[object, ...]) -> None:
        is_opened = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        if event in EVENTS or is_opened:
            take(event)

    def announce(place: object, name: str) -> None:
        call = getattr(place, name)

        def take_and_call(*details: object) -> object:
            take(name)
            return call(*details)

        setattr(place, name, take_and_call)

    sys.addaudithook(listen)
    for name in CALLS:
        announce(os, name)
    announce(reclaim, "_punch")
    return steps


def choose_steps(count: int) -> list[int]:
    """The numbers of the steps at which to kill."""
    if count <= MOST:
        return list(range(1, count + 1))
    middle = range(ENDS + 1, count - ENDS + 1, -(-(count - 2 * ENDS) // (MOST - 2 * ENDS)))
    return [*range(1, ENDS + 1), *middle, *range(count - ENDS + 1, count + 1)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(order, "COPY_CHUNK", 32 << 10)
    monkeypatch.setattr(filling, "SAVE_BYTES", 50 << 10)
    place = Place(tmp_path / "place")
    tensors = {f"w{number}": random_tensor(60, 100 + number, seed=number) for number in range(12)}
    write(place.folder / "src", tensors, shards=3, config={"dtype": "float32"})
    place.dst.mkdir()
    return place


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_run_that_is_killed_at_any_step_is_gone_on_with(place, tmp_path, capsys, name):
    scenario = SCENARIOS[name]
    clean, prepared = tmp_path / "clean", tmp_path / "prepared"
    place.save(clean)
    assert run(*place.fill(scenario.command)) == 0
    whole = read_tree(place.dst)
    place.restore(clean)
    if scenario.is_begun:
        middle = place.count_steps(scenario.before) // 2
        place.restore(clean)
        assert place.kill(scenario.before, middle) == -signal.SIGKILL
    elif scenario.before:
        assert run(*place.fill(scenario.before)) == 0
    place.save(prepared)
    steps = choose_steps(place.count_steps(scenario.command))
    assert len(steps) > 20
    wrong = []
    for number in steps:
        place.restore(prepared)
        assert place.kill(scenario.command, number) == -signal.SIGKILL
        try:
            go_on(place, scenario, capsys, number)
            assert read_tree(place.dst) == whole
            assert not list(place.dst.glob(".*"))
            assert bool(place.weights) == ("--reclaim-source" not in scenario.command)
        except AssertionError as error:
            wrong.append(f"killed before step {number}: {error}")
    assert not wrong, "\n".join(wrong)


def go_on(place: Place, scenario: Scenario, capsys: pytest.CaptureFixture[str], number: int) -> None:
    """Makes the result of what was killed, after a refusal where one is due."""
    command = scenario.go_on
    there = read_tree(place.dst)
    if refused := scenario.refusal:
        if refused.is_due(number, there):
            assert refused.message in refusal(capsys, *place.fill(refused.command))
            assert read_tree(place.dst) == there
        else:
            command = refused.command
    assert run(*place.fill(command)) == 0, capsys.readouterr().err
