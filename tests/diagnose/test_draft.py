"""Drafts of recipes: what they match, what they say they guessed, and that they convert."""

from __future__ import annotations

import json

import pytest
import yaml
from checkpoint_files import assert_same, numbered, read, refusal, run, write
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import fused

from streamconv.diagnose.draft import SCHEMA, draft, fold, read_shapes
from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import CoverageError
from streamconv.formats import Source
from streamconv.notation.names import parse
from streamconv.recipe import Recipe

DIM, KEYS, WIDE, VOCAB, LAYERS = 32, 16, 48, 64, 3


def hf() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCAB, DIM))
    shapes |= {"model.norm.weight": (DIM,)}
    for i in range(LAYERS):
        stem = f"model.layers.{i}"
        shapes |= {f"{stem}.self_attn.{name}_proj.weight": (rows, DIM) for name, rows in zip("qkvo", (DIM, KEYS, KEYS, DIM), strict=True)}
        shapes |= {f"{stem}.mlp.{name}_proj.weight": (WIDE, DIM) for name in ("gate", "up")} | {f"{stem}.mlp.down_proj.weight": (DIM, WIDE)}
        shapes |= {f"{stem}.{name}_layernorm.weight": (DIM,) for name in ("input", "post_attention")}
    return shapes


META = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers.": "layers.",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def meta_name(name: str) -> str:
    for own, other in META.items():
        name = name.replace(own, other)
    return name


def save(path, text):
    path.write_text(text)
    return path


def guessed_rows(text: str) -> dict[int, str]:
    rows = enumerate(text.splitlines(), 1)
    return {number: row.partition("# guessed: ")[2] for number, row in rows if "# guessed: " in row}


def test_the_toy_of_the_readme(toy, tmp_path, capsys):
    wanted = fused(toy)
    (tmp_path / "names.json").write_text(json.dumps({name: list(tensor.shape) for name, tensor in wanted.items()}))
    assert run("recipes", "--new", "toy", "names.json") == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"# yaml-language-server: $schema={SCHEMA}\n")
    assert err.startswith("7 rules, 7 of them guessed\n")
    assert [f"  line {number}: {why}" for number, why in guessed_rows(out).items()] == err.splitlines()[1:]
    save(tmp_path / "mine.yaml", out)
    assert run("convert", "toy", "made", "--recipe", "mine.yaml", "--verify") == 0
    assert_same(read(tmp_path / "made"), wanted)


def test_the_toy_back(toy, tmp_path, capsys):
    write(tmp_path / "there", fused(toy))
    assert run("recipes", "--new", "there", "toy") == 0
    out, err = capsys.readouterr()
    assert "nothing takes lm_head.weight" in err
    assert "nothing makes blocks.{i}.attn.inv_freq" in err
    assert '  # - drop: "lm_head.weight"\n' in out
    save(tmp_path / "mine.yaml", out)
    assert "lm_head.weight" in refusal(capsys, "convert", "there", "back", "--recipe", "mine.yaml")
    lines = out.splitlines()
    at = lines.index('  # - drop: "lm_head.weight"')
    lines[at : at + 2] = [line.replace("# ", "", 1) for line in lines[at : at + 2]]
    save(tmp_path / "mine.yaml", "\n".join(lines))
    assert run("convert", "there", "back", "--recipe", "mine.yaml", "--quiet") == 0
    assert_same(read(tmp_path / "back"), {name: tensor for name, tensor in toy.items() if "inv_freq" not in name})


@pytest.mark.parametrize("there", [True, False])
def test_llama_by_two_names(there, tmp_path, capsys):
    one, other = numbered(hf()), {meta_name(name): tensor for name, tensor in numbered(hf()).items()}
    source, wanted = (one, other) if there else (other, one)
    write(tmp_path / "src", source, shards=2)
    write(tmp_path / "like", wanted)
    assert run("recipes", "--new", tmp_path / "src", tmp_path / "like", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["unmade"], told["unused"]) == ([], [])
    assert told["rules"] == 12
    assert {row["line"]: row["why"] for row in told["guesses"]} == guessed_rows(told["recipe"])
    save(tmp_path / "mine.yaml", told["recipe"])
    assert run("convert", tmp_path / "src", tmp_path / "dst", "--recipe", tmp_path / "mine.yaml", "--quiet") == 0
    assert_same(read(tmp_path / "dst"), wanted)


def made(source: dict[str, tuple[int, ...]], target: dict[str, tuple[int, ...]]) -> tuple[list[dict], list[str]]:
    found = draft(source, target, "x")
    assert Recipe.from_dict(yaml.safe_load(found.text)).name == "x"
    assert guessed_rows(found.text) == found.guesses
    return yaml.safe_load(found.text)["rules"], found.unmade


def test_experts_stacked_and_fused():
    source = {
        f"l.{i}.experts.{e}.{w}.weight": (6, 4) if w != "w2" else (4, 6) for i in range(2) for e in range(3) for w in ("w1", "w2", "w3")
    }
    target = dict.fromkeys((f"l.{i}.experts.gate_up_proj" for i in range(2)), (3, 12, 4)) | {
        f"l.{i}.experts.down_proj": (3, 4, 6) for i in range(2)
    }
    rules, unmade = made(source, target)
    assert not unmade
    layouts = {rule["right"]: (rule["rule"], rule["layout"]) for rule in rules}
    assert layouts["l.{i}.experts.gate_up_proj"] == ("l.{i}.experts.{j}.{w1,w3}.weight", "j a e, j b e -> j (a + b) e")
    assert layouts["l.{i}.experts.down_proj"] == ("l.{i}.experts.{j}.w2.weight", "j a e -> j a e")
    rules, unmade = made(target, source)
    assert {rule["layout"] for rule in rules} == {"j (a + b) e -> j a e, j b e", "j a e -> j a e"}
    assert not unmade


def test_transposes_and_axes_of_one():
    rules, _ = made({"fc.weight": (3, 5), "cls": (1, 1, 7)}, {"dense.kernel": (5, 3), "cls_token": (7,)})
    assert {rule["right"]: rule["layout"] for rule in rules} == {"dense.kernel": "a b -> b a", "cls_token": "1 1 a -> a"}


FUSED = {
    "experts": (
        {f"l.{i}.experts.{e}.{w}": (6, 4) if w != "w2" else (4, 6) for i in range(2) for e in range(3) for w in ("w1", "w2", "w3")},
        {f"l.{i}.{name}": shape for i in range(2) for name, shape in (("gate_up_proj", (3, 12, 4)), ("down_proj", (3, 4, 6)))},
    ),
    "qkv": (
        {f"h.{i}.attn.{p}.weight": (8 if p == "q" else 4, 8) for i in range(3) for p in "qkv"},
        {f"l.{i}.attn.qkv.weight": (16, 8) for i in range(3)},
    ),
    "stack": ({f"h.{i}.w": (3, 4) for i in range(5)}, {"w": (5, 4, 3)}),
    "moved": ({"fc.weight": (3, 5), "cls": (1, 1, 7)}, {"dense.kernel": (5, 3), "cls_token": (7,)}),
    "names": (hf(), {meta_name(name): shape for name, shape in hf().items()}),
}


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("kind", FUSED)
def test_drafts_lead_back(tmp_path, kind, there):
    source, target = FUSED[kind] if there else FUSED[kind][::-1]
    found = draft(source, target, "mine")
    assert not found.back
    save(tmp_path / "mine.yaml", found.text)
    src = write(tmp_path / "x", numbered(source))
    assert run("convert", src, tmp_path / "out", "--recipe", tmp_path / "mine.yaml", "--quiet") == 0
    assert run("convert", tmp_path / "out", tmp_path / "back", "--recipe", f"{tmp_path / 'mine.yaml'}:inverse", "--quiet") == 0
    assert_same(read(tmp_path / "back"), read(src))


def test_a_draft_says_why_it_does_not_lead_back():
    found = draft({"b.w": (3, 4)}, {"a.w": (3, 4), "a.more": (2,)}, "x")
    assert "a.more" in found.back
    assert "no way back" in found.account
    assert found.summary()["no_way_back"] == found.back


def test_what_cannot_be_drafted(tmp_path, capsys):
    with pytest.raises(CoverageError, match="no tensor of the one"):
        draft({"a": (3,)}, {"b": (5,)}, "x")
    write(tmp_path / "src", numbered({"a": (3,)}))
    for text in ("[", "[1]", '{"a": "b"}', '{"a": 3}', '{"tensors": [{}]}'):
        save(tmp_path / "names.json", text)
        assert "expected JSON of name -> shape" in refusal(capsys, "recipes", "--new", tmp_path / "src", tmp_path / "names.json")
    assert "cannot be read" in refusal(capsys, "recipes", "--new", tmp_path / "src", tmp_path / "none.json")


def test_names_of_inspect(tmp_path, capsys):
    src = write(tmp_path / "src", numbered({"a.0": (3,), "a.1": (3,)}))
    assert run("inspect", src, "--json") == 0
    save(tmp_path / "names.json", capsys.readouterr().out)
    assert read_shapes(str(tmp_path / "names.json")) == read_shapes(str(src)) == {"a.0": (3,), "a.1": (3,)}


def test_numbers_fold_where_shapes_agree():
    shapes = {f"layers.{i}.conv.{k}.weight": (k + 1,) for i in range(3) for k in (0, 2)}
    patterns = {series.pattern: series.shape for series in fold(shapes)}
    assert patterns == {"layers.{i}.conv.0.weight": (1,), "layers.{i}.conv.2.weight": (3,)}
    assert [series.texts for series in fold({"fc1.weight": (1,), "linear_2.w": (1,)})] == [("fc1.weight",), ("linear_2.w",)]


def test_numbers_that_are_not_everywhere_make_a_sparse_rule():
    source = {f"eyes.{i}.w": (2, 3) for i in range(2)} | {f"text.{i}.w": (4, 5) for i in range(4)} | {f"n.{i}.b": (6,) for i in (1, 2)}
    rules, _ = made(source, {f"m.{name}": shape for name, shape in source.items()})
    assert {rule["rule"]: rule.get("sparse", False) for rule in rules} == {"eyes.{i}.w": True, "n.{i}.b": True, "text.{i}.w": False}


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.text("ab.{}01/_", min_size=1, max_size=8), min_size=1, max_size=6, unique=True),
    sizes=st.lists(st.integers(1, 4), min_size=6, max_size=6),
)
def test_any_names_make_a_draft_of_themselves(names, sizes):
    """Whatever the names, the draft loads and makes every tensor from the one of its own name."""
    shapes = {name: (size, 2) for name, size in zip(names, sizes, strict=False)}
    rules, unmade = made(shapes, shapes)
    assert not unmade
    assert all(rule["rule"] == rule["right"] for rule in rules)
    recipe = Recipe.from_dict({"name": "x", "rules": rules})
    assert set(recipe.apply({name: Source(TensorSpec(DTYPES["float32"], shape), ()) for name, shape in shapes.items()}).outputs) == set(
        shapes
    )
    patterns = [parse(rule["rule"]) for rule in rules]
    assert all(sum(pattern.match(name) is not None for pattern in patterns) == 1 for name in shapes)
