"""The command line as a shell sees it: help with examples, completion, what is loaded for each command, which recipes fit."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from checkpoint_files import numbered, run, write, write_bin, write_ckpt
from seeded_defects import CONFIG, llama

import streamconv
from streamconv.advice import matching
from streamconv.advice.matching import rank_recipes, suggest_recipes
from streamconv.cli.parser import COMMANDS, build_parser
from streamconv.diagnose.doctor import examine
from streamconv.errors import CoverageError
from streamconv.library import bridge, parallel
from streamconv.recipes import registry

HEAVY = ("torch", "numpy", "transformers", "ml_dtypes", "yaml", "tqdm", "shtab")


def loaded(*commands: tuple[object, ...]) -> Iterator[tuple[str, set[str]]]:
    """Each command, and which of the heavy libraries are loaded after it; one after the other in a process of its own."""
    given = [[str(argument) for argument in command] for command in commands]
    code = f"""
import sys
from streamconv.cli.command import main
for given in {given!r}:
    try:
        code = main(given)
    except SystemExit as end:
        code = end.code
    print(repr((code or 0, [name for name in {HEAVY!r} if name in sys.modules])), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    found = [eval(line) for line in done.stderr.splitlines() if line.startswith("(")]
    assert [code for code, _ in found] == [0] * len(commands), done.stdout + done.stderr
    for words, (_, names) in zip(given, found, strict=True):
        yield " ".join(words), set(names)


@pytest.fixture
def pickled(tmp_path):
    return write_bin(tmp_path / "pickled", llama(), config=CONFIG)


def test_help_loads_nothing():
    for command, found in loaded(("--help",), ("--version",), *((name, "--help") for name in COMMANDS)):
        assert not found, command


def test_no_command_loads_what_it_does_not_need(healthy, pickled, tmp_path):
    quiet = ("--no-progress",)
    light = [
        ("inspect", healthy, *quiet),
        ("inspect", pickled, *quiet),
        ("doctor", healthy, *quiet),
        ("recipes",),
        ("recipes", "llama-hf2meta"),
        ("recipes", "--match", healthy),
        ("plan", healthy, tmp_path / "a", *quiet),
        ("plan", healthy, tmp_path / "a", "--recipe", "llama-hf2ms", *quiet),
        ("plan", healthy, tmp_path / "a", "--out", tmp_path / "plan.json", *quiet),
        ("convert", healthy, tmp_path / "b", *quiet),
        ("run", tmp_path / "plan.json", *quiet),
    ]
    draft, cast = ("recipes", "--new", healthy, healthy), ("convert", healthy, tmp_path / "d", "--dtype", "float32", *quiet)
    *found, (_, drafting), (_, casting) = loaded(*light, draft, cast)
    for command, libraries in found:
        assert not libraries, command
    assert drafting <= {"yaml"}
    assert casting == {"ml_dtypes", "numpy", "yaml"}
    compare = ("verify", healthy, tmp_path / "b", *quiet)
    (_, verified), (_, compared) = loaded(("convert", pickled, tmp_path / "c", "--verify", *quiet), compare)
    assert verified <= {"numpy"}
    assert "torch" not in compared


# Help and completion -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit) as ended:
        run(command, "--help")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert COMMANDS[command].examples
    for example in COMMANDS[command].examples:
        assert f"  streamconv {command} {example}".rstrip() in out
        words = shlex.split(example.partition(" > ")[0])
        parsed = build_parser().parse_args([command, *words])
        assert parsed.command == command
        if recipe := getattr(parsed, "recipe", None) or getattr(parsed, "name", None):
            assert recipe in registry() or recipe == "mine.yaml"
            for option in [] if recipe == "mine.yaml" else getattr(parsed, "options", []):
                assert option.partition("=")[0] in registry()[recipe].settings


def test_every_command_has_examples():
    (commands,) = [action.choices for action in build_parser()._actions if isinstance(action.choices, dict)]
    assert set(COMMANDS) == set(commands)


def completion(shell, capsys):
    """The script for a shell, from a parser of its own."""
    build_parser.cache_clear()
    with pytest.raises(SystemExit) as ended:
        run("--print-completion", shell)
    build_parser.cache_clear()
    assert ended.value.code == 0
    return capsys.readouterr().out


COMPLETED = {
    "con": ["convert"],
    "convert a b --max-sh": ["--max-shard-size"],
    "convert a b --to m": ["mcore", "merged", "meta", "mp", "ms", "mxfp4", "mxfp8"],
    "plan a b --recipe internvl-": ["internvl-custom2hf", "internvl-hf2custom"],
    "recipes internvl-": ["internvl-custom2hf", "internvl-hf2custom"],
    "verify a b --set n_h": ["n_head=", "n_heads="],
    "convert a b --dtype b": ["bf16", "bfloat16"],
    "convert a b --format d": ["dcp"],
    "convert a b --quantize W8A1": ["W8A16"],
    "inspect a --set ": ["root="],
    "convert mod": ["model.safetensors"],
    "plan a b --recipe mine": ["mine.yaml"],
    "--print-completion f": ["fish"],
}
"""What is written -> what it may go on as."""
BASH = """
source ./script
for line; do
  IFS=' ' COMP_WORDS=(streamconv $line)
  [[ $line == *' ' ]] && COMP_WORDS+=("")
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
  _streamconv streamconv "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
  echo "${COMPREPLY[*]}"
done
"""
FISH = """
source ./script
for line in $argv
    complete -C "streamconv $line" | string split --fields 1 \\t | string join ' '
end
true
"""
SHELLS = {"bash": BASH, "fish": FISH}
ZEROTH = {"bash": ["bash"], "fish": []}  # what is no argument to bash


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_what_there_is(shell, tmp_path, capsys):
    if shell == "bash":
        pytest.importorskip("shtab")
    (tmp_path / "script").write_text(completion(shell, capsys))
    for name in ("mine.yaml", "model.safetensors"):
        (tmp_path / name).touch()
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    typed = COMPLETED | ({"convert a b --to meta,bf": ["meta,bf16"]} if shell == "bash" else {})
    done = subprocess.run(
        [shell, "-c", SHELLS[shell], *ZEROTH[shell], *typed], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=600
    )
    answers = [sorted(line.split()) for line in done.stdout.splitlines()]
    assert dict(zip(typed, answers, strict=True)) == typed


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh", "fish"])
def test_completion_has_words_of_every_kind(shell, capsys):
    if shell != "fish":
        pytest.importorskip("shtab")
    script = completion(shell, capsys)
    for word in ("convert", "max-shard-size", "llama-meta2hf", "model_parallel=", "bfloat16", "mindspore", "W4A16", "mcore", "one-file"):
        assert word in script, word
    if shell == "zsh":
        assert ":NAME|FILE:{_alternative 'recipes" in script
        assert ":WHAT:{_values -s , what hf " in script
    if shutil.which(shell) and shell != "tcsh":
        subprocess.run([shell, "-n"], input=script, text=True, check=True, timeout=600)


def test_completion_in_fish_is_of_one_command_each(capsys):
    lines = completion("fish", capsys).splitlines()
    assert all(line.startswith("complete -c streamconv -n ") for line in lines)
    (to,) = [line for line in lines if "from convert' -l to " in line]
    assert re.search(r"-l to -x -a '[\w= -]*\bmcore\b[\w= -]*' -d '", to)
    (recipe,) = [line for line in lines if "from plan' -l recipe " in line]
    assert " -r -a 'baichuan2-hf2ms " in recipe
    (switch,) = [line for line in lines if "from run' -l overwrite " in line]
    assert " -x" not in switch
    assert sum("-f -a convert -d " in line for line in lines) == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_without_shtab(shell, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    build_parser.cache_clear()
    assert run("--print-completion", shell) == 2
    build_parser.cache_clear()
    assert "pip install 'streamconv[completion]'" in capsys.readouterr().err


# Which recipes fit ---------------------------------------------------------------------------------------------------


def test_recipes_that_fit_come_in_the_order_of_likelihood(healthy, capsys):
    found = rank_recipes(healthy)
    fitting = [match.recipe.name for match in found if match.fits]
    assert {"llama-hf2meta", "llama-hf2ms", "llama-hf2sat"} == set(fitting[:3])
    assert [match.fits for match in found] == sorted((match.fits for match in found), reverse=True)
    assert all(match.tensors == 1 for match in found if match.fits)
    named = [match.named for match in found if match.fits]
    assert named == sorted(named, reverse=True)
    assert run("recipes", "--match", healthy) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows][: len(fitting)] == fitting
    assert rows[0].endswith("(named by config.json)")
    assert run("recipes", "--match", healthy, "--json") == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out) if not row["needs"]] == fitting


@pytest.mark.parametrize("installed", [False, True])
def test_recipes_that_ask_transformers_are_named_too(installed, healthy, monkeypatch, capsys):
    """Tried where it is there, and else said to be not tried."""
    monkeypatch.setattr(matching, "find_spec", lambda _: object() if installed else None)
    monkeypatch.setattr(bridge.Bridge, "apply", lambda *_, **__: None)

    def refuse(*_: object, **__: object) -> None:
        raise CoverageError("no such model")

    monkeypatch.setattr(parallel.TensorParallel, "apply", refuse)
    assert run("recipes", "--match", healthy, "--json") == 0
    rows = {row["name"]: row["tried"] for row in json.loads(capsys.readouterr().out) if row["needs"] == "transformers"}
    bridges = {"transformers-hub2native": installed, "transformers-native2hub": installed}
    assert rows == bridges if installed else rows == {**bridges, "tp-split": False}
    assert run("recipes", "--match", healthy) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("transformers-hub2native"))
    assert line.endswith("(takes transformers)" if installed else "(takes transformers, which is not installed: not tried)")


def test_where_none_fits_the_nearest_are_shown(tmp_path, capsys):
    tensors = llama() | {"model.layers.0.adapter.weight": torch.zeros(2)}
    src = write(tmp_path / "odd", tensors, config=CONFIG)
    assert run("recipes", "--match", src) == 0
    first, *near = (line for line in capsys.readouterr().out.splitlines() if "(takes transformers" not in line)
    assert first == "no recipe fits; the nearest are"
    assert 1 <= len(near) <= 3
    assert "a rule for 98.0% of the tensors" in near[0]
    assert near[0].split()[0].startswith("llama-")
    write(tmp_path / "none", numbered({"x": (1,)}))
    assert run("recipes", "--match", tmp_path / "none") == 0
    assert capsys.readouterr().out == "no recipe fits\n"


def test_convert_suggests_a_recipe_that_config_json_points_at(healthy, tmp_path, capsys):
    named = {"llama-hf2meta", "llama-hf2ms", "llama-hf2sat", "llama-hf2titan"}
    assert set(suggest_recipes(healthy, streamconv.open(healthy))) == named
    assert run("convert", healthy, tmp_path / "a") == 0
    assert "note: for another layout of this model: --to meta or ms or sat or titan\n" in capsys.readouterr().out
    assert run("plan", healthy, tmp_path / "b") == 0
    assert "--to meta or ms or sat or titan\n" in capsys.readouterr().out
    for more in (("--json",), ("--quiet",), ("--recipe", "llama-hf2ms"), ("--dtype", "fp16")):
        assert run("convert", healthy, tmp_path / f"c{more[-1]}", *more) == 0
        assert "another layout" not in capsys.readouterr().out
    config = json.loads((healthy / "config.json").read_text())
    (healthy / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert run("convert", healthy, tmp_path / "d") == 0
    assert "another layout" not in capsys.readouterr().out


# The doctor, in every container --------------------------------------------------------------------------------------


def shards_of_torch(folder):
    tensors = llama()
    folder.mkdir()
    names, weight_map = list(tensors), {}
    for k in range(3):
        file = f"pytorch_model-{k + 1:05d}-of-00003.bin"
        mine = names[k::3]
        torch.save({name: tensors[name] for name in mine}, folder / file)
        weight_map |= dict.fromkeys(mine, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder, folder / "pytorch_model-00002-of-00003.bin"


def one_of_torch(folder):
    return write_bin(folder, llama(), config=CONFIG), folder / "pytorch_model.bin"


def lightning(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save({"state_dict": llama(), "epoch": 3}, folder / "last.ckpt")
    return folder, folder / "last.ckpt"


def mindspore(folder):
    return write_ckpt(folder, llama(), config=CONFIG), folder / "model.ckpt"


@pytest.mark.parametrize("make", [shards_of_torch, one_of_torch, lightning, mindspore])
def test_the_doctor_in_every_container(make, tmp_path):
    folder, file = make(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    found = examine(folder)
    assert found.findings == []
    assert (found.tensors, found.format) == (48, "mindspore" if make is mindspore else "torch")
    file.write_bytes(file.read_bytes()[:-700])
    found = examine(folder)
    assert not found.healthy
    assert found.findings[0].where in (file.name, str(folder))
