from __future__ import annotations

import copy
import itertools
import pickle

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamconv.errors import NotationError, RecipeError
from streamconv.notation.names import Capture, Matcher, Pattern, natural_key, nearest, overlap, parse

# ---------------------------------------------------------------------------------------------------------------- examples

META = "consolidated.{r:02}.pth/layers.{i}.attention.w{q,k,v}.weight"
SAT = "mp_rank_{r:02}_model_states.pt/transformer.layers.{i}.mlp.dense_h_to_4h{gate:,_gate}{e?_}.weight"

MATCHES = [
    # InternVL
    ("mlp1.{0,1,3}.{x*}", "mlp1.3.bias", {"list0": 2, "x": "bias"}),
    (
        "vision_model.encoder.layers.{i}.attn.qkv.{weight,bias}",
        "vision_model.encoder.layers.23.attn.qkv.bias",
        {"i": 23, "list0": 1},
    ),
    (
        "model.vision_tower.encoder.layer.{i}.attention.{part:q,k,v}_proj.{kind:weight,bias}",
        "model.vision_tower.encoder.layer.0.attention.v_proj.weight",
        {"i": 0, "part": 2, "kind": 0},
    ),
    ("language_model.{,model.}lm_head.weight", "language_model.lm_head.weight", {"list0": 0}),
    ("language_model.{,model.}lm_head.weight", "language_model.model.lm_head.weight", {"list0": 1}),
    ("language_model.model.{rest*}", "language_model.model.layers.0.x", {"rest": "layers.0.x"}),
    # Hugging Face Llama, mixtures of experts
    ("model.layers.{i}.self_attn.{q,k,v}_proj.weight", "model.layers.61.self_attn.k_proj.weight", {"i": 61, "list0": 1}),
    (
        "model.layers.{i}.mlp.experts.{e}.{gate,up,down}_proj.weight",
        "model.layers.3.mlp.experts.255.down_proj.weight",
        {"i": 3, "e": 255, "list0": 2},
    ),
    ("lm_head.weight", "lm_head.weight", {}),
    # Meta
    (META, "consolidated.00.pth/layers.7.attention.wq.weight", {"r": 0, "i": 7, "list0": 0}),
    (META, "consolidated.15.pth/layers.10.attention.wv.weight", {"r": 15, "i": 10, "list0": 2}),
    (META, "consolidated.100.pth/layers.0.attention.wk.weight", {"r": 100, "i": 0, "list0": 1}),
    ("{file*}/norm.weight", "consolidated.00.pth/norm.weight", {"file": "consolidated.00.pth"}),
    ("a.{x*}.weight", "a.b.c.weight", {"x": "b.c"}),
    ("a.{x*}.weight", "a....weight", {"x": ".."}),
    # SAT
    (
        SAT,
        "mp_rank_00_model_states.pt/transformer.layers.0.mlp.dense_h_to_4h.weight",
        {"r": 0, "i": 0, "gate": 0, "e": 0},
    ),
    (
        SAT,
        "mp_rank_07_model_states.pt/transformer.layers.31.mlp.dense_h_to_4h_gate_12.weight",
        {"r": 7, "i": 31, "gate": 1, "e": 12},
    ),
    ("x{e?.}", "x.5", {"e": 5}),
    ("x{e?}", "x5", {"e": 5}),
    # repeats, braces, ambiguity
    ("layers.{i}.x.{i}", "layers.12.x.12", {"i": 12}),
    ("{i}{i}", "1212", {"i": 12}),
    ("{p:a,b}.{p:a,b}", "b.b", {"p": 1}),
    ("x{e?_}.y{e?_}", "x_2.y_2", {"e": 2}),
    ("{{{i}}}.{{i}}", "{4}.{i}", {"i": 4}),
    ("{a,ab}{b,}", "ab", {"list0": 0, "list1": 0}),
    ("{tag:x:0,y:0}", "x:0", {"tag": 0}),
    ("{a,b:c}", "b:c", {"list0": 1}),
    ("{x*}", "a\nb", {"x": "a\nb"}),
    ("{i}", "9" * 18, {"i": 10**18 - 1}),
    # numbers with arithmetic are those that stand there
    ("l.{i+1}.w", "l.3.w", {"i": 3}),
    ("l.{i-n}.w", "l.0.w", {"i": 0}),
    ("l.{i=n-1}.w", "l.7.w", {"i": 7}),
    ("rank{r=*:02}", "rank05", {"r": 5}),
    ("rank{r//k:02}", "rank11", {"r": 11}),
    ("x{e+1?_}", "x_2", {"e": 2}),
]

MISSES = [
    ("lm_head.weight", "lm_head.weight2"),
    ("lm_head.weight", "lm_headxweight"),
    ("lm_head.weight", "lm_head.weight\n"),
    ("x.{i}", "x.01"),
    ("x.{i}", "x."),
    ("x.{i}", "x.-1"),
    ("x.{i}", "x.\u0663"),
    ("x.{i}", "x." + "9" * 19),
    ("x.{r:02}", "x.7"),
    ("x.{r:02}", "x.007"),
    ("x.{e?_}y", "x._0y"),
    ("x.{e?_}y", "x._01y"),
    ("x.{e?_}y", "x._y"),
    ("x.{q,k}", "x.v"),
    ("x.{n*}", "x."),
    ("{n*}.x", ".x"),
    ("{n*}.x", "x"),
    ("layers.{i}.x.{i}", "layers.1.x.2"),
    ("{p:a,b}.{p:a,b}", "a.b"),
]


@pytest.mark.parametrize(("text", "name", "values"), MATCHES)
def test_match_and_format(text: str, name: str, values: dict[str, int | str]) -> None:
    pattern = parse(text)
    assert pattern.match(name) == values
    assert list(values) == [capture.name for capture in pattern.captures]
    assert pattern.format({**values, "another": 1}) == name
    assert Matcher([pattern]).match(name) == [(0, values)]


@pytest.mark.parametrize(("text", "name"), MISSES)
def test_no_match(text: str, name: str) -> None:
    assert parse(text).match(name) is None
    assert Matcher([parse(text)]).match(name) == []


def test_captures() -> None:
    assert parse("{a,b}{i}{p:,_x}{c,d}{r:03}{i}{n*}{e?_}").captures == (
        Capture("list0", "list", ("a", "b")),
        Capture("i", "int"),
        Capture("p", "list", ("", "_x")),
        Capture("list1", "list", ("c", "d")),
        Capture("r", "int", width=3),
        Capture("n", "rest"),
        Capture("e", "int", prefix="_"),
    )
    assert parse("{i+n}{r//k:02}{j=a * (b + 1)}{m=*}").captures == (
        Capture("i", "int", operator="+", operand="n"),
        Capture("r", "int", width=2, operator="//", operand="k"),
        Capture("j", "int", operator="=", operand="a * (b + 1)"),
        Capture("m", "int", operator="=", operand="*"),
    )


def test_patterns_are_values() -> None:
    pattern = parse("a.{i}")
    assert pattern == parse("a.{i}")
    assert hash(pattern) == hash(parse("a.{i}"))
    assert pattern != parse("a.{j}")
    assert pickle.loads(pickle.dumps(pattern)) == copy.deepcopy(pattern) == pattern
    assert pickle.loads(pickle.dumps(pattern)).match("a.3") == {"i": 3}


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("", 0, "empty"),
        ("ab{i", 2, "not closed"),
        ("ab{i.{j}", 2, "not closed"),
        ("{a,{b}}", 0, "not closed"),
        ("{", 0, "not closed"),
        ("ab}c", 2, "without"),
        ("{i}}", 3, "without"),
        ("{{i}", 3, "without"),
        ("a{}", 2, "missing"),
        ("a{*}", 2, "missing"),
        ("a{?_}", 2, "missing"),
        ("a{:02}", 2, "missing"),
        ("a{:x,y}", 2, "missing"),
        ("a{1i}", 2, "no identifier"),
        ("a{i j}", 2, "no identifier"),
        ("a{\u00e9}", 2, "no identifier"),
        ("a{i-j:q,k}", 2, "no identifier"),
        ("a{i\n}", 2, "no identifier"),
        ("a{list0}", 2, "kept for lists"),
        ("a{list12:a,b}", 2, "kept for lists"),
        ("a{r:2}", 2, "expected"),
        ("a{r:00}", 2, "expected"),
        ("a{r:018}", 2, "expected"),
        ("a{r:}", 2, "expected"),
        ("a{n*x}", 2, "expected"),
        ("{a*}{b*}", 4, "second"),
        ("{a*}.{a*}", 5, "second"),
        ("{,}", 2, "empty list"),
        ("{p:,}", 4, "empty list"),
        ("x{q,k,q}", 6, "second time"),
        ("x{p:q,k,k,v}", 8, "second time"),
        ("x{,a,}", 5, "second time"),
        ("{i}.{i:02}", 4, "differently"),
        ("{i}.{i?_}", 4, "differently"),
        ("{i}.{i:a,b}", 4, "differently"),
        ("{p:a,b}{p:b,a}", 7, "differently"),
        ("{i}.{i*}", 4, "differently"),
        ("{i}.{i+1}", 4, "differently"),
        ("a{i+}", 2, "expected"),
        ("a{i*2}", 2, "expected"),
        ("a{i+(n}", 4, "not an expression"),
        ("a{r//a b}", 5, "no name and no number"),
        ("a{i+1:q,k}", 2, "no identifier"),
    ],
)
def test_errors_point_at_the_character(text: str, position: int, words: str) -> None:
    with pytest.raises(NotationError, match=words) as caught:
        parse(text)
    assert (caught.value.text, caught.value.position) == (text, position)


@pytest.mark.parametrize(
    ("text", "values", "words"),
    [
        ("a.{i}.{q,k}", {"i": 0}, "list0"),
        ("a.{i}", {}, "given: none"),
        ("a.{i}", {"i": -1}, "whole number"),
        ("a.{i}", {"i": 10**18}, "whole number"),
        ("a.{i}", {"i": "1"}, "whole number"),
        ("a.{q,k}", {"list0": 2}, "from 0 to 1"),
        ("a.{q,k}", {"list0": "q"}, "from 0 to 1"),
        ("a.{n*}", {"n": ""}, "not empty"),
        ("a.{n*}", {"n": 3}, "not empty"),
    ],
)
def test_format_refuses(text: str, values: dict[str, int | str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse(text).format(values)


# -------------------------------------------------------------------------------------------------------------- properties

LITERALS = st.text("ab01._/", min_size=1, max_size=4)
LISTS = st.lists(st.text("ab01._", max_size=3), min_size=2, max_size=3, unique=True)


@st.composite
def patterns(draw: st.DrawFn, *, repeats: bool = True) -> Pattern:
    pieces: list[str] = []
    names = iter("cdefgh")
    rest = draw(st.booleans())
    for kind in draw(
        st.lists(st.sampled_from(["text", "text", "int", "wide", "optional", "list", "rest", "again"]), min_size=1, max_size=6)
    ):
        if kind == "int":
            pieces.append(f"{{{next(names)}}}")
        elif kind == "wide":
            pieces.append(f"{{{next(names)}:0{draw(st.integers(1, 3))}}}")
        elif kind == "optional":
            pieces.append(f"{{{next(names)}?{draw(st.sampled_from(['_', '.', '', 'a1']))}}}")
        elif kind == "list":
            pieces.append(f"{{{next(names)}:{','.join(draw(LISTS))}}}")
        elif kind == "rest" and rest:
            pieces.append("{n*}")
            rest = False
        elif kind == "again" and repeats and (earlier := [piece for piece in pieces if piece[0] == "{" and piece != "{n*}"]):
            pieces.append(draw(st.sampled_from(earlier)))
        else:
            pieces.append(draw(LITERALS))
    return parse("".join(pieces))


def names_of(pattern: Pattern) -> st.SearchStrategy[str]:
    numbers = st.one_of(st.integers(0, 12), st.integers(0, 1200))
    values = {
        capture.name: st.integers(0, len(capture.alternatives) - 1)
        if capture.kind == "list"
        else st.text("ab01._/", min_size=1, max_size=5)
        if capture.kind == "rest"
        else numbers
        for capture in pattern.captures
    }
    return st.fixed_dictionaries(values).map(pattern.format)


ANY_NAME = st.text("ab01._/", max_size=10)


def slow(some: list[Pattern], name: str) -> list[tuple[int, dict[str, int | str]]]:
    return [(k, values) for k, pattern in enumerate(some) if (values := pattern.match(name)) is not None]


@given(st.data())
@settings(deadline=None)
def test_what_format_writes_match_reads_and_format_writes_again(data: st.DataObject) -> None:
    pattern = data.draw(patterns())
    name = data.draw(names_of(pattern))
    values = pattern.match(name)
    assert values is not None
    assert pattern.format(values) == name


@given(patterns(), ANY_NAME)
@settings(deadline=None)
def test_every_match_can_be_written_back(pattern: Pattern, name: str) -> None:
    values = pattern.match(name)
    if values is not None:
        assert pattern.format(values) == name


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_matcher_equals_asking_every_pattern(data: st.DataObject) -> None:
    some = data.draw(st.lists(patterns(), min_size=1, max_size=8))
    matcher = Matcher(some)
    for name in data.draw(st.lists(st.one_of(ANY_NAME, *map(names_of, some)), min_size=1, max_size=8)):
        assert matcher.match(name) == matcher.match(name) == slow(some, name)


def test_matcher_of_nothing() -> None:
    assert Matcher([]).match("a.b") == []
    assert Matcher([parse("a")]).match("") == []


def test_matcher_gives_patterns_in_order() -> None:
    some = [parse(text) for text in ["{x*}", "a.{i}", "b.{i}", "a.1", "a.{i}", "{y*}.1"]]
    assert [k for k, _ in Matcher(some).match("a.1")] == [0, 1, 3, 4, 5]


@given(patterns(), patterns())
@settings(max_examples=200, deadline=None)
@example(parse("{i}.{i}"), parse("{j}.1{k}"))
def test_an_overlap_is_a_name_of_both(a: Pattern, b: Pattern) -> None:
    name = overlap(a, b)
    if name is not None:
        assert a.match(name) is not None
        assert b.match(name) is not None


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_overlap_is_missed_without_repeats(data: st.DataObject) -> None:
    a, b = data.draw(patterns(repeats=False)), data.draw(patterns(repeats=False))
    if any(b.match(name) is not None for name in data.draw(st.lists(names_of(a), min_size=1, max_size=5))):
        assert overlap(a, b) is not None
    assert (overlap(a, b) is None) == (overlap(b, a) is None)
    assert overlap(a, a) is not None


SMALL = [
    "a",
    "{i}",
    "a{i}",
    "{i}a",
    "{i}{j}",
    "{r:02}",
    "{r:02}a",
    "a{e?_}",
    "{e?_}",
    "{e?}a",
    "{n*}",
    "a{n*}",
    "{n*}a",
    "_{n*}1",
    "{a,_1}",
    "{,a}{i}",
]
SMALL += ["{,a}1{,a}", "{i}_{i}", "{i}{i}", "{p:a,1}_{p:a,1}", "10", "1_1", "a_1", "{p:,a}{p:,a}1", "{i}_1{j}"]


def test_overlap_is_what_trying_all_short_names_finds() -> None:
    every = ["".join(chars) for size in range(6) for chars in itertools.product("a01_", repeat=size)]
    matching = {text: {name for name in every if parse(text).match(name) is not None} for text in SMALL}
    for one, two in itertools.product(SMALL, repeat=2):
        found = overlap(parse(one), parse(two))
        common = matching[one] & matching[two]
        assert (found is not None) == bool(common), (one, two, found, sorted(common)[:3])


@pytest.mark.parametrize(
    ("one", "two", "name"),
    [
        ("model.layers.{i}.{x*}", "model.layers.{j}.mlp.weight", "model.layers.0.mlp.weight"),
        ("model.layers.{i}.w{q,k}.weight", "model.layers.{j}.w{v,k}.weight", "model.layers.0.wk.weight"),
        ("a.{q,k}.weight", "a.{v,o}.weight", None),
        ("x{e?_}.weight", "x_{i}.weight", "x_1.weight"),
        ("x.{r:02}", "x.{i}", "x.10"),
        ("{{i}}", "{{{i}}}", None),
        ("{i}.{i}", "1.2", None),
    ],
)
def test_overlap_examples(one: str, two: str, name: str | None) -> None:
    assert overlap(parse(one), parse(two)) == name


# ------------------------------------------------------------------------------------------------------------------- scale


def big_checkpoint() -> list[str]:
    """The names of a checkpoint of 61 layers of 256 experts, with block scales."""
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for i in range(61):
        layer = f"model.layers.{i}"
        names += [f"{layer}.self_attn.{part}.weight" for part in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")]
        names += [f"{layer}.{part}.weight" for part in ("input_layernorm", "post_attention_layernorm", "mlp.gate")]
        for e in range(256):
            names += [
                f"{layer}.mlp.experts.{e}.{part}_proj.{kind}" for part in ("gate", "up", "down") for kind in ("weight", "weight_scale_inv")
            ]
    return names


def many_patterns() -> list[Pattern]:
    texts = [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.{i}.mlp.experts.{e}.{gate,up,down}_proj.weight",
        "model.layers.{i}.mlp.experts.{e}.{gate,up,down}_proj.weight_scale_inv",
        "model.layers.{i}.self_attn.{q_a,q_b,kv_b,o}_proj.weight",
        "model.layers.{i}.self_attn.{x*}_with_mqa.weight",
        "{x*}layernorm.weight",
        "model.layers.{i}.mlp.gate.weight",
    ]
    texts += [f"model.layers.{i}.mlp.experts.{{e}}.other{i}_{{a,b}}.weight" for i in range(97)]
    texts += [f"model.layers.{{i}}.mlp.experts.{{e}}.{{gate,up}}_proj{k}.{{rest*}}" for k in range(97)]
    texts += [f"{{rest*}}.w{k}.{{weight,bias}}" for k in range(97)]
    return [parse(text) for text in texts]


def test_matcher_asks_few_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0
    match = Pattern.match

    def counted(self: Pattern, name: str) -> dict[str, int | str] | None:
        nonlocal asked
        asked += 1
        return match(self, name)

    names, some = big_checkpoint(), many_patterns()
    assert len(names) > 91_000
    assert len(some) == 300
    monkeypatch.setattr(Pattern, "match", counted)
    matcher = Matcher(some)
    found = [matcher.match(name) for name in names]
    assert asked == sum(map(len, found)) == len(names)
    assert all(len(matches) == 1 for matches in found)
    for at in range(0, len(names), 5003):
        assert found[at] == slow(some, names[at])


@given(st.lists(st.text(max_size=8), max_size=10))
@settings(deadline=None)
def test_natural_order_is_total(names: list[str]) -> None:
    backwards = names[::-1]
    assert sorted(names, key=natural_key) == sorted(backwards, key=natural_key)


def test_natural_order() -> None:
    ordered = ["", "a", "a.b", "x.2", "x.2.y", "x.02.z", "x.10", "x.10.a", "x.1" + "0" * 5000, "x.y"]
    backwards = ordered[::-1]
    assert sorted(backwards, key=natural_key) == ordered
    assert natural_key("x.1") != natural_key("x.01")


def test_nearest() -> None:
    names = big_checkpoint()
    assert nearest("model.layers.7.mlp.experts.31.gate_porj.weight", names) == ["model.layers.7.mlp.experts.31.gate_proj.weight"]
    assert nearest("model.embed_token.weight", names) == ["model.embed_tokens.weight"]
    assert nearest("lm_head_weight", names) == ["lm_head.weight"]
    assert nearest("zzz", names) == []
    assert nearest("a", []) == []
    assert len(nearest("model.layers.7.mlp.experts.31.gate_proj", names, 3)) == 3
    assert nearest("a.b", ["a.b"]) == ["a.b"]


def test_nearest_compares_few(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def compared(name: str, few: list[str], n: int, cutoff: float) -> list[str]:
        sizes.append(len(few))
        return []

    monkeypatch.setattr("difflib.get_close_matches", compared)
    nearest("model.layers.7.x", big_checkpoint())
    nearest("word", ["".join(letters) for letters in itertools.product("abcdefghij", repeat=4)])
    nearest("a" * 10_000, ["a" * 9_999] * 1000)
    assert max(sizes) <= 32 * 4
    assert sizes[2] == 0
