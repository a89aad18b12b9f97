"""``streamconv inspect SRC``."""

from __future__ import annotations

import argparse

from streamconv.cli.console import Console
from streamconv.cli.parser import read_root
from streamconv.diagnose import report
from streamconv.diagnose.ranks import open_with_ranks


def execute(args: argparse.Namespace, out: Console) -> int:
    """Lists what a checkpoint holds."""
    checkpoint, ranks = open_with_ranks(args.src, root=read_root(args), variant=args.variant)
    if ranks:
        from streamconv.diagnose import matching  # which loads recipes, and all that these need

        merging = matching.suggest_merging(checkpoint.location)
        advice = f": --recipe {merging[0]} merges them" if merging else ""
        checkpoint.contents.notes.append(f"{len(ranks.files)} ranks of one model, each with its part of the tensors{advice}")
    if args.filter:
        checkpoint = report.select(checkpoint, args.filter)
    if args.json:
        out.say_json(report.describe_checkpoint(checkpoint, stats=args.stats))
    else:
        for line in report.list_checkpoint(checkpoint, flat=args.all, stats=args.stats):
            out.say(line)
    return 0
