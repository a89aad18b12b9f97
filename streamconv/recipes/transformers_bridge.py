"""What the installed transformers knows: its layouts, both ways, and its tensor-parallel plans; see `streamconv.library`."""

from __future__ import annotations

from streamconv.library.bridge import BRIDGES
from streamconv.library.parallel import MERGE, SPLIT

RECIPES = (*BRIDGES, SPLIT, MERGE)
