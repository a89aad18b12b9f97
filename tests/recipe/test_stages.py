"""Recipes of several stages, files by rank, numbers with arithmetic, fallbacks, steps: what facts can say beyond one-to-one names."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_files import assert_same, numbered, random_tensor, read, run, write
from safetensors.torch import save_file

import streamconv
from streamconv import recipes
from streamconv.dtypes import TensorSpec, parse_dtype
from streamconv.errors import CoverageError
from streamconv.formats import Extent, Source
from streamconv.graph.ops import InvFreq
from streamconv.recipe import Drop, Make, Option, Recipe, Rule, Side

RANKS = Side(format="torch", ranks=("rank{r:02}.pth",), config="params.json")
RANK = "rank{r:02}.pth"

PARTITION = Recipe(
    name="",
    summary="",
    rules=(
        Rule("{name*}.column", f"{RANK}/{{name*}}.column", "(r c) ... -> r c ..."),
        Rule("{name*}.row", f"{RANK}/{{name*}}.row", "o (r c) -> r o c"),
        Rule("{name*}.shared", "rank{r//k:02}.pth/{name*}.shared", "(r h) c -> r h c", dims={"k": "max(1, ranks // kv)"}),
        Rule("{name*}", "rank{r=*:02}.pth/{name*}", fallback=True),
    ),
    dims={"r": "ranks"},
    options={
        "ranks": Option("how many files", default="{count('rank{r:02}.pth/norm') or 1}", kind="int"),
        "kv": Option("heads of k and v", default=2),
    },
    right=RANKS,
)
WHOLE = Recipe(
    name="toy-hf2ranks",
    summary="a toy",
    rules=(
        Rule("layers.{i}.{q,k}", "blocks.{i}.qk.column", "a c, a c -> (a + a) c"),
        Rule("layers.{i}.{o,kv,n}", "blocks.{i}.{o.row,kv.shared,norm}"),
        Rule("norm", "norm"),
    ),
    then=PARTITION,
)
SPLIT = WHOLE.inverse("toy-ranks2hf")


def toy(layers: int = 2) -> dict[str, torch.Tensor]:
    shapes = {"q": (8, 4), "k": (8, 4), "o": (4, 8), "kv": (4, 3), "n": (5,)}
    return numbered({f"layers.{i}.{name}": shape for i in range(layers) for name, shape in shapes.items()} | {"norm": (4,)})


def files_of(folder):
    return {file.name: torch.load(file, weights_only=True) for file in sorted(folder.glob("*.pth"))}


@pytest.fixture(autouse=True)
def toy_recipes(monkeypatch):
    known = {**recipes.registry(), WHOLE.name: WHOLE, SPLIT.name: SPLIT}
    monkeypatch.setattr(recipes.REGISTRY, "known", known)


def test_a_stage_that_has_nothing_to_do_changes_nothing():
    entries = {name: Source(TensorSpec(parse_dtype("float32"), tuple(tensor.shape)), ()) for name, tensor in toy().items()}
    stay = Rule("{name*}", "{name*}", optional=True, fallback=True)
    scaled = Rule("{name*}.q", "{name*}.q", when="has('scale')", op={"op": "scale", "value": 2})
    for first in ((stay,), (scaled, stay)):
        staged = Recipe(name="toy-staged", summary="a toy", rules=first, then=WHOLE)
        found, expected = staged.apply(entries), WHOLE.apply(entries)
        assert (found.rows, list(found.outputs), found.dropped) == (expected.rows, list(expected.outputs), expected.dropped)
    alone = Recipe(name="toy-alone", summary="a toy", rules=(stay,)).apply(entries)
    assert alone.outputs == entries
    with pytest.raises(CoverageError, match="needs more"):
        Recipe(name="toy-needs", summary="a toy", rules=(stay,), requires={"has('more')": "needs more"}).apply(entries)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_there_and_back_over_ranks(tmp_path, ranks):
    tensors = toy()
    write(tmp_path / "hf", tensors, shards=2)
    given = ("--recipe", "toy-hf2ranks", "--set", f"ranks={ranks}", "--quiet", "--verify")
    assert run("convert", tmp_path / "hf", tmp_path / "out", *given) == 0
    made = files_of(tmp_path / "out")
    assert list(made) == [f"rank{r:02}.pth" for r in range(ranks)]
    for r, table in enumerate(made.values()):
        qk = torch.cat([tensors["layers.1.q"], tensors["layers.1.k"]])
        assert torch.equal(table["blocks.1.qk.column"], qk.chunk(ranks)[r])
        assert torch.equal(table["blocks.1.o.row"], tensors["layers.1.o"].chunk(ranks, 1)[r])
        assert torch.equal(table["blocks.1.kv.shared"], tensors["layers.1.kv"].chunk(min(ranks, 2))[r * min(ranks, 2) // ranks])
        assert torch.equal(table["norm"], tensors["norm"])
    assert run("convert", tmp_path / "out", tmp_path / "back", "--recipe", "toy-ranks2hf", "--quiet") == 0
    assert_same(read(tmp_path / "back"), tensors)


def test_what_comes_from_several_stages_is_told(tmp_path, capsys):
    write(tmp_path / "hf", toy(1))
    assert run("plan", tmp_path / "hf", tmp_path / "out", "--recipe", "toy-hf2ranks", "--set", "ranks=2", "--json") == 0
    rows = {row["target"]: row for row in json.loads(capsys.readouterr().out)["mapping"]}
    row = rows["rank01.pth/blocks.0.qk.column"]
    assert row["sources"] == ["layers.0.q", "layers.0.k"]
    assert row["layout"] == "a c, a c -> (a + a) c, then (r c) ... -> r c ..."
    run("convert", tmp_path / "hf", tmp_path / "two", "--recipe", "toy-hf2ranks", "--set", "ranks=2", "--quiet")
    capsys.readouterr()
    assert run("convert", tmp_path / "two", tmp_path / "back", "--recipe", "toy-ranks2hf") == 0
    assert "2 tensors that ranks or layers repeat are taken from the first of them" in capsys.readouterr().out


def test_ranks_that_do_not_fit_together(tmp_path, capsys):
    write(tmp_path / "hf", toy(1))
    assert run("convert", tmp_path / "hf", tmp_path / "four", "--recipe", "toy-hf2ranks", "--set", "ranks=4", "--quiet") == 0
    (tmp_path / "four" / "rank02.pth").unlink()
    assert run("convert", tmp_path / "four", tmp_path / "back", "--recipe", "toy-ranks2hf") == 2
    assert "rank02.pth/blocks.0.qk.column is missing, while" in capsys.readouterr().err
    assert run("convert", tmp_path / "hf", tmp_path / "six", "--recipe", "toy-hf2ranks", "--set", "ranks=6") == 2
    assert run("convert", tmp_path / "hf", tmp_path / "three.pth", "--recipe", "toy-hf2ranks", "--set", "ranks=2") == 2
    assert "2 ranks are files of their own: give a directory" in capsys.readouterr().err


# Facts by themselves ------------------------------------------------------------------------------------------------


def entry(*shape: int, dtype: str = "float32") -> Source:
    spec = TensorSpec(parse_dtype(dtype), shape)
    return Source(spec, (Extent("/nowhere", 0, spec.nbytes),))


def apply(rules, entries, *, back=False, config=None, **fields):
    recipe = Recipe("a-b2c", "", tuple(rules), **fields)
    recipe = recipe.inverse("a-c2b") if back else recipe
    return recipe.apply({name: entry(*shape) for name, shape in entries.items()}, config or {})


def test_a_fallback_takes_what_is_left():
    made = apply([Rule("a.{n*}", "b.{n*}"), Rule("{n*}", "{n*}", fallback=True)], {"a.x": (1,), "c": (2,)})
    assert list(made.outputs) == ["b.x", "c"]
    made = apply([Drop("a.{n*}", "junk"), Rule("{n*}", "{n*}", fallback=True)], {"a.x": (1,), "c": (2,)})
    assert (list(made.outputs), made.dropped) == (["c"], ["a.x"])


def test_where_is_about_the_captures():
    rules = [Rule("l.{i}.w", "m.{i}.w"), Drop("l.{i}.w", "above the wanted number", where="i >= layers")]
    names = {f"l.{i}.w": (1,) for i in range(5)}
    made = apply(rules, names, options={"layers": Option("", 3)})
    assert (list(made.outputs), made.dropped) == ([f"m.{i}.w" for i in range(3)], ["l.3.w", "l.4.w"])
    assert list(apply(rules, names, options={"layers": Option("", 9)}).outputs) == [f"m.{i}.w" for i in range(5)]


def test_numbers_may_be_counted_anew():
    rules = [Rule("l.{i}.w", "l.{i}.w", where="i < n"), Rule("l.{i+n}.w", "extra.{i}")]
    config = {"n": 2}
    made = apply(rules, {f"l.{i}.w": (1,) for i in range(4)}, config=config)
    assert {row.target: row.sources for row in made.rows} == {
        "l.0.w": ("l.0.w",),
        "l.1.w": ("l.1.w",),
        "extra.0": ("l.2.w",),
        "extra.1": ("l.3.w",),
    }
    rules = [Rule("l.{i}.w", "l.{i}.w", sparse=True), Rule("m.{i+n}.w", "extra.{i}")]
    back = apply(rules, {"l.0.w": (1,), "extra.0": (1,), "extra.1": (1,)}, config=config, back=True)
    assert list(back.outputs) == ["l.0.w", "m.2.w", "m.3.w"]
    with pytest.raises(CoverageError, match=r"m\.1\.w: no rule"):
        apply(rules, {"l.0.w": (1,), "m.1.w": (1,)}, config=config)


def test_numbers_that_all_hold_the_same():
    rules = [Rule("l.{i=*}.freqs", "freqs"), Rule("w", "w")]
    made = apply(rules, {"l.0.freqs": (4,), "l.1.freqs": (4,), "w": (1,)})
    assert list(made.outputs) == ["freqs", "w"]
    back = apply(rules, {"freqs": (4,), "w": (1,)}, back=True, dims={"i": "layers"}, config={"layers": 3})
    assert list(back.outputs) == ["l.0.freqs", "l.1.freqs", "l.2.freqs", "w"]
    with pytest.raises(CoverageError, match="should repeat"):
        apply(rules, {"l.0.freqs": (4,), "l.1.freqs": (5,), "w": (1,)})
    with pytest.raises(CoverageError, match="give it with --set"):
        apply(rules, {"freqs": (4,), "w": (1,)}, back=True, dims={"i": "layers"})


def test_what_has_no_source_is_made():
    rules = [Rule("w", "w"), Make("l.{i}.inv_freq", "computed", op={"op": "inv_freq", "dim": "d"}, dims={"i": 2})]
    made = apply(rules, {"w": (1,)}, config={"d": 8})
    assert [(row.target, row.sources, row.spec.shape) for row in made.rows][1:] == [("l.0.inv_freq", (), (4,)), ("l.1.inv_freq", (), (4,))]
    assert isinstance(made.outputs["l.1.inv_freq"].op, InvFreq)
    assert apply(rules, {"w": (1,), "l.0.inv_freq": (4,)}, back=True).dropped == ["l.0.inv_freq"]
    with pytest.raises(CoverageError, match="no value for dim"):
        apply(rules, {"w": (1,)})


def test_functions_of_expressions():
    rules = [
        Rule("a", "a", when="shape('a')[1] == 3 and count('x.{i}') == 2 and max(1, 2) == 2 and min(n, 1) == None"),
        Rule("x.{i}", "x.{i}"),
    ]
    assert list(apply(rules, {"a": (2, 3), "x.0": (1,), "x.1": (1,)}).outputs) == ["a", "x.0", "x.1"]
    with pytest.raises(CoverageError, match="no rule"):
        apply(rules, {"a": (2, 4), "x.0": (1,), "x.1": (1,)})


@pytest.mark.parametrize("recipe", [WHOLE, SPLIT], ids=lambda recipe: recipe.name)
def test_stages_there_and_back_and_as_data(recipe):
    assert recipe.inverse("x").inverse(recipe.name, recipe.summary) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.settings == PARTITION.options
    assert {recipe.source.format, recipe.target.format} == {"safetensors", "torch"}


def test_other_names_for_files(tmp_path):
    one = Recipe("toy-a2b", "", (Rule("a", "b"),), left=Side(files=("special{n*}.safetensors",)), right=Side(stem="own"))
    write(tmp_path / "in", {"other": random_tensor(1)})
    save_file({"a": random_tensor(3)}, tmp_path / "in" / "special-1.safetensors")
    streamconv.convert(tmp_path / "in", tmp_path / "out", recipe=one, max_memory="4GB")
    assert_same(read(tmp_path / "out"), {"b": random_tensor(3)})
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["own.safetensors"]
