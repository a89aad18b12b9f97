"""``--format dcp``: what torch loads of it is what was stored, and so is what is read back."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_files import ROOMY, assert_same, read, read_any, refusal, run, write
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import streamconv
from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.formats.zips import FileRange
from streamconv.storage.local import LocalFile
from streamconv.trainers.dcp_files import lay_out

TENSORS = {
    "model.embed.weight": torch.randn(5, 3).bfloat16(),
    "model.scalar": torch.tensor(2.5, dtype=torch.float64),
    "model.none": torch.empty(0, 4),
    "model.codes": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "model.small": torch.arange(7).to(torch.uint16),
    "model.is": torch.tensor([True, False]),
    "lm_head.weight": torch.randn(300, 7),
}


def by_torch(folder: Path, into: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(folder, into)
    return torch.load(into, weights_only=True)


@pytest.mark.parametrize("options", [(), ("--max-shard-size", "1kB")], ids=str)
def test_torch_reads_it(options: tuple[str, ...], tmp_path: Path) -> None:
    src = write(tmp_path / "src", TENSORS, config={"model_type": "toy"})
    assert run("convert", src, tmp_path / "out", "--format", "dcp", *options, "--verify", "--quiet", "--max-memory", ROOMY) == 0
    assert_same(by_torch(tmp_path / "out", tmp_path / "by_torch.pt"), TENSORS)
    assert_same(read_any(tmp_path / "out"), TENSORS)
    assert (tmp_path / "out" / "config.json").exists()
    assert run("convert", tmp_path / "out", tmp_path / "back", "--quiet", "--max-memory", ROOMY) == 0
    assert_same(read(tmp_path / "back"), TENSORS)
    state = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=tmp_path / "out")
    assert_same(state, TENSORS)


def test_a_damaged_byte_is_told(tmp_path: Path) -> None:
    src = write(tmp_path / "src", {"a": torch.arange(100.0)})
    assert run("convert", src, tmp_path / "out", "--format", "dcp", "--quiet", "--max-memory", ROOMY) == 0
    path = tmp_path / "out" / "__0_0.distcp"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.getinfo("archive/data/0").file_size == 400


def test_one_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = write(tmp_path / "src", {"a": torch.arange(100.0)})
    assert "give a directory" in refusal(capsys, "convert", src, tmp_path / "out.distcp")


def test_large_tensors_have_wide_sizes(tmp_path: Path) -> None:
    """A zip of more than 4 GB, of which only the headers are written."""
    specs = {"a": TensorSpec(DTYPES["float32"], (1 << 10, 1 << 21)), "b": TensorSpec(DTYPES["uint8"], (3,))}
    layouts = lay_out(specs)
    for layout in layouts:
        with (tmp_path / layout.path).open("wb") as file:
            file.truncate(layout.size)
            for offset, data in layout.literals:
                file.seek(offset)
                file.write(data)
    checkpoint = streamconv.open(tmp_path)
    assert {name: entry.spec for name, entry in checkpoint.items()} == specs
    assert [node.extents[0].offset for node in checkpoint.contents.entries.values()] == [*layouts[0].slots.values()]
    first = layouts[0].slots["b"] // 64 * 64
    with LocalFile(tmp_path / layouts[0].path) as whole:
        ends = [at for at in range(first - 2000, first) if whole.pread(4, at) == b"PK\5\6"]
        with zipfile.ZipFile(FileRange(whole, 0, ends[-1] + 22)) as archive:
            assert archive.getinfo("archive/data/0").file_size == 1 << 33
