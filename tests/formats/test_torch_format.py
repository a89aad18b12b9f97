"""The torch container, with torch itself as the oracle: what torch.load reads and, byte for byte, what torch.save writes."""

import io
import itertools
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections import Counter, OrderedDict

import pytest
import torch
from checkpoint_files import stored
from huggingface_hub import save_torch_state_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from streamconv.checkpoint.opening import ties
from streamconv.digests import patches
from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import FormatError, StreamconvError, UsageError
from streamconv.formats import Contents, Extent, Source, safetensors
from streamconv.formats import torch as fmt
from streamconv.storage.locations import locate

NAMES = [name for name in DTYPES if not name.startswith(("float6", "float4"))]
LEGACY = {"_use_new_zipfile_serialization": False}


def make(name, *shape):
    dtype = getattr(torch, name)
    numel = torch.Size(shape).numel()
    raw = torch.arange(numel * torch.empty((), dtype=dtype).element_size(), dtype=torch.uint8)
    if dtype is torch.bool:
        raw = raw % 2
    return raw.view(dtype).reshape(shape)


def all_types():
    return {name: make(name, 2, 3) for name in NAMES} | {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "Größe.日本.😀": torch.ones(3),
    }


def bytes_of(tensor):
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def spec_of(tensor):
    return TensorSpec(DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))


def specs_of(tensors):
    return {name: spec_of(tensor) for name, tensor in tensors.items()}


def flat(tree, prefix=""):
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in pairs:
        name = f"{prefix}{key}"
        if torch.is_tensor(value):
            yield name, value
        elif isinstance(value, dict | list | tuple):
            yield from flat(value, f"{name}.")


def check_equal(contents, tensors):
    assert set(contents.entries) == set(tensors)
    for name, tensor in tensors.items():
        assert contents.entries[name].spec == spec_of(tensor), name
        assert stored(contents.entries[name]) == bytes_of(tensor), name


def listing(directory):
    return sorted(path.name for path in directory.iterdir())


def saved(path, tree, **options):
    torch.save(tree, path, **options)
    return path


# Reading ---------------------------------------------------------------------------------------------------------


class Tagged(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(5, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


def tagged():
    tensor = torch.arange(4.0)
    tensor.note = "kept with the tensor"
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.partition = 1
    return {"tensor": tensor, "parameter": parameter}


def views():
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "base": base,
        "rows": base[1:3],
        "columns": base[:, 2:4],
        "transposed": base.t(),
        "steps": base[::2, ::3],
        "expanded": base[0].expand(3, 6),
        "none": base[2:2],
        "flat": base.view(-1),
        "odd axis": base[:, :1],
    }


TREES = {
    "types": all_types,
    "state_dict": lambda: Tagged().state_dict(),
    "views": views,
    "parameters": lambda: {"a": torch.nn.Parameter(torch.ones(3)), "b": torch.nn.Parameter(torch.ones(2), requires_grad=False)},
    "attributes": tagged,
    "lists": lambda: {"layers": [torch.ones(1), (torch.zeros(2), {"x": torch.ones(3)})], 7: torch.ones(7)},
    "ordered": lambda: OrderedDict(b=torch.ones(2), a=torch.zeros(2)),
    "nested": lambda: {"vision": {"w": torch.ones(2)}, "text": {"w": torch.ones(3), "deep": {"x": torch.ones(1)}}},
}


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", TREES)
def test_read_equals_torch_load(tmp_path, kind, options):
    tree = TREES[kind]()
    path = saved(tmp_path / "x.pt", tree, **options)
    if options and kind == "types":  # torch cannot load its newest types from the old format; they are in the file all the same
        check_equal(fmt.read(locate(path)), tree)
    else:
        check_equal(fmt.read(locate(path)), dict(flat(torch.load(path, weights_only=True))))


def test_offsets_are_those_that_torch_gives(tmp_path):
    """Guards the private attribute, should a reader ever want it, and our own offsets against torch's."""
    path = saved(tmp_path / "x.bin", all_types())
    contents = fmt.read(locate(path))
    for name, tensor in torch.load(path, weights_only=True, map_location="meta").items():
        assert contents.entries[name].extents[0].offset == tensor.untyped_storage()._checkpoint_offset


def test_reading_does_not_import_torch(tmp_path):
    path = saved(tmp_path / "x.bin", all_types())
    code = (
        "import sys; from streamconv.formats import torch as fmt; from streamconv.storage.locations import locate; "
        "fmt.read(locate(sys.argv[1]))"
    )
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, path], check=True, timeout=600)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_strided_views(tmp_path_factory, data):
    base = torch.arange(60.0)
    shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
    stride = data.draw(st.lists(st.integers(0, 5), min_size=len(shape), max_size=len(shape)))
    view = base.as_strided(shape, stride, data.draw(st.integers(0, 15)))
    path = saved(tmp_path_factory.mktemp("views") / "x.pt", {"v": view}, **data.draw(st.sampled_from([{}, LEGACY])))
    check_equal(fmt.read(locate(path)), {"v": view})


def test_what_lies_row_by_row_is_stored_and_all_else_a_view(tmp_path):
    contents = fmt.read(locate(saved(tmp_path / "x.pt", views())))
    whole = {name for name, node in contents.entries.items() if isinstance(node, Source)}
    assert whole == {"base", "rows", "flat", "none"}
    spans = {name: node.inputs[0].spec.numel for name, node in contents.entries.items() if name not in whole}
    assert spans == {"columns": 20, "transposed": 24, "steps": 16, "expanded": 6, "odd axis": 19}


ONE = torch.ones(1)
ROOTS = [
    ({"state_dict": {"w": ONE}, "epoch": 3, "optimizer": {"m": ONE}}, None, "state_dict", ["w"], ["epoch", "optimizer"]),
    ({"module": {"a": {"w": ONE}, "step": 3}}, None, "module", ["a.w"], ["module.step"]),
    ({"model": {"w": ONE}, "w": ONE}, None, "", ["model.w", "w"], []),
    ({"model": {"lr": 1}, "module": {"w": ONE}}, None, "module", ["w"], ["model"]),
    ({"model_state_dict": OrderedDict(w=ONE)}, "", "", ["model_state_dict.w"], []),
    ({"ema": {"shadow": {"w": ONE}, "n": 1}, "model": {"w": ONE}}, "ema.shadow", "ema.shadow", ["w"], ["model", "ema.n"]),
    ({"a.b": {"w": ONE}}, "a.b", "a.b", ["w"], []),
    (
        {"w": ONE, "args": {"lr": 0.1, "betas": [0.9, 0.99]}, "x": None, "ids": {1, 2}},
        None,
        "",
        ["w"],
        ["args.lr", "args.betas", "x", "ids"],
    ),
]


@pytest.mark.parametrize(("tree", "root", "found", "names", "left_out"), ROOTS)
def test_roots_and_what_is_left_out(tmp_path, tree, root, found, names, left_out):
    contents = fmt.read(locate(saved(tmp_path / "x.pth", tree)), root=root)
    assert (contents.root, sorted(contents.entries), contents.left_out) == (found, names, left_out)


def test_an_unknown_root_lists_the_keys(tmp_path):
    with pytest.raises(UsageError, match=r"no key 'ema'.*'w'"):
        fmt.read(locate(saved(tmp_path / "x.pth", {"w": torch.ones(1)})), root="ema")


def test_values_that_are_made_by_calls_are_left_out_and_not_made(tmp_path):
    class Bomb:
        def __reduce__(self):
            return bytearray, (10**13,)

    tree = {"w": torch.ones(1), "bomb": Bomb(), "counts": Counter("aab"), "z": 1j, "device": torch.device("cpu"), "bytes": b"x"}
    contents = fmt.read(locate(saved(tmp_path / "x.pth", tree)))
    assert (list(contents.entries), contents.left_out) == (["w"], ["bomb", "counts", "z", "device", "bytes"])


def test_ties_are_those_of_huggingface_hub_under_the_first_name(tmp_path):
    shared, other = torch.ones(3, 4), torch.ones(2)
    tensors = {
        "z": shared,
        "b": shared.view(3, 4),
        "c": other,
        "a": shared[:],
        "alone": torch.ones(2),
        "d": other[:],
        "none": torch.ones(0),
    }
    contents = fmt.read(locate(saved(tmp_path / "x.bin", tensors)))
    (tmp_path / "hub").mkdir()
    save_torch_state_dict(dict(tensors), tmp_path / "hub")
    _, metadata = safetensors.read_file(locate(tmp_path / "hub" / "model.safetensors"))
    assert ties(contents) == {"b": "z", "a": "z", "d": "c"}
    groups = [{name, *(other for other, kept in metadata.items() if kept == name)} for name in set(metadata.values()) - {"pt"}]
    assert sorted(map(sorted, groups)) == [["a", "b", "z"], ["c", "d"]]
    extent = (Extent("x", 0, 4),)
    same = Contents(
        "torch", {"a": Source(TensorSpec(DTYPES["float32"], (1,)), extent), "b": Source(TensorSpec(DTYPES["int32"], (1,)), extent)}, []
    )
    assert ties(same) == {}, "the same bytes read in two ways are two tensors"


TWO = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]


def write_index(directory, weight_map, name=fmt.INDEX):
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_directory_by_index(tmp_path):
    files = TWO
    saved(tmp_path / files[0], {"z": torch.ones(2)})
    saved(tmp_path / files[1], {"a": torch.zeros(3)}, **LEGACY)
    write_index(tmp_path, {"a": files[1], "z": files[0]})
    contents = fmt.read(locate(tmp_path))
    assert (list(contents.entries), [file.local for file in contents.others]) == (["z", "a"], [tmp_path / fmt.INDEX])
    assert [file.local for file in contents.files] == [tmp_path / name for name in files]
    check_equal(contents, {"z": torch.ones(2), "a": torch.zeros(3)})
    write_index(tmp_path, {"a": files[1], "z": files[0], "more": files[0]})
    with pytest.raises(FormatError, match="'more' is in no file"):
        fmt.read(locate(tmp_path))
    for outside in ("../x.bin", "/etc/x.bin", "x.pkl", "a//b.bin"):
        write_index(tmp_path, {"a": outside})
        with pytest.raises(FormatError, match=r"expected a .* file below this directory"):
            fmt.read(locate(tmp_path))


CHOICES = [
    (["pytorch_model.bin", "pytorch_model.fp16.bin", "model.pth"], ["pytorch_model.bin"]),
    ([*TWO, "training_args.bin"], TWO),
    (["consolidated.00.pth", "consolidated.01.pth", "other.pth", "x.pt"], ["consolidated.00.pth", "consolidated.01.pth"]),
    (["a.pth", "rng_state_0.pth"], ["a.pth"]),
    (["optimizer.pt", "scheduler.pt", "x.pt"], ["x.pt"]),
    (["training_args.bin", "y.bin"], ["y.bin"]),
]  # fmt: skip


@pytest.mark.parametrize(("there", "chosen"), CHOICES)
def test_directory_without_index(tmp_path, there, chosen):
    for name in there:
        saved(tmp_path / name, {name: torch.ones(1)})
    contents = fmt.read(locate(tmp_path))
    assert [path.name for path in contents.files] == chosen
    check_equal(contents, {name: torch.ones(1) for name in chosen})


def test_ranks_and_named_files(tmp_path):
    for rank in range(3):
        saved(tmp_path / f"consolidated.{rank:02d}.pth", {"w": torch.full((2,), float(rank)), "step": rank})
    with pytest.raises(FormatError, match="'w' is in both"):
        fmt.read(locate(tmp_path))
    contents = fmt.read(locate(tmp_path), by_rank=True, files=["consolidated.02.pth", "consolidated.00.pth"])
    assert list(contents.entries) == ["consolidated.02.pth/w", "consolidated.00.pth/w"]
    assert contents.left_out == ["consolidated.02.pth/step", "consolidated.00.pth/step"]
    with pytest.raises(FormatError, match=r"not there, such as 'consolidated\.09\.pth'"):
        fmt.read(locate(tmp_path), files=["consolidated.09.pth"])


def test_incomplete_directories(tmp_path):
    with pytest.raises(FormatError, match=r"no \*\.bin, \*\.pt, \*\.pth"):
        fmt.read(locate(tmp_path))
    saved(tmp_path / "pytorch_model-00001-of-00003.bin", {"w": torch.ones(1)})
    with pytest.raises(FormatError, match="1 of the 3 files"):
        fmt.read(locate(tmp_path))


# Hostile and damaged files ---------------------------------------------------------------------------------------


def forge(path, pickled, entries=(), folder="x", **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr(f"{folder}/data.pkl", pickled)
        for name, data in entries:
            archive.writestr(name, data)
    return path


def tensor_pickle(numel, shape=(1,), stride=(1,), offset=0, storage="FloatStorage", key="0"):
    """{"w": a tensor}, as torch.save writes it, with what it says about itself."""

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj):
            return ("storage", getattr(torch, storage), key, "cpu", numel) if obj is marker else None

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (marker, offset, shape, stride, False, OrderedDict())

    marker, out = object(), io.BytesIO()
    Pickler(out, protocol=2).dump({"w": Tensor()})
    return out.getvalue()


class Call:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def with_entry(path, name):
    saved(path, {"w": torch.ones(1)})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, "more")
    return path


@pytest.mark.parametrize("name", ["x/", "x/code/", "x/metadata/info.json"])
def test_entries_that_torch_does_not_look_at(tmp_path, name):
    path = with_entry(tmp_path / "x.pt", name)
    assert list(fmt.read(locate(path)).entries) == list(torch.load(path, weights_only=True)) == ["w"]


def edit(path, tree, find, replace):
    raw = saved(path, tree).read_bytes()
    assert raw.count(find) >= 1
    path.write_bytes(raw.replace(find, replace))
    return path


def tar(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return path


def shifted_directory(path):
    raw = bytearray(saved(path, {"w": torch.ones(4)}).read_bytes())
    at = raw.index(b"PK\1\2", raw.index(b"PK\1\2") + 1)
    struct.pack_into("<I", raw, at + 42, 7)  # where the second entry is said to start
    path.write_bytes(raw)
    return path


def huge_directory(path):
    """A sparse file whose end says that the directory takes a gigabyte."""
    with path.open("wb") as file:
        file.write(b"PK\3\4")
        file.seek(1 << 30)
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, 1 << 30, 0, 0))
    return path


def overlapping(path):
    """Two directory entries of one local header."""
    forge(path, tensor_pickle(1), [("x/data/0", bytes(4)), ("x/data/1", bytes(4))])
    raw = bytearray(path.read_bytes())
    last = raw.rindex(b"PK\1\2")
    struct.pack_into("<I", raw, last + 42, raw.index(b"PK\3\4", 4))
    path.write_bytes(raw)
    return path


def old(path, *pickles, tail=b""):
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}]
    path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in head) + b"".join(pickles) + tail)
    return path


def legacy_numel(path, count):
    raw = saved(path, {"w": torch.ones(4)}, **LEGACY).read_bytes()
    path.write_bytes(raw[:-24] + struct.pack("<q", count) + raw[-16:])
    return path


def edit_old(path):
    raw = saved(path, {"w": torch.ones(4)}, **LEGACY).read_bytes()
    at = raw.index(b"little_endian")
    path.write_bytes(raw[:at] + raw[at:].replace(b"\x88", b"\x89", 1))


def nested_key():
    return b"\x80\x02}" + b")" + b"\x85" * 500_000 + b"Ns."


def copies():
    """One long list, made into a shape again and again."""
    return b"\x80\x02](" + b"N" * 100_000 + b"eq\x00" + b"ctorch\nSize\nh\x00\x85R" * 600 + b"."


def itself():
    tree = {"w": torch.ones(1)}
    tree["tree"] = tree
    return tree


def doubling():
    tree = [torch.ones(1), {}]
    for _ in range(60):
        tree = [tree, tree]
    return {"w": tree}


DATA = [("x/data/0", bytes(4))]
HOSTILE = {
    "calls a shell": (lambda p: saved(p, {"w": Call(os.system, f"touch {p.parent}/ran")}), "objects of posix.system, which are not made"),
    "calls a shell, old": (lambda p: saved(p, {"w": Call(os.system, f"touch {p.parent}/ran")}, **LEGACY), "objects of posix.system"),
    "evaluates": (lambda p: saved(p, Call(eval, f"open({str(p.parent / 'ran')!r}, 'w')")), "objects of builtins.eval"),
    "loads again": (lambda p: saved(p, Call(torch.load, "other")), "objects of torch.serialization.load"),
    "a class of its own": (lambda p: forge(p, b"\x80\x02carg\nparse\n)\x81}b."), "objects of arg.parse"),
    "copyreg": (lambda p: forge(p, b"\x80\x02ccopy_reg\n_reconstructor\n."), "objects of copyreg._reconstructor"),
    "a dotted name": (lambda p: forge(p, b"\x80\x02ctorch\nTensor.__class__\n."), "objects of torch.Tensor.__class__"),
    "calls an attribute": (lambda p: forge(p, b"\x80\x02X\x01\x00\x00\x00a)R."), "calls 'a'"),
    "calls a type": (lambda p: forge(p, b"\x80\x02ctorch\nfloat32\n)R."), "objects of torch.float32"),
    "another opcode": (lambda p: forge(p, b"\x80\x04\xff."), "opcode"),
    "an instance opcode": (lambda p: forge(p, b"\x80\x02(ios\nsystem\n."), "objects of os.system"),
    "ends early": (lambda p: forge(p, b"\x80\x02}"), "EOFError"),
    "empty stack": (lambda p: forge(p, b"\x80\x02R."), "IndexError"),
    "a huge memo": (lambda p: forge(p, b"\x80\x02}r\xff\xff\xff\xff."), "remembers something as 4294967295"),
    "a huge string": (lambda p: forge(p, b"\x80\x02X\xff\xff\xff\xff."), "ends too early"),
    "a deep key": (lambda p: forge(p, nested_key()), "no tensor in it"),
    "items into a type": (lambda p: forge(p, b"\x80\x02ctorch\nSize\nNNs."), "puts items into"),
    "contains itself": (lambda p: saved(p, itself()), "contain themselves"),
    "doubles": (lambda p: saved(p, doubling()), "contain themselves"),
    "copies a list": (lambda p: forge(p, copies()), "take more than 448 MiB"),
    "10 GB in 1 KB": (lambda p: forge(p, tensor_pickle(10**10 // 4, (10**10 // 4,)), DATA), "takes 10000000000 bytes, its zip entry has 4"),
    "no such storage": (lambda p: forge(p, tensor_pickle(1, key="7"), DATA), "its zip entry is not there"),
    "a storage elsewhere": (lambda p: forge(p, tensor_pickle(1, key="../data.pkl"), DATA), "is not there"),
    "negative size": (lambda p: forge(p, tensor_pickle(-1), DATA), "describes a storage"),
    "negative offset": (lambda p: forge(p, tensor_pickle(1, offset=-1), DATA), "describes a tensor"),
    "negative stride": (lambda p: forge(p, tensor_pickle(1, (2,), (-1,)), DATA), "describes a tensor"),
    "fractional shape": (lambda p: forge(p, tensor_pickle(1, (1.0,)), DATA), "describes a tensor"),
    "beyond the storage": (lambda p: forge(p, tensor_pickle(1, (2,)), DATA), "tensor 'w': .* ends at byte 8 of a storage of 4"),
    "offset beyond": (lambda p: forge(p, tensor_pickle(1, offset=1), DATA), "ends at byte 8 of a storage of 4"),
    "uncountable": (lambda p: forge(p, tensor_pickle(1, (2**62, 2**62), (0, 0)), DATA), "2\\*\\*63"),
    "uncountably empty": (lambda p: forge(p, tensor_pickle(1, (2**62, 2**62, 0), (0, 0, 0)), DATA), "2\\*\\*63"),
    "one element, huge": (lambda p: forge(p, tensor_pickle(1, (2**60,), (0,)), DATA), "a view that repeats 4 stored bytes until"),
    "leaves its folder": (lambda p: with_entry(p, "x/../../etc/passwd"), "outside the folder"),
    "another folder": (lambda p: with_entry(p, "y/data/1"), "outside the folder"),
    "absolute": (lambda p: with_entry(p, "/etc/passwd"), "outside the folder"),
    "compressed": (lambda p: forge(p, tensor_pickle(1), DATA, compression=zipfile.ZIP_DEFLATED), "storage '0' is compressed"),
    "compressed oddly": (lambda p: forge(p, tensor_pickle(1), DATA, compression=zipfile.ZIP_BZIP2), "a way torch does not read"),
    "bad offset": (shifted_directory, "does not start at byte 7"),
    "overlapping": (overlapping, "does not start|does not lie"),
    "huge directory": (huge_directory, "directory of 1073741824 bytes"),
    "no pickle": (lambda p: forge(p, b"", folder="x/y"), "expected a data.pkl"),
    "prepended": (lambda p: p.write_bytes(b"PK\3\4junk" + saved(p, {"w": torch.ones(1)}).read_bytes()), "does not start"),
    "big-endian": (lambda p: edit(p, {"w": torch.ones(1)}, b"little", b"biggie"), "byte order is b'biggie'"),
    "not a dict": (lambda p: saved(p, torch.ones(1)), "without a name"),
    "no tensors": (lambda p: saved(p, {"epoch": 3}), "no tensor"),
    "one name twice": (lambda p: saved(p, {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}), "two tensors are named 'a.b'"),
    "complex128": (lambda p: saved(p, {"w": torch.ones(1, dtype=torch.complex128)}), "tensor 'w': it is of type complex128"),
    "packed": (lambda p: saved(p, {"w": torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}), "of type float4_e2m1fn_x2"),
    "conjugated": (lambda p: saved(p, {"w": torch.ones(1, dtype=torch.complex64).conj()}), "tensor 'w': it is conjugated"),
    "sparse": (lambda p: saved(p, {"w": torch.eye(2).to_sparse()}), "tensor 'w': made by torch._utils._rebuild_sparse_tensor"),
    "on meta": (lambda p: saved(p, {"w": torch.ones(2, device="meta")}), "tensor 'w': made by .*_rebuild_meta_tensor_no_storage"),
    "torchscript": (lambda p: forge(p, b"N.", [("x/constants.pkl", b"")]), "TorchScript"),
    "git lfs": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "tar": (tar, "weights_only=False"),
    "a number of a class": (lambda p: forge(p, b"\x80\x02\x82\x01."), "numbers of a registry"),
    "a buffer elsewhere": (lambda p: forge(p, b"\x80\x05\x97."), "buffers that are not in the file"),
    "a text for an id": (lambda p: forge(p, b"Pa\n."), "protocol 0"),
    "a newer protocol": (lambda p: forge(p, b"\x80\x06N."), "protocol 6"),
    "text": (lambda p: p.write_text("hello"), "neither a zip nor"),
    "empty": (lambda p: p.write_bytes(b""), "0 bytes and is neither"),
    "plain pickle": (lambda p: p.write_bytes(pickle.dumps({"w": 1}, protocol=2)), "a pickle that torch.save did not write"),
    "old, count": (lambda p: legacy_numel(p, 5), "the file of .* says 5 elements"),
    "old, huge count": (lambda p: legacy_numel(p, -1), "should end at"),
    "old, no end": (lambda p: p.write_bytes(saved(p, {"w": torch.ones(4)}, **LEGACY).read_bytes()[:-1]), "should end at"),
    "old, keys": (lambda p: old(p, pickle.dumps({}, protocol=2), pickle.dumps(["1"], protocol=2)), "list of storages"),
    "old, big-endian": (edit_old, "not little-endian"),
}  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_in_one_line_and_nothing_runs(tmp_path, kind):
    build, message = HOSTILE[kind]
    path = tmp_path / "x.bin"
    build(path)
    before = listing(tmp_path)
    with pytest.raises(StreamconvError, match=message) as caught:
        fmt.read(locate(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert str(caught.value).startswith(str(path))
    assert listing(tmp_path) == before == ["x.bin"], "code of the file ran"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_truncated_anywhere(tmp_path, options):
    path = saved(tmp_path / "x.bin", {"w": torch.ones(4), "v": torch.zeros(3)}, **options)
    raw = path.read_bytes()
    for size in range(0, len(raw), 7):
        path.write_bytes(raw[:size])
        with pytest.raises(StreamconvError):
            fmt.read(locate(path))


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4), st.sampled_from(["zip", "legacy"]))
@settings(max_examples=150, deadline=None)
def test_flipped_bytes_raise_nothing_else(tmp_path_factory, flips, kind):
    path = saved(
        tmp_path_factory.mktemp("flips") / "x.bin",
        {"w": torch.ones(4), "n": {"v": torch.zeros(3).t()}},
        **(LEGACY if kind == "legacy" else {}),
    )
    raw = bytearray(path.read_bytes())
    for position, value in flips:
        raw[position % len(raw)] = value
    path.write_bytes(raw)
    try:
        contents = fmt.read(locate(path))
    except StreamconvError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is right
        return
    for source in contents.entries.values():
        assert len(stored(source)) == source.spec.nbytes


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        fmt.read(locate(tmp_path / "x.bin"))
    os.mkfifo(tmp_path / "y.bin")
    with pytest.raises(FormatError, match="not a regular file"):
        fmt.read(locate(tmp_path / "y.bin"))


# Writing ---------------------------------------------------------------------------------------------------------


def fill(directory, laid_out, tensors):
    """What the engine does: literals, tensors at their slots, then what depends on the bytes."""
    for layout in laid_out:
        path, checksums = directory / layout.path, layout.checksums
        with path.open("wb") as file:
            file.truncate(layout.size)
            for offset, data in [*layout.literals, *((offset, bytes_of(tensors[name])) for name, offset in layout.slots.items())]:
                file.seek(offset)
                file.write(data)
        raw = path.read_bytes()
        assert len(raw) == layout.size
        crcs = [zlib.crc32(raw[sum_.start : sum_.start + sum_.nbytes]) for sum_ in checksums if sum_.kind == "crc32"]
        with path.open("r+b") as file:
            for offset, data in patches(checksums, crcs):
                file.seek(offset)
                file.write(data)


def write(directory, tensors, **options):
    directory.mkdir(exist_ok=True)
    laid_out = fmt.lay_out(specs_of(tensors), **{"max_shard_size": None} | options)
    fill(directory, laid_out, tensors)
    return laid_out


def check_same_file(ours, theirs):
    assert ours.read_bytes() == theirs.read_bytes()
    with zipfile.ZipFile(ours) as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("file", ["pytorch_model.bin", "mp_rank_00_model_states.pt", "a.b.pth", "日本.bin", "x"])
@pytest.mark.parametrize("root", [None, "module", "a.b"])
def test_written_files_are_those_of_torch_save(tmp_path, file, root):
    tensors = all_types()
    tree = tensors
    for key in reversed(root.split(".") if root else []):
        tree = {key: tree}
    (tmp_path / "theirs").mkdir()
    write(tmp_path / "ours", tensors, file=file, root=root)
    check_same_file(tmp_path / "ours" / file, saved(tmp_path / "theirs" / file, tree))
    loaded = torch.load(tmp_path / "ours" / file, weights_only=True, mmap=True)
    for name, tensor in flat(loaded, ""):
        assert bytes_of(tensor) == bytes_of(tensors[name.removeprefix(f"{root}.")])
    check_equal(fmt.read(locate(tmp_path / "ours" / file), root=root or ""), tensors)


@pytest.mark.parametrize("count", [0, 1, 9, 12])
def test_files_of_few_tensors(tmp_path, count):
    tensors = {f"w{number}": torch.full((number + 1,), float(number)) for number in range(count)}
    (layout,) = write(tmp_path, tensors, file="x.pt")
    (tmp_path / "theirs").mkdir()
    check_same_file(tmp_path / "x.pt", saved(tmp_path / "theirs" / "x.pt", tensors))
    assert all(offset % 64 == 0 for offset in layout.slots.values())


def test_tied_tensors_are_stored_once(tmp_path):
    shared = torch.arange(6.0)
    tensors = {"z": shared, "x": torch.ones(2), "a": shared[:], "c": torch.ones(0)}
    (layout,) = write(tmp_path, tensors, file="x.bin", tied={"z": "a"})
    assert layout.slots["a"] == layout.slots["z"]
    (tmp_path / "theirs").mkdir()
    check_same_file(tmp_path / "x.bin", saved(tmp_path / "theirs" / "x.bin", tensors))
    loaded = torch.load(tmp_path / "x.bin", weights_only=True, mmap=True)
    assert loaded["a"].data_ptr() == loaded["z"].data_ptr()
    assert ties(fmt.read(locate(tmp_path / "x.bin"))) == {"a": "z"}
    (later,) = fmt.lay_out({"a": spec_of(shared)}, max_shard_size=None, tied={"z": "a"})
    assert list(later.slots) == ["a", "z"]
    for tied in ({"x": "nowhere"}, {"x": "a"}, {"z": "a", "a": "z"}):
        with pytest.raises(UsageError, match="cannot be tied"):
            fmt.lay_out(specs_of(tensors), max_shard_size=None, tied=tied)


@pytest.mark.parametrize("size", [1, 60, 100, 250, 10**6])
def test_shards_are_those_of_huggingface_hub(tmp_path, size):
    shared = torch.arange(20.0)
    tensors = {"z": shared, "b": torch.ones(10), "c": torch.ones(30), "a": shared[:], "d": torch.ones(2), "e": torch.ones(10)}
    write(tmp_path / "ours", tensors, max_shard_size=size, tied={"z": "a"})
    (tmp_path / "theirs").mkdir()
    save_torch_state_dict(tensors, tmp_path / "theirs", max_shard_size=size, safe_serialization=False)
    assert listing(tmp_path / "ours") == listing(tmp_path / "theirs")
    for path in (tmp_path / "ours").glob("*.bin"):
        check_same_file(path, tmp_path / "theirs" / path.name)
    if (tmp_path / "ours" / fmt.INDEX).exists():
        ours, theirs = (json.loads((tmp_path / side / fmt.INDEX).read_text()) for side in ("ours", "theirs"))
        assert ours["weight_map"] == theirs["weight_map"]
        assert ours["metadata"] == theirs["metadata"] | {"total_parameters": 72}
    check_equal(fmt.read(locate(tmp_path / "ours")), tensors)


def test_entries_beyond_4_gib(tmp_path):
    specs = {
        "a": TensorSpec(DTYPES["uint8"], (5,)),
        "big": TensorSpec(DTYPES["bfloat16"], (5 << 20, 512)),
        "z": TensorSpec(DTYPES["int64"], (3,)),
    }
    (layout,) = fmt.lay_out(specs, max_shard_size=None)
    checksums = layout.checksums
    path = tmp_path / layout.path
    values = {"a": torch.arange(5, dtype=torch.uint8), "z": torch.arange(3)}
    with path.open("wb") as file:
        file.truncate(layout.size)
        for offset, data in [*layout.literals, *((layout.slots[name], bytes_of(value)) for name, value in values.items())]:
            file.seek(offset)
            file.write(data)
        for offset, data in patches(checksums, [0xA, 0xB, 0xC]):
            file.seek(offset)
            file.write(data)
    with zipfile.ZipFile(path) as archive:
        assert [info.CRC for info in archive.infolist() if "/data/" in info.filename] == [0xA, 0xB, 0xC]
    with path.open("rb") as file:
        for checksum in checksums[:3]:
            file.seek(checksum.start + checksum.nbytes)
            assert file.read(4) == b"PK\7\x08"
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert torch.equal(loaded["a"], values["a"])
    assert torch.equal(loaded["z"], values["z"])
    assert loaded["big"].shape == (5 << 20, 512)
    assert loaded["big"][-1, -1] == 0
    contents = fmt.read(locate(path))
    assert {name: source.extents[0].offset for name, source in contents.entries.items()} == dict(layout.slots)
    assert path.stat().st_blocks * 512 < 1 << 20


def test_laying_out_60_gb_takes_little_memory():
    code = """
import resource, torch
from streamconv.checkpoint.opening import ties
from streamconv.digests import patches
from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.formats import torch as fmt
def lay_out(rows, **options):
    specs = {f"model.layers.{i}.mlp.weight": TensorSpec(DTYPES["bfloat16"], (rows, 8192)) for i in range(360)}
    return fmt.lay_out(specs, **options)
lay_out(1, max_shard_size=None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
layouts = lay_out(10240, max_shard_size=None)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
layout, = layouts
assert layout.size > 60_000_000_000, layout.size
assert sum(len(data) for _, data in layout.literals) < 1_000_000
assert grown < 30 << 10, grown
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_what_torch_cannot_hold_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="tensor 'w': torch has no type for float6_e2m3fn"):
        fmt.lay_out({"w": TensorSpec(DTYPES["float6_e2m3fn"], (4,))}, max_shard_size=None)
    with pytest.raises(UsageError, match=r"cannot be laid out.*set TMPDIR"):
        fmt.lay_out({"w": TensorSpec(DTYPES["uint8"], (1 << 62,))}, max_shard_size=None)


@given(st.dictionaries(st.text(max_size=8), st.tuples(st.sampled_from(NAMES), st.lists(st.integers(0, 3), max_size=3)), max_size=6))
@settings(max_examples=40, deadline=None)
def test_written_equals_saved(tmp_path_factory, model):
    directory = tmp_path_factory.mktemp("model")
    tensors = {name: make(dtype, *shape) for name, (dtype, shape) in model.items()}
    write(directory / "ours", tensors, file="x.bin")
    check_same_file(directory / "ours" / "x.bin", saved(directory / "x.bin", tensors))


@pytest.mark.slow
def test_crc_of_a_large_entry(tmp_path):
    specs = {"big": TensorSpec(DTYPES["bfloat16"], (5 << 20, 512))}
    (layout,) = fmt.lay_out(specs, max_shard_size=None)
    checksums = layout.checksums
    crc = 0
    for _ in range(5 << 10):
        crc = zlib.crc32(bytes(1 << 20), crc)
    with (tmp_path / layout.path).open("wb") as file:
        file.truncate(layout.size)
        for offset, data in itertools.chain(layout.literals, patches(checksums, [crc])):
            file.seek(offset)
            file.write(data)
    with zipfile.ZipFile(tmp_path / layout.path) as archive:
        assert archive.testzip() is None
    assert re.fullmatch(r"\d{40}", zipfile.ZipFile(tmp_path / layout.path).read("pytorch_model/.data/serialization_id").decode())
