"""``python -m streamconv``: the command."""

import sys

from streamconv.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
