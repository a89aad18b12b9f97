"""What the installed transformers knows: its layouts, both ways, and its tensor-parallel plans; see `streamconv.bridge` and `parallel`."""

from __future__ import annotations

from streamconv.bridge import BRIDGES
from streamconv.parallel import MERGE, SPLIT

RECIPES = (*BRIDGES, SPLIT, MERGE)
