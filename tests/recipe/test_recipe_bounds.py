"""Recipe files and options of absurd size or kind: one line, exit code 2, and soon."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streamconv import Recipe, RecipeError, Rule
from streamconv.cli.command import main
from streamconv.units import parse_size

RULE = "rules:\n- {rule: '{rest*}', right: '{rest*}'}\n"


def grown(first: str, each: str) -> str:
    """Ten lines, each of which says the one before nine times."""
    lines = [f"a: &a {first}"]
    for before, name in zip("abcdefghi", "bcdefghij", strict=True):
        lines.append(f"{name}: &{name} {each.replace('*', f'*{before}')}")
    return "\n".join(lines)


def many(text: str, count: int) -> str:
    return ", ".join(text.format(k) for k in range(count))


FILES = {
    "aliases of lists": (grown("[x]", f"[{many('*', 9)}]"), "items, those of aliases counted"),
    "aliases of mappings": (grown("{x: y}", f"{{{many('k{}: *', 9)}}}"), "items, those of aliases counted"),
    "merged aliases": (f"a: &a {{p: 1}}\nb: &b {{<<: [{many('*a', 9000)}]}}\nc: {{<<: [{many('*b', 20)}]}}", "those of aliases counted"),
    "an alias of itself": ("rules: &a\n- *a", "2:3: *a lies in itself"),
    "nested lists": ("[" * 100_000, "nest"),
    "nested mappings": ("\n".join(" " * k + "a:" for k in range(200)), "33:33: nested more than 32 deep"),
    "nested stages": (RULE + "then: " + "{then: " * 100 + "{}" + "}" * 100, "nested more than 32 deep"),
    "rules": (f"rules: [{many('{{rule: a{}, right: b}}', 5000)}]", "1 to 4096 rules"),
    "choices": (RULE + f"options: {{a: {{choices: [{many('c{}', 5000)}]}}}}", "choices must be a list of length <= 4096"),
    "options": (RULE + f"options: {{{many('c{}: {{}}', 5000)}}}", "5000 options, 4096 at most"),
    "dims": (RULE + f"dims: {{{many('c{}: 1', 5000)}}}", "dims must be a mapping of length <= 4096"),
    "captures": (f"rules: [{{rule: '{'.'.join(f'{{a{k}}}' for k in range(300))}', right: b}}]", "at most 32 captures"),
    "a long pattern": (f"rules: [{{rule: {'a' * 300_000}, right: b}}]", "a pattern of 300000 characters, 8192 at most"),
    "a long layout": (f"rules: [{{rule: a, right: b, layout: '{'a ' * 5000} -> a'}}]", "a layout of"),
    "axes": (f"rules: [{{rule: a, right: b, layout: '{' '.join(f'a{k}' for k in range(500))} -> a'}}]", "more than 100 axes"),
    "a long expression": (RULE + f"dims: {{a: '{'1+' * 3000}1'}}", "an expression of 6001 characters, 4096 at most"),
    "a nested expression": (RULE + f"dims: {{a: '{'(' * 2000}1{')' * 2000}'}}", "not an expression"),
    "signs": (RULE + f"dims: {{a: '{'-' * 4000}1'}}", "not an expression"),
    "shards": (RULE + "right: {stem: 'x{n}', shards: 1000000000000}", "shards must be a whole number <= 100000"),
    "digits": (RULE + f"dims: {{a: 1{'0' * 5000}}}", "cannot be parsed"),
    "a large number": (RULE + f"dims: {{a: 1{'0' * 400}}}", "dims must hold a whole number <= 9223372036854775807"),
    "no number": (RULE + "dims: {a: .nan}", "dims must hold a whole number or text or a mapping"),
    "a fraction": (RULE + "dims: {a: 1.5}", "dims must hold a whole number or text or a mapping"),
    "no size": (RULE + "dims: {a: null}", "dims must hold a whole number or text or a mapping"),
    "too many made": (
        RULE + "- {make: 'x.{i}', reason: r, op: {op: zeros, size: 4}, dims: {i: 1000000000000}}",
        "tensors, which no model has",
    ),
    "too many copies": (
        "rules: [{rule: 'w{r//k}', right: w, layout: 'r a b -> r a b', dims: {k: 1000000000000}}, {drop: 'm{x*}', reason: r}]",
        "1000000000000 copies of r",
    ),
    "null": ("null", "expected a mapping, found NoneType"),
    "nothing": ("", "expected a mapping, found NoneType"),
    "a list": ("[]", "expected a mapping, found list"),
    "a set": ("!!set {a, b}", "expected a mapping, found set"),
    "a date": (RULE + "summary: 2001-01-01", "summary must be text"),
    "code": ("!!python/object/apply:os.system [ls]", "cannot be parsed"),
    "controls": ("\x00\x01", "cannot be parsed"),
    "keys": ("? [a, b]\n: c", "unhashable key"),
    "a key twice": (RULE + RULE, "'rules' a second time"),
    "two documents": (RULE + "---\n" + RULE, "cannot be parsed"),
    "a misspelt parameter": ("rules: [{rule: w, right: b, op: {op: pad, row: 3}}]", "op pad has no 'row'; did you mean rows?"),
    "a misspelt step": ("rules: [{rule: w, right: b, op: {op: pda, rows: 3}}]", "op 'pda' is unknown; did you mean pad?"),
    "no step": ("rules: [{rule: w, right: b, op: {rows: 3}}]", "op None is unknown"),
    "too few parameters": ("rules: [{rule: w, right: b, op: {op: grow, rows: 3}}]", "op grow needs first, seed, stream"),
    "a way back misspelt": ("rules: [{rule: w, right: b, op: {op: pad, rows: 3}, undo: {op: rows, stops: 3}}]", "op rows has no 'stops'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model.safetensors"
    save_file({"w0": torch.ones(4, 8), "model.embed_tokens.weight": torch.ones(4, 8)}, path, {"format": "pt"})
    return path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["plan", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    return line


@pytest.mark.parametrize(("text", "said"), FILES.values(), ids=FILES)
def test_a_recipe_file_is_bounded(text, said, source, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(text)
    line = refusal(capsys, source, tmp_path / "out", "--recipe", tmp_path / "mine.yaml")
    assert said in line
    assert len(line) < 4000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"rules": [{"rule": "a", "right": NaN}]}', "right must be text, found nan"),
        ('{"rules": [{"rule": "a"', "cannot be parsed"),
        ('{"rules": [], "rules": []}', "'rules' a second time"),
        ("[" * 100_000, "nest"),
        ('{"rules": null}', "1 to 4096 rules"),
    ],
)
def test_a_json_file_is_bounded(text, said, source, tmp_path, capsys):
    (tmp_path / "mine.json").write_text(text)
    assert said in refusal(capsys, source, tmp_path / "out", "--recipe", tmp_path / "mine.json")


def test_what_is_no_file_is_no_recipe(source, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "device.py").symlink_to("/dev/zero")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    for name in ("pipe.yaml", "folder.json", "device.py", "bytes.yaml", "absent.yaml", "\0.yaml"):
        assert "recipe file" in (line := refusal(capsys, source, tmp_path / "out", "--recipe", tmp_path / name)) or "not UTF-8" in line


def test_parameters_of_a_step_are_looked_at_when_a_recipe_is_made():
    with pytest.raises(RecipeError, match="op zeros has no 'typ'"):
        Recipe("mine", "", (Rule("a", "b", op={"op": "zeros", "size": 3, "typ": "float32"}),))


@pytest.mark.parametrize(
    "text",
    ["1e30", "-1", "0", "1" * 40, "1" * 5000, "9" * 18 + ".5TB", "1e9GB", "\u0663GB", "", "nan", "inf", "GB", "1 GB 2", 0, -5, 10**400],
)
def test_no_size_is_absurd(text):
    with pytest.raises(Exception, match="not a size") as caught:
        parse_size(text)
    assert len(str(caught.value)) < 300
    assert parse_size("999999999GB") == 999_999_999 * 10**9


@pytest.mark.parametrize(
    "option",
    ["--max-memory=1e30", "--max-shard-size=-1", f"--max-memory={'1' * 5000}", "-j=0", "--workers=5000", f"--workers={'9' * 30}",
     f"--workers={'9' * 5000}", "--workers=1e3", "--workers=", "--set=resize_vocab=--5", "--set=resize_vocab=-5",
     "--set=resize_vocab=\u00b2",
     f"--set=resize_vocab={'9' * 18}", f"--set=resize_vocab={'9' * 5000}", "--set=resize_vocab=300000", "--set=resize_vocab=1e3",
     "--set=resize_vocab=", "--set=resize_vocab=nan", "--set=seed=--1", f"--set=seed={'9' * 30}"],
)  # fmt: skip
def test_no_option_is_absurd(option, source, tmp_path, capsys):
    refusal(capsys, source, tmp_path / "out", option)
    assert not (tmp_path / "out").exists()
