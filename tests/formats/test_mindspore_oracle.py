"""MindSpore itself reads what is written, and what it writes is read. It needs the numpy it was built for: 1.26."""

import itertools
import json
import subprocess
import sys
import warnings

import pytest
import torch
from checkpoint_files import assert_same, random_tensor, raw, read, refusal, run, write
from hypothesis import given, settings
from hypothesis import strategies as st

from streamconv.checkpoint.opening import open_checkpoint
from streamconv.errors import FormatError
from streamconv.formats import mindspore as fmt

pytestmark = pytest.mark.oracle

DTYPES = ["bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "float16", "bfloat16", "float32", "float64"]


@pytest.fixture(scope="module")
def ms():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("mindspore")
        try:
            library.Tensor([1.0], library.bfloat16).asnumpy()
        except TypeError:
            pytest.skip("mindspore has bfloat16 only with the numpy it was built for")
        return library


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def dtype_in(ms, tensor):
    name = str(tensor.dtype).removeprefix("torch.")
    return getattr(ms, {"bool": "bool_"}.get(name, name))


def to_mindspore(ms, tensor):
    """The same bits as a MindSpore tensor."""
    if tensor.dtype is torch.bfloat16:  # every bfloat16 is a float32
        return ms.Tensor(tensor.float().numpy(), dtype=ms.bfloat16)
    return ms.Tensor(tensor.numpy())


def given_tensors():
    """Of every dtype, and of no axes; of numbers whose bits MindSpore keeps."""
    of_types = {dtype: (torch.arange(24) % 5 - 2).to(getattr(torch, dtype)).reshape(2, 3, 4) for dtype in DTYPES}
    return of_types | {"scalar": torch.tensor(3.5), "one": torch.ones(1), "Größe.日本.😀": random_tensor(7, dtype=torch.bfloat16)}


def save(ms, path, tensors, **options):
    ms.save_checkpoint([{"name": name, "data": to_mindspore(ms, tensor)} for name, tensor in tensors.items()], str(path), **options)
    return path


def check_loaded(ms, path, wanted, **options):
    """MindSpore finds these names, in this order, dtypes, shapes and bytes."""
    loaded = ms.load_checkpoint(str(path), **options)
    assert list(loaded) == list(wanted)
    for name, tensor in wanted.items():
        found = loaded[name]
        assert (found.dtype, tuple(found.shape)) == (dtype_in(ms, tensor), tuple(tensor.shape)), name
        assert found.asnumpy().tobytes() == raw(tensor), name


def check_read(path, wanted):
    """So do we."""
    checkpoint = open_checkpoint(path)
    assert list(checkpoint) == list(wanted)
    for name, tensor in wanted.items():
        assert (checkpoint[name].dtype, checkpoint[name].shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        assert raw(checkpoint[name].torch()) == raw(tensor), name


def in_order_of(path, tensors):
    return {name: tensors[name] for name in open_checkpoint(path)}


def in_a_process(*arguments):
    """Beside the gigabytes that MindSpore takes, in little memory."""
    command = [sys.executable, "-m", "streamconv", *map(str, arguments), "--max-memory", "500MB", "--quiet"]
    subprocess.run(command, check=True, timeout=600)


def test_mindspore_reads_what_is_written(ms, tmp_path):
    source = write(tmp_path / "st", given_tensors() | {"none": torch.empty(0, 4), "nothing": torch.empty(3, 0, 2)}, shards=3)
    assert run("convert", source, tmp_path / "x.ckpt", "--verify", "--quiet") == 0
    tensors = in_order_of(source, read(source))
    check_loaded(ms, tmp_path / "x.ckpt", tensors)
    check_loaded(ms, tmp_path / "x.ckpt", tensors, crc_check=True)
    assert run("convert", source, tmp_path / "out", "--format", "mindspore", "--dtype", "bfloat16", "--quiet") == 0
    check_loaded(ms, tmp_path / "out" / "model.ckpt", {k: t.bfloat16() if t.is_floating_point() else t for k, t in tensors.items()})


def test_what_is_written_is_what_mindspore_writes(ms, tmp_path):
    source = write(tmp_path / "st", given_tensors(), shards=2)
    assert run("convert", source, tmp_path / "ours.ckpt", "--quiet") == 0
    theirs = save(ms, tmp_path / "theirs.ckpt", in_order_of(source, given_tensors()))
    assert (tmp_path / "ours.ckpt").read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    "options", [{}, {"crc_check": True}, {"append_dict": {"epoch": 3, "lr": 0.5, "done": True, "note": "hi"}}], ids=str
)
def test_what_mindspore_writes_is_read(ms, tmp_path, options):
    path = save(ms, tmp_path / "theirs.ckpt", given_tensors(), **options)
    added = {"epoch": torch.tensor(3), "lr": torch.tensor(0.5), "done": torch.tensor(True)} if "append_dict" in options else {}  # noqa: FBT003
    check_read(path, given_tensors() | added)
    assert [note for note in open_checkpoint(path).contents.notes if "'note'" in note] or not added
    assert run("convert", path, tmp_path / "x.safetensors", "--verify", "--quiet") == 0
    assert_same(read(tmp_path / "x.safetensors"), given_tensors() | added)


@pytest.mark.parametrize("mode", ["AES-GCM", "AES-CBC", "SM4-CBC"])
def test_encrypted_files_are_refused(ms, tmp_path, capsys, mode):
    path = save(ms, tmp_path / "x.ckpt", given_tensors(), enc_key=b"0123456789abcdef", enc_mode=mode)
    assert "encrypted" in refusal(capsys, "inspect", path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mib", [512, 572])
def test_a_tensor_over_the_limit(ms, tmp_path, dtype, mib):
    """The real limit: exactly 512 MiB is one record, more are two."""
    rows = mib * 256 // dtype.itemsize
    big = torch.arange(rows * 4096, dtype=torch.int32).remainder_(251).to(dtype).reshape(rows, 4096)
    tensors = {"a": torch.ones(3), "big": big, "z": torch.tensor([4.0])}
    path = save(ms, tmp_path / "theirs.ckpt", tensors)
    assert len(open_checkpoint(path)["big"].source.extents) == 1 + (mib > 512)
    in_a_process("convert", path, tmp_path / "ours.ckpt", "--verify")
    assert (tmp_path / "ours.ckpt").read_bytes() == path.read_bytes()
    in_a_process("convert", path, tmp_path / "x.safetensors")
    assert torch.equal(read(tmp_path / "x.safetensors")["big"], big)
    in_a_process("convert", tmp_path / "x.safetensors", tmp_path / "half.ckpt", "--dtype", "float16")
    found = ms.load_checkpoint(str(tmp_path / "half.ckpt"))["big"].asnumpy()
    assert found.shape == (rows, 4096)
    assert (found == big.half().numpy()).all()
    check_loaded(ms, tmp_path / "ours.ckpt", tensors)
    for file in tmp_path.iterdir():
        file.unlink()  # gigabytes


SHAPES = st.lists(st.integers(1, 9), max_size=4).map(tuple)


@given(st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_any_slices_are_those_of_mindspore(ms, tmp_path_factory, model):
    """With its limit lowered to 1 KiB; and what it writes asynchronously, which is cut at rows, is read."""
    from mindspore.train import serialization

    folder = tmp_path_factory.mktemp("model")
    counter = itertools.count(1)
    tensors = {
        f"w{next(counter)}": (torch.arange(torch.Size(shape).numel()) % 97).reshape(shape).to(getattr(torch, dtype))
        for dtype, shape in model
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serialization, "SLICE_SIZE", 1)
        patch.setattr(fmt, "SLICE", 1 << 10)
        theirs = save(ms, folder / "theirs.ckpt", tensors)
        assert run("convert", theirs, folder / "ours.ckpt", "--quiet") == 0
    assert (folder / "ours.ckpt").read_bytes() == theirs.read_bytes()
    check_read(theirs, tensors)
    check_loaded(ms, folder / "ours.ckpt", tensors)


def test_what_is_saved_asynchronously_is_read(ms, tmp_path, monkeypatch):
    from mindspore.train import serialization

    monkeypatch.setattr(serialization, "SLICE_SIZE", 1)
    tensors = {"w": random_tensor(7, 100), "b": random_tensor(29)}
    path = save(ms, tmp_path / "x.ckpt", tensors, async_save="thread")
    serialization._wait_async_thread_save_ckpt()
    check_read(path, tensors)
    assert len(open_checkpoint(path)["w"].source.extents) == 3


def test_the_safetensors_form(ms, tmp_path):
    path = save(ms, tmp_path / "theirs.safetensors", given_tensors(), format="safetensors")
    assert_same({name: entry.torch() for name, entry in open_checkpoint(path).items()}, given_tensors())
    assert run("convert", path, tmp_path / "x.ckpt", "--quiet") == 0
    assert run("convert", tmp_path / "x.ckpt", tmp_path / "y.safetensors", "--quiet") == 0
    check_loaded(ms, tmp_path / "y.safetensors", dict(sorted(given_tensors().items())), format="safetensors")


def test_the_map_of_unified_safetensors(ms, tmp_path):
    from mindspore.parallel import transform_safetensors

    folder = tmp_path / "unified"
    folder.mkdir()
    tensors = {"a": random_tensor(4, 5), "b": random_tensor(6), "c": random_tensor(2, 2)}
    for number, names in enumerate([["b", "c"], ["a"]]):
        save(ms, folder / f"part{number}.safetensors", {name: tensors[name] for name in names}, format="safetensors")
    save(ms, folder / "hyper_param.safetensors", {"global_step": torch.tensor([7])}, format="safetensors")
    transform_safetensors._save_parameter_map_json([["b", "c"], ["a"]], None, (), str(folder), 112)
    assert json.loads((folder / "param_name_map.json").read_text())["weight_map"]["a"] == "part1.safetensors"
    found = {name: entry.torch() for name, entry in open_checkpoint(folder).items()}
    assert_same(found, tensors | {"global_step": torch.tensor([7])})
    (folder / "part1.safetensors").unlink()
    with pytest.raises(FormatError, match=r"part1\.safetensors"):
        open_checkpoint(folder)
