"""What reading JSON takes is known before it is taken apart, and bounded."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from pathlib import Path

import pytest
from checkpoint_files import numbered, run, write

import streamconv
from streamconv import memory
from streamconv.checkpoint.opening import read_config
from streamconv.errors import BudgetError, FormatError, StreamconvError
from streamconv.formats.json_text import memory_of, parse_object
from streamconv.storage.locations import locate

N = 20_000
TEXTS = {
    "lists": "[],",
    "objects": "{},",
    "strings": '"ab",',
    "small numbers": "9,",
    "numbers": "999,",
    "lists of one": "[1],",
    "lists of two": "[1,2],",
    "objects of one": '{"a":1},',
    "objects of two": '{"a":1,"b":2},',
    "wide": '"éééé",',
}


def text_of(case: str) -> bytes:
    if case == "keys":
        return json.dumps({f"{n:x}": f"z{n:x}" for n in range(N)}, separators=(",", ":")).encode()
    if case == "one emoji":
        return ('{"' + "a" * 30 * N + '\U0001f600":1}').encode()
    if case == "header":
        tensor = {"dtype": "BF16", "shape": [7168, 2048], "data_offsets": [29360128, 58720256]}
        return json.dumps({f"model.layers.{n}.mlp.experts.down_proj.weight": tensor for n in range(N)}, separators=(",", ":")).encode()
    if case == "index":
        where = {f"model.layers.{n}.mlp.experts.down_proj.weight": "model-00001-of-00163.safetensors" for n in range(N)}
        return json.dumps({"weight_map": where}, indent=2).encode()
    return ('{"a":[' + TEXTS[case] * N + "0]}").encode()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", [*TEXTS, "keys", "one emoji", "header", "index"])
def test_no_text_takes_more_than_is_counted(case):
    raw = text_of(case)
    tracemalloc.start()
    try:
        parse_object(locate("x"), raw, "text")
        taken = tracemalloc.get_traced_memory()[1] + len(raw)
    finally:
        tracemalloc.stop()
    assert taken <= memory_of(raw)
    assert case not in ("header", "index") or memory_of(raw) < 2.5 * taken, "what is usual is not refused"


def header(path: Path, raw: bytes, nbytes: int = 0) -> Path:
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + nbytes)
    return path


def test_what_would_take_too_much_is_refused_with_the_number_that_would_do(tmp_path, monkeypatch):
    path = header(tmp_path / "x.safetensors", text_of("lists"))
    monkeypatch.setattr(memory, "READING", 2 << 20)
    with pytest.raises(BudgetError, match=r"x\.safetensors: its header of 60009 bytes may take 3\S* MB to read, more than the 2\.1 MB"):
        streamconv.open(path)
    (tmp_path / "config.json").write_bytes(text_of("lists"))
    with pytest.raises(BudgetError, match=r"config\.json"):
        read_config(locate(tmp_path).folder)
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text_of("lists"))
    with pytest.raises(BudgetError, match=r"index\.json"):
        streamconv.open(index)
    limit = memory.resident() + (1 << 20)
    with memory.bounded(limit), pytest.raises(BudgetError, match=r"beside the .* of the process.*: use --max-memory \d+MB") as caught:
        streamconv.open(path)
    assert caught.value.needed > limit
    with pytest.raises(BudgetError, match="use --max-memory"):
        streamconv.plan(path, tmp_path / "out", max_memory=limit)


def test_a_header_of_300000_tensors_may_be_read():
    raw = text_of("header")
    assert memory_of(raw) * 15 < memory.READING


@pytest.mark.parametrize("size", [(8 << 20) + 1, 1 << 40])
def test_what_is_too_large_for_a_config_is_not_read(tmp_path, size):
    (tmp_path / "config.json").touch()
    os.truncate(tmp_path / "config.json", size)
    with pytest.raises(FormatError, match=r"larger than 8 MiB, which a config never is"):
        read_config(locate(tmp_path).folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_pipe_or_a_device_in_place_of_json_does_not_hang(tmp_path, name):
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(tmp_path / name)
        with pytest.raises(StreamconvError, match="not a regular file"):
            _ = read_config(locate(tmp_path).folder) or streamconv.open(tmp_path)
        (tmp_path / name).unlink()


def test_doctor_reads_no_endless_index(tmp_path, capsys):
    source = write(tmp_path / "source", numbered({"a": (2, 2)}))
    (source / "model.safetensors.index.json").symlink_to("/dev/zero")
    (source / "x.partial").touch()
    os.truncate(source / "x.partial", 1 << 40)
    assert run("doctor", source) == 1
    out = capsys.readouterr().out
    assert "model.safetensors.index.json: it cannot be read (not a regular file" in out
    assert "x.partial: it is what an interrupted conversion left" in out
