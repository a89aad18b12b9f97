"""The calls as a notebook uses them: what shows itself is short, an entry is read like an array, what libraries say is understood."""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys
from io import FileIO
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoint_files import ROOMY, assert_same, random_tensor, raw, read, write
from hypothesis import given, settings
from hypothesis import strategies as st

import streamconv
from streamconv.dtypes import DTYPES, parse_dtype
from streamconv.errors import StreamconvError, UsageError

SHAPES = {"w": (5, 6, 7), "flat": (9,), "scalar": (), "empty": (0, 3)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> streamconv.Checkpoint:
    tensors = {name: random_tensor(*shape) for name, shape in SHAPES.items()}
    tensors |= {"half": random_tensor(4, 6, dtype=torch.bfloat16), "eighth": random_tensor(4, 6).to(torch.float8_e4m3fn)}
    return streamconv.open(write(tmp_path_factory.mktemp("notebook") / "source", tensors))


# Reading -----------------------------------------------------------------------------------------------------------

INDICES = [
    0, -1, slice(None), slice(1, 4), slice(None, None, 2), slice(4, None, -2), slice(None, None, -1), slice(3, 3), slice(-100, 100), ...,
    None, (), (1,), (1, 2), (1, 2, 3), (..., 3), (slice(1, 3), 2), (slice(1, 5, 3), slice(None), slice(6, 0, -2)),
    (..., slice(None, None, 3)),
    (2, ..., 4), (None, 1, ..., None), (slice(None, None, -1), 0, slice(None, None, -3)), (np.int64(2), slice(None)), (0, ..., 1, 2),
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_an_index_is_numpys(checkpoint, index):
    whole = checkpoint["w"].numpy()
    found, wanted = checkpoint["w"][index], whole[index]
    assert (type(found), found.dtype, found.shape) == (type(wanted), wanted.dtype, wanted.shape)
    assert np.array_equal(found, wanted)
    assert np.array_equal(checkpoint["w"].torch(index).numpy(), wanted)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_basic_index_is_numpys(checkpoint, data):
    name = data.draw(st.sampled_from(list(SHAPES)))
    shape = SHAPES[name]
    whole, index = checkpoint[name].numpy(), []
    for size in shape[: data.draw(st.integers(0, len(shape)))]:
        ends = st.none() | st.integers(-size - 2, size + 2)
        one = st.slices(size) | st.builds(slice, ends, ends, st.sampled_from([None, 1, 2, 3, -1, -2]))
        index.append(data.draw(one | st.integers(-size, size - 1) if size else one))
    if data.draw(st.booleans()):
        index.insert(data.draw(st.integers(0, len(index))), None)
    assert np.array_equal(checkpoint[name][tuple(index)], whole[tuple(index)])


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (5, "index 5 is out of bounds for axis 0 of 5"),
        ((0, -7), "index -7 is out of bounds for axis 1 of 6"),
        ((0, 0, 0, 0), "4 indices, and its shape [5, 6, 7] has 3 axes"),
        ((..., ...), "one ellipsis"),
        ([1, 2], "found a list: index what .numpy() gives instead"),
        (True, "found a bool"),
        (1.5, "found a float"),
        (np.array([1, 2]), "found a ndarray"),
        ("w", "found a str"),
    ],
)
def test_what_is_no_index_is_said(checkpoint, index, said):
    with pytest.raises(IndexError) as caught:
        checkpoint["w"][index]
    assert isinstance(caught.value, StreamconvError)
    assert said in str(caught.value)


def test_no_more_is_read_than_an_index_takes(tmp_path, monkeypatch):
    """Of a file that holds only its header, a hole and the rows that are asked for."""
    matrix = random_tensor(1000, 500)
    write(tmp_path / "x", {"w": matrix})
    entry = streamconv.open(tmp_path / "x")["w"]
    taken = []
    monkeypatch.setattr("streamconv.checkpoint.entries.FileIO", lambda path: Counting(path, taken))
    for index, most in ((slice(10, 12), 4000), ((7, 3), 4), ((slice(None, None, 100), 5), 40), ((3, slice(None, None, 50)), 2000)):
        taken.clear()
        assert np.array_equal(entry[index], matrix.numpy()[index])
        assert sum(taken) <= most


class Counting:
    """A file that notes how much of it is read."""

    def __init__(self, path: str, taken: list[int]) -> None:
        self._file, self._taken = FileIO(path), taken
        self.seek, self.close = self._file.seek, self._file.close

    def readinto(self, view: memoryview) -> int:
        self._taken.append(len(view))
        return self._file.readinto(view)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def test_arrays_of_every_type(checkpoint):
    assert np.array_equal(np.asarray(checkpoint["w"]), checkpoint["w"].numpy())
    assert np.asarray(checkpoint["w"], dtype=np.float64).dtype == np.float64
    assert np.array(checkpoint["half"]).dtype == ml_dtypes.bfloat16
    assert checkpoint["eighth"][1:3, ::2].dtype == ml_dtypes.float8_e4m3fn
    assert raw(checkpoint["half"].torch((slice(1, 3), 4))) == raw(checkpoint["half"].torch()[1:3, 4])
    assert np.mean(checkpoint["w"]) == np.mean(checkpoint["w"].numpy())
    assert len(list(checkpoint["w"])) == 5
    assert np.asarray(checkpoint["scalar"]).shape == ()
    with pytest.raises(ValueError, match="leave out copy=False"):
        np.array(checkpoint["w"], copy=False)


def test_strided_entries_are_indexed_too(tmp_path):
    view = random_tensor(40, 50).t()[::3]
    torch.save({"w": view}, tmp_path / "x.pt")
    entry = streamconv.open(tmp_path / "x.pt")["w"]
    for index in INDICES:
        if not isinstance(index, tuple) or len([one for one in index if one is not None and one is not ...]) < 3:
            assert np.array_equal(entry[index], view.numpy()[index])


def test_names_by_pattern(tmp_path):
    names = [f"model.layers.{k}.{part}.weight" for k, part in itertools.product(range(3), ("q", "k"))] + ["model.norm.weight"]
    checkpoint = streamconv.open(write(tmp_path / "x", {name: torch.ones(1) for name in names}))
    assert sorted(checkpoint.keys()) == sorted(names)
    assert len(checkpoint.keys("model.layers.{i}.q.weight")) == len(checkpoint.keys("*.q.*")) == len(checkpoint.keys(".q.")) == 3
    assert list(checkpoint.keys("norm")) == ["model.norm.weight"]
    assert not checkpoint.keys("nothing of the kind")


# Showing -----------------------------------------------------------------------------------------------------------


def test_what_shows_itself_is_short(tmp_path):
    tensors = {f"layers.{k}.<b>&\n": torch.ones(2, 3) for k in range(300)}
    source = write(tmp_path / "source", tensors)
    plan = streamconv.plan(source, tmp_path / "target", dtype="float16", max_memory=ROOMY)
    result = streamconv.run(plan)
    checkpoint = streamconv.open(source)
    found = streamconv.verify(source, tmp_path / "target", max_memory=ROOMY)
    for shown in (plan, result, checkpoint, checkpoint["layers.7.<b>&\n"], found):
        text, html = repr(shown), shown._repr_html_()
        assert len(text) < 300
        assert "\n" not in text
        assert len(html) < 6000
        assert html.startswith("<table>")
        assert html.endswith("</table>")
        assert "<b>" not in html
    assert repr(plan).startswith(f"<Plan {tmp_path / 'target'} (safetensors): 300 tensors, ")
    assert repr(result).startswith("<Result of <Plan ")
    assert repr(checkpoint["layers.7.<b>&\n"]) == r"<TensorEntry layers.7.<b>&\n: float32[2, 3], 24 B>"
    assert repr(found) == "<Comparison of 300 tensors: 300 differ>"
    assert "layers.0.&lt;b&gt;&amp;\\n" in checkpoint._repr_html_()
    assert "... and 280 more" in checkpoint._repr_html_()


# Calls -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["fp16", "torch.float16", torch.float16, np.float16, np.dtype("float16"), np.dtype("<f2")])
def test_a_dtype_may_be_that_of_a_library(tmp_path, given):
    tensors = {"w": random_tensor(3, 4)}
    source = write(tmp_path / "source", tensors)
    result = streamconv.convert(source, tmp_path / "target", dtype=given, max_memory=ROOMY)
    assert result.plan.mapping[0].spec.dtype.name == "float16"
    assert_same(read(tmp_path / "target"), {"w": tensors["w"].half()})
    assert streamconv.verify(source, tmp_path / "target", dtype=given, max_memory=ROOMY).equal
    recipe = streamconv.Recipe("mine", "", (streamconv.Rule("w", "w", cast=given),))
    assert streamconv.plan(source, tmp_path / "other", recipe=recipe, max_memory=ROOMY).mapping[0].spec.dtype.name == "float16"
    assert streamconv.convert(source, tmp_path / "target", dtype=given, resume=True, max_memory=ROOMY).plan.mapping[0].spec.numel == 12


def test_every_type_of_the_libraries_is_known():
    for name in DTYPES:
        for library in (torch, np, ml_dtypes):
            kind = getattr(library, "bool_" if (library, name) == (np, "bool") else name, None)
            assert kind is None or parse_dtype(kind).name == name
    for wrong in (3, None, dict, "floaty", torch.complex32):
        with pytest.raises(UsageError, match="unknown dtype"):
            parse_dtype(wrong)


def test_a_function_is_told_how_far_a_run_is(tmp_path):
    source = write(tmp_path / "source", {"w": random_tensor(300, 400)})
    told: list[tuple[int, int]] = []
    result = streamconv.convert(source, tmp_path / "target", progress=lambda done, total: told.append((done, total)), max_memory=ROOMY)
    total = result.plan.totals.bytes_written
    assert told[-1] == (total, total)
    assert told == sorted(told)
    told.clear()
    assert streamconv.verify(source, tmp_path / "target", progress=lambda *at: told.append(at), max_memory=ROOMY).equal
    assert told == [(480_000, 480_000)]


def test_the_signature_is_the_real_one():
    names = {call: set(inspect.signature(getattr(streamconv, call)).parameters) for call in ("convert", "plan", "run")}
    assert names["plan"] <= names["convert"]
    kinds = {one.kind for one in inspect.signature(streamconv.convert).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    with pytest.raises(TypeError, match="max_memroy"):
        streamconv.convert("a", "b", max_memroy=1)


def test_doctor_and_recipes(tmp_path):
    source = write(tmp_path / "source", {"w": random_tensor(3, 4)}, config={"model_type": "toy"})
    found = streamconv.doctor(source)
    assert (found.tensors, found.recipes) == (1, [])
    assert [finding.where for finding in streamconv.doctor(write(tmp_path / "other", {"w": torch.ones(3, 4)}), data=True).findings]
    assert streamconv.recipes.match(source) == found.recipes
    code = (
        "import streamconv, streamconv.diagnose.doctor, streamconv.cli; assert callable(streamconv.doctor) and callable(streamconv.verify)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_the_package_says_that_it_is_typed():
    assert (Path(streamconv.__file__).parent / "py.typed").read_bytes() == b""
