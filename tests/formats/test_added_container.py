"""A container that is no part of the product: all that anybody knows of it stands here.

A ``.crate`` is ``CRATE``, the length of a JSON table in four bytes (little-endian), that table - for each name dtype, shape, offset in what
follows, and the order of the elements - and the tensors' bytes. One of its dtypes packs elements into blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from checkpoint_files import assert_same, numbered, read, refusal, run, write
from fsspec.implementations.memory import MemoryFileSystem

import streamconv
from streamconv import Recipe, Rule, Side
from streamconv.dtypes import DTYPES, DType, TensorSpec
from streamconv.errors import UsageError
from streamconv.formats import AnyNode, Contents, Extent, FileLayout, Source, registry
from streamconv.formats.container import Beginning, Container, Names
from streamconv.formats.files import Table, damaged, index_layout, read_bytes, split_into_shards
from streamconv.formats.indexes import Explain, unexplained
from streamconv.formats.selection import Selection, find_files, gather
from streamconv.graph.views import stored_view
from streamconv.storage.folder import Location, read_each
from tools.range_server import Handler, Server

MAGIC = b"CRATE"
QUANT = DType("crate_q4", 18, 32)  # a scale of two bytes, and 32 numbers of four bits
NAMES = Names("a crate", (".crate",), "cargo", (r".*\.crate",))
_TYPES = {**DTYPES, QUANT.name: QUANT}


def read_crates(
    path: Location, *, by_rank: bool = False, files: Sequence[str] | Selection | None = None, explain: Explain = unexplained
) -> Contents:
    """The contents of a file, of the files that an index names, or of a directory."""
    selection = find_files(path, NAMES, files, by_rank=by_rank)
    tables = dict(zip(selection.files, read_each(selection.files.values(), NAMES.noun, _read_file), strict=True))
    return gather("crate", path, selection, tables, by_rank=by_rank, explain=explain)


def _read_file(path: Location) -> Table:
    raw, size = read_bytes(path, 0, 1 << 20, NAMES.noun)
    start = 9 + int.from_bytes(raw[5:9], "little")
    if not raw.startswith(MAGIC) or start > min(size, len(raw)):
        raise damaged(path, "it does not begin as a crate")
    table: Table = {}
    for name, (dtype, shape, offset, order) in json.loads(raw[9:start]).items():
        spec = TensorSpec(_TYPES[dtype], tuple(shape))
        if not spec.is_whole or start + offset + spec.nbytes > size:
            raise damaged(path, f"{spec} is not in its {size} bytes", name)
        table[name] = _node(spec, order, Extent(str(path), start + offset, spec.nbytes))
    return table


def _node(spec: TensorSpec, order: str, extent: Extent) -> AnyNode:
    """A stored tensor, or, if it lies column by column, a layout of one."""
    if order == "rows":
        return Source(spec, (extent,))
    strides = np.cumprod([1, *spec.shape[:-1]]).tolist()
    return stored_view(spec, strides, extent.path, extent.offset)


def lay_out(specs: Mapping[str, TensorSpec], *, max_shard_size: int | None, file: str | None = None) -> list[FileLayout]:
    """The files of a checkpoint; the index, if there is more than one, comes last."""
    if odd := next((name for name, spec in specs.items() if spec.dtype.name not in _TYPES), None):
        raise UsageError(f"tensor {odd!r}: a crate cannot hold {specs[odd]}: leave it out")
    sizes = {name: spec.nbytes for name, spec in specs.items()}
    shards = {file: list(specs)} if file else split_into_shards(sizes, max_shard_size, NAMES.stem, ".crate")
    layouts = []
    for path, names in shards.items():
        starts = np.cumsum([0, *(sizes[name] for name in names)]).tolist()
        header = header_of({name: (specs[name], start, "rows") for name, start in zip(names, starts, strict=False)})
        slots = {name: len(header) + start for name, start in zip(names, starts, strict=False)}
        layouts.append(FileLayout(path, len(header) + starts[-1], ((0, header),), slots))
    return layouts if len(shards) == 1 else [*layouts, index_layout(NAMES.index, shards, specs.values())]


def header_of(rows: Mapping[str, tuple[TensorSpec, int, str]]) -> bytes:
    """What stands before the tensors' bytes, by their specs, offsets and orders."""
    table = json.dumps({name: (spec.dtype.name, spec.shape, start, order) for name, (spec, start, order) in rows.items()}).encode()
    return MAGIC + len(table).to_bytes(4, "little") + table


def recognizes(beginning: Beginning) -> bool:
    """Whether a file begins as a crate does."""
    return beginning.head.startswith(MAGIC)


CRATE = Container(name="crate", summary="crates", names=NAMES, read=read_crates, lay_out=lay_out, recognizes=recognizes)


def write_crate(path: Path, tensors: Mapping[str, np.ndarray[Any, Any]], quantized: Mapping[str, tuple[int, ...]] | None = None) -> None:
    """A crate of arrays, stored in their own order, and of random blocks of these shapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: dict[str, tuple[TensorSpec, int, str]] = {}
    data = b""
    for name, array in tensors.items():
        order = "rows" if array.flags.c_contiguous else "columns"
        rows[name] = (TensorSpec(DTYPES[array.dtype.name], array.shape), len(data), order)
        data += array.tobytes("A")
    for number, (name, shape) in enumerate((quantized or {}).items()):
        rows[name] = (TensorSpec(QUANT, shape), len(data), "rows")
        data += np.random.default_rng(number).bytes(rows[name][0].nbytes)
    path.write_bytes(header_of(rows) + data)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The container is known while a test runs."""
    monkeypatch.setattr(registry, "_known", dict(registry.containers()))
    registry.register(CRATE)


# What the product does with it ---------------------------------------------------------------------------------------

CONFIG = {"model_type": "nothing", "architectures": ["Nothing"]}
TENSORS = numbered({"embed.weight": (40, 8), **{f"layers.{k}.weight": (8, 6 + k) for k in range(6)}, "step": ()})


@pytest.fixture
def model(tmp_path):
    """A folder of safetensors, with what lies beside weights."""
    folder = write(tmp_path / "model", TENSORS, shards=2, config=CONFIG)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def folder(model, tmp_path):
    """The same in crates, with an index."""
    assert run("convert", model, tmp_path / "crates", "--format", "crate", "--max-shard-size", "700", "--quiet") == 0
    return tmp_path / "crates"


def values(path):
    return {name: entry.torch() for name, entry in streamconv.open(path).items()}


def listed(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and ".streamconv" not in path.parts)


def test_it_is_written_and_read(model, folder, tmp_path, capsys):
    shards = [f"cargo-0000{k}-of-00004.crate" for k in range(1, 5)]
    assert listed(folder) == [*shards, "cargo.crate.index.json", "config.json", "tokenizer.json"]
    assert run("inspect", folder, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["format"], [file["path"] for file in told["files"]]) == ("crate", shards)
    assert run("verify", model, folder, "--quiet") == 0
    assert run("convert", folder, tmp_path / "back", "--single-file", "--verify", "--checksum", "--quiet") == 0
    assert_same(read(tmp_path / "back"), TENSORS)
    assert {"config.json", "tokenizer.json"} < {*listed(tmp_path / "back")}
    assert run("doctor", folder) == 0


def test_it_is_resharded_and_told_by_the_suffix_of_dst(folder, tmp_path):
    assert run("convert", folder, tmp_path / "one.crate", "--quiet") == 0
    assert_same(values(tmp_path / "one.crate"), TENSORS)
    plan = streamconv.plan(folder, tmp_path / "again", format="crate", max_shard_size="1KB")
    assert all(file.path.endswith((".crate", ".json")) for file in plan.files)
    streamconv.run(plan)
    assert_same(values(tmp_path / "again"), TENSORS)


def test_its_own_names_are_not_taken_for_names_that_people_gave(folder, tmp_path):
    (folder / "config.json").unlink()
    assert run("convert", folder, tmp_path / "out", "--quiet") == 0
    assert listed(tmp_path / "out") == ["model.safetensors", "tokenizer.json"]


def test_a_file_is_told_by_its_first_bytes(folder, tmp_path, capsys):
    assert run("convert", folder, tmp_path / "one.crate", "--quiet") == 0
    (tmp_path / "nameless").mkdir()
    for name in ("nameless/weights", "weights.safetensors"):
        (tmp_path / name).write_bytes((tmp_path / "one.crate").read_bytes())
    for name in ("nameless", "weights.safetensors"):
        assert streamconv.open(tmp_path / name).format == "crate"
        assert_same(values(tmp_path / name), TENSORS)
    (tmp_path / "one.crate").write_bytes(b"CRATE\0\0\0\1{}")
    assert "one.crate: it does not begin as a crate" in refusal(capsys, "inspect", tmp_path / "one.crate")


def test_overwrite_removes_its_stale_files(model, folder):
    (folder / "cargo.crate").write_bytes(b"old")
    (folder / "notes.txt").write_text("mine")
    assert run("convert", model, folder, "--overwrite", "--quiet") == 0
    assert listed(folder) == ["config.json", "model.safetensors", "notes.txt", "tokenizer.json"]
    assert run("convert", model, folder, "--overwrite", "--format", "crate", "--quiet") == 0
    assert listed(folder) == ["cargo.crate", "config.json", "notes.txt", "tokenizer.json"]


def test_its_files_are_weights_that_stay_behind_where_others_are_read(model, folder, tmp_path):
    (model / "cargo.crate").write_bytes((folder / "cargo-00001-of-00004.crate").read_bytes())
    plan = streamconv.plan(model, tmp_path / "out")
    assert not any(file.path.endswith(".crate") for file in plan.files)
    assert any("not read: cargo.crate" in note for note in plan.notes)


def test_what_lies_column_by_column_is_a_layout(tmp_path):
    matrix = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4))
    write_crate(tmp_path / "a.crate", {"w": matrix, "b": np.ones(3, np.float32)})
    assert run("convert", tmp_path / "a.crate", tmp_path / "out", "--verify", "--quiet") == 0
    assert read(tmp_path / "out")["w"].tolist() == matrix.tolist()


# Behind URLs -----------------------------------------------------------------------------------------------------------


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    """A server of a folder's files that cannot list them."""

    class Files(Handler):
        def answer(self) -> None:
            path = folder / unquote(self.path).strip("/")
            if not path.is_file():
                self.send_text(404)
                return
            data = path.read_bytes()
            self.send_range(len(data), "1", lambda start, stop: [data[start:stop]])

    with Server(Files) as server:
        yield server


def test_it_is_read_from_a_server_that_cannot_list(folder, tmp_path):
    with served(folder) as server:
        assert_same(values(server.url), TENSORS)
        assert run("convert", server.url, tmp_path / "out", "--quiet") == 0
        assert_same(read(tmp_path / "out"), TENSORS)
        assert {"config.json", "tokenizer.json"} <= {*listed(tmp_path / "out")}
        file = streamconv.open(f"{server.url}/cargo-00002-of-00004.crate")
        assert 0 < len(file) < len(TENSORS)


def test_it_is_read_from_a_store_and_written_to_one(folder):
    files = MemoryFileSystem()
    try:
        assert run("convert", folder, "memory://crates/one", "--format", "crate", "--max-shard-size", "1KB", "--quiet") == 0
        assert_same(values("memory://crates/one"), TENSORS)
        assert run("convert", folder, "memory://crates/one", "--overwrite", "--single-file", "--quiet") == 0
        assert [name.rpartition("/")[2] for name in sorted(files.find("/crates"))] == ["config.json", "model.safetensors", "tokenizer.json"]
    finally:
        files.store.clear()


# Without a writer, and by an entry point ----------------------------------------------------------------------------------


def test_without_a_writer_it_is_read_only(model, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(registry._known, "crate", replace(CRATE, lay_out=None))
    assert_same(values(folder), TENSORS)
    message = refusal(capsys, "convert", model, tmp_path / "out", "--format", "crate")
    assert "--format crate: such files are read, not written; known are safetensors, torch, mindspore, sat" in message
    assert "known are safetensors, torch, mindspore, sat" in refusal(capsys, "convert", model, tmp_path / "out", "--format", "crates")
    assert ".crate files are not written" in refusal(capsys, "convert", model, tmp_path / "out.crate")
    recipe = Recipe("to-crates", "", (Rule("{rest*}", "{rest*}"),), right=Side("crate"))
    with pytest.raises(streamconv.UsageError, match="such files are read, not written"):
        streamconv.plan(model, tmp_path / "out", recipe=recipe)
    with pytest.raises(streamconv.UsageError, match="the recipe's format boxes: unknown container; known are safetensors, torch"):
        streamconv.plan(model, tmp_path / "out", recipe=replace(recipe, right=Side("boxes")))
    assert not (tmp_path / "out").exists()


def test_another_package_adds_it_by_an_entry_point(folder, monkeypatch):
    entry = SimpleNamespace(name="crate", value="crates:CRATE", load=lambda: CRATE)
    monkeypatch.setattr("streamconv.extensions.entry_points", lambda group: [entry] if group == "streamconv.containers" else [])
    monkeypatch.setattr(registry, "_known", {})
    assert [*registry.containers()] == [*(name.partition(".")[2] for name in registry.MODULES), "crate"]
    assert_same(values(folder), TENSORS)
    with pytest.raises(streamconv.UsageError, match="register: there is a container called crate already"):
        registry.register(CRATE)
    monkeypatch.setattr(registry, "_known", {})
    monkeypatch.setattr(entry, "load", lambda: "crate")
    with pytest.raises(streamconv.UsageError, match=r"entry point crates:CRATE of group .*: expected a Container, found a str"):
        streamconv.open(folder)


# A dtype that packs elements into blocks -------------------------------------------------------------------------------------


EXPERTS = {f"experts.{k}.weight": (4, 64) for k in range(3)}


@pytest.fixture
def quantized(tmp_path):
    """A crate with tensors of that dtype."""
    write_crate(tmp_path / "q" / "cargo.crate", {"norm": np.ones(8, np.float32)}, EXPERTS)
    (tmp_path / "q" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "q"


def stored(folder: Path) -> dict[str, bytes]:
    """The bytes of each tensor, from where it lies."""
    data: dict[str, bytes] = {}
    for name, entry in streamconv.open(folder).items():
        (extent,) = entry.source.extents
        data[name] = Path(extent.path).read_bytes()[extent.offset : extent.offset + extent.nbytes]
    return data


def test_blocks_are_copied_and_shown(quantized, tmp_path, capsys):
    assert run("inspect", quantized) == 0
    assert "crate_q4" in capsys.readouterr().out
    assert run("convert", quantized, tmp_path / "out", "--format", "crate", "--max-shard-size", "150", "--verify", "--quiet") == 0
    assert len(list((tmp_path / "out").glob("*.crate"))) == 4
    assert stored(tmp_path / "out") == stored(quantized)
    assert run("verify", quantized, tmp_path / "out", "--quiet") == 0
    with pytest.raises(streamconv.UsageError, match="numpy has no packed crate_q4"):
        streamconv.open(quantized)["experts.0.weight"].numpy()


def test_layouts_move_whole_blocks(quantized, tmp_path):
    recipe = Recipe(
        "stack",
        "",
        (Rule("experts.{e}.weight", "experts", "e r c -> r e c"), Rule("norm", "norm")),
        left=Side("crate"),
        right=Side("crate"),
    )
    plan = streamconv.plan(quantized, tmp_path / "out", recipe=recipe)
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert run("run", tmp_path / "plan.json", "--verify", "--no-progress") == 0
    blocks = [np.frombuffer(stored(quantized)[name], "u1").reshape(4, 1, 2, 18) for name in EXPERTS]
    assert stored(tmp_path / "out")["experts"] == np.concatenate(blocks, axis=1).tobytes()
    assert streamconv.open(tmp_path / "out")["experts"].shape == (4, 3, 64)
    assert run("convert", tmp_path / "out", tmp_path / "back", "--format", "crate", "--quiet") == 0
    assert streamconv.verify(quantized, tmp_path / "out", recipe=recipe).equal
    back = recipe.inverse("unstack")
    assert streamconv.convert(tmp_path / "out", tmp_path / "apart", recipe=back).plan.account.computed == 3
    assert stored(tmp_path / "apart") == stored(quantized)


def test_numbers_of_blocks_are_refused_by_name(quantized, tmp_path, capsys):
    message = refusal(capsys, "convert", quantized, tmp_path / "out")
    assert "tensor 'experts.0.weight': safetensors has no type for crate_q4" in message
    message = refusal(capsys, "convert", quantized, tmp_path / "out", "--format", "torch")
    assert "torch has no type for crate_q4" in message
    message = refusal(capsys, "convert", quantized, tmp_path / "out", "--format", "crate", "--dtype", "bfloat16")
    assert "experts.0.weight is crate_q4[4, 64]: crate_q4 packs 32 elements into 18 bytes" in message
    kept = streamconv.plan(quantized, tmp_path / "out", format="crate", dtype="bfloat16", keep_dtype=["experts.*"])
    assert [str(row.spec) for row in kept.mapping if row.target == "norm"] == ["bfloat16[8]"]
    rest = Rule("norm", "norm")
    for rule, told in (
        (Rule("experts.{e}.weight", "experts.{e}.weight", op={"op": "scale", "value": 2.0}), "crate_q4"),
        (Rule("experts.{e}.weight", "experts.{e}.weight", cast="float32"), "cannot cast crate_q4 to float32"),
        (Rule("experts.{e}.weight", "experts.{e}.weight", "r c -> c r"), "takes blocks apart"),
    ):
        with pytest.raises(streamconv.StreamconvError, match=told):
            streamconv.plan(quantized, tmp_path / "out", recipe=Recipe("numbers", "", (rule, rest), right=Side("crate")))
    assert not (tmp_path / "out").exists()
