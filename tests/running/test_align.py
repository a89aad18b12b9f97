"""Block-aligned output, and file systems that share blocks between source and target."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamconv.cli.command import main
from streamconv.engine.direct import shares_extents
from streamconv.formats import safetensors
from streamconv.storage.locations import locate

BLOCK = 4096
FILE_SYSTEMS = {"xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q"]}


def write(folder: Path, count: int = 24, elements: int = 1 << 19) -> dict[str, torch.Tensor]:
    folder.mkdir(parents=True)
    tensors = {f"layers.{k}.weight": torch.randn(elements // 1024, 1024) for k in range(count)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def starts(folder: Path) -> set[int]:
    tables = (safetensors.read_file(locate(path))[0] for path in folder.glob("*.safetensors"))
    return {min(source.extents[0].offset for source in table.values()) for table in tables}


def test_data_starts_at_a_block_and_files_stay_valid(tmp_path: Path) -> None:
    tensors = write(tmp_path / "src", 4, 4096)
    assert main(["convert", str(tmp_path / "src"), str(tmp_path / "dst"), "--align", "--max-shard-size", "40KB", "-q"]) == 0
    assert {start % BLOCK for start in starts(tmp_path / "dst")} == {0}
    found = {name: t for path in (tmp_path / "dst").glob("*.safetensors") for name, t in load_file(path).items()}
    assert all(torch.equal(found[name], t) for name, t in tensors.items())
    assert len(found) == len(tensors)


def test_torch_files_keep_their_own_alignment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "src", 1, 4096)
    assert main(["convert", str(tmp_path / "src"), str(tmp_path / "dst"), "--align", "--format", "torch"]) == 2
    assert "--align" in capsys.readouterr().err
    assert not (tmp_path / "dst").exists()


@pytest.fixture(params=sorted(FILE_SYSTEMS))
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A mounted file system that shares blocks."""
    make = FILE_SYSTEMS[request.param]
    if shutil.which(make[0]) is None:
        pytest.skip(f"{make[0]} is not installed")
    if os.geteuid():
        pytest.skip("mounting takes root")
    image, place = tmp_path / "image", tmp_path / "mounted"
    place.mkdir()
    image.touch()
    os.truncate(image, 400 << 20)
    if subprocess.run([*make, image], capture_output=True, check=False).returncode:
        pytest.skip(f"{make[0]} fails here")
    if subprocess.run(["mount", "-o", "loop", image, place], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_blocks_are_shared_where_data_is_aligned(mounted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shares_extents(mounted)
    tensors = write(mounted / "plain")
    assert main(["convert", str(mounted / "plain"), str(mounted / "src"), "--align", "-q"]) == 0
    shutil.rmtree(mounted / "plain")
    os.sync()
    assert main(["plan", str(mounted / "src"), str(mounted / "dst"), "--max-shard-size", "10MB"]) == 0
    assert "--align" in capsys.readouterr().out
    before = shutil.disk_usage(mounted).used
    assert main(["convert", str(mounted / "src"), str(mounted / "dst"), "--align", "--max-shard-size", "10MB", "-q", "--verify"]) == 0
    os.sync()
    nbytes = sum(t.nbytes for t in tensors.values())
    assert shutil.disk_usage(mounted).used - before < nbytes // 10
