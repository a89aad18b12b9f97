"""Logs that somebody changed, or that are something else or of an earlier release: refused in a line, and nothing is lost."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streamconv import codec
from streamconv.cli.command import main
from streamconv.conversion import api
from streamconv.planning.plan import VERSION
from streamconv.running import directory, holder
from streamconv.running.directory import Directory
from streamconv.running.lock import Lock
from streamconv.running.output import is_only_copy
from streamconv.running.reclaim import Reclaim
from tools.crash import read_tree

CHANGES = {
    "null": lambda _: None,
    "a list": lambda _: [],
    "a number": lambda _: 7,
    "no plan": lambda line: line.pop("plan") and line,
    "version as text": lambda line: {**line, "version": "3"},
    "plan as a number": lambda line: {**line, "plan": 5},
    "settings as a list": lambda line: {**line, "settings": [1]},
    "settings of null": lambda line: {**line, "settings": None},
    "ends as a list": lambda line: {**line, "ends": [[1, 2, 3]]},
    "ends of others": lambda line: {**line, "ends": dict.fromkeys(line["ends"], "abc")},
    "ends that are numbers": lambda line: {**line, "ends": dict.fromkeys(line["ends"], 1)},
    "tiling of null": lambda line: {**line, "tiling": None},
    "no process": lambda line: {**line, "holder": {"pid": "1"}},
    "overwrite as text": lambda line: {**line, "overwrite": "no"},
    "reclaim as a plan": lambda line: {**line, "reclaim": {"files": []}},
    "reclaim as text": lambda line: {**line, "reclaim": "{}"},
    "parts as text": lambda line: {**line, "parts": "many"},
    "parts and no more": lambda _: {"parts": 2},
    "stale as a list": lambda line: {**line, "parts": 2, "stale": [1]},
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    save_file({f"w{k}": torch.arange(64.0) + k for k in range(4)}, tmp_path / "src" / "model.safetensors", {"format": "pt"})
    return tmp_path / "src"


@pytest.fixture
def begun(source: Path, tmp_path: Path) -> Path:
    """The log of a run that was killed before it wrote anything."""
    (tmp_path / "dst").mkdir()
    return begin(source, tmp_path / "dst")


def begin(source: Path, dst: Path, *, reclaim: bool = False) -> Path:
    plan = api.plan(source, dst, overwrite=True)
    state = Lock(Directory(dst), plan, reclaim=Reclaim(plan) if reclaim else None)
    state.take(goes_on=False)
    state.release()
    return dst / ".streamconv" / "log.jsonl"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([*map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    return line


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_first_line_is_refused(change, source, begun, capsys):
    text = json.dumps(change(json.loads(begun.read_text()))) + "\n"
    begun.write_text(text)
    for option in ([], ["--resume"], ["--resume", "--reclaim-source", "--yes"]):
        assert str(begun.parent.parent) in refusal(capsys, "convert", source, begun.parent.parent, *option)
        assert begun.read_text() == text
        assert not [*begun.parent.parent.glob("*.safetensors*")]


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
    assert main(["convert", str(source), str(begun.parent.parent), "--resume", "--verify", "--quiet"]) == 0
    assert main(["convert", str(source), str(tmp_path / "whole"), "--quiet"]) == 0
    assert (begun.parent.parent / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["pipe", "directory", "link", "large"])
def test_what_is_no_file_in_its_place_is_no_log(kind, source, begun, capsys, monkeypatch):
    if kind == "large":
        monkeypatch.setattr(directory, "MOST", 10)
        monkeypatch.setattr(holder, "MOST", 10)
    else:
        begun.unlink()
        make = {"pipe": os.mkfifo, "directory": Path.mkdir, "link": lambda path: path.symlink_to("/dev/zero")}[kind]
        make(begun)
    assert Directory(begun.parent.parent).load("log.jsonl") == b""
    for option in ([], ["--resume"], ["--overwrite"]):
        assert str(begun.parent.parent) in refusal(capsys, "convert", source, begun.parent.parent, *option)


def test_a_damaged_log_that_may_speak_of_the_only_copy_keeps_dst(source, begun, capsys):
    dst = begun.parent.parent
    begun.unlink()
    text = begin(source, dst, reclaim=True).read_text() + '{"finished":"x"}\n'
    assert is_only_copy(text.encode())
    begun.write_text(text.replace('"version":', '"version":"'))
    assert "only copy" in refusal(capsys, "convert", source, dst, "--overwrite")
    begun.write_text(text.replace('{"finished":"x"}', '{"finished":5}\n{"finished":"x"}'))
    assert "line 2 is damaged" in refusal(capsys, "convert", source, dst, "--resume", "--reclaim-source", "--yes")
    assert begun.read_text().endswith('{"finished":"x"}\n')


@pytest.mark.parametrize("damage", ["gone", "cut", "another"])
def test_a_plan_that_is_damaged_or_gone_with_the_source(damage, source, begun, tmp_path, capsys):
    """It cannot be planned again: nothing is guessed, and nothing lost."""
    dst = begun.parent.parent
    begun.unlink()
    begin(source, dst, reclaim=True)
    plan = begun.with_name("plan.json")
    with begun.open("a") as file:
        file.write('{"finished":"model.safetensors"}\n')
    if damage == "gone":
        plan.unlink()
    elif damage == "cut":
        plan.write_bytes(plan.read_bytes()[:-20])
    else:
        plan.write_text(api.plan(source, tmp_path / "other", dtype="bf16").to_json())
    said = {"gone": "its plan is not there", "cut": "plan.json there is damaged", "another": "are of different conversions"}
    assert said[damage] in refusal(capsys, "convert", source, dst, "--resume", "--reclaim-source", "--yes")
    assert said[damage] in refusal(capsys, "run", dst, "--resume")
    assert begun.exists()


def test_an_interrupted_run_of_another_version_is_refused(source, begun, capsys):
    dst = begun.parent.parent
    line = json.loads(begun.read_text())
    begun.write_text(json.dumps({**line, "version": 2}) + "\n")
    assert f"of version 2, not {VERSION}" in refusal(capsys, "convert", source, dst, "--resume")
    begun.write_text(json.dumps({**line, "version": 2, "reclaim": True}) + "\n")
    assert "finish it with that release" in refusal(capsys, "convert", source, dst, "--resume", "--reclaim-source", "--yes")


@pytest.mark.parametrize("single", ["", "one.safetensors"])
@pytest.mark.parametrize("is_only_copy", [True, False])
def test_what_an_earlier_release_has_begun_is_refused(source, tmp_path, capsys, single, is_only_copy):
    """It kept a file of another name; that is enough to go on with what it has begun, and that release can."""
    root, plan = tmp_path / "dst", tmp_path / "plan.json"
    dst = root / single
    assert main(["plan", str(source), str(dst), "--out", str(plan), "--quiet"]) == 0
    root.mkdir()
    earlier = root / (f".{single}.streamconv.json" if single else ".streamconv.json")
    head = {"state": "incomplete", "version": 3, "plan": "x", "settings": {}, "sources": {}, "tiling": "y"}
    earlier.write_bytes(codec.encode({**head, **({"reclaim": "{}"} if is_only_copy else {})}) + b"\n")
    (root / "model.safetensors.partial").write_bytes(b"half")
    before = read_tree(root)
    commands = [["convert", source, dst], ["convert", source, dst, "--resume"], ["run", plan], ["run", plan, "--resume"]]
    commands += [["run", plan, "--part", "1/2"], ["run", plan, "--finish"], ["run", dst, "--resume"]]
    if is_only_copy:
        commands += [["convert", source, dst, "--overwrite"], ["run", plan, "--part", "1/2", "--overwrite"]]
    for command in commands:
        said = refusal(capsys, *command)
        assert "an earlier release of streamconv has begun a conversion there" in said
        assert "finish it with that release" in said
        assert read_tree(root) == before
    if not is_only_copy:
        assert main(["convert", str(source), str(dst), "--overwrite", "--quiet"]) == 0
        assert not earlier.exists()
        return
    next(source.glob("*.safetensors")).unlink()  # which that run has given back
    assert "finish it with that release" in refusal(capsys, "convert", source, dst, "--resume", "--reclaim-source", "--yes")
