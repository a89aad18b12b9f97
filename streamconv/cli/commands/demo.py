"""``streamconv demo [DIR]``."""

from __future__ import annotations

import argparse

from streamconv import demo
from streamconv.cli.console import Console
from streamconv.cli.showing import shows_bar


def execute(args: argparse.Namespace, out: Console) -> int:
    """Converts a small checkpoint there and back; the exit code is 1 if it does not come home."""
    figures = demo.run(args.dir, progress=shows_bar(args))
    if args.json:
        out.say_json(figures)
    elif not args.quiet:
        out.say(demo.describe(figures))
    return 0 if figures["equal"] else 1
