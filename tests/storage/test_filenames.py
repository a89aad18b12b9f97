"""What a recipe, an index or a plan calls a file lies below its folder, or is refused before anything is read or written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_files import numbered, refusal, run, write

from streamconv.storage.filenames import find_fault

OUTSIDE = ["/tmp/x", "../x", "a/../../x", "..", "", ".", "./x", "a//b", "a\\b", "a\0b", "a" * 256]
INSIDE = ["x", ".x", "a/b", "..x", "a..b", "x:y", "a" * 255, "\udc80"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "src", numbered({"a.0": (2, 3), "a.1": (4,)}), config={"model_type": "any"})


def recipe(folder: Path, **sides: dict[str, object]) -> Path:
    """A recipe file that changes no names."""
    path = folder / "mine.yaml"
    path.write_text(json.dumps({"rules": [{"rule": "{rest*}", "right": "{rest*}"}], **sides}))
    return path


@pytest.mark.parametrize("text", OUTSIDE)
def test_what_is_no_path_below_a_folder(text):
    assert find_fault(text)


@pytest.mark.parametrize("text", INSIDE)
def test_what_is_one(text):
    assert find_fault(text) is None


@pytest.mark.parametrize("text", ["../x", "/tmp/x", "a\\b"])
@pytest.mark.parametrize(
    ("side", "field"),
    [
        ("right", "index"),
        ("right", "stem"),
        ("left", "config"),
        ("right", "config"),
        ("left", "files"),
        ("right", "ranks"),
        ("right", "expects"),
    ],
)
def test_a_recipe_names_no_file_elsewhere(source, tmp_path, capsys, text, side, field):
    given = [text] if field in {"files", "ranks", "expects"} else text
    file = recipe(tmp_path, **{side: {field: given}})
    said = refusal(capsys, "convert", source, tmp_path / "dst", "--recipe", file)
    assert f"{file}:1:" in said
    assert f"{field} {text!r} " in said
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("right", [{"index": "config.json"}, {"stem": "{n}/../../x"}])
def test_an_output_is_where_no_other_is_and_below_dst(source, tmp_path, capsys, right):
    given = ["--recipe", recipe(tmp_path, right=right), "--max-shard-size", "16"]
    said = refusal(capsys, "convert", source, tmp_path / "dst", *given)
    assert "would be made twice" in said or "leads out of its folder" in said
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("text", ["../x.safetensors", "/x.safetensors", "a\\b.safetensors", ""])
def test_a_plan_names_no_file_elsewhere(source, tmp_path, capsys, text):
    plan = tmp_path / "plan.json"
    assert run("plan", source, tmp_path / "dst", "--out", plan, "--quiet") == 0
    made = json.loads(plan.read_text())
    made["files"][-1]["path"] = text
    plan.write_text(json.dumps(made))
    assert "lie below its root" in refusal(capsys, "run", plan)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    "code", ["os:system", "streamconv.recipes.sat.partition:repartitioned", "mine.yaml", "mine.py:x", "mine.json:inverse", "tp-split", ""]
)
def test_a_recipe_file_has_only_writers_run(source, tmp_path, capsys, code):
    file = recipe(tmp_path, right={"writes": code})
    assert f"writes {code!r}" in refusal(capsys, "convert", source, tmp_path / "dst", "--recipe", file)
    assert not (tmp_path / "dst").exists()


def test_a_writer_that_is_for_others(source, tmp_path, capsys):
    file = recipe(tmp_path, right={"writes": "sat-repartition"})
    assert "does not fit this model" in refusal(capsys, "convert", source, tmp_path / "dst", "--recipe", file)


@pytest.mark.parametrize("side", [{"format": "torch", "index": "x.json"}, {"format": "sat", "stem": "x"}])
def test_names_that_a_container_does_not_let_choose(source, tmp_path, capsys, side):
    assert "cannot be chosen" in refusal(capsys, "convert", source, tmp_path / "dst", "--recipe", recipe(tmp_path, right=side))
