"""What is read, or was just made, is neither removed nor replaced: by whatever mounts, links and names a path leads there."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoint_files import numbered, refusal, run, write

from streamconv.storage.filenames import LONGEST

Bind = Callable[[Path, Path], Path]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint in two files, in a folder of its own."""
    src = write(tmp_path / "in" / "src", numbered({"a.0": (2, 3), "a.1": (4,)}), shards=2, config={"model_type": "any"})
    (src / "sub").mkdir()
    (src / "sub" / "vocab.txt").write_text("words")
    return src


@pytest.fixture
def bind() -> Iterator[Bind]:
    """Makes a second mount of a folder, where this user may."""
    mounted: list[Path] = []

    def do(folder: Path, at: Path) -> Path:
        at.mkdir(parents=True)
        if subprocess.run(["mount", "--bind", folder, at], check=False, capture_output=True).returncode:
            pytest.skip("this user may not mount")
        mounted.append(at)
        return at

    yield do
    for at in mounted:
        subprocess.run(["umount", at], check=True)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, what links lead to included."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("options", [["--overwrite"], ["--reclaim-source", "--yes"], ["--overwrite", "--reclaim-source", "--yes"]])
@pytest.mark.parametrize(("mounted", "inner"), [("in/src", ""), ("in/src", "new"), ("in/src/sub", ""), ("in/src/sub", "new"), ("in", "")])
def test_another_mount_of_the_source_is_the_source(source, tmp_path, bind, capsys, options, mounted, inner):
    before = files(source)
    dst = bind(tmp_path / mounted, tmp_path / "mount") / inner
    said = refusal(capsys, "convert", source, dst, *options)
    assert "DST is SRC" in said or "inside" in said
    assert files(source) == before


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_plan_whose_sources_another_mount_has_in_dst(source, tmp_path, bind, capsys, overwrite):
    plan = tmp_path / "plan.json"
    assert run("plan", source, tmp_path / "dst", "--max-shard-size", "20", "--out", plan, "--quiet") == 0
    before = files(source)
    bind(source, tmp_path / "dst")
    said = refusal(capsys, "run", plan, *overwrite)
    assert "would be replaced, and is read" in said
    assert files(source) == before


def old_output(folder: Path) -> Path:
    """A folder with an output that may be replaced."""
    return write(folder, numbered({"b": (3,)}), config={"model_type": "old"})


def test_a_sidecar_that_is_a_link_into_dst(source, tmp_path, capsys):
    dst = old_output(tmp_path / "dst")
    for name in ("config.json", "words.txt"):
        (dst / name).write_text('{"model_type": "linked"}')
        (source / name).unlink(missing_ok=True)
        (source / name).symlink_to(dst / name)
    before = files(dst)
    for more in ([], ["--dtype", "bf16"]):
        assert "would be replaced, and is read" in refusal(capsys, "convert", source, dst, "--overwrite", *more)
    assert files(dst) == before


def test_a_shard_that_is_a_link_into_dst(source, tmp_path, capsys):
    dst = old_output(tmp_path / "dst")
    (source / "model-00001-of-00002.safetensors").rename(dst / "model-00007-of-00009.safetensors")
    (source / "model-00001-of-00002.safetensors").symlink_to(dst / "model-00007-of-00009.safetensors")
    before = files(dst)
    refusal(capsys, "convert", source, dst, "--overwrite")
    assert files(dst) == before


@pytest.mark.parametrize("option", ["--sidecars-from", "--compare"])
def test_a_folder_that_is_read_and_would_be_replaced(source, tmp_path, capsys, option):
    dst = old_output(tmp_path / "dst")
    before = files(dst)
    (tmp_path / "link").symlink_to(dst)
    for named in (dst, tmp_path / "link"):
        assert "would be replaced, and is read" in refusal(capsys, "convert", source, dst, "--overwrite", option, named)
    assert files(dst) == before


def test_a_reference_that_reclaiming_takes(source, tmp_path, bind, capsys):
    other = bind(source, tmp_path / "mount")
    said = refusal(capsys, "convert", source, tmp_path / "dst", "--reclaim-source", "--yes", "--compare", other)
    assert "will be gone" in said


REPORTS = [
    "in/src/config.json", "in/src/model-00001-of-00002.safetensors", "in/src/sub/vocab.txt", "link.html", "dst", "dst/model.safetensors",
    "dst/model.safetensors/x.html", "dst/config.json", "dst/.streamconv/log.jsonl",
    "dst/SHA256SUMS", "dst/sub/vocab.txt", "mine.txt", "fifo",
    "dst/model.safetensors.partial", "dst/page.html",
]  # fmt: skip


@pytest.mark.parametrize("option", ["--report", "--out"])
@pytest.mark.parametrize("place", REPORTS)
def test_a_report_is_no_file_of_the_conversion_and_nobody_elses(source, tmp_path, capsys, option, place):
    (tmp_path / "link.html").symlink_to(source / "config.json")
    (tmp_path / "mine.txt").write_text("mine")
    (source / "page.html").write_text("<!doctype html>")
    os.mkfifo(tmp_path / "fifo")
    before = files(tmp_path)
    command = "convert" if option == "--report" else "plan"
    assert option in refusal(capsys, command, source, tmp_path / "dst", option, tmp_path / place)
    assert files(tmp_path) == before


def test_a_report_beside_an_output_of_one_file(source, tmp_path, capsys):
    refusal(capsys, "convert", source, tmp_path / "out.safetensors", "--report", tmp_path / "out.safetensors")
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        refusal(capsys, "verify", source, source, "--report", source / name)
    assert not (tmp_path / "out.safetensors").exists()
    assert run("convert", source, tmp_path / "out.safetensors", "--report", tmp_path / "out.html", "--quiet") == 0
    for _ in range(2):  # over an earlier one
        assert run("verify", source, tmp_path / "out.safetensors", "--report", tmp_path / "out.html", "--quiet") == 0
        assert run("plan", source, tmp_path / "other", "--out", tmp_path / "plan.json", "--quiet") == 0


def test_other_files_of_these_names_stay(source, tmp_path):
    dst = old_output(tmp_path / "dst")
    kept = {"notes.partial": "mine", "latest": "checkpoint-7", "config.txt.partial": "mine"}
    for name, text in kept.items():
        (dst / name).write_text(text)
    (dst / "global_step7").mkdir()
    (dst / "global_step7" / "mp_rank_00_model_states.pt").write_text("DeepSpeed's")
    (dst / "elsewhere").mkdir()
    (dst / "elsewhere" / "mp_rank_00_model_states.pt").write_text("mine")
    (dst / "1").symlink_to("elsewhere")
    (dst / "model.safetensors.partial").write_text("ours")
    assert run("convert", source, dst, "--overwrite", "--quiet") == 0
    assert {name: (dst / name).read_text() for name in kept} == kept
    assert (dst / "elsewhere" / "mp_rank_00_model_states.pt").read_text() == "mine"
    assert not (dst / "model.safetensors.partial").exists()


@pytest.mark.parametrize("what", ["link", "dead link", "file"])
@pytest.mark.parametrize("options", [["--overwrite"], ["--overwrite", "--checksum"], ["--reclaim-source", "--yes", "--overwrite"]])
def test_no_output_goes_through_a_link(source, tmp_path, capsys, what, options):
    dst, elsewhere = old_output(tmp_path / "dst"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "vocab.txt").write_text("mine")
    if what == "file":
        (dst / "sub").write_text("mine")
    else:
        (dst / "sub").symlink_to(elsewhere if what == "link" else tmp_path / "nowhere")
    before = files(tmp_path)
    plan = tmp_path / "plan.json"
    assert f"{dst / 'sub'}: is {'no folder' if what == 'file' else 'a link'}" in refusal(capsys, "convert", source, dst, *options)
    assert files(tmp_path) == before
    assert run("plan", source, tmp_path / "other", "--out", plan, "--quiet") == 0
    plan.write_text(plan.read_text().replace(str(tmp_path / "other"), str(dst)))
    for more in (["--overwrite"], ["--overwrite", "--part", "1/2"]):
        refusal(capsys, "run", plan, *more)
    plan.unlink()
    assert files(tmp_path) == before


def test_links_in_the_place_of_files_are_replaced_themselves(source, tmp_path):
    dst = old_output(tmp_path / "dst")
    (dst / "sub").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    for name in ("sub/vocab.txt", "sub/vocab.txt.partial", "config.json", "model-00001-of-00002.safetensors"):
        (dst / name).unlink(missing_ok=True)
        (dst / name).symlink_to(tmp_path / "mine.txt")
    assert run("convert", source, dst, "--overwrite", "--checksum", "--quiet") == 0
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert not any(path.is_symlink() for path in dst.rglob("*"))


@pytest.mark.parametrize("options", [[], ["--overwrite"], ["--resume"], ["--overwrite", "--resume"]])
def test_a_link_in_the_place_of_the_state_is_not_followed(source, tmp_path, capsys, options):
    """What is there is neither written nor removed, whatever it is called."""
    dst = old_output(tmp_path / "dst")
    (tmp_path / "mine").mkdir()
    for name in ("log.jsonl.new", "plan.json", "notes.txt"):
        (tmp_path / "mine" / name).write_text("mine")
    (dst / ".streamconv").symlink_to(tmp_path / "mine")
    assert run("plan", source, tmp_path / "other", "--out", tmp_path / "plan.json", "--quiet") == 0
    (tmp_path / "plan.json").write_text((tmp_path / "plan.json").read_text().replace(str(tmp_path / "other"), str(dst)))
    before = files(tmp_path)
    refusal(capsys, "convert", source, dst, *options)
    if options != ["--overwrite", "--resume"]:
        refusal(capsys, "run", tmp_path / "plan.json", "--part", "1/2", *options)
    assert files(tmp_path) == before


def test_what_is_not_of_ours_beside_the_state_stays(source, tmp_path):
    (tmp_path / "dst" / ".streamconv").mkdir(parents=True)
    (tmp_path / "dst" / ".streamconv" / "notes.txt").write_text("mine")
    assert run("convert", source, tmp_path / "dst", "--quiet") == 0
    assert [path.name for path in (tmp_path / "dst" / ".streamconv").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("how", ["single", "part", "sidecar"])
def test_names_that_are_too_long_once_they_are_not_complete(source, tmp_path, capsys, how):
    name = "n" * (LONGEST - 7 - 12)  # and its suffix
    dst = tmp_path / ("dst" if how in {"sidecar", "part"} else f"{name}.safetensors")
    if how in {"sidecar", "part"}:
        (source / ("n" * (LONGEST - (7 if how == "sidecar" else 20)))).write_text("words")
    given = ["convert", source, dst]
    if how == "part":
        assert run("plan", source, dst, "--out", tmp_path / "plan.json", "--quiet") == 0
        given = ["run", tmp_path / "plan.json", "--part", "1/2"]
    assert re.search("has 256 bytes|File name too long", refusal(capsys, *given))
    assert not dst.exists()
