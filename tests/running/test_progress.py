"""The bar, the log lines, and the record of a run."""

from __future__ import annotations

import logging
import sys
import time
import types

import pytest
from checkpoint_files import numbered, run, write

from streamconv import stage
from streamconv.checkpoint import opening
from streamconv.conversion import sides, targets
from streamconv.planning import compiler
from streamconv.running import ahead, progress
from streamconv.running.progress import Phase, Progress, bar
from streamconv.storage import folder


@pytest.fixture
def terminal(monkeypatch, capsys):
    """Makes stderr a terminal; gives what it shows."""
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: True)
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    return lambda: capsys.readouterr().err


def work(show: bool | Progress) -> None:
    with bar(4_000_000, "converting", show=show) as tell:
        for _ in range(4):
            tell(1_000_000)
            time.sleep(0.12)


def test_a_bar_has_bytes_rate_and_memory_against_the_budget(terminal):
    work(Progress(budget=123_000_000))
    text = terminal()
    assert "converting" in text
    assert "4.00M/4.00M" in text
    assert "B/s" in text
    assert " of 123 MB]" in text
    assert "\x1b[36m" in text


@pytest.mark.parametrize(("width", "shown", "hidden"), [(40, "%", "|"), (70, "4.00M/4.00M", "memory"), (120, "memory", "\0")])
def test_a_bar_has_what_there_is_room_for(terminal, monkeypatch, width, shown, hidden):
    monkeypatch.setattr(progress, "columns", lambda: width)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    work(Progress(budget=123_000_000))
    lines = terminal().replace("\x1b[A", "").split("\r")
    assert max(len(line.rstrip("\n")) for line in lines) <= width
    assert shown in lines[-1]
    assert hidden not in lines[-1]
    assert "B/s" in lines[-1]


def slow_planning(show: bool | Progress) -> None:
    with ahead.showing_stage(show):
        reading = stage.begin("reading headers", 3)
        for _ in range(3):
            reading.done += 1
            time.sleep(0.03)
        stage.begin("matching 1200 names \x1b[2J")
        time.sleep(0.05)


def test_what_planning_is_at_is_shown_on_a_terminal(terminal, monkeypatch):
    monkeypatch.setattr(ahead, "AFTER", 0.02)
    monkeypatch.setattr(ahead, "EVERY", 0.01)
    monkeypatch.setattr(ahead, "columns", lambda: 40)
    slow_planning(show=True)
    text = terminal()
    assert "reading headers: " in text
    assert " of 3" in text
    assert "matching 1200 names \\x1b[2J" in text
    assert "\x1b" not in text
    *lines, last, nothing = text.split("\r")
    assert max(map(len, lines)) < 40
    assert not last.strip()
    assert not nothing
    slow_planning(show=False)
    assert not terminal()


def test_nothing_is_shown_of_what_is_planned_at_once(terminal):
    slow_planning(show=True)
    assert not terminal()


def test_planning_says_what_it_is_at(tmp_path, monkeypatch, capsys):
    stages: list[str] = []
    begin = stage.begin

    def note(what: str, total: int = 0) -> stage.Stage:
        stages.append(f"{what} {total}" if total else what)
        return begin(what, total)

    for module in (opening, folder, targets, sides, compiler):
        monkeypatch.setattr(module, "begin", note)
    source = write(tmp_path / "source", numbered({f"w{k}": (2, 3) for k in range(4)}), shards=2)
    assert run("plan", source, tmp_path / "dst", "--quiet") == 0
    assert stages == [
        "reading headers", "reading headers 2", "matching 4 names", "laying out 4 tensors", "finding copies and tiles of files 1",
    ]  # fmt: skip
    assert capsys.readouterr() == ("", "")


def test_no_colour(terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    work(show=True)
    text = terminal()
    assert "4.00M/4.00M" in text
    assert "\x1b[3" not in text


@pytest.mark.parametrize(("value", "shown"), [("1", False), ("true", False), ("on", False), ("0", True), ("", True)])
def test_the_hub_s_switch(terminal, monkeypatch, value, shown):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", value)
    work(show=True)
    assert bool(terminal()) == shown


def test_nothing_is_shown_that_was_not_asked_for(terminal):
    work(show=False)
    work(Progress(show=False, verbose=True))
    assert not terminal()


def test_no_bar_without_a_terminal(capsys):
    work(show=True)
    assert capsys.readouterr() == ("", "")


def test_log_lines_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.1)
    work(Progress(verbose=True, budget=10**12))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("converting: ") and line.endswith(" of 1 TB") for line in lines)
    assert "s left" in lines[0]
    assert lines[-1].startswith("converting: 4 MB in ")
    assert not logging.getLogger("streamconv").handlers


def test_a_line_for_each_file(tmp_path, capsys):
    source = write(tmp_path / "src", numbered({f"layers.{i}.w": (64, 8) for i in range(3)}))
    assert run("convert", source, tmp_path / "dst", "--max-shard-size", "2KB", "-v") == 0
    out, err = capsys.readouterr()
    assert "3 tensors" in out
    assert [f"model-0000{n}-of-00003.safetensors: 2.16 kB done" in err for n in (1, 2, 3)] == [True] * 3
    assert "converting: " in err
    for quiet in ("--quiet", "--no-progress"):
        assert run("convert", source, tmp_path / quiet, "-v", quiet) == 0
        assert not capsys.readouterr().err


def test_files_are_told_above_the_bar(terminal):
    with bar(10, "converting", show=Progress(verbose=True)) as tell:
        logging.getLogger("streamconv.running.filling").info("%s done", "a.safetensors")
        tell(10)
    assert "a.safetensors done\n" in terminal()


def test_a_notebook_has_its_own_bar(monkeypatch, capsys):
    made = []

    class Widget:
        def __init__(self, **given):
            made.append(given)
            self.n = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            made.append(self.n)

        def update(self, n):
            self.n += n

        def set_postfix_str(self, text, refresh):  # noqa: ARG002 - as tqdm has it
            made.append(text)

    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    fake = types.ModuleType("tqdm.auto")
    fake.tqdm = Widget
    monkeypatch.setitem(sys.modules, "tqdm.auto", fake)
    work(show=True)
    assert made[0]["total"] == 4_000_000
    assert made[-1] == 4_000_000
    assert made[-2].startswith("memory ")


def test_a_record(capsys):
    recorded = Progress(show=False, record=True)
    work(recorded)
    work(recorded)
    assert [phase.title for phase in recorded.phases] == ["converting"] * 2
    for phase in recorded.phases:
        times, done, resident = zip(*phase.samples, strict=True)
        assert list(times) == sorted(times)
        assert done[-1] == phase.done == phase.total
        assert list(done) == sorted(done)
        assert len(done) > 3
        assert min(resident) > 1_000_000


def test_a_record_stays_small(monkeypatch):
    monkeypatch.setattr(progress, "SAMPLES", 16)
    phase = Phase("converting", 100, interval=0.0)
    clock = iter(range(10_000))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: phase.began + next(clock))
    phase.interval = 0.5
    for phase.done in range(200):
        phase.sample()
    assert 4 <= len(phase.samples) < 16
    gaps = [b[0] - a[0] for a, b in zip(phase.samples, phase.samples[1:], strict=False)]
    assert max(gaps) <= 4 * min(gaps)
    assert phase.samples[0][1] == 0
    assert phase.samples[-1][1] > 150
