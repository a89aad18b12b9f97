"""Which options make of a checkpoint what is wanted: a function of what it is and what was said, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from streamconv.advice.goals import CONTAINER, DTYPE, LAYOUT, MERGE, OPTION, RANKS, SCHEME, Goal
from streamconv.advice.recognition import Fit, Recognition
from streamconv.errors import UsageError

_OWN_NAMES = ("safetensors", "torch", "dcp", "fsdp", "zero", "hf_shards")
"""Containers of tensors under the names that the model's class has in transformers, if a config names that."""
_SAFETENSORS = "safetensors"
_SHOWN = 6  # recipes that a question names
_HF = "hf"
SIDECARS = "--sidecars-from DIR"
"""How a config is given that does not lie with a checkpoint."""


class NoWay(UsageError):
    """Nothing makes of this checkpoint what is wanted, or it is that already."""


@dataclass(frozen=True)
class Decision:
    """What is to be done.

    Attributes:
        options: of `Options`, by field, as the command line has them; ``options`` are those of ``--set``.
        src: what is converted, where that is another checkpoint than the one that was given.
    """

    options: Mapping[str, object] = field(default_factory=dict)
    src: str = ""


def decide(source: Recognition, goals: Sequence[Goal], recipe: str | None = None) -> Decision:
    """The options that bring about what is wanted.

    Args:
        source: what there is.
        goals: what is wanted.
        recipe: the one that the caller chose among those that lead there; None: the one that fits.

    Raises:
        NoWay: it is that already, or nothing leads there.
        UsageError: several recipes lead there, and nothing says which is meant.
    """
    by_kind = {goal.kind: goal for goal in goals}
    if source.adapter_of is not None and (MERGE in by_kind or LAYOUT in by_kind or SCHEME in by_kind):
        return _merge(source, goals)
    if MERGE in by_kind:
        raise NoWay(f"{OPTION} {by_kind[MERGE]}: {source.path} is no PEFT adapter")
    options: dict[str, object] = {}
    if LAYOUT in by_kind or RANKS in by_kind:
        options |= _lay_out(source, by_kind.get(LAYOUT), by_kind.get(RANKS), recipe)
    for kind, goal in by_kind.items():
        if kind not in (LAYOUT, RANKS) and not _is_so(source, goal):
            options |= goal.options
    if DTYPE in by_kind and source.quantization and SCHEME not in by_kind:
        options["dequantize"] = True
    if not source.format and "recipe" not in options:
        raise NoWay(f"{OPTION} {','.join(map(str, goals))}: {source.path} is files of ranks, which only a recipe joins")
    if not options:
        raise NoWay(f"{OPTION} {','.join(map(str, goals))}: {source.path} is that already")
    if options.get("dequantize") and not source.decodable:
        raise NoWay(f"{OPTION} {goals[0]}: {source.path} is quantized by {source.quantization}; {source.remedy}")
    return Decision(options)


def takes_config(source: Recognition, goal: Goal) -> bool:
    """Whether something leads to Hugging Face's layout that takes a config.json, and none is there."""
    if goal.word != _HF or source.model_type or source.components or source.adapter_of is not None:
        return False
    try:
        fit = _choose(source, goal, [fit for fit in source.fits if goal.leads(fit.name)])
    except NoWay:
        return source.format in _OWN_NAMES and source.format != _SAFETENSORS
    except UsageError:
        return source.format != ""
    return not (fit.tried or fit.missing)


def _is_so(source: Recognition, goal: Goal) -> bool:
    """Whether a checkpoint is already what a word says."""
    if goal.kind == DTYPE:
        return not source.quantization and source.dtypes == {goal.options["dtype"]}
    if goal.kind == CONTAINER:
        return source.format == goal.options["format"]
    if goal.kind == SCHEME:
        return source.quantization == goal.options.get("quantize") or ("dequantize" in goal.options and not source.quantization)
    return False


def _merge(source: Recognition, goals: Sequence[Goal]) -> Decision:
    """An adapter into its base."""
    base = source.adapter_of
    words = ",".join(map(str, goals))
    if not base:
        raise NoWay(f"{OPTION} {words}: {source.path} is a PEFT adapter that names no base: convert BASE DST --adapter {source.path}")
    others = [goal for goal in goals if goal.kind != MERGE]
    if len(others) == len(goals) or any(goal.kind in (LAYOUT, RANKS) for goal in others):
        way = f"streamconv convert {base} DST --adapter {source.path}"
        raise NoWay(f"{OPTION} {words}: {source.path} is a PEFT adapter of {base}: '{way}' merges it; make another layout of that")
    options: dict[str, object] = {"adapter": [source.path]}
    for goal in others:
        options |= goal.options
    return Decision(options, base)


def _lay_out(source: Recognition, layout: Goal | None, ranks: Goal | None, recipe: str | None) -> dict[str, object]:
    """The recipe that leads to a layout, or to a number of ranks, and its options."""
    goal = layout or ranks
    assert goal is not None
    if source.components and recipe is None:
        raise NoWay(f"{OPTION} {goal}: {source.path} consists of {', '.join(source.components)}, and a recipe converts one model of them")
    if recipe is not None and not goal.leads(recipe):
        raise UsageError(f"{OPTION} {goal}: --recipe {recipe} does not lead there: leave out one of them")
    fits = [fit for fit in source.fits if goal.leads(fit.name)]
    if not fits and recipe is None and goal.word == _HF:
        return _keep_names(source, goal)
    chosen = next((fit for fit in fits if fit.name == recipe), Fit(recipe)) if recipe is not None else None
    fit = chosen or _choose(source, goal, fits)
    options: dict[str, object] = {"recipe": fit.name}
    if ranks is not None and not fit.ranks:
        raise NoWay(f"{OPTION} {ranks}: {fit.name} makes no ranks: leave out {ranks}")
    if ranks is not None:
        options["options"] = [f"{fit.ranks}={ranks.number}"]
    if fit.dequantized or (source.format == "gguf" and source.quantization):
        options["dequantize"] = True
    return options


def _keep_names(source: Recognition, goal: Goal) -> dict[str, object]:
    """Hugging Face's layout of what no recipe is for: its names as they are, if a config says that they are those."""
    if source.named and source.format in _OWN_NAMES and source.format != _SAFETENSORS:
        return {"format": _SAFETENSORS}
    if source.named and source.format == _SAFETENSORS:
        raise NoWay(f"{OPTION} {goal}: {source.path} is that already")
    if takes_config(source, goal):
        what = "config.json is missing, which says what model this is"
        raise NoWay(f"{OPTION} {goal}: {source.path}: {what}: give {SIDECARS}, a folder of the model")
    reason = "no recipe fits its names and shapes"
    if source.format in _OWN_NAMES:
        reason += f", and config.json does not say model type and class, as a library's does ({SIDECARS} has one)"
    raise NoWay(f"{OPTION} {goal}: {source.path}: {reason}")


def _choose(source: Recognition, goal: Goal, fits: Sequence[Fit]) -> Fit:
    """The one recipe that is meant: tried before untried ones, of the family that a config says."""
    if not fits:
        kind = f", of model type {source.model_type}" if source.model_type else ""
        raise NoWay(f"{OPTION} {goal}: no recipe leads there from {source.path}{kind}")
    for group in (_tried(fits), fits):
        related = [fit for fit in group if fit.related]
        if len(related) == 1:
            return related[0]
        if related:
            raise UsageError(f"{OPTION} {goal}: {len(related)} fit: {_list(related)}; {_ask(source)}")
    which = "one fits" if len(fits) == 1 else f"{len(fits)} fit"
    if not source.model_type:
        raise UsageError(f"{OPTION} {goal}: by names and shapes {which}: {_list(fits)}; {_ask(source)}")
    what = f"config.json says model type {source.model_type}, which is of no recipe's family; by names and shapes {which}: {_list(fits)}"
    raise UsageError(f"{OPTION} {goal}: {what}; say by --recipe that it is meant")


def _ask(source: Recognition) -> str:
    """What tells recipes apart that fit alike."""
    return "say which by --recipe" + ("" if source.model_type or not source.format else f", or give {SIDECARS}, a folder of the model")


def _tried(fits: Iterable[Fit]) -> list[Fit]:
    return [fit for fit in fits if fit.tried]


def _list(fits: Sequence[Fit]) -> str:
    more = f" and {len(fits) - _SHOWN} more" if len(fits) > _SHOWN else ""
    return ", ".join(fit.name for fit in fits[:_SHOWN]) + more
