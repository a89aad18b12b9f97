"""``--to WHAT``: has the checkpoint looked at, sets the options that follow, and says them as a command that can be copied."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator

from streamconv import memory
from streamconv.cli.console import Console
from streamconv.cli.parser import read_settings
from streamconv.cli.showing import shows_bar
from streamconv.conversion.options import about_of, flags_of, options_of
from streamconv.errors import BudgetError, StreamconvError, UsageError
from streamconv.formats.catalog import locate
from streamconv.running.ahead import showing_stage
from streamconv.storage import is_url
from streamconv.units import format_size, parse_size


def decide_options(args: argparse.Namespace, out: Console) -> None:
    """Has ``args`` say what ``--to`` means for SRC.

    Raises:
        StreamconvError: SRC cannot be read, or nothing leads there, or an option says something else.
    """
    from streamconv.advice.resolution import resolve  # which loads recipes, and all that these need

    settings = read_settings(args.options)
    root = settings.get("root")
    src = locate(args.src) if is_url(args.src) else args.src  # what is listed here is known afterwards
    limit, before = parse_size(args.max_memory), memory.peak()
    try:
        with showing_stage(shows_bar(args)), memory.bounded(limit):
            decision = resolve(
                src,
                args.to,
                recipe=args.recipe,
                sidecars_from=args.sidecars_from,
                root=None if root is None else str(root),
                variant=args.variant,
            )
    except StreamconvError as error:
        if args.command == "convert" and args.resume and args.reclaim_source:
            raise UsageError(f"--to: SRC is not whole any more: 'streamconv run {args.dst} --resume' goes on ({error})") from error
        raise
    if (peak := memory.peak()) > max(limit, before):
        needed = -(-peak // 10**6)
        what = f"--max-memory {format_size(limit)} is too small for --to, which took {format_size(peak)} to look at SRC"
        raise BudgetError(f"{what}: say the options that follow, or use --max-memory {needed}MB", needed * 10**6)
    args.src = decision.src or src
    for option in options_of(args.command):
        if option.name in decision.options:
            own, decided = getattr(args, option.name), decision.options[option.name]
            setattr(args, option.name, _joined(flags_of(option)[-1], own, option.default, decided))
    read_settings(args.options)
    if not args.json and not args.quiet:
        out.say(f"= {shlex.join(_command(args))}")
        out.flush()


def _joined(flag: str, own: object, default: object, decided: object) -> object:
    """An option's value: what is decided, beside what was said of one that can be said several times."""
    if isinstance(own, list) and isinstance(decided, list):
        return [*own, *decided]
    if own not in (default, decided):
        raise UsageError(f"{flag} {own}: --to says {flag} {decided}: leave out one of them")
    return decided


def _command(args: argparse.Namespace) -> Iterator[str]:
    """The words of a command that does the same without ``--to``."""
    yield from ("streamconv", args.command, str(args.src), args.dst)
    for option in options_of(args.command):
        value, flag = getattr(args, option.name), flags_of(option)[-1]
        if option.name in ("src", "dst") or value in (option.default, []):
            continue
        if not about_of(option).metavar:
            yield flag
            continue
        for one in value if isinstance(value, list) else [value]:
            yield from (flag, str(one))
