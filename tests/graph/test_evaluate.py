from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import eager, graphs, settings_of, thresholds, world

from streamconv.dtypes import CASTABLE, DTYPES, TensorSpec
from streamconv.engine import io, order
from streamconv.engine.check import check_replicas
from streamconv.engine.order import tasks_in_order
from streamconv.errors import CoverageError
from streamconv.formats import Extent, FileLayout
from streamconv.graph import arena, evaluate
from streamconv.graph.arena import Arena
from streamconv.graph.evaluate import arena_bytes
from streamconv.graph.gather import Read
from streamconv.graph.moves import Move, identity, packed, region
from streamconv.graph.node import AnyNode, Node, Source, apply, rearrange
from streamconv.graph.ops import Cast, Layout, Rearrange, Values, as_torch
from streamconv.graph.tiles import choose_tile
from streamconv.notation.axes import parse
from streamconv.planning.plan import Compute, Copy, Plan
from streamconv.running import filling
from streamconv.running.filling import LocalEngine
from streamconv.running.log import Log

# ------------------------------------------------------------------------------------------------------------------ oracle


# ------------------------------------------------------------------------------------------------------------------- world


def joined(reads: Iterable[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Reads that follow one another as one."""
    found: list[tuple[str, int, int]] = []
    for path, start, count in reads:
        if found and (found[-1][0], found[-1][1] + found[-1][2]) == (path, start):
            found[-1] = (path, found[-1][1], found[-1][2] + count)
        elif count:
            found.append((path, start, count))
    return found


def run(plan: Plan) -> dict[str, bytes]:
    """What a run of ``plan`` writes; checks that no worker took more of its arena than was said, and read what was foreseen."""
    root = Path(plan.root)
    root.mkdir(parents=True)
    used = []

    class Watched(Arena):
        def take(self, numel: int, itemsize: int, offset: int | None = None) -> np.ndarray:
            taken = super().take(numel, itemsize, offset)
            used.append(self.mark)
            return taken

    real = evaluate.evaluate

    def watched(node: AnyNode, move: Move, out: np.ndarray, arena: Arena, read: Read) -> None:
        done = []

        def note(path: str, offset: int, view: memoryview) -> None:
            done.append((path, offset, len(view)))
            read(path, offset, view)

        real(node, move, out, arena, note)
        assert joined(evaluate.reads(node, move)) == joined(done)

    told: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena, "Arena", Watched)
        patch.setattr(evaluate, "evaluate", watched)
        patch.setattr(filling.os, "fsync", lambda _: None)
        LocalEngine(plan, Log(), told.append).run()
    assert max(used, default=0) <= plan.arena
    assert sum(told) == sum(file.size for file in plan.files)
    made = {path.name: path.read_bytes() for path in root.iterdir()}
    shutil.rmtree(root)
    return made


ALL_COPIES = {"COPY_RUN": 1}
ALL_TILES = {"COPY_RUN": 1 << 60}

# ----------------------------------------------------------------------------------------------------------- random graphs


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_copies_and_tiles_of_any_size_give_the_same_bytes(data: st.DataObject) -> None:
    with world() as here:
        data.draw(graphs(here))
        here.store()
        files = here.layouts(data.draw(st.integers(1, 3)))
        expected = here.expected(files)
        chosen = data.draw(thresholds)
        backend = data.draw(st.sampled_from(["pread", "mmap"]))
        for values in (ALL_COPIES, ALL_TILES, chosen):
            with settings_of(**values):
                plan = here.compile(files, backend)
                assert run(plan) == expected
                exact = not any(isinstance(s, Compute) for f in plan.files for s in f.segments)
                assert exact or values is not ALL_COPIES or any_computes(here.outputs.values())
        with settings_of(**chosen):
            again = Plan.from_json(plan.to_json())
            assert again.to_json() == plan.to_json()
            assert run(again) == expected
            alone: dict[str, bytes] = {}
            for number in range(len(plan.files)):
                piece = Plan.from_json(plan.for_files([number]).to_json())
                assert len(piece.files) == 1
                alone |= run(piece)
        assert alone == expected


def any_computes(nodes) -> bool:
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if isinstance(node, Node):
            if not isinstance(node.op, Layout):
                return True
            stack.extend(node.inputs)
    return False


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(1, 4000))
def test_any_budget_gives_the_same_bytes(data: st.DataObject, limit: int) -> None:
    with (
        world() as here,
        settings_of(COPY_RUN=1 << 60, TILE=4096, SMALLEST_TILE=1, SCATTERED_TILE=4096, BAND=64, NARROW=2, SPAN=64, DIRECT=32),
    ):
        data.draw(graphs(here))
        here.store()
        files = here.layouts(1)
        expected = here.expected(files)
        with settings_of(RESERVE=0, WORKER=1, MARGIN=0, ALIGN=8, HELD_COMPUTE=0, HELD_COPY=0, PIECE=16, SCRATCH=0):
            plan = here.compile(files, limit=limit + 4 * 64 + 2)
            assert plan.peak_memory <= limit + 4 * 64 + 2
            assert run(plan) == expected


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_tiles_fit_and_cover_each_segment(data: st.DataObject) -> None:
    sizes = tuple(data.draw(st.lists(st.integers(2, 40), max_size=4)))
    orders = data.draw(st.permutations(range(len(sizes))))
    src_strides, stride = [0] * len(sizes), 1
    for k in orders:
        src_strides[k] = stride
        stride *= sizes[k]
    dst_strides = tuple(math.prod(sizes[k + 1 :]) for k in range(len(sizes)))
    move = Move(sizes, 0, dst_strides, 0, tuple(src_strides)).simplify()
    numel = data.draw(st.integers(1, 5000))
    chosen = choose_tile(move.sizes, move.dst_strides, move.src_strides, numel, data.draw(st.sampled_from([0, 2])))
    tile = chosen.sizes
    assert math.prod(tile) <= numel
    part = next(move.tiles(tile))
    assert chosen.pieces == count_runs(part.dst_strides, part.sizes) + count_runs(part.src_strides, part.sizes)
    assert all(1 <= t <= n for t, n in zip(tile, move.sizes, strict=True))
    if move.numel <= numel:
        assert tile == move.sizes


def count_runs(strides: tuple[int, ...], sizes: tuple[int, ...]) -> int:
    at = np.sort(sum((i * s for i, s in zip(np.indices(sizes), strides, strict=True)), np.zeros(sizes, int)).reshape(-1))
    return 1 + int(np.count_nonzero(np.diff(at) != 1))


# --------------------------------------------------------------------------------------------------------- chosen examples


def rearranged(text: str, sizes: dict[str, int], *inputs: AnyNode, **more) -> AnyNode:
    return rearrange(Rearrange(text, {"1": 1, **sizes}, more.pop("stacks", (1,) * len(inputs)), **more), inputs)


@pytest.mark.parametrize("backend", ["pread", "mmap"])
@pytest.mark.parametrize("values", [{}, ALL_COPIES, {**ALL_TILES, "TILE": 3000, "SMALLEST_TILE": 3000, "SPAN": 500, "DIRECT": 200}])
def test_repartition_of_model_parallel_files(backend: str, values: dict[str, int]) -> None:
    with world() as here:
        qkv = "{r} (a + b + b) c -> ({r} a + {r} b + {r} b) c"
        ranks = [here.source("bfloat16", 64 * 33, seed) for seed in range(3)]
        whole = rearranged(qkv.format(r="n"), {"n": 3, "a": 32, "b": 16, "c": 33}, *ranks, stacks=(3,))
        back = str(parse(qkv.format(r="m")).flip())
        for part in range(4):
            here.outputs[f"rank{part}"] = rearranged(back, {"m": 4, "a": 24, "b": 12, "c": 33}, whole, leading=1, part=part)
        wide = rearranged("n r c -> r (n c)", {"n": 3, "r": 64, "c": 33}, *ranks, stacks=(3,))
        for part in range(11):
            here.outputs[f"columns{part}"] = rearranged("r (m c) -> m r c", {"m": 11, "r": 64, "c": 9}, wide, leading=1, part=part)
        assert here.outputs["rank0"].spec.shape == (48, 33)
        here.store()
        files = here.layouts(2)
        with settings_of(**values):
            assert run(here.compile(files, backend)) == here.expected(files)


def test_layouts_move_every_bit() -> None:
    """Signalling NaNs, infinities, denormals, fp8: nothing is interpreted on the way."""
    with world() as here:
        patterns = {
            "float32": np.array([0x7F800001, 0xFFBADBAD, 0x7FFFFFFF, 0xFF800000, 1, 0x80000000], "<u4"),
            "bfloat16": np.array([0x7F81, 0xFFBA, 0x7FFF, 0xFF80, 1, 0x8000], "<u2"),
            "float8_e4m3fn": np.array([0x7F, 0xFF, 0x80, 1, 0x78, 0x81], "u1"),
            "float64": np.array([0x7FF0000000000001, 0xFFF8BADBADBADBAD, 1, 1 << 63, 0x7FF << 52, 2], "<u8"),
        }
        for dtype, bits in patterns.items():
            leaf = here.source(dtype, 6, 0)
            file = here.files[leaf.extents[0].path]
            file[leaf.extents[0].offset : leaf.extents[0].offset + bits.nbytes] = bits.tobytes()
            here.outputs[dtype] = rearranged("a b -> b a", {"a": 2, "b": 3}, leaf)
        here.store()
        files = here.layouts(1)
        with settings_of(**ALL_TILES):
            made = run(here.compile(files))["out0"]
        for dtype, bits in patterns.items():
            wanted = bits.reshape(2, 3).T.tobytes()
            assert made[files[0].slots[dtype] :][: len(wanted)] == wanted


def test_holes_stay_holes() -> None:
    with world() as here:
        path = here.root / "sparse"
        with path.open("wb") as file:
            file.truncate(8 << 20)
            file.seek(3 << 20)
            file.write(bytes(range(256)) * 16)
        leaf = Source(TensorSpec(DTYPES["float32"], (2 << 20,)), (Extent(str(path), 0, 8 << 20),))
        here.outputs["copied"] = leaf
        here.outputs["computed"] = rearranged("a b -> b a", {"a": 2048, "b": 1024}, leaf)
        files = [FileLayout("out0", 16 << 20, (), {"copied": 0, "computed": 8 << 20}), FileLayout("commit", 1, ((0, b"!"),), {})]
        plan = here.compile(files)
        if path.stat().st_blocks * 512 < 1 << 20:
            assert plan.totals.disk_needed < 1 << 20
        made = run(plan)["out0"]
        stored = path.read_bytes()
        assert made[: 8 << 20] == stored
        assert made[8 << 20 :] == np.frombuffer(stored, "u4").reshape(2048, 1024).T.tobytes()


# -------------------------------------------------------------------------------------------------------------------- order


def test_copies_visit_each_source_front_to_back() -> None:
    """Two sources, each split in columns over three files and its rows over them once more."""
    with world() as here, settings_of(**ALL_COPIES), pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "COPY_CHUNK", 40)
        for number in range(2):
            leaf = here.source("float32", 12 * 30, number, (), number)
            for output in range(3):
                here.outputs[f"columns{number}.{output}"] = rearranged(
                    "r (a + b + c) -> r a, r b, r c", {"r": 12, "a": 5, "b": 15, "c": 10}, leaf, output=output
                )
                here.outputs[f"rows{number}.{output}"] = rearranged("(n r) -> n r", {"n": 3, "r": 120}, leaf, leading=1, part=output)
        here.store()
        files = here.layouts(3)
        plan = here.compile(files)
        tasks = list(tasks_in_order(plan, range(len(plan.files))))
        assert len({number for number, _, _ in tasks}) == 3
        assert all(isinstance(segment, Copy) and segment.nbytes <= 40 for _, segment, _ in tasks)
        places = [(segment.source, segment.offset) for _, segment, _ in tasks]
        assert places == sorted(places)
        covered = sorted((number, segment.dst, segment.nbytes) for number, segment, _ in tasks)
        for number, file in enumerate(files):
            at = 3
            for _, dst, nbytes in (row for row in covered if row[0] == number):
                assert dst == at
                at += nbytes
            assert at == file.size or not file.slots
        assert run(plan) == here.expected(files)


def test_tiles_of_several_files_visit_their_source_front_to_back() -> None:
    with world() as here, settings_of(**ALL_TILES, TILE=256, SMALLEST_TILE=256, SCATTERED_TILE=256):
        leaf = here.source("float32", 24 * 30, 0)
        for output in range(3):
            here.outputs[f"columns{output}"] = rearranged(
                "r (a + b + c) -> r a, b r, r c", {"r": 24, "a": 5, "b": 15, "c": 10}, leaf, output=output
            )
        here.store()
        files = here.layouts(3)
        plan = here.compile(files)
        tasks = list(tasks_in_order(plan, [0, 1, 2]))
        assert len(tasks) >= 12
        places = [segment.offset + tile.src * segment.itemsize for _, segment, tile in tasks]
        assert places == sorted(places)
        assert run(plan) == here.expected(files)


# --------------------------------------------------------------------------------------------------------------------- cast


def bits_of(dtype: str) -> np.ndarray:
    """Infinities, NaNs with payloads, zeros, denormals, the largest values, ties, and random bits."""
    name = getattr(torch, dtype)
    info = torch.finfo(name)
    width = DTYPES[dtype].itemsize
    special = torch.tensor([math.inf, -math.inf, 0.0, -0.0, 1.0, info.max, info.min, info.tiny, info.tiny / 2, info.smallest_normal / 3])
    special = torch.cat([special.to(torch.float64), torch.tensor([65504.0, 65519.9, 65520.0, 6e-8, 3e-8, 1e-40, 1e-45, 3.4e38, 3.5e38])])
    ties = torch.arange(2**10, dtype=torch.float64) / 2**9 + 1 / 2**12
    found = torch.cat([special, ties]).to(name).view(torch.uint8).numpy().view(f"u{width}")
    noise = np.random.default_rng(5).integers(0, 256, 8 * 1001 * width, np.uint8).view(f"u{width}")
    return np.concatenate([found, noise])


def payload_nans(dtype: str) -> np.ndarray:
    width = DTYPES[dtype].itemsize
    infinity = torch.tensor([math.inf], dtype=getattr(torch, dtype)).view(torch.uint8).numpy().view(f"u{width}")[0]
    sign = 1 << (8 * width - 1)
    return np.array([int(infinity) | payload | s for payload in (1, 2, 5) for s in (0, sign)] * 40, f"u{width}")


def write_values(op: Cast, given: np.ndarray, old: TensorSpec, move: Move, out: np.ndarray, new: TensorSpec) -> None:
    """Has an op make the values of a region of all that is given, and put them where the region lies in ``out``."""
    strides = [stride * out.itemsize for stride in move.dst_strides]
    there = np.ndarray(move.sizes, out.dtype, out, move.dst * out.itemsize, strides)
    with np.errstate(all="ignore"):
        op.values(packed(move), [Values(given.reshape(move.sizes), old.dtype)], Values(there, new.dtype))


@pytest.mark.parametrize("source", CASTABLE)
@pytest.mark.parametrize("target", CASTABLE)
def test_cast_is_torch_wherever_it_is_written(source: str, target: str) -> None:
    given = np.concatenate([bits_of(source), payload_nans(source)])
    given = given[: len(given) // 12 * 12]
    old, new = TensorSpec(DTYPES[source], (len(given),)), TensorSpec(DTYPES[target], (len(given),))
    plain = as_torch(given.copy(), old.dtype).to(getattr(torch, target))
    wanted = plain.view(torch.uint8).numpy().view(f"u{new.dtype.itemsize}")
    numbers = ~as_torch(given.copy(), old.dtype).isnan().numpy()
    assert np.array_equal(plain.isnan().numpy(), ~numbers)
    op = Cast(target)
    op.prepare([old])
    rows = len(given) // 12
    made = []
    for sizes, strides, dst, room in [
        ((len(given),), (1,), 0, len(given)),
        ((len(given),), (3,), 2, 3 * len(given)),
        ((rows, 12), (1, rows), 0, len(given)),
        ((rows, 3, 4), (4, 5 * 4 * rows, 1), 7, 15 * 4 * rows + 7),
    ]:
        move = Move(sizes, dst, strides, 0, Move(sizes, 0, (), 0, ()).src_strides)
        out = np.full(room, 7, f"u{new.dtype.itemsize}")
        write_values(op, given, old, move, out, new)
        grid = np.indices(sizes).reshape(len(sizes), -1)
        at = dst + sum(i * d for i, d in zip(grid, strides, strict=True))
        assert np.array_equal(out[at][numbers], wanted[numbers])
        rest = np.ones(room, bool)
        rest[at] = False
        assert (out[rest] == 7).all()
        made.append(out[at])
    for start in range(0, 240, 7):  # in pieces, as small tiles have it
        piece = given[-240:][start : start + 7]
        out = np.empty(len(piece), f"u{new.dtype.itemsize}")
        write_values(op, piece, old, identity(len(piece)), out, new)
        assert np.array_equal(out, made[0][-240:][start : start + 7])
    assert all(np.array_equal(other, made[0]) for other in made)


def test_cast_to_the_same_type_keeps_every_bit() -> None:
    for dtype in CASTABLE:
        given = payload_nans(dtype)
        spec, out = TensorSpec(DTYPES[dtype], (len(given),)), np.zeros_like(given)
        write_values(Cast(dtype), given, spec, identity(len(given)), out, spec)
        assert np.array_equal(out, given)


def test_many_nans_are_settled_in_pieces() -> None:
    given = np.full(200_000, 0x7F800001, "<u4")
    given[::3] = 0x3F800000
    out = np.zeros(400_000, "<u2")
    old, new = TensorSpec(DTYPES["float32"], (200_000,)), TensorSpec(DTYPES["bfloat16"], (200_000,))
    write_values(Cast("bfloat16"), given, old, Move((500, 400), 1, (800, 2), 0, (400, 1)), out, new)
    assert set(out[0::2]) == {0}
    assert set(out[1::2]) == {0x7FC0, 0x3F80}
    assert np.count_nonzero(out == 0x3F80) == len(given[::3])


@pytest.mark.parametrize(("source", "target"), [("int64", "float32"), ("float32", "int8"), ("float8_e5m2", "float32"), ("bool", "float16")])
def test_cast_refuses_other_types(source: str, target: str) -> None:
    with pytest.raises(CoverageError, match="cannot cast"):
        apply(Cast(target), Source(TensorSpec(DTYPES[source], (2,)), ()))


def test_rearrange_refuses_inputs_that_do_not_fit() -> None:
    op = Rearrange("a, a -> (a + a)", {"1": 1, "a": 3}, (1, 1))
    good, bad = Source(TensorSpec(DTYPES["float32"], (3,)), ()), Source(TensorSpec(DTYPES["float32"], (4,)), ())
    assert apply(op, good, good).spec == TensorSpec(DTYPES["float32"], (6,))
    with pytest.raises(CoverageError, match="takes 2 tensors, got 1"):
        apply(op, good)
    with pytest.raises(CoverageError, match="a tensor of 3 elements, found float32"):
        apply(op, good, bad)
    with pytest.raises(CoverageError, match="bfloat16, float32 cannot become one; --dtype settles it"):
        apply(op, good, replace(good, spec=TensorSpec(DTYPES["bfloat16"], (3,))))


def test_an_identity_needs_no_node() -> None:
    leaf = Source(TensorSpec(DTYPES["float32"], (2, 3)), ())
    assert rearranged("a b -> a b", {"a": 2, "b": 3}, leaf) is leaf
    assert rearranged("a b -> b a", {"a": 2, "b": 3}, leaf) is not leaf


# ------------------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize("equal", [True, False])
def test_replicas_are_compared_before_anything_is_written(equal: bool) -> None:
    with world() as here:
        one, other = here.source("float32", 600_000, 1), here.source("float32", 600_000, 1)
        if not equal:
            here.files[other.extents[0].path][-1] ^= 1
        here.outputs["one"] = one
        here.store()
        files = here.layouts(1)
        plan = here.compile(files, replicas=[(one, other, ("one", "other"))])
        if equal:
            check_replicas(Plan.from_json(plan.to_json()))
            assert run(plan) == here.expected(files)
        else:
            with pytest.raises(CoverageError, match="one should hold the same bytes as other"):
                check_replicas(plan)


def test_replicas_that_are_computed_fit_in_the_arena() -> None:
    with world() as here, settings_of(TILE=64 << 10):
        one = here.source("float32", 600_000, 1)
        there = apply(Cast("float64"), rearranged("a b -> b a", {"a": 600, "b": 1000}, one))
        same = apply(Cast("float64"), rearranged("a b -> b a", {"a": 600, "b": 1000}, one))
        here.outputs["one"] = one
        here.store()
        files = here.layouts(1)
        check_replicas(here.compile(files, replicas=[(there, same, ("one", "other"))]))


def test_an_arena_refuses_more_than_it_has() -> None:
    arena = Arena(128)
    arena.take(64, 1)
    mark = arena.mark
    arena.take(8, 8)
    with pytest.raises(MemoryError, match="arena of 128 bytes cannot hold"):
        arena.take(1, 1)
    arena.release(mark)
    assert arena.take(8, 8).dtype == np.uint64


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_regions_in_any_order_stay_within_arena_bytes(data: st.DataObject) -> None:
    """Evaluation of any box of a node, not only of those that the compiler picks."""
    with world() as here, settings_of(**data.draw(thresholds)):
        data.draw(graphs(here))
        here.store()
        stored = {path: bytes(found) for path, found in here.files.items()}
        reader = io.PositionedReader()
        try:
            for node in here.outputs.values():
                if not node.spec.numel:
                    continue
                whole = eager(node, stored)
                axes = Move((node.spec.numel,), 0, (1,), 0, (1,))
                start = data.draw(st.integers(0, node.spec.numel - 1))
                step = data.draw(st.integers(1, 7))
                count = data.draw(st.integers(1, (node.spec.numel - 1 - start) // step + 1))
                wanted = region(Move((count,), start, (step,), 0, (1,)))
                assert axes.numel >= wanted.numel
                arena = Arena(arena_bytes(node, count * node.spec.dtype.itemsize, scattered=True))
                out = arena.take(count, node.spec.dtype.itemsize)
                evaluate.evaluate(node, wanted, out, arena, reader.read)
                assert np.array_equal(out, whole[start : start + step * count : step][:count])
        finally:
            reader.close()
