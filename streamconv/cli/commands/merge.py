"""``streamconv merge FILE.yaml DST``."""

from __future__ import annotations

import argparse

from streamconv.cli.commands.convert import make
from streamconv.cli.console import Console
from streamconv.conversion import api


def execute(args: argparse.Namespace, out: Console) -> int:
    """Merges, and says what it came to."""
    return 0 if make(args, out, api.merge).fits else 1
