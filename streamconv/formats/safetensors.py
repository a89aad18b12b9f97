"""Safetensors: reads headers and indexes without trusting them, and lays out files as the reference library writes them.

A file is eight bytes of header length (little-endian), a JSON header padded with spaces, and the tensors' bytes back to
back. A checkpoint is one file, or several in a directory, usually with an index that maps tensor names to file names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import msgspec

from streamconv import memory
from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import UsageError
from streamconv.formats import Contents, Extent, FileLayout, Source
from streamconv.formats.container import Beginning, Container, Names
from streamconv.formats.files import (
    Table,
    check_unicode,
    countable,
    damaged,
    index_layout,
    index_name,
    lfs_pointer,
    map_layout,
    opened,
    short,
    show,
    split_into_shards,
    variant_stem,
)
from streamconv.formats.indexes import Explain, unexplained
from streamconv.formats.json_text import MAX_JSON, Repeated, parse_object
from streamconv.formats.selection import Selection, find_files, gather
from streamconv.storage.folder import Location, read_each

KIND = Names(
    "a safetensors file",
    (".safetensors",),
    "model",
    (r".*\.safetensors",),
    others=r"(optimizer|scheduler|scaler|random_states|rng_state).*\.safetensors",
    libraries=(
        "model.safetensors",
        "model.safetensors.index.json",  # of transformers
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.safetensors",  # of diffusers, which looks for the index first
        "adapter_model.safetensors",  # of PEFT
    ),
    other_index="param_name_map.json",  # of mindspore.unified_safetensors, which leaves out what has no strategy
    unlisted="hyper_param.safetensors",
    weights=("*.safetensors", "*.safetensors.index.json", "*.safetensors.index.*.json", "param_name_map.json"),
    stems={
        "transformers": "model",
        "diffusers": "diffusion_pytorch_model",
        "diffusers-lora": "pytorch_lora_weights",
        "diffusers-embeds": "learned_embeds",
        "peft": "adapter_model",
        "open_clip": "open_clip_model",
    },
    originals="consolidated",
    asked_for=("model.safetensors.index.json", "model.safetensors", "consolidated.safetensors", "param_name_map.json"),
    ranks=(r"consolidated\.(?P<rank>\d{1,5})\.safetensors", r"model(?P<rank>\d{1,5})-mp(?P<size>\d{1,5})\.safetensors"),
)

# In the order in which the reference library puts them into a file: widest first, so that all stay aligned.
CODES: dict[str, str] = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "F6_E3M2": "float6_e3m2fn",
    "F6_E2M3": "float6_e2m3fn",
    "F4": "float4_e2m1fn",
    "BOOL": "bool",
}
_CODE_OF = {name: code for code, name in CODES.items()}
_RANK = {name: rank for rank, name in enumerate(CODES.values())}

_FIELDS = dict.fromkeys(("dtype", "shape", "data_offsets"))
_BLANKS = b" \t\r\n"
_METADATA = "__metadata__"
_INTEGERS = {int}

_Specs = dict[tuple[str, tuple[int, ...]], TensorSpec]


# Reading ---------------------------------------------------------------------------------------------------------


def read(
    path: Location, *, by_rank: bool = False, files: Sequence[str] | Selection | None = None, explain: Explain = unexplained
) -> Contents:
    """The contents of a file, of the files that an index names, or of a directory, in the order of the libraries: see `selection`.

    Args:
        path: a ``.safetensors`` file, an index or a directory.
        by_rank: present each tensor as ``<file>/<name>``, for files of ranks, which repeat names.
        files: names of the files of the directory to read, in this order, instead of looking for them.
        explain: see `check_index`.

    Raises:
        FormatError: damaged, incomplete or contradictory files; a tensor in two files without ``by_rank``.
        UsageError: the path is not there or cannot be read.
    """
    selection = find_files(path, KIND, files, by_rank=by_rank)
    specs: _Specs = {}
    tables: dict[str, Table] = {}
    metadata: dict[str, str] = {}
    each = read_each(selection.files.values(), KIND.noun, lambda file: _read_file(file, specs))
    for name, (table, texts) in zip(selection.files, each, strict=True):
        tables[name] = table
        metadata = texts | metadata  # files agree as a rule; where not, the first has its say
    return gather("safetensors", path, selection, tables, by_rank=by_rank, explain=explain, metadata=metadata)


def read_file(path: Location) -> tuple[Table, dict[str, str]]:
    """The tensors of one file in the order of their offsets, and its metadata.

    Raises:
        FormatError: the file breaks a rule of the format.
        UsageError: the file is not there or cannot be read.
    """
    return _read_file(path, {})


def _read_file(path: Location, specs: _Specs) -> tuple[Table, dict[str, str]]:
    header, data_start, size = _read_header(path)
    metadata = header.pop(_METADATA, None)
    metadata = {} if metadata is None else metadata  # null is none for the reference library, too
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise damaged(path, f"{_METADATA} must map strings to strings, without repeating one, and is {short.repr(metadata)}")
    check_unicode(path, header, metadata, metadata.values())

    rows = []
    for name, entry in header.items():
        info = _fields(path, name, entry)
        rows.append((*_offsets(path, name, info), name, _spec(path, name, info, specs)))
    rows.sort(key=itemgetter(0, 1))
    where, position = str(path), 0
    entries: Table = {}
    for begin, end, name, spec in rows:
        if begin != position:
            what = "leaves a gap after" if begin > position else "overlaps"
            raise damaged(path, f"its data starts at {begin} and {what} the tensor before, which ends at {position}", name)
        if end - begin != spec.nbytes:
            raise damaged(path, f"{spec} needs {spec.nbytes} bytes, its data_offsets [{begin}, {end}] hold {end - begin}", name)
        entries[name] = Source(spec, (Extent(where, data_start + begin, end - begin),))
        position = end
    if data_start + position != size:
        missing = data_start + position - size
        what = f"{missing} bytes are missing at the end" if missing > 0 else f"{-missing} bytes at the end belong to no tensor"
        raise damaged(path, f"the header describes {data_start + position} bytes, the file has {size}: {what}")
    return entries, metadata


def _read_header(path: Location) -> tuple[dict[str, Any], int, int]:
    """The header as it stands, where the data starts, and the file's size."""
    with opened(path, KIND.noun) as file:
        raw, size = file.read(8), file.size
        length = int.from_bytes(raw, "little")
        if raw == b"version ":
            raise lfs_pointer(path)
        if len(raw) < 8:
            raise damaged(path, f"it has {size} bytes, a safetensors file has 8 and a header at least")
        if length > MAX_JSON:
            raise damaged(path, f"it announces a header of {length} bytes, the format allows {MAX_JSON}")
        if length > size - 8:
            raise damaged(path, f"it announces a header of {length} bytes, and only {size - 8} follow")
        memory.claim(2 * length, f"{show(path)}: its header of {length} bytes")
        raw = file.read(length)
    if not raw.lstrip(_BLANKS).startswith(b"{"):
        raise damaged(path, f"its header must start with '{{' and starts with {raw[:8]!r}")
    return parse_object(path, raw, "header"), 8 + length, size


def _fields(path: Location, name: str, info: object) -> dict[str, Any]:
    """The fields of one tensor's entry; others, and a list of the three, are as the reference library has them."""
    if type(info) is list and len(info) == len(_FIELDS):
        return dict(zip(_FIELDS, info, strict=True))
    if not isinstance(info, dict):
        raise damaged(path, f"its entry must be a JSON object and is {short.repr(info)}", name)
    twice = [key for key in info.keys_said_twice if key in _FIELDS] if isinstance(info, Repeated) else []
    if twice:
        raise damaged(path, f"its entry says {short.repr(twice[0])} twice", name)
    if not _FIELDS.keys() <= info.keys():
        raise damaged(path, f"its entry must have the fields dtype, shape, data_offsets and has {short.repr(list(info))}", name)
    return info


def _offsets(path: Location, name: str, info: dict[str, Any]) -> tuple[int, int]:
    """The data_offsets of one tensor's entry."""
    offsets = info["data_offsets"]
    if type(offsets) is list and len(offsets) == 2:
        begin, end = offsets
        if type(begin) is int and type(end) is int and 0 <= begin <= end:
            return begin, end
    raise damaged(path, f"data_offsets must be two integers, 0 <= begin <= end, and are {short.repr(offsets)}", name)


def _spec(path: Location, name: str, info: dict[str, Any], specs: _Specs) -> TensorSpec:
    """Dtype and shape of an entry, one object for all equal ones: models repeat few of them very often."""
    code, shape = info["dtype"], info["shape"]
    if type(code) is not str or code not in CODES:
        raise damaged(path, f"unknown dtype {short.repr(code)}, known are {', '.join(CODES)}", name)
    # The exact type is asked for each time: True and 1.0 equal 1, and would be found among the specs.
    if type(shape) is not list or not _INTEGERS.issuperset(map(type, shape)):
        raise damaged(path, f"its shape must be a list of integers and is {short.repr(shape)}", name)
    key = (code, tuple(shape))
    spec = specs.get(key)
    if spec is None:
        if not countable(shape):
            raise damaged(path, f"its shape must be of sizes from 0, in all below 2**63 elements, and is {short.repr(shape)}", name)
        spec = TensorSpec(DTYPES[CODES[code]], key[1])
        if not spec.is_whole:
            raise damaged(path, f"{spec} ends inside a byte: it has {spec.numel} elements, and {spec.dtype.packing}", name)
        specs[key] = spec
    return spec


# Writing ---------------------------------------------------------------------------------------------------------


def order_in_file(specs: Mapping[str, TensorSpec]) -> list[str]:
    """The names in the order of the reference library: by dtype, then by name (code points compare as UTF-8 does)."""
    return sorted(specs, key=lambda name: (_RANK[specs[name].dtype.name], name))


def header_bytes(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str], align: int = 8) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file of these tensors, length included, and where in the file each tensor starts.

    The header is padded with spaces so that the data starts at a multiple of ``align``; the reference library's own is 8.

    Raises:
        UsageError: a name that cannot be stored, a packed tensor that ends inside a byte, or too many tensors for one file.
    """
    for name, spec in specs.items():
        if spec.dtype.name not in _CODE_OF:
            remedy = f"safetensors has no type for {spec.dtype}: leave it out, or choose a container that has with --format"
            raise UsageError(f"tensor {short.repr(name)}: {remedy}")
    if _METADATA in specs:
        raise UsageError(f"a tensor cannot be named {_METADATA!r} in a safetensors file: rename it")
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    position, slots = 0, {}
    for name in order_in_file(specs):
        spec, begin = specs[name], position
        if not spec.is_whole:
            raise UsageError(f"tensor {short.repr(name)}: {spec} ends inside a byte, which safetensors cannot store: leave it out")
        position += spec.nbytes
        slots[name] = begin
        header[name] = {"dtype": _CODE_OF[spec.dtype.name], "shape": list(spec.shape), "data_offsets": [begin, position]}
    try:
        text = msgspec.json.encode(header)
    except UnicodeEncodeError as error:
        raise UsageError(f"a name or metadata holds {error.object[error.start]!r}, which UTF-8 cannot store: rename it") from error
    text += b" " * (-(8 + len(text)) % align)
    if len(text) > MAX_JSON:
        raise UsageError(f"the header of {len(specs)} tensors takes {len(text)} bytes, safetensors allows {MAX_JSON}: use smaller shards")
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + begin for name, begin in slots.items()}


def lay_out(
    specs: Mapping[str, TensorSpec],
    *,
    metadata: Mapping[str, str],
    max_shard_size: int | None,
    file: str | None = None,
    align: int = 8,
    stem: str = KIND.stem,
    variant: str | None = None,
    index: str | None = None,
) -> list[FileLayout]:
    """The files of a checkpoint, with paths relative to it; the index, if there is more than one, comes last.

    Args:
        specs: the tensors, in tensor order.
        metadata: goes into each file.
        max_shard_size: see `split_into_shards`.
        file: the name of the one file to make, whatever its size.
        align: bytes that the data's start in each file is a multiple of.
        stem: how the files' names start.
        variant: of which variant of the weights they say that they are, after the stem.
        index: the name of an index without anything but the files of the tensors, for a single file too.

    Raises:
        UsageError: see `header_bytes`.
    """
    sizes = {name: spec.nbytes for name, spec in specs.items()}
    shards = {file: list(specs)} if file else split_into_shards(sizes, max_shard_size, variant_stem(stem, variant), KIND.suffixes[0])
    layouts = []
    for path, names in shards.items():
        header, slots = header_bytes({name: specs[name] for name in names}, metadata, align)
        layouts.append(FileLayout(path, len(header) + sum(sizes[name] for name in names), ((0, header),), slots))
    if index and not file:
        layouts.append(map_layout(index, shards))
    elif len(shards) > 1:
        layouts.append(index_layout(index_name(stem, KIND.suffixes[0], variant), shards, specs.values()))
    return layouts


def recognizes(beginning: Beginning) -> bool:
    """Whether a file begins with the length of a header, and that with a brace."""
    head = beginning.head
    return head[8:].lstrip(_BLANKS).startswith(b"{") and int.from_bytes(head[:8], "little") <= MAX_JSON


CONTAINER = Container(
    name="safetensors",
    summary="safetensors",
    names=KIND,
    read=read,
    lay_out=lay_out,
    recognizes=recognizes,
    ties="named",
    takes=frozenset({"metadata", "align", "stem", "variant", "index"}),
)
