"""Open checkpoints: a mapping of tensors, their data in whole or in rows, config and sidecar files."""

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import assert_same, numbered, random_tensor, raw, read, refusal, run, write
from safetensors.torch import save_file
from servers import silent_port

import streamconv
from streamconv.errors import FormatError, StreamconvError, UsageError
from streamconv.storage import retries
from streamconv.storage.locations import locate

NAMES = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "uint16",
    "complex64",
]


@pytest.fixture
def opened(tmp_path):
    """A checkpoint of a few tensors, and these tensors."""
    tensors = numbered({"b.weight": (6, 4), "a.bias": (5,), "scalar": (), "empty": (0, 3)}) | {
        "half": random_tensor(3, 2, dtype=torch.bfloat16)
    }
    return streamconv.open(write(tmp_path / "checkpoint", tensors, shards=2, config={"model_type": "x"})), tensors


def test_it_is_a_mapping(opened):
    checkpoint, tensors = opened
    assert isinstance(checkpoint, Mapping)
    assert len(checkpoint) == 5
    assert set(checkpoint) == set(checkpoint.keys()) == set(tensors)
    assert "scalar" in checkpoint
    assert "none" not in checkpoint
    assert checkpoint.get("none") is None
    with pytest.raises(KeyError, match="none"):
        checkpoint["none"]
    assert [entry.name for entry in checkpoint.values()] == list(checkpoint)
    entry = checkpoint["b.weight"]
    assert (entry.name, entry.dtype, entry.shape, entry.nbytes) == ("b.weight", "float32", (6, 4), 96)
    assert "safetensors, 5 tensors" in repr(checkpoint)
    assert checkpoint.format == "safetensors"
    assert checkpoint.metadata == {"format": "pt"}
    assert checkpoint.config == {"model_type": "x"}
    assert checkpoint.sidecars == ["config.json"]
    assert not isinstance(entry, torch.Tensor)


@pytest.mark.parametrize("spelling", [str, Path, lambda path: Path(path).as_uri(), locate])
def test_paths_of_any_kind(spelling, opened):
    assert len(streamconv.open(spelling(opened[0].path))) == 5


def test_one_file(opened, tmp_path):
    checkpoint, tensors = opened
    file = next(path for path in checkpoint.contents.files if path.name.endswith("1-of-00002.safetensors"))
    one = streamconv.open(file)
    assert 0 < len(one) < 5
    assert one.sidecars == []
    assert one.config == {"model_type": "x"}
    for name, entry in one.items():
        assert raw(entry.torch()) == raw(tensors[name])


@pytest.mark.parametrize("name", NAMES)
def test_data_of_every_dtype(name, tmp_path):
    dtype = getattr(torch, name)
    tensor = (
        torch.arange(24 * dtype.itemsize, dtype=torch.uint8).view(dtype).reshape(6, 4)
        if name != "bool"
        else torch.arange(24).reshape(6, 4) % 3 == 0
    )
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    entry = streamconv.open(tmp_path / "x.safetensors")["x"]
    found = entry.torch()
    assert (found.dtype, found.shape, raw(found)) == (dtype, tensor.shape, raw(tensor))
    found = entry.numpy()
    assert (found.dtype.name, found.shape, found.tobytes()) == (name, (6, 4), raw(tensor))
    assert entry.numpy(rows=slice(1, 3)).tobytes() == entry.torch(rows=slice(1, 3)).view(torch.uint8).numpy().tobytes() == raw(tensor[1:3])


ROWS = [(None, None), (0, 2), (2, 2), (2, 1), (4, 99), (-2, None), (None, -5), (99, 100), (-99, 1)]


@pytest.mark.parametrize("rows", [slice(*ends) for ends in ROWS], ids=str)
def test_rows(rows, opened):
    checkpoint, tensors = opened
    for name in ("b.weight", "half", "a.bias", "empty"):
        found = checkpoint[name].torch(rows=rows)
        assert found.shape == tensors[name][rows].shape
        assert raw(found) == raw(tensors[name][rows])
        assert checkpoint[name].numpy(rows=rows).shape == tuple(tensors[name][rows].shape)


def test_rows_that_there_are_not(opened):
    checkpoint, _ = opened
    with pytest.raises(UsageError, match=r"scalar: 1 indices, and its shape \[\] has 0 axes"):
        checkpoint["scalar"].torch(rows=slice(0, 1))
    assert checkpoint["scalar"].torch().shape == ()
    assert checkpoint["scalar"].numpy().shape == ()


def test_the_data_is_its_own(opened):
    checkpoint, tensors = opened
    found = checkpoint["b.weight"].torch()
    found.zero_()
    checkpoint["b.weight"].numpy()[:] = 0
    assert raw(checkpoint["b.weight"].torch()) == raw(tensors["b.weight"])


def test_packed_types_have_no_array(tmp_path):
    save_file({"x": torch.zeros(4, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, tmp_path / "x.safetensors")
    entry = streamconv.open(tmp_path / "x.safetensors")["x"]
    assert (entry.dtype, entry.shape, entry.nbytes) == ("float4_e2m1fn", (4, 8), 16)
    with pytest.raises(UsageError, match="torch has no type"):
        entry.torch()
    with pytest.raises(UsageError, match="numpy has no packed"):
        entry.numpy()


def test_without_ml_dtypes(opened, monkeypatch):
    checkpoint, _ = opened
    real = np.dtype
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)

    def plain(name):
        if name == "bfloat16":
            raise TypeError(name)
        return real(name)

    monkeypatch.setattr(np, "dtype", plain)
    with pytest.raises(UsageError, match=r"install ml_dtypes, or use \.torch\(\)"):
        checkpoint["half"].numpy()
    assert checkpoint["b.weight"].numpy().shape == (6, 4)


def test_reads_come_in_pieces(opened, monkeypatch):
    """One call of the kernel reads 2 GiB at most."""
    import io

    checkpoint, tensors = opened
    real = io.FileIO.readinto

    class Slow(io.FileIO):
        def readinto(self, buffer):
            return real(self, memoryview(buffer)[:7])

    monkeypatch.setattr("streamconv.checkpoint.entries.FileIO", Slow)
    assert raw(checkpoint["b.weight"].torch()) == raw(tensors["b.weight"])


def test_a_file_that_became_shorter(opened):
    checkpoint, _ = opened
    for file in checkpoint.contents.files:
        os.truncate(str(file), file.size - 4)
    with pytest.raises(FormatError, match="it changed since it was opened"):
        [entry.torch() for entry in checkpoint.values()]


# Config ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "[]", "3", "{", b"\xff\xfe{}", "[" * 100_000])
def test_a_config_that_is_none(text, opened):
    checkpoint, _ = opened
    path = Path(checkpoint.path, "config.json")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FormatError, match="mend it") as caught:
        _ = streamconv.open(checkpoint.path).config
    assert str(path) in str(caught.value)


def test_no_config_and_a_huge_one(opened):
    checkpoint, _ = opened
    path = Path(checkpoint.path, "config.json")
    with path.open("wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(FormatError, match="larger than 8 MiB, which a config never is"):
        _ = checkpoint.config
    path.unlink()
    assert streamconv.open(checkpoint.path).config == {}


# Sidecars ----------------------------------------------------------------------------------------------------------


def test_what_comes_along(tmp_path):
    kept = [
        "config.json", "generation_config.json", "tokenizer.json", "README.md", "merges.txt", "spiece.model", "x.bin.txt",
        "model.safetensors.md", "code/modeling_x.py", "assets/deep/er/x.png", "1_Pooling/config.json", "voices/readme.txt",
    ]  # fmt: skip
    left = [
        "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json",
        "other.safetensors", "other.safetensors.index.json", "x.gguf", "model.onnx", "tf_model.h5", "flax_model.msgpack", "rust_model.ot",
        "consolidated.00.pth", "consolidated.bin", "adapter_model.bin", "a.ckpt", "a.pt", "model.safetensors.partial",
        ".streamconv.json", ".model.safetensors.streamconv.json", "onnx/model.onnx", "original/consolidated.00.pth",
        "fp16/model.safetensors", "2_Dense/config.json", "2_Dense/pytorch_model.bin", "checkpoint-500/config.json",
        "checkpoint-500/optimizer.pt", "global_step9/zero_pp_rank_0_mp_rank_00_optim_states.pt", "training_args.bin", "optimizer.pt",
        "scheduler.pt", "rng_state_0.pth", "random_states_0.pkl", "trainer_state.json", "runs/Jan01/events.out.tfevents.1.host",
        "wandb/run/x.json", "train.log", "onnx/config.json", "onnx/decoder_model.onnx_data", "model.onnx_data",
        "openvino/openvino_model.xml", "openvino_model.bin", "openvino_tokenizer.xml", "coreml/x.txt", "X.mlpackage/Data/weight.bin",
        "x.mlmodelc/weights/weight.bin",
        "x.nemo", "saved_model/saved_model.pb", "original/params.json", "voices/af.pt", "lora/adapter_config.json",
        "lora/adapter_model.safetensors", ".gitattributes", ".gitignore", ".DS_Store",
        ".git/config", ".cache/huggingface/x", "__pycache__/a.pyc", "code/__pycache__/b.pyc", "code/.hidden/c",
    ]  # fmt: skip
    source = write(tmp_path / "source", {"x": torch.ones(2), "y": torch.ones(1)}, shards=2)
    for name in (*kept, *left):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}" if name.endswith("config.json") else name)
    assert streamconv.open(source).sidecars == sorted(kept)
    assert run("convert", source, tmp_path / "out", "--quiet") == 0
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {*kept, "model.safetensors"}
    for name in kept:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_a_link_to_nowhere_is_refused(tmp_path):
    source = write(tmp_path / "source", {"x": torch.ones(2)})
    (source / "tokenizer.json").symlink_to("blobs/gone")
    with pytest.raises(FormatError, match=r"tokenizer\.json: a link to a file that is not there"):
        _ = streamconv.open(source).sidecars


def snapshot(root, files):
    """A folder of the Hub's cache: links, each to a blob that is named by its digest."""
    folder = root / "models--o--n" / "snapshots" / "abc"
    for name, content in files.items():
        blob = root / "models--o--n" / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return folder


def test_a_snapshot_of_links(tmp_path):
    tensors = numbered({f"x{k}": (3, 4) for k in range(4)})
    plain = write(tmp_path / "plain", tensors, shards=2, config={"dtype": "float32"})
    (plain / "1_Pooling").mkdir()
    (plain / "1_Pooling" / "config.json").write_text("{}")
    files = {path.relative_to(plain).as_posix(): path.read_bytes() for path in plain.rglob("*") if path.is_file()}
    folder = snapshot(tmp_path / "hub", files)
    checkpoint = streamconv.open(folder)
    assert checkpoint.sidecars == ["1_Pooling/config.json", "config.json"]
    assert checkpoint.config == {"dtype": "float32"}
    for name, tensor in tensors.items():
        assert raw(checkpoint[name].torch()) == raw(tensor)
    assert run("convert", folder, tmp_path / "out", "--quiet", "--dtype", "bf16") == 0
    assert_same(read(tmp_path / "out"), {name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"dtype": "bfloat16"}
    for name, content in files.items():
        assert (folder / name).is_symlink()
        assert (folder / name).read_bytes() == content


def test_a_snapshot_as_the_target_keeps_its_blobs(tmp_path):
    """Writing over a snapshot replaces links and leaves what they point at alone."""
    source = write(tmp_path / "source", numbered({"x": (3, 4)}))
    old = {"model.safetensors": b"old weights", "config.json": b"{}"}
    folder = snapshot(tmp_path / "hub", old)
    (source / "config.json").write_text('{"new": 1}')
    assert run("convert", source, folder, "--quiet", "--overwrite") == 0
    assert_same(read(folder), read(source))
    blobs = {path.read_bytes() for path in (tmp_path / "hub").rglob("blobs/*")}
    assert blobs == set(old.values())


@pytest.mark.parametrize("path", ["none", "none/x.safetensors", "http://127.0.0.1:{port}/x"])
def test_what_is_not_there(path, tmp_path, monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)
    with silent_port() as port, pytest.raises(StreamconvError):
        streamconv.open(path.format(port=port) if "://" in path else tmp_path / path)


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    """As root reads everything, the system call is what refuses."""
    source = write(tmp_path / "source", numbered({"x": (3, 4)}))
    listdir = os.listdir

    def refuse(path=".") -> list[str]:
        if Path(path) == source:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    assert f"{source}: cannot be read: Permission denied; make it readable" in refusal(capsys, "convert", source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
