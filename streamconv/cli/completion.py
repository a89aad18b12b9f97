"""What a shell needs to complete the command: by shtab for bash, zsh and tcsh, by a few lines of our own for fish."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from streamconv.advice.goals import GOALS
from streamconv.dtypes import CASTABLE
from streamconv.errors import UsageError
from streamconv.formats.registry import containers, writable
from streamconv.recipe.recipe import IDENTITY_OPTIONS
from streamconv.recipes import registry
from streamconv.schemes.registry import presets

_PATHS = {"SRC", "SRC2", "DST", "A", "B", "FILE", "DIR", "DIR[@WEIGHT]", "NAME|FILE"}
_BASH = """
# A recipe may be a file, each word of a list between commas is completed, and one that ends in = is gone on with.
_streamconv() {
  _shtab_streamconv "$@"
  local word="${COMP_WORDS[COMP_CWORD]}" option="${COMP_WORDS[COMP_CWORD - 1]}"
  if [[ $option == --recipe && $word ]]; then COMPREPLY+=($(compgen -f -- "$word")); fi
  if [[ $option == --to && $word == *,* ]]; then
    COMPREPLY=($(compgen -P "${word%%,*}," -W "%s" -- "${word##*,}"))
  fi
  if [[ ${COMPREPLY[0]} == *= ]]; then compopt -o nospace 2>/dev/null; fi
}
complete -o bashdefault -F _streamconv streamconv
"""


def list_values() -> dict[str, list[str]]:
    """What may stand behind an option, by its name; behind ``--set`` the keys of all recipes, and those that go without one."""
    recipes = registry()
    keys = {key for recipe in recipes.values() for key in recipe.settings} | {"root", "prefix", *IDENTITY_OPTIONS}
    keys |= {key for container in containers().values() for key in container.settings}
    return {
        "--recipe": list(recipes),
        "--set": [f"{key}=" for key in sorted(keys)],
        "--dtype": [*CASTABLE, "fp32", "fp16", "bf16"],
        "--format": list(writable()),
        "--quantize": list(presets()),
        "--to": [goal.word if goal.number is None else f"{goal.word}=" for goal in GOALS],
    }


def write_script(parser: argparse.ArgumentParser, commands: Mapping[str, argparse.ArgumentParser], shell: str) -> str:
    """A shell's completion script; of ``parser``, which it changes, with its ``commands``.

    Raises:
        UsageError: it takes shtab, which is not installed.
    """
    values = list_values()
    for name, command in commands.items():
        for action in command._actions:
            action.choices = action.choices or _values_of(name, action, values)
    if shell == "fish":
        return "\n".join(_write_fish(parser, commands)) + "\n"
    try:
        import shtab
    except ImportError:
        raise UsageError("--print-completion needs shtab: pip install 'streamconv[completion]'") from None
    ways: dict[str, object] = {} if shell != "zsh" else _ways_of_zsh(values)
    actions: list[Any] = [action for command in commands.values() for action in command._actions]
    for action in actions:
        option = action.option_strings[-1] if action.option_strings else ""
        if option in ways or _takes_path(action):
            action.complete = ways.get(option, shtab.FILE)
    script: str = shtab.complete(parser, shell=shell)
    return script + (_BASH % " ".join(values["--to"]) if shell == "bash" else "")


def _ways_of_zsh(values: Mapping[str, list[str]]) -> dict[str, object]:
    """How zsh completes what is more than one of some words: a recipe, which may be a file, and a list between commas."""
    recipe = rf"_alternative 'recipes\:recipe\:({' '.join(values['--recipe'])})' 'files\:file\:_files'"
    to = f"_values -s , what {' '.join(word.rstrip('=') for word in values['--to'])}"
    return {"--recipe": {"zsh": f"{{{recipe}}}"}, "--to": {"zsh": f"{{{to}}}"}}


def _values_of(command: str, action: argparse.Action, values: Mapping[str, list[str]]) -> list[str] | None:
    """What an argument of a command may be; None: nobody can say."""
    if action.option_strings == ["--set"] and command in ("inspect", "doctor"):  # which only read
        return ["root="]
    if action.option_strings:
        return values.get(action.option_strings[-1])
    return values["--recipe"] if (command, action.metavar) == ("recipes", "NAME") else None


def _takes_path(action: argparse.Action) -> bool:
    return action.choices is None and isinstance(action.metavar, str) and action.metavar in _PATHS


def _write_fish(parser: argparse.ArgumentParser, commands: Mapping[str, argparse.ArgumentParser]) -> Iterator[str]:
    first = "complete -c streamconv -n __fish_use_subcommand"
    for action in parser._actions:
        if action.option_strings:
            yield f"{first} {_describe_fish(action)}"
    for name, command in commands.items():
        yield f"{first} -f -a {name} -d {shlex.quote(command.description or '')}"
        for action in command._actions:
            if action.option_strings or action.choices:
                yield f"complete -c streamconv -n '__fish_seen_subcommand_from {name}' {_describe_fish(action)}"


def _describe_fish(action: argparse.Action) -> str:
    """An option, or an argument of which the words are known, in the terms of fish."""
    words = [f"{'-l' if option.startswith('--') else '-s'} {option.lstrip('-')}" for option in action.option_strings]
    if action.choices:
        files = "-r" if action.metavar in _PATHS else "-x" if action.option_strings else "-f"
        words.append(f"{files} -a {shlex.quote(' '.join(map(str, action.choices)))}")
    elif action.nargs != 0:
        words.append("-r" if _takes_path(action) else "-x")
    return " ".join([*words, "-d", shlex.quote(action.help or "")])
