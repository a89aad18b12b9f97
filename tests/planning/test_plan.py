"""A plan is what its text says: it is proved when it is made and when it is read, and its identity is that text."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import write
from hypothesis import given, settings
from hypothesis import strategies as st

import streamconv
from streamconv import memory
from streamconv.cli.command import main
from streamconv.errors import FormatError, StreamconvError
from streamconv.planning.plan import Plan

RECIPE = """
rules:
- rule: 'h.{i}.{q,k,v}'
  right: 'h.{i}.qkv'
  layout: '(h two d) c, (h two d) c, (h two d) c -> (h (d two + d two + d two)) c'
  dims: {two: 2, d: 3}
- {rule: 'e.{e}', right: e, layout: 'e a b -> b e a', cast: float16}
- {rule: 'rows', right: 'rows', op: {op: pad, rows: 9}}
- {rule: 'kept', right: 'kept'}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A source, a recipe and the plan between them, with copies, tiles, layouts woven into each other, casts and constants."""
    folder = tmp_path_factory.mktemp("plan")
    tensors = {f"h.{i}.{part}": torch.rand(12, 5) for i in range(2) for part in "qkv"}
    tensors |= {f"e.{k}": torch.rand(4, 6) for k in range(3)} | {"rows": torch.rand(7, 3), "kept": torch.rand(1000)}
    write(folder / "src", tensors, shards=2, config={"model_type": "any"})
    (folder / "mine.yaml").write_text(RECIPE)
    made = streamconv.plan(folder / "src", folder / "dst", recipe=str(folder / "mine.yaml"), max_shard_size=3000, max_memory="1GB")
    (folder / "plan.json").write_text(made.to_json())
    return folder


@pytest.fixture
def data(folder) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    return read


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all whole numbers in JSON data."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))
    elif type(value) is int:
        yield path


def refused(text: str) -> bool:
    try:
        Plan.from_json(text)
    except FormatError:
        return True
    return False


@settings(deadline=None, max_examples=250)
@given(st.data())
def test_a_plan_with_another_number_is_refused_or_runs(folder: Path, data: st.DataObject) -> None:
    """Whatever number is another one: the plan is refused, or each byte is still written once, and it runs to its end."""
    plan = json.loads((folder / "plan.json").read_text())
    path = data.draw(st.sampled_from(sorted(places(plan), key=str)))
    inner = plan
    for key in path[:-1]:
        inner = inner[key]
    change = data.draw(st.sampled_from([-1, 1, 2, -8, 8, 100, 2**31, 2**63, -(2**70), 10**30]))
    inner[path[-1]] += change
    text = json.dumps(plan)
    if refused(text):
        return
    changed = Plan.from_json(text)
    changed.check()
    before = Plan.from_json((folder / "plan.json").read_text())
    kept = ("workers", "arena", "peak_memory", "totals", "account")
    assert path[0] in kept or changed.digest() != before.digest() or _is_tile(plan, path) or path[0] == "sources"


def _is_tile(plan: dict[str, Any], path: tuple[Any, ...]) -> bool:
    """Whether a path leads into the tile of a segment."""
    return path[0] == "files" and path[2] == "segments" and plan["files"][path[1]]["segments"][path[3]][0] == "compute" and path[4] == 8


def test_the_plan_runs_as_it_was_read(folder, tmp_path):
    made = Plan.from_json((folder / "plan.json").read_text())
    assert any(box for file in made.files for box in file.segments if hasattr(box, "move") and len(box.move.sizes) > 1)
    assert main(["run", str(folder / "plan.json"), "--verify", "--quiet"]) == 0


# What differs ----------------------------------------------------------------------------------------------------


def test_two_plans_that_differ_have_two_digests(folder):
    options: list[dict[str, Any]] = [
        {},
        {"max_shard_size": 2000},
        {"format": "torch"},
        {"align": True},
        {"dtype": "float16"},
        {"dtype": "bfloat16"},
        {"dtype": "float16", "keep_dtype": ["rows"]},
    ]
    source, recipe = folder / "src", str(folder / "mine.yaml")
    digests = [
        streamconv.plan(source, folder / f"x{k}", recipe=recipe, max_memory="4GB", **more).digest() for k, more in enumerate(options)
    ]
    assert len(set(digests)) == len(digests)
    again = streamconv.plan(source, folder / "elsewhere", recipe=recipe, workers=1, max_memory="2GB", read_backend="pread")
    assert again.digest() == digests[0]
    assert Plan.from_json(again.to_json()).digest() == digests[0]


def test_the_graph_is_part_of_what_a_plan_is(data):
    """The same names, sizes and dtypes of other values: what a digest of names and texts does not see."""
    before = Plan.from_json(json.dumps(data)).digest()
    casts = [op for op in data["ops"] if op["op"] == "rearrange"]
    assert casts
    for change in (_swap_extents, lambda plan: plan["sources"][0].__setitem__(2, 5), lambda plan: plan["dropped"].append("x")):
        other = copy.deepcopy(data)
        change(other)
        assert Plan.from_json(json.dumps(other)).digest() != before


def _swap_extents(plan: dict[str, Any]) -> None:
    """Has two tensors of one size change places in the source."""
    rows = [row for row in plan["graph"] if row[0] == "stored" and row[2] == [12, 5]]
    rows[0][3], rows[1][3] = rows[1][3], rows[0][3]


def test_parts_of_two_plans_that_differ_in_a_number_are_not_mixed(folder, tmp_path, data, capsys):
    data["root"] = str(tmp_path / "dst")
    (tmp_path / "a.json").write_text(json.dumps(data))
    _swap_extents(data)
    (tmp_path / "b.json").write_text(json.dumps(data))
    assert main(["run", str(tmp_path / "a.json"), "--part", "0/2", "--quiet"]) == 0
    for option in (["--part", "1/2"], ["--finish"]):
        assert main(["run", str(tmp_path / "b.json"), *option, "--quiet"]) == 2
        assert "parts of another plan" in capsys.readouterr().err


# What cannot be --------------------------------------------------------------------------------------------------


def unwritten(plan: dict[str, Any]) -> None:
    """100 bytes of the largest file are left out."""
    file = max(plan["files"], key=lambda file: file["size"])
    copied = next(row for row in file["segments"] if row[0] == "copy" and row[4] > 100)
    copied[4] -= 100


def first(plan: dict[str, Any], kind: str) -> list[Any]:
    return next(row for file in plan["files"] for row in file["segments"] if row[0] == kind)


def made(plan: dict[str, Any]) -> list[Any]:
    return next(row for row in plan["graph"] if row[0] == "made")


def op(plan: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(op for op in plan["ops"] if op["op"] == kind)


def set_(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(plan: Any) -> None:
        for key in path[:-1]:
            plan = plan[key]
        plan[path[-1]] = value

    return change


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "bytes unwritten": unwritten,
    "bytes written twice": lambda plan: plan["files"][0]["segments"].append(plan["files"][0]["segments"][0]),
    "no segments": set_("files", 0, "segments", value=[]),
    "no literals": set_("files", 0, "literals", value=[]),
    "a literal elsewhere": set_("files", 0, "literals", 0, 0, value=1),
    "a literal below 0": set_("files", 0, "literals", 0, 0, value=-1),
    "a literal that is no base64": set_("files", 0, "literals", 0, 1, value="?"),
    "a larger file": set_("files", 0, "size", value=10**6),
    "a huge file": set_("files", 0, "size", value=2**64),
    "a negative file": set_("files", 0, "size", value=-1),
    "a size as text": set_("files", 0, "size", value="7"),
    "a size of NaN": set_("files", 0, "size", value=float("nan")),
    "a fraction": set_("files", 0, "size", value=7.5),
    "true": set_("files", 0, "size", value=True),
    "a copy from beyond": lambda plan: first(plan, "copy").__setitem__(2, 10**6),
    "a copy from below": lambda plan: first(plan, "copy").__setitem__(2, -1),
    "a copy of nothing": lambda plan: first(plan, "copy").__setitem__(4, 0),
    "a copy of no source": lambda plan: first(plan, "copy").__setitem__(1, 9),
    "a copy of the last but one": lambda plan: first(plan, "copy").__setitem__(1, -2),
    "a short copy": lambda plan: first(plan, "copy").pop(),
    "a long copy": lambda plan: first(plan, "copy").append(1),
    "something else": lambda plan: first(plan, "copy").__setitem__(0, "move"),
    "a region of no node": lambda plan: first(plan, "compute").__setitem__(1, 99),
    "a region elsewhere": lambda plan: first(plan, "compute").__setitem__(2, 0),
    "a region of other sizes": lambda plan: first(plan, "compute").__setitem__(3, [1]),
    "a region of no sizes": lambda plan: first(plan, "compute").__setitem__(3, None),
    "a region over the end": lambda plan: first(plan, "compute").__setitem__(4, 10**9),
    "no tile": lambda plan: first(plan, "compute").__setitem__(8, []),
    "a tile of nothing": lambda plan: first(plan, "compute").__setitem__(8, [0] * len(first(plan, "compute")[8])),
    "another dtype": lambda plan: made(plan).__setitem__(1, "int64"),
    "no dtype": lambda plan: made(plan).__setitem__(1, "int3"),
    "another shape": lambda plan: made(plan).__setitem__(2, [1, 2]),
    "a huge shape": lambda plan: made(plan).__setitem__(2, [2**62] * 3),
    "a cycle": lambda plan: made(plan).__setitem__(4, [len(plan["graph"]) - 1]),
    "an input that is not there": lambda plan: made(plan).__setitem__(4, [-1]),
    "no inputs": lambda plan: made(plan).__setitem__(4, []),
    "an op that is not there": lambda plan: made(plan).__setitem__(3, 99),
    "an unknown op": lambda plan: plan["ops"][0].__setitem__("op", "system"),
    "an op without a name": lambda plan: plan["ops"][0].pop("op"),
    "an op with more": lambda plan: plan["ops"][0].__setitem__("more", 1),
    "an op with less": lambda plan: op(plan, "rearrange").pop("sizes"),
    "a layout that is none": lambda plan: op(plan, "rearrange").__setitem__("layout", "a ->"),
    "sizes of another layout": lambda plan: op(plan, "rearrange").__setitem__("sizes", {"1": 1}),
    "a part that is not there": lambda plan: op(plan, "rearrange").__setitem__("part", 7),
    "a part below 0": lambda plan: op(plan, "rearrange").__setitem__("part", -1),
    "an output that is not there": lambda plan: op(plan, "rearrange").__setitem__("output", -1),
    "a leading axis too many": lambda plan: op(plan, "rearrange").__setitem__("leading", 1),
    "a cast to nothing": lambda plan: op(plan, "cast").__setitem__("dtype", "int8"),
    "an extent beyond": lambda plan: plan["graph"][0][3][0].__setitem__(1, 10**6),
    "an extent of another size": lambda plan: plan["graph"][0][3][0].__setitem__(2, 4),
    "an extent of no file": lambda plan: plan["graph"][0][3][0].__setitem__(0, 5),
    "a path outside": set_("files", 0, "path", value="../x"),
    "an absolute path": set_("files", 0, "path", value="/etc/passwd"),
    "one path twice": lambda plan: plan["files"][0].__setitem__("path", plan["files"][1]["path"]),
    "a folder that is a file": lambda plan: plan["files"][0].__setitem__("path", plan["files"][1]["path"] + "/x"),
    "a name with NUL": set_("files", 0, "path", value="a\0"),
    "a source with NUL": set_("sources", 0, 0, value="/a\0"),
    "a source of no size": set_("sources", 0, 1, value=-1),
    "a source twice": lambda plan: plan["sources"].append(plan["sources"][0]),
    "a smaller source": set_("sources", 0, 1, value=100),
    "a root with NUL": set_("root", value="/a\0"),
    "no root": set_("root", value=""),
    "a single file of many": set_("single", value="model.safetensors"),
    "no workers": set_("workers", value=0),
    "a million workers": set_("workers", value=10**6),
    "no arena": set_("arena", value=0),
    "a huge arena": set_("arena", value=2**62),
    "no memory": set_("peak_memory", value=0),
    "another field": set_("more", value=1),
    "a field of a file": set_("files", 0, "more", value=1),
    "a field less": lambda plan: plan.pop("checks"),
    "null": set_("files", value=None),
    "a mapping": set_("files", value={}),
    "a check of nothing": set_("checks", value=[[0, 99, ["a", "b"]]]),
    "an unknown checksum": set_("files", 0, "checksums", value=[["md5", 0, 1, [0], 0, [], ""]]),
    "a checksum outside": set_("files", 0, "checksums", value=[["crc32", 0, 10**9, [0], 0, [], ""]]),
    "a checksum over other bytes": set_("files", 0, "checksums", value=[["crc32", 0, 1, [0], 0, [], ""]]),
    "an unknown container": set_("format", value="hdf5"),
    "an unknown backend": set_("read_backend", value="magic"),
    "no files": set_("files", value=[]),
    "another version": set_("streamconv_plan", value=2),
    "no version": lambda plan: plan.pop("streamconv_plan"),
}


def refusal(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> str:
    assert main(["run", str(path), *options]) == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert "Traceback" not in line
    return line


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_plan_that_cannot_be_is_refused(change, data, tmp_path, capsys):
    data["root"] = str(tmp_path / "dst")
    change(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    refusal(capsys, tmp_path / "plan.json")
    assert not (tmp_path / "dst").exists()


TEXTS = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "text": b'"plan"',
    "a number": b"7",
    "no JSON": b"plan",
    "binary": bytes(range(256)),
    "no UTF-8": b'{"streamconv_plan": 3, "root": "\xff"}',
    "half a character": b'{"streamconv_plan": 3, "root": "\\ud800"}',
    "a byte of a name": b'{"streamconv_plan": 3, "root": "\\udcff"}',
    "nested": b"[" * 200_000,
    "nested in a field": b'{"streamconv_plan": 3, "ops": ' + b"[" * 200_000,
    "nested mappings": b'{"a":' * 200_000,
    "digits": b'{"streamconv_plan": ' + b"9" * 10_000 + b"}",
    "a number without end": b'{"streamconv_plan": 1e999}',
    "zeros": bytes(10_000),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text_that_is_no_plan_is_refused(text, tmp_path, capsys):
    (tmp_path / "plan.json").write_bytes(text)
    assert "streamconv plan SRC DST --out FILE" in refusal(capsys, tmp_path / "plan.json")


def test_a_plan_cut_off_anywhere_is_refused(folder, tmp_path, capsys):
    text = (folder / "plan.json").read_bytes()
    for stop in range(1, len(text), 997):
        (tmp_path / "plan.json").write_bytes(text[:stop])
        refusal(capsys, tmp_path / "plan.json")


def test_what_is_no_file_is_no_plan(tmp_path, capsys, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "large").write_bytes(b"[" * 100)
    monkeypatch.setattr("streamconv.cli.commands.run.MOST_OF_PLAN", 50)
    for name in ("pipe", "device", "large", "absent", "\0"):
        assert "cannot be read" in refusal(capsys, tmp_path / name)
    assert "is no plan but a DST" in refusal(capsys, tmp_path / "folder")


def test_names_that_are_no_utf8_come_through(tmp_path):
    source = write(tmp_path / os.fsdecode(b"src\xff"), {"w": torch.ones(8)})
    made = streamconv.plan(source, tmp_path / "dst")
    again = Plan.from_json(made.to_json())
    assert (again.sources, again.digest()) == (made.sources, made.digest())


def test_a_plan_of_many_tensors_is_checked_by_sorted_ranges(folder):
    """Neither a byte nor an element is looked at: a file of a petabyte is checked as soon as a small one."""
    made = Plan.from_json((folder / "plan.json").read_text())
    with pytest.raises(StreamconvError, match="byte"):
        Plan.from_json(made.to_json().replace(f'"size":{made.files[0].size},', f'"size":{10**15},'))


def test_the_collector_looks_rarely_while_a_plan_is_made_and_goes_on(tmp_path, monkeypatch):
    import gc

    from streamconv.conversion import pipeline

    source = write(tmp_path / "source", {"a": torch.ones(4)})
    seen, usual = [], gc.get_threshold()
    compile_plan = pipeline.compile_plan
    monkeypatch.setattr(pipeline, "compile_plan", lambda *given, **more: seen.append(gc.get_threshold()) or compile_plan(*given, **more))
    streamconv.plan(source, tmp_path / "out", max_memory="4GB")
    assert (seen[0][0], gc.get_threshold()) == (memory.RARELY, usual)
    with pytest.raises(StreamconvError):
        streamconv.plan(tmp_path / "none", tmp_path / "out", max_memory="4GB")
    assert gc.get_threshold() == usual


def test_names_that_stay_are_not_folded(tmp_path, monkeypatch):
    source = write(tmp_path / "source", {"layers.0.w": torch.ones(4), "layers.1.w": torch.ones(4)})
    plan = streamconv.plan(source, tmp_path / "out", max_memory="4GB")
    monkeypatch.setattr(Plan, "fold_mapping", lambda _: pytest.fail("nothing is to be shown of it"))
    assert str(plan).splitlines()[-1].startswith("  account")
