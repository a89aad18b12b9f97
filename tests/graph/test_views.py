"""Tensors that are stored as strided views: transposed, channels_last, sliced, repeated. What torch.load(...).contiguous() has is right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from checkpoint_files import assert_same, random_tensor, raw, read, read_any, run
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import flaky, nginx

import streamconv
from streamconv.dtypes import TensorSpec, parse_dtype
from streamconv.errors import CoverageError
from streamconv.graph import copying, evaluate, gather
from streamconv.graph.node import Source, apply, made_of
from streamconv.graph.ops import Strided
from streamconv.graph.views import stored_view
from streamconv.planning import fitting
from streamconv.planning.plan import Compute, Plan

LEGACY = {"_use_new_zipfile_serialization": False}
DTYPES = ["float32", "bfloat16", "float64", "float8_e4m3fn", "bool", "int16", "complex64"]


def of_bits(dtype: str, *shape: int) -> torch.Tensor:
    """Any bits that are values of ``dtype``."""
    kind = getattr(torch, dtype)
    numel = torch.Size(shape).numel()
    bits = np.random.default_rng(numel).integers(0, 2 if kind is torch.bool else 256, numel * kind.itemsize, np.uint8)
    return torch.from_numpy(bits).view(kind).reshape(shape)


@contextmanager
def small_tiles() -> Iterator[None]:
    """Tensors of a few hundred bytes take many tiles and many reads each."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (fitting, "TILE", 200), (fitting, "SCATTERED_TILE", 400), (fitting, "SMALLEST_TILE", 100), (gather, "SPAN", 64),
            (gather, "DIRECT", 32), (gather, "PAGE", 16), (copying, "BAND", 64), (copying, "NARROW", 2), (evaluate, "COMPARE", 256),
        ):  # fmt: skip
            patch.setattr(module, name, value)
        yield


def kinds() -> dict[str, torch.Tensor]:
    """A view of each kind that checkpoints hold."""
    matrix, image, vector = random_tensor(30, 50), random_tensor(8, 4, 3, 3, seed=1), random_tensor(40, seed=2)
    return {
        "transposed": matrix.t(),
        "channels_last": image.to(memory_format=torch.channels_last),
        "permuted": random_tensor(5, 6, 7, seed=3).permute(2, 0, 1),
        "columns": matrix[:, 7:31],
        "steps": matrix[1::3, ::7],
        "every other": vector[::2],
        "head of each": random_tensor(4, 3, 6, 5, seed=4)[:, 1],
        "expanded": vector[:1].expand(6, 9),
        "repeated rows": vector.expand(5, 40),
        "windows": vector.unfold(0, 8, 3),
        "overlapping": vector.as_strided((7, 5), (2, 3), 4),
        "diagonal": matrix.diagonal(),
        "0-d": matrix[3, 4],
        "empty": matrix[:, 3:3].t(),
        "one column": matrix[:, 2:3],
        "whole": matrix,
    }


@st.composite
def some_view(draw) -> torch.Tensor:
    """A tensor after a few random views."""
    view = of_bits(draw(st.sampled_from(DTYPES)), *draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    for _ in range(draw(st.integers(0, 4))):
        if not view.dim():
            break
        axis = draw(st.integers(0, view.dim() - 1))
        size = view.shape[axis]
        what = draw(st.sampled_from(["permute", "slice", "select", "expand", "unfold"]))
        if what == "permute":
            view = view.permute(*draw(st.permutations(range(view.dim()))))
        elif what == "slice":
            start = draw(st.integers(0, size))
            view = view[(slice(None),) * axis + (slice(start, draw(st.integers(start, size)), draw(st.integers(1, 4))),)]
        elif what == "select" and size:
            view = view.select(axis, draw(st.integers(0, size - 1)))
        elif what == "expand":
            view = view.unsqueeze(axis).expand(*view.shape[:axis], draw(st.integers(1, 3)), *view.shape[axis:])
        elif what == "unfold" and size and view.dim() < 5:
            view = view.unfold(axis, draw(st.integers(1, size)), draw(st.integers(1, 3)))
    return view


@settings(max_examples=25, deadline=None)
@given(views=st.lists(some_view(), min_size=1, max_size=4), legacy=st.booleans())
def test_any_view_is_what_torch_has(tmp_path_factory, views, legacy):
    folder = tmp_path_factory.mktemp("views")
    tensors = {f"t{number}": view for number, view in enumerate(views)}
    torch.save(tensors, folder / "x.pt", **(LEGACY if legacy else {}))
    with small_tiles():
        for name, entry in streamconv.open(folder / "x.pt").items():
            assert (entry.shape, raw(entry.torch())) == (tuple(tensors[name].shape), raw(tensors[name])), name
        assert run("convert", folder / "x.pt", folder / "x.safetensors", "--quiet", "--verify") == 0
        assert_same(read(folder / "x.safetensors"), tensors)


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "ckpt"])
@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_every_kind_becomes_every_container(tmp_path, suffix, options):
    tensors = {name: view for name, view in kinds().items() if suffix != "ckpt" or name != "empty"}
    torch.save(tensors, tmp_path / "x.pt", **options)
    target = tmp_path / f"y.{suffix}"
    with small_tiles():
        assert run("convert", tmp_path / "x.pt", target, "--quiet", "--verify") == 0
        assert run("verify", target, tmp_path / "x.pt") == run("verify", tmp_path / "x.pt", target) == 0
    assert_same(read_any(target), tensors)


def test_a_view_is_computed_and_what_lies_in_long_runs_is_copied(tmp_path):
    torch.save({"t": random_tensor(300, 400).t(), "half": torch.ones(3, 200_000, dtype=torch.int8)}, tmp_path / "x.pt")
    torch.save({"half": torch.zeros(6, 600_000, dtype=torch.int8)[:, :300_000]}, tmp_path / "y.pt")
    plan = streamconv.plan(tmp_path / "x.pt", tmp_path / "x.safetensors", max_memory="4GB")
    assert (plan.totals.bytes_computed, plan.totals.bytes_copied) == (480_000, 600_000)
    assert streamconv.plan(tmp_path / "y.pt", tmp_path / "y.safetensors", max_memory="4GB").totals.bytes_computed == 0
    again = Plan.from_json(plan.to_json())
    assert again.to_json() == plan.to_json()
    assert any(isinstance(segment, Compute) for segment in again.for_files([0]).files[0].segments)


def test_inspect_has_no_offset_for_what_is_not_in_one_piece(tmp_path, capsys):
    torch.save(kinds(), tmp_path / "x.pt")
    assert run("inspect", tmp_path / "x.pt", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["tensors"]}
    whole = {name for name, row in rows.items() if row["offset"] is not None}
    assert whole == {"0-d", "empty", "whole"}
    assert {row["file"] for row in rows.values()} == {"x.pt"}
    assert run("inspect", tmp_path / "x.pt", "--stats") == 0
    assert run("doctor", tmp_path / "x.pt", "--data") == 1
    assert "all values are" in capsys.readouterr().out  # of the one that is expanded


# Ties --------------------------------------------------------------------------------------------------------------


def test_equal_views_are_ties_and_other_views_of_the_same_bytes_are_not(tmp_path):
    square = random_tensor(6, 6)
    tensors = {"embed": square.t(), "head": square.t(), "plain": square, "turned": square.flip(0).t(), "upper": square[:3].t()}
    torch.save(tensors, tmp_path / "x.bin")
    checkpoint = streamconv.open(tmp_path / "x.bin")
    assert len(checkpoint.ties) == 1
    assert {*checkpoint.ties, *checkpoint.ties.values()} == {"embed", "head"}
    for way, tied in (("keep", True), ("copy", False)):
        assert run("convert", tmp_path / "x.bin", tmp_path / f"{way}.bin", "--set", f"tied={way}", "--quiet", "--verify") == 0
        found = torch.load(tmp_path / f"{way}.bin")
        assert_same(found, tensors)
        assert (found["embed"].data_ptr() == found["head"].data_ptr()) == tied


def test_a_vocabulary_that_is_stored_transposed(tmp_path):
    square = random_tensor(12, 12)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    for other, count in ((square.t(), 1), (square, 2)):
        torch.save(dict(zip(names, (square.t(), other), strict=True)), tmp_path / "x.bin")
        assert run("convert", tmp_path / "x.bin", tmp_path / "y", "--set", "resize_vocab=7", "--quiet", "--overwrite") == 0
        wanted, found = dict(zip(names, (square.t()[:7], other[:7]), strict=True)), read(tmp_path / "y")
        assert len(found) == count
        assert_same(found, {name: wanted[name] for name in found})


# Recipes, verify, resume -------------------------------------------------------------------------------------------


def test_a_layout_of_a_view(tmp_path):
    fused = {"rule": "{q,k}", "right": "qk", "layout": "a b, c b -> (a + c) b"}
    turned = {"rule": "w", "right": "w", "layout": "a (b c) -> c a b", "dims": {"b": 5}}
    (tmp_path / "mine.json").write_text(json.dumps({"rules": [fused, turned]}))
    q, k, w = random_tensor(8, 30).t(), random_tensor(30, 16, seed=1)[:, ::2], random_tensor(20, 9, seed=2).t()
    torch.save({"q": q, "k": k, "w": w}, tmp_path / "x.pt")
    with small_tiles():
        wanted = {"qk": torch.cat([q, k]), "w": w.reshape(9, 5, 4).permute(2, 0, 1)}
        assert run("convert", tmp_path / "x.pt", tmp_path / "y", "--recipe", tmp_path / "mine.json", "--verify", "--quiet") == 0
        assert_same(read(tmp_path / "y"), wanted)
        assert run("verify", tmp_path / "x.pt", tmp_path / "y", "--recipe", tmp_path / "mine.json") == 0
        assert run("convert", tmp_path / "x.pt", tmp_path / "z", "--dtype", "bf16", "--verify", "--quiet") == 0
        assert_same(read(tmp_path / "z"), {"q": q.bfloat16(), "k": k.bfloat16(), "w": w.bfloat16()})


def test_differences_are_found_whichever_side_is_strided(tmp_path, capsys):
    tensor = random_tensor(300, 200)
    other = tensor.clone()
    other[17, 3] += 1
    for name, value in {"a.pt": tensor.t(), "b.pt": other.t(), "c.pt": other.t().contiguous(), "d.pt": tensor.t().contiguous()}.items():
        torch.save({"w": value}, tmp_path / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "COMPARE", 4096)
        for left, right, code in (("a", "b", 1), ("a", "c", 1), ("c", "a", 1), ("a", "d", 0), ("d", "a", 0), ("b", "c", 0), ("a", "a", 0)):
            assert run("verify", tmp_path / f"{left}.pt", tmp_path / f"{right}.pt", "--json") == code
            assert json.loads(capsys.readouterr().out)["l2"] == pytest.approx(code, abs=1e-6)


def test_resume_of_a_strided_source(tmp_path, monkeypatch):
    torch.save({f"w{k}": random_tensor(40, 60, seed=k).t() for k in range(4)}, tmp_path / "x.pt")
    arguments = ("convert", tmp_path / "x.pt", tmp_path / "y", "--max-shard-size", "10KB", "--quiet")
    wanted = torch.load(tmp_path / "x.pt")
    real, calls = evaluate.evaluate, iter(range(100))

    def fail(*given: object) -> None:
        if next(calls) == 3:
            raise OSError(5, "Input/output error")
        real(*given)

    monkeypatch.setattr(evaluate, "evaluate", fail)
    assert run(*arguments) == 3
    monkeypatch.setattr(evaluate, "evaluate", real)
    assert run(*arguments, "--resume", "--verify") == 0
    assert_same(read(tmp_path / "y"), wanted)


def test_the_source_of_several_views_is_given_back_when_the_last_is_made(tmp_path):
    base = random_tensor(64, 96)
    tensors = {"even": base[::2], "odd": base[1::2], "t": base.t()}
    torch.save(tensors, tmp_path / "x.pt")
    wanted = {name: tensor.clone() for name, tensor in tensors.items()}
    given = ("convert", tmp_path / "x.pt", tmp_path / "y", "--max-shard-size", "10KB", "--reclaim-source", "--yes", "--quiet")
    assert run(*given) == 0
    assert_same(read(tmp_path / "y"), wanted)
    assert not (tmp_path / "x.pt").exists()


# Servers -----------------------------------------------------------------------------------------------------------


def test_a_view_behind_a_url_takes_few_requests(tmp_path, monkeypatch):
    """A matrix of 6 MB by columns, and every other element of a vector: 1.5 million pieces."""
    tensors = {"t": random_tensor(1000, 1500).t(), "steps": random_tensor(500_000)[::2]}
    (tmp_path / "served").mkdir()
    torch.save(tensors, tmp_path / "served" / "x.pt")
    monkeypatch.setattr(fitting, "TILE", 1 << 20)
    monkeypatch.setattr(fitting, "SCATTERED_TILE", 1 << 20)
    with nginx(tmp_path / "served") as server, flaky(server.url) as proxy:
        url = f"{proxy.url}/x.pt"
        assert run("convert", url, tmp_path / "y.safetensors", "--quiet") == 0
        assert len(proxy.requests) < 40
        first = len(proxy.requests)
        assert run("verify", url, tmp_path / "y.safetensors") == 0
        entry = streamconv.open(url)["t"]
        assert raw(entry.torch()) == raw(tensors["t"])
        assert len(proxy.requests) - first < 40
        first = len(proxy.requests)
        assert np.array_equal(entry[3:9, ::100], tensors["t"][3:9, ::100].numpy())
        assert len(proxy.requests) - first <= 10  # so far from each other do these lie
    assert_same(read(tmp_path / "y.safetensors"), tensors)


# The op --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [((2, 3), (3, 1), 5), ((2,), (-1,), 3), ((3,), (1,), -1), ((11,), (1,), 0)])
def test_a_view_lies_inside_what_it_looks_at(given):
    source = Source(TensorSpec(parse_dtype("float32"), (10,)), ())
    with pytest.raises(CoverageError, match="is not in float32"):
        apply(Strided(*given), source)


def test_views_that_look_the_same_way_are_equal():
    spec = TensorSpec(parse_dtype("float32"), (1, 3, 2))
    one, other, third = (stored_view(spec, strides, "x", 8) for strides in ((7, 2, 4), (0, 2, 4), (0, 4, 2)))
    assert made_of(one) == made_of(other) != made_of(third)
    assert isinstance(stored_view(spec, (99, 2, 1), "x", 8), Source)
