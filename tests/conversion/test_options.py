"""Options are said once: what the calls take, what the command takes, what the documentation says and what is kept of a run is the same."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from dataclasses import MISSING, FrozenInstanceError, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from documentation import find_between, write_between

import streamconv
from streamconv.cli.parser import COMMANDS, ROOT, build_parser, read_options
from streamconv.conversion.options import ConvertOptions, DiffOptions, PlanOptions, VerifyOptions, about_of, every_option, flags_of
from streamconv.engine.readers import BACKENDS
from streamconv.errors import UsageError
from streamconv.recipe.recipe import IDENTITY_OPTIONS

TABLE = re.compile(r"(?<=<!-- options -->\n).*?(?=\n<!-- end of options -->)", re.DOTALL)
CALLS = {"plan": PlanOptions, "convert": ConvertOptions, "verify": VerifyOptions, "diff": DiffOptions}


def option_table() -> str:
    """The documentation's table of the options."""
    rows = ["| option | meaning | default | of |", "|---|---|---|---|"]
    for option in every_option():
        about = about_of(option)
        if option.default is MISSING or not about.commands:
            continue
        value = "|".join(about.choices) or about.metavar
        spelling = ", ".join(flags_of(option)) + (f" {value}" if value else "")
        default = "" if option.default in (None, (), False) else f"`{option.default}`"
        cells = (f"`{spelling}`", about.help, default, ", ".join(about.commands))
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows)


def test_the_documentation_lists_every_option(monkeypatch):
    for option in every_option():
        if option.name == "max_memory":
            monkeypatch.setattr(option, "default", "1GB")  # which is another in tests
    assert find_between(TABLE) == option_table(), "PYTHONPATH=tests/fixtures python tests/conversion/test_options.py --write"


@pytest.mark.parametrize("name", CALLS)
def test_a_call_takes_the_fields_of_its_options(name):
    call, kind = getattr(streamconv, name), CALLS[name]
    parameters = inspect.signature(call).parameters
    assert set(parameters) == {one.name for one in fields(kind)}
    for one in fields(kind):
        parameter = parameters[one.name]
        expected = (inspect.Parameter.empty, "POSITIONAL_OR_KEYWORD") if one.default is MISSING else (parameter.default, "KEYWORD_ONLY")
        assert (parameter.default, parameter.kind.name) == expected
        assert f"\n        {one.name}: {about_of(one).help}." in call.__doc__
    assert inspect.signature(call).return_annotation in {"Plan", "Result", "Comparison", "Diff"}
    for given in ({"dtypes": "bf16"}, {"max_memroy": 1}):
        with pytest.raises(TypeError, match=rf"^{name}\(\) .*{next(iter(given))}"):
            call("a", "b", **given)
    with pytest.raises(TypeError, match=rf"^{name}\(\) .*missing"):
        call("a")


def test_the_command_takes_what_the_fields_say():
    parsers = build_parser().commands()
    for option in every_option():
        commands = about_of(option).commands
        assert set(commands) <= set(COMMANDS)
        for name, parser in parsers.items():
            if name == "run" and option.name in {"src", "dst"}:
                continue
            actions = {action.dest: action for action in parser._actions}
            if name in commands:
                action = actions[option.name]
                assert tuple(action.option_strings) in {flags_of(option), ()}
                assert action.help.startswith(about_of(option).help)
    args = build_parser().parse_args(["plan", "a", "b", "-j", "2", "--set", "h=3", "--set", "k=4", "--keep-dtype", "x", "--align"])
    options = PlanOptions(**read_options(args, PlanOptions))
    assert (options.workers, options.options, options.keep_dtype, options.align) == (2, {"h": "3", "k": "4"}, ("x",), True)
    args = build_parser().parse_args(["run", "plan.json", "--verify"])
    taken = set(inspect.signature(streamconv.run).parameters)
    assert read_options(args, ConvertOptions).keys() <= taken


def test_what_the_texts_say_of_other_modules_is_true():
    """Which are not imported for ``--help``."""
    every = {option.name: about_of(option) for option in every_option()}
    assert every["read_backend"].choices == tuple(BACKENDS)
    assert f"without one: {', '.join(IDENTITY_OPTIONS)} " in every["options"].help
    assert f"root=KEY: {IDENTITY_OPTIONS['root'].help}" == ROOT


def test_options_are_data():
    given = ConvertOptions("a", "b", dtype=torch.float16, keep_dtype=(text for text in ["x"]), progress=print)
    assert given == ConvertOptions("a", "b", dtype="torch.float16", keep_dtype=["x"])
    assert repr(given) == "ConvertOptions(dtype='torch.float16', keep_dtype=('x',), src='a', dst='b')"
    assert VerifyOptions("a", "b", dtype=np.float16).dtype == "float16"
    with pytest.raises(FrozenInstanceError):
        given.dst = "c"


def test_what_is_kept_of_a_run_is_what_decides_which_it_is():
    kept = PlanOptions("a", "b", dtype=torch.bfloat16, sidecars_from=Path("c"), max_shard_size="1MB", overwrite=True, workers=3).identity()
    assert kept == {
        "recipe": None, "options": None, "dtype": "torch.bfloat16", "keep_dtype": None, "dequantize": None, "quantize": None,
        "ignore": None, "adapter": None, "graft": None, "take": None, "replace": None,
        "rename": None, "drop": None, "only": None, "sidecars_from": "c", "random_seed": None,
        "variant": None,
        "format": None, "max_shard_size": 1_000_000, "single_file": None, "align": None,
        "src": str(Path("a").absolute()),
    }  # fmt: skip
    recipe = streamconv.recipes.get("llama-hf2meta")
    assert PlanOptions("a", "b", recipe=recipe).identity() == PlanOptions("a", "c", recipe="llama-hf2meta").identity()
    assert PlanOptions("https://host/a?sig=1", "b").identity()["src"] == "https://host/a"
    with pytest.raises(UsageError, match="not a size"):
        PlanOptions("a", "b", max_shard_size="many").identity()


def test_a_name_is_imported_when_it_is_asked_for():
    code = """
import sys, streamconv
assert {name for name in sys.modules if name.startswith("streamconv.")} == {
    "streamconv.errors", "streamconv.interrupts", "streamconv._version"
}
from streamconv import *
assert {name for name in streamconv.__all__ if name not in globals()} == set()
assert set(streamconv.__all__) <= set(dir(streamconv))
try:
    streamconv.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise SystemExit("there is something")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"]
    write_between(TABLE, option_table())
