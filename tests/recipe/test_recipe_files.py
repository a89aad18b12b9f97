"""Recipe files: what is wrong with one is said with its line and column; Python files; the schema that editors complete them by."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from checkpoint_files import assert_same, numbered, read, refusal, run, write

from streamconv import recipes
from streamconv.errors import RecipeError, UsageError
from streamconv.recipe import Drop, Recipe, Rule
from tools.make_schema import SCHEMA, schema

GOOD = """\
name: a2b
dims: {h: num_heads}
options:
  bias: {default: false}
rules:
  - rule: "a.{i}"
    right: "b.{i}"
    layout: "(h d) c -> h d c"
  - drop: "c"
    reason: not needed
right:
  format: torch
"""


@pytest.mark.parametrize(
    ("old", "new", "line", "column", "part"),
    [
        ("reason: not needed", "reasons: not needed", 10, 5, "unknown field 'reasons'"),
        ("    reason: not needed", "    optional: 3\n    reason: r", 10, 5, "optional must be true or false or text"),
        ("    reason: not needed\n", "", 9, 5, "missing reason"),
        ('- drop: "c"', '- drip: "c"', 9, 5, "expected one of rule, drop, make, tie"),
        ('right: "b.{i}"', 'right: "b.{i"', 7, 15, "'{' is not closed"),
        ('"a.{i}"', "a.{i", 6, 13, "'{' is not closed"),
        ("(h d) c -> h d c", "(h d) c -> h d ) c", 8, 29, "at character"),
        ("(h d) c -> h d c", "(h d) c -> h d", 8, 20, "is on one side only"),
        ("default: false", "default: [1]", 4, 10, "default must be true or false or a whole number or text"),
        ("default: false", "defaults: 1", 4, 10, "unknown field 'defaults'"),
        ("num_heads", '"1 +"', 2, 12, "not an expression"),
        ("format: torch", "formats: torch", 12, 3, "unknown field 'formats'"),
        ("name: a2b", "names: a2b", 1, 1, "unknown field 'names'"),
        ("  - drop", "   - drop", 9, 4, "cannot be parsed"),
        ("    reason", "    drop: d\n    reason", 10, 5, "'drop' a second time"),
        ("right:\n  format: torch\n", "then:\n  name: x\n  rules:\n  - {rule: 'a', right: 'b{'}\n", 14, 26, "'{' is not closed"),
        ("rules:\n", "rules: 3\nother:\n", 5, 1, "'rules' must be a list"),
    ],
)
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_what_is_wrong_is_pointed_at(old, new, line, column, part, suffix, tmp_path, capsys):
    assert old in GOOD
    text = GOOD.replace(old, new, 1)
    file = tmp_path / f"mine.{suffix}"
    if suffix == "yaml":
        file.write_text(text)
    else:
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError:
            pytest.skip("is no JSON to begin with")
        file.write_text(json.dumps(data, indent="\t"))
    if suffix == "json" and "second time" in part:
        file.write_text('{\n\t"drop": "x",\n\t"drop": "y"}')
    with pytest.raises(RecipeError) as caught:
        recipes.get(str(file))
    where, _, said = str(caught.value).removeprefix(f"{file}:").partition(": ")
    assert part in said
    found = tuple(map(int, where.split(":")))
    if suffix == "yaml":
        assert found == (line, column), str(caught.value)
    else:  # the character pointed at is the one of that key or notation there
        row = file.read_text().splitlines()[found[0] - 1]
        pointed = GOOD.replace(old, new, 1).splitlines()[line - 1][column - 1 :]
        assert re.match(r"\w*", row[found[1] - 1 :].lstrip('"'))[0] in pointed
    assert f"{file}:{where}: " in refusal(capsys, "recipes", file)


def test_good_files_are_the_same_in_both_notations(tmp_path):
    (tmp_path / "a.yaml").write_text(GOOD)
    (tmp_path / "a.json").write_text(json.dumps(yaml.safe_load(GOOD), indent="\t"))
    assert recipes.get(str(tmp_path / "a.yaml")) == recipes.get(str(tmp_path / "a.json"))


# Python files --------------------------------------------------------------------------------------------------------

PYTHON = """\
from streamconv import Recipe, Rule

THERE = Recipe("there", "", (Rule("a.{i}", "b.{i}", "x y -> y x"),))
RECIPES = (THERE, THERE.inverse("back"))
"""


def test_a_python_file_there_and_back(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(PYTHON)
    tensors = numbered({"a.0": (2, 3), "a.1": (4, 5)})
    src = write(tmp_path / "src", tensors)
    assert run("convert", src, tmp_path / "dst", "--recipe", f"{file}:there") == 0
    assert run("convert", tmp_path / "dst", tmp_path / "again", "--recipe", f"{file}:back") == 0
    assert_same(read(tmp_path / "dst"), {name.replace("a", "b"): tensor.t() for name, tensor in tensors.items()})
    assert_same(read(tmp_path / "again"), tensors)
    assert f"{file}:there, {file}:back" in refusal(capsys, "recipes", file)
    file.write_text(PYTHON.replace("RECIPES = (THERE", "RECIPE, OTHERS = THERE, (THERE"))
    assert recipes.get(str(file)).name == "there"


def test_a_file_is_a_way_back_too(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(
        "rules:\n  - rule: 'a.{i}.{q,k,v}'\n    right: 'b.{i}'\n    layout: 'q c, q c, q c -> (q + q + q) c'\n"
    )
    source = write(tmp_path / "src", numbered({f"a.{i}.{part}": (4, 3) for i in range(2) for part in "qkv"}))
    there, again = tmp_path / "there", tmp_path / "again"
    assert run("convert", source, there, "--recipe", tmp_path / "mine.yaml") == 0
    assert run("convert", there, again, "--recipe", f"{tmp_path / 'mine.yaml'}:inverse", "--report", tmp_path / "page.html") == 0
    assert_same(read(again), read(source))
    assert run("verify", there, source, "--recipe", f"{tmp_path / 'mine.yaml'}:inverse") == 0
    capsys.readouterr()
    assert run("recipes", f"{tmp_path / 'mine.yaml'}:inverse") == 0
    assert capsys.readouterr().out.startswith("mine:inverse")
    assert "unknown recipe 'nothing'" in refusal(capsys, "plan", source, tmp_path / "x", "--recipe", "nothing:inverse")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("x = 1\nimport nothing_of_this_name\n", "mine.py:2: ModuleNotFoundError"),
        ("x = 1\ny = (\n", "mine.py:2: SyntaxError"),
        ("def f():\n    return 1 / 0\n\nf()\n", "mine.py:2: ZeroDivisionError"),
        ("x = 1\n", "found no recipe"),
        ("RECIPES = ()\n", "found no recipe"),
        ("RECIPE = {'name': 'x'}\n", "found no recipe"),
    ],
)
def test_python_files_that_are_none(text, part, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(text)
    assert part in refusal(capsys, "recipes", tmp_path / "mine.py")


def test_python_files_are_run_only_when_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("raise SystemError('was run')")
    with pytest.raises(UsageError, match="unknown recipe"):
        recipes.get("mine")
    with pytest.raises(UsageError, match="No such file"):
        recipes.get("other.py")


# The schema ----------------------------------------------------------------------------------------------------------


def test_the_schema_in_the_package_is_that_of_the_code():
    assert json.loads(SCHEMA.read_text()) == schema(), "run: python -m tools.make_schema"


def test_the_schema_takes_every_recipe_of_the_package():
    jsonschema.Draft202012Validator.check_schema(schema())
    judge = jsonschema.Draft202012Validator(schema())
    for recipe in recipes.registry().values():
        data = json.loads(json.dumps(recipe.to_dict()))
        if type(recipe) is Recipe and all(type(stage) is Recipe for stage in recipe.stages):  # others ask a library, no file can
            judge.validate(data)
            assert Recipe.from_dict(data).to_dict() == data
    judge.validate(yaml.safe_load(GOOD))


@pytest.mark.parametrize(
    ("old", "new"),
    [("reason:", "reasons:"), ("- drop", "- drip"), ("default: false", "default: [1]"), ("format: torch", "formats: torch"),
     ("num_heads", "[1]"), ("reason: not needed", "right: x"), ("rules:", "ruls:")],
)  # fmt: skip
def test_the_schema_refuses_what_the_reader_refuses(old, new, tmp_path):
    data = yaml.safe_load(GOOD.replace(old, new, 1))
    assert not jsonschema.Draft202012Validator(schema()).is_valid(data)
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(RecipeError):
        recipes.get(str(tmp_path / "bad.json"))


def test_the_schema_explains_the_fields():
    facts = schema()["$defs"]
    assert "dtype of the right side" in facts["rule"]["properties"]["cast"]["description"]
    assert "become the right ones" in facts["rule"]["properties"]["layout"]["description"]
    assert {"rule", "right"} == set(facts["rule"]["required"])
    assert {"drop", "reason"} == set(facts["drop"]["required"])


def test_a_file_is_what_the_recipe_says_of_itself(tmp_path):
    recipe = Recipe("a", "b", (Rule("x.{i}", "y.{i}", dims={"h": 2}), Drop("z", "old")))
    (tmp_path / "a.json").write_text(json.dumps(recipe.to_dict()))
    assert recipes.get(str(tmp_path / "a.json")) == recipe
