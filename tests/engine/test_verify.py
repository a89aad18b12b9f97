"""Comparison of two checkpoints: what counts as equal, and how far apart they are otherwise, with torch as the oracle."""

import json
import math
import platform

import pytest
import torch
from checkpoint_files import ROOMY, numbered, random_tensor, refusal, run, write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import streamconv
from streamconv.engine.comparison import _norm
from streamconv.errors import BudgetError
from streamconv.recipe import Recipe, Rule

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
WHOLE = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
NAN, INF = math.nan, math.inf


def compared(tmp_path, a, b, **settings):
    """`streamconv.verify` of two checkpoints of these tensors."""
    write(tmp_path / "a", a)
    write(tmp_path / "b", b)
    return streamconv.verify(tmp_path / "a", tmp_path / "b", max_memory=ROOMY, **settings)


def as_json(capsys, *arguments):
    """Exit code and document of a verify, which must be valid JSON without the constants that Python allows itself."""
    capsys.readouterr()
    code = run("verify", *arguments, "--json")

    def refuse(text):
        raise AssertionError(text)

    return code, json.loads(capsys.readouterr().out, parse_constant=refuse)


def figures(a, b):
    """L2 norm, largest magnitude and number of non-finite elements of the difference in float32, by torch."""
    difference = (a.to(torch.float32) - b.to(torch.float32)).abs().reshape(-1)
    finite = difference[torch.isfinite(difference)]
    largest = finite.max().item() if finite.numel() else 0.0
    return finite.double().square().sum().sqrt().item(), largest, difference.numel() - finite.numel()


@pytest.mark.parametrize("dtype", [*FLOATS, *WHOLE, torch.complex64, torch.float8_e8m0fnu], ids=str)
def test_every_dtype_equal_and_different(dtype, tmp_path):
    a = torch.randint(1, 100, (7, 5), generator=torch.Generator().manual_seed(1)).to(dtype)
    b = a.clone()
    b[3, 2] = {torch.bool: not a[3, 2], torch.complex64: complex(0.5, 3)}.get(dtype, 2 if a[3, 2].item() != 2 else 4)
    found = compared(tmp_path, {"x": a, "y": a}, {"x": b, "y": a})
    assert not found.equal
    assert [row.name for row in found.tensors] == ["x"]
    expected = abs(a[3, 2] - b[3, 2]).item() if dtype is torch.complex64 else figures(a, b)[0]
    assert found.l2 == found.max_abs == pytest.approx(expected)
    assert streamconv.verify(tmp_path / "a", tmp_path / "a", max_memory=ROOMY).equal


def test_equal(tmp_path, capsys):
    a = numbered({"w": (3, 4), "b": (4,), "scalar": (), "none": (0, 4)})
    write(tmp_path / "a", a)
    write(tmp_path / "b", dict(reversed(a.items())), shards=3)
    code, document = as_json(capsys, tmp_path / "a", tmp_path / "b")
    assert code == 0
    assert document == {
        "equal": True, "compared": 4, "missing": [], "unexpected": [], "shape_mismatch": [], "dtype_mismatch": [],
        "l2": 0.0, "l2_per_parameter": 0.0, "max_abs": 0.0, "nonfinite": 0, "tensors": [],
    }  # fmt: skip
    assert run("verify", tmp_path / "a", tmp_path / "b", "--no-progress") == 0
    assert "4 tensors compared: equal" in capsys.readouterr().out


def test_all_that_can_differ(tmp_path, capsys):
    a = numbered({"same": (3,), "value": (4, 2), "shape": (2, 3), "dtype": (5,), "gone": (1,)})
    b = {
        "same": a["same"], "value": a["value"] + 1, "shape": a["shape"].T, "dtype": a["dtype"].half(), "new": a["gone"],
    }  # fmt: skip
    write(tmp_path / "a", a)
    write(tmp_path / "b", b)
    code, found = as_json(capsys, tmp_path / "a", tmp_path / "b")
    assert code == 1
    assert found["equal"] is False
    assert found["compared"] == 4
    assert (found["missing"], found["unexpected"]) == (["gone"], ["new"])
    assert (found["shape_mismatch"], found["dtype_mismatch"]) == (["shape"], ["dtype"])
    rows = {row["name"]: row for row in found["tensors"]}
    assert sorted(rows) == ["dtype", "shape", "value"]
    assert rows["shape"] == {"name": "shape", "equal": False, "nonfinite": 0, "expected": "float32[2, 3]", "found": "float32[3, 2]"}
    assert rows["dtype"]["expected"] == "float32[5]"
    assert rows["dtype"]["found"] == "float16[5]"
    distances = {name: figures(a[name], b[name]) for name in ("value", "dtype")}
    for name, (l2, largest, _) in distances.items():
        assert rows[name]["l2"] == pytest.approx(l2, rel=1e-5)
        assert rows[name]["max_abs"] == largest
    assert found["l2"] == pytest.approx(sum(l2 for l2, _, _ in distances.values()), rel=1e-5)
    assert found["l2_per_parameter"] == pytest.approx(found["l2"] / (3 + 8 + 5))
    assert found["max_abs"] == max(largest for _, largest, _ in distances.values())

    assert run("verify", tmp_path / "a", tmp_path / "b", "--no-progress") == 1
    shown = capsys.readouterr().out
    for line in ("missing: gone", "unexpected: new", "other shape: shape", "other dtype: dtype", "differs: value  l2 "):
        assert line in shown


def test_the_same_values_in_another_dtype_are_not_equal(tmp_path):
    found = compared(tmp_path, {"x": torch.ones(3), "e": torch.ones(0)}, {"x": torch.ones(3).half(), "e": torch.ones(0).half()})
    assert not found.equal
    assert sorted(found.dtype_mismatch) == ["e", "x"]
    assert (found.l2, found.max_abs) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2], ids=str)
def test_what_is_not_finite_is_counted_and_kept_out(dtype, tmp_path, capsys):
    a = torch.tensor([NAN, 1.0, INF, -INF, INF, 0.0, 2.0]).to(dtype)
    b = torch.tensor([NAN, NAN, INF, INF, 5.0, 0.0, 4.0]).to(dtype)
    write(tmp_path / "a", {"x": a, "same": a, "zero": torch.zeros(1)})
    write(tmp_path / "b", {"x": b, "same": a, "zero": -torch.zeros(1)})
    code, found = as_json(capsys, tmp_path / "a", tmp_path / "b")
    assert code == 1
    assert (found["nonfinite"], found["l2"], found["max_abs"]) == (figures(a, b)[2], 2.0, 2.0)
    assert sorted(row["name"] for row in found["tensors"]) == ["x", "zero"]  # -0 and 0 are other bytes, at no distance
    assert run("verify", tmp_path / "a", tmp_path / "b", "--no-progress") == 1
    assert "differences are not finite" in capsys.readouterr().out


def test_nothing_but_nan(tmp_path, capsys):
    write(tmp_path / "a", {"x": torch.full((3,), NAN)})
    write(tmp_path / "b", {"x": torch.zeros(3)})
    code, found = as_json(capsys, tmp_path / "a", tmp_path / "b")
    assert (code, found["nonfinite"], found["l2"], found["max_abs"], found["l2_per_parameter"]) == (1, 3, 0, 0, 0)


def test_other_bits_of_nan_are_a_difference(tmp_path):
    bits = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32)
    found = compared(tmp_path, {"x": bits[:1].view(torch.float32)}, {"x": bits[1:].view(torch.float32)})
    assert not found.equal
    assert found.nonfinite == 1


def test_beyond_float32(tmp_path):
    found = compared(tmp_path, {"x": torch.tensor([1e300, 1.0], dtype=torch.float64)}, {"x": torch.tensor([0.0, 3.0], dtype=torch.float64)})
    assert (found.l2, found.nonfinite) == (2, 1)
    found = compared(tmp_path / "big", {"x": torch.full((100,), 3e38)}, {"x": torch.zeros(100)})
    assert found.l2 == pytest.approx(3e39, rel=1e-5)
    found = compared(tmp_path / "tiny", {"x": torch.full((100,), 1e-30)}, {"x": torch.zeros(100)})
    assert found.l2 == pytest.approx(1e-29, rel=1e-5)


def test_empty_and_scalar_tensors(tmp_path):
    a = {"scalar": torch.tensor(2.0), "none": torch.zeros(0), "rows": torch.zeros(3, 0), "one": torch.ones(1)}
    assert compared(tmp_path, a, a).equal
    found = compared(tmp_path / "other", a, a | {"scalar": torch.tensor(5.0), "rows": torch.zeros(0, 3), "one": torch.tensor(1.0)})
    assert sorted(found.shape_mismatch) == ["one", "rows"]
    assert (found.l2, found.max_abs, found.parameters) == (3, 3, 1)
    none = compared(tmp_path / "none", {"x": torch.zeros(0)}, {"x": torch.zeros(0)})
    assert none.equal
    assert none.l2_per_parameter == 0


def test_packed_types_are_bytes_and_not_numbers(tmp_path, capsys):
    packed = torch.arange(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    other = torch.arange(1, 9, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    for folder, tensor in (("a", packed), ("b", other), ("c", torch.zeros(16, dtype=torch.int8))):
        (tmp_path / folder).mkdir()
        save_file({"x": tensor, "y": torch.ones(2)}, tmp_path / folder / "model.safetensors")
    assert as_json(capsys, tmp_path / "a", tmp_path / "a")[0] == 0
    code, found = as_json(capsys, tmp_path / "a", tmp_path / "b")
    assert code == 1
    assert found["tensors"] == [{"name": "x", "equal": False, "nonfinite": 0}]
    code, found = as_json(capsys, tmp_path / "a", tmp_path / "c")
    assert code == 1
    assert found["dtype_mismatch"] == ["x"]
    assert found["tensors"][0]["expected"] == "float4_e2m1fn[16]"
    cast = Recipe("made-packed", "", (Rule("x", "x", "a -> (a 1)"), Rule("y", "y")))
    found = streamconv.verify(tmp_path / "c", tmp_path / "a", recipe=cast, max_memory=ROOMY)
    assert found.dtype_mismatch == ["x"]
    assert run("verify", tmp_path / "a", tmp_path / "b", "--no-progress") == 1
    assert "differs: x\n" in capsys.readouterr().out


@pytest.mark.sampled(3)
@pytest.mark.parametrize("memory", ["4GB", "100TB"])
@pytest.mark.parametrize("workers", [1, 7])
@pytest.mark.parametrize("backend", ["auto", "mmap", "pread"])
def test_any_budget_gives_the_same_figures(memory, workers, backend, tmp_path):
    a = {"x": random_tensor(1100, 1000), "y": random_tensor(513, 1025, dtype=torch.bfloat16)}
    b = {"x": a["x"] + 1e-3 * random_tensor(1100, 1000, seed=1), "y": random_tensor(513, 1025, dtype=torch.bfloat16, seed=2)}
    write(tmp_path / "a", a)
    write(tmp_path / "b", b)
    found = streamconv.verify(tmp_path / "a", tmp_path / "b", max_memory=memory, workers=workers, read_backend=backend)
    wanted = {name: figures(a[name], b[name]) for name in a}
    assert [(row.name, row.max_abs) for row in found.tensors] == [(name, largest) for name, (_, largest, _) in wanted.items()]
    assert [row.l2 for row in found.tensors] == pytest.approx([l2 for l2, _, _ in wanted.values()], rel=1e-5)


def test_a_budget_that_is_too_small_is_refused(tmp_path, capsys):
    write(tmp_path / "a", {"x": torch.ones(3)})
    with pytest.raises(BudgetError) as caught:
        streamconv.verify(tmp_path / "a", tmp_path / "a", max_memory="1MB")
    assert caught.value.needed > 10**6
    assert f"use {caught.value.needed // 10**6}MB" in str(caught.value)


def test_with_a_recipe(tmp_path, capsys):
    tensors = numbered({"q": (4, 3), "k": (4, 3)})
    write(tmp_path / "a", tensors)
    rules = [{"rule": "{q,k}", "right": "qk", "layout": "h c, h c -> (h + h) c"}]
    (tmp_path / "fuse.json").write_text(json.dumps({"rules": rules, "options": {"n": {"help": "", "default": 1}}}))
    fused = torch.cat([tensors["q"], tensors["k"]])
    write(tmp_path / "b", {"qk": fused})
    settings = ("--recipe", tmp_path / "fuse.json")
    assert as_json(capsys, tmp_path / "a", tmp_path / "b", *settings, "--set", "n=2")[0] == 0
    fused[5, 1] += 1
    write(tmp_path / "c", {"qk": fused})
    code, found = as_json(capsys, tmp_path / "a", tmp_path / "c", *settings)
    assert (code, found["l2"], found["max_abs"]) == (1, pytest.approx(1, rel=1e-5), pytest.approx(1, rel=1e-5))
    write(tmp_path / "d", {"qk": fused.bfloat16()})
    code, found = as_json(capsys, tmp_path / "a", tmp_path / "d", *settings, "--dtype", "bf16")
    assert found["dtype_mismatch"] == []
    assert code == 1
    assert "no such option" in refusal(capsys, "verify", tmp_path / "a", tmp_path / "b", *settings, "--set", "m=1")
    assert "there is no recipe to take it" in refusal(capsys, "verify", tmp_path / "a", tmp_path / "b", "--set", "m=1")


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    write(tmp_path / "a", {"x": torch.ones(3)})
    assert "no such file" in refusal(capsys, "verify", tmp_path / "a", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refusal(capsys, "verify", tmp_path / "empty", tmp_path / "a")


def test_long_lists_are_cut_for_people(tmp_path, capsys):
    write(tmp_path / "a", {f"x{k}": torch.ones(1) for k in range(25)} | {"y": torch.ones(1)})
    write(tmp_path / "b", {"y": torch.ones(1)})
    assert run("verify", tmp_path / "a", tmp_path / "b", "--no-progress") == 1
    assert "... and 15 more missing" in capsys.readouterr().out
    assert len(as_json(capsys, tmp_path / "a", tmp_path / "b")[1]["missing"]) == 25


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    dtypes=st.tuples(st.sampled_from([*FLOATS, *WHOLE]), st.sampled_from([*FLOATS, *WHOLE])),
    shape=st.lists(st.integers(0, 40), max_size=3),
)
def test_any_two_tensors(data, dtypes, shape, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    tensors = []
    for dtype in dtypes:
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 3)))
        size = math.prod(shape) * dtype.itemsize
        tensors.append(
            torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)
        )
    a, b = tensors
    found = compared(folder, {"x": a}, {"x": b})
    l2, largest, nonfinite = figures(a, b)
    same = dtypes[0] == dtypes[1] and a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))
    assert found.equal == same
    wanted = (0, 0, 0) if same else (l2, largest, nonfinite)
    assert (found.l2, found.max_abs, found.nonfinite) == (pytest.approx(wanted[0], rel=1e-5), *wanted[1:])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 1e4]))
def test_norms_are_those_of_torch(count, seed, scale):
    """To the last bit, where torch is built so: InternVL's tool prints more digits than float32 has."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)).abs() * scale
    exact = platform.machine() == "x86_64"
    assert _norm(values.numpy()) == pytest.approx(torch.linalg.vector_norm(values).item(), rel=0 if exact else 1e-6, abs=0)
