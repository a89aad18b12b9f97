"""The command line."""

from streamconv.cli.command import main

__all__ = ["main"]
