"""What can be done with a checkpoint: a few commands that work, and the words of ``--to`` that do."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from streamconv.advice.decision import SIDECARS, decide, takes_config
from streamconv.advice.goals import FILES, GOALS, LAYOUT, MERGE, OPTION, SCHEME, Goal
from streamconv.advice.recognition import Recognition
from streamconv.errors import UsageError
from streamconv.storage import is_url

MOST, MOST_LAYOUTS = 5, 3
WORDS = ("merged", "hf", "hub", "meta", "internvl", "original", "ms", "mcore", "sat", "safetensors", "bf16", "fp8", "int4", "one-file")
"""What is suggested, the likeliest first."""


@dataclass(frozen=True)
class Suggestion:
    """A command that works, and what comes out."""

    command: str
    what: str

    def __str__(self) -> str:
        return f"{self.command}  # {self.what}"


def list_suggestions(suggestions: Sequence[Suggestion]) -> list[str]:
    """What can be done, in lines; none where there is nothing."""
    return ["you can:", *(f"  {suggestion}" for suggestion in suggestions)] if suggestions else []


def suggest(source: Recognition) -> list[Suggestion]:
    """At most `MOST` commands that can be given as they are, but for DIR, where a config has to come from elsewhere."""
    chosen: list[Goal] = []
    outcomes: list[Mapping[str, object]] = []
    for goal in sorted(filter(_is_suggested, GOALS), key=lambda goal: WORDS.index(goal.word)):
        options = {"sidecars_from": "DIR"} if takes_config(source, goal) else _outcome(source, goal)
        is_one_of_many = goal.kind == LAYOUT and sum(one.kind == LAYOUT for one in chosen) == MOST_LAYOUTS
        if options is None or options in outcomes or is_one_of_many or not _is_sure(source, goal, options):
            continue
        outcomes.append(options)
        chosen.append(goal)
    return [_make_suggestion(source, goal) for goal in chosen[:MOST]]


def _make_suggestion(source: Recognition, goal: Goal) -> Suggestion:
    """The command that leads to a goal."""
    command = f"streamconv convert {shlex.quote(source.path)} {_name_result(source.path, goal)} {OPTION} {goal}"
    if not takes_config(source, goal):
        return Suggestion(command, goal.what)
    return Suggestion(f"{command} {SIDECARS}", f"{goal.what}; DIR has the model's config.json")


def possible_words(source: Recognition) -> Iterator[str]:
    """The words of ``--to`` that lead somewhere, each to something else."""
    outcomes: list[Mapping[str, object]] = []
    for goal in GOALS:
        options = _outcome(source, goal)
        if options is not None and options not in outcomes:
            outcomes.append(options)
            yield str(goal)


def _is_suggested(goal: Goal) -> bool:
    return goal.word in WORDS


def _outcome(source: Recognition, goal: Goal) -> Mapping[str, object] | None:
    """The options that bring it about; None: it is not, or by a package that is not here."""
    try:
        decision = decide(source, [goal])
    except UsageError:
        return None
    if goal.kind == SCHEME and goal.options.get("quantize") not in {None, *source.quantizable}:
        return None
    missing = any(fit.missing for fit in source.fits if fit.name == decision.options.get("recipe"))
    return None if missing else decision.options


def _is_sure(source: Recognition, goal: Goal, options: Mapping[str, object]) -> bool:
    """Whether it changes anything, and all that it takes has been looked at: shapes by the recipe, an adapter's base on this machine."""
    if goal.kind == FILES:
        return source.files > 1
    if goal.kind == MERGE:
        return Path(source.adapter_of or "").is_dir()
    if goal.kind == LAYOUT and goal.word != "hf" and not source.model_type:
        return False  # names are those of several families
    recipe = options.get("recipe")
    return recipe is None or any(fit.tried for fit in source.fits if fit.name == recipe)


def _name_result(path: str, goal: Goal) -> str:
    """What a result may be called: a folder beside this one's working directory."""
    name = PurePath(path.rstrip("/")).name if is_url(path) else Path(path).resolve().name
    stem = PurePath(name.partition("@")[0]).name.removesuffix(".json").removesuffix(".index")
    suffix = PurePath(stem).suffix
    stem = stem.removesuffix(suffix) if suffix in {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf"} else stem
    return shlex.quote(f"{stem or 'model'}-{goal.word}")
