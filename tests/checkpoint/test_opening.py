"""What a path holds, told from first bytes, indexes and folders as people have them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import assert_same, numbered, read, refusal, run, write
from safetensors.torch import save_file

import streamconv
from streamconv.errors import FormatError, StreamconvError

CONFIG = {"model_type": "any", "architectures": ["Any"]}
TENSORS = numbered({"a.weight": (3, 4), "b.weight": (2, 3)})


def assert_opens(path: Path) -> None:
    """All of `TENSORS`, and nothing else."""
    assert_same({name: entry.torch() for name, entry in streamconv.open(path).items()}, TENSORS)


# The first bytes decide --------------------------------------------------------------------------------------------

TORCH_NAMES = ["model_best.pth.tar", "net.th", "net.pkl", "net.chkpt", "net.model", "NET.PTH", "blob", "x.ckpt", "x.safetensors", "a.data"]


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_what_torch_wrote_under_any_name(tmp_path, name):
    torch.save({"state_dict": TENSORS, "epoch": 1}, tmp_path / name)
    assert_opens(tmp_path / name)
    torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=False)
    assert_opens(tmp_path / name)


@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "weights.ckpt", "weights", "W.SAFETENSORS", "x.tar"])
def test_safetensors_under_any_name(tmp_path, name):
    save_file(TENSORS, tmp_path / name)
    assert_opens(tmp_path / name)


@pytest.mark.parametrize("name", ["model_best.pth.tar", "NET.PTH", "weights", "pytorch_model.bin", "model.safetensors", "x.ckpt"])
def test_one_file_of_any_name_in_a_folder(tmp_path, name):
    (tmp_path / "README.md").write_text("A model.")
    (tmp_path / "LICENSE").write_text("Do what you like with it.")
    for save in (torch.save, save_file):
        save(TENSORS, tmp_path / name)
        assert_opens(tmp_path)
    (tmp_path / name).rename(tmp_path / "other.th")
    torch.save(TENSORS, tmp_path / "another.th")
    with pytest.raises(FormatError, match=r"2 checkpoints in one folder.*another\.th, other\.th"):
        streamconv.open(tmp_path)


def zipped(path: Path, name: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "{}")


def archived(path: Path, name: str) -> None:
    path.with_suffix(".txt").write_text("a")
    with tarfile.open(path, "w") as archive:
        archive.add(path.with_suffix(".txt"), name)


FOREIGN = {  # name of the file, its content, what it is called
    "keras": ("m.h5", b"\x89HDF\r\n\x1a\n" + bytes(99), "this is HDF5 (Keras); streamconv reads"),
    "keras under torch's name": ("m.pt", b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5 (Keras)"),
    "keras 3": ("m.keras", lambda path: zipped(path, "metadata.json"), "Keras 3"),
    "npy": ("m.npy", lambda path: np.save(path, np.ones(3)), "numpy array"),
    "npz": ("m.npz", lambda path: np.savez(path, a=np.ones(3)), "numpy arrays"),
    "onnx": ("m.onnx", b"\x08\x07\x12\x07pytorch\x1a\x051.9.0" + bytes(99), "ONNX"),
    "saved model": ("saved_model.pb", b"\x08\x01\x12\x80\x01\x0a" + bytes(99), "TensorFlow SavedModel"),
    "tensorflow index": ("m.ckpt.index", b"\0\0\x09" + bytes(range(200)), "TensorFlow checkpoint"),
    "tensorflow data": ("m.ckpt.data-00000-of-00001", bytes(range(256)), 'load_checkpoint("'),
    "tflite": ("m.tflite", b"\x1c\0\0\0TFL3" + bytes(99), "TensorFlow Lite"),
    "coreml": ("m.mlmodel", b"\x08\x05\x12\x80\x01\x0a" + bytes(99), "CoreML"),
    "flax": ("m.msgpack", b"\x81\xa6params\x81\xa1w\xc7\x10\x01" + bytes(30), "MessagePack (Flax)"),
    "pickle": ("m.pkl", pickle.dumps({"w": np.ones(2)}), "a pickle that torch.save did not write"),
    "pickle under torch's name": ("m.pt", pickle.dumps({"w": 1}, 2), "a pickle that torch.save did not write"),
    "nemo": ("m.nemo", lambda path: archived(path, "./model_config.yaml"), "NeMo"),
    "tar": ("m.tar", lambda path: archived(path, "model/weights"), "tar archive"),
    "zip": ("m.zip", lambda path: zipped(path, "model/config.json"), "zip archive"),
    "gzip": ("m.pt.gz", b"\x1f\x8b\x08\0" + bytes(99), "compressed with gzip"),
    "7z": ("m.7z", b"7z\xbc\xaf\x27\x1c" + bytes(99), "7z archive"),
    "parquet": ("m.parquet", b"PAR1" + bytes(99), "Parquet"),
    "html": ("m.safetensors", b"<!DOCTYPE html><html><body>Log in</body></html>", "web page"),
    "html after a line": ("m.bin", b"\n <html lang=en><head><title>x</title>", "web page"),
    "json": ("m.pt", b'{"error": "Invalid credentials"}', "JSON text"),
    "xml": ("m.safetensors", b"<Error><Code>AccessDenied</Code></Error>", "XML"),
    "text": ("m.bin", b"Access to this model is restricted.\n", "plain text"),
    "lfs pointer": ("m.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    "empty": ("m.safetensors", b"", "an empty file, of 0 bytes"),
    "zeros": ("m.safetensors", bytes(5000), "5000 bytes that are zero"),
    "noise": ("m.bin", bytes(range(1, 256)) * 4, "neither a zip nor torch's older format"),
    "noise without a suffix": ("m", bytes(range(1, 256)) * 4, "neither its first bytes nor its name say what it is"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_other_formats_are_named_and_not_called_damaged(tmp_path, case, capsys):
    name, content, part = FOREIGN[case]
    path = tmp_path / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    commands = [["convert", path, tmp_path / "dst"], ["inspect", path], ["verify", path, path]]
    for command in [*commands, ["doctor", path]] if case != "noise" else commands:
        message = refusal(capsys, *command)
        assert part in message
        assert message.startswith(f"{path}: ")
        assert "the file is damaged" not in message
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("name", ["OpenVINO's", "tf_model.h5"])
def test_a_folder_of_another_format_is_named_for_it(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "checkpoint").write_text("model_checkpoint_path: m.ckpt")
    part = {"tf_model.h5": "HDF5"}.get(name, "OpenVINO")
    if part == "OpenVINO":
        (tmp_path / "m.xml").write_text("<net/>")
        name = "m.bin"
    (tmp_path / name).write_bytes({"HDF5": b"\x89HDF\r\n\x1a\n"}.get(part, b"\1\2\3") * 30)
    with pytest.raises(FormatError, match=part):
        streamconv.open(tmp_path)


def command_of(message: str) -> str:
    """The Python code that a message says to run."""
    return message.partition("python -c '")[2].rpartition("' makes it readable")[0]


@pytest.mark.parametrize("name", ["a.npz", "NEW.npy", "a.pkl", "OLD.pt"])
def test_the_command_in_the_message_makes_it_readable(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"w": np.arange(6.0).reshape(2, 3).T, "n": np.float32(3)}
    {".npz": lambda: np.savez(name, **values), ".npy": lambda: np.save(name, values["w"])}.get(
        Path(name).suffix, lambda: Path(name).write_bytes(pickle.dumps({"model": values, "by": "me"}))
    )()
    with pytest.raises(FormatError) as caught:
        streamconv.open(name)
    subprocess.run([sys.executable, "-c", command_of(str(caught.value))], check=True, timeout=600)
    (made,) = [path for path in tmp_path.iterdir() if path.name != name]
    found = streamconv.open(made)
    wanted = {"array": values["w"]} if name.endswith("npy") else values
    assert {key: entry.numpy().tolist() for key, entry in found.items()} == {key: value.tolist() for key, value in wanted.items()}


def test_what_is_damaged_is_called_so(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    torch.save(TENSORS, tmp_path / "x.pt")
    for name, ends in {"x.safetensors": (20, 100, 150), "x.pt": (60, 1000)}.items():
        whole = (tmp_path / name).read_bytes()
        for end in ends:
            (tmp_path / "cut").write_bytes(whole[:end])
            with pytest.raises(FormatError, match="the file is damaged: download or write it again"):
                streamconv.open(tmp_path / "cut")


# Indexes -----------------------------------------------------------------------------------------------------------


def test_an_index_as_source_is_its_checkpoint(tmp_path, capsys):
    source = write(tmp_path / "source", TENSORS, shards=2, config=CONFIG)
    for number in (1, 2):
        shutil.copy(source / f"model-0000{number}-of-00002.safetensors", source / f"model.fp16-0000{number}-of-00002.safetensors")
    other = json.loads((source / "model.safetensors.index.json").read_text())
    other["weight_map"] = {name: file.replace("model-", "model.fp16-") for name, file in other["weight_map"].items()}
    (source / "model.safetensors.index.fp16.json").write_text(json.dumps(other))
    (source / "any name.index.json").write_text(json.dumps(other))
    save_file({"c": torch.ones(1)}, source / "model.safetensors")
    for index in ("model.safetensors.index.json", "model.safetensors.index.fp16.json", "any name.index.json"):
        checkpoint = streamconv.open(source / index)
        assert {path.name for path in checkpoint.contents.files} == set(json.loads((source / index).read_text())["weight_map"].values())
        assert (checkpoint.path, checkpoint.config, checkpoint.contents.notes) == (str(source), CONFIG, [])
        assert_opens(source / index)
    assert run("convert", source / "model.safetensors.index.json", tmp_path / "out", "--verify", "--quiet") == 0
    assert_same(read(tmp_path / "out"), TENSORS)
    assert run("verify", source / "any name.index.json", tmp_path / "out") == 0
    assert run("doctor", source / "any name.index.json") == 0
    capsys.readouterr()
    (source / "no.index.json").write_text('{"error": "none"}')
    assert "must have a weight_map" in refusal(capsys, "inspect", source / "no.index.json")


def test_an_index_of_torch_files_as_source(tmp_path):
    for name, tensor in TENSORS.items():
        torch.save({name: tensor}, tmp_path / f"{name[0]}.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {name: f"{name[0]}.bin" for name in TENSORS}}))
    assert_opens(tmp_path / "pytorch_model.bin.index.json")
    (tmp_path / "pytorch_model.bin.index.json").rename(tmp_path / "x.index.json")
    assert_opens(tmp_path / "x.index.json")


# What is read of a folder ------------------------------------------------------------------------------------------


def test_the_single_file_beats_an_index_that_was_left_and_both_are_told_of(tmp_path, capsys):
    """As transformers has it; old shards may be gone, too."""
    source = write(tmp_path / "source", {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}, shards=2)
    save_file(TENSORS, source / "model.safetensors")
    torch.save({}, source / "pytorch_model.bin")
    assert run("convert", source, tmp_path / "out", "--no-progress") == 0
    out = capsys.readouterr().out
    assert out.startswith("note: model.safetensors is read; not read: model-00001-of-00002.safetensors, model-00002-of-00002.safetensors, ")
    assert "model.safetensors.index.json, pytorch_model.bin\n" in out
    assert_same(read(tmp_path / "out"), TENSORS)
    (source / "model-00001-of-00002.safetensors").unlink()
    assert_opens(source)


def test_a_repository_in_the_cache_of_the_hub_is_its_newest_snapshot(tmp_path, capsys):
    hub = tmp_path / "hub" / "models--org--name"
    for commit, tensors in {"aaa": TENSORS, "bbb": {"x": torch.ones(1)}}.items():
        write(hub / "snapshots" / commit, tensors, config={**CONFIG, "commit": commit})
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("aaa\n")
    for path in (hub, tmp_path / "hub"):
        assert_opens(path)
        assert streamconv.open(path).config["commit"] == "aaa"
        assert "snapshot aaa" in streamconv.open(path).contents.notes[0]
        assert run("doctor", path) == 0
    capsys.readouterr()
    for said in ("gone", "../snapshots/bbb", ".."):
        (hub / "refs" / "main").write_text(said)
        os.utime(hub / "snapshots" / "bbb", (2e9, 2e9))
        assert list(streamconv.open(hub)) == ["x"]
    shutil.copytree(hub, tmp_path / "hub" / "models--org--other")
    assert "2 repositories: models--org--name, models--org--other: give the path of one" in refusal(capsys, "inspect", tmp_path / "hub")
    shutil.rmtree(hub / "snapshots")
    (hub / "snapshots").mkdir()
    assert "no snapshot in it" in refusal(capsys, "inspect", hub)


def test_the_name_of_a_repository_that_is_no_path_gets_a_hint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "or hf://org/name-1.5 for the repository on the Hub" in refusal(capsys, "convert", "org/name-1.5", "out")
    for path in ("none", "a/b/c", "/org/name"):
        assert "hf://" not in refusal(capsys, "inspect", path)


# Ties that metadata tells of ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "tied"),
    [
        ({"note": "w"}, False),
        ({"note": "model.embed.weight"}, False),
        ({"source.note": "model.embed.weight"}, False),
        ({"the model.weight": "model.embed.weight"}, False),
        ({"format": "w", "dtype": "w"}, False),
        ({"lm_head.weight": "model.embed.weight"}, True),
        ({"decoder.bias": "cls.bias"}, True),
        ({"head": "embed"}, True),
    ],
)
def test_metadata_that_names_a_tensor_is_no_tie_unless_it_is_of_one(tmp_path, said, tied, capsys):
    tensors = numbered({"w": (2,), "model.embed.weight": (3, 2), "cls.bias": (2,), "embed": (2, 2)})
    source = tmp_path / "source.safetensors"
    save_file(tensors, source, metadata={"format": "pt"} | said)
    assert streamconv.open(source).ties == (said if tied else {})
    assert run("convert", source, tmp_path / "x.bin", "--quiet") == 0
    made = {**tensors, **{name: tensors[kept] for name, kept in said.items()}} if tied else tensors
    assert_same({name: entry.torch() for name, entry in streamconv.open(tmp_path / "x.bin").items()}, made)
    assert run("convert", source, tmp_path / "out", "--quiet") == 0
    assert streamconv.open(tmp_path / "out").metadata == {"format": "pt"} | said | ({"format": "pt"} if "format" in said else {})


# What is no file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "x.ckpt", "latest"])
def test_a_pipe_or_device_in_place_of_a_file_does_not_hang(tmp_path, name):
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(tmp_path / name)
        for path in (tmp_path, tmp_path / name):
            with pytest.raises(StreamconvError):
                streamconv.open(path)
        (tmp_path / name).unlink()
