"""What `diff` says of two checkpoints: each mutation by its name and its size, with torch as the oracle, and nothing else."""

from __future__ import annotations

import json
import math

import pytest
import torch
from checkpoint_files import ROOMY, numbered, random_tensor, refusal, run, write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import streamconv
from streamconv.changes import moved
from streamconv.engine import side_by_side
from streamconv.errors import BudgetError

LAYERS = 4
NAN, INF = math.nan, math.inf


def model(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random tensors under names of layers, and norms that are all ones."""
    tensors = {"model.embed_tokens.weight": random_tensor(20, 8, seed=1, dtype=dtype)}
    for i in range(LAYERS):
        tensors[f"model.layers.{i}.self_attn.q_proj.weight"] = random_tensor(8, 8, seed=10 + i, dtype=dtype)
        tensors[f"model.layers.{i}.mlp.up_proj.weight"] = random_tensor(16, 8, seed=20 + i, dtype=dtype)
        tensors[f"model.layers.{i}.norm.weight"] = torch.ones(8, dtype=dtype)
    return tensors


def diffed(tmp_path, a, b, **options):
    """`streamconv.diff` of two checkpoints of these tensors."""
    write(tmp_path / "a", a)
    write(tmp_path / "b", b)
    return streamconv.diff(tmp_path / "a", tmp_path / "b", max_memory=ROOMY, **options)


def states(changes):
    return {(row.name, row.state) for row in changes.tensors}


def test_nothing_changed(tmp_path, capsys):
    write(tmp_path / "a", model(), config={"hidden_size": 8})
    write(tmp_path / "b", dict(reversed(model().items())), shards=3, config={"hidden_size": 8})
    assert run("diff", tmp_path / "a", tmp_path / "b", "--no-progress") == 0
    out = capsys.readouterr().out
    assert out.startswith("13 tensors compared with 13: no differences\n  13 equal, ")
    assert "13 of them in files of other names" in out
    assert run("diff", tmp_path / "a", tmp_path / "b", "--headers", "--quiet") == 0


def test_every_kind_of_change(tmp_path, capsys):
    a = model()
    b = {name: tensor.clone() for name, tensor in a.items()}
    trained, rounded, narrowed, widened = (f"model.layers.{i}.self_attn.q_proj.weight" for i in range(LAYERS))
    b[trained][:2] += 0.5
    b[rounded] = b[rounded].bfloat16()
    b[narrowed] = b[narrowed].half().float()
    a[widened] = a[widened].bfloat16()
    b[widened] = a[widened].float()
    b["renamed.weight"] = b.pop("model.layers.0.mlp.up_proj.weight")
    b["model.layers.1.mlp.up_proj.weight"] = random_tensor(17, 8, seed=5)
    b["new"] = torch.ones(3)
    del b["model.layers.3.norm.weight"]
    write(tmp_path / "a", a, config={"vocab_size": 20, "rope": {"type": "linear", "factor": 2.0}, "limit": [0.0, INF]})
    write(tmp_path / "b", b, config={"vocab_size": 21, "rope": {"type": "linear", "factor": 4.0}, "limit": [0.0, NAN], "new": True})
    assert run("diff", tmp_path / "a", tmp_path / "b", "--json", "--no-progress") == 1
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    rows = {row["name"]: row for row in found["tensors"]}
    assert {name: row["state"] for name, row in rows.items()} == {
        trained: "changed", rounded: "rounded", narrowed: "rounded", widened: "rounded", "renamed.weight": "moved",
        "model.layers.1.mlp.up_proj.weight": "shape", "new": "only_b", "model.layers.3.norm.weight": "only_a",
    }  # fmt: skip
    difference = (b[trained] - a[trained]).double()
    assert rows[trained]["changed"] == 16
    assert rows[trained]["share"] == 16 / 64
    assert rows[trained]["max_abs"] == pytest.approx(difference.abs().max().item())
    assert rows[trained]["relative_l2"] == pytest.approx((difference.norm() / a[trained].double().norm()).item(), rel=1e-6)
    cosine = torch.nn.functional.cosine_similarity(a[trained].double().view(-1), b[trained].double().view(-1), 0).item()
    assert rows[trained]["cosine"] == pytest.approx(cosine, rel=1e-9)
    assert rows[rounded]["rounding"] == "rounded to bfloat16"
    assert rows[narrowed]["rounding"] == "rounded to float16, kept in float32"
    assert rows[widened]["rounding"] == "the same numbers in float32"
    assert rows[widened]["changed"] == 0
    assert rows["renamed.weight"]["from"] == "model.layers.0.mlp.up_proj.weight"
    assert found["config"] == [
        {"key": "vocab_size", "a": 20, "b": 21}, {"key": "rope.factor", "a": 2.0, "b": 4.0},
        {"key": "limit", "a": "[0.0, Infinity]", "b": "[0.0, NaN]"}, {"key": "new", "a": None, "b": True},
    ]  # fmt: skip
    assert found["totals"]["equal"]["tensors"] == 6
    assert found["kinds"][0]["kind"] == "model.layers.*.self_attn.q_proj.weight"
    assert run("diff", tmp_path / "a", tmp_path / "b", "--no-progress") == 1
    out = capsys.readouterr().out
    for line in (
        "  1 changed, 256 B: 25% of the numbers, relative L2 ", "  3 rounded, ", "  rope.factor: 2.0 -> 4.0", "  new only in B: True",
        "  model.layers.0.mlp.up_proj.weight -> renamed.weight", f"  {rounded}  float32[8, 8] -> bfloat16[8, 8]  ",
        "  model.layers.*.self_attn.q_proj.weight  4 ",
        "  model.layers.1.mlp.up_proj.weight: float32[16, 8] -> float32[17, 8]", "only in A:\n  model.layers.3.norm.weight\n",
    ):  # fmt: skip
        assert line in out


def test_headers_alone_settle_shapes_and_dtypes(tmp_path, monkeypatch):
    a = model()
    b = a | {"model.embed_tokens.weight": random_tensor(21, 8), "model.layers.0.norm.weight": torch.ones(8).half()}
    b["other"] = b.pop("model.layers.1.norm.weight")

    def refuse(*_: object) -> None:
        raise AssertionError("a tensor is read")

    with monkeypatch.context() as patch:
        patch.setattr(side_by_side.SideBySide, "run", refuse)
        changes = diffed(tmp_path, a, b, headers=True)
    expected = {("model.embed_tokens.weight", "shape"), ("model.layers.0.norm.weight", "dtype")}
    assert states(changes) == expected | {("model.layers.1.norm.weight", "only_a"), ("other", "only_b")}
    assert changes.counts["unread"] == 10

    def look(rows: object, *_: object, **__: object) -> side_by_side.SideBySide:
        assert all("embed" not in name for name in rows)
        return side_by_side.SideBySide(rows, *_, **__)

    monkeypatch.setattr(moved, "SideBySide", look)
    assert states(diffed(tmp_path / "read", a, b)) == {
        ("model.embed_tokens.weight", "shape"), ("model.layers.0.norm.weight", "rounded"), ("other", "moved"),
    }  # fmt: skip


def test_a_layer_that_was_taken_out(tmp_path):
    """The numbers of those behind it move, and it is the one that is only in A; norms that are all ones are equal, not moved."""
    a = model()
    kept = [0, 2, 3]
    b = {"model.embed_tokens.weight": a["model.embed_tokens.weight"]}
    for number, old in enumerate(kept):
        b |= {name.replace(f".{old}.", f".{number}."): tensor for name, tensor in a.items() if f".{old}." in name}
    changes = diffed(tmp_path, a, b)
    parts = ("self_attn.q_proj", "mlp.up_proj")
    assert {(row.source, row.name) for row in changes.tensors if row.state == "moved"} == {
        (f"model.layers.{old}.{part}.weight", f"model.layers.{old - 1}.{part}.weight") for old in (2, 3) for part in parts
    }
    assert {row.name for row in changes.tensors if row.state == "only_a"} == {
        *(f"model.layers.1.{part}.weight" for part in parts), "model.layers.3.norm.weight",
    }  # fmt: skip


def test_renamed_models_and_copies(tmp_path):
    a = model()
    b = {name.replace("model.", "model.language_model."): tensor for name, tensor in a.items()}
    b["copy"] = a["model.embed_tokens.weight"].clone()
    changes = diffed(tmp_path, a, b)
    assert {row.state for row in changes.tensors} == {"moved"}
    assert all(row.source == row.name.replace("language_model.", "") for row in changes.tensors if row.name != "copy")
    assert "model.layers.[0-3].norm.weight -> model.language_model.layers.[0-3].norm.weight" in str(changes)


@pytest.mark.parametrize("memory", ["4GB", "100TB"])
def test_a_tensor_that_differs_late_is_measured_whole(tmp_path, memory):
    a = {"x": random_tensor(1500, 1000)}
    b = {"x": a["x"].clone()}
    b["x"][-1, -1] += 3
    write(tmp_path / "a", a)
    write(tmp_path / "b", b)
    (row,) = streamconv.diff(tmp_path / "a", tmp_path / "b", max_memory=memory).tensors
    assert (row.distance.changed, row.distance.numel) == (1, 1_500_000)
    assert row.distance.relative_l2 == pytest.approx((b["x"][-1, -1] - a["x"][-1, -1]).item() / a["x"].double().norm().item(), rel=1e-6)


def test_numbers_that_are_not_finite_or_beyond_float32(tmp_path):
    a = {
        "x": torch.tensor([NAN, INF, 1.0, INF, 2.0]),
        "big": torch.full((3,), 3e38),
        "zero": torch.zeros(2),
        "whole": torch.tensor([2**60]),
    }
    b = {
        "x": torch.tensor([NAN, INF, NAN, 5.0, 4.0]),
        "big": torch.full((3,), -3e38),
        "zero": torch.ones(2),
        "whole": torch.tensor([2**60 + 1]),
    }
    rows = {row.name: row.distance for row in diffed(tmp_path, a, b).tensors}
    assert (rows["x"].nonfinite, rows["x"].changed, rows["x"].max_abs) == (2, 1, 2.0)
    assert (rows["big"].changed, rows["big"].relative_l2, rows["big"].cosine) == (3, pytest.approx(2), pytest.approx(-1))
    assert (rows["zero"].relative_l2, rows["zero"].cosine) == (None, None)
    assert rows["whole"].changed == 1


def test_options_say_what_the_first_becomes(tmp_path, capsys):
    a = numbered({"q": (4, 3), "k": (4, 3)})
    write(tmp_path / "a", a)
    write(tmp_path / "b", {"q": a["q"].half(), "key": a["k"].half()})
    assert run("diff", tmp_path / "a", tmp_path / "b", "--dtype", "fp16", "--rename", "k -> key", "--quiet") == 0
    assert run("diff", tmp_path / "a", tmp_path / "b", "--rename", "k -> key", "--quiet") == 1
    assert "no such file" in refusal(capsys, "diff", tmp_path / "a", tmp_path / "none")
    with pytest.raises(BudgetError, match="too small to compare"):
        streamconv.diff(tmp_path / "a", tmp_path / "b", max_memory="1MB")


def test_packed_types_are_bytes(tmp_path):
    a = {"x": torch.arange(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "y": torch.ones(2)}
    b = a | {"x": torch.arange(1, 9, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}
    for folder, tensors in (("a", a), ("b", b)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    changes = streamconv.diff(tmp_path / "a", tmp_path / "b", max_memory=ROOMY)
    assert states(changes) == {("x", "changed")}
    assert "no numbers" in str(changes)


def test_every_two_dtypes(tmp_path):
    dtypes = [
        torch.float64,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e8m0fnu,
        torch.bool,
        torch.uint8,
        torch.int64,
        torch.complex64,
    ]
    a, b = {"huge": torch.full((2,), 1e300, dtype=torch.float64)}, {"huge": torch.ones(2, dtype=torch.float64)}
    for one in dtypes:
        for other in dtypes:
            name = f"{one} {other}"
            a[name] = torch.tensor([1, 1, 0]).to(one) if one is not torch.float8_e8m0fnu else torch.ones(3).to(one)
            b[name] = torch.tensor([1, 0, 1]).to(other) if other is not torch.float8_e8m0fnu else torch.full((3,), 2.0).to(other)
    changes = diffed(tmp_path, a, b)
    kinds = {row.name: row.state for row in changes.tensors}
    assert kinds.keys() == a.keys()
    assert {name for name, state in kinds.items() if state == "dtype"} == {
        name for name in a if ("complex64" in name) and name.count("complex64") == 1
    }
    json.dumps(changes.summary(), allow_nan=False)


MUTATIONS = ("nothing", "trained", "rounded", "renamed", "swapped", "dropped", "added", "reshaped")


@settings(max_examples=20, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_mutation_is_told_and_nothing_else(data, dtype, tmp_path_factory):
    a = model(dtype)
    b = dict(a)
    names = [name for name in a if "norm" not in name]
    name, other = data.draw(st.permutations(names).map(lambda names: names[:2]))
    mutation = data.draw(st.sampled_from(MUTATIONS))
    expected = set()
    if mutation == "trained":
        b[name] = a[name].clone()
        position = data.draw(st.integers(0, a[name].numel() - 1))
        b[name].view(-1)[position] += 1
        expected = {(name, "changed")}
    elif mutation == "rounded":
        b[name] = a[name].half() if dtype is torch.float32 else a[name].float()
        expected = {(name, "rounded")}
    elif mutation == "renamed":
        b["renamed"] = b.pop(name)
        expected = {("renamed", "moved")}
    elif mutation == "swapped":
        b[name], b[other] = a[other], a[name]
        is_one_shape = a[name].shape == a[other].shape
        expected = {(name, "moved"), (other, "moved")} if is_one_shape else {(name, "shape"), (other, "shape")}
    elif mutation == "dropped":
        del b[name]
        expected = {(name, "only_a")}
    elif mutation == "added":
        b["added"] = random_tensor(3, 5, dtype=dtype)
        expected = {("added", "only_b")}
    elif mutation == "reshaped":
        b[name] = a[name].reshape(-1).clone()
        expected = {(name, "shape")}
    folder = tmp_path_factory.mktemp("mutation")
    changes = diffed(folder, a, b)
    assert states(changes) == expected
    assert changes.equal == (mutation == "nothing")
    assert {row.source for row in changes.tensors if row.source} <= {name, other}
