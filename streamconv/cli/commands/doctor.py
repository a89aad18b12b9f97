"""``streamconv doctor SRC``."""

from __future__ import annotations

import argparse

from streamconv.cli.console import Console
from streamconv.cli.parser import read_root
from streamconv.diagnose.doctor import doctor
from streamconv.formats.catalog import locate
from streamconv.storage import is_url


def execute(args: argparse.Namespace, out: Console) -> int:
    """Says what is wrong with a checkpoint; the exit code is 1 if anything is."""
    src = locate(args.src) if is_url(args.src) else args.src
    examination = doctor(src, data=args.data, root=read_root(args), variant=args.variant, check_load=args.check_load)
    if args.json:
        out.say_json(examination.summary())
    elif not args.quiet:
        out.say(examination)
    return 0 if examination.healthy else 1
