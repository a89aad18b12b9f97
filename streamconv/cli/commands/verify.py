"""``streamconv verify A B``."""

from __future__ import annotations

import argparse

from streamconv.cli.console import Console
from streamconv.cli.parser import read_options
from streamconv.cli.showing import make_progress
from streamconv.conversion import api
from streamconv.conversion.options import VerifyOptions


def execute(args: argparse.Namespace, out: Console) -> int:
    """Compares two checkpoints; the exit code is 1 if they differ."""
    progress = make_progress(args)
    options = read_options(args, VerifyOptions)
    comparison = api.verify(**options, progress=progress)
    if args.report:
        from streamconv.diagnose import report_page

        report_page.write(args.report, report_page.describe_comparison(comparison, VerifyOptions(**options), progress))
    if args.json:
        out.say_json(comparison.summary())
    elif not args.quiet:
        out.say(comparison)
    return 0 if comparison.equal else 1
