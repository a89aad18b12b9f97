"""The MindSpore container: files that MindSpore wrote, files made by hand from its message definition, and damaged ones."""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import assert_same, numbered, random_tensor, raw, read, refusal, run, stored, write
from hypothesis import given, settings
from hypothesis import strategies as st

from streamconv.checkpoint.opening import open_checkpoint
from streamconv.conversion import api
from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import FormatError, StreamconvError, UsageError
from streamconv.formats import mindspore as fmt
from streamconv.planning.plan import Plan
from streamconv.running import run as running
from streamconv.storage.locations import locate

FOLDER = Path(__file__).parent.parent / "data" / "ckpt"
FILES = sorted(FOLDER.glob("*.ckpt"))
TYPES = {
    "Bool": "bool", "Int8": "int8", "UInt8": "uint8", "Int16": "int16", "UInt16": "uint16", "Int32": "int32", "UInt32": "uint32",
    "Int64": "int64", "UInt64": "uint64", "Float16": "float16", "BFloat16": "bfloat16", "Float32": "float32", "Float64": "float64",
}  # fmt: skip
CODES = {dtype: code for code, dtype in TYPES.items()}


# Files made by hand ------------------------------------------------------------------------------------------------


def varint(value):
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number, payload):
    """A field of a number or of bytes."""
    if isinstance(payload, int):
        return varint(number << 3) + varint(payload)
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def tensor_message(dims, code, content):
    return b"".join(field(1, size) for size in dims) + field(2, code.encode()) + field(3, content)


def record(name, dims, code, content):
    return field(1, field(1, name.encode()) + field(2, tensor_message(dims, code, content)))


def saved(path, tensors, limit=512 << 20):
    """A file of these tensors as MindSpore's definition has it."""
    out = b""
    for name, tensor in tensors.items():
        data = raw(tensor)
        for start in range(0, len(data) or 1, limit):
            out += record(name, tensor.shape, CODES[str(tensor.dtype).removeprefix("torch.")], data[start : start + limit])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(out)
    return path


def contents_of(path, **options):
    """Name -> dtype, shape, bytes of what is read."""
    entries = fmt.read(locate(path), **options).entries
    return {name: (source.spec.dtype.name, source.spec.shape, stored(source)) for name, source in entries.items()}


def like(tensors):
    return {name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), raw(tensor)) for name, tensor in tensors.items()}


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def make(dtype, *shape):
    found = getattr(torch, dtype)
    if found is torch.bool:
        return (torch.arange(max(1, torch.Size(shape).numel())) % 2 == 1)[: torch.Size(shape).numel()].reshape(shape)
    size = torch.Size(shape).numel() * torch.empty((), dtype=found).element_size()
    return (torch.arange(size) * 37 % 251).to(torch.uint8).view(found).reshape(shape) if size else torch.empty(shape, dtype=found)


def of_all_types():
    return {dtype: make(dtype, 2, 3) for dtype in CODES} | {
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "Größe.日本.😀": torch.arange(5, dtype=torch.int32),
        "": torch.ones(1, dtype=torch.float16),
    }


# What MindSpore wrote ----------------------------------------------------------------------------------------------


def described(path):
    """The entries that a file's description lists, and those of them that are tensors."""
    rows = json.loads(path.with_suffix(".json").read_text())["entries"]
    return rows, [row for row in rows if row["tensor_type"] != "str"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_reads_what_mindspore_wrote(path):
    rows, tensors = described(path)
    contents = fmt.read(locate(path))
    assert list(contents.entries) == [row["name"] for row in tensors]
    for row in tensors:
        source = contents.entries[row["name"]]
        assert source.spec == TensorSpec(DTYPES[TYPES[row["tensor_type"]]], tuple(row["dims"]))
        assert (len(source.extents), source.spec.nbytes) == (row["records"], row["nbytes"])
        assert hashlib.sha256(stored(source)).hexdigest() == row["sha256"]
    left_out = [row["name"] for row in rows if row not in tensors]
    assert (contents.format, [file.local for file in contents.files], contents.others, contents.metadata) == ("mindspore", [path], [], {})
    assert len(contents.notes) == bool(left_out)
    assert all(repr(name) in contents.notes[0] for name in left_out)


def test_there_are_files():
    assert len(FILES) == 17
    kinds = {row["tensor_type"] for path in FILES for row in described(path)[0]}
    assert kinds == {*TYPES, "str"}


def extra_bytes(path):
    """What ends a file beside its tensors: a checksum, or a text."""
    data = path.read_bytes()
    if data[-17:-10] == b"crc_num":
        return data[-17:]
    (*_, last) = described(path)[0]
    return record("note", [0], "str", "épilogue".encode("utf-32-le")) if last["tensor_type"] == "str" else b""


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "special-sliced-rows"], ids=lambda path: path.stem)
def test_writes_what_mindspore_wrote(tmp_path, monkeypatch, path):
    """Byte for byte; a file cut at rows is what only asynchronous saving makes."""
    monkeypatch.setattr(fmt, "SLICE", 1024 if path.stem == "special-sliced" else fmt.SLICE)
    assert run("convert", path, tmp_path / "x.ckpt", "--verify", "--quiet") == 0
    ours, theirs = (tmp_path / "x.ckpt").read_bytes(), path.read_bytes()
    assert theirs.startswith(ours)
    assert len(theirs) - len(ours) == len(extra_bytes(path))
    assert listing(tmp_path) == ["x.ckpt"]


# There and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [8, 40, 1 << 10, fmt.SLICE])
def test_there_and_back(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(fmt, "SLICE", limit)
    given = of_all_types() | {"w": random_tensor(19, 23), "x": random_tensor(700, dtype=torch.bfloat16)}
    source = write(tmp_path / "st", given, shards=3, config={"model_type": "x"})
    assert run("convert", source, tmp_path / "a.ckpt", "--verify", "--quiet") == 0
    order = list(open_checkpoint(source))
    saved(tmp_path / "theirs.ckpt", {name: given[name] for name in order}, limit)
    assert (tmp_path / "a.ckpt").read_bytes() == (tmp_path / "theirs.ckpt").read_bytes()
    assert contents_of(tmp_path / "a.ckpt") == like(given)
    assert run("convert", tmp_path / "a.ckpt", tmp_path / "back", "--max-shard-size", "1KB", "--verify", "--quiet") == 0
    assert_same(read(tmp_path / "back"), given)
    assert run("verify", source, tmp_path / "a.ckpt", "--quiet") == run("verify", tmp_path / "a.ckpt", tmp_path / "back", "--quiet") == 0


@pytest.mark.sampled(3)
@pytest.mark.parametrize("limit", [8, 40, 1 << 10, fmt.SLICE])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_casts(tmp_path, monkeypatch, limit, dtype):
    monkeypatch.setattr(fmt, "SLICE", limit)
    given = {"w": random_tensor(19, 23), "b": random_tensor(700, dtype=torch.bfloat16), "n": torch.arange(40)}
    wanted = {name: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    source = write(tmp_path / "st", given, config={"dtype": "float32"})
    assert run("convert", source, tmp_path / "out", "--format", "mindspore", "--dtype", dtype, "--verify", "--quiet") == 0
    assert contents_of(tmp_path / "out") == like(wanted)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"dtype": dtype}
    assert run("convert", saved(tmp_path / "x.ckpt", given, limit), tmp_path / "y.safetensors", "--dtype", dtype, "--quiet") == 0
    assert_same(read(tmp_path / "y.safetensors"), wanted)


@pytest.mark.parametrize("limit", [8, 40, 1 << 10])
def test_layouts_across_slices(tmp_path, monkeypatch, limit):
    """Transposes and fusions read from and written to tensors in several records."""
    monkeypatch.setattr(fmt, "SLICE", limit)
    given = {"q": random_tensor(24, 10), "k": random_tensor(24, 10, seed=1), "o": random_tensor(31, 17, seed=2)}
    rules = [{"rule": "{q,k}", "right": "qk", "layout": "(h two d) c, (h two d) c -> ((h + h) d two) c"}]
    rules += [{"rule": "o", "right": "o.T", "layout": "a b -> b a"}]
    recipe = {"name": "a-b", "dims": {"d": 3, "two": 2}, "rules": rules}
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    source = saved(tmp_path / "x.ckpt", given, limit)
    assert run("convert", source, tmp_path / "y.ckpt", "--recipe", tmp_path / "r.json", "--verify", "--quiet") == 0
    halves = torch.cat([given[name].reshape(-1, 2, 3, 10).transpose(1, 2).reshape(-1, 10) for name in ("q", "k")])
    assert contents_of(tmp_path / "y.ckpt") == like({"qk": halves, "o.T": given["o"].T})


def test_torch_files_there_and_back(tmp_path):
    given = {"w": random_tensor(9, 5), "b": torch.tensor(4)}
    (tmp_path / "in").mkdir()
    torch.save(given, tmp_path / "in" / "pytorch_model.bin")
    assert run("convert", tmp_path / "in", tmp_path / "x.ckpt", "--quiet") == 0
    assert run("convert", tmp_path / "x.ckpt", tmp_path / "y.bin", "--quiet") == 0
    assert_same(torch.load(tmp_path / "y.bin", weights_only=True), given)


def test_a_directory_gets_one_file(tmp_path):
    given = numbered({f"w{k}": (30, 10) for k in range(5)})
    source = write(tmp_path / "st", given, shards=2, config={"model_type": "x"})
    assert run("convert", source, tmp_path / "out", "--format", "mindspore", "--max-shard-size", "1KB", "--quiet") == 0
    assert listing(tmp_path / "out") == ["config.json", "model.ckpt"]
    assert open_checkpoint(tmp_path / "out").sidecars == ["config.json"]
    assert open_checkpoint(tmp_path / "out").config == {"model_type": "x"}
    assert run("convert", tmp_path / "out", tmp_path / "back", "--quiet") == 0
    assert_same(read(tmp_path / "back"), given)
    assert run("convert", write(tmp_path / "st2", {"a": torch.ones(2)}), tmp_path / "out", "--overwrite", "--quiet") == 0
    assert listing(tmp_path / "out") == ["config.json", "model.safetensors"]


def test_tied_tensors_are_stored_twice(tmp_path):
    shared = random_tensor(6, 4)
    (tmp_path / "in").mkdir()
    torch.save({"embed": shared, "head": shared}, tmp_path / "in" / "x.pt")
    for tied in ("keep", "copy"):
        made = api.plan(tmp_path / "in" / "x.pt", tmp_path / f"{tied}.ckpt", options={"tied": tied}, max_memory="4GB")
        assert not [note for note in made.notes if "stored once" in note]
        running.run(made)
        assert contents_of(tmp_path / f"{tied}.ckpt") == like({"embed": shared, "head": shared})
    assert open_checkpoint(tmp_path / "keep.ckpt").ties == {}
    assert run("convert", tmp_path / "in" / "x.pt", tmp_path / "st", "--quiet") == 0
    assert list(read(tmp_path / "st")) == ["embed"]
    assert run("convert", tmp_path / "st", tmp_path / "y.ckpt", "--verify", "--quiet") == 0
    assert contents_of(tmp_path / "y.ckpt") == like({"embed": shared, "head": shared})


def test_inspect_and_plan(tmp_path, capsys):
    given = {"w": random_tensor(30, 10), "b": random_tensor(3)}
    source = saved(tmp_path / "x.ckpt", given, limit=1000)
    assert run("inspect", source, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["total_size"], found["files"]) == (
        "mindspore",
        1212,
        [{"path": "x.ckpt", "size": source.stat().st_size}],
    )
    rows = {row["name"]: row for row in found["tensors"]}
    assert (rows["w"]["offset"], rows["b"]["file"]) == (None, "x.ckpt")
    assert source.read_bytes()[rows["b"]["offset"] :][: rows["b"]["nbytes"]] == raw(given["b"])
    assert run("plan", source, tmp_path / "y.ckpt", "--json", "--out", tmp_path / "plan.json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["format"] == "mindspore"
    assert [file["tensors"] for file in summary["outputs"]] == [["w", "b"]]
    made = Plan.from_json((tmp_path / "plan.json").read_text())
    assert Plan.from_json(made.to_json()).files == made.files
    assert not (tmp_path / "y.ckpt").exists()
    assert run("run", tmp_path / "plan.json", "--verify", "--quiet") == 0
    assert contents_of(tmp_path / "y.ckpt") == like(given)
    other = saved(tmp_path / "other.ckpt", given | {"b": given["b"] + 1})
    assert run("verify", source, other, "--quiet") == 1


def test_verify_after_writing_sees_a_damaged_slice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fmt, "SLICE", 400)
    source = write(tmp_path / "st", {"w": random_tensor(30, 10)})
    assert run("convert", source, tmp_path / "x.ckpt", "--quiet") == 0
    whole = (tmp_path / "x.ckpt").read_bytes()
    for at in (0, 450, len(whole) - 1):
        (tmp_path / "x.ckpt").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert run("convert", source, tmp_path / "x.ckpt", "--resume", "--quiet") == 2
        assert "is not what this conversion makes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        (("float8_e4m3fn", (2,)), "cast it"),
        (("complex64", (2,)), "complex64"),
        (("float4_e2m1fn", (2,)), "float4"),
        (("float32", (0,)), "leave it out"),
    ],
)
def test_what_mindspore_could_not_load_is_refused(spec, part):
    with pytest.raises(UsageError, match=r"tensor 'w': MindSpore cannot load") as caught:
        fmt.lay_out({"w": TensorSpec(DTYPES[spec[0]], spec[1])})
    assert part in str(caught.value)


def test_a_name_that_no_file_can_hold_is_refused():
    with pytest.raises(UsageError, match="UTF-8"):
        fmt.lay_out({"\ud800": TensorSpec(DTYPES["float32"], (1,))})


def test_slices_are_of_512_mib():
    """MindSpore's own limit; exactly that much is one record."""
    row = (1 << 20,)
    specs = {name: TensorSpec(DTYPES["float32"], (rows, *row)) for name, rows in {"one": 128, "two": 129, "three": 300}.items()}
    (layout,) = fmt.lay_out(specs)
    sizes = {name: [nbytes for _, nbytes in places] for name, places in layout.pieces.items()}
    assert sizes == {"two": [512 << 20, 4 << 20], "three": [512 << 20, 512 << 20, 176 << 20]}
    assert len(layout.literals) == 6
    ends = [offset + len(data) for offset, data in layout.literals]
    assert ends == [layout.slots["one"], *(offset for name in sizes for offset, _ in layout.pieces[name])]
    assert [layout.pieces[name][0][0] for name in sizes] == [layout.slots[name] for name in sizes]
    assert layout.size == sum(len(data) for _, data in layout.literals) + sum(spec.nbytes for spec in specs.values())


# Reading what others write -----------------------------------------------------------------------------------------


def test_everything_that_protobuf_allows_is_read(tmp_path):
    ones = raw(torch.ones(6))
    tensor = field(3, ones) + field(2, b"Float32") + field(1, varint(2) + varint(3)) + field(9, b"new") + field(10, 7)
    fixed = varint(11 << 3 | 1) + bytes(8) + varint(12 << 3 | 5) + bytes(4) + varint(1 << 3 | 5) + bytes(4)
    data = field(1, field(8, b"x") + field(2, tensor + fixed) + field(1, b"packed")) + field(7, 1) + fixed + field(1, 3)
    data += field(1, field(2, tensor_message([1], "Float32", ones[:4])))
    data += record("legacy", [0], "Float32", ones[:4]) + record("empty", [4, 0], "Float32", b"")
    path = put(tmp_path / "x.ckpt", data)
    assert contents_of(path) == {
        "packed": ("float32", (2, 3), ones),
        "": ("float32", (1,), ones[:4]),
        "legacy": ("float32", (), ones[:4]),
        "empty": ("float32", (4, 0), b""),
    }


def test_slices_of_any_size_are_joined(tmp_path):
    tensor = random_tensor(50, 7)
    data = raw(tensor)
    cuts = [0, 333, 333, 334, 1000, len(data)]
    parts = b"".join(record("w", tensor.shape, "Float32", data[a:b]) for a, b in itertools.pairwise(cuts))
    path = put(tmp_path / "x.ckpt", record("a", [], "Bool", b"\1") + parts)
    assert contents_of(path)["w"] == like({"w": tensor})["w"]
    assert len(fmt.read(locate(path)).entries["w"].extents) == 5
    entry = open_checkpoint(path)["w"]
    assert torch.equal(entry.torch(), tensor)
    assert torch.equal(entry.torch(rows=slice(11, 13)), tensor[11:13])
    assert run("convert", path, tmp_path / "y.safetensors", "--dtype", "float64", "--verify", "--quiet") == 0
    assert torch.equal(read(tmp_path / "y.safetensors")["w"], tensor.double())


def test_texts_are_left_out_and_listed(tmp_path, capsys):
    data = record("w", [2], "Int8", b"\1\2") + record("note", [0], "str", "hi".encode("utf-32-le")) + record("epoch", [], "Int64", bytes(8))
    path = put(tmp_path / "x.ckpt", data)
    assert list(contents_of(path)) == ["w", "epoch"]
    assert run("inspect", path) == 0
    assert "1 values that are not tensors are left out: 'note'" in capsys.readouterr().out
    assert "no tensor" in refused(put(tmp_path / "y.ckpt", record("note", [0], "str", b"a\0\0\0")))


def test_complex_numbers_are_read(tmp_path):
    path = put(tmp_path / "x.ckpt", record("c", [2], "Complex64", bytes(range(16))))
    assert contents_of(path) == {"c": ("complex64", (2,), bytes(range(16)))}


def test_only_what_is_needed_is_read(tmp_path, monkeypatch):
    """A table of contents of terabytes takes a few kilobytes for each record."""
    path, position, count = tmp_path / "x.ckpt", 0, 0
    with path.open("wb") as file:
        for k in range(40):
            for start in range(0, 3 << 30, 512 << 20):
                content = min(512 << 20, (3 << 30) - start)
                tensor = field(1, 3 << 15) + field(1, 1 << 14) + field(2, b"BFloat16") + b"\x1a" + varint(content)
                value = field(1, f"layer.{k}".encode()) + b"\x12" + varint(len(tensor) + content) + tensor
                head = b"\x0a" + varint(len(value) + content) + value
                file.seek(position)
                file.write(head)
                position += len(head) + content
                count += 1
        file.truncate(position)
    taken = []

    def pread(fd, nbytes, offset, real=os.pread):
        taken.append(nbytes)
        return real(fd, nbytes, offset)

    monkeypatch.setattr(os, "pread", pread)
    entries = fmt.read(locate(path)).entries
    assert {source.spec.shape for source in entries.values()} == {(3 << 15, 1 << 14)}
    assert {len(source.extents) for source in entries.values()} == {6}
    assert sum(taken) <= 2 * 4096 * (count + 2)


def test_reading_needs_neither_torch_nor_numpy():
    code = (
        "import sys; from streamconv.formats import mindspore; from streamconv.storage.locations import locate; "
        "mindspore.read(locate(sys.argv[1]))"
    )
    code += "; assert not {'torch', 'numpy', 'google'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, FILES[0]], check=True, timeout=600)


# Directories -------------------------------------------------------------------------------------------------------


def test_detection_order(tmp_path):
    folder = tmp_path / "x"
    saved(folder / "a.ckpt", {"m": torch.ones(2)})
    (folder / "training_args.bin").write_bytes(b"")
    assert open_checkpoint(folder).format == open_checkpoint(folder / "a.ckpt").format == "mindspore"
    torch.save({"t": torch.ones(2)}, folder / "pytorch_model.bin")
    assert open_checkpoint(folder).format == "torch"
    write(folder, {"s": torch.ones(2)})
    assert list(open_checkpoint(folder)) == ["s"]
    assert open_checkpoint(folder).sidecars == []
    with pytest.raises(FormatError, match=r"\*\.safetensors, .*\.ckpt, \*\.gguf, \*\.distcp file in it"):
        open_checkpoint(FOLDER.parent)


def test_several_files_of_one_checkpoint(tmp_path):
    given = numbered({f"w{k}": (3, 4) for k in range(12)})
    names = list(given)
    for number in range(12):
        saved(tmp_path / "c" / f"rank_{number}" / "net-1_10.ckpt", {names[number]: given[names[number]]})
    (tmp_path / "c" / "rank_0" / "config.txt").write_text("x")
    saved(tmp_path / "c" / "strategy.ckpt", {"no": torch.ones(1)})
    assert list(open_checkpoint(tmp_path / "c")) == names
    assert run("convert", tmp_path / "c", tmp_path / "out", "--verify", "--quiet") == 0
    assert_same(read(tmp_path / "out"), given)
    assert "config.txt" not in listing(tmp_path / "out")
    saved(tmp_path / "flat" / "b.ckpt", {"x": given["w1"]})
    saved(tmp_path / "flat" / "a.ckpt", {"y": given["w2"]})
    saved(tmp_path / "flat" / "src_strategy.ckpt", {"z": given["w2"]})
    with pytest.raises(FormatError, match=r"2 checkpoints in one folder.*: a\.ckpt, b\.ckpt: give the path of one"):
        open_checkpoint(tmp_path / "flat")
    saved(tmp_path / "flat" / "model.ckpt", {"one": given["w2"]})
    assert list(open_checkpoint(tmp_path / "flat")) == ["one"]


def test_what_ranks_repeat(tmp_path, capsys):
    step = {"global_step": torch.tensor(7), "scale": torch.tensor([2.0])}
    for rank in (0, 1):
        saved(tmp_path / f"rank_{rank}" / "x.ckpt", {f"layer.{rank}": random_tensor(40, seed=rank)} | step)
    assert list(contents_of(tmp_path)) == ["layer.0", "global_step", "scale", "layer.1"]
    assert len(contents_of(tmp_path, by_rank=True)) == 6
    assert contents_of(tmp_path, by_rank=True)["rank_1/x.ckpt/scale"] == like(step)["scale"]
    for repeated in ({"scale": torch.tensor([3.0])}, {"global_step": torch.tensor([7])}, {"layer.0": random_tensor(40)}):
        saved(tmp_path / "rank_1" / "x.ckpt", {"layer.1": random_tensor(40)} | repeated)
        message = refusal(capsys, "convert", tmp_path, tmp_path.parent / "out")
        for part in (str(tmp_path), repr(next(iter(repeated))), "'rank_0/x.ckpt'", "'rank_1/x.ckpt'", "strategy", "transform_checkpoints"):
            assert part in message


def test_the_safetensors_form_with_its_map(tmp_path, capsys):
    given = numbered({"a": (3, 4), "b": (5,), "c": (2, 2)})
    write(tmp_path / "one", {"a": given["a"]})
    write(tmp_path / "two", {"b": given["b"], "c": given["c"]})
    write(tmp_path / "three", {"global_step": torch.tensor(3)})
    folder = tmp_path / "unified"
    folder.mkdir()
    for name, part in {"one": "part1", "two": "part0", "three": "hyper_param"}.items():
        (tmp_path / name / "model.safetensors").rename(folder / f"{part}.safetensors")
    weight_map = {"a": "part1.safetensors", "b": "part0.safetensors", "c": "part0.safetensors"}
    for table in ({"metadata": {"total_size": 84}, "weight_map": weight_map}, weight_map):
        (folder / "param_name_map.json").write_text(json.dumps(table, indent=4))
        checkpoint = open_checkpoint(folder)
        assert (checkpoint.format, sorted(checkpoint), checkpoint.sidecars) == ("safetensors", ["a", "b", "c", "global_step"], [])
    assert run("convert", folder, tmp_path / "out", "--quiet") == 0
    assert listing(tmp_path / "out") == ["model.safetensors"]
    assert_same(read(tmp_path / "out"), given | {"global_step": torch.tensor(3)})
    (folder / "param_name_map.json").write_text(json.dumps(weight_map | {"b": "part1.safetensors"}))
    assert "param_name_map.json" in refusal(capsys, "inspect", folder)
    assert run("convert", tmp_path / "out", folder, "--overwrite", "--quiet") == 0
    assert listing(folder) == ["model.safetensors"]


# Damaged files -----------------------------------------------------------------------------------------------------


def refused(path):
    with pytest.raises(StreamconvError) as caught:
        fmt.read(locate(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


ONE = record("w", [2], "Float32", bytes(8))
HUGE = varint(1 << 62)
DAMAGED = {
    "empty": (b"", "no tensor in its 0 bytes"),
    "no message": (b"\x89HDF\r\n", "byte 0: it starts with"),
    "a torch file": (b"PK\3\4" + bytes(30), r"torch\.save wrote.*ends in \.pt"),
    "a pointer": (b"version https://git-lfs", "Git LFS"),
    "encrypted": (b"\xd8\x5e\x3a\x7f" + bytes(60), "encrypted.*dec_key"),
    "encrypted by another method": (b"\xda\x5e\x3a\x7f" + bytes(60), "encrypted.*dec_key"),
    "nothing but a checksum": (b"crc_num" + bytes(10), "no tensor in its 17 bytes"),
    "cut": (ONE + ONE[:-3].replace(b"w", b"v"), f"byte {len(ONE)}: field 1 ends at byte {2 * len(ONE)}.* at {2 * len(ONE) - 3}"),
    "cut in a number": (ONE + b"\x0a\x80", f"byte {len(ONE) + 1}: a number"),
    "an endless number": (b"\x0a" + b"\xff" * 30, "byte 1: a number"),
    "a number above 64 bits": (b"\x0a" + b"\xff" * 9 + b"\x7f" + bytes(9), "byte 1: a number"),
    "a group": (ONE + b"\x0b", f"byte {len(ONE)}: no field"),
    "field 0": (ONE + b"\x00\x01", f"byte {len(ONE)}: no field"),
    "a checksum cut": (ONE + b"crc_num" + bytes(9), f"byte {len(ONE)}: no field"),
    "a huge record": (b"\x0a" + HUGE + ONE, "byte 0: field 1 ends"),
    "a huge name": (field(1, b"\x0a" + HUGE + b"w"), "byte 2: field 1 ends"),
    "a huge tensor": (field(1, field(1, b"w") + b"\x12" + HUGE), "byte 5: field 2 ends"),
    "huge data": (field(1, field(1, b"w") + field(2, field(1, 2) + field(2, b"Float32") + b"\x1a" + HUGE)), "byte 18: field 3 ends"),
    "no tensor": (field(1, field(1, b"w")), "'w': byte 0: it has no tensor"),
    "no type": (field(1, field(1, b"w") + field(2, field(3, b""))), "'w': byte 5: it has no type"),
    "no data": (field(1, field(1, b"w") + field(2, field(2, b"Int8"))), "'w': byte 5: it has no data"),
    "a hash table": (field(1, field(1, b"w") + field(3, b"")), "byte 0: parameter 'w': a hash table"),
    "a name that is no text": (field(1, field(1, b"w\xff") + field(2, b"")), "byte 5: a text that is not UTF-8"),
    "a long type": (record("w", [1], "x" * 65, b""), "byte 9: a text of 65 bytes"),
    "an unknown type": (record("w", [1], "Float128", bytes(16)), "'w': of type 'Float128', read are Bool, .*Complex64"),
    "packed numbers": (record("w", [1], "Int4", b"\1"), "of type 'Int4'"),
    "too few bytes": (record("w", [2, 3], "Float32", bytes(23)), r"byte 0: float32\[2, 3\] needs 24 bytes, its 1 records hold 23"),
    "too many bytes": (ONE + record("v", [], "Int8", bytes(2)), rf"byte {len(ONE)}: int8\[\] needs 1 bytes, its 1 records hold 2"),
    "a slice too few": (ONE + record("v", [4], "Int8", bytes(2)), r"int8\[4\] needs 4 bytes, its 1 records hold 2"),
    "a record twice": (ONE + ONE, r"needs 8 bytes, its 2 records hold 16"),
    "a name twice": (ONE + record("v", [], "Int8", b"\1") + ONE, f"byte {len(ONE) + 16}: it is there for the second time"),
    "slices of two shapes": (record("w", [4], "Int8", b"12") + record("w", [2, 2], "Int8", b"34"), r"Int8\[2, 2\] goes on .* Int8\[4\]"),
    "a negative size": (record("w", [(1 << 64) - 1], "Int8", b""), "2\\*\\*63"),
    "too many elements": (record("w", [1 << 40, 1 << 40], "Int8", b""), "2\\*\\*63"),
    "too many elements beside none": (record("w", [0, 1 << 40, 1 << 40], "Int8", b""), "2\\*\\*63"),
    "too many sizes": (record("w", [1] * 65, "Int8", b"1"), "more than 64 sizes"),
    "too many packed sizes": (field(1, field(2, field(1, b"\1" * 99) + field(2, b"Int8") + field(3, b"1"))), "more than 64"),
    "a packed size cut": (field(1, field(1, b"w") + field(2, field(1, b"\x80") + field(2, b"Int8") + field(3, b"1"))), "byte 9: a number"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_are_refused(tmp_path, kind):
    data, wanted = DAMAGED[kind]
    message = refused(put(tmp_path / "x.ckpt", data))
    assert re.search(wanted, message), message


def test_what_takes_too_much_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fmt, "_MAX_NAMES", 10_000)
    for data in (ONE * 200, field(1, field(1, b"w" * 11_000)), field(1, b"") * 2000, field(1, field(2, field(7, 1) * 2000))):
        assert "than can be listed" in refused(put(tmp_path / "x.ckpt", data)) or len(data) == 4000


def test_every_cut_is_noticed(tmp_path):
    """But for cuts between two tensors, which nothing in the file tells."""
    whole = (FOLDER / "special-types.ckpt").read_bytes()
    entries = fmt.read(locate(FOLDER / "special-types.ckpt")).entries
    ends = {source.extents[-1].offset + source.extents[-1].nbytes for source in entries.values()}
    for size in range(len(whole)):
        path = put(tmp_path / "x.ckpt", whole[:size])
        if size in ends:
            assert len(fmt.read(locate(path)).entries) < len(entries) or size == max(ends)
        else:
            assert "byte " in refused(path) or not size


@pytest.mark.parametrize("command", [["convert"], ["plan"], ["inspect"], ["convert", "--format", "mindspore"]])
def test_commands_refuse_damaged_files(tmp_path, capsys, command):
    path = put(tmp_path / "x.ckpt", ONE[:-1])
    more = [] if command == ["inspect"] else [tmp_path / "dst"]
    assert str(path) in refusal(capsys, command[0], path, *more, *command[1:])
    assert listing(tmp_path) == ["x.ckpt"]


def test_what_cannot_be_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.ckpt")
    assert "not a regular file" in refused(tmp_path / "pipe.ckpt")
    assert "no such file" in refused(tmp_path / "none.ckpt")


# Properties --------------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple).filter(lambda shape: shape != (0,))
MODELS = st.dictionaries(st.text(max_size=6), st.tuples(st.sampled_from(sorted(CODES)), SHAPES), min_size=1, max_size=6)


def filled(directory, tensors):
    """A file as it is laid out, with its tensors in their places."""
    specs = {name: TensorSpec(DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape)) for name, tensor in tensors.items()}
    (layout,) = fmt.lay_out(specs)
    data = bytearray(layout.size)
    parts = list(layout.literals)
    for name, tensor in tensors.items():
        rest = raw(tensor)
        for offset, nbytes in layout.pieces.get(name, ((layout.slots[name], len(rest)),)):
            parts.append((offset, rest[:nbytes]))
            rest = rest[nbytes:]
        assert not rest
    assert sum(len(part) for _, part in parts) == layout.size
    for offset, part in parts:
        data[offset : offset + len(part)] = part
    return put(directory / layout.path, bytes(data))


@given(MODELS, st.sampled_from([8, 16, 64, 512 << 20]))
@settings(max_examples=80, deadline=None)
def test_any_model_there_and_back(tmp_path_factory, model, limit):
    directory = tmp_path_factory.mktemp("model")
    tensors = {name: make(dtype, *shape) for name, (dtype, shape) in model.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fmt, "SLICE", limit)
        path = filled(directory, tensors)
    assert path.read_bytes() == saved(directory / "theirs.ckpt", tensors, limit).read_bytes()
    assert contents_of(path) == like(tensors)
    assert list(fmt.read(locate(path)).entries) == list(tensors)


def check_survives(path):
    """Only our own errors; and what is read lies in the file."""
    try:
        entries = fmt.read(locate(path)).entries
    except StreamconvError:
        return
    size = path.stat().st_size
    for source in entries.values():
        assert sum(extent.nbytes for extent in source.extents) == source.spec.nbytes
        assert all(0 <= extent.offset <= extent.offset + extent.nbytes <= size for extent in source.extents)


GOOD = [path.read_bytes() for path in FILES if path.stem.startswith("special")]


@given(st.sampled_from(GOOD), st.lists(st.tuples(st.integers(0, 7000), st.binary(max_size=6), st.integers(0, 6)), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_damage_is_our_own_error(tmp_path_factory, data, damages):
    for at, new, gone in damages:
        start = at % len(data) if data else 0
        data = data[:start] + new + data[start + gone :]
    check_survives(put(tmp_path_factory.mktemp("damaged") / "x.ckpt", data))


MESSAGES = st.recursive(
    st.binary(max_size=12) | st.sampled_from([b"Float32", b"Int8", b"str"]),
    lambda inner: st.lists(st.tuples(st.integers(1, 4), inner | st.integers(0, 1 << 64)), max_size=4).map(
        lambda fields: b"".join(field(number, value) for number, value in fields)
    ),
    max_leaves=8,
)


@given(st.lists(MESSAGES.map(lambda message: field(1, message)), max_size=3).map(b"".join))
@settings(max_examples=300, deadline=None)
def test_any_message_is_read_or_refused(tmp_path_factory, data):
    check_survives(put(tmp_path_factory.mktemp("message") / "x.ckpt", data))


# Memory ------------------------------------------------------------------------------------------------------------

PROCESS = """
import json, sys
from streamconv.cli.command import main
from streamconv.formats import mindspore
mindspore.SLICE = 5 << 20
code = main(sys.argv[1:])
print(json.dumps({"code": code, "loaded": [name for name in ("torch", "numpy", "google.protobuf") if name in sys.modules]}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks the kernel for memory figures")
def test_memory_there_and_back(tmp_path):
    write(tmp_path / "st", {f"w{k}": torch.full((4 << 20,), float(k), dtype=torch.bfloat16) for k in range(12)})  # 100 MB
    for source, target in (("st", "x.ckpt"), ("x.ckpt", "back.safetensors")):
        command = ["convert", tmp_path / source, tmp_path / target, "--max-memory", "64MB", "--json"]
        done = subprocess.run([sys.executable, "-c", PROCESS, *map(str, command)], capture_output=True, text=True, timeout=600, check=False)
        document, found = map(json.loads, done.stdout.splitlines())
        assert found == {"code": 0, "loaded": []}
        assert document["peak_rss"] <= document["peak_memory"] <= 64_000_000
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "st" / "model.safetensors").read_bytes()
