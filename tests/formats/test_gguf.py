"""GGUF, as the library that defines it writes and decodes it: one file and parts, every type of blocks, and what is damaged."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import ROOMY, read, refusal, run
from gguf_files import write_gguf

import streamconv
from streamconv.dtypes import BLOCK_TYPES, DTYPES


@pytest.fixture
def small(tmp_path: Path) -> Path:
    blocks = np.random.default_rng(0).integers(0, 256, (8, 2, 34), np.uint8)
    blocks[..., :2] = np.array([0.25], np.float16).view(np.uint8)
    tensors = {
        "token_embd.weight": ("q8_0", (8, 64), blocks.tobytes()),
        "output_norm.weight": ("float32", (64,), np.arange(64, dtype=np.float32).tobytes()),
    }
    return write_gguf(tmp_path / "model.gguf", tensors, {"tokenizer.ggml.tokens": ["a"] * 100})


def test_it_is_read_and_its_blocks_become_numbers(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = streamconv.open(small)
    assert {name: (entry.dtype, entry.shape) for name, entry in checkpoint.items()} == {
        "token_embd.weight": ("q8_0", (8, 64)),
        "output_norm.weight": ("float32", (64,)),
    }
    assert run("inspect", small) == 0
    assert "q8_0" in capsys.readouterr().out
    for command in (["convert", small, tmp_path / "out"], ["convert", small, tmp_path / "out", "--dtype", "float16"]):
        assert "q8_0" in refusal(capsys, *command)
    assert not (tmp_path / "out").exists()
    streamconv.convert(small, tmp_path / "out", dequantize=True, verify=True, max_memory=ROOMY)
    made = read(tmp_path / "out")
    raw = np.frombuffer(small.read_bytes()[-(8 * 2 * 34 + 256) :][: 8 * 2 * 34], np.int8).reshape(8, 2, 34)
    expected = torch.from_numpy(raw[..., 2:].reshape(8, 64).astype(np.float32) * 0.25).bfloat16()
    assert torch.equal(made["token_embd.weight"], expected)
    assert torch.equal(made["output_norm.weight"], torch.arange(64.0))


@pytest.mark.parametrize("part", [1, 2])
def test_any_part_stands_for_all(tmp_path: Path, part: int, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        tensors = {f"blk.{number}.weight": ("float32", (2, 4), np.full(8, number, np.float32).tobytes())}
        write_gguf(tmp_path / f"m-0000{number}-of-00002.gguf", tensors)
    path = tmp_path / f"m-0000{part}-of-00002.gguf"
    assert [*streamconv.open(path)] == [*streamconv.open(tmp_path)] == ["blk.1.weight", "blk.2.weight"]
    (tmp_path / f"m-0000{3 - part}-of-00002.gguf").unlink()
    assert f"m-0000{3 - part}-of-00002.gguf" in refusal(capsys, "inspect", path)


DAMAGE = {
    "a byte order": (
        lambda data: data[:4] + struct.pack(">I", 3) + data[8:],
        "a big-endian GGUF file, and only little-endian ones are read",
    ),
    "a version": (lambda data: data[:4] + struct.pack("<I", 9) + data[8:], "version 9"),
    "ends early": (lambda data: data[:-40], "is not in its"),
    "many tensors": (lambda data: data[:8] + struct.pack("<Q", 1 << 40) + data[16:], "at most"),
    "a long text": (lambda data: data[:24] + struct.pack("<Q", 1 << 60) + data[32:], "are to follow"),
    "a type": (lambda data: data.replace(struct.pack("<IQ", 8, 0), struct.pack("<IQ", 99, 0), 1), "type 99"),
    "half a block": (lambda data: data.replace(struct.pack("<QQ", 64, 8), struct.pack("<QQ", 63, 8), 1), "do not fill its blocks"),
    "nothing behind its name": (lambda data: data[:4], "are to follow"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_damaged_is_refused(small: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, told = DAMAGE[kind]
    small.write_bytes(change(small.read_bytes()))
    assert told in refusal(capsys, "inspect", small)


@pytest.mark.oracle
def test_every_type_of_blocks_is_as_the_library_has_it(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    rng, expected = np.random.default_rng(0), {}
    for name, dtype in BLOCK_TYPES.items():
        kind = gguf.GGMLQuantizationType[name.upper().removesuffix("_GGUF")]
        blocks = rng.integers(0, 256, (24, 3 * dtype.nbytes), np.uint8)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=kind)
        with np.errstate(all="ignore"):
            expected[f"{name}.weight"] = torch.from_numpy(gguf.dequantize(blocks, kind)).reshape(24, -1)
    writer.add_tensor("plain.weight", np.ones((3, 5), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    streamconv.convert(tmp_path / "x.gguf", tmp_path / "out", dequantize=True, dtype="float32", keep_dtype=["plain.*"], max_memory=ROOMY)
    made = read(tmp_path / "out")
    assert made.pop("plain.weight").dtype == torch.float16
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ((made[name] == tensor) | (made[name].isnan() & tensor.isnan())).all(), name


def test_block_types_are_none_of_those_that_others_have() -> None:
    assert not DTYPES.keys() & BLOCK_TYPES.keys()
