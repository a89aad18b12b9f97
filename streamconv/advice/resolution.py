"""From the words of ``--to`` to options: looks at a checkpoint, decides, and says what there is where nothing leads there."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from streamconv.advice.decision import Decision, NoWay, decide
from streamconv.advice.goals import LAYOUT, OPTION, RANKS, read_goals
from streamconv.advice.recognition import recognize
from streamconv.advice.suggestions import possible_words
from streamconv.errors import UsageError
from streamconv.formats.catalog import locate
from streamconv.storage.folder import AnyPath


def resolve(
    src: AnyPath,
    words: Iterable[str],
    *,
    recipe: str | None = None,
    sidecars_from: AnyPath | None = None,
    root: str | None = None,
    variant: str | None = None,
) -> Decision:
    """What is to be done with a checkpoint so that it becomes what is wanted.

    Args:
        src: where it is.
        words: of ``--to``.
        recipe: the one that the caller chose; None: the one that fits.
        sidecars_from: where its config is, if not with it.
        root: the key of the dict of tensors in a file that nests them.
        variant: which variant of the weights is read.

    Raises:
        UsageError: no such word, it is that already, nothing leads there, or several recipes do.
        StreamconvError: the checkpoint cannot be read.
    """
    goals = read_goals(words)
    wanted = [goal for goal in goals if goal.kind in (LAYOUT, RANKS)]
    beside = locate(sidecars_from).folder if sidecars_from is not None else None
    look = partial(recognize, src, beside=beside, root=root, variant=variant)
    source = look(lambda name: any(goal.leads(name) for goal in wanted))
    try:
        decision = decide(source, goals, recipe)
    except NoWay as error:
        there = ", ".join(possible_words(look(thorough=True)))
        raise UsageError(f"{error}; {f'there is {OPTION} {there}' if there else 'nothing else leads anywhere either'}") from error
    if decision.src and not Path(decision.src).is_dir():  # nor is anything fetched because a file says so
        way = f"streamconv convert BASE DST --adapter {source.path}"
        raise UsageError(f"{OPTION} {goals[0]}: {source.path} is an adapter of {decision.src}, which is no folder here: '{way}' merges it")
    return decision
