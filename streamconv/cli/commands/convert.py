"""``streamconv convert SRC DST``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

from streamconv.cli.console import Console
from streamconv.cli.deciding import decide_options
from streamconv.cli.parser import read_options
from streamconv.cli.showing import ending_softly, make_progress, print_result, suggest_layouts
from streamconv.conversion import api
from streamconv.conversion.options import ConvertOptions
from streamconv.errors import RunError, StreamconvError, UsageError, writing
from streamconv.running.progress import Progress
from streamconv.running.results import Result
from streamconv.storage import is_url


def execute(args: argparse.Namespace, out: Console) -> int:
    """Converts, and says what it came to."""
    if args.reclaim_source and not args.yes:
        _confirm(args, out)
    if args.to:
        decide_options(args, out)
    result = make(args, out, api.convert)
    suggest_layouts(args, result.plan, out)
    return 0 if result.fits else 1


def make(args: argparse.Namespace, out: Console, call: Callable[..., Result]) -> Result:
    """Has a call that takes the options of a conversion make it, and says what it came to."""
    progress = make_progress(args)
    options = read_options(args, ConvertOptions)
    try:
        with ending_softly() if is_url(args.dst) else nullcontext():
            result = call(**options, progress=progress)
    except (StreamconvError, OSError) as error:
        _report_failure(args, options, progress, error)
        raise
    if args.report:
        from streamconv.diagnose import report_page

        with writing():
            report_page.write(args.report, report_page.describe_conversion(result, ConvertOptions(**options), progress))
    print_result(args, out, result)
    return result


def _report_failure(args: argparse.Namespace, options: dict[str, Any], progress: Progress, error: Exception) -> None:
    """Writes the page of a run that has begun and failed; nothing where none had begun, or it cannot be written either."""
    if args.report and progress.phases:
        from streamconv.diagnose import report_page

        with suppress(RunError):
            report_page.write(args.report, report_page.describe_failure(error, ConvertOptions(**options), progress))


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
