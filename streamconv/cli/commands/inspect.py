"""``streamconv inspect SRC``."""

from __future__ import annotations

import argparse
from contextlib import suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from streamconv.checkpoint.opening import Checkpoint
from streamconv.cli.console import Console
from streamconv.cli.parser import read_root
from streamconv.diagnose import report
from streamconv.diagnose.ranks import open_with_ranks
from streamconv.errors import StreamconvError
from streamconv.formats.registry import DEFAULT
from streamconv.storage.locations import as_given
from streamconv.text import join_lines

if TYPE_CHECKING:
    from streamconv.advice.suggestions import Suggestion


def execute(args: argparse.Namespace, out: Console) -> int:
    """Lists what a checkpoint holds."""
    checkpoint, ranks = open_with_ranks(args.src, root=read_root(args), variant=args.variant)
    if ranks:
        from streamconv.advice import matching  # which loads recipes, and all that these need

        merging = matching.suggest_merging(checkpoint.location)
        advice = f": --recipe {merging[0]} merges them" if merging else ""
        checkpoint.contents.notes.append(f"{len(ranks.files)} ranks of one model, each with its part of the tensors{advice}")
    is_whole = not args.filter and (args.json or not args.all)
    suggestions = _suggest(args, checkpoint, by_rank=ranks is not None) if is_whole else []
    if args.filter:
        checkpoint = report.select(checkpoint, args.filter)
    if args.json:
        described = report.describe_checkpoint(checkpoint, stats=args.stats)
        out.say_json({**described, "suggestions": [asdict(one) for one in suggestions]})
    else:
        for line in report.list_checkpoint(checkpoint, flat=args.all, stats=args.stats):
            out.say(line)
        if suggestions:
            out.say(join_lines(["you can:", *(f"  {one}" for one in suggestions)]))
    return 0


def _suggest(args: argparse.Namespace, checkpoint: Checkpoint, *, by_rank: bool) -> list[Suggestion]:
    """What can be done with all of a checkpoint, where something says what it is: a config, its container, or that it is ranks."""
    with suppress(StreamconvError):
        is_told = checkpoint.config or "" not in checkpoint.components or checkpoint.folder.has_file("adapter_config.json")
        if not by_rank and checkpoint.format == DEFAULT and not is_told:
            return []
        from streamconv.advice.recognition import recognize, recognize_names  # which loads recipes, and all that these need
        from streamconv.advice.suggestions import suggest

        path = as_given(args.src, checkpoint.location)
        source = recognize(checkpoint.location, thorough=True) if by_rank else recognize_names(checkpoint, path)
        return suggest(replace(source, path=path))
    return []
