"""The command line."""

from __future__ import annotations

import argparse
import io
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

from streamconv import __version__, interrupts, recipes
from streamconv.cli.console import Console, StdoutError
from streamconv.convert import api
from streamconv.diagnose import matching, report
from streamconv.diagnose.doctor import doctor
from streamconv.diagnose.ranks import open_with_ranks
from streamconv.engine.io import name_in
from streamconv.engine.readers import BACKENDS
from streamconv.errors import FormatError, Interrupted, StreamconvError, UsageError, writing
from streamconv.formats.catalog import locate
from streamconv.planning.plan import BEGINNING, Plan
from streamconv.recipe.recipe import IDENTITY_OPTIONS
from streamconv.running import run as running
from streamconv.running.destination import output_of
from streamconv.running.executors import EXECUTORS, LOCAL
from streamconv.running.kept import check_replaceable, check_report
from streamconv.running.log import Line
from streamconv.running.output import begun_plan
from streamconv.running.progress import Progress
from streamconv.running.results import Result
from streamconv.storage import is_url
from streamconv.storage.locations import shown
from streamconv.storage.reading import read_whole
from streamconv.text import did_you_mean, join_lines, one_line
from streamconv.units import parse_size

MOST_OF_PLAN = 512 << 20  # bytes of a plan's file: one of a million tensors has fewer
NEAR = 0.25  # of the tensors that have a rule, times the rules that have a tensor: a recipe worth a look
EXAMPLES = {
    "convert": (
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
    "plan": (
        "Llama-3-70B out --recipe llama-hf2meta --set model_parallel=8",
        "Llama-3-70B out --out plan.json",
        "hf://org/name@main s3://bucket/name --out plan.json",
    ),
    "run": ("plan.json --verify", "plan.json --part 3/16", "plan.json --finish", "plan.json --engine ray", "big --resume"),
    "inspect": ("Llama-3-8B", "model.safetensors --json", "hf://org/name@main"),
    "doctor": ("Llama-3-8B", "Llama-3-8B --data --json", "https://host/folder"),
    "verify": ("before after", "hf://org/name copy", "Meta-Llama-3-8B Llama-3-8B --recipe llama-meta2hf"),
    "recipes": ("", "llama-meta2hf", "--match Llama-3-8B", "--new mine other > mine.yaml"),
    "demo": ("", "somewhere"),
}
_PATHS = {"SRC", "DST", "A", "B", "FILE", "DIR", "NAME|FILE"}
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.*", re.DOTALL)


class _Completion(argparse.Action):
    """Prints a shell's completion script, which shtab writes from the parser."""

    def __call__(self, parser: argparse.ArgumentParser, _namespace: object, shell: object, _option: str | None = None) -> None:
        try:
            import shtab
        except ImportError:
            raise UsageError("--print-completion needs shtab: pip install 'streamconv[completion]'") from None
        assert isinstance(parser, _Parser)
        actions: list[Any] = [action for command in parser.commands().values() for action in command._actions]
        for action in actions:
            if isinstance(action.metavar, str) and action.metavar in _PATHS:
                action.complete = shtab.FILE
        print(shtab.complete(parser, shell=str(shell)))
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as one line of ours, with what comes near to what was given."""

    def error(self, message: str) -> Any:
        raise UsageError(f"{message}; see '{self.prog} --help'")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            hint = did_you_mean(str(value), action.choices)
            raise argparse.ArgumentError(action, f"{value!r} is none of {', '.join(action.choices)}{hint}")

    def commands(self) -> Mapping[str, argparse.ArgumentParser]:
        """The parsers of the commands, by name."""
        found = next(action for action in self._actions if isinstance(action, argparse._SubParsersAction))
        return found.choices

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
        known = {name: [text for action in parser._actions for text in action.option_strings] for name, parser in self.commands().items()}
        takers = [name for name, options in known.items() if unknown in options]
        if takers:
            own.error(f"{command} has no option {unknown}; {', '.join(takers)} {'has' if len(takers) == 1 else 'have'}")
        own.error(f"unknown option {unknown}{did_you_mean(unknown, known[command])}")


def _root(parser: argparse.ArgumentParser) -> None:
    text = f"root=KEY: {IDENTITY_OPTIONS['root'].help}"
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help=text)


def _memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-memory", metavar="SIZE", default=api.MAX_MEMORY, help="bound on the process's peak resident memory (1GB)")
    parser.add_argument("-j", "--workers", metavar="N", type=int, help="concurrent copies and tiles")
    parser.add_argument("--read-backend", choices=list(BACKENDS), default="auto", help="how source bytes are read")


def _variant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--variant", metavar="NAME", help="read the weights called so, as in model.NAME.safetensors; written under the same name"
    )


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--report", metavar="FILE", help="write a page about it to this .html file")


def _recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe", metavar="NAME|FILE", help="a recipe's name, or a .yaml, .json or .py file; then :inverse for the way back"
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help=f"an option of the recipe, which 'streamconv recipes NAME' lists; without one: {', '.join(IDENTITY_OPTIONS)} (repeatable)",
    )
    parser.add_argument("--dtype", metavar="DTYPE", help="cast floating tensors: float32, float16, bfloat16, ...")
    parser.add_argument(
        "--keep-dtype", metavar="PATTERN", action="append", default=[], help="tensors that --dtype leaves alone (repeatable)"
    )
    parser.add_argument("--dequantize", action="store_true", help="quantized weights become numbers, before a recipe sees them")
    parser.add_argument("--sidecars-from", metavar="DIR", help="config and tokenizer files come from here (or a URL) instead of SRC")


def _pull_request(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--create-pr", action="store_true", help="upload to the Hub as a pull request; DST may then be SRC's repository")


def _again(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="remove weight and index files in DST first")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run; with --overwrite too: if one has begun")


def _conversion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="a checkpoint: a directory, a file, or a URL (https, hf, s3, gs)")
    parser.add_argument("dst", metavar="DST", help="a file if it ends in the container's suffix, else a directory; or a URL (hf, s3, gs)")
    _recipe(parser)
    _variant(parser)
    _memory(parser)
    parser.add_argument("--format", metavar="NAME", help="container of DST (by its suffix, else the recipe's, else safetensors)")
    parser.add_argument("--max-shard-size", metavar="SIZE", default=api.MAX_SHARD_SIZE, help="5GB is decimal, 5GiB binary (5GB)")
    parser.add_argument("--single-file", action="store_true", help="one file, whatever its size")
    parser.add_argument(
        "--align", action="store_true", help="start data at whole blocks, so that file systems that share blocks need not copy"
    )
    _engine(parser)
    _pull_request(parser)
    _again(parser)
    parser.add_argument("--verify", action="store_true", help="read everything back and compare after writing")
    parser.add_argument("--checksum", action="store_true", help="write SHA256SUMS, too, for 'sha256sum --check'")
    parser.add_argument(
        "--reclaim-source",
        action="store_true",
        help="DELETE SRC's weights while converting: give their space back once what they became is safe",
    )


def _engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=EXECUTORS, default=LOCAL, help="where output files are made; ray: a task for each")
    parser.add_argument(
        "--ray-address", metavar="ADDR", help="HOST:PORT of the Ray cluster (RAY_ADDRESS, else this machine's, else a new one)"
    )


def _output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("--no-progress", action="store_true", help="no bar")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for each file; tracebacks with errors")


@cache
def _build_parser() -> _Parser:
    parser = _Parser(prog="streamconv", description="Converts model checkpoints bigger than the machine, in bounded memory.")
    parser.add_argument("--version", action="version", version=f"streamconv {__version__}")
    parser.add_argument("--print-completion", action=_Completion, choices=["bash", "zsh", "tcsh"], help="completion for that shell")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str, *parts: Callable[[argparse.ArgumentParser], None]) -> argparse.ArgumentParser:  # noqa: A002
        shown = "\n".join(f"  streamconv {name} {line}" for line in EXAMPLES[name])
        raw = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(
            name, help=help, description=help, epilog=f"examples:\n{shown}", formatter_class=raw, allow_abbrev=False
        )
        for part in (*parts, _output):
            part(command)
        return command

    convert = add("convert", "Convert or re-shard a checkpoint.", _conversion)
    _report(convert)
    convert.add_argument("--compare", metavar="DIR", help="then print the comparison with this reference checkpoint")
    convert.add_argument("--yes", action="store_true", help="do not ask whether --reclaim-source is meant")
    plan = add("plan", "Say what convert would do; write nothing.", _conversion)
    plan.add_argument("--out", metavar="FILE", help="write the plan itself to this file")
    run = add("run", "Run a plan that 'plan --out' wrote.")
    run.add_argument(
        "plan", metavar="FILE", help="the plan, or a DST where a run was interrupted; no credentials are in it: the environment has them"
    )
    _engine(run)
    _pull_request(run)
    _again(run)
    run.add_argument("--verify", action="store_true", help="read everything back and compare after writing")
    run.add_argument("--checksum", action="store_true", help="write SHA256SUMS, too")
    share = run.add_mutually_exclusive_group()
    share.add_argument(
        "--part", metavar="I/N", type=_read_part, help="make the files of part I of N only; anywhere, in any order, also again"
    )
    share.add_argument("--finish", action="store_true", help="check what the parts have made, and write the index")
    inspect = add("inspect", "List names, dtypes, shapes, files and sizes, from headers only.", _root, _variant)
    inspect.add_argument("src", metavar="SRC", help="a directory, a file, or a URL")
    inspect.add_argument("--filter", metavar="PATTERN", help="only tensors of such names: a name pattern, a glob, or a part of the name")
    inspect.add_argument("--stats", action="store_true", help="min, max, mean and norm, from the data")
    inspect.add_argument("--all", action="store_true", help="a line for each tensor, with its file")
    doctor = add("doctor", "Look for damage and contradictions, from headers, index and config.", _root, _variant)
    doctor.add_argument("src", metavar="SRC", help="a directory, a file, or a URL")
    doctor.add_argument("--data", action="store_true", help="look at the numbers too: NaN, Inf, constant tensors")
    verify = add("verify", "Compare two checkpoints tensor by tensor, or a recipe's result with B.", _recipe, _variant, _memory)
    _report(verify)
    verify.add_argument("a", metavar="A", help="a directory, a file, or a URL")
    verify.add_argument("b", metavar="B", help="what it is compared with")
    known = add("recipes", "List recipes, explain one, or find those that fit a checkpoint.")
    known.add_argument("name", metavar="NAME", nargs="?")
    known.add_argument("--match", metavar="SRC", help="only those that fit this checkpoint")
    known.add_argument(
        "--new",
        metavar=("SRC", "TARGET_NAMES"),
        nargs=2,
        help="draft one, as YAML, between two checkpoints; the second may be a JSON file of name -> shape",
    )
    demo = add("demo", "Build a small checkpoint, convert it there and back, and verify it.")
    demo.add_argument("dir", metavar="DIR", nargs="?", help="where to leave it (default: a temporary directory)")
    return parser


def _read_part(text: str) -> tuple[int, int]:
    """``3/16`` as (3, 16)."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    part = (int(found[1]), int(found[2])) if found else (1, 0)
    if part[0] > part[1] or not part[1]:
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 or 1 up to N, such as 3/16, not {text!r}")
    return part


@contextmanager
def _ending_softly() -> Iterator[None]:
    """Has what schedulers send before they kill be an interrupt, so that nothing unfinished is left."""
    before = signal.signal(signal.SIGTERM, interrupts.handle if interrupts.is_installed() else signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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


def _root_of(args: argparse.Namespace) -> str | None:
    """The one option of commands that only read."""
    given = _options(args.set)
    if other := next((key for key in given if key != "root"), None):
        raise UsageError(f"--set {other}: {args.command} takes root=KEY and no other option: leave it out")
    return None if (root := given.get("root")) is None else str(root)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `api.plan` from those of the command line."""
    names = (
        "recipe",
        "format",
        "dtype",
        "keep_dtype",
        "dequantize",
        "max_shard_size",
        "single_file",
        "max_memory",
        "workers",
        "read_backend",
        "variant",
    )
    found = {
        name: getattr(args, name)
        for name in (*names, "sidecars_from", "overwrite", "resume", "align", "reclaim_source", "create_pr", "engine")
    }
    return found | {"options": _options(args.set)}


def _shows_bar(args: argparse.Namespace) -> bool:
    return not (args.quiet or args.no_progress)


def _progress(args: argparse.Namespace) -> Progress:
    """How to show a run and, for its report, what to keep of it.

    Raises:
        UsageError: the report cannot be written.
    """
    if args.report:
        report.check_page(args.report)
    return Progress(_shows_bar(args), args.verbose, parse_size(args.max_memory), record=args.report is not None)


def _convert(args: argparse.Namespace, out: Console) -> int:
    if args.reclaim_source and not args.yes:
        _confirm(args, out)
    progress = _progress(args)
    shown = {"verify": args.verify, "checksum": args.checksum, "progress": progress, "ray_address": args.ray_address}
    with _ending_softly() if is_url(args.dst) else nullcontext():
        result = api.convert(args.src, args.dst, compare_with=args.compare, report=args.report, **shown, **_settings(args))
    if args.report:
        from streamconv.diagnose import report_page

        with writing():
            report_page.write(args.report, report_page.describe_conversion(result, args, progress))
    _print_result(args, out, result)
    _suggest(args, out)
    return 0


def _suggest(args: argparse.Namespace, out: Console) -> None:
    """Names the recipes that config.json points at, where none was asked for."""
    if args.recipe or args.json or args.quiet:
        return
    with suppress(StreamconvError):
        if names := matching.suggest_recipes(args.src):
            out.say(f"note: for another layout of this model: --recipe {' or '.join(names)}")


def _confirm(args: argparse.Namespace, out: Console) -> None:
    """Asks on the terminal whether the source may go.

    Raises:
        UsageError: it may not, or there is nobody to ask.
    """
    if not sys.stdin.isatty():
        raise UsageError("--reclaim-source deletes SRC's weights while they are converted: without a terminal to ask on, say --yes, too")
    question = out.show(f"{args.src}: its weights will be deleted, part by part, as soon as {args.dst} has them. Go on? [y/N]")
    print(question, end=" ", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise UsageError("--reclaim-source: not confirmed, nothing was done; leave it out to keep SRC")


def _print_result(args: argparse.Namespace, out: Console, result: Result) -> None:
    try:
        if args.json:
            out.say_json(result.summary())
        elif not args.quiet:
            out.say(join_lines([*(f"note: {note}" for note in result.notes), *str(result).split("\n")]))
            if result.comparison:
                out.say(f"compared with {args.compare}: {result.comparison}")
        out.flush()
    except StdoutError as error:  # no reason to fail: what was to be made is made
        if error.reason:
            out.complain(f"note: all is done, but stdout cannot be written: {error.reason}")


def _plan(args: argparse.Namespace, out: Console) -> int:
    args.src = locate(args.src) if is_url(args.src) else args.src  # what is listed for the plan is known afterwards
    made = api.plan(args.src, args.dst, **_settings(args))
    if args.out:
        if is_url(args.out):
            raise UsageError(f"--out {args.out}: a plan is written to a file of this machine: give a path")
        check_replaceable("--out", Path(args.out), BEGINNING)
        check_report("--out", Path(args.out), made)
        try:
            Path(args.out).write_text(made.to_json(), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--out {args.out}: cannot be written: {error.strerror}") from error
    if args.json:
        out.say_json(made.summary())
    elif not args.quiet:
        out.say(made)
        out.say(report.describe_room(made))
        _suggest(args, out)
    return 0


def _find_plan(path: str, *, goes_on: bool) -> tuple[Plan, Line]:
    """The plan in a file, or that of an unfinished output, with the head of its log.

    Raises:
        StreamconvError: there is none.
    """
    target = output_of(path)
    if target is None:
        return _read_plan(path), {}
    if not goes_on:
        raise UsageError(f"{path}: is no plan but a DST: add --resume, to go on with what is begun there, or --part, or --finish")
    return begun_plan(target.output, str(target.root))


def _read_plan(path: str) -> Plan:
    """The plan in a file. Raises FormatError."""
    again = "make it with 'streamconv plan SRC DST --out FILE'"
    try:
        return Plan.from_json(read_whole(path, MOST_OF_PLAN))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}; {again}") from error
    except FormatError as error:
        raise FormatError(f"{path}: {error}; {again}") from error


def _run(args: argparse.Namespace, out: Console) -> int:
    made, head = _find_plan(args.plan, goes_on=args.resume or args.part is not None or args.finish)
    with _ending_softly() if args.part or is_url(made.root) else nullcontext():
        result = running.run(
            made,
            overwrite=args.overwrite,
            resume=args.resume,
            verify=args.verify,
            checksum=args.checksum,
            reclaim_source=head.get("reclaim", False),
            progress=Progress(_shows_bar(args), args.verbose, made.peak_memory),
            settings=head.get("settings"),
            part=args.part,
            finish=args.finish,
            engine=args.engine,
            ray_address=args.ray_address,
            create_pr=args.create_pr,
        )
    _print_result(args, out, result)
    return 0


def _inspect(args: argparse.Namespace, out: Console) -> int:
    checkpoint, ranks = open_with_ranks(args.src, root=_root_of(args), variant=args.variant)
    if ranks:
        merging = matching.suggest_merging(checkpoint.location)
        does = f": --recipe {merging[0]} merges them" if merging else ""
        checkpoint.contents.notes.append(f"{len(ranks.files)} ranks of one model, each with its part of the tensors{does}")
    if args.filter:
        checkpoint = report.select(checkpoint, args.filter)
    if args.json:
        out.say_json(report.describe_checkpoint(checkpoint, stats=args.stats))
    else:
        for line in report.list_checkpoint(checkpoint, flat=args.all, stats=args.stats):
            out.say(line)
    return 0


def _doctor(args: argparse.Namespace, out: Console) -> int:
    found = doctor(locate(args.src) if is_url(args.src) else args.src, data=args.data, root=_root_of(args), variant=args.variant)
    if args.json:
        out.say_json(found.summary())
    elif not args.quiet:
        out.say(found)
    return 0 if found.healthy else 1


def _verify(args: argparse.Namespace, out: Console) -> int:
    names = ("recipe", "dtype", "keep_dtype", "dequantize", "max_memory", "workers", "read_backend", "sidecars_from", "variant")
    settings = {name: getattr(args, name) for name in names}
    progress = _progress(args)
    found = api.verify(args.a, args.b, options=_options(args.set), progress=progress, **settings)
    if args.report:
        from streamconv.diagnose import report_page

        report_page.write(args.report, report_page.describe_comparison(found, args, progress))
    if args.json:
        out.say_json(found.summary())
    elif not args.quiet:
        out.say(found)
    return 0 if found.equal else 1


def _draft(args: argparse.Namespace, out: Console) -> int:
    from streamconv.diagnose.draft import draft, read_shapes

    source, target = args.new
    made = draft(read_shapes(source), read_shapes(target), "mine", f"{source} and {target}")
    if args.json:
        out.say_json(made.summary())
        return 0
    out.say(made.text.removesuffix("\n"))
    if not args.quiet:
        for line in made.account.split("\n"):
            out.complain(line)
    return 0


def _recipes(args: argparse.Namespace, out: Console) -> int:
    if args.new:
        return _draft(args, out)
    if args.name:
        recipe = recipes.get(args.name)
        if args.json:
            out.say_json({**report.describe_recipe(recipe), "rules": recipe.to_dict()["rules"]})
        else:
            out.say(report.explain_recipe(recipe))
        return 0
    if args.match:
        _print_matches(args, out)
        return 0
    found = list(recipes.registry().values())
    if args.json:
        out.say_json([report.describe_recipe(recipe) for recipe in found])
    else:
        for recipe in found:
            out.say(f"{recipe.name}  {one_line(recipe.summary)}")
    return 0


def _print_matches(args: argparse.Namespace, out: Console) -> None:
    """The recipes that fit, and in words, where none does, those that come nearest."""
    matches = matching.rank_recipes(args.match, library=True)
    fitting = [match for match in matches if match.fits]
    untried = [match for match in matches if match.needs and not match.fits]
    if args.json:
        rows = [(match, {"named": match.named, "needs": match.needs, "tried": match.fits}) for match in (*fitting, *untried)]
        out.say_json([{**report.describe_recipe(match.recipe), **more} for match, more in rows])
        return
    for match in fitting:
        remark = "  (named by config.json)" if match.named else f"  (takes {match.needs})" if match.needs else ""
        out.say(f"{match.recipe.name}  {one_line(match.recipe.summary)}{remark}")
    if not fitting:
        _print_nearest(matches, out)
    for match in untried:
        remark = f"(takes {match.needs}, which is not installed: not tried)"
        out.say(f"{match.recipe.name}  {one_line(match.recipe.summary)}  {remark}")


def _print_nearest(matches: Sequence[matching.Match], out: Console) -> None:
    near = [match for match in matches if match.tensors * match.rules >= NEAR][:3]
    out.say("no recipe fits" + ("; the nearest are" if near else ""))
    for match in near:
        out.say(f"  {match.recipe.name}  a rule for {match.tensors:.1%} of the tensors, a tensor for {match.rules:.0%} of the rules")


def _demo(args: argparse.Namespace, out: Console) -> int:
    from streamconv import demo

    figures = demo.run(args.dir, progress=_shows_bar(args))
    if args.json:
        out.say_json(figures)
    elif not args.quiet:
        out.say(demo.describe(figures))
    return 0 if figures["equal"] else 1


_COMMANDS: dict[str, Callable[[argparse.Namespace, Console], int]] = {
    "convert": _convert,
    "plan": _plan,
    "run": _run,
    "inspect": _inspect,
    "doctor": _doctor,
    "verify": _verify,
    "recipes": _recipes,
    "demo": _demo,
}


def _read_given(arguments: Sequence[str]) -> Iterator[str]:
    """Arguments with ``-`` for ``_`` in the names of options, and URLs without their queries: these only what asks servers knows."""
    for argument in arguments:
        name, mark, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if mark and is_url(value):
            yield name.replace("_", "-")
        elif name:
            yield name.replace("_", "-") + mark + value
            continue
        yield shown(value) if _URL.fullmatch(value) else _URL.sub(lambda found: shown(found[0]), value)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; errors are one line on stderr.

    Args:
        argv: what was given; None: this process is the command and ends with it.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    out = Console(given)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path or name that the terminal cannot show is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    code = _execute(given, out, is_process=argv is None)
    if argv is None:
        interrupts.finish()
        if interrupts.came():
            interrupts.leave(code)
    return code


def _execute(given: Sequence[str], out: Console, *, is_process: bool) -> int:
    """Runs a command; says what went wrong; returns the exit code."""
    verbose = "-v" in given or "--verbose" in given
    try:
        args = _build_parser().read(list(_read_given(given)))
        code = _COMMANDS[args.command](args, out)
        out.flush()
    except StdoutError as error:
        if error.reason:
            out.complain(f"streamconv: error: stdout cannot be written: {error.reason}")
        return 3 if error.reason else 1
    except KeyboardInterrupt:
        interrupts.finish()
        return out.fail("interrupted", Interrupted.exit_code, verbose=verbose)
    except StreamconvError as error:
        if interrupts.came():
            interrupts.finish()
            return out.fail(error if isinstance(error, Interrupted) else "interrupted", Interrupted.exit_code, verbose=verbose)
        return out.fail(error, error.exit_code, verbose=verbose)
    except MemoryError as error:
        return out.fail(f"out of memory ({error}); use a smaller --max-memory or fewer --workers", 3, verbose=verbose)
    except OSError as error:
        return out.fail(f"{name_in(error) or ' '.join(given[:3])}: {error.strerror or error}", 3, verbose=verbose)
    except Exception as error:
        if not is_process:
            raise
        if interrupts.came():  # whatever became of it on its way
            interrupts.finish()
            return out.fail("interrupted", Interrupted.exit_code, verbose=verbose)
        what = f"{type(error).__name__}: {error}"
        return out.fail(f"a fault of streamconv itself: {what}; please report it, with what -v prints", 3, verbose=verbose)
    return code


if __name__ == "__main__":
    sys.exit(main())
