"""What several commands print beside what they are for: bars, results, recipes worth a look."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields

from streamconv import interrupts
from streamconv.cli.console import Console, StdoutError
from streamconv.conversion.options import Options, about_of
from streamconv.diagnose import report
from streamconv.errors import StreamconvError
from streamconv.planning.plan import Plan
from streamconv.running.progress import Progress
from streamconv.running.results import Result
from streamconv.text import join_lines
from streamconv.units import parse_size


def shows_bar(args: argparse.Namespace) -> bool:
    """Whether a bar may be shown."""
    return not (args.quiet or args.no_progress)


def make_progress(args: argparse.Namespace) -> Progress:
    """How to show a run and, for its report, what to keep of it.

    Raises:
        UsageError: the report cannot be written.
    """
    if args.report:
        report.check_page(args.report)
    return Progress(shows_bar(args), args.verbose, parse_size(args.max_memory), record=args.report is not None)


def print_result(args: argparse.Namespace, out: Console, result: Result) -> None:
    """Says what a run came to. What it was to make is made: a stdout that is gone is a note on stderr."""
    try:
        if args.json:
            out.say_json(result.summary())
        elif not args.quiet:
            out.say(join_lines([*(f"note: {note}" for note in result.notes), *str(result).split("\n")]))
            if result.comparison:
                out.say(f"compared with {args.compare_with}: {result.comparison}")
        out.flush()
    except StdoutError as error:
        if error.reason:
            out.complain(f"note: all is done, but stdout cannot be written: {error.reason}")


def suggest_layouts(args: argparse.Namespace, plan: Plan, out: Console) -> None:
    """Says which other layouts there are of the model that config.json names, where nothing was said of what shall become of it."""
    deciding = [one for one in fields(Options) if about_of(one).decides]
    says_what = any(getattr(args, one.name) not in (one.default, []) for one in deciding)
    if says_what or args.to or args.json or args.quiet:
        return
    from streamconv.advice import matching  # which loads recipes, and all that these need

    with suppress(StreamconvError):
        if ways := matching.name_ways(args.src, _names_of(plan)):
            out.say(f"note: for another layout of this model: {' or '.join(ways)}")


def _names_of(plan: Plan) -> Iterator[str]:
    """What the tensors of a source are called, or would be if they were not quantized, by a plan without a recipe."""
    for row in plan.mapping:
        yield from (row.target,) if row.layout else row.sources


@contextmanager
def ending_softly() -> Iterator[None]:
    """Has what schedulers send before they kill be an interrupt, so that nothing unfinished is left."""
    before = signal.signal(signal.SIGTERM, interrupts.handle if interrupts.is_installed() else signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
