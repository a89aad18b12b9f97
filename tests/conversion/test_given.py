"""Tensors that are given in Python as a source, and tensors that are given to Python, one at a time (`stream`)."""

from __future__ import annotations

import gc
import weakref

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoint_files import ROOMY, assert_same, read, write

import streamconv
from streamconv.conversion.given import as_source
from streamconv.storage import held

TENSORS = {
    "bfloat16": torch.randn(4, 6).bfloat16(),
    "empty": torch.empty(0, 3),
    "long": torch.arange(5),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "scalar": torch.tensor(2.5),
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
}


def plain(tensors):
    return {name: torch.as_tensor(tensor).detach().contiguous() for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "give", [dict, lambda tensors: list(tensors.items()), lambda tensors: iter(tensors.items())], ids=["dict", "list", "iter"]
)
def test_tensors_are_a_source(give, tmp_path):
    result = streamconv.convert(give(TENSORS), tmp_path / "out", verify=True)
    assert result.verified
    assert_same(read(tmp_path / "out"), plain(TENSORS))
    assert streamconv.verify(give(TENSORS), tmp_path / "out").equal


def test_arrays_of_numpy_are_tensors(tmp_path):
    arrays = {"a": np.arange(6, dtype=">i4").reshape(2, 3), "b": np.ones((2, 2), ml_dtypes.bfloat16), "c": np.float16(1)}
    streamconv.convert(arrays, tmp_path / "out", dtype="fp32")
    expected = {"a": torch.arange(6, dtype=torch.int32).reshape(2, 3), "b": torch.ones(2, 2), "c": torch.tensor(1.0)}
    assert_same(read(tmp_path / "out"), expected)


def test_a_recipe_applies_with_a_config_from_elsewhere(toy, tmp_path):
    out = streamconv.convert(toy, tmp_path / "out", rename=["blocks.{i}.{rest*} -> layers.{i}.{rest*}"], sidecars_from=tmp_path / "toy")
    assert "layers.0.norm1.weight" in streamconv.open(tmp_path / "out")
    assert out.plan.sidecars == ("config.json",)


def test_a_plan_holds_them_and_no_other_process_has_them(tmp_path):
    plan = streamconv.plan(dict(TENSORS), tmp_path / "out")
    text = plan.to_json()
    gc.collect()
    streamconv.run(plan)
    assert_same(read(tmp_path / "out"), plain(TENSORS))
    del plan
    gc.collect()
    assert not held._files, "held no longer than needed"
    with pytest.raises(streamconv.UsageError, match="was held in memory by a process or a plan that is no more"):
        streamconv.run(streamconv.Plan.from_json(text), overwrite=True)


def test_an_iterator_is_never_all_in_memory():
    alive = []

    def make():
        for number in range(4):
            assert sum(one() is not None for one in alive) <= 1
            tensor = np.full(1000, number, "float32")
            alive.append(weakref.ref(tensor))
            yield f"t{number}", tensor

    address = as_source(make())
    gc.collect()
    assert not any(one() is not None for one in alive)
    assert held.resident(address) < 1000, "the header"
    assert [entry[0].item() for entry in streamconv.open(address).values()] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("src", "words"),
    [
        ({"model": {"a": 1}}, "model is dict, no tensor"),
        ({}, "it has no tensors"),
        (5, "int is no path, state dict, or pairs"),
        ([("a", np.ones(1)), ("a", np.ones(1))], "a comes twice"),
        ([np.ones(1)], "ndarray where a pair"),
        ({"a": torch.ones(2, device="meta")}, "a is on the meta device"),
        ({"a": torch.ones(2, 2).to_sparse()}, "a is a Tensor of layout torch.sparse_coo"),
        ({"a": np.array([object()])}, "a is of type object"),
    ],
)
def test_what_is_no_tensor(src, words, tmp_path):
    with pytest.raises(streamconv.UsageError, match=words):
        streamconv.convert(src, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# stream --------------------------------------------------------------------------------------------------------------


def test_a_stream_gives_what_convert_writes(tmp_path):
    write(tmp_path / "src", plain(TENSORS), shards=2)
    streamconv.convert(tmp_path / "src", tmp_path / "out", dtype="fp16")
    pairs = list(streamconv.stream(tmp_path / "src", dtype="fp16"))
    assert_same(dict(pairs), read(tmp_path / "out"))
    assert [name for name, _ in pairs] == [
        row.target for row in streamconv.plan(tmp_path / "src", tmp_path / "other", dtype="fp16").mapping
    ]
    arrays = dict(streamconv.stream(TENSORS, framework="numpy"))
    assert arrays["bfloat16"].dtype == ml_dtypes.bfloat16
    assert_same({name: torch.as_tensor(part) for name, part in arrays.items() if name == "long"}, {"long": TENSORS["long"]})


def test_parts_are_rows_of_at_most_that_size():
    parts = [part for name, part in streamconv.stream({"w": torch.arange(30.0).reshape(10, 3)}, parts=40)]
    assert [(part.rows.start, part.rows.stop) for part in parts] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert torch.equal(torch.cat([part.values for part in parts]), torch.arange(30.0).reshape(10, 3))
    assert {part.shape for part in parts} == {(10, 3)}
    whole = [(name, part.rows, part.values.shape) for name, part in streamconv.stream(TENSORS, only=["scalar", "empty"], parts="1KB")]
    assert whole == [("empty", slice(0, 0), (0, 3)), ("scalar", slice(0, 1), ())]


def test_a_stream_is_refused_before_its_first_tensor(tmp_path):
    write(tmp_path / "src", {"w": torch.zeros(1000, 1000)})
    with pytest.raises(streamconv.BudgetError, match=r"w: 4 MB of it at a time.* use max_memory='\d+MB', or smaller parts"):
        streamconv.stream(tmp_path / "src", max_memory="1MB")
    with pytest.raises(streamconv.UsageError, match="expected torch or numpy"):
        streamconv.stream(tmp_path / "src", framework="jax", max_memory=ROOMY)
