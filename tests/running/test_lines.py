"""Journals and claims that somebody changed, or that are something else: refused in a line, and nothing is lost."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streamconv.cli.command import main
from streamconv.convert import api
from streamconv.errors import DestinationError
from streamconv.running import journal
from streamconv.running.journal import NAME, Journal, is_only_copy, read_journal

CHANGES = {
    "null": lambda _: None,
    "a list": lambda _: [],
    "a number": lambda _: 7,
    "no plan": lambda line: line.pop("plan") and line,
    "version as text": lambda line: {**line, "version": "3"},
    "plan as a number": lambda line: {**line, "plan": 5},
    "settings as a list": lambda line: {**line, "settings": [1]},
    "settings of null": lambda line: {**line, "settings": None},
    "sources as a list": lambda line: {**line, "sources": [[1, 2, 3]]},
    "sources that are short": lambda line: {**line, "sources": {path: [1] for path in line["sources"]}},
    "sources of text": lambda line: {**line, "sources": dict.fromkeys(line["sources"], "abc")},
    "tiling of null": lambda line: {**line, "tiling": None},
    "no process": lambda line: {**line, "holder": {"pid": "1"}},
    "overwrite as text": lambda line: {**line, "overwrite": "no"},
    "reclaim as a plan": lambda line: {**line, "reclaim": {"files": []}},
    "reclaim as no plan": lambda line: {**line, "reclaim": "{}"},
    "parts as text": lambda line: {**line, "parts": "many"},
    "parts and no more": lambda _: {"parts": 2},
    "old as a list": lambda line: {**line, "parts": 2, "old": [1]},
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    save_file({f"w{k}": torch.arange(64.0) + k for k in range(4)}, tmp_path / "src" / "model.safetensors", {"format": "pt"})
    return tmp_path / "src"


@pytest.fixture
def begun(source: Path, tmp_path: Path) -> Path:
    """The journal of a run that was killed before it wrote anything."""
    dst = tmp_path / "dst"
    dst.mkdir()
    state = Journal(dst / NAME, api.plan(source, dst))
    state.begin(resume=False)
    state.close()
    return dst / NAME


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([*map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    return line


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_first_line_is_refused(change, source, begun, capsys):
    text = json.dumps(change(json.loads(begun.read_text()))) + "\n"
    begun.write_text(text)
    for option in ([], ["--resume"], ["--resume", "--reclaim-source", "--yes"]):
        assert str(begun.parent) in refusal(capsys, "convert", source, begun.parent, *option)
        assert begun.read_text() == text
        assert not [*begun.parent.glob("*.safetensors*")]


LATER = [
    b"\xff\xfe\n",
    b"\0" * 100,
    b"[" * 100_000 + b"\n",
    b'{"finished": 3}\n',
    b'{"finished": "unheard of"}\n',
    b'{"finished": "model.safetensors", "digest": "1"}\n',
    b'{"finished": "model.safe',
    b'{"again": [1]}\n',
    b'{"holder": 1}\n',
    b'{"tiling": NaN}\n',
    b'{"durable": {"unheard of": [0]}}\n',
    b'{"durable": {"model.safetensors": [0, -8, 1000000]}}\n',
    b'{"durable": {"model.safetensors": {"a": 1}}}\n',
    b'{"durable": {"model.safetensors": [1e999]}}\n',
    b'{"durable": {"model.safetensors": [' + b"9" * 5000 + b"]}}\n",
]


@pytest.mark.parametrize("line", LATER, ids=range(len(LATER)))
def test_a_later_line_that_is_none_counts_for_nothing(line, source, begun, tmp_path):
    with begun.open("ab") as file:
        file.write(line)
    assert main(["convert", str(source), str(begun.parent), "--resume", "--verify", "--quiet"]) == 0
    assert main(["convert", str(source), str(tmp_path / "whole"), "--quiet"]) == 0
    assert (begun.parent / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["pipe", "directory", "link", "large"])
def test_what_is_no_file_in_its_place_is_no_journal(kind, source, begun, capsys, monkeypatch):
    if kind == "large":
        monkeypatch.setattr(journal, "MOST", 10)
    else:
        begun.unlink()
        make = {"pipe": os.mkfifo, "directory": Path.mkdir, "link": lambda path: path.symlink_to("/dev/zero")}[kind]
        make(begun)
    assert read_journal(begun) == ({}, {})
    for option in ([], ["--resume"], ["--overwrite"]):
        assert str(begun.parent) in refusal(capsys, "convert", source, begun.parent, *option)


def test_a_damaged_journal_that_may_speak_of_the_only_copy_keeps_dst(source, begun, capsys):
    first = {**json.loads(begun.read_text()), "reclaim": api.plan(source, begun.parent, overwrite=True).to_json()}
    begun.write_text(json.dumps(first, separators=(",", ":")) + '\n{"finished": "x"}\n')
    assert is_only_copy(begun)
    begun.write_text(begun.read_text().replace('"version":3', '"version":"3"'))
    assert "only copy" in refusal(capsys, "convert", source, begun.parent, "--overwrite")
    begun.write_text(json.dumps(first) + '\n{"finished": 5}\n{"finished": "x"}\n')
    assert "line 2 is damaged" in refusal(capsys, "convert", source, begun.parent, "--resume", "--reclaim-source", "--yes")
    assert begun.read_text().endswith('{"finished": "x"}\n')


def test_an_interrupted_run_of_another_release_is_refused(source, begun, capsys):
    line = json.loads(begun.read_text())
    begun.write_text(json.dumps({**line, "version": 2}) + "\n")
    assert "of version 2, not 3" in refusal(capsys, "convert", source, begun.parent, "--resume")
    begun.write_text(json.dumps({**line, "version": 2, "reclaim": "{}"}) + "\n")
    assert "finish it with that release" in refusal(capsys, "convert", source, begun.parent, "--resume", "--reclaim-source", "--yes")
    state = Journal(begun, api.plan(source, begun.parent, overwrite=True))
    with pytest.raises(DestinationError, match="version 2"):
        state.begin(resume=True)
