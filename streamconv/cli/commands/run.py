"""``streamconv run FILE``."""

from __future__ import annotations

import argparse
from contextlib import nullcontext

from streamconv.cli.console import Console
from streamconv.cli.parser import read_options
from streamconv.cli.showing import ending_softly, print_result, shows_bar
from streamconv.conversion.options import ConvertOptions
from streamconv.errors import FormatError, UsageError
from streamconv.planning.plan import Plan
from streamconv.running import run as running
from streamconv.running.destination import output_of
from streamconv.running.log import Line
from streamconv.running.output import begun_plan
from streamconv.running.progress import Progress
from streamconv.storage import is_url
from streamconv.storage.reading import read_whole

MOST_OF_PLAN = 512 << 20  # bytes of a plan's file: one of a million tensors has fewer


def execute(args: argparse.Namespace, out: Console) -> int:
    """Runs a plan, or a part of it, and says what it came to."""
    plan, head = _find_plan(args.plan, goes_on=args.resume or args.part is not None or args.finish)
    with ending_softly() if args.part or is_url(plan.root) else nullcontext():
        result = running.run(
            plan,
            reclaim_source=head.get("reclaim", False),
            settings=head.get("settings"),
            progress=Progress(shows_bar(args), args.verbose, plan.peak_memory),
            part=args.part,
            finish=args.finish,
            **read_options(args, ConvertOptions),
        )
    print_result(args, out, result)
    return 0 if result.fits else 1


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
