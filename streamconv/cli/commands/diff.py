"""``streamconv diff A B``."""

from __future__ import annotations

import argparse

from streamconv.changes.finding import diff
from streamconv.cli.console import Console
from streamconv.cli.parser import read_options
from streamconv.cli.showing import make_progress
from streamconv.conversion.options import DiffOptions


def execute(args: argparse.Namespace, out: Console) -> int:
    """Says what changed between two checkpoints; the exit code is 1 if anything did."""
    progress = make_progress(args)
    options = read_options(args, DiffOptions)
    changes = diff(**options, progress=progress)
    if args.report:
        from streamconv.diagnose import report_page

        report_page.write(args.report, report_page.describe_diff(changes, DiffOptions(**options), progress))
    if args.json:
        out.say_json(changes.summary())
    elif not args.quiet:
        out.say(changes)
    return 0 if changes.equal else 1
