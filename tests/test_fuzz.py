"""A short run of the fuzzer for each reader, and that it can fail."""

from __future__ import annotations

import random
import signal
import time

import pytest

from streamconv.errors import FormatError
from tools import fuzz


@pytest.fixture
def alarm():
    before = signal.signal(signal.SIGALRM, fuzz._alarm)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_readers_refuse_or_read(reader, alarm, tmp_path):
    (tmp_path / "files").mkdir()
    fuzzer = fuzz.Fuzzer(reader, tmp_path / "files", limit=60, keep=tmp_path / "failures")
    for seed in fuzzer.seeds:
        fuzzer.run(seed)
    assert set(fuzzer.outcomes) == {"read"}, fuzzer.outcomes
    assert fuzz.fuzz(fuzzer, 200, 600, seed=1) == 200
    assert not fuzzer.failures, [path.name for path in (tmp_path / "failures").iterdir()]
    assert len(fuzzer.outcomes) > 1


def test_what_the_fuzzer_calls_a_failure(alarm, tmp_path, capsys, monkeypatch):
    def read(path):
        match path.read_bytes():
            case b"slow":
                time.sleep(60)
            case b"odd":
                raise KeyError("x")
            case b"lines":
                raise FormatError("two\nlines")
            case b"right":
                raise FormatError("refused")

    monkeypatch.setitem(fuzz.READERS, "broken", (lambda: [b"seed"], "x", read))
    fuzzer = fuzz.Fuzzer("broken", tmp_path, limit=60, keep=tmp_path / "failures")
    for data in (b"right", b"fine", b"slow", b"odd", b"lines"):
        fuzzer._limit = 0.1 if data == b"slow" else 60
        fuzzer.run(data)
    assert fuzzer.failures == 3
    assert fuzzer.outcomes == {"FormatError": 2, "read": 1, "slow": 1, "KeyError": 1}
    assert sorted(path.read_bytes() for path in (tmp_path / "failures").iterdir()) == [b"lines", b"odd", b"slow"]
    fuzzer.most = 1
    fuzzer.check_memory()
    assert "bytes were resident" in capsys.readouterr().err


def test_mutations_differ_and_repeat():
    data = bytes(range(200))
    first = [fuzz.mutate(data, random.Random(seed)) for seed in range(100)]
    assert first == [fuzz.mutate(data, random.Random(seed)) for seed in range(100)]
    assert len(set(first)) > 80
