"""What the command line takes: the commands, and their options, of which those of a conversion come from `Options`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from typing import Any

from streamconv._version import __version__
from streamconv.conversion.options import Options, about_of, flags_of, options_of
from streamconv.errors import UsageError
from streamconv.text import did_you_mean

ROOT = "root=KEY: the key of the dict of tensors in a file that torch.save wrote, dotted if it lies deeper"
SHELLS = ("bash", "zsh", "tcsh", "fish")


class _Completion(argparse.Action):
    """Prints a shell's completion script."""

    def __call__(self, parser: argparse.ArgumentParser, _namespace: object, shell: object, _option: str | None = None) -> None:
        from streamconv.cli.completion import write_script  # which loads all that it completes

        assert isinstance(parser, Parser)
        print(write_script(parser, parser.commands(), str(shell)), end="")
        parser.exit()


FIRST = """\
streamconv inspect SRC                 what is in a checkpoint, and what can be done with it
streamconv convert SRC DST --to WHAT   make it hf, meta, ms, bf16, fp8, int4, safetensors, ...
streamconv verify A B                  whether two checkpoints are the same
streamconv doctor SRC                  whether one is whole, and as its config says

"""
"""The commands that people need first."""


class Parser(argparse.ArgumentParser):
    """Reports mistakes as one line of ours, with what comes near to what was given; its help begins with ``first``."""

    first = ""

    def format_help(self) -> str:
        return self.first + super().format_help()

    def error(self, message: str) -> Any:
        raise UsageError(f"{message}; see '{self.prog} --help'")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            hint = did_you_mean(str(value), action.choices)
            raise argparse.ArgumentError(action, f"{value!r} is none of {', '.join(action.choices)}{hint}")

    def commands(self) -> Mapping[str, argparse.ArgumentParser]:
        """The parsers of the commands, by name."""
        subparsers = next(action for action in self._actions if isinstance(action, argparse._SubParsersAction))
        return subparsers.choices

    def read(self, given: Sequence[str]) -> argparse.Namespace:
        """What was given, as arguments of a command.

        Raises:
            UsageError: there is none, or it does not take them.
        """
        args, rest = self.parse_known_args(given)
        if rest:
            self._refuse(args.command, rest)
        return args

    def _refuse(self, command: str, rest: Sequence[str]) -> None:
        """Raises UsageError for arguments that a command does not take."""
        own = self.commands()[command]
        unknown = next((argument.partition("=")[0] for argument in rest if argument.startswith("-") and argument != "-"), None)
        if unknown is None:
            own.error(f"{rest[0]!r} is one argument too many")
        options = {name: parser._option_string_actions for name, parser in self.commands().items()}
        takers = [name for name in options if unknown in options[name]]
        if takers:
            own.error(f"{command} has no option {unknown}; {', '.join(takers)} {'has' if len(takers) == 1 else 'have'}")
        own.error(f"unknown option {unknown}{did_you_mean(unknown, options[command])}")


# What a command takes beside the options of a conversion ------------------------------------------------------------


TO = "what SRC shall become, from which recipe and options follow: hf, meta, ms, tp=4, bf16, fp8, safetensors, ... (repeatable; commas)"


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", metavar="WHAT", action="append", default=[], help=TO)
    parser.add_argument("--yes", action="store_true", help="do not ask whether --reclaim-source is meant")


def _add_merge(parser: argparse.ArgumentParser) -> None:
    next(action for action in parser._actions if action.dest == "src").metavar = "FILE"


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", metavar="WHAT", action="append", default=[], help=TO)
    parser.add_argument("--out", metavar="FILE", help="write the plan itself to this file")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "plan", metavar="FILE", help="the plan, or a DST where a run was interrupted; no credentials are in it: the environment has them"
    )
    share = parser.add_mutually_exclusive_group()
    share.add_argument(
        "--part", metavar="I/N", type=_read_part, help="make the files of part I of N only; anywhere, in any order, also again"
    )
    share.add_argument("--finish", action="store_true", help="check what the parts have made, and write the index")


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="a directory, a file, or a URL")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help=ROOT)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument("--filter", metavar="PATTERN", help="only tensors of such names: a name pattern, a glob, or a part of the name")
    parser.add_argument("--stats", action="store_true", help="min, max, mean and norm, from the data")
    parser.add_argument("--all", action="store_true", help="a line for each tensor, with its file")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument("--data", action="store_true", help="look at the numbers too: NaN, Inf, constant tensors")
    parser.add_argument("--check-load", action="store_true", help="have the library that the config names open it, without data")


def _add_recipes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?")
    parser.add_argument("--match", metavar="SRC", help="only those that fit this checkpoint")
    parser.add_argument(
        "--new",
        metavar=("SRC", "TARGET_NAMES"),
        nargs=2,
        help="draft one, as YAML, between two checkpoints; the second may be a JSON file of name -> shape",
    )


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", nargs="?", help="where to leave it (default: a temporary directory)")


def _add_nothing(_parser: argparse.ArgumentParser) -> None:
    pass


def _read_part(text: str) -> tuple[int, int]:
    """``3/16`` as (3, 16)."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    part = (int(match[1]), int(match[2])) if match else (1, 0)
    if part[0] > part[1] or not part[1]:
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 or 1 up to N, such as 3/16, not {text!r}")
    return part


# The commands --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command, which the module of its name in `streamconv.cli.commands` carries out.

    Attributes:
        help: what it does.
        examples: what may stand behind its name.
        add: declares what it takes beside options of a conversion and of what is printed.
    """

    help: str
    examples: tuple[str, ...]
    add: Callable[[argparse.ArgumentParser], None] = _add_nothing


COMMANDS = {
    "convert": Command(
        "Convert or re-shard a checkpoint.",
        (
            "Meta-Llama-3-8B Llama-3-8B --to hf",
            "Llama-3-8B small --to fp8",
            "Llama-3-70B out --max-shard-size 2GB --verify",
            "pytorch_model.bin model.safetensors",
            "Qwen3-8B Qwen3-8B-fp32 --dtype float32 --keep-dtype '*.norm.weight'",
            "Meta-Llama-3-8B Llama-3-8B --recipe llama-meta2hf --max-memory 512MB",
            "mine out --recipe mine.yaml --set heads=32",
            "big out --resume",
            "hf://org/name s3://bucket/name --dtype float16",
            "hf://org/name hf://org/name --create-pr",
            "/shared/big /shared/out --engine ray --ray-address 192.0.2.1:6379",
        ),
        _add_convert,
    ),
    "merge": Command(
        "Merge models into one, as a file of mergekit says.",
        ("merge.yaml merged", "merge.yaml merged --max-memory 150MB --verify", "dare.yaml merged --random-seed 7"),
        _add_merge,
    ),
    "plan": Command(
        "Say what convert would do; write nothing.",
        (
            "Llama-3-70B out --recipe llama-hf2meta --set model_parallel=8",
            "Llama-3-70B out --out plan.json",
            "hf://org/name@main s3://bucket/name --out plan.json",
        ),
        _add_plan,
    ),
    "run": Command(
        "Run a plan that 'plan --out' wrote.",
        ("plan.json --verify", "plan.json --part 3/16", "plan.json --finish", "plan.json --engine ray", "big --resume"),
        _add_run,
    ),
    "inspect": Command(
        "List names, dtypes, shapes, files and sizes, from headers only.",
        ("Llama-3-8B", "model.safetensors --json", "hf://org/name@main"),
        _add_inspect,
    ),
    "doctor": Command(
        "Look for damage and contradictions, from headers, index and config.",
        ("Llama-3-8B", "Llama-3-8B --data --json", "https://host/folder"),
        _add_doctor,
    ),
    "verify": Command(
        "Compare two checkpoints tensor by tensor, or a recipe's result with B.",
        ("before after", "hf://org/name copy", "Meta-Llama-3-8B Llama-3-8B --recipe llama-meta2hf"),
    ),
    "diff": Command(
        "Say what changed from A to B, tensor by tensor, and by how much.",
        ("base tuned", "hf://org/base hf://org/tuned --json", "base quantized --dequantize --report page.html", "base tuned --headers"),
    ),
    "recipes": Command(
        "List recipes, explain one, or find those that fit a checkpoint.",
        ("", "llama-meta2hf", "--match Llama-3-8B", "--new mine other > mine.yaml"),
        _add_recipes,
    ),
    "demo": Command(
        "Build a small checkpoint, convert it there and back, and verify it.",
        ("", "somewhere"),
        _add_demo,
    ),
}


@cache
def build_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(prog="streamconv", description="Converts model checkpoints bigger than the machine, in bounded memory.")
    parser.first = FIRST
    parser.add_argument("--version", action="version", version=f"streamconv {__version__}")
    parser.add_argument("--print-completion", action=_Completion, choices=SHELLS, help="completion for that shell")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        examples = "\n".join(f"  streamconv {name} {line}" for line in command.examples)
        own = commands.add_parser(
            name,
            help=command.help,
            description=command.help,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for option in options_of(name):
            _add_option(own, option)
        command.add(own)
        _add_output(own)
    return parser


def _add_option(parser: argparse.ArgumentParser, option: Field[Any]) -> None:
    """Declares an option of a conversion, or one of its arguments, as its field has it."""
    about = about_of(option)
    if option.default is MISSING:
        parser.add_argument(option.name, metavar=about.metavar, help=about.help)
        return
    more: dict[str, Any] = {"dest": option.name, "help": about.help}
    if not about.metavar:
        more["action"] = "store_true"
    elif about.repeatable:
        more |= {"metavar": about.metavar, "action": "append", "default": []}
    elif about.choices:
        more |= {"choices": about.choices, "default": option.default}
    else:
        default = f" ({option.default})" if option.default is not None else ""
        more |= {"metavar": about.metavar, "type": about.parse, "default": option.default, "help": about.help + default}
    parser.add_argument(*flags_of(option), **more)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("--no-progress", action="store_true", help="no bar")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for each file; tracebacks with errors")


def read_options(args: argparse.Namespace, kind: type[Options]) -> dict[str, Any]:
    """What a command was given, as arguments of the call that has such options."""
    values = {one.name: getattr(args, one.name) for one in fields(kind) if args.command in about_of(one).commands}
    return values | ({"options": read_settings(args.options)} if "options" in values else {})


def read_settings(assignments: Sequence[str]) -> dict[str, object]:
    """What ``--set KEY=VALUE`` says. Raises UsageError."""
    values: dict[str, object] = {}
    for text in assignments:
        key, mark, value = text.partition("=")
        if not mark or not key:
            raise UsageError(f"--set {text}: expected KEY=VALUE")
        if key in values:
            raise UsageError(f"--set {key}: given twice")
        values[key] = value
    return values


def read_root(args: argparse.Namespace) -> str | None:
    """The one option of commands that only read. Raises UsageError: another one is given."""
    settings = read_settings(args.set)
    if other := next((key for key in settings if key != "root"), None):
        raise UsageError(f"--set {other}: {args.command} takes root=KEY and no other option: leave it out")
    return None if (root := settings.get("root")) is None else str(root)
