"""More or fewer rows of a vocabulary: what new rows are, that they are the same however they are made, and what follows them."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from checkpoint_files import ROOMY, assert_same, random_tensor, raw, read, read_any, refusal, run, write, write_bin
from safetensors import safe_open

import streamconv
from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.engine.readers import BACKENDS
from streamconv.errors import CoverageError
from streamconv.graph import copying, evaluate
from streamconv.graph.arena import Arena
from streamconv.graph.evaluate import arena_bytes
from streamconv.graph.moves import Move, identity, region
from streamconv.graph.node import Node, Source, apply
from streamconv.graph.ops import Cast, SampleRows, from_json
from streamconv.planning import fitting
from streamconv.planning.plan import Compute, Plan
from streamconv.recipe import Conversion
from streamconv.recipe.vocabulary import resize_vocab
from tools import make_checkpoint as made

E, H, OTHER = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def matrices(rows=200, columns=12, dtype=torch.float32):
    """An embedding whose columns are correlated and of different means and sizes, a head, and something else."""
    mixing = random_tensor(columns, columns, seed=1) * torch.linspace(0.1, 3, columns)
    embedding = random_tensor(rows, columns, seed=2) @ mixing + torch.linspace(-2, 2, columns)
    return {E: embedding.to(dtype), H: random_tensor(rows, columns, seed=3).to(dtype), OTHER: random_tensor(columns, dtype=dtype)}


def resized(source, target, rows, *more):
    assert run("convert", source, target, "--set", f"resize_vocab={rows}", "--quiet", *more) == 0
    return read_any(target)


def check_draws(new, old):
    """Whether rows are draws of N(mean of old rows, 1e-5 of their covariance), by whitened values that are to be standard normal."""
    old, new = old.double(), new.double()
    mean = old.mean(0)
    factor = torch.linalg.cholesky(1e-5 * (old - mean).T @ (old - mean) / len(old))
    z = torch.linalg.solve_triangular(factor, (new - mean).T, upper=False)
    assert abs(z.mean()) <= 5 / math.sqrt(z.numel())
    assert abs(z.var() - 1) <= 5 * math.sqrt(2 / z.numel())
    assert z.abs().max() < 6
    assert len({raw(row) for row in new}) == len(new)


# What new rows are -------------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("rows", "columns", "wanted"), [(200, 12, 264), (3000, 40, 3001), (50, 3, 400), (70_000, 5, 70_200)])
def test_new_rows_are_draws_of_the_old_ones_distribution(rows, columns, wanted, dtype, tmp_path):
    given = matrices(rows, columns, dtype)
    found = resized(write(tmp_path / "source", given), tmp_path / "target", wanted)
    for name in (E, H):
        assert found[name].shape == (wanted, columns)
        assert raw(found[name][:rows]) == raw(given[name])
        check_draws(found[name][rows:], given[name])
    assert not torch.equal(found[E][rows:], found[H][rows:])
    assert raw(found[OTHER]) == raw(given[OTHER])


@pytest.mark.parametrize(("block", "rows", "columns"), [(1 << 18, 100, 7), (50, 100, 7), (1, 9, 33), (2000, 2000, 3)])
def test_new_rows_are_what_the_formula_says(block, rows, columns, tmp_path, monkeypatch):
    """mean + sqrt(1e-5 / V) * z (E - mean), by numpy's normals of the same generator, all at once and in float64."""
    import numpy as np

    monkeypatch.setattr("streamconv.graph.ops.sampled._SUMMED", block)
    given = matrices(rows, columns)
    new = resized(write(tmp_path / "source", given), tmp_path / "target", rows + 5, "--set", "seed=11")[E][rows:]
    step = max(1, min(rows, block // max(columns, 6)))
    normals = np.random.Generator(np.random.Philox(key=[11, rows]))
    z = torch.from_numpy(np.hstack([normals.standard_normal((5, min(step, rows - at))) for at in range(0, rows, step)]))
    old = given[E].double()
    wanted = old.mean(0) + math.sqrt(1e-5 / rows) * z @ (old - old.mean(0))
    assert torch.allclose(new.double(), wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rounded_draws(dtype, tmp_path):
    given = {E: random_tensor(4000, 24, dtype=dtype)}
    found = resized(write(tmp_path / "source", given), tmp_path / "target", 4064)
    assert found[E].dtype == dtype
    check_draws(found[E][4000:], given[E])


def test_fewer_rows_than_columns_are_no_special_case(tmp_path):
    """The covariance is singular: new rows lie in the span of the old ones."""
    given = {E: random_tensor(3, 10, dtype=torch.float64)}
    new = resized(write(tmp_path / "source", given), tmp_path / "target", 20)[E][3:]
    differences = given[E][1:] - given[E][0]
    beside = (new - given[E][0]) - (new - given[E][0]) @ torch.linalg.pinv(differences) @ differences
    assert beside.abs().max() < 1e-12
    assert new.std(0).max() > 1e-4


def test_the_same_rows_give_themselves(tmp_path):
    given = {E: torch.full((5, 4), 3.0)}
    assert resized(write(tmp_path / "source", given), tmp_path / "target", 9)[E].eq(3).all()


# However they are made ---------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_rows_and_another_one_others(tmp_path):
    source = write(tmp_path / "source", matrices())
    first, same, other = (
        resized(source, tmp_path / name, 230, *given)
        for name, given in (("first", []), ("same", ["--set", "seed=0", "-j", "1"]), ("other", ["--set", "seed=1"]))
    )
    assert_same(first, same)
    assert raw(first[E][:200]) == raw(other[E][:200])
    for name in (E, H):
        equal = (first[name][200:, None] == other[name][None, 200:]).all(2)
        assert not equal.any()
    with safe_open(tmp_path / "other" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "seed": "1"}


@pytest.mark.parametrize("settings", [["--dtype", "bfloat16"], []])
@pytest.mark.parametrize("backend", ["pread", "mmap"])
def test_tiles_and_workers_change_nothing(backend, settings, tmp_path, monkeypatch):
    source = write(tmp_path / "source", matrices())
    wanted = resized(source, tmp_path / "target", 330, *settings)
    for tile, workers in ((64, 1), (1000, 5)):
        monkeypatch.setattr(fitting, "TILE", tile)
        monkeypatch.setattr(fitting, "SMALLEST_TILE", tile)
        monkeypatch.setattr(copying, "BAND", tile)
        folder = tmp_path / f"{tile}"
        assert_same(resized(source, folder, 330, "-j", workers, "--read-backend", backend, "--verify", *settings), wanted)
        assert run("verify", source, folder, "--set", "resize_vocab=330", *settings, "--quiet") == 0
        assert run("verify", source, folder, "--set", "resize_vocab=330", "--set", "seed=4", *settings, "--quiet") == 1


def test_what_streams_is_made_in_one_tile(tmp_path):
    """Each piece of it would take a pass over all rows."""
    source = write(tmp_path / "source", matrices(2000, 16))
    plan = streamconv.plan(source, tmp_path / "target", options={"resize_vocab": 2100}, max_memory=ROOMY)
    computed = [segment for file in plan.files for segment in file.segments if isinstance(segment, Compute)]
    assert sorted(segment.move.numel for segment in computed) == [36 * 16, 36 * 16, 64 * 16, 64 * 16]
    assert all(segment.tile == segment.move.sizes for segment in computed)


def test_a_plan_with_sampled_rows_as_json(tmp_path):
    source = write(tmp_path / "source", matrices())
    wanted = resized(source, tmp_path / "target", 300)
    plan = streamconv.plan(source, tmp_path / "again", options={"resize_vocab": 300}, max_memory=ROOMY)
    again = Plan.from_json(plan.to_json())
    assert again.to_json() == plan.to_json()
    streamconv.run(again)
    assert_same(read(tmp_path / "again"), wanted)
    digests = {streamconv.plan(source, tmp_path / "x", options={"resize_vocab": 300, "seed": n}, max_memory=ROOMY).digest() for n in (0, 1)}
    assert len(digests) == 2
    assert plan.digest() in digests


@pytest.mark.parametrize("cast", [None, "bfloat16", "float64"])
@pytest.mark.parametrize(("first", "count", "step"), [(0, 40, 1), (3, 9, 4), (39, 1, 1)])
def test_any_region_within_the_arena_that_is_asked_for(first, count, step, cast, tmp_path):
    source = streamconv.open(write(tmp_path / "source", matrices(300, 10)))[E].source
    node = apply(SampleRows(4, 2, 3, "float32"), apply(Cast("float16"), source))
    node = apply(Cast(cast), node) if cast else node
    assert isinstance(node, Node)
    assert from_json(json.loads(json.dumps(node.op.to_json()))) == node.op
    reader = BACKENDS["pread"](4)
    found = []
    for wanted in (identity(40), region(Move((count,), first, (step,), 0, (1,)))):
        arena = Arena(arena_bytes(node, wanted.numel * node.spec.dtype.itemsize))
        out = arena.take(wanted.numel, node.spec.dtype.itemsize)
        evaluate.evaluate(node, wanted, out, arena, reader.read)
        found.append(out.copy())
    reader.close()
    assert (found[0][first : first + step * count : step] == found[1]).all()
    assert len(set(found[0].tolist())) > 20


# What follows ------------------------------------------------------------------------------------------------------


def test_config_follows(tmp_path, capsys):
    config = {"vocab_size": 200, "text_config": {"vocab_size": 200, "hidden_size": 200}, "vision_config": {"vocab_size": 49408}}
    source = write(tmp_path / "source", matrices(), config=config)
    assert run("convert", source, tmp_path / "target", "--set", "resize_vocab=256", "--no-progress") == 0
    found = json.loads((tmp_path / "target" / "config.json").read_text())
    assert found == {"vocab_size": 256, "text_config": {"vocab_size": 256, "hidden_size": 200}, "vision_config": {"vocab_size": 49408}}
    assert f"{E}, {H}: 256 rows instead of 200, rows sampled, seed 0" in capsys.readouterr().out + capsys.readouterr().err


def test_fewer_rows(tmp_path):
    given = matrices()
    found = resized(write(tmp_path / "source", given, config={"vocab_size": 200}), tmp_path / "target", 150)
    assert_same(found, {**given, E: given[E][:150], H: given[H][:150]})
    assert json.loads((tmp_path / "target" / "config.json").read_text()) == {"vocab_size": 150}
    with safe_open(tmp_path / "target" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_as_many_rows_as_there_are(tmp_path):
    given = matrices()
    assert_same(resized(write(tmp_path / "source", given), tmp_path / "target", 200), given)


@pytest.mark.parametrize("copies", [False, True])
def test_tied_tensors_stay_tied(copies, tmp_path):
    given = matrices()
    source = write_bin(tmp_path / "source", {E: given[E], H: given[E], OTHER: given[OTHER]})
    found = resized(source, tmp_path / "target", 230, *(["--set", "tied=copy"] if copies else []), "--dtype", "float64")
    assert found[E].shape == (230, 12)
    assert (H in found) is copies  # where it is stored once, it is the embedding's
    if copies:
        assert raw(found[E]) == raw(found[H])
    back = resized(source, tmp_path / "torch", 230, "--format", "torch")
    assert raw(back[E]) == raw(back[H])
    size = sum(path.stat().st_size for path in (tmp_path / "torch").iterdir())
    assert size < 1.5 * back[E].nbytes


@pytest.mark.parametrize(
    "names",
    [
        ("transformer.wte.weight", "lm_head.weight", "lm_head.bias"),
        ("gpt_neox.embed_in.weight", "embed_out.weight"),
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight", "cls.predictions.bias"),
        ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
        ("language_model.model.tok_embeddings.weight", "language_model.output.weight"),
        ("transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight"),
    ],
)
def test_usual_names(names, tmp_path):
    given = {name: random_tensor(40, seed=9) if name.endswith("bias") else random_tensor(40, 6, seed=k) for k, name in enumerate(names)}
    beside = {"layers.0.attention.output.weight": random_tensor(6, 6), "position_embeddings.weight": random_tensor(40, 6)}
    found = resized(write(tmp_path / "source", given | beside), tmp_path / "target", 48)
    for name, tensor in given.items():
        assert raw(found[name][:40]) == raw(tensor)
        assert len(found[name]) == 48
        assert found[name][40:].eq(0).all() if name.endswith("bias") else found[name][40:].ne(0).all()
    assert_same({name: found[name] for name in beside}, beside)


@pytest.mark.parametrize(
    ("tensors", "rows", "message"),
    [
        ({"w": random_tensor(4, 4)}, 8, "no embedding found"),
        ({E: random_tensor(4, 4), H: random_tensor(5, 4)}, 8, "lm_head.weight is float32[5, 4], model.embed_tokens.weight has 4 rows"),
        ({E: random_tensor(4, 4), "decoder.wte.weight": random_tensor(5, 4)}, 8, "decoder.wte.weight has 5 rows: which is the vocabulary?"),
        ({E: random_tensor(4, 4)}, 0, "resize_vocab=0: give at least 1"),
        ({E: random_tensor(4, 4)}, "many", "expected a whole number"),
        ({E: torch.ones(4, 4, dtype=torch.int8)}, 8, "rows are sampled from matrices of"),
    ],
)
def test_what_cannot_be_resized(tensors, rows, message, tmp_path, capsys):
    source = write(tmp_path / "source", tensors)
    assert message in refusal(capsys, "convert", source, tmp_path / "target", "--set", f"resize_vocab={rows}")
    assert not (tmp_path / "target").exists()


def test_one_ranks_part_is_not_resized():
    part = Source(TensorSpec(DTYPES["float32"], (4, 4)), ())
    with pytest.raises(CoverageError, match=r"model-0.pth/embed_tokens.weight is one rank's part"):
        resize_vocab(Conversion({"model-0.pth/embed_tokens.weight": part}, []), {"resize_vocab": 8, "seed": 0})


def test_with_a_recipe(tmp_path, capsys):
    given = {"wte.weight": random_tensor(30, 4), "out.weight": random_tensor(30, 4, seed=1)}
    recipe = {
        "rules": [
            {"rule": "wte.weight", "right": "model.embed_tokens.weight"},
            {"rule": "out.weight", "right": "lm_head.weight", "layout": "v c -> v c"},
        ]
    }
    (tmp_path / "mine.json").write_text(json.dumps(recipe))
    source = write(tmp_path / "source", given, config={"vocab_size": 30})
    found = resized(source, tmp_path / "target", 33, "--recipe", tmp_path / "mine.json", "--dtype", "float16")
    assert {name: list(tensor.shape) for name, tensor in found.items()} == {E: [33, 4], H: [33, 4]}
    check_draws(resized(source, tmp_path / "wide", 300, "--recipe", tmp_path / "mine.json")[H][30:], given["out.weight"])
    assert json.loads((tmp_path / "target" / "config.json").read_text()) == {"vocab_size": 33}
    alone = ("convert", source, tmp_path / "alone", "--recipe", tmp_path / "mine.json", "--set", "seed=3")
    assert "--set seed: recipe mine has no such option" in refusal(capsys, *alone)


# Memory ------------------------------------------------------------------------------------------------------------

PEAK = """
import sys
from streamconv.cli.command import main
code = main(sys.argv[1:])
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 8])
def test_32000_by_8192_within_300_mb(workers, tmp_path):
    (tmp_path / "source").mkdir()
    made.write_shard(tmp_path / "source" / "model.safetensors", dict.fromkeys((E, H), ("float16", (32000, 8192))))
    given = ["--set", "resize_vocab=32064", "--max-memory", "300MB", "--json", "-j", str(workers)]
    command = [sys.executable, "-c", PEAK, "convert", str(tmp_path / "source"), str(tmp_path / "target"), *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert int(done.stderr.splitlines()[-1]) <= told["peak_memory"] <= 300_000_000
    for name in (E, H):
        entry = streamconv.open(tmp_path / "target")[name]
        assert entry.shape == (32064, 8192)
        assert len({raw(row) for row in entry.torch(rows=slice(32000, 32064))}) == 64
