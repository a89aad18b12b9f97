"""streamconv: converts model checkpoints bigger than the machine, in bounded memory.

``open``, ``plan``, ``run``, ``convert``, ``merge``, ``verify``, ``diff`` and ``doctor`` are the calls; `Recipe` and its `Rule`, `Drop`,
`Make`, `Tie`, `Option` declare a conversion; every error derives from `StreamconvError`. Paths may be URLs, with the extra ``remote``.

A name is imported when it is asked for.
"""

from __future__ import annotations

from importlib import import_module

from streamconv import interrupts as interrupts  # the first one first: Ctrl-C may come while others are imported
from streamconv._version import __version__ as __version__
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

TYPE_CHECKING = False
if TYPE_CHECKING:
    from streamconv import recipes
    from streamconv.changes.diff import Diff
    from streamconv.changes.finding import diff
    from streamconv.checkpoint.entries import TensorEntry
    from streamconv.checkpoint.opening import Checkpoint
    from streamconv.checkpoint.opening import open_checkpoint as open  # noqa: A004 - streamconv.open(path)
    from streamconv.conversion.api import convert, merge, plan, verify
    from streamconv.conversion.streaming import stream
    from streamconv.diagnose.doctor import doctor
    from streamconv.engine.comparison import Comparison
    from streamconv.planning.plan import Plan
    from streamconv.recipe import Drop, Make, Option, Recipe, Rule, Side, Tie
    from streamconv.recipe.functions import step
    from streamconv.running.results import Result
    from streamconv.running.run import run

_HOMES = {
    "Checkpoint": "checkpoint.opening",
    "Comparison": "engine.comparison",
    "Diff": "changes.diff",
    "Drop": "recipe",
    "Make": "recipe",
    "Option": "recipe",
    "Plan": "planning.plan",
    "Recipe": "recipe",
    "Result": "running.results",
    "Rule": "recipe",
    "Side": "recipe",
    "TensorEntry": "checkpoint.entries",
    "Tie": "recipe",
    "convert": "conversion.api",
    "diff": "changes.finding",
    "doctor": "diagnose.doctor",
    "merge": "conversion.api",
    "open": "checkpoint.opening:open_checkpoint",
    "plan": "conversion.api",
    "run": "running.run",
    "step": "recipe.functions",
    "stream": "conversion.streaming",
    "verify": "conversion.api",
}
"""Name -> the module that it is imported from when it is asked for, and what it is called there if that is another name."""

__all__ = [
    "BudgetError",
    "Checkpoint",
    "Comparison",
    "CoverageError",
    "DestinationError",
    "Diff",
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
    "diff",
    "doctor",
    "merge",
    "open",
    "plan",
    "recipes",
    "run",
    "step",
    "stream",
    "verify",
]


def __getattr__(name: str) -> object:
    if name == "recipes":
        return import_module("streamconv.recipes")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, own = _HOMES[name].partition(":")
    value = globals()[name] = getattr(import_module(f"streamconv.{module}"), own or name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
