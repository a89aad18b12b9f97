"""The parts, each on its own: ``pytest benchmarks --benchmark-enable``. Without that option each runs once, as a test of its result."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streamconv
from streamconv import recipes
from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.engine.order import tasks_in_order, tile_pieces
from streamconv.formats import Extent, safetensors
from streamconv.graph.arena import Arena
from streamconv.graph.evaluate import arena_bytes, evaluate, prepare
from streamconv.graph.moves import identity, region
from streamconv.graph.node import AnyNode, Source, apply, rearrange, trace
from streamconv.graph.ops import Cast, Rearrange, as_torch
from streamconv.graph.tiles import choose_tile
from streamconv.notation.names import Matcher, parse
from streamconv.planning.compiler import compile_plan
from streamconv.planning.fitting import TILE, Budget
from streamconv.recipe import identity as keep
from streamconv.storage.locations import locate
from tools.make_checkpoint import MODELS, make_checkpoint, write_shard

pytestmark = pytest.mark.slow

ROOMY = "8GB"  # the tests share one process, which holds torch and more
RECIPES = Path(__file__).parent / "recipes"
NAMES = 91_991  # of DeepSeek-V3, with the scales of its blocks


# -------------------------------------------------------------------------------------------------------- names and headers


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of DeepSeek-V3's names and shapes: headers and an index, with holes for data."""
    folder = tmp_path_factory.mktemp("deepseek") / "source"
    make_checkpoint("deepseek-v3", folder, sparse=True)
    return folder


@pytest.fixture(scope="module")
def contents(deepseek: Path) -> Any:
    return safetensors.read(locate(deepseek))


@pytest.mark.benchmark(group="header and index")
def test_read_one_header(benchmark: Any, tmp_path: Path) -> None:
    model = MODELS["deepseek-v3"]
    shapes = dict(list(model.shapes(model.config).items())[:2000])
    write_shard(tmp_path / "model.safetensors", shapes, sparse=True)
    entries, metadata = benchmark(safetensors.read_file, tmp_path / "model.safetensors")
    assert {name: (entry.spec.dtype.name, entry.spec.shape) for name, entry in entries.items()} == shapes
    assert metadata == {"format": "pt"}


@pytest.mark.benchmark(group="header and index")
def test_read_an_index_and_its_headers(benchmark: Any, deepseek: Path) -> None:
    found = benchmark.pedantic(safetensors.read, (deepseek,), rounds=3)
    index = json.loads((deepseek / "model.safetensors.index.json").read_text())
    assert {name: Path(entry.extents[0].path).name for name, entry in found.entries.items()} == index["weight_map"]
    assert len(found.entries) == NAMES


@pytest.mark.benchmark(group="header and index")
def test_write_a_header(benchmark: Any, contents: Any) -> None:
    specs = {name: entry.spec for name, entry in list(contents.entries.items())[:2000]}
    text, slots = benchmark(safetensors.header_bytes, specs, {"format": "pt"})
    (length,) = struct.unpack("<Q", text[:8])
    header = json.loads(text[8:])
    assert len(text) == 8 + length
    assert {name: 8 + length + header[name]["data_offsets"][0] for name in specs} == slots


@pytest.mark.benchmark(group="names")
def test_match_91_000_names(benchmark: Any, contents: Any) -> None:
    layer = "model.layers.{i}"
    patterns = [
        f"{layer}.mlp.experts.{{e}}.{{gate,up,down}}_proj.{{weight,weight_scale_inv}}",
        f"{layer}.mlp.shared_experts.{{gate,up,down}}_proj.{{weight,weight_scale_inv}}",
        f"{layer}.mlp.{{gate,up,down}}_proj.{{weight,weight_scale_inv}}",
        f"{layer}.mlp.gate.{{weight,e_score_correction_bias}}",
        f"{layer}.self_attn.{{part:q_a,q_b,kv_a,kv_b,o,kv_a_with_mqa}}_{{what:proj,layernorm,proj_with_mqa}}.{{weight,weight_scale_inv}}",
        f"{layer}.{{input_layernorm,post_attention_layernorm,enorm,hnorm}}.weight",
        f"{layer}.{{eh_proj,embed_tokens,shared_head.norm,shared_head.head}}.weight",
        "model.{norm,embed_tokens}.weight",
        "lm_head.weight",
    ]
    names = list(contents.entries)

    def match() -> list[list[tuple[int, Any]]]:
        matcher = Matcher([parse(text) for text in patterns])
        return [matcher.match(name) for name in names]

    found = benchmark.pedantic(match, rounds=3)
    assert all(len(ways) == 1 for ways in found)
    # Found one by one the slow way: a sample, since the slow way is slow.
    for name, ways in list(zip(names, found, strict=True))[::500]:
        assert ways == [(k, values) for k, text in enumerate(patterns) if (values := parse(text).match(name)) is not None]
    assert [sum(ways[0][0] == k for ways in found) for k in (0, 8)] == [sum(".experts." in name for name in names), 1]


# ---------------------------------------------------------------------------------------------------------------- compiling


def budget() -> Budget:
    return Budget(8 * 10**9, 4)


@pytest.mark.benchmark(group="compile")
def test_compile_91_000_tensors(benchmark: Any, contents: Any, tmp_path: Path) -> None:
    outputs = keep(contents.entries, lambda _name, _spec: None).outputs
    specs = {name: node.spec for name, node in outputs.items()}
    layouts = safetensors.lay_out(specs, metadata={"format": "pt"}, max_shard_size=5 * 10**9)
    compiler = functools.partial(compile_plan, outputs, layouts, root=str(tmp_path), format="safetensors", budget=budget())
    plan = benchmark.pedantic(compiler, rounds=3)
    assert [file.tensors for file in plan.files] == [tuple(layout.slots) for layout in layouts]
    assert plan.totals.bytes_copied == sum(spec.nbytes for spec in specs.values())
    assert plan.totals.bytes_computed == 0


@pytest.mark.benchmark(group="compile")
@pytest.mark.parametrize("name", ["fuse", "rotary", "transpose"])
def test_compile_a_recipe(benchmark: Any, name: str, tmp_path: Path) -> None:
    make_checkpoint("llama-3-70b", tmp_path / "source", sparse=True)
    recipe = recipes.get(str(RECIPES / f"llama-{name}.yaml"))
    compiler = functools.partial(streamconv.plan, tmp_path / "source", tmp_path / "target", recipe=recipe, max_memory=ROOMY)
    plan = benchmark.pedantic(compiler, rounds=3)
    layers, per_layer = 80, {"fuse": 6, "rotary": 9, "transpose": 9}[name]
    assert sum(len(file.tensors) for file in plan.files) == layers * per_layer + 3
    moved = {  # elements that have to be computed: none, q and k, all matrices
        "fuse": 0,
        "rotary": layers * (8192 + 1024) * 8192,
        "transpose": layers * (2 * 8192 * (8192 + 1024) + 3 * 8192 * 28672) + 2 * 128256 * 8192,
    }[name]
    assert plan.totals.bytes_computed == moved * 2
    literals = sum(len(data) for file in plan.files for _, data in file.literals)
    assert plan.totals.bytes_written == plan.totals.bytes_read + literals


# ------------------------------------------------------------------------------------------------------------------ copying


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 91 MB in four files."""
    folder = tmp_path_factory.mktemp("small") / "source"
    make_checkpoint("minilm", folder, max_shard_size=30_000_000)
    return folder


@pytest.mark.benchmark(group="copy")
@pytest.mark.parametrize("backend", ["auto", "pread", "mmap"])
def test_copy_segments(benchmark: Any, small: Path, backend: str, tmp_path: Path) -> None:
    plan = streamconv.plan(small, tmp_path / "target", max_shard_size="20MB", read_backend=backend, max_memory=ROOMY)
    assert plan.totals.bytes_computed == 0
    benchmark.pedantic(streamconv.run, (plan,), {"overwrite": True}, rounds=3)
    source, target = safetensors.read(locate(small)).entries, safetensors.read(locate(tmp_path / "target")).entries
    assert source.keys() == target.keys()
    for name, entry in source.items():
        assert target[name].spec == entry.spec
        assert raw(target[name]) == raw(entry), name


def raw(source: Source) -> bytes:
    """The bytes of a stored tensor."""
    found = b""
    for extent in source.extents:
        with Path(extent.path).open("rb") as file:
            file.seek(extent.offset)
            found += file.read(extent.nbytes)
    return found


# -------------------------------------------------------------------------------------------------------------------- tiles


class Memory:
    """Source tensors in memory, so that only the evaluation is timed."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.sources: list[Source] = []
        self._data: dict[str, memoryview] = {}
        for number, tensor in enumerate(tensors):
            data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
            self._data[str(number)] = memoryview(data)
            spec = TensorSpec(DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
            self.sources.append(Source(spec, (Extent(str(number), 0, len(data)),)))

    def read(self, path: str, offset: int, view: memoryview) -> None:
        view[:] = self._data[path][offset : offset + len(view)]


def tiled(node: AnyNode, memory: Memory) -> Callable[[], torch.Tensor]:
    """Evaluates a whole tensor in the tiles that a plan would cut it into, and puts them where the engine would."""
    prepare([node])
    arena, itemsize, whole = Arena(arena_bytes(node, TILE)), node.spec.dtype.itemsize, identity(node.spec.numel)
    moves = [found.move.simplify() for found in trace(node, whole)]
    tiles = [
        tile for move in moves for tile in move.tiles(choose_tile(move.sizes, move.dst_strides, move.src_strides, TILE // itemsize).sizes)
    ]
    made = np.zeros(node.spec.nbytes, dtype=np.uint8)

    def run() -> torch.Tensor:
        for tile in tiles:
            mark = arena.mark
            out = arena.take(tile.numel, itemsize)
            evaluate(node, region(tile), out, arena, memory.read)
            packed = out.view(np.uint8)
            for at, offset, nbytes in tile_pieces(tile, itemsize):
                made[offset : offset + nbytes] = packed[at : at + nbytes]
            arena.release(mark)
        return as_torch(made, node.spec.dtype).view(node.spec.shape)

    return run


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal bytes, equal shape."""
    return (
        found.shape == wanted.shape
        and found.dtype == wanted.dtype
        and torch.equal(found.view(torch.uint8), wanted.contiguous().view(torch.uint8))
    )


def rearranged(layout: str, sizes: dict[str, int], memory: Memory, output: int = 0) -> AnyNode:
    return rearrange(Rearrange(layout, sizes, (1,) * len(memory.sources), output), tuple(memory.sources))


@pytest.mark.benchmark(group="tiles")
def test_fuse_grouped_tiles(benchmark: Any) -> None:
    g, q, d, c = 8, 4, 64, 2048
    tensors = [random(g * q * d, c), random(g * d, c), random(g * d, c)]
    memory = Memory(*tensors)
    layout, sizes = "(g q d) c, (g d) c, (g d) c -> (g (q d + d + d)) c", {"g": g, "q": q, "d": d, "c": c}
    found = benchmark(tiled(rearranged(layout, sizes, memory), memory))
    groups = [tensor.view(g, -1, c) for tensor in tensors]
    assert same(found, torch.cat(groups, dim=1).view(-1, c))


@pytest.mark.benchmark(group="tiles")
@pytest.mark.parametrize("part", [0, 1])
def test_split_grouped_tiles(benchmark: Any, part: int) -> None:
    g, q, d, c = 8, 4, 64, 2048
    fused = random(g * (q + 2) * d, c)
    memory = Memory(fused)
    layout, sizes = "(g (q d + d + d)) c -> (g q d) c, (g d) c, (g d) c", {"g": g, "q": q, "d": d, "c": c}
    found = benchmark(tiled(rearranged(layout, sizes, memory, part), memory))
    wanted = fused.view(g, q + 2, d, c)[:, :q] if part == 0 else fused.view(g, q + 2, d, c)[:, q : q + 1]
    assert same(found, wanted.reshape(-1, c))


@pytest.mark.benchmark(group="tiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_transpose_tiles(benchmark: Any, dtype: torch.dtype) -> None:
    matrix = random(3072, 2048, dtype=dtype)
    memory = Memory(matrix)
    found = benchmark(tiled(rearranged("a b -> b a", {"a": 3072, "b": 2048}, memory), memory))
    assert same(found, matrix.t())


@pytest.mark.benchmark(group="tiles")
def test_rotary_tiles(benchmark: Any) -> None:
    h, d, c = 32, 64, 2048
    matrix = random(h * 2 * d, c)
    memory = Memory(matrix)
    found = benchmark(tiled(rearranged("(h two d) c -> (h d two) c", {"h": h, "two": 2, "d": d, "c": c}, memory), memory))
    assert same(found, matrix.view(h, 2, d, c).transpose(1, 2).reshape(-1, c))


@pytest.mark.benchmark(group="tiles")
@pytest.mark.parametrize(("given", "wanted"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float16")])
def test_cast_tiles(benchmark: Any, given: str, wanted: str) -> None:
    matrix = random(3072, 2048, dtype=getattr(torch, given))
    memory = Memory(matrix)
    found = benchmark(tiled(apply(Cast(wanted), memory.sources[0]), memory))
    assert same(found, matrix.to(getattr(torch, wanted)))


@pytest.mark.benchmark(group="tiles")
def test_order_tiles(benchmark: Any, tmp_path: Path) -> None:
    """The order in which a plan's tiles and copies are done, without doing them."""
    make_checkpoint("llama-3-8b", tmp_path / "source", sparse=True)
    recipe = recipes.get(str(RECIPES / "llama-transpose.yaml"))
    plan = streamconv.plan(tmp_path / "source", tmp_path / "target", recipe=recipe, max_memory=ROOMY)
    tasks = benchmark.pedantic(lambda: list(tasks_in_order(plan, range(len(plan.files)))), rounds=3)
    sizes = [tile.numel * 2 if tile is not None else segment.nbytes for _, segment, tile in tasks]
    assert sum(sizes) + sum(len(data) for file in plan.files for _, data in file.literals) == plan.totals.bytes_written


# ------------------------------------------------------------------------------------------------------------------- verify


@pytest.mark.benchmark(group="verify")
def test_verify_equal(benchmark: Any, small: Path, tmp_path: Path) -> None:
    streamconv.convert(small, tmp_path / "other", max_shard_size="20MB", max_memory=ROOMY)
    found = benchmark.pedantic(streamconv.verify, (small, tmp_path / "other"), {"max_memory": ROOMY}, rounds=3)
    assert found.equal
    assert found.compared == len(safetensors.read(locate(small)).entries)


@pytest.mark.benchmark(group="verify")
def test_verify_different(benchmark: Any, small: Path, tmp_path: Path) -> None:
    """Every value differs a little, so that every distance is computed."""
    streamconv.convert(small, tmp_path / "other", dtype="bfloat16", max_memory=ROOMY)
    found = benchmark.pedantic(streamconv.verify, (small, tmp_path / "other"), {"max_memory": ROOMY}, rounds=3)
    source = safetensors.read(locate(small)).entries
    floats = [name for name, entry in source.items() if entry.spec.dtype.name == "float32"]
    assert not found.equal
    assert set(found.dtype_mismatch) == set(floats)
    name = "encoder.layer.0.attention.self.query.weight"
    values = torch.frombuffer(bytearray(raw(source[name])), dtype=torch.float32)
    row = next(row for row in found.tensors if row.name == name)
    assert row.l2 == pytest.approx((values - values.to(torch.bfloat16).float()).double().norm().item(), rel=1e-5)
