"""The safetensors container, with the reference library and huggingface_hub as oracles."""

import json
import os
import struct
from pathlib import Path

import pytest
import safetensors
import torch
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from safetensors_files import BAD, PT, container, make, tensor

from streamconv.checkpoint.opening import open_checkpoint
from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import FormatError, StreamconvError, UsageError
from streamconv.formats import safetensors as fmt
from streamconv.formats.files import split_into_shards
from streamconv.storage.locations import locate

# What safetensors.torch can save; float6 kinds have no torch type.
TORCH_TYPES = [getattr(torch, name) for name in DTYPES if not name.startswith(("float6", "float4"))] + [torch.float4_e2m1fn_x2]
ODD_NAMES = [
    "",
    " ",
    "é",
    "日本語",
    "😀",
    "\uffff",
    "\U00010000",
    "a\x7fb",
    "".join(map(chr, range(32))),
    '"\\/',
    "\u2028\u2029",
    "a.b",
    "a-0",
    "B",
]


def spec_of(tensor):
    shape = tuple(tensor.shape)
    if tensor.dtype is torch.float4_e2m1fn_x2:
        return TensorSpec(DTYPES["float4_e2m1fn"], (*shape[:-1], shape[-1] * 2))
    return TensorSpec(DTYPES[str(tensor.dtype).removeprefix("torch.")], shape)


def specs_of(tensors):
    return {name: spec_of(tensor) for name, tensor in tensors.items()}


def bytes_of(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def filled(layout, tensors):
    """The file that a layout describes, with these tensors in its slots."""
    content = bytearray(layout.size)
    for offset, literal in layout.literals:
        content[offset : offset + len(literal)] = literal
    for name, offset in layout.slots.items():
        data = bytes_of(tensors[name])
        content[offset : offset + len(data)] = data
    assert len(content) == layout.size
    return bytes(content)


def put(directory, **files):
    """Writes files ``a=[names]`` as ``a.safetensors`` with one byte per tensor."""
    directory.mkdir(exist_ok=True)
    for stem, names in files.items():
        header = {name: tensor(i, i + 1) for i, name in enumerate(names)}
        (directory / f"{stem}.safetensors").write_bytes(container(header, bytes(range(len(names)))))
    return directory


def put_index(directory, weight_map, name=fmt.KIND.index):
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refusal(path, kind=FormatError, **options):
    with pytest.raises(StreamconvError) as caught:
        fmt.read(locate(path), **options)
    assert type(caught.value) is kind, caught.value
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1500
    return message


# Writing: equal to the reference, byte by byte


def test_every_type_has_a_code():
    assert sorted(fmt.CODES.values()) == sorted(DTYPES)


@pytest.mark.parametrize("metadata", [{}, PT])
@pytest.mark.parametrize("dtype", TORCH_TYPES, ids=str)
def test_a_file_of_each_type_equals_save_file(dtype, metadata):
    tensors = {"w": make(dtype, 3, 4), "a": make(dtype, 1)}
    if dtype is not torch.float4_e2m1fn_x2:  # which has no 0-d form
        tensors |= {"scalar": make(dtype), "empty": make(dtype, 2, 0)}
    (layout,) = fmt.lay_out(specs_of(tensors), metadata=metadata, max_shard_size=None)
    assert filled(layout, tensors) == save(tensors, metadata or None)


def test_a_file_of_all_types_equals_save_file():
    tensors = {f"{letter}{str(dtype)[-3:]}": make(dtype, 2, 2) for letter in "zAmé" for dtype in TORCH_TYPES}
    (layout,) = fmt.lay_out(specs_of(tensors), metadata=PT, max_shard_size=None)
    assert filled(layout, tensors) == save(tensors, PT)


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_odd_names_are_escaped_as_the_reference_does(name):
    tensors = {name: make(torch.float32, 2), "other": make(torch.int8, 3)}
    (layout,) = fmt.lay_out(specs_of(tensors), metadata={name: name}, max_shard_size=None)
    assert filled(layout, tensors) == save(tensors, {name: name})


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(TORCH_TYPES), max_size=8))
def test_any_names_in_any_order_equal_the_reference(types):
    tensors = {name: make(dtype, 2) for name, dtype in types.items() if name != "__metadata__"}
    header, _ = fmt.header_bytes(specs_of(tensors), PT)
    assert save(tensors, PT).startswith(header)


def test_order_by_type_then_name_as_bytes():
    tensors = {name: make(torch.uint8, 1) for name in ODD_NAMES} | {"zz": make(torch.float32, 1)}
    header = save(tensors)
    names = list(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")]))
    assert fmt.order_in_file(specs_of(tensors)) == names
    assert names[0] == "zz"


def test_packed_types_come_before_bool():
    types = ["BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8"]
    specs = {code: TensorSpec(DTYPES[fmt.CODES[code]], (4,)) for code in types}
    assert fmt.order_in_file(specs) == types[::-1]
    header, slots = fmt.header_bytes(specs, {})
    found = safetensors.deserialize(header + bytes(4 + 3 + 3 + 2 + 4))
    assert {name: (info["dtype"], info["shape"]) for name, info in found} == {code: (code, [4]) for code in types}
    assert slots == {
        "U8": len(header),
        "F6_E3M2": len(header) + 4,
        "F6_E2M3": len(header) + 7,
        "F4": len(header) + 10,
        "BOOL": len(header) + 12,
    }


def test_metadata_is_sorted():
    header, _ = fmt.header_bytes({}, {"b": "1", "a": "2"})
    assert header[8:].rstrip() == b'{"__metadata__":{"a":"2","b":"1"}}'
    assert header == fmt.header_bytes({}, {"a": "2", "b": "1"})[0]


@pytest.mark.parametrize(
    ("names", "spec", "metadata", "part"),
    [
        (["__metadata__"], TensorSpec(DTYPES["int8"], (1,)), {}, "__metadata__"),
        (["\ud800"], TensorSpec(DTYPES["int8"], (1,)), {}, "\\ud800"),
        ([], TensorSpec(DTYPES["int8"], (1,)), {"k": "\udfff"}, "\\udfff"),
        (["odd"], TensorSpec(DTYPES["float4_e2m1fn"], (3,)), {}, "'odd'"),
    ],
)
def test_what_no_file_can_hold_is_refused(names, spec, metadata, part):
    with pytest.raises(UsageError) as caught:
        fmt.header_bytes(dict.fromkeys(names, spec), metadata)
    assert part in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_header_over_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(fmt, "MAX_JSON", 64)
    spec = TensorSpec(DTYPES["int8"], (1,))
    assert len(fmt.header_bytes({"a": spec}, {})[0]) <= 72
    with pytest.raises(UsageError, match="smaller shards"):
        fmt.header_bytes({"a": spec, "b": spec}, {})


# Shards


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 12) | st.integers(0, 100), max_size=30), st.integers(1, 40), st.sampled_from(["model", "m-{x}"]))
def test_shards_equal_huggingface_hub(sizes, limit, stem):
    sizes = {f"t{i}": size for i, size in enumerate(sizes)}
    pattern = stem.replace("{", "{{").replace("}", "}}") + "{suffix}.safetensors"
    theirs = split_state_dict_into_shards_factory(sizes, get_storage_size=int, filename_pattern=pattern, max_shard_size=limit)
    ours = split_into_shards(sizes, limit, stem, ".safetensors")
    expected = theirs.filename_to_tensors or {f"{stem}.safetensors": []}  # no tensors: theirs is no file at all
    assert list(ours.items()) == list(expected.items())


def test_no_limit_is_one_file():
    assert split_into_shards({"a": 10**15, "b": 1}, None, "model", ".safetensors") == {"model.safetensors": ["a", "b"]}


def test_an_oversized_tensor_is_numbered_before_the_open_shard():
    files = split_into_shards({"a": 1, "big": 9, "b": 1}, 4, "model", ".safetensors")
    assert files == {"model-00001-of-00002.safetensors": ["big"], "model-00002-of-00002.safetensors": ["a", "b"]}


def test_a_sharded_layout_reads_back(tmp_path):
    tensors = {f"layer.{i}": make(torch.float32, 2, i) for i in (3, 0, 2, 1)} | {"ids": make(torch.int64, 5), "é": make(torch.bfloat16)}
    specs = specs_of(tensors)
    layouts = fmt.lay_out(specs, metadata=PT, max_shard_size=40)
    assert [layout.path for layout in layouts] == [*(f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)), fmt.KIND.index]
    for layout in layouts:
        content = filled(layout, tensors)
        (tmp_path / layout.path).write_bytes(content)
        if layout.slots:
            assert content == save({name: tensors[name] for name in layout.slots}, PT)
    weight_map = {name: layout.path for layout in layouts[:-1] for name in layout.slots}
    metadata = {"total_size": 24 + 16 + 8 + 40 + 2, "total_parameters": 6 + 4 + 2 + 5 + 1}
    expected = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    assert (tmp_path / fmt.KIND.index).read_text() == expected
    assert not layouts[-1].slots

    contents = fmt.read(locate(tmp_path))
    assert {name: entry.spec for name, entry in contents.entries.items()} == specs
    assert list(contents.entries) == [name for layout in layouts for name in layout.slots]
    assert [file.local for file in contents.files] == [tmp_path / layout.path for layout in layouts[:-1]]
    assert [file.local for file in contents.others] == [tmp_path / fmt.KIND.index]
    assert (contents.metadata, contents.format) == (PT, "safetensors")
    for name, entry in contents.entries.items():
        (extent,) = entry.extents
        with Path(extent.path).open("rb") as file:
            file.seek(extent.offset)
            assert file.read(extent.nbytes) == bytes_of(tensors[name])


def test_layouts_of_one_file():
    specs = specs_of({"a": make(torch.uint8, 100), "b": make(torch.uint8, 100)})
    assert [layout.path for layout in fmt.lay_out(specs, metadata=PT, max_shard_size=200)] == ["model.safetensors"]
    assert [layout.path for layout in fmt.lay_out(specs, metadata=PT, max_shard_size=100, file="x.safetensors")] == ["x.safetensors"]


def test_no_tensors_are_one_empty_file(tmp_path):
    (layout,) = fmt.lay_out({}, metadata={}, max_shard_size=10)
    assert filled(layout, {}) == save({})
    (tmp_path / layout.path).write_bytes(filled(layout, {}))
    assert fmt.read(locate(tmp_path)).entries == {}


# Reading


def test_a_file_reads_as_the_reference_reads_it(tmp_path):
    tensors = {f"{i}": make(dtype, 2, 2) for i, dtype in enumerate(TORCH_TYPES)} | {"s": make(torch.float64), "e": make(torch.int8, 0)}
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tensors, PT))
    entries, metadata = fmt.read_file(locate(path))
    assert metadata == PT
    assert {name: entry.spec for name, entry in entries.items()} == specs_of(tensors)
    assert list(entries) == fmt.order_in_file(specs_of(tensors))
    content = path.read_bytes()
    for name, entry in entries.items():
        (extent,) = entry.extents
        assert extent.path == str(path)
        assert content[extent.offset : extent.offset + extent.nbytes] == bytes_of(tensors[name])


ENTRY = '"dtype":"F32","shape":[2],"data_offsets":[0,8]'
HEADERS = {  # as the reference library takes them
    "metadata null": f'{{"__metadata__":null,"w":{{{ENTRY}}}}}',
    "metadata last": f'{{"w":{{{ENTRY}}},"__metadata__":{{"a":"b"}}}}',
    "unknown field": f'{{"w":{{{ENTRY},"note":"x"}}}}',
    "unknown fields": f'{{"w":{{"strides":[1],{ENTRY},"note":{{"a":[1,2.5,null]}},"q":null}}}}',
    "unknown field twice": f'{{"w":{{"note":1,"note":2,{ENTRY}}}}}',
    "fields in another order": '{"w":{"data_offsets":[0,8],"shape":[2],"dtype":"F32"}}',
    "fields as a list": '{"w":["F32",[2],[0,8]]}',
    "blanks around": f' \n{{ "w" : {{{ENTRY}}} }}\r\n\t ',
    "escapes": f'{{"\\u0077":{{{ENTRY}}}}}'.replace("F32", "F\\u0033\\u0032"),
    "empty tensors": f'{{"a":{{"dtype":"I8","shape":[0,3],"data_offsets":[0,0]}},"w":{{{ENTRY}}},"z":{{"dtype":"F32","shape":[0],'
    '"data_offsets":[8,8]}}',
    "no name": f'{{"":{{{ENTRY}}}}}',
    "dtype twice behind another": f'{{"w":{{"n":1,"n":2,"dtype":"F32",{ENTRY}}}}}',
    "metadata of numbers": f'{{"__metadata__":{{"a":1}},"w":{{{ENTRY}}}}}',
    "metadata of null": f'{{"__metadata__":{{"a":null}},"w":{{{ENTRY}}}}}',
    "list too long": '{"w":["F32",[2],[0,8],1]}',
    "entry null": '{"w":null}',
    "trailing comma": f'{{"w":{{{ENTRY}}},}}',
    "trailing zero": f'{{"w":{{{ENTRY}}}}}\0',
    "unknown field not JSON": f'{{"w":{{{ENTRY},"note":NaN}}}}',
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_are_taken_as_the_reference_takes_them(tmp_path, case):
    path = tmp_path / "x.safetensors"
    path.write_bytes(container(HEADERS[case].encode(), bytes(range(8))))
    try:
        with safe_open(path, "pt") as file:
            wanted = {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError:
        refusal(path)
        return
    checkpoint = open_checkpoint(path)
    assert {name: entry.torch().tolist() for name, entry in checkpoint.items()} == wanted
    assert checkpoint.metadata == metadata


def test_entries_are_in_offset_order_whatever_the_header_says(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(container({"b": tensor(2, 5), "empty": tensor(2, 2), "a": tensor(0, 2)}, bytes(5)))
    assert list(fmt.read_file(locate(path))[0]) == ["a", "empty", "b"]


def test_equal_specs_are_one_object(tmp_path):
    entries = fmt.read(locate(put(tmp_path, x1=["x", "y"], x2=["z"]))).entries
    assert len({id(entry.spec) for entry in entries.values()}) == 1


def test_relative_paths_become_absolute_and_links_stay(tmp_path, monkeypatch):
    put(tmp_path, real=["x"])
    (tmp_path / "link.safetensors").symlink_to("real.safetensors")
    monkeypatch.chdir(tmp_path)
    contents = fmt.read(locate(Path("link.safetensors")))
    assert contents.entries["x"].extents[0].path == str(tmp_path / "link.safetensors")
    assert [file.local for file in contents.files] == [tmp_path / "link.safetensors"]


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, case):
    content, part, name = BAD[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert part in message
    assert name is None or repr(name) in message
    with pytest.raises(FormatError):
        fmt.read_file(locate(path))


def test_a_path_with_a_newline_still_makes_one_line(tmp_path):
    path = tmp_path / "a\nb.safetensors"
    path.write_bytes(b"")
    assert repr(str(path))[1:-1] in refusal(path)


def test_paths_that_cannot_be_read(tmp_path):
    assert "no such file" in refusal(tmp_path / "none", UsageError)
    put(tmp_path, a=["x"])
    assert "no such file" in refusal(tmp_path / "a.safetensors" / "b", UsageError)
    assert "cannot be read" in refusal(tmp_path / "nul\0", UsageError)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert "cannot be read" in refusal(loop, UsageError)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert "regular file" in refusal(fifo)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable to root")
def test_a_file_without_permission(tmp_path):
    path = put(tmp_path, a=["x"]) / "a.safetensors"
    path.chmod(0)
    assert str(path) in refusal(path, UsageError)


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("mutations") / "x.safetensors"


VALID = [
    save({"a": make(torch.float32, 2), "b-0": make(torch.bool), "c": make(torch.int8, 0, 3), "é": make(torch.float8_e5m2, 2, 1)}, PT),
    container({"p": tensor(0, 3, "F6_E2M3", [2, 2]), "q": tensor(3, 4, "F4", [2])}, b"1234"),
    save({}),
]
TOKENS = [
    b"-",
    b"0",
    b"1",
    b".",
    b"e",
    b",",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b"\\",
    b"\\ud800",
    b" ",
    b"null",
    b"true",
    b"F4",
    b"\x00",
    b"\xff",
    b'"a":',
]


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(VALID),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3), st.sampled_from(TOKENS) | st.binary(max_size=2)), min_size=1, max_size=4),
    st.booleans(),
)
def test_a_mutated_file_reads_as_the_reference_reads_it_or_is_refused(scratch, valid, edits, mend):
    content = valid
    header_end = 8 + int.from_bytes(valid[:8], "little")
    for position, removed, inserted in edits:
        at = position % (len(content) + 1)
        content = content[:at] + inserted + content[at + removed :]
    if mend:  # make the length right again, so that more of them get as far as the JSON
        data = len(valid) - header_end
        length = max(0, len(content) - 8 - data)
        content = struct.pack("<Q", length) + content[8:]
    scratch.write_bytes(content)
    try:
        entries, _ = fmt.read_file(locate(scratch))
    except StreamconvError as error:
        refused = error
    else:
        refused = None
    if refused is not None:
        assert type(refused) is FormatError
        assert str(refused).isprintable()
        return
    theirs = {name: (info["dtype"], info["shape"], bytes(info["data"])) for name, info in safetensors.deserialize(content)}
    codes = {name: code for code, name in fmt.CODES.items()}
    ours = {}
    for name, entry in entries.items():
        (extent,) = entry.extents
        data = content[extent.offset : extent.offset + extent.nbytes]
        ours[name] = (codes[entry.spec.dtype.name], list(entry.spec.shape), data)
    assert ours == theirs


# Directories


def names_of(path, **options):
    return list(fmt.read(locate(path), **options).entries)


def test_without_an_index_model_safetensors_counts_alone(tmp_path):
    put(tmp_path, b=["b"])
    assert names_of(tmp_path) == ["b"]
    put(tmp_path, model=["m"])
    contents = fmt.read(locate(tmp_path))
    assert (list(contents.entries), contents.others) == (["m"], [])
    assert [file.local for file in contents.files] == [tmp_path / "model.safetensors"]


def test_other_and_hidden_files_do_not_count(tmp_path):
    put(tmp_path, a=["a"])
    (tmp_path / "._a.safetensors").write_bytes(b"junk")
    (tmp_path / "b.safetensors.partial").write_bytes(b"junk")
    assert names_of(tmp_path) == ["a"]


def test_the_order_is_that_of_transformers_diffusers_and_peft(tmp_path):
    put(tmp_path, adapter_model=["p"], other=["o"])
    assert names_of(tmp_path) == ["p"]
    put(tmp_path, x=["x"])
    put_index(tmp_path, {"x": "x.safetensors"}, "diffusion_pytorch_model.safetensors.index.json")
    put(tmp_path, diffusion_pytorch_model=["d"])
    assert names_of(tmp_path) == ["x"], "diffusers looks for the index first"
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert names_of(tmp_path) == ["d"]
    put(tmp_path, y=["y"])
    put_index(tmp_path, {"y": "y.safetensors"})
    contents = fmt.read(locate(tmp_path))
    assert (list(contents.entries), [file.local for file in contents.others]) == (["y"], [tmp_path / fmt.KIND.index])
    put(tmp_path, model=["m"])
    contents = fmt.read(locate(tmp_path))
    assert (list(contents.entries), contents.others) == (["m"], []), "transformers looks for the single file first"
    (note,) = contents.notes
    assert note.startswith("model.safetensors is read; not read: adapter_model.safetensors, diffusion_pytorch_model.safetensors, ")
    assert note.endswith("model.safetensors.index.json, other.safetensors, x.safetensors, y.safetensors")


@pytest.mark.parametrize(
    "names",
    [
        ["x-00001-of-00002", "x-00002-of-00002"],
        ["x-00000-of-00002", "x-00001-of-00002"],
        ["model_00001", "model_00002", "model_00003"],
        ["0", "1"],
        ["part.0.pt", "part.1.pt"],
        [f"shard{n}" for n in range(12)],
    ],
)
def test_numbered_files_are_one_checkpoint(tmp_path, names):
    put(tmp_path, **{name: [f"{name}.weight"] for name in names})
    assert names_of(tmp_path) == [f"{name}.weight" for name in names]
    put(tmp_path, consolidated=["c"])
    assert names_of(tmp_path) == [f"{name}.weight" for name in names], "Mistral's own file, beside shards of transformers'"


@pytest.mark.parametrize(
    "names",
    [
        ["a", "b"],
        ["llama-7b", "llama-13b"],
        ["step_1000", "step_2000"],
        ["unet", "vae", "text_encoder"],
        ["a-00001-of-00002", "a-00002-of-00002", "b"],
        ["x-00001-of-00001", "y-00001-of-00001"],
        ["x1", "x2", "other"],
    ],
)
def test_several_checkpoints_in_one_folder_are_refused(tmp_path, names):
    put(tmp_path, **{name: [name] for name in names})
    message = refusal(tmp_path)
    assert "checkpoints in one folder" in message
    assert all(f"{name}.safetensors" in message for name in (names[0], names[-1]))


def test_several_other_indexes_are_refused(tmp_path):
    for stem in "ab":
        put(tmp_path, **{stem: [stem]})
        put_index(tmp_path, {stem: f"{stem}.safetensors"}, f"{stem}.safetensors.index.json")
    message = refusal(tmp_path)
    assert "a.safetensors.index.json" in message
    assert "b.safetensors.index.json" in message


def test_order_of_files_is_by_number_else_as_the_index_lists_them(tmp_path):
    put(tmp_path, **{"model-00002-of-00002": ["a"], "model-00001-of-00002": ["z", "b"]})
    put_index(
        tmp_path,
        {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors", "z": "model-00001-of-00002.safetensors"},
    )
    assert names_of(tmp_path) == ["z", "b", "a"]
    other = put(tmp_path / "other", x=["a"], b=["z", "b"])
    put_index(other, {"a": "x.safetensors", "b": "b.safetensors", "z": "b.safetensors"})
    assert names_of(other) == ["a", "z", "b"]


def test_a_missing_shard_is_noticed_without_an_index(tmp_path):
    put(tmp_path, **{"model-00001-of-00003": ["a"], "model-00003-of-00003": ["b"], "extra": ["c"]})
    assert "2 of the 3" in refusal(tmp_path)
    put(tmp_path, **{"model-00002-of-00003": ["d"]})
    contents = fmt.read(locate(tmp_path))
    assert list(contents.entries) == ["a", "d", "b"]
    assert contents.notes[0].endswith("model-00003-of-00003.safetensors are read; not read: extra.safetensors")


def test_an_empty_directory_is_refused(tmp_path):
    assert str(tmp_path) in refusal(tmp_path)


def test_a_directory_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    assert "regular file" in refusal(tmp_path)


def test_a_hub_snapshot_of_links_reads_like_files(tmp_path):
    blobs = put(tmp_path / "blobs", one=["a"], two=["b"])
    put_index(blobs, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}, "three")
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    targets = {
        "model-00001-of-00002.safetensors": "one.safetensors",
        "model-00002-of-00002.safetensors": "two.safetensors",
        fmt.KIND.index: "three",
    }
    for link, target in targets.items():
        (snapshot / link).symlink_to(f"../../blobs/{target}")
    contents = fmt.read(locate(snapshot))
    assert list(contents.entries) == ["a", "b"]
    assert contents.entries["b"].extents[0].path == str(snapshot / "model-00002-of-00002.safetensors")
    (blobs / "two.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refusal(snapshot)
    (snapshot / fmt.KIND.index).unlink()
    assert "model-00002-of-00002.safetensors" in refusal(snapshot)


@pytest.mark.parametrize(
    "shard",
    [
        "",
        ".",
        "..",
        "../a.safetensors",
        "sub/../../a.safetensors",
        "sub/../a.safetensors",
        "/a.safetensors",
        "//a.safetensors",
        "./a.safetensors",
        "sub//a.safetensors",
        "..\\a.safetensors",
        "C:\\a.safetensors",
        "a\0.safetensors",
        "a.bin",
        "config.json",
        "a.safetensors/",
        None,
        1,
        ["a"],
    ],
)
def test_an_index_cannot_lead_out_of_its_directory(tmp_path, shard):
    put(tmp_path, a=["evil"])
    inside = put(tmp_path / "inside", a=["evil"])
    put(inside / "sub", a=["evil"])
    put_index(inside, {"evil": shard})
    message = refusal(inside)
    assert message.startswith(f"{inside / fmt.KIND.index}: tensor 'evil'")


def test_an_index_may_name_a_file_in_a_folder(tmp_path):
    put(tmp_path / "sub", a=["x"])
    put_index(tmp_path, {"x": "sub/a.safetensors"})
    assert names_of(tmp_path) == ["x"]
    assert names_of(tmp_path, by_rank=True) == ["sub/a.safetensors/x"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "not JSON"),
        ("[]", "JSON object"),
        ("{}", "weight_map"),
        ('{"weight_map": []}', "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"a": "a.safetensors", "a": "a.safetensors"}}', "'a' twice"),
        ('{"weight_map": {"a": "a.safetensors"}, "weight_map": {}}', "'weight_map' twice"),
        ('{"metadata": NaN, "weight_map": {"a": "a.safetensors"}}', "NaN"),
        ('{"metadata": ' + "[" * 100_000, "not JSON"),
        ('{"weight_map": {"\udcff": "a.safetensors"}}', "UTF-8"),
        ('{"weight_map": {"a": "\\ud800.safetensors"}}', "below this directory"),
        ('{"weight_map": {"a": "none.safetensors"}}', "'none.safetensors'"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, text, part):
    put(tmp_path, a=["a"])
    (tmp_path / fmt.KIND.index).write_bytes(text.encode(errors="surrogateescape"))
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / fmt.KIND.index}: ")
    assert part in message


def test_a_huge_index_is_not_parsed(tmp_path):
    with (tmp_path / fmt.KIND.index).open("wb") as file:
        file.truncate(100_000_001)
    assert "100000001" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "parts"),
    [
        ({"x": "a", "y": "a", "z": "b", "lost": "b", "gone": "a"}, ["2 tensors", "'lost'", "no file", "'b.safetensors'"]),
        ({"x": "b", "y": "a", "z": "a"}, ["2 tensors", "'z'", "'a.safetensors'", "'b.safetensors'"]),
    ],
)
def test_an_index_that_contradicts_the_files_is_refused(tmp_path, weight_map, parts):
    put(tmp_path, a=["x", "y"], b=["z"])
    put_index(tmp_path, {name: f"{stem}.safetensors" for name, stem in weight_map.items()})
    message = refusal(tmp_path)
    for part in [str(tmp_path / fmt.KIND.index), *parts]:
        assert part in message


def test_what_files_hold_counts_where_an_index_forgets_it_or_names_an_alias(tmp_path):
    put(tmp_path, a=["model.embed_tokens.weight", "y"], b=["z"])
    where = {"model.embed_tokens.weight": "a", "z": "b", "lm_head.weight": "b", "layers.0.rotary_emb.inv_freq": "a"}
    put_index(tmp_path, {name: f"{stem}.safetensors" for name, stem in where.items()})
    contents = open_checkpoint(tmp_path).contents
    assert sorted(contents.entries) == ["model.embed_tokens.weight", "y", "z"]
    absent, extra = contents.notes
    assert absent.startswith("2 tensors that model.safetensors.index.json names in no file, such as 'lm_head.weight', another name of ")
    assert absent.endswith("model.embed_tokens.weight: left out")
    assert extra == "1 tensor that model.safetensors.index.json does not name, such as 'y': read all the same"
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": false}')
    with pytest.raises(FormatError, match=r"'lm_head\.weight' is in no file"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"text_config": {"tie_word_embeddings": true}}')
    assert len(open_checkpoint(tmp_path)) == 3


def test_a_tensor_in_two_files_is_refused_or_named_by_rank(tmp_path):
    put(tmp_path, r0=["w", "x"], r1=["w"])
    message = refusal(tmp_path)
    for part in (str(tmp_path), "'w'", "'r0.safetensors'", "'r1.safetensors'", "<file>/<name>"):
        assert part in message
    contents = fmt.read(locate(tmp_path), by_rank=True)
    assert list(contents.entries) == ["r0.safetensors/w", "r0.safetensors/x", "r1.safetensors/w"]
    assert contents.entries["r1.safetensors/w"].extents[0].path == str(tmp_path / "r1.safetensors")
    assert names_of(tmp_path / "r1.safetensors", by_rank=True) == ["r1.safetensors/w"]


def test_a_second_copy_is_refused_with_an_index_too(tmp_path):
    put(tmp_path, a=["x", "y"], b=["x"])
    put_index(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"})
    assert "'b.safetensors'" in refusal(tmp_path)


def test_metadata_of_several_files_is_joined_the_first_counts(tmp_path):
    for stem, metadata in {"x1": {"format": "pt", "k": "a"}, "x2": {"format": "pt", "k": "b", "only": "b"}}.items():
        (tmp_path / f"{stem}.safetensors").write_bytes(container({"__metadata__": metadata}))
    assert fmt.read(locate(tmp_path)).metadata == {"format": "pt", "k": "a", "only": "b"}
