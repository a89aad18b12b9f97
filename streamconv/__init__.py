"""streamconv: converts model checkpoints bigger than the machine, in bounded memory.

``open``, ``plan``, ``run``, ``convert``, ``verify`` and ``doctor`` are the calls; `Recipe` and its `Rule`, `Drop`, `Make`, `Tie`, `Option`
declare a conversion; every error derives from `StreamconvError`. Paths may be URLs, with the extra ``remote``.
"""

from __future__ import annotations

from streamconv import interrupts, recipes  # noqa: F401 - the first one first: Ctrl-C may come while the others are imported
from streamconv._version import __version__ as __version__
from streamconv.checkpoint.entries import TensorEntry
from streamconv.checkpoint.opening import Checkpoint
from streamconv.checkpoint.opening import open_checkpoint as open  # noqa: A004 - streamconv.open(path)
from streamconv.convert.api import convert, plan, verify
from streamconv.diagnose.doctor import doctor
from streamconv.diagnose.matching import match_recipes
from streamconv.engine.comparison import Comparison
from streamconv.errors import (
    BudgetError,
    CoverageError,
    DestinationError,
    FormatError,
    Interrupted,
    NotationError,
    OutOfBounds,
    RecipeError,
    RunError,
    SourceChanged,
    SpaceError,
    StreamconvError,
    UsageError,
)
from streamconv.planning.plan import Plan
from streamconv.recipe import Drop, Make, Option, Recipe, Rule, Side, Tie
from streamconv.running.results import Result
from streamconv.running.run import run

recipes.match = match_recipes  # which opens checkpoints, and so stands above the recipes

__all__ = [
    "BudgetError",
    "Checkpoint",
    "Comparison",
    "CoverageError",
    "DestinationError",
    "Drop",
    "FormatError",
    "Interrupted",
    "Make",
    "NotationError",
    "Option",
    "OutOfBounds",
    "Plan",
    "Recipe",
    "RecipeError",
    "Result",
    "Rule",
    "RunError",
    "Side",
    "SourceChanged",
    "SpaceError",
    "StreamconvError",
    "TensorEntry",
    "Tie",
    "UsageError",
    "convert",
    "doctor",
    "open",
    "plan",
    "recipes",
    "run",
    "verify",
]
