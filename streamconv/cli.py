"""The command line."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from streamconv import __version__, api, recipes, report
from streamconv.checkpoint import open_checkpoint
from streamconv.engine.readers import BACKENDS
from streamconv.errors import FormatError, Interrupted, StreamconvError, UsageError
from streamconv.plan import Plan


class _Parser(argparse.ArgumentParser):
    """Takes ``_`` for ``-`` in options, and reports mistakes as one line of ours."""

    def error(self, message: str) -> Any:
        raise UsageError(f"{message}; see '{self.prog} --help'")


def _memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-memory", metavar="SIZE", default=api.MAX_MEMORY, help="bound on the process's peak resident memory (1GB)")
    parser.add_argument("-j", "--workers", metavar="N", type=int, help="concurrent copies and tiles")
    parser.add_argument("--read-backend", choices=list(BACKENDS), default="auto", help="how source bytes are read")


def _recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="NAME|FILE", help="a recipe's name, or a .yaml or .json file")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an option of the recipe (repeatable)",
    )
    parser.add_argument("--dtype", metavar="DTYPE", help="cast floating tensors: float32, float16, bfloat16, ...")
    parser.add_argument(
        "--keep-dtype", metavar="PATTERN", action="append", default=[], help="tensors that --dtype leaves alone (repeatable)"
    )
    parser.add_argument("--sidecars-from", metavar="DIR", help="config and tokenizer files come from here instead of SRC")


def _conversion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="a checkpoint: a directory or a file")
    parser.add_argument("dst", metavar="DST", help="a file if it ends in the container's suffix, else a directory")
    _recipe(parser)
    _memory(parser)
    parser.add_argument("--format", metavar="NAME", help="container of DST (by its suffix, else the recipe's, else safetensors)")
    parser.add_argument("--max-shard-size", metavar="SIZE", default=api.MAX_SHARD_SIZE, help="5GB is decimal, 5GiB binary (5GB)")
    parser.add_argument("--single-file", action="store_true", help="one file, whatever its size")
    parser.add_argument(
        "--align", action="store_true", help="start data at whole blocks, so that file systems that share blocks need not copy"
    )
    parser.add_argument("--engine", choices=["local"], default="local", help="where output files are made")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--overwrite", action="store_true", help="remove weight and index files in DST first")
    again.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument("--verify", action="store_true", help="read everything back and compare after writing")


def _output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("--no-progress", action="store_true", help="no bar")
    parser.add_argument("-v", "--verbose", action="store_true", help="tracebacks with errors")


def _build_parser() -> _Parser:
    parser = _Parser(prog="streamconv", description="Converts model checkpoints bigger than the machine, in bounded memory.")
    parser.add_argument("--version", action="version", version=f"streamconv {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str, *parts: Callable[[argparse.ArgumentParser], None]) -> argparse.ArgumentParser:  # noqa: A002
        command = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        for part in (*parts, _output):
            part(command)
        return command

    convert = add("convert", "Convert or re-shard a checkpoint.", _conversion)
    convert.add_argument("--compare", metavar="DIR", help="then print the comparison with this reference checkpoint")
    plan = add("plan", "Say what convert would do; write nothing.", _conversion)
    plan.add_argument("--out", metavar="FILE", help="write the plan itself to this file")
    run = add("run", "Run a plan that 'plan --out' wrote.")
    run.add_argument("plan", metavar="FILE")
    again = run.add_mutually_exclusive_group()
    again.add_argument("--overwrite", action="store_true", help="remove weight and index files in DST first")
    again.add_argument("--resume", action="store_true", help="continue an interrupted run")
    run.add_argument("--verify", action="store_true", help="read everything back and compare after writing")
    inspect = add("inspect", "List names, dtypes, shapes, files and sizes, from headers only.")
    inspect.add_argument("src", metavar="SRC")
    verify = add("verify", "Compare two checkpoints tensor by tensor, or a recipe's result with B.", _recipe, _memory)
    verify.add_argument("a", metavar="A")
    verify.add_argument("b", metavar="B")
    known = add("recipes", "List recipes, explain one, or find those that fit a checkpoint.")
    known.add_argument("name", metavar="NAME", nargs="?")
    known.add_argument("--match", metavar="SRC", help="only those that fit this checkpoint")
    demo = add("demo", "Build a small checkpoint, convert it there and back, and verify it.")
    demo.add_argument("dir", metavar="DIR", nargs="?", help="where to leave it (default: a temporary directory)")
    return parser


def _options(given: Sequence[str]) -> dict[str, object]:
    values: dict[str, object] = {}
    for text in given:
        key, mark, value = text.partition("=")
        if not mark or not key:
            raise UsageError(f"--set {text}: expected KEY=VALUE")
        if key in values:
            raise UsageError(f"--set {key}: given twice")
        values[key] = value
    return values


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `api.plan` from those of the command line."""
    names = ("recipe", "format", "dtype", "keep_dtype", "max_shard_size", "single_file", "max_memory", "workers", "read_backend")
    found = {name: getattr(args, name) for name in (*names, "sidecars_from", "overwrite", "resume", "align")}
    return found | {"options": _options(args.set)}


def _shows_bar(args: argparse.Namespace) -> bool:
    return not (args.quiet or args.no_progress)


def _say(args: argparse.Namespace, text: object) -> None:
    if not args.quiet:
        print(text)


def _convert(args: argparse.Namespace) -> int:
    result = api.convert(args.src, args.dst, compare_with=args.compare, verify=args.verify, progress=_shows_bar(args), **_settings(args))
    _print_result(args, result)
    return 0


def _print_result(args: argparse.Namespace, result: api.Result) -> None:
    if args.json:
        report.print_json(result.summary())
        return
    for note in result.plan.notes:
        _say(args, f"note: {note}")
    _say(args, result)
    if result.comparison:
        _say(args, f"compared with {args.compare}: {result.comparison}")


def _plan(args: argparse.Namespace) -> int:
    made = api.plan(args.src, args.dst, **_settings(args))
    if args.out:
        try:
            Path(args.out).write_text(made.to_json(), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--out {args.out}: cannot be written: {error.strerror}") from error
    if args.json:
        report.print_json(made.summary())
    else:
        _say(args, made)
    return 0


def _run(args: argparse.Namespace) -> int:
    try:
        text = Path(args.plan).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise FormatError(f"{args.plan}: cannot be read: {error}; make it with 'streamconv plan SRC DST --out FILE'") from error
    made = Plan.from_json(text)
    _print_result(args, api.run(made, overwrite=args.overwrite, resume=args.resume, verify=args.verify, progress=_shows_bar(args)))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(args.src)
    if args.json:
        report.print_json(report.describe_checkpoint(checkpoint))
    else:
        report.print_checkpoint(checkpoint)
    return 0


def _verify(args: argparse.Namespace) -> int:
    names = ("recipe", "dtype", "keep_dtype", "max_memory", "workers", "read_backend", "sidecars_from")
    settings = {name: getattr(args, name) for name in names}
    found = api.verify(args.a, args.b, options=_options(args.set), progress=_shows_bar(args), **settings)
    if args.json:
        report.print_json(found.summary())
    else:
        _say(args, found)
    return 0 if found.equal else 1


def _recipes(args: argparse.Namespace) -> int:
    if args.name:
        recipe = recipes.get(args.name)
        print(
            json.dumps({**report.describe_recipe(recipe), "rules": recipe.to_dict()["rules"]})
            if args.json
            else report.explain_recipe(recipe)
        )
        return 0
    found = list(recipes.registry().values())
    if args.match:
        fitting = set(api.match_recipes(args.match))
        found = [recipe for recipe in found if recipe.name in fitting]
    if args.json:
        print(json.dumps([report.describe_recipe(recipe) for recipe in found]))
    else:
        for recipe in found:
            print(f"{recipe.name}  {recipe.summary}")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from streamconv import demo

    figures = demo.run(args.dir, progress=_shows_bar(args))
    if args.json:
        report.print_json(figures)
    else:
        _say(args, demo.describe(figures))
    return 0 if figures["equal"] else 1


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "convert": _convert,
    "plan": _plan,
    "run": _run,
    "inspect": _inspect,
    "verify": _verify,
    "recipes": _recipes,
    "demo": _demo,
}


def _with_dashes(argument: str) -> str:
    """``--max_memory=1GB`` as ``--max-memory=1GB``."""
    if not argument.startswith("--"):
        return argument
    name, mark, value = argument.partition("=")
    return name.replace("_", "-") + mark + value


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; errors are one line on stderr."""
    given = list(sys.argv[1:] if argv is None else argv)
    verbose = "-v" in given or "--verbose" in given
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path or name that the terminal cannot show is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = _build_parser().parse_args([_with_dashes(argument) for argument in given])
        code = _COMMANDS[args.command](args)
        sys.stdout.flush()
    except StreamconvError as error:
        return _fail(" ".join(str(error).split("\n")), error.exit_code, verbose=verbose)
    except KeyboardInterrupt:
        return _fail("interrupted", Interrupted.exit_code, verbose=verbose)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError as error:
        return _fail(f"out of memory ({error}); use a smaller --max-memory or fewer --workers", 3, verbose=verbose)
    except OSError as error:
        return _fail(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), 3, verbose=verbose)
    return code


def _fail(message: str, code: int, *, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    print(f"streamconv: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
