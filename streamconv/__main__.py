"""``python -m streamconv``: the command."""

import sys

from streamconv.cli import main

if __name__ == "__main__":
    sys.exit(main())
