"""Recipes: rules between two layouts, what they refuse, their files, and the way back."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import NamedTuple

import pytest
import torch
from checkpoint_files import ROOMY, assert_same, numbered, random_tensor, raw, read, refusal, run, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import streamconv
from streamconv import recipes
from streamconv.dtypes import TensorSpec, parse_dtype
from streamconv.errors import CoverageError, RecipeError, UsageError
from streamconv.formats import Source
from streamconv.recipe import Drop, Fact, Option, Recipe, Rule, Side, Tie, registry


def recipe_of(*rules, **settings):
    return Recipe("test-a2b", "for a test", rules, **settings)


def entries(shapes):
    """Stored tensors of which only dtype and shape matter: a shape, or (dtype, shape)."""
    found = {}
    for name, stored in shapes.items():
        dtype, shape = stored if stored and isinstance(stored[0], str) else ("float32", stored)
        found[name] = Source(TensorSpec(parse_dtype(dtype), shape), ())
    return found


def convert(tmp_path, tensors, recipe, *, name="out", config=None, **settings):
    """The tensors that a recipe makes of these."""
    source = tmp_path / f"{name}-source"
    if not source.exists():
        write(source, tensors, config=config)
    streamconv.convert(source, tmp_path / name, recipe=recipe, max_memory=ROOMY, **settings)
    return read(tmp_path / name)


def both_ways(tmp_path, tensors, recipe, wanted, **settings):
    """Converts, compares with what is wanted, and converts back to where it began."""
    made = convert(tmp_path, tensors, recipe, **settings)
    assert_same(made, wanted)
    assert_same(convert(tmp_path, made, recipe.inverse("test-b2a"), name="back", **settings), tensors)


def refused(recipe, shapes, **arguments):
    """The message with which a recipe refuses a checkpoint; one line that names the recipe or the tensor."""
    with pytest.raises(CoverageError) as caught:
        recipe.apply(entries(shapes), **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What rules mean ---------------------------------------------------------------------------------------------------


def test_captures_on_both_sides_are_a_for_each(tmp_path):
    tensors = numbered({f"a.{i}.{kind}": (2, i + 1) for i in (0, 3, 10) for kind in ("weight", "bias")})
    recipe = recipe_of(Rule("a.{i}.{kind:weight,bias}", "b.{i}.{kind:w,b}", sparse=True))
    both_ways(
        tmp_path, tensors, recipe, {name.replace("a.", "b.").replace("weight", "w").replace("bias", "b"): t for name, t in tensors.items()}
    )


def test_a_rest_is_kept_whatever_it_is(tmp_path):
    tensors = numbered({"model.x.y.0": (2,), "model.z": (3,)})
    both_ways(
        tmp_path,
        tensors,
        recipe_of(Rule("model.{rest*}", "net.{rest*}")),
        {"net.x.y.0": tensors["model.x.y.0"], "net.z": tensors["model.z"]},
    )


def test_a_list_on_one_side_gives_the_tensors_of_the_layout(tmp_path):
    tensors = numbered(
        {f"{i}.{part}.{kind}": ((4, 6) if kind == "weight" else (4,)) for i in (0, 1) for part in "qkv" for kind in ("weight", "bias")}
    )
    recipe = recipe_of(Rule("{i}.{q,k,v}.{kind:weight,bias}", "{i}.qkv.{kind:weight,bias}", "h ..., h ..., h ... -> (h + h + h) ..."))
    wanted = {
        f"{i}.qkv.{kind}": torch.cat([tensors[f"{i}.{part}.{kind}"] for part in "qkv"]) for i in (0, 1) for kind in ("weight", "bias")
    }
    both_ways(tmp_path, tensors, recipe, wanted)


def test_lists_on_both_sides_pair_off_by_place(tmp_path):
    tensors = numbered({"first.weight": (2, 3), "second.weight": (3, 2)})
    both_ways(
        tmp_path,
        tensors,
        recipe_of(Rule("{first,second}.weight", "{x,y}.t", "a b -> b a")),
        {"x.t": tensors["first.weight"].T, "y.t": tensors["second.weight"].T},
    )


def test_a_count_on_one_side_stacks(tmp_path):
    experts = 12  # numbers with one and two digits: order is by value
    tensors = numbered({f"layers.{i}.experts.{e}.w{w}.weight": (3, 4) for i in (0, 1) for e in reversed(range(experts)) for w in (1, 2, 3)})
    recipe = recipe_of(Rule("layers.{i}.experts.{e}.w{1,2,3}.weight", "layers.{i}.w{1,2,3}", "e a b -> e a b"))
    wanted = {
        f"layers.{i}.w{w}": torch.stack([tensors[f"layers.{i}.experts.{e}.w{w}.weight"] for e in range(experts)])
        for i in (0, 1)
        for w in (1, 2, 3)
    }
    both_ways(tmp_path, tensors, recipe, wanted)


def test_a_count_and_a_list_together(tmp_path):
    tensors = numbered({f"experts.{e}.{part}_proj": (2, 3) for e in range(3) for part in ("gate", "up")})
    recipe = recipe_of(Rule("experts.{e}.{gate,up}_proj", "gate_up", "e i h, e i h -> e h (i + i)"))
    wanted = torch.stack([torch.cat([tensors[f"experts.{e}.gate_proj"], tensors[f"experts.{e}.up_proj"]]).T for e in range(3)])
    both_ways(tmp_path, tensors, recipe, {"gate_up": wanted})


def test_two_counts_are_two_axes(tmp_path):
    tensors = numbered({f"p{a}.{b}": (2,) for a in range(2) for b in range(3)})
    recipe = recipe_of(Rule("p{a}.{b}", "all", "a b c -> (b a) c", dims={"a": 2}))
    wanted = torch.stack([tensors[f"p{a}.{b}"] for b in range(3) for a in range(2)])
    both_ways(tmp_path, tensors, recipe, {"all": wanted})


def test_ranks_are_merged_and_split_again(tmp_path):
    tensors = numbered({f"rank{r:02}/{name}": shape for r in range(3) for name, shape in (("col", (2, 4)), ("row", (4, 2)))})
    recipe = recipe_of(
        Rule("rank{r:02}/col", "col", "r o i -> (r o) i"), Rule("rank{r:02}/row", "row", "r o i -> o (r i)"), dims={"r": "ranks"}
    )
    wanted = {
        "col": torch.cat([tensors[f"rank{r:02}/col"] for r in range(3)]),
        "row": torch.cat([tensors[f"rank{r:02}/row"] for r in range(3)], 1),
    }
    both_ways(tmp_path, tensors, recipe, wanted, config={"ranks": 3})


def test_a_suffix_that_the_first_one_lacks(tmp_path):
    tensors = numbered({f"dense{suffix}.weight": (2, 2) for suffix in ("", "_1", "_2")})
    both_ways(
        tmp_path, tensors, recipe_of(Rule("dense{e?_}.weight", "dense", "e a b -> e a b")), {"dense": torch.stack(list(tensors.values()))}
    )


def test_sizes_may_depend_on_the_alternative(tmp_path):
    tensors = numbered({"q.weight": (8, 3), "k.weight": (4, 3)})
    recipe = recipe_of(
        Rule("{q,k}.weight", "w{Q,K}", "(h two d) c -> (h d two) c", dims={"two": 2, "h": {"q": "heads", "k": "kv_heads or heads"}}),
    )
    wanted = {f"w{n.upper()}": tensors[f"{n}.weight"].reshape(2 if n == "q" else 1, 2, 2, 3).transpose(1, 2).reshape(-1, 3) for n in "qk"}
    both_ways(tmp_path, tensors, recipe, wanted, config={"heads": 2, "kv_heads": 1})


def test_sizes_come_from_options_too(tmp_path):
    tensors = numbered({"a": (6, 2)})
    recipe = recipe_of(
        Rule("a", "b", "(h d) c -> (d h) c"), dims={"h": "n"}, options={"n": Option("heads", default="{n_head or 1}", kind="int")}
    )
    wanted = {"b": tensors["a"].reshape(3, 2, 2).transpose(0, 1).reshape(6, 2)}
    assert_same(convert(tmp_path, tensors, recipe, options={"n": "3"}), wanted)
    assert_same(convert(tmp_path, tensors, recipe, name="again", config={"n_head": 3}), wanted)
    assert "a whole number" in refused(recipe, {"a": (6, 2)}, config={"n_head": "three"})


def test_optional_and_when():
    recipe = recipe_of(
        Rule("a", "A"),
        Rule("b", "B", optional=True),
        Rule("c", "C", when="kind == 'c'"),
        options={"kind": Option("which", default="{kind}")},
    )
    assert list(recipe.apply(entries({"a": (1,)})).outputs) == ["A"]
    assert list(recipe.apply(entries({"a": (1,), "b": (1,)})).outputs) == ["A", "B"]
    assert list(recipe.apply(entries({"c": (1,), "a": (1,)}), {"kind": "c"}).outputs) == ["C", "A"]
    assert "'c': no tensor for it" in refused(recipe, {"a": (1,)}, config={"kind": "c"})
    assert "c: no rule for it" in refused(recipe, {"a": (1,), "c": (1,)})


def test_a_drop_is_listed_and_not_made_again(tmp_path):
    tensors = numbered({"a": (2,), "0.inv_freq": (3,), "1.inv_freq": (3,)})
    recipe = recipe_of(Rule("a", "b"), Drop("{i}.inv_freq", "the model computes it"))
    made = recipe.apply(entries({name: tuple(t.shape) for name, t in tensors.items()}))
    assert made.dropped == ["0.inv_freq", "1.inv_freq"]
    assert recipe.lost == []
    back = recipe.inverse("b2a")
    assert back.lost == ["{i}.inv_freq: not made again (the model computes it)"]
    assert_same(convert(tmp_path, {"b": tensors["a"]}, back), {"a": tensors["a"]})


def test_a_cast_holds_in_its_direction_and_gives_way_to_dtype(tmp_path):
    tensors = {"a": random_tensor(4, 2, dtype=torch.bfloat16), "n": torch.arange(3)}
    recipe = recipe_of(Rule("a", "b", cast="fp32"), Rule("n", "n"))
    made = convert(tmp_path, tensors, recipe)
    assert_same(made, {"b": tensors["a"].float(), "n": tensors["n"]})
    assert_same(convert(tmp_path, tensors, recipe, name="half", dtype="float16"), {"b": tensors["a"].half(), "n": tensors["n"]})
    back = recipe.inverse("b2a")
    assert back.lost == ["b: keeps its dtype, the other direction casts to fp32"]
    assert_same(convert(tmp_path, made, back, name="back"), {"a": tensors["a"].float(), "n": tensors["n"]})


def test_a_target_takes_the_place_of_its_first_source():
    recipe = recipe_of(Rule("z{q,k}", "z", "a, a -> (a + a)"), Rule("{n*}.w", "{n*}.v"))
    assert list(recipe.apply(entries({"b.w": (1,), "zk": (2,), "a.w": (1,), "zq": (2,)})).outputs) == ["b.v", "z", "a.v"]


def test_rows_say_what_is_made_of_what():
    recipe = recipe_of(Rule("m.{q,k}", "qk", "a, a -> (a + a)"), left=Side(aliases=(("old.{n*}", "m.{n*}"),)))
    (row,) = recipe.apply(entries({"old.q": (2,), "old.k": (2,)})).rows
    assert (row.target, row.sources, row.layout, str(row.spec)) == ("qk", ("old.q", "old.k"), "a, a -> (a + a)", "float32[4]")


def test_names_that_look_like_a_pattern(tmp_path):
    tensors = numbered({"a{b}.{0}": (2,)})
    both_ways(tmp_path, tensors, recipe_of(Rule("a{{b}}.{{{i}}}", "c{{}}{i}")), {"c{}0": tensors["a{b}.{0}"]})


# Other names and repeated tensors ----------------------------------------------------------------------------------


ALIASED = recipe_of(
    Rule("x.{n*}", "y.{n*}"), left=Side(aliases=(("model.x.{n*}", "x.{n*}"),)), right=Side(aliases=(("net.y.{n*}", "y.{n*}"),))
)


def test_aliases_are_other_names_of_the_source():
    assert list(ALIASED.apply(entries({"model.x.a": (1,), "x.b": (1,)})).outputs) == ["y.a", "y.b"]
    assert list(ALIASED.inverse("b").apply(entries({"net.y.a": (1,), "y.b": (1,)})).outputs) == ["x.a", "x.b"]


def test_two_names_of_one_tensor_are_refused():
    message = refused(ALIASED, {"model.x.a": (1,), "x.a": (1,)})
    assert message == "x.a and model.x.a are two names of one tensor, x.a: remove one of them"


def test_messages_give_names_as_they_are_stored():
    assert "model.x" in refused(recipe_of(Rule("y", "z"), left=Side(aliases=(("model.x", "x"),))), {"model.x": (1,), "y": (1,)})


TIED = recipe_of(
    Rule("embed", "wte"),
    Rule("head", "lm_head", optional=True),
    Tie("embed", "lm_head", "wte", when="tied"),
    options={"tied": Option("whether the head is the embedding", default="{tie}", kind="bool")},
)


def test_a_tie_makes_the_second_tensor_from_the_first(tmp_path):
    tensors = numbered({"embed": (3, 2)})
    made = convert(tmp_path, tensors, TIED, config={"tie": True})
    assert_same(made, {"wte": tensors["embed"], "lm_head": tensors["embed"]})
    assert_same(convert(tmp_path, made, TIED.inverse("b2a"), name="back", config={"tie": True}), tensors)
    made = TIED.apply(entries({"embed": (3, 2)}), {"tie": True})
    assert made.notes == ["lm_head repeats embed: the source ties them"]


def test_without_the_tie_both_stay(tmp_path):
    both = numbered({"embed": (3, 2), "head": (3, 2)})
    both_ways(tmp_path, both, TIED, {"wte": both["embed"], "lm_head": both["head"]}, config={"tie": False})
    assert list(TIED.apply(entries({"embed": (3, 2), "head": (3, 2)}), {"tie": True}).outputs) == ["wte", "lm_head"]
    assert list(TIED.inverse("b").apply(entries({"wte": (3, 2)}), {"tie": True}).outputs) == ["embed"]


def test_a_tie_is_cast_like_any_other(tmp_path):
    tensors = numbered({"embed": (3, 2)})
    half = tensors["embed"].to(torch.bfloat16)
    assert_same(convert(tmp_path, tensors, TIED, config={"tie": True}, dtype="bf16"), {"wte": half, "lm_head": half})


def test_a_replica_that_differs_is_refused_and_nothing_is_written(tmp_path):
    write(tmp_path / "source", numbered({"wte": (3, 2), "lm_head": (3, 2)}), config={"tie": True})
    with pytest.raises(CoverageError, match="lm_head should hold the same bytes as wte"):
        streamconv.convert(tmp_path / "source", tmp_path / "out", recipe=TIED.inverse("b2a"), max_memory=ROOMY)
    assert not list((tmp_path / "out").glob("*.safetensors*"))


@pytest.mark.parametrize("other", [(2, 3), ("bfloat16", (3, 2))])
def test_a_replica_of_another_shape_or_dtype_is_refused(other):
    message = refused(TIED.inverse("b2a"), {"wte": (3, 2), "lm_head": other}, options={"tied": "true"})
    assert "lm_head should repeat wte" in message


# Refusals ----------------------------------------------------------------------------------------------------------


QKV = recipe_of(
    Rule("layers.{i}.attn.{q,k,v}_proj.weight", "h.{i}.qkv", "a c, b c, b c -> (a + b + b) c"),
    Rule("layers.{i}.experts.{e}.w", "h.{i}.experts", "e a b -> e a b", optional=True, sparse=True),
    Rule("norm.weight", "ln"),
)
LAYER = {f"layers.{i}.attn.{part}_proj.weight": (4, 2) for i in (0, 1) for part in "qkv"}


def without(shapes, *names):
    return {name: shape for name, shape in shapes.items() if name not in names}


@pytest.mark.parametrize(
    ("shapes", "parts"),
    [
        (
            {**LAYER, "norm.weight": (2,), "norms.weight": (2,), "x": (1,)},
            ["norms.weight and 1 more: no rule for it", "the nearest rule is 'norm.weight'"],
        ),
        (LAYER, ["rule 'norm.weight': no tensor for it", "is this the right recipe"]),
        ({**LAYER, "norm.wait": (2,)}, ["norm.wait: no rule for it", "'norm.weight'"]),
        ({"norm.weight": (2,)}, ["'layers.{i}.attn.{q,k,v}_proj.weight': no tensor for it"]),
        (
            {**without(LAYER, "layers.1.attn.k_proj.weight"), "norm.weight": (2,)},
            ["layers.1.attn.k_proj.weight is missing, while layers.1.attn.q_proj.weight is there", "3 tensors go together, 2 were found"],
        ),
        (
            {**LAYER, "norm.weight": (2,), "layers.0.experts.0.w": (2, 2), "layers.0.experts.2.w": (2, 2)},
            ["layers.0.experts.1.w is missing"],
        ),
        ({**LAYER, "norm.weight": (2,), "layers.0.experts.1.w": (2, 2)}, ["layers.0.experts.0.w is missing"]),
        (
            {**LAYER, "norm.weight": (2,), "layers.0.experts.999999999999.w": (2, 2)},
            ["layers.0.experts.0.w is missing", "1000000000000 tensors"],
        ),
        (
            {**LAYER, "norm.weight": (2,), "layers.0.experts.0.w": (2, 2), "layers.0.experts.1.w": (2, 3)},
            ["layers.0.experts.1.w has shape (2, 3), the others of its group (2, 2)"],
        ),
        (
            {**LAYER, "layers.1.attn.k_proj.weight": ("float16", (4, 2)), "norm.weight": (2,)},
            ["layers.1.attn.q_proj.weight", "float16, float32", "--dtype settles it"],
        ),
        (
            {**LAYER, "layers.1.attn.k_proj.weight": (4, 3), "norm.weight": (2,)},
            ["layers.1.attn.q_proj.weight", "c has 3 elements, expected 2"],
        ),
        (
            {**LAYER, "layers.1.attn.k_proj.weight": (3, 2), "norm.weight": (2,)},
            ["layers.1.attn.q_proj.weight", "b has 4 elements, expected 3"],
        ),
        ({**LAYER, "layers.1.attn.q_proj.weight": (4,), "norm.weight": (2,)}, ["has 1 axes, expected 2"]),
        ({}, ["no tensor for it"]),
    ],
)
def test_what_does_not_fit_is_named(shapes, parts):
    message = refused(QKV, shapes)
    assert [part for part in parts if part not in message] == [], message


def test_different_dtypes_are_settled_by_a_cast(tmp_path):
    tensors = {"q": random_tensor(2, 2), "k": random_tensor(2, 2, dtype=torch.bfloat16, seed=1)}
    recipe = recipe_of(Rule("{q,k}", "qk", "a c, a c -> (a + a) c"))
    with pytest.raises(CoverageError, match="bfloat16, float32"):
        convert(tmp_path, tensors, recipe)
    assert not (tmp_path / "out").exists()
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        wanted = {"qk": torch.cat([tensor.to(dtype) for tensor in tensors.values()])}
        assert_same(convert(tmp_path, tensors, recipe, name=short, dtype=short), wanted)
    fixed = recipe_of(Rule("{q,k}", "qk", "a c, a c -> (a + a) c", cast="float64"))
    assert_same(convert(tmp_path, tensors, fixed, name="cast"), {"qk": torch.cat([t.double() for t in tensors.values()])})


def test_a_dtype_that_cannot_be_cast_is_not():
    mixed = {"q": ("int8", (2,)), "k": (2,)}
    assert "float32, int8" in refused(recipe_of(Rule("{q,k}", "qk", "a, a -> (a + a)")), mixed)


def test_two_rules_for_one_tensor_and_two_tensors_for_one_target():
    message = refused(recipe_of(Rule("a.{i}.w", "b.{i}"), Rule("a.{n*}", "c.{n*}")), {"a.0.w": (1,)})
    assert "a.0.w matches two rules, 'a.{i}.w' and 'a.{n*}'" in message
    message = refused(recipe_of(Rule("a", "c"), Rule("b", "c")), {"a": (1,), "b": (1,)})
    assert "c is made twice, from a and from b" in message


def test_sizes_that_nothing_gives():
    recipe = recipe_of(Rule("a", "b", "(h d) -> (d h)"), dims={"h": "heads"})
    assert "h, d do not follow from the shapes" in refused(recipe, {"a": (6,)})
    assert "cannot be (h d)" in refused(recipe, {"a": (6,)}, config={"heads": 4})
    assert "axis h cannot have size 0" in refused(recipe, {"a": (6,)}, config={"heads": 0})
    assert "not a whole number" in refused(recipe, {"a": (6,)}, config={"heads": True})


def test_what_a_recipe_requires():
    demands = {"shape('a')[0] == n": "a does not have {n} rows: set n"}
    recipe = recipe_of(Rule("a", "b"), options={"n": Option("rows", 2)}, requires=demands)
    assert list(recipe.apply(entries({"a": (2, 3)})).outputs) == ["b"]
    with pytest.raises(CoverageError, match="recipe test-a2b: a does not have 3 rows: set n"):
        recipe.apply(entries({"a": (2, 3)}), options={"n": 3})
    with pytest.raises(CoverageError, match="no rule"):
        recipe.apply(entries({"a": (2, 3), "c": (1,)}), options={"n": 3})
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(RecipeError, match="test-a2b"):
        recipe_of(Rule("a", "b"), requires={"n ==": "never"})


def test_rules_miss_no_name_unless_they_are_sparse():
    """Numbers go up to the largest of any such rule or as dims say; alternatives are all there, of a labelled list those in use."""
    recipe = recipe_of(
        Rule("{base:,m.}{i}.{q,k}.w", "{base:,m.}{i}.w{q,k}"),
        Rule("{base:,m.}{i}.{part:q,k}.b", "{base:,m.}{i}.b{part:q,k}", optional=True),
        Rule("{base:,m.}{i}.rest", "{base:,m.}{i}.rest", optional=True, sparse=True),
        dims={"i": "layers"},
    )
    whole = {f"{at}{i}.{part}.w": (1,) for at in ("", "m.") for i in (0, 1, 2) for part in "qk"}
    biases = {f"m.{i}.q.b": (1,) for i in (0, 1, 2)}
    for tensors in (whole, whole | biases, {name: shape for name, shape in whole.items() if name[0] == "m"}):
        made = recipe.apply(entries({**tensors, "m.9.rest": (1,)})).outputs
        assert len(made) == len(tensors) + 1
        for way, names in ((recipe, list(tensors)), (recipe.inverse("test-b2a"), [name for name in made if "rest" not in name])):
            for gone in names:
                message = refused(way, {name: (1,) for name in names if name != gone})
                assert f"{gone} is missing, while " in message
    assert "3.q.w is missing" in refused(recipe, whole, config={"layers": 4})
    assert "3.q.w is missing" in refused(recipe, {**whole, f"{10**17}.k.w": (1,), f"{10**17}.q.w": (1,)})  # at once


def test_numbers_with_arithmetic_are_counted_from_their_first():
    recipe = recipe_of(Rule("a.{i+1}", "b.{i}"), Rule("c.{i}", "d.{i}"))
    assert "a.2 is missing, while a.1 is there" in refused(recipe, {"a.1": (1,), "c.0": (1,), "c.1": (1,)})
    assert list(recipe.apply(entries({"a.1": (1,), "a.2": (1,), "c.0": (1,), "c.1": (1,)})).outputs) == ["b.0", "b.1", "d.0", "d.1"]


@pytest.mark.parametrize(
    "rule", [Rule("a.{x*}", "b.{x*}"), Rule("a.{i}", "b.{i}", where="i > 1"), Rule("a.{i}", "b.{i}", fallback=True)], ids=str
)
def test_rules_whose_names_nobody_knows_are_sparse(rule):
    assert len(recipe_of(rule).apply(entries({"a.2": (1,), "a.5": (1,)})).outputs) == 2


def test_only_dropped_tensors_are_nothing_to_convert():
    assert "nothing to convert" in refused(recipe_of(Drop("a", "why"), Rule("b", "c", optional=True)), {"a": (1,)})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_heads": 2}, "--set n_heads: recipe test-a2b has no such option; it has: flag, kind, n_head; did you mean n_head?"),
        ({"n_head": "two"}, "--set n_head=two: expected a whole number (heads)"),
        ({"flag": "maybe"}, "--set flag=maybe: expected true or false (a switch)"),
        ({"kind": "c"}, "--set kind=c: expected one of a, b (a choice)"),
    ],
)
def test_options_that_cannot_be(given, message):
    options = {
        "n_head": Option("heads", default=2),
        "flag": Option("a switch", default=False),
        "kind": Option("a choice", default="a", choices=("a", "b")),
    }
    with pytest.raises(UsageError) as caught:
        recipe_of(Rule("a", "b"), options=options).apply(entries({"a": (1,)}), options=given)
    assert str(caught.value) == message


def test_option_values():
    options = {
        "n": Option("", default=2),
        "flag": Option("", default=False),
        "text": Option("", default=None),
        "seen": Option("", default="{has('a.{i}')}"),
        "size": Option("", default="{hidden // 2}", kind="int"),
    }
    recipe = recipe_of(Rule("a.{i}", "b.{i}"), options=options)
    found = recipe.apply(entries({"a.0": (1,)}), {"hidden": 8}).options
    assert found == {"n": 2, "flag": False, "text": None, "seen": True, "size": 4}
    found = recipe.apply(entries({"a.0": (1,)}), {}, {"n": " -3", "flag": "On", "text": "x", "size": 5}).options
    assert found == {"n": -3, "flag": True, "text": "x", "seen": True, "size": 5}
    assert recipe.apply(entries({"a.0": (1,)}), {}, {"flag": True}).options["flag"] is True


def test_dtypes_are_asked_for_by_how_their_names_begin():
    options = {
        "narrow": Option("", default="{has('{name*}.weight', 'float8')}"),
        "other": Option("", default="{has('{name*}.bias', 'float8')}"),
        "whole": Option("", default="{has('{name*}', 'int')}"),
    }
    tensors = entries({"a.weight": (1,), "b.bias": (1,), "b.weight": ("float8_e5m2", (1,))})
    assert recipe_of(Rule("{name*}", "{name*}"), options=options).apply(tensors).options == {"narrow": True, "other": False, "whole": False}


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: Rule("{a,b}", "c"), "lists differ in number or length"),
        (lambda: Rule("{q,k}", "{a,b,c}"), "lists differ"),
        (lambda: Rule("{q,k,v}", "qkv", "a, a -> (a + a)"), "names 3 tensors"),
        (lambda: Rule("x.{i}", "x"), "takes a layout"),
        (lambda: Rule("x.{e}", "x", "a -> a"), "must begin with e"),
        (lambda: Rule("x.{n*}", "y"), "{n*} must stand on both sides"),
        (lambda: Rule("x.{i", "y"), "'{' is not closed"),
        (lambda: Rule("x.{i=1}", "y.{i}"), "{i=1} must stand on one side only"),
        (lambda: Rule("x.{i//2}", "y.{i}"), "{i//2} must stand on one side only"),
        (lambda: Rule("x.{i+1 +}", "y.{i}"), "not an expression"),
        (lambda: Rule("x", "y", optional="1 +"), "not an expression"),
        (lambda: Rule("x", "y", "a b -> b"), "axis 'a' is on one side only"),
        (lambda: Rule("x", "y", cast="float33"), "unknown dtype 'float33'"),
        (lambda: Rule("x", "y", when="import os"), "not an expression"),
        (lambda: Rule("x", "y", when="__import__('os').system('x')"), None),
        (lambda: Rule("x", "y", when="lambda: 1"), "Lambda is not part of an expression"),
        (lambda: Rule("x", "y", "(a b) -> (b a)", dims={"a": "1 +"}), "not an expression"),
        (lambda: Drop("{", "why"), "'{' is not closed"),
        (lambda: Tie("a", "{", "c"), "'{' is not closed"),
    ],
)
def test_contradictions_are_found_when_a_recipe_is_made(make, part):
    fact = make()
    if part is None:  # names are looked up, never executed
        with pytest.raises(RecipeError, match="has no value here"):
            recipe_of(fact).apply(entries({"x": (1,)}))
        return
    with pytest.raises(RecipeError) as caught:
        recipe_of(fact)
    assert part in str(caught.value)
    assert f"recipe test-a2b, rule {fact.left!r}" in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [{"left": Side(aliases=(("a.{n*}", "b"),))}, {"options": {"x": Option("", default="{1 +}")}}, {"dims": {"h": {"q": "("}}}],
)
def test_contradictions_outside_of_rules(settings):
    with pytest.raises(RecipeError, match="recipe test-a2b: "):
        recipe_of(Rule("a", "b"), **settings)


# The way back, and recipes as data ---------------------------------------------------------------------------------


RICH = Recipe(
    "rich-a2b",
    "every field that there is",
    (
        Rule(
            "a.{i}.{q,k,v}",
            "b.{i}",
            "(h d) c, (g d) c, (g d) c -> ((h + g + g) d) c",
            dims={"d": 2, "h": {"q": "heads", "k": 1}},
            when="x == 1",
        ),
        Rule("c", "d", cast="bf16", optional=True),
        Drop("e.{i}", "because", when="not x", optional=False),
        Tie("f", "g", "h", when="tied"),
    ),
    dims={"g": "kv", "h": "heads"},
    options={
        "x": Option("a number", default="{config.x}", kind="int"),
        "m": Option("a mode", default="u", choices=("u", "v")),
        "tied": Option("", default=True),
    },
    reference="somewhere",
    left=Side(aliases=(("model.{n*}", "{n*}"),), writes="internvl-custom2hf"),
    right=Side(format="torch", ranks=("rank{r}.pt",), root="model", aliases=(("net.{n*}", "{n*}"),)),
)


DECLARED = [recipe for recipe in recipes.registry().values() if all(type(stage) is Recipe for stage in recipe.stages)]


@pytest.mark.parametrize("recipe", [RICH, QKV, TIED, *DECLARED], ids=lambda recipe: recipe.name)
def test_the_way_back_of_the_way_back(recipe):
    again = recipe.inverse("x").inverse(recipe.name, recipe.summary)
    assert again.rules == recipe.rules
    assert again == recipe


@pytest.mark.parametrize("recipe", [RICH, RICH.inverse("rich-b2a"), QKV, TIED, *DECLARED], ids=lambda recipe: recipe.name)
def test_as_data_and_back(recipe):
    data = recipe.to_dict()
    assert Recipe.from_dict(data).to_dict() == data
    assert without_functions(Recipe.from_dict(json.loads(json.dumps(data)))) == without_functions(recipe)
    for side, mine in ((recipe.source, data.get("left")), (recipe.target, last_of(data).get("right"))):
        if callable(side.writes):
            assert recipes.find_writer(mine["writes"]) == side.writes


def without_functions(recipe: Recipe) -> Recipe:
    """A recipe without the functions that make JSON files, which are data by name only."""
    sides = {key: replace(side, writes=None) for key, side in (("left", recipe.left), ("right", recipe.right))}
    return replace(recipe, **sides, then=recipe.then and without_functions(recipe.then))


def last_of(data):
    """The last stage of a recipe as data."""
    return last_of(data["then"]) if "then" in data else data


YAML = """
summary: a recipe in a file
rules:
  - rule: a.{i}.{q,k,v}
    right: b.{i}.qkv
    layout: h c, h c, h c -> (h + h + h) c
  - {drop: junk, reason: not needed}
  - tie: e
    right: head
    stored: emb
    when: tied
  - {rule: e, right: emb}
options:
  tied: {help: one tensor for two, default: true}
"""


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json"])
def test_recipe_files(suffix, tmp_path, capsys):
    import yaml

    file = tmp_path / f"my-a2b.{suffix}"
    file.write_text(json.dumps(yaml.safe_load(YAML)) if suffix == "json" else YAML)
    recipe = recipes.get(str(file))
    assert recipe.name == "my-a2b"
    assert [type(fact) for fact in recipe.rules] == [Rule, Drop, Tie, Rule]
    tensors = numbered({"a.0.q": (2, 2), "a.0.k": (2, 2), "a.0.v": (2, 2), "e": (2,), "junk": (1,)})
    write(tmp_path / "source", tensors)
    assert run("convert", tmp_path / "source", tmp_path / "out", "--recipe", file, "--quiet") == 0
    assert_same(
        read(tmp_path / "out"), {"b.0.qkv": torch.cat([tensors[f"a.0.{n}"] for n in "qkv"]), "emb": tensors["e"], "head": tensors["e"]}
    )
    assert run("recipes", file) == 0
    shown = capsys.readouterr().out
    assert "h c, h c, h c -> (h + h + h) c" in shown
    assert "not needed" in shown


GOOD = {"rules": [{"rule": "a", "right": "b"}]}


def rule(**fields):
    return {"rules": [{"rule": "a", "right": "b", **fields}]}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "expected a mapping, found NoneType"),
        ("- a\n- b", "expected a mapping, found list"),
        ("{", "cannot be parsed"),
        ("a: [b", "cannot be parsed"),
        ("a: !!python/object/apply:os.system ['touch {trap}']", "cannot be parsed"),
        ("rules: !!python/name:os.system ", "cannot be parsed"),
        (b"\xff\xfe", "not UTF-8"),
        ("1: 2", "expected a mapping"),
        ({}, "'rules' must be a list"),
        ({"rules": []}, "'rules' must be a list"),
        ({"rules": {"rule": "a"}}, "'rules' must be a list"),
        ({"rules": ["a -> b"]}, "rule 1: expected a mapping, found str"),
        ({"rules": [{"right": "b"}]}, "rule 1: expected one of rule, drop, make, tie, found right"),
        ({"rules": [{"rule": "a"}]}, "rule 1: missing right"),
        ({"rules": [{"tie": "a"}]}, "rule 1: missing right, stored"),
        ({"rules": [{"drop": "a"}]}, "rule 1: missing reason"),
        ({"rules": [{"rule": 1, "right": "b"}]}, "left must be text, found 1"),
        (rule(rihgt="c"), "unknown field 'rihgt'; known are left, right, layout"),
        (rule(left="c"), "unknown field 'left'"),
        (rule(drop="c"), "unknown field 'drop'"),
        (rule(layout=None), "layout must be text"),
        (rule(layout="a -> b"), "is on one side only"),
        (rule(optional=3), "optional must be true or false or text, found 3"),
        (rule(optional="("), "not an expression"),
        (rule(complete=True), "no field 'complete' any more: rules are complete; leave it out, and say sparse: true"),
        (rule(flipped=1), "flipped must be true or false"),
        (rule(dims=[1]), "dims must be a mapping"),
        (rule(dims={"h": [1]}), "dims must hold a whole number or text or a mapping"),
        (rule(dims={"h": True}), "dims must hold a whole number or text or a mapping"),
        (rule(dims={"h": {"q": {}}}), "dims must hold a whole number or text, found"),
        (rule(when=True), "when must be text"),
        (rule(cast=32), "cast must be text"),
        (rule(cast="float99"), "unknown dtype"),
        ({**GOOD, "dims": {"h": 1.5}}, "dims must hold a whole number or text or a mapping"),
        ({**GOOD, "nmae": "x"}, "unknown field 'nmae'"),
        ({**GOOD, "name": 3}, "name must be text"),
        ({**GOOD, "right": {"format": 3}}, "format must be text"),
        ({**GOOD, "options": []}, "options: expected a mapping"),
        ({**GOOD, "options": {"x": 3}}, "option x: expected a mapping"),
        ({**GOOD, "options": {"x": {"default": [1]}}}, "default must be"),
        ({**GOOD, "options": {"x": {"choices": "abc"}}}, "choices must be a list"),
        ({**GOOD, "options": {"x": {"choices": 3}}}, "choices must be a list"),
        ({**GOOD, "options": {"x": {"kind": "float"}}}, "kind must be"),
        ({**GOOD, "options": {"x": {"type": "int"}}}, "unknown field 'type'"),
        ({**GOOD, "left": {"aliases": "ab"}}, "aliases must be a list"),
        ({**GOOD, "left": {"aliases": ["ab"]}}, "aliases must hold a list, found"),
        ({**GOOD, "left": {"aliases": [["a"]]}}, "aliases must hold a list of length 2"),
        ({**GOOD, "right": {"aliases": [["a.{i}", "b"]]}}, "must have the same captures"),
        ({**GOOD, "right": {"ranks": "r"}}, "ranks must be a list, found"),
        ({**GOOD, "left": "torch"}, "left: expected a mapping"),
        ({**GOOD, "right": {"writes": "os:getcwd"}}, "writes 'os:getcwd': there is no recipe of that name"),
        ({**GOOD, "left": {"writes": "shutil:rmtree"}}, "there is no recipe of that name"),
        ({**GOOD, "then": {**GOOD, "name": "b", "left": {"writes": "shutil:rmtree"}}}, "there is no recipe of that name"),
        ({**GOOD, "then": {"name": "b"}}, "then: 'rules' must be a list"),
        (rule(op={"op": "explode"}), "op 'explode' is unknown"),
        (rule(copies={"r": 2}), "no field 'copies' any more: it is said by the number itself, in the names: {r=*}"),
        (rule(offset={"i": 2}), "no field 'offset' any more: it is said by the number itself, in the names: {i+n}"),
        (rule(at={"i": 2}), "no field 'at' any more: it is said by the number itself, in the names: {i=n}"),
        ({"rules": [{"drop": "a", "reason": "b", "flipped": True}]}, "no field 'flipped' any more: a drop of the other side is a make"),
    ],
)
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_bad_recipe_files(content, part, suffix, tmp_path, capsys):
    trap = tmp_path / "trap"
    file = tmp_path / f"bad.{suffix}"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content.replace("{trap}", str(trap)) if isinstance(content, str) else json.dumps(content))
    with pytest.raises(RecipeError) as caught:
        recipes.get(str(file))
    assert str(file) in str(caught.value) or "recipe bad" in str(caught.value)
    assert part in str(caught.value) or (suffix == "json" and isinstance(content, str)), str(caught.value)
    assert not trap.exists()
    refusal(capsys, "recipes", file)


def test_recipe_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        recipes.get(str(tmp_path / "none.yaml"))
    (tmp_path / "dir.json").mkdir()
    with pytest.raises(UsageError, match="cannot be read"):
        recipes.get(str(tmp_path / "dir.json"))
    (tmp_path / "huge.yaml").write_text("#" * (5 << 20))
    with pytest.raises(RecipeError, match="larger than"):
        recipes.get(str(tmp_path / "huge.yaml"))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(RecipeError, match="cannot be parsed"):
        recipes.get(str(tmp_path / "deep.json"))


# The registry ------------------------------------------------------------------------------------------------------


@pytest.fixture
def added(monkeypatch):
    """Registers entry points whose values are attributes of this module."""

    def register(**values):
        for name, value in values.items():
            monkeypatch.setitem(globals(), name, value)
        points = [EntryPoint(name, f"{__name__}:{name}", registry.GROUP) for name in values]
        monkeypatch.setattr("streamconv.extensions.entry_points", lambda group: points if group == registry.GROUP else [])
        recipes.REGISTRY.forget()

    yield register
    monkeypatch.undo()
    recipes.REGISTRY.forget()


def test_the_registry():
    known = recipes.registry()
    assert {"internvl-hf2custom", "internvl-custom2hf"} <= set(known)
    assert list(known) == sorted(known)
    assert all(name == recipe.name and recipe.summary for name, recipe in known.items())
    assert recipes.get("internvl-hf2custom") is known["internvl-hf2custom"]


def test_every_recipe_is_listed_below_its_module():
    assert recipes.registry()
    below = f"{recipes.__name__}."
    modules = {name.removeprefix(below): module for name, module in sys.modules.items() if name.startswith(below)}
    declared = {name: [recipe.name for recipe in module.RECIPES] for name, module in modules.items() if getattr(module, "RECIPES", ())}
    assert {name: names.split() for name, names in recipes.REGISTRY.modules.items()} == declared


def test_a_recipe_loads_its_own_module_only():
    code = """
import sys, streamconv
assert streamconv.recipes.get("whisper-hf2ms").name == "whisper-hf2ms"
print(sorted(name for name in sys.modules if name.startswith("streamconv.recipes.") and hasattr(sys.modules[name], "RECIPES")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout.strip() == "['streamconv.recipes.mindspore.mindformers', 'streamconv.recipes.mindspore.whisper']"


def test_entry_points_add_recipes(added):
    one, two = recipe_of(Rule("a", "b")), RICH
    added(alone=one, several=(two, two.inverse("rich-b2a")))
    assert recipes.get("test-a2b") == one
    assert recipes.get("rich-b2a").inverse("rich-a2b", two.summary) == two
    assert "internvl-hf2custom" in recipes.registry()


def test_entry_points_that_are_no_recipes(added):
    added(wrong=("not a recipe",))
    with pytest.raises(RecipeError, match="gives a str, not a Recipe"):
        recipes.registry()


def test_two_recipes_of_one_name(added):
    added(one=recipe_of(Rule("a", "b")), other=recipe_of(Rule("a", "c")))
    with pytest.raises(RecipeError, match="two recipes are called test-a2b"):
        recipes.registry()


def test_an_unknown_recipe_is_answered_with_the_nearest(capsys):
    with pytest.raises(UsageError, match=r"unknown recipe 'internvl-hf2costum': did you mean internvl-hf2custom\?"):
        recipes.get("internvl-hf2costum")
    assert "lists all" in refusal(capsys, "recipes", "zzz")


def test_recipes_on_the_command_line(tmp_path, capsys):
    assert run("recipes", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"name", "summary", "source_format", "target_format", "options", "reference"} <= set(rows[0])
    assert run("recipes", "internvl-custom2hf") == 0
    assert "vision_tower.encoder.layer.{i}.attention.{q,k,v}_proj.{kind:weight,bias}" in capsys.readouterr().out
    assert run("recipes", "internvl-custom2hf", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rules"]
    write(tmp_path / "none", numbered({"x": (1,)}))
    assert run("recipes", "--match", tmp_path / "none") == 0
    assert capsys.readouterr().out == "no recipe fits\n"


# Any recipe, any checkpoint ----------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    a: int
    b: int
    c: int


class Form(NamedTuple):
    """A rule, and the left tensors that it takes, where ``{e}`` stands for a number of experts."""

    left: str
    right: str
    layout: str | None
    shapes: Callable[[Sizes], dict[str, tuple[int, ...]]]


def each(parts, shape):
    """The tensors of these names, all of one shape."""
    return lambda n: dict.fromkeys(parts, shape(n))


FORMS = {
    "rename": Form("w", "new", None, each(["w"], lambda n: (n.a, n.b))),
    "transpose": Form("w", "new", "x y -> y x", each(["w"], lambda n: (n.a, n.b))),
    "gain an axis": Form("w", "new", "x y -> x 1 y", each(["w"], lambda n: (n.a, n.b))),
    "fuse": Form("{q,k,v}", "qkv", "x ..., x ..., x ... -> (x + x + x) ...", each("qkv", lambda n: (n.a, n.b, n.c))),
    "fuse inside": Form("{q,k}", "qk", "x y, x y -> x (y + y)", each("qk", lambda n: (n.a, n.b))),
    "grouped": Form(
        "{q,k,v}",
        "wqkv",
        "(g q d) x, (g d) x, (g d) x -> (g (q d + d + d)) x",
        lambda n: {"q": (6 * n.a, n.b), "k": (2 * n.a, n.b), "v": (2 * n.a, n.b)},
    ),
    "rotary": Form("{q,k}", "r{q,k}", "(h two d) x -> (h d two) x", each("qk", lambda n: (6 * n.a, n.b))),
    "stack": Form("e.{e}.w{1,2}", "w{1,2}", "e x y -> e y x", each(["e.{e}.w1", "e.{e}.w2"], lambda n: (n.a, n.b))),
    "stack and fuse": Form("e.{e}.{g,u}", "gu", "e x y, e x y -> e y (x + x)", each(["e.{e}.g", "e.{e}.u"], lambda n: (n.a, n.b))),
    "split": Form("qkv", "{q,k,v}", "(x + x + x) y -> x y, x y, x y", each(["qkv"], lambda n: (3 * n.a, n.b))),
    "unstack": Form("all", "n.{e}", "e x -> e x", each(["all"], lambda n: (n.c, n.a))),
    "unstack twice": Form("all", "n.{e}.{f}", "e f x -> e f x", each(["all"], lambda n: (n.c, n.b, n.a))),
}
DIMS = {"g": 2, "q": 3, "h": 3, "two": 2}


def random_bytes(shape, dtype, seed):
    """Any bytes at all as a tensor."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


@st.composite
def cases(draw):
    """A recipe of up to four forms, and tensors that it fits."""
    rules, tensors = [], {}
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.float8_e4m3fn]
    for number, form in enumerate(draw(st.lists(st.sampled_from([*FORMS.values()]), min_size=1, max_size=4))):
        prefix = f"{draw(st.sampled_from(['model', 'a.b', 'x{y}', 'ä']))}{number}"
        before = prefix.replace("{", "{{").replace("}", "}}") + ".{i}."
        rules.append(Rule(before + form.left, before + form.right, form.layout, sparse=True))
        dtype = draw(st.sampled_from(dtypes))
        for i in draw(st.sets(st.integers(0, 12), min_size=1, max_size=3)):
            sizes = Sizes(*(draw(st.integers(1, 5)) for _ in range(3)))
            for template, shape in form.shapes(sizes).items():
                for e in range(sizes.c if "{e}" in template else 1):
                    tensors[f"{prefix}.{i}.{template.replace('{e}', str(e))}"] = random_bytes(shape, dtype, seed=len(tensors))
    order = draw(st.permutations(sorted(tensors)))
    return recipe_of(*rules, dims=DIMS), {name: tensors[name] for name in order}


NUMBERS = [("{i}", "{i}"), ("{i+1}", "{i}"), ("{i}", "{i+n}"), ("{i+n}", "{i-1}"), ("{i=n-1}", "x"), ("{r=*}", "x"), ("{r=*:02}", "{i=2}")]
COUNTED = [("{e}", "x", "e a -> e a"), ("{e+1}", "x", "e a -> a e"), ("{r//k:02}", "x", "r a -> (r a)"), ("x", "{r//2}", "(r a) -> r a")]


@st.composite
def declared(draw):
    """A recipe of facts of every kind, with every kind of number in their names, turned one way or the other."""
    facts: list[Fact] = []
    for k in range(draw(st.integers(1, 5))):
        choice: dict[str, object] = {
            "optional": draw(st.sampled_from([False, True, "tied", "n > 1"])),
            "when": draw(st.sampled_from([None, "tied"])),
            "fallback": draw(st.booleans()),
        }
        left, right, layout = draw(st.sampled_from([(*pair, None) for pair in NUMBERS] + COUNTED))
        casts: dict[str, object] = draw(
            st.sampled_from([{}, {"cast": "float32", "firm": True}, {"sparse": True}, {"dims": {"k": "n", "a": {"q": 2}}}])
        )
        step: dict[str, object] = draw(st.sampled_from([{}, {"op": {"op": "zeros", "size": "n"}}]))
        fact = draw(
            st.sampled_from(
                [
                    Rule(f"a{k}.{left}", f"b{k}.{right}", layout, **choice, **casts),
                    Rule(f"a{k}", f"b{k}", op={"op": "scale", "value": 2}, **choice),
                    Drop(f"a{k}.{{i+n}}", "unused", **choice, **step, dims={"i": 2}),
                    Tie(f"a{k}", f"b{k}", "b", when="tied"),
                ]
            )
        )
        facts.append(fact.flip() if draw(st.booleans()) else fact)
    return recipe_of(*facts, options={"n": Option("a number", 2), "tied": Option("a switch", default=False)})


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(recipe=declared())
def test_any_recipe_flips_back_to_itself_and_is_data(recipe):
    assert recipe.inverse("test-b2a").inverse(recipe.name, recipe.summary) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    for fact in recipe.rules:
        assert fact.flip().flip() == fact


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(case=cases(), shards=st.integers(1, 3), limit=st.sampled_from([None, 1, 200]))
def test_any_recipe_there_and_back(case, shards, limit, tmp_path_factory):
    recipe, tensors = case
    folder = tmp_path_factory.mktemp("any")
    source = write(folder / "source", tensors, shards=min(shards, len(tensors)))
    size = {"single_file": True} if limit is None else {"max_shard_size": limit}
    streamconv.convert(source, folder / "there", recipe=recipe, max_memory=ROOMY, workers=2, **size)
    made = read(folder / "there")
    assert sum(map(len, map(raw, made.values()))) == sum(map(len, map(raw, tensors.values())))
    streamconv.convert(folder / "there", folder / "back", recipe=recipe.inverse("test-b2a"), max_memory=ROOMY, workers=2)
    assert_same(read(folder / "back"), tensors)
    assert streamconv.verify(source, folder / "there", recipe=recipe, max_memory=ROOMY).equal
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


WORDS = ["rules", "rule", "drop", "tie", "right", "left", "layout", "dims", "options", "when", "name", "choices", "h", "default", "cast"]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["a.{i}", "{q,k}", "a, a -> (a + a)", "("]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=12,
)
FACTS = st.fixed_dictionaries(
    {"rule": VALUES, "right": VALUES}, optional={"layout": VALUES, "dims": VALUES, "when": VALUES, "cast": VALUES}
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=VALUES | st.fixed_dictionaries({"name": st.just("x"), "rules": st.lists(FACTS, max_size=2)}, optional={"options": VALUES}))
def test_any_data_is_a_recipe_or_refused(data):
    with suppress(RecipeError):
        Recipe.from_dict(data)
