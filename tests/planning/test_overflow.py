"""Casts whose values are too large for their new dtype: counted as they are made, and said at the end of every kind of run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from checkpoint_files import read, run, write

import streamconv
from streamconv.formats import Extent, Source
from streamconv.graph.arena import Arena
from streamconv.graph.evaluate import arena_bytes, evaluate
from streamconv.graph.moves import Move
from streamconv.graph.node import apply
from streamconv.graph.ops import Cast

LARGE = {"float16": 65520.0, "bfloat16": 3.4e38, "float32": 3.5e38}


def checkpoint(folder, dtype="float32", large=70000.0):
    """Three tensors that overflow, in 300, 2 and 1 places, infinities and NaNs among them, and two that do not."""
    kind = getattr(torch, dtype)
    many = torch.zeros(600, 700, dtype=kind)
    many.view(-1)[::1400] = large
    few = torch.tensor([1.0, -large, large, float("inf"), -float("inf"), float("nan")], dtype=kind)
    one = torch.tensor([[large, 0.5]], dtype=kind)
    tensors = {"a.weight": many, "b.weight": few, "c.weight": one, "d": torch.full((9,), 60000.0, dtype=kind), "e": torch.tensor([70000])}
    return write(folder / "x", tensors, shards=2, config={"dtype": dtype})


COUNTS = {"a.weight": 300, "b.weight": 2, "c.weight": 1}
SUMMARY = {
    "tensors": 3,
    "values": 303,
    "worst": [{"name": name, "values": count} for name, count in COUNTS.items()],
    "complete": True,
}


def test_values_that_overflow_are_counted_and_named_at_the_end(tmp_path, capsys):
    src = checkpoint(tmp_path)
    assert run("convert", src, tmp_path / "out", "--dtype", "float16", "--verify", "--workers", "3") == 0
    assert "note: 303 values in 3 tensors are too large for their new dtype, infinite now: a.weight (300), b.weight (2), c.weight (1)" in (
        capsys.readouterr().out
    )
    found = read(tmp_path / "out")
    assert int(found["a.weight"].isinf().sum()) == 300
    assert found["b.weight"].isinf().tolist() == [False, True, True, True, True, False]
    assert run("convert", src, tmp_path / "json", "--dtype", "float16", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["overflowed"] == SUMMARY
    assert any("303 values" in note for note in told["notes"])
    result = streamconv.convert(src, tmp_path / "api", dtype="float16", max_memory="4GB")
    assert result.overflow.counts == COUNTS
    assert "303 values" in result.notes[-1]


@pytest.mark.parametrize(
    ("source", "target", "large"),
    [
        ("float32", "bfloat16", 3.4e38),
        ("float64", "float32", 1e39),
        ("float64", "float16", 65520.0),
        ("float64", "bfloat16", 1e300),
        ("bfloat16", "float16", 3e38),
    ],
)
def test_every_cast_to_a_narrower_range_counts(tmp_path, source, target, large):
    result = streamconv.convert(checkpoint(tmp_path, source, large), tmp_path / "out", dtype=target, max_memory="4GB")
    assert result.overflow.counts == COUNTS


@pytest.mark.parametrize(
    ("source", "target"), [("float16", "bfloat16"), ("float16", "float32"), ("bfloat16", "float32"), ("float32", "float64")]
)
def test_casts_to_a_wider_range_say_nothing(tmp_path, source, target):
    src = checkpoint(tmp_path, source, 60000.0)
    result = streamconv.convert(src, tmp_path / "out", dtype=target, max_memory="4GB")
    assert result.summary()["overflowed"] == {"tensors": 0, "values": 0, "worst": [], "complete": True}
    assert not result.overflow.counts
    assert not result.notes
    # The largest that is still rounded down.
    assert not streamconv.convert(checkpoint(tmp_path, "float32", 65519.0), tmp_path / "near", dtype="float16", max_memory="4GB").notes


def test_parts_ranks_and_plans_say_it_too(tmp_path, capsys):
    src = checkpoint(tmp_path)
    shards = ("--dtype", "float16", "--max-shard-size", "1KB")
    assert run("plan", src, tmp_path / "out", *shards, "--out", tmp_path / "p.json", "--quiet") == 0
    counted = 0
    for part in ("1/2", "2/2"):
        capsys.readouterr()
        assert run("run", tmp_path / "p.json", "--part", part, "--json") == 0
        told = json.loads(capsys.readouterr().out)["overflowed"]
        counted += told["values"]
        assert told["complete"] is False
    assert counted == 303
    assert run("run", tmp_path / "p.json", "--finish", "--quiet") == 0
    plan = streamconv.Plan.from_json((tmp_path / "p.json").read_text())
    assert set(plan.names) == {"a.weight", "b.weight", "c.weight", "d"}


@pytest.mark.parametrize("name", ["out.bin", "out.ckpt", "out.pth", "out"])
def test_metadata_that_a_container_has_no_place_for_is_noted(tmp_path, capsys, name):
    from safetensors.torch import save_file

    metadata = {"format": "pt", "licence": "mit", "modelspec.title": "x"}
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors", metadata)
    assert run("convert", tmp_path / "x.safetensors", tmp_path / name) == 0
    noted = "metadata of the source" in (told := capsys.readouterr().out)
    assert noted == (name != "out")
    assert not noted or ("licence" in told and "modelspec.title" in told)
    assert noted or streamconv.open(tmp_path / name).metadata == metadata
    save_file({"a": torch.ones(3)}, tmp_path / "y.safetensors", {"format": "pt"})
    assert not streamconv.plan(tmp_path / "y.safetensors", tmp_path / f"again-{name}", max_memory="4GB").notes


def test_what_an_earlier_run_made_is_not_spoken_of(tmp_path):
    src = checkpoint(tmp_path)
    settings = {"dtype": "float16", "max_memory": "4GB"}
    streamconv.convert(src, tmp_path / "out", **settings)
    again = streamconv.convert(src, tmp_path / "out", resume=True, **settings)
    assert again.summary()["overflowed"] == {"tensors": 0, "values": 0, "worst": [], "complete": False}
    assert not any("infinite" in note for note in again.notes)


def test_a_transposed_region_counts_each_value_once(tmp_path):
    values = np.zeros((300, 500), dtype=np.float32)
    values[7, :9], values[200, 3], values[0, 0] = 7e4, -1e30, np.inf
    (tmp_path / "x").write_bytes(values.tobytes())
    spec = streamconv.open(write(tmp_path / "y", {"a": torch.from_numpy(values)}))["a"].source.spec
    node = apply(Cast("float16"), Source(spec, (Extent(str(tmp_path / "x"), 0, values.nbytes),)))
    data = values.tobytes()

    def read_bytes(_path, offset, view):
        view[:] = data[offset : offset + len(view)]

    arena = Arena(arena_bytes(node, values.size * 2, scattered=True))
    evaluate(node, Move((500, 300), 0, (300, 1), 0, (1, 500)), np.zeros(values.size, np.uint16), arena, read_bytes)
    assert arena.overflowed == 10
